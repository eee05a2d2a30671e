import asyncio
import copy
import functools
import io
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from esengine import rewards
from esengine.base.errors import ConfigError, OutOfMemory, RewardError
from esengine.rewards.base import as_scores, takes_metadata
from esengine.rewards.fault_tolerant import FaultTolerant

PROMPTS = ["a cat", "a dog", "a fox", "an owl"]


def noise_images(batch=4, height=24, width=40):
    return torch.randint(256, (batch, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def constant(value):
    return lambda images, prompts: torch.full((len(images),), value)


def weighted(reward, name="my_mod:score", weight=1.0):
    return rewards.Weighted([(name, reward, weight)])


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """Write a module into the current folder, under a name no other test uses."""
    monkeypatch.chdir(tmp_path)

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return name

    yield write
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_jpeg_is_minus_the_files_kilobytes():
    images = noise_images()
    score = rewards.load("jpeg_compressibility")(images, PROMPTS)
    assert score.dtype == torch.float32
    for row in range(4):
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(images[row].permute(1, 2, 0).numpy())).save(buffer, "JPEG", quality=95)
        assert score[row].item() == pytest.approx(-len(buffer.getvalue()) / 1000, rel=1e-6)
    assert torch.equal(rewards.load("jpeg_incompressibility")(images, PROMPTS), -score)


def test_jpeg_prefers_plain_images_and_lower_quality_is_smaller():
    plain = torch.full((1, 3, 32, 32), 128, dtype=torch.uint8)
    noisy = noise_images(1, 32, 32)
    reward = rewards.load("jpeg_compressibility")
    assert reward(plain, [""]) > reward(noisy, [""])
    assert rewards.load("jpeg_compressibility", quality=30)(noisy, [""]) > reward(noisy, [""])


def test_jpeg_does_not_depend_on_batch_mates_or_layout():
    images = noise_images(37)
    reward = rewards.load("jpeg_compressibility")
    whole = reward(images, [""] * 37)
    assert torch.equal(whole, torch.cat([reward(images[i : i + 1], [""]) for i in range(37)]))
    strided = images.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    assert torch.equal(whole, reward(strided, [""] * 37))
    assert reward(images[:0], []).shape == (0,)


@pytest.mark.parametrize("options", [{"quality": 0}, {"quality": 101}, {"quality": "high"}, {"size": 3}])
def test_jpeg_options_that_do_not_fit(options):
    with pytest.raises(ConfigError, match="options") as caught:
        rewards.load("jpeg_compressibility", **options)
    assert caught.value.setting == "reward jpeg_compressibility"


@pytest.mark.parametrize("name", ["nope", "", "a:", ":b", "jpeg"])
def test_unknown_name_lists_the_known_ones(name):
    with pytest.raises(ConfigError, match=r"jpeg_incompressibility.*module:attr"):
        rewards.load(name)


def test_module_attr_from_the_current_folder(user_module):
    name = user_module("mine_a", "import torch\ndef score(images, prompts):\n    return torch.ones(len(images))\n")
    before = list(sys.path)
    assert rewards.load(f"{name}:score")(noise_images(), PROMPTS).tolist() == [1.0] * 4
    assert sys.path == before
    with pytest.raises(ConfigError, match="scale") as caught:
        rewards.load(f"{name}:score", scale=2)
    assert caught.value.setting == "reward mine_a:score"


def test_an_installed_package_is_not_hidden_by_the_current_folder(user_module):
    user_module("colorsys", "raise RuntimeError('shadowed')")
    assert callable(rewards.load("colorsys:rgb_to_hsv"))


def test_a_class_is_built_and_a_factory_is_not(user_module):
    text = (
        "class Scaled:\n"
        "    def __init__(self, scale=1.0):\n"
        "        self.scale = scale\n"
        "    def __call__(self, images, prompts):\n"
        "        return images.float().mean((1, 2, 3)) * self.scale\n"
        "    def method(self): ...\n"
        "class NotCallable: ...\n"
        "def factory(images=None, prompts=None):\n"
        "    raise AssertionError('called')\n"
        "number = 3\n"
    )
    name = user_module("mine_b", text)
    assert rewards.load(f"{name}:Scaled", scale=2.0).scale == 2.0
    assert rewards.load(f"{name}:factory").__name__ == "factory"
    assert rewards.load(f"{name}:Scaled.method").__name__ == "method"
    for attribute, message in [
        ("number", "expected a callable, got int"),
        ("NotCallable", "expected a callable"),
        ("absent", r"mine_b\.py\) has no attribute absent"),
    ]:
        with pytest.raises(ConfigError, match=message):
            rewards.load(f"{name}:{attribute}")
    with pytest.raises(ConfigError, match="TypeError"):
        rewards.load(f"{name}:Scaled", size=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [("import no_such_library_x", "no_such_library_x"), ("1/0", "ZeroDivisionError"), ("raise SystemExit(0)", "Exit")],
)
def test_failing_import_gives_the_cause_and_cleans_up(user_module, text, message):
    name = user_module("mine_c", text)
    before = list(sys.path)
    with pytest.raises(ConfigError, match=message) as caught:
        rewards.load(f"{name}:score")
    assert caught.value.__cause__ is not None
    assert "\n" not in str(caught.value)
    assert sys.path == before


def test_no_such_module():
    with pytest.raises(ConfigError, match="no_such_module_y"):
        rewards.load("no_such_module_y:score")


def test_one_reward_of_weight_one_is_its_own_sum_bit_for_bit():
    awkward = torch.tensor([-0.0, 1e-42, 3.4e38, -0.1])
    scores = weighted(lambda images, prompts: awkward).score(noise_images(), PROMPTS)
    assert list(scores) == ["my_mod:score", "combined"]
    for score in scores.values():
        assert torch.equal(score.view(torch.int32), awkward.view(torch.int32))


def test_weighted_sum():
    both = rewards.parse("jpeg_compressibility=0.25, jpeg_incompressibility=-2")
    assert both.names == ["jpeg_compressibility", "jpeg_incompressibility"]
    scores = both.score(noise_images(), PROMPTS)
    assert scores["combined"].dtype == torch.float32
    torch.testing.assert_close(scores["combined"], 2.25 * scores["jpeg_compressibility"], rtol=1e-6, atol=0)


def test_weight_zero_is_reported_only():
    scores = rewards.Weighted([("a", constant(3.0), 1.0), ("b", constant(3e38), 0.0)]).score(noise_images(), PROMPTS)
    assert scores["combined"].tolist() == [3.0] * 4
    assert scores["b"][0] > 1e38


def test_parse_takes_the_users_own(user_module):
    name = user_module("mine_d", "import torch\ndef score(images, prompts):\n    return torch.zeros(len(images))\n")
    assert rewards.parse(f"jpeg_compressibility,{name}:score=1e-1").names == ["jpeg_compressibility", "mine_d:score"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "between commas"),
        ("jpeg_compressibility,", "between commas"),
        ("=2", "between commas"),
        ("jpeg_compressibility=", "number for its weight"),
        ("jpeg_compressibility=a", "number for its weight, got 'a'"),
        ("jpeg_compressibility=nan", "finite weight"),
        ("jpeg_compressibility=1e999", "finite weight"),
        ("jpeg_compressibility=0", "other than 0"),
        ("jpeg_compressibility,jpeg_compressibility=2", "2 times"),
        ("jpeg_compressibility=1=2", "number for its weight"),
        ("jpeg_compressibility,nope", "unknown reward 'nope'"),
    ],
)
def test_parse_refuses(spec, message):
    with pytest.raises(ConfigError, match=message):
        rewards.parse(spec)


