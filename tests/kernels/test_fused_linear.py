"""Shrink and the fused GEMM: stacked targets, modulation and every epilogue against the reference."""

import pytest
import torch
import torch.nn.functional as F

from esengine.kernels import (
    Lora,
    MemberNoise,
    Modulation,
    fused_linear,
    fused_linear_ref,
    linear_streams,
    mix,
    mix_ref,
    population_linear_ref,
    shrink,
    shrink_ref,
    step_tensor,
    stream_table,
)
from esengine.kernels.noise import INTERPRET
from esengine.kernels.shrink import partial_sums_ref, takes_partial_sums

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Relative error of one rounding to nearest of a norm, doubled; fp32: sums in another order."""

pytestmark = pytest.mark.skipif(
    not (INTERPRET or torch.cuda.is_available()), reason="Triton kernels need TRITON_INTERPRET=1 or a GPU"
)


@pytest.fixture
def device():
    return "cpu" if INTERPRET else "cuda"


def draw(*shape, seed=0, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(device, dtype)


def case(*, batch=3, t=5, k=33, n=21, targets=3, r=2, rank=1, dtype=torch.float32, device="cpu"):
    """x, W, bias, adapters and perturbation of `targets` stacked linears."""
    names = tuple(linear_streams(f"layer{i}", direct=not r) for i in range(targets))
    a = draw(targets * r, k, seed=1, device=device) / k**0.5 if r else None
    b = draw(targets * n, r, seed=2, device=device) if r else None
    adapters = Lora(a, b, 1.5 if r else 1.0, stream_table(names, torch.device(device)))
    members = torch.tensor([7, 2, 2, 0, 3][:batch], device=device)
    perturbation = MemberNoise(members, seed=(1 << 63) + 5, step=4, sigma=0.1, rank=rank)
    weight = draw(targets * n, k, seed=3, dtype=dtype, device=device) / k**0.5
    x, bias = draw(batch, t, k, seed=4, dtype=dtype, device=device), draw(targets * n, dtype=dtype, device=device)
    return x, weight, bias, adapters, perturbation, names


def assert_close(got, expected, dtype=torch.float32, bound=None):
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    assert got.isfinite().all()
    error = (got.double() - expected.double()).norm() / expected.double().norm()
    assert error <= (ROUNDING[dtype] if bound is None else bound)


@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize("r", [0, 2, 8])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("t", [1, 17])
def test_shrink_of_stacked_targets(device, targets, r, rank, t):
    x, _, _, adapters, perturbation, _ = case(targets=targets, r=r, rank=rank, t=t, k=37, device=device)
    same, h = shrink(x, adapters, perturbation)
    assert same is x
    assert_close(h, shrink_ref(x, adapters, perturbation)[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t", [1, 16, 35])
@pytest.mark.parametrize("targets", [0, 3])
def test_modulated(device, dtype, t, targets):
    x, _, _, adapters, perturbation, _ = case(t=t, k=70, dtype=dtype, device=device)
    x = 3 * x + 50  # a mean that a one-pass variance would drown in
    table = draw(3, 6, 70, dtype=dtype, device=device)
    modulation = Modulation(table[:, 1], table[:, 4])
    adapters, perturbation = (adapters, perturbation) if targets else (None, None)
    got, h = shrink(x, adapters, perturbation, modulation)
    expected, h_expected = shrink_ref(x, adapters, perturbation, modulation)
    # fp32 of values near 50 leaves 2^-18 of a unit deviation
    error = (got.double() - expected.double()).norm() / expected.double().norm()
    assert error <= max(ROUNDING[dtype], 2.0**-16)
    if targets:
        own = shrink_ref(got, adapters, perturbation)[1]
        assert_close(h, own, dtype if INTERPRET else torch.float32)  # the interpreter keeps x' in fp32 for the product
        assert (h - h_expected).norm() <= max(ROUNDING[dtype], 2.0**-15) * h_expected.norm()
    else:
        assert h is None


@pytest.mark.parametrize("swapped", [False, True])
def test_modulated_by_rows_of_unlike_strides(device, swapped):
    """A shift of its own and a scale out of a table of six, or the reverse."""
    x, _, _, adapters, perturbation, _ = case(t=5, k=70, device=device)
    own, of_table = draw(3, 70, device=device), draw(3, 6, 70, seed=9, device=device)[:, 1]
    modulation = Modulation(of_table, own) if swapped else Modulation(own, of_table)
    got, h = shrink(x, adapters, perturbation, modulation)
    expected, h_expected = shrink_ref(x, adapters, perturbation, modulation)
    assert_close(got, expected)
    assert_close(h, h_expected)
    apart = x.new_zeros(3, 4, 70)[:, 0].copy_(of_table), x.new_zeros(3, 2, 70)[:, 1].copy_(own)
    again, _ = shrink(x, adapters, perturbation, Modulation(*apart if swapped else apart[::-1]))
    assert torch.equal(again, got)


def test_modulated_by_torch(device):
    """The reference itself, against torch's own modules."""
    x, *_ = case(k=70, device=device)
    shift, scale = draw(3, 70, device=device), draw(3, 70, seed=9, device=device)
    expected = F.layer_norm(x, (70,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    assert_close(shrink_ref(x, None, None, Modulation(shift, scale))[0], expected)


@pytest.mark.parametrize("mean", [0.0, 300.0, -3e4])
def test_statistics_in_one_pass_lose_no_digits_to_a_mean_far_from_zero(device, mean):
    """The sums are of differences to a row's first element: as close to fp64 as torch's own norm of the same x."""
    x, *_ = case(k=70, t=5, device=device)
    x += mean
    zero = torch.zeros(3, 70, device=device)
    exact = F.layer_norm(x.double(), (70,), eps=1e-6)
    own = (F.layer_norm(x, (70,), eps=1e-6).double() - exact).abs().max()
    error = (shrink(x, None, None, Modulation(zero, zero))[0].double() - exact).abs().max()
    assert error <= 4 * own + 4 * abs(mean) * 2.0**-24


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("targets", [1, 2, 3])
@pytest.mark.parametrize(("t", "n"), [(1, 21), (17, 64), (40, 70)])
def test_stacked_targets(device, dtype, targets, t, n):
    x, weight, bias, adapters, perturbation, names = case(targets=targets, t=t, n=n, dtype=dtype, device=device)
    h = shrink(x, adapters, perturbation)[1]
    y = fused_linear(x, weight, bias, h=h, adapters=adapters, perturbation=perturbation)
    assert_close(y, fused_linear_ref(x, weight, bias, h=h, adapters=adapters, perturbation=perturbation), dtype)
    for i, streams in enumerate(names):
        rows, low = slice(i * n, (i + 1) * n), slice(2 * i, 2 * i + 2)
        target = Lora(adapters.a[low], adapters.b[rows], 1.5, stream_table((streams,), x.device))
        alone = population_linear_ref(x, weight[rows], bias[rows], target, perturbation)
        assert_close(y[..., rows].contiguous(), alone, dtype)


@pytest.mark.parametrize(("targets", "r", "rank"), [(3, 24, 1), (1, 70, 2), (1, 128, 1)])
def test_large_ranks(device, targets, r, rank):
    """More low-rank columns than one product takes."""
    x, weight, bias, adapters, perturbation, _ = case(
        batch=2, targets=targets, r=r, rank=rank, t=17, k=20, device=device
    )
    h = shrink(x, adapters, perturbation)[1]
    assert_close(h, shrink_ref(x, adapters, perturbation)[1])
    settings = dict(h=h, adapters=adapters, perturbation=perturbation)
    assert_close(fused_linear(x, weight, bias, **settings), fused_linear_ref(x, weight, bias, **settings))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, "silu", "gelu_tanh"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("expand", [False, True])
def test_epilogues(device, dtype, activation, gated, residual, expand):
    x, weight, bias, adapters, perturbation, _ = case(targets=1, t=17, n=70, dtype=dtype, device=device)
    table = draw(3, 6, 70, dtype=dtype, device=device)
    options = dict(activation=activation, gate=table[:, 2] if gated else None)
    options["residual"] = draw(3, 17, 70, seed=5, dtype=dtype, device=device) if residual else None
    if expand:
        h = shrink(x, adapters, perturbation)[1]
        options |= dict(h=h, adapters=adapters, perturbation=perturbation)
    assert_close(fused_linear(x, weight, bias, **options), fused_linear_ref(x, weight, bias, **options), dtype)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_activations_far_from_zero(device, activation):
    x, weight = (
        torch.tensor([[[-90.0], [-12.0], [0.0], [12.0], [90.0]]], device=device),
        torch.ones(3, 1, device=device),
    )
    y = fused_linear(x, weight, activation=activation)
    assert_close(y, fused_linear_ref(x, weight, activation=activation))
    assert torch.equal(y[0, :, 0][[0, 2, 4]].cpu(), torch.tensor([0.0, 0.0, 90.0]))


def test_an_unknown_activation_is_refused(device):
    with pytest.raises(ValueError, match="activation: expected one of silu, gelu_tanh or None, got 'relu'"):
        fused_linear(torch.zeros(1, 1, 16, device=device), torch.zeros(4, 16, device=device), activation="relu")


def test_strides(device):
    x, weight, bias, adapters, perturbation, _ = case(t=6, k=40, device=device)
    wide = torch.cat((x, x), 2).transpose(0, 1).contiguous().transpose(0, 1)[..., :40]
    modulation = Modulation(draw(3, 40, device=device), draw(3, 40, seed=9, device=device))
    strided, dense = (shrink(rows, adapters, perturbation, modulation) for rows in (wide, x))
    assert torch.equal(strided[0], dense[0])
    assert torch.equal(strided[1], dense[1])
    assert torch.equal(fused_linear(wide, weight, bias), fused_linear(x, weight, bias))


@pytest.mark.usefixtures("every_row_alike")
def test_a_row_does_not_depend_on_its_batch_mates(device):
    x, weight, bias, adapters, perturbation, _ = case(batch=5, t=17, device=device)
    modulation = Modulation(draw(5, 33, device=device), draw(5, 33, seed=9, device=device))

    def run(rows):
        here = perturbation._replace(members=perturbation.members[rows].contiguous())
        shifted, h = shrink(x[rows], adapters, here, Modulation(modulation.shift[rows], modulation.scale[rows]))
        return fused_linear(shifted, weight, bias, h=h, adapters=adapters, perturbation=here, activation="silu")

    every = run(slice(None))
    for row in range(5):
        assert torch.equal(run(slice(row, row + 1))[0], every[row])


def test_nothing_to_compute(device):
    x, weight, bias, adapters, perturbation, _ = case(device=device)
    none = perturbation._replace(members=perturbation.members[:0])
    modulation = Modulation(x[:0, 0], x[:0, 0])
    shifted, h = shrink(x[:0], adapters, none, modulation)
    assert shifted.shape == (0, 5, 33)
    assert h.shape == (0, 5, 9)
    assert fused_linear(shifted, weight, bias, h=h, adapters=adapters, perturbation=none).shape == (0, 5, 63)
    shifted, h = shrink(x[:, :0], None, None, Modulation(x[:, 0], x[:, 0]))
    assert shifted.shape == (3, 0, 33)
    assert h is None


def test_the_step_is_read_from_memory(device):
    """A tensor gives what its number gives, and the same launches follow what is written into it."""
    x, weight, bias, adapters, perturbation, _ = case(t=17, device=device)
    modulation = Modulation(draw(3, 33, device=device), draw(3, 33, seed=9, device=device))

    def run(step):
        here = perturbation._replace(step=step)
        shifted, h = shrink(x, adapters, here, modulation)
        return fused_linear(shifted, weight, bias, h=h, adapters=adapters, perturbation=here), h

    step = step_tensor(4, x.device)
    for number in (4, (1 << 32) - 1):
        step.fill_(number)
        for from_memory, given in zip(run(step), run(number), strict=True):
            assert torch.equal(from_memory, given)
    assert not torch.equal(run(4)[1], run(5)[1])
    here = perturbation._replace(step=step)
    _, h = shrink(x, adapters, here)
    assert_close(h, shrink_ref(x, adapters, here)[1])
    got = fused_linear(x, weight, bias, h=h, adapters=adapters, perturbation=here)
    assert_close(got, fused_linear_ref(x, weight, bias, h=h, adapters=adapters, perturbation=here))


def test_a_step_that_does_not_fit_is_named(device):
    x, _, _, adapters, perturbation, _ = case(device=device)
    for step in (torch.tensor(4), torch.tensor([4], dtype=torch.int32), torch.tensor([4, 5])):
        with pytest.raises(ValueError, match=r"step: expected int64 \[1\]"):
            shrink(x, adapters, perturbation._replace(step=step.to(device)))
    given = torch.tensor([3], device=device)
    assert step_tensor(given, given.device) is given


def target(k, r, rank, device):
    """One linear of K columns that reads what another op makes, and the noise of four members."""
    streams = stream_table((linear_streams("next", direct=not r),), torch.device(device))
    a = draw(r, k, seed=8, device=device) / k**0.5 if r else None
    members = torch.tensor([7, 2, 2, 0], device=device)
    return Lora(a, None, 1.5 if r else 1.0, streams), MemberNoise(members, (1 << 63) + 5, 4, 0.1, rank)


@pytest.mark.parametrize(("r", "rank"), [(0, 1), (2, 1), (2, 2), (8, 3), (15, 1)])
@pytest.mark.parametrize("parts", [1, 5])
def test_mix(device, r, rank, parts):
    """`mix` of partial sums of x [A^T | V] gives the h of `shrink`, however x is cut."""
    adapters, perturbation = target(40, r, rank, device)
    x = draw(4, 70, 40, device=device)
    whole = partial_sums_ref(x.bfloat16(), adapters, perturbation)
    weights = torch.linspace(-1, 1, parts, device=device) + 1 / parts if parts > 1 else torch.ones(1, device=device)
    cut = whole * weights[:, None, None, None]
    assert_close(mix_ref(cut, adapters, perturbation), shrink_ref(x.bfloat16(), adapters, perturbation)[1])
    assert_close(mix(cut, adapters, perturbation), mix_ref(cut, adapters, perturbation))


@pytest.mark.usefixtures("every_row_alike")
@pytest.mark.parametrize(("r", "rank"), [(0, 1), (2, 1), (8, 3)])
@pytest.mark.parametrize(("t", "n"), [(1, 70), (17, 70), (64, 300)])
def test_partial_sums_of_a_linear(device, r, rank, t, n):
    """What the GEMM leaves for the linear that reads y, and y as without it, where tiles touch several members too."""
    next_lora, perturbation = target(n, r, rank, device)
    x, residual = (
        draw(4, t, 40, dtype=torch.bfloat16, device=device),
        draw(4, t, n, dtype=torch.bfloat16, device=device),
    )
    weight, gate = draw(n, 40, dtype=torch.bfloat16, device=device), draw(4, n, seed=5, device=device).bfloat16()
    options = dict(residual=residual, gate=gate, perturbation=perturbation)
    y, partial_sums = fused_linear(x, weight, **options, next_lora=next_lora)
    assert torch.equal(y, fused_linear(x, weight, **options))
    assert partial_sums.shape[1:] == (4, t, r + rank)
    # two bf16 halves of a column are within 2^-16 of it; the interpreter multiplies y before it is rounded
    bound = 2.0**-7 if INTERPRET else 2.0**-15
    assert_close(partial_sums.sum(0), partial_sums_ref(y, next_lora, perturbation)[0], bound=bound)
    assert_close(mix(partial_sums, next_lora, perturbation), shrink_ref(y, next_lora, perturbation)[1], bound=bound)
    some = perturbation._replace(members=perturbation.members[2:].contiguous())
    options = dict(residual=residual[2:], gate=gate[2:], perturbation=some)
    assert torch.equal(fused_linear(x[2:], weight, **options, next_lora=next_lora)[1], partial_sums[:, 2:])


@pytest.mark.parametrize("activation", [None, "gelu_tanh"])
def test_partial_sums_after_low_rank_columns(device, activation):
    """The last tile has more columns than y. Noise in those must not be in the partial sums."""
    next_lora, perturbation = target(70, 2, 1, device)
    own = Lora(draw(2, 40, device=device), draw(70, 2, device=device), 1.5, next_lora.streams)
    x, weight = draw(4, 17, 40, device=device).bfloat16(), draw(70, 40, seed=3, device=device).bfloat16()
    options = dict(h=shrink(x, own, perturbation)[1], adapters=own, perturbation=perturbation, activation=activation)
    y, partial_sums = fused_linear(x, weight, **options, next_lora=next_lora)
    assert torch.equal(y, fused_linear(x, weight, **options))
    bound = 2.0**-7 if INTERPRET else 2.0**-15  # as above
    assert_close(partial_sums.sum(0), partial_sums_ref(y, next_lora, perturbation)[0], bound=bound)


def test_partial_sums_that_no_op_makes_are_refused(device):
    next_lora, perturbation = target(40, 2, 1, device)
    x, weight = draw(4, 3, 40, dtype=torch.bfloat16, device=device), draw(40, 40, dtype=torch.bfloat16, device=device)
    assert takes_partial_sums(next_lora, 1, torch.bfloat16)
    with pytest.raises(ValueError, match=r"next_lora: expected one target .* of bfloat16, got 1 with 3 of float32"):
        fused_linear(x.float(), weight.float(), perturbation=perturbation, next_lora=next_lora)
    wide, _ = target(40, 16, 1, device)
    with pytest.raises(ValueError, match=r"next_lora: expected one target with r [+] k of at most 16"):
        fused_linear(x, weight, perturbation=perturbation, next_lora=wide)
    stack = case(targets=3, device=device)[3]
    with pytest.raises(ValueError, match="next_lora: expected one target"):
        fused_linear(x, weight, perturbation=perturbation, next_lora=stack)
    h = x.new_zeros(4, 3, 9, dtype=torch.float32)
    with pytest.raises(ValueError, match="next_lora: expected to follow one target, got 3"):
        fused_linear(x, weight[:39], h=h, adapters=stack, perturbation=perturbation, next_lora=next_lora)
