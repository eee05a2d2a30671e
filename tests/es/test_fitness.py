import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esengine.es import fitness

DIMS = st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(1, 3))


def scores_of(seed, dims):
    return torch.randn(*dims, generator=torch.Generator().manual_seed(seed))


def naive(scores, prompt_std="global"):
    """The formula, one number at a time."""
    n_members, n_prompts, n_repeats = scores.shape
    s = scores.tolist()
    c = [[[0.0] * n_repeats for _ in range(n_prompts)] for _ in range(n_members)]
    for p in range(n_prompts):
        mean = sum(s[n][p][r] for n in range(n_members) for r in range(n_repeats)) / (n_members * n_repeats)
        for n in range(n_members):
            for r in range(n_repeats):
                c[n][p][r] = s[n][p][r] - mean
    squares = [sum(x * x for member in c for x in member[p]) / (n_members * n_repeats) for p in range(n_prompts)]
    std = [(sum(squares) / n_prompts) ** 0.5] * n_prompts
    if prompt_std == "own":
        std = [max(square**0.5, std[0] / 100) for square in squares]
    return torch.tensor(
        [sum(sum(member[p]) / std[p] for p in range(n_prompts)) / n_prompts / n_repeats for member in c]
    )


@pytest.mark.parametrize("prompt_std", fitness.PROMPT_STDS)
def test_prompt_normalized_is_the_formula(prompt_std):
    scores = (
        scores_of(0, (6, 3, 2)) * torch.tensor([5.0, 0.5, 1e-4])[:, None] + torch.tensor([100.0, -3.0, 0.0])[:, None]
    )
    expected = naive(scores, prompt_std)
    torch.testing.assert_close(fitness.prompt_normalized(scores, prompt_std), expected, rtol=1e-4, atol=1e-6)