def test_combined_is_a_reserved_name_and_no_terms_are_refused():
    with pytest.raises(ConfigError, match="reserved"):
        weighted(constant(1.0), name="combined")
    with pytest.raises(ConfigError, match="at least one"):
        rewards.Weighted([])


@pytest.mark.parametrize(("value", "text"), [(float("nan"), "nan"), (float("inf"), "inf"), (float("-inf"), "-inf")])
def test_not_finite_names_reward_step_member_and_prompt(value, text):
    scores = torch.tensor([0.0, 0.0, value, 0.0])
    with pytest.raises(RewardError) as caught:
        weighted(lambda images, prompts: scores).score(noise_images(), PROMPTS, step=12, members=[4, 5, 7, 9])
    assert str(caught.value) == (
        f"reward my_mod:score, step 12, member 7 (prompt 'a fox'): returned {text}; expected a finite float32 score"
    )


def test_where_a_look_waits_for_the_device_it_is_put_off_to_the_end_of_a_step(monkeypatch):
    monkeypatch.setattr(rewards.weighted, "_waits", lambda device: True)
    values = iter((1.0, float("nan"), 2.0, float("inf")))
    reward, images = weighted(lambda images, prompts: torch.full((len(images),), next(values))), noise_images()
    asked = []

    def step():
        with reward.deferred_checks():
            for first in (0, 4, 8):
                asked.append(reward.score(images, PROMPTS, step=3, members=range(first, first + 4)))

    with pytest.raises(RewardError, match="nan") as caught:
        step()
    error = caught.value
    assert (error.reward, error.step, error.images) == ("my_mod:score", 3, (4, 5, 6, 7))
    assert error.prompt == PROMPTS[0]
    assert len(asked) == 3
    with pytest.raises(RewardError, match="inf"):  # outside, at once
        reward.score(images, PROMPTS)


def test_an_error_inside_a_step_is_not_hidden_by_those_put_off(monkeypatch):
    monkeypatch.setattr(rewards.weighted, "_waits", lambda device: True)
    reward = weighted(constant(float("nan")))

    def step():
        with reward.deferred_checks():
            reward.score(noise_images(), PROMPTS)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        step()


def test_several_offending_images():
    scores = torch.tensor([float("nan"), 0.0, float("inf"), float("nan")])
    reward = weighted(lambda images, prompts: scores)
    with pytest.raises(RewardError, match="nan, inf") as caught:
        reward.score(noise_images(), PROMPTS, step=0, members=torch.tensor([8, 8, 3, 8]))
    assert (caught.value.step, caught.value.images, caught.value.prompt) == (0, (8, 3), "a cat")
    assert "'a cat' and 2 more" in str(caught.value)
    with pytest.raises(RewardError) as caught:
        reward.score(noise_images(), PROMPTS)
    assert (caught.value.step, caught.value.images) == (None, (0, 2, 3))


def test_many_members_and_long_prompts_are_cut_short():
    with pytest.raises(RewardError, match="50 in all") as caught:
        weighted(constant(float("nan"))).score(noise_images(50, 2, 2), ["x" * 999] * 50, step=1, members=range(50))
    assert (caught.value.images, caught.value.prompt) == (tuple(range(50)), "x" * 999)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("result", "got"),
    [
        (torch.zeros(4, dtype=torch.bool), r"bool \[4\]"),
        (torch.zeros(4, dtype=torch.complex64), r"complex64 \[4\]"),
        (torch.full((4,), 1e39, dtype=torch.float64), r"1e\+39, which float32 cannot hold"),
        (torch.full((4,), (1 << 24) + 1), "integers that float32 cannot hold exactly"),
        (torch.zeros(3), r"float32 \[3\]"),
        (torch.zeros(1, 4), r"float32 \[1, 4\]"),
        (torch.zeros(4, 2), r"float32 \[4, 2\]"),
        (np.float64(1.0), "float64"),
        (np.zeros(4, complex), "numpy complex128"),
        (np.array([0.0, "1", 0.0, 0.0], object), "'1' for image 1"),
        ([0.0, 1j, 0.0, 0.0], "1j for image 1"),
        ([0.0, torch.zeros(2), 0.0, 0.0], "for image 1"),
        (torch.zeros(()), r"float32 \[\]"),
        ([0.0] * 3, "a list of 3"),
        ([[0.0]] * 4, r"\[0.0\] for image 0"),
        ([0.0, True, 0.0, 0.0], "True for image 1"),
        (["0"] * 4, "'0' for image 0"),
        (np.array(["0"] * 4), "numpy <U1"),
        (np.zeros(4, bool), "numpy bool"),
        ({0: 0.0}, "dict"),
        (0.0, "float"),
        (None, "NoneType"),
    ],
)
def test_wrong_type_shape_or_dtype(result, got):
    with pytest.raises(RewardError, match=got) as caught:
        weighted(lambda images, prompts: result).score(noise_images(), PROMPTS, step=3, members=range(4))
    assert (caught.value.reward, caught.value.step, caught.value.images) == ("my_mod:score", 3, (0, 1, 2, 3))