def test_known_values():
    scores = torch.tensor([[[1.0], [10.0]], [[3.0], [14.0]]])  # centred: -1, -2 and 1, 2; std sqrt(2.5)
    expected = torch.tensor([-1.5, 1.5]) / 2.5**0.5
    torch.testing.assert_close(fitness.prompt_normalized(scores), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(fitness.shape(scores, "none"), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(fitness.shape(scores, "zscore"), torch.tensor([-1.0, 1.0]), rtol=1e-6, atol=0)
    assert fitness.shape(scores, "centered_rank").tolist() == [-0.5, 0.5]


def test_ranks_share_ties():
    scores = torch.tensor([7.0, 1.0, 7.0, 7.0, -2.0])[:, None, None]
    assert fitness.shape(scores, "centered_rank").tolist() == [0.25, -0.25, 0.25, 0.25, -0.5]


@given(seed=st.integers(0, 10**6), dims=DIMS, shift=st.integers(-100, 100))
@settings(max_examples=40, deadline=None)
def test_a_prompts_level_does_not_matter(seed, dims, shift):
    scores = (scores_of(seed, dims) * 8).round()  # whole numbers, so that the shift itself is exact
    moved = scores.clone()
    moved[:, 0] += shift
    for method in fitness.METHODS:
        torch.testing.assert_close(fitness.shape(moved, method), fitness.shape(scores, method), rtol=1e-5, atol=1e-6)


@given(seed=st.integers(0, 10**6), dims=DIMS, power=st.integers(-30, 30))
@settings(max_examples=40, deadline=None)
def test_scale_does_not_matter(seed, dims, power):
    scores = scores_of(seed, dims)
    for method in fitness.METHODS:
        scaled = fitness.shape(scores * 2.0**power, method)
        torch.testing.assert_close(scaled, fitness.shape(scores, method), rtol=1e-5, atol=1e-6)


@given(seed=st.integers(0, 10**6), dims=st.tuples(st.integers(5, 9), st.integers(2, 4), st.integers(2, 3)))
@settings(max_examples=40, deadline=None)
def test_by_its_own_deviation_a_prompts_scale_does_not_matter(seed, dims):
    scores = scores_of(seed, dims)
    louder = scores * torch.tensor([4.0] + [1.0] * (dims[1] - 1))[:, None]
    for method in fitness.METHODS:
        found = fitness.shape(louder, method, "own")
        torch.testing.assert_close(found, fitness.shape(scores, method, "own"), rtol=1e-5, atol=1e-6)


def test_a_prompt_whose_scores_hardly_differ_has_no_say_by_its_own_deviation():
    scores = scores_of(5, (8, 2, 1))
    still = scores.clone()
    still[:, 1] = 20 + 1e-6 * scores[:, 1]  # rounding of a score
    without = still.clone()
    without[:, 1] = 20
    found, expected = (fitness.shape(each, "none", "own") for each in (still, without))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
    assert fitness.shape(torch.full((4, 2, 1), 0.1), "zscore", "own").tolist() == [0.0] * 4


@given(seed=st.integers(0, 10**6), dims=DIMS)
@settings(max_examples=40, deadline=None)
def test_reordering_members_reorders_fitness(seed, dims):
    scores = scores_of(seed, dims)
    order = torch.randperm(dims[0], generator=torch.Generator().manual_seed(seed))
    for method in fitness.METHODS:
        expected = fitness.shape(scores, method)[order]
        torch.testing.assert_close(fitness.shape(scores[order], method), expected, rtol=1e-5, atol=1e-6)


@given(seed=st.integers(0, 10**6), dims=st.tuples(st.integers(2, 9), st.integers(1, 4), st.integers(1, 3)))
@settings(max_examples=40, deadline=None)
def test_moments_and_range(seed, dims):
    scores = scores_of(seed, dims)
    z = fitness.shape(scores, "zscore").double()
    assert abs(z.mean()) < 1e-6
    assert abs(z.std(unbiased=False) - 1) < 1e-6
    rank = fitness.shape(scores, "centered_rank")
    assert sorted(rank.tolist()) == pytest.approx([i / (dims[0] - 1) - 0.5 for i in range(dims[0])], abs=1e-6)


@pytest.mark.parametrize("method", fitness.METHODS)
@pytest.mark.parametrize("level", [0.0, 0.1, -1e6, 3e-40, 3e38])
def test_a_flat_population_is_all_zeros(method, level):
    scores = torch.full((7, 3, 3), level)
    scores[:, 1] = 0.3
    result = fitness.shape(scores, method)
    assert result.dtype == torch.float32
    assert result.tolist() == [0.0] * 7


@given(seed=st.integers(0, 10**6), members=st.integers(1, 9), level=st.sampled_from([0.0, 1e4, -1e7]))
@settings(max_examples=40, deadline=None)
def test_equal_members_are_zeros_though_their_repeats_differ(seed, members, level):
    one = scores_of(seed, (1, 3, 5)) + level
    for method in ("zscore", "centered_rank"):
        assert fitness.shape(one.expand(members, -1, -1), method).tolist() == [0.0] * members


def test_members_equal_in_sum_tie_whatever_the_order_of_their_repeats():
    row = scores_of(3, (1, 1, 7))
    scores = torch.cat([row.roll(i, dims=2) for i in range(5)] + [row + 1])
    assert fitness.shape(scores, "centered_rank").tolist() == pytest.approx([-0.1] * 5 + [0.5])


def test_one_member_and_replay():
    assert fitness.shape(scores_of(0, (1, 2, 2))).tolist() == [0.0]
    scores = scores_of(1, (64, 4, 4))
    for method in fitness.METHODS:
        assert torch.equal(fitness.shape(scores, method), fitness.shape(scores.clone(), method))
        strided = scores.permute(2, 1, 0).contiguous().permute(2, 1, 0)
        torch.testing.assert_close(fitness.shape(strided, method), fitness.shape(scores, method), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_not_finite_is_named(bad):
    scores = torch.zeros(4, 3, 2)
    scores[2, 1, 0] = bad
    with pytest.raises(ValueError, match=r"finite.*\[2, 1, 0\]"):
        fitness.shape(scores)


@pytest.mark.parametrize(
    "scores",
    [torch.zeros(4), torch.zeros(4, 2), torch.zeros(0, 2, 2), torch.zeros(2, 0, 2), torch.zeros(2, 2, 2).double()],
)
def test_wrong_shape_or_dtype(scores):
    with pytest.raises(ValueError, match="scores: expected float32"):
        fitness.prompt_normalized(scores)


def test_unknown_method():
    with pytest.raises(ValueError, match="zscore, centered_rank, none"):
        fitness.shape(torch.zeros(2, 1, 1), "rank")
    with pytest.raises(ValueError, match="prompt_std: expected one of global, own, got 'each'"):
        fitness.shape(torch.zeros(2, 1, 1), prompt_std="each")