@pytest.mark.parametrize(
    "result",
    [
        [0.5, 1, -2.25, 3e5],
        (0.5, 1, -2.25, 3e5),
        [np.float64(0.5), np.int64(1), torch.tensor(-2.25), np.array(3e5)],
        np.array([0.5, 1, -2.25, 3e5]),
        np.array([0.5, 1, -2.25, 3e5], np.float32),
        np.array([0.5, 1, -2.25, 3e5], ">f8"),
        np.array([9, 3e5, 9, -2.25, 9, 1, 9, 0.5])[::-2],
        np.array([0.5, 1, -2.25, 3e5], np.longdouble),
        np.ma.masked_array([0.5, 1, -2.25, 3e5], mask=[0, 0, 0, 0]),
        torch.tensor([0.5, 1, -2.25, 3e5]).double(),
        torch.tensor([0.5, 1, -2.25, 3e5], requires_grad=True),
        torch.tensor([[0.5], [1], [-2.25], [3e5]], dtype=torch.float64, requires_grad=True),
        np.array([[0.5], [1], [-2.25], [3e5]], np.longdouble),
        np.array([0.5, 1, -2.25, 3e5], object),
        [torch.tensor([0.5]), torch.tensor([[1]]), np.array([-2.25]), torch.tensor(3e5, requires_grad=True)],
    ],
)
def test_a_list_an_array_or_a_tensor_of_numbers_will_do(result):
    scores = weighted(lambda images, prompts: result).score(noise_images(), PROMPTS)["combined"]
    assert scores.dtype == torch.float32
    assert not scores.requires_grad
    assert scores.tolist() == [0.5, 1, -2.25, 3e5]


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.uint8,
        np.float16,
        np.int32,
        np.uint16,
        np.uint64,
        torch.uint16,
        torch.uint64,
    ],
)
def test_other_number_types_will_do(dtype):
    make = torch.tensor if isinstance(dtype, torch.dtype) else np.array
    result = make([1, 2, 3, 4], dtype=dtype)
    assert weighted(lambda images, prompts: result).score(noise_images(), PROMPTS)["combined"].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "result",
    [
        [1, 2, 3, (1 << 24) + 1],
        (1, 2, 3, 10**400),
        [1, 2, 3, 2**128 - 1],
        torch.tensor([2**53 + 1] * 4),
        np.ma.masked_array([2**53 + 1] * 4, mask=[1, 0, 0, 0]),
        np.array([1, 2, 3, (1 << 24) + 1]),
        np.array([1, 2, 3, (1 << 63) + 1], np.uint64),
        torch.tensor([1, 2, 3, (1 << 24) + 1]),
    ],
)
def test_an_integer_that_would_be_rounded_is_refused_in_every_form(result):
    with pytest.raises(RewardError, match="exactly"):
        weighted(lambda images, prompts: result).score(noise_images(), PROMPTS)


@pytest.mark.parametrize("dtype", [float, int, np.float32])
def test_what_a_mask_hides_is_no_score(dtype):
    result = np.ma.masked_array([1, 2, 3, 4], mask=[0, 1, 0, 0], dtype=dtype)
    for form in (result, [1, result[1], 3, 4]):
        with pytest.raises(RewardError, match=r"member 1 .*returned nan"):
            weighted(lambda images, prompts, form=form: form).score(noise_images(), PROMPTS, step=1, members=range(4))


@pytest.mark.parametrize(
    "result",
    [
        [0.5, None, math.nan, -1],
        (0.5, None, None, -1.0),
        np.array([0.5, None, None, -1], object),
        torch.tensor([0.5, math.nan, math.nan, -1], dtype=torch.bfloat16),
        np.array([[0.5], [math.nan], [math.nan], [-1]], np.float16),
    ],
)
def test_none_and_nan_are_no_score(result):
    assert as_scores(result, 4).isnan().tolist() == [False, True, True, False]
    with pytest.raises(RewardError, match="nan") as caught:
        weighted(lambda images, prompts: result).score(noise_images(), PROMPTS, step=1, members=range(4))
    assert caught.value.images == (1, 2)
    left_out = FaultTolerant(weighted(lambda images, prompts: result[:1] if len(images) == 1 else result), 40)
    assert left_out.score(noise_images(), PROMPTS)["combined"].tolist() == [0.5] * 4  # each asked again alone


@pytest.mark.parametrize("result", [0.5, 1, np.float16(0.5), torch.tensor(0.5), np.array(0.5), torch.tensor([[0.5]])])
def test_a_single_number_is_the_score_of_a_single_image(result):
    assert as_scores(result, 1).shape == (1,)
    with pytest.raises(RewardError, match="2 numbers"):
        as_scores(result, 2)


@pytest.mark.parametrize("dtype", [torch.float64, float, np.float64])
def test_a_float_beyond_float32_names_its_image_and_value(dtype):
    values = [1.0, -1e300, 2.0, 1e39]
    make = {torch.float64: lambda v: torch.tensor(v, dtype=dtype), float: list, np.float64: np.array}[dtype]
    with pytest.raises(RewardError, match="-1e\\+300") as caught:
        weighted(lambda images, prompts: make(values)).score(noise_images(), PROMPTS, step=1, members=[4, 5, 6, 7])
    assert (caught.value.reward, caught.value.images, caught.value.prompt) == ("my_mod:score", (5, 7), PROMPTS[1])


# ---- metadata

COLUMNS = [{"target": name, "n": [1]} for name in "wxyz"]


class Named:
    def __call__(self, images, prompts, metadata):
        return [ord(each["target"]) for each in metadata]


class Plain:
    def __call__(self, images, prompts):
        return [1.0] * len(images)


class Module(torch.nn.Module):
    def forward(self, images, prompts, *, metadata=None):
        return Named()(images, prompts, metadata)


class PlainModule(torch.nn.Module):
    def forward(self, images, prompts):
        return torch.ones(len(images))


def with_options(scale, images, prompts, metadata):
    return [scale * ord(each["target"]) for each in metadata]


TAKE = {
    "instance": Named(),
    "method": Named().__call__,
    "module": Module(),
    "partial": functools.partial(with_options, 1.0),
    "partial of a module": functools.partial(Module()),
    "keyword": lambda images, prompts, *, metadata=(): Named()(images, prompts, metadata),
    "any keyword": lambda images, prompts, **more: Named()(images, prompts, **more),
    "wrapped": torch.no_grad()(lambda images, prompts, metadata: Named()(images, prompts, metadata)),
}
TAKE_NOT = {
    "instance": Plain(),
    "module": PlainModule(),
    "partial of a module": functools.partial(PlainModule()),
    "given already": functools.partial(with_options, 1.0, metadata=COLUMNS),
    "another name": lambda images, prompts, columns=None: [1.0] * len(images) if columns is None else 1 / 0,
    "by place only": eval("lambda images, prompts, metadata=None, /: [1.0] * 4 if metadata is None else 1 / 0"),
    "without a signature": type("NoSignature", (Plain,), {"__signature__": 3})(),
}


@pytest.mark.parametrize("name", TAKE)
def test_a_reward_that_takes_metadata_gets_a_dict_for_each_image(name):
    reward = weighted(TAKE[name])
    assert reward.score(noise_images(), PROMPTS, metadata=COLUMNS)["combined"].tolist() == [119, 120, 121, 122]
    assert FaultTolerant(reward, 4).score(noise_images(), PROMPTS, metadata=COLUMNS)["combined"].tolist()[0] == 119
    nested = rewards.Weighted([("outer", reward, 1.0)])
    assert nested.score(noise_images(), PROMPTS, metadata=COLUMNS)["combined"].tolist() == [119, 120, 121, 122]


@pytest.mark.parametrize("name", TAKE_NOT)
def test_a_reward_that_does_not_take_metadata_is_called_as_before(name):
    assert takes_metadata(TAKE_NOT[name]) is False
    assert len(weighted(TAKE_NOT[name]).score(noise_images(), PROMPTS, metadata=COLUMNS)["combined"]) == 4


def test_without_metadata_a_reward_that_takes_it_gets_empty_dicts():
    seen = []
    weighted(lambda images, prompts, metadata: seen.append(metadata) or [0.0] * 4).score(noise_images(), PROMPTS)
    assert seen == [[{}, {}, {}, {}]]


def test_a_reward_cannot_damage_the_next_ones_metadata():
    def vandal(images, prompts, metadata):
        metadata[0]["n"].append(2)
        metadata.pop()
        return [0.0] * 4

    seen, before = [], copy.deepcopy(COLUMNS)
    keep = lambda images, prompts, metadata: seen.append(metadata) or [0.0] * 4  # noqa: E731
    rewards.Weighted([("a", vandal, 1.0), ("b", keep, 1.0)]).score(noise_images(), PROMPTS, metadata=COLUMNS)
    assert seen == [before]
    assert before == COLUMNS


def test_metadata_stays_with_its_image_in_smaller_parts():
    def score(images, prompts, metadata):
        narrow(1, [])(images, prompts)
        return Named()(images, prompts, metadata)

    reward = rewards.Weighted([("own", score, 1.0)], lambda text: None)
    assert reward.score(noise_images(), PROMPTS, metadata=COLUMNS)["own"].tolist() == [119, 120, 121, 122]
    assert reward.limit == 1


def test_metadata_of_another_length_is_refused():
    with pytest.raises(ValueError, match="metadata: expected 4"):
        weighted(Named()).score(noise_images(), PROMPTS, metadata=COLUMNS[:3])


def test_check_prompts_takes_metadata_too():
    seen = []

    class Checking(Plain):
        def check_prompts(self, prompts, metadata):
            seen.append((prompts, metadata))

    weighted(Checking()).check_prompts(["a"], [{"n": 1}])
    weighted(Checking()).check_prompts(["a"])
    assert seen == [(["a"], [{"n": 1}]), (["a"], [{}])]


def test_what_is_kept_is_a_copy():
    mine = np.zeros(4, np.float32)
    scores = weighted(lambda images, prompts: mine).score(noise_images(), PROMPTS)["combined"]
    mine[:] = 9
    assert scores.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("error", [KeyError("k"), RuntimeError("boom\nmore"), SystemExit(0)])
def test_a_reward_that_raises_is_chained_and_one_line(error):
    def reward(images, prompts):
        raise error

    with pytest.raises(RewardError, match=type(error).__name__) as caught:
        weighted(reward).score(noise_images(), PROMPTS, step=5, members=range(4))
    assert (caught.value.reward, caught.value.step) == ("my_mod:score", 5)
    assert caught.value.__cause__ is error
    assert "\n" not in str(caught.value)


def test_ctrl_c_is_not_a_reward_error():
    def reward(images, prompts):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        weighted(reward).score(noise_images(), PROMPTS)


def test_a_sum_that_overflows_is_an_error_too():
    reward = rewards.Weighted([("a", constant(3e38), 1.0), ("b", constant(3e38), 1.0)])
    with pytest.raises(RewardError, match="inf") as caught:
        reward.score(noise_images(), PROMPTS, step=1, members=range(4))
    assert (caught.value.reward, caught.value.step) == ("combined", 1)


def test_a_reward_cannot_damage_the_next_ones_input():
    def vandal(images, prompts):
        images.numpy().fill(0)
        prompts.clear()
        return torch.zeros(4)

    images = noise_images()
    mean = lambda images, prompts: images.float().mean((1, 2, 3)) + len(prompts)  # noqa: E731
    scores = rewards.Weighted([("vandal", vandal, 1.0), ("mean", mean, 1.0)]).score(images, PROMPTS)
    assert torch.equal(images, noise_images())
    assert torch.equal(scores["mean"], mean(images, PROMPTS))


def test_a_score_is_detached_and_not_a_view_of_the_rewards_buffer():
    buffer = torch.zeros(4, requires_grad=True)
    first = rewards.checked("a", lambda images, prompts: buffer, noise_images(), PROMPTS)
    buffer.data += 1
    assert first.tolist() == [0.0] * 4
    assert not first.requires_grad


@pytest.mark.parametrize(
    ("images", "prompts", "members", "message"),
    [
        (torch.zeros(4, 3, 2, 2), PROMPTS, None, r"images: expected uint8 .* got float32 \[4, 3, 2, 2\]"),
        (torch.zeros(4, 2, 2, 3, dtype=torch.uint8), PROMPTS, None, "images"),
        (noise_images(), PROMPTS[:3], None, "prompts: expected 4, one for each image, got 3"),
        (noise_images(), PROMPTS, [1, 2], "members: expected 4"),
    ],
)
def test_a_batch_that_does_not_fit(images, prompts, members, message):
    with pytest.raises(ValueError, match=message):
        weighted(constant(0.0)).score(images, prompts, members=members)


def test_an_empty_batch():
    assert rewards.parse("jpeg_compressibility").score(noise_images(0), [])["combined"].shape == (0,)


class Mute(Exception):
    def __str__(self):
        raise ValueError("no")


def throw(error):
    raise error


ESCAPES = {
    "cancelled": (lambda images, prompts: throw(asyncio.CancelledError()), "raised CancelledError"),
    "generator exit": (lambda images, prompts: throw(GeneratorExit()), "raised GeneratorExit"),
    "stop iteration": (lambda images, prompts: throw(StopIteration()), "raised StopIteration"),
    "mute": (lambda images, prompts: throw(Mute()), "raised Mute"),
    "mute runtime error": (lambda images, prompts: throw(type("Odd", (Mute, RuntimeError), {})()), "raised "),
    "meta": (lambda images, prompts: torch.empty(len(images), device="meta"), "raised NotImplementedError"),
    "nested": (lambda images, prompts: torch.nested.nested_tensor([torch.ones(4)]), "raised RuntimeError"),
    "sparse": (lambda images, prompts: torch.ones(4).to_sparse(), "returned a tensor of layout torch.sparse_coo"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("escape", ESCAPES)
def test_nothing_that_a_reward_does_escapes_as_a_traceback(escape):
    reward, words = ESCAPES[escape]
    with pytest.raises(RewardError, match=words):
        rewards.checked("own", reward, noise_images(), ["p"] * 4)


# ---- memory


def narrow(room, asked):
    """A reward for `room` images at once."""

    def score(images, prompts):
        asked.append(len(images))
        if len(images) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB, of which 1.50 GiB is free.")
        return images.float().mean(dim=(1, 2, 3))

    return score


def test_where_memory_runs_out_smaller_parts_are_scored_and_it_stays_so():
    asked, notes, images = [], [], noise_images(7)
    reward = rewards.Weighted([("own", narrow(2, asked), 1.0)], notes.append)
    expected = images.float().mean(dim=(1, 2, 3))
    for _ in range(2):
        assert torch.equal(reward(images, [f"p{i}" for i in range(7)]), expected)
    assert asked == [7, 3, 1, 1, 1, 1, 1, 1, 1] + [1] * 7
    assert [note.rpartition("; ")[2] for note in notes] == [
        "from here on 3 are scored together",
        "from here on 1 are scored together",
    ]


def test_where_not_one_image_fits_the_error_has_the_bytes():
    with pytest.raises(OutOfMemory, match=r"2.00 GiB.*1.50 GiB"):
        weighted(narrow(0, []), name="own").score(noise_images(), ["p"] * 4)


def test_members_stay_with_their_images_in_smaller_parts():
    reward = weighted(lambda images, prompts: narrow(1, [])(images, prompts) / (prompts[0] != "p2"), name="own")
    with pytest.raises(RewardError, match="inf") as caught:
        reward.score(noise_images(), [f"p{i}" for i in range(4)], step=3, members=[10, 11, 12, 13])
    error = caught.value
    assert (error.reward, error.step, error.images, error.prompt) == ("own", 3, (12,), "p2")
