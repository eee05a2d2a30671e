from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from esengine import rewards
from esengine.base.errors import ConfigError, RewardError
from esengine.models.nano import world
from esengine.models.nano.checker import Checker
from esengine.models.nano.world import Scene, Thing

ONE = Scene((Thing("small", "red", "triangle", 15, 34, 7.0, 5.0),), "white")
ONE_CAPTION = "a small red triangle on the left on a white background"
TWO = Scene((Thing("large", "green", "cross", 18, 30, 12.0), Thing("small", "black", "circle", 45, 33, 6.5)), "yellow")
TWO_CAPTION = "a large green cross left of a small black circle on a yellow background"


@pytest.fixture(scope="module")
def checker():
    return rewards.load("checker")


@pytest.fixture(scope="module")
def truth():
    captions = world.captions("validation", 150)
    rng = np.random.default_rng(0)
    return captions, tensor(*(world.sample_scene(caption, rng) for caption in captions))


def tensor(*scenes):
    return torch.from_numpy(world.draw_all(scenes)).permute(0, 3, 1, 2).contiguous()


def blurred(images, sigma):
    axis = torch.arange(-8.0, 9.0)
    kernel = torch.exp(-(axis**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    images = F.pad(images.float(), (8, 8, 8, 8), mode="replicate")
    return F.conv2d(F.conv2d(images, kernel, groups=3), kernel.transpose(2, 3), groups=3).round().byte()


def score(checker, scene, caption):
    return checker(tensor(scene), [caption]).item()


def moved(scene, at=0, **changes):
    things = tuple(replace(thing, **changes) if i == at else thing for i, thing in enumerate(scene.objects))
    return replace(scene, objects=things)


def test_pictures_of_the_world_show_their_captions(checker, truth):
    captions, images = truth
    scores = checker(images, captions)
    assert scores.dtype == torch.float32
    assert scores.shape == (150,)
    assert scores.mean() > 0.99
    assert scores.min() > 0.95
    assert scores.max() <= 1


def test_blur_noise_and_both_hardly_matter(checker, truth):
    captions, images = truth
    noise = 8 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    soft = blurred(images, 1.0)
    for seen in (soft, (images + noise).clamp(0, 255).byte(), (soft + noise).clamp(0, 255).byte()):
        scores = checker(seen, captions)
        assert scores.mean() > 0.99
        assert scores.min() > 0.85


@pytest.mark.parametrize("side", [48, 96, 256])
def test_a_picture_of_another_size_is_read_by_scale(checker, truth, side):
    captions, images = truth
    resized = F.interpolate(images.float(), (side, side), mode="bilinear", antialias=True).round().byte()
    assert checker(resized, captions).mean() > 0.97


def test_other_pictures_score_low(checker, truth):
    captions, images = truth
    assert checker(images.roll(1, 0), captions).mean() < 0.25
    for value in (0, 26, 128, 240, 255):
        assert checker(torch.full_like(images, value), captions).mean() < 0.1


@pytest.mark.parametrize(
    ("scene", "caption", "wrong"),
    [
        (ONE, ONE_CAPTION, "a small orange triangle on the left on a white background"),
        (ONE, ONE_CAPTION, "a small red circle on the left on a white background"),
        (ONE, ONE_CAPTION, "a small red square on the left on a white background"),
        (ONE, ONE_CAPTION, "a large red triangle on the left on a white background"),
        (ONE, ONE_CAPTION, "a small red triangle on the right on a white background"),
        (ONE, ONE_CAPTION, "a small red triangle in the centre on a white background"),
        (ONE, ONE_CAPTION, "a small red triangle on the left on a yellow background"),
        (TWO, TWO_CAPTION, "a large blue cross left of a small black circle on a yellow background"),
        (TWO, TWO_CAPTION, "a large green square left of a small black circle on a yellow background"),
        (TWO, TWO_CAPTION, "a large green cross left of a large black circle on a yellow background"),
        (TWO, TWO_CAPTION, "a large green cross right of a small black circle on a yellow background"),
        (TWO, TWO_CAPTION, "a large green cross above a small black circle on a yellow background"),
        (TWO, TWO_CAPTION, "a large green cross below a small black circle on a yellow background"),
        (TWO, TWO_CAPTION, "a large green cross left of a small black circle on an orange background"),
        (TWO, TWO_CAPTION, "a large black cross left of a small green circle on a yellow background"),
    ],
)
def test_one_wrong_fact_costs_a_share(checker, scene, caption, wrong):
    assert score(checker, scene, caption) > 0.97
    assert score(checker, scene, wrong) < 0.9


def test_facts_say_what_is_wrong(checker):
    captions = [TWO_CAPTION, TWO_CAPTION.replace("circle", "square"), TWO_CAPTION.replace("large", "small")]
    right, shape, size = checker.facts(tensor(TWO, TWO, TWO), captions)
    names = ["object_1", "shape_1", "size_1", "object_2", "shape_2", "size_2", "relation", "background", "alone"]
    assert list(right) == names
    assert min(right.values()) > 0.97
    assert {name for name, degree in shape.items() if degree < 0.5} == {"shape_2"}
    assert {name for name, degree in size.items() if degree < 0.5} == {"size_1"}
    assert list(checker.facts(tensor(ONE), ["a red triangle"])[0]) == ["object_1", "shape_1", "alone"]


def test_degrees_grow_on_the_way_to_the_caption(checker):
    places = [score(checker, moved(ONE, x=x), ONE_CAPTION) for x in (40, 26, 24, 22, 15)]
    assert places[0] < places[1] <= places[2] < places[3] <= places[4]
    sizes = [score(checker, moved(ONE, radius=radius), ONE_CAPTION) for radius in (12, 9.5, 9, 8.6, 7)]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) >= 4
    images = tensor(ONE).float()
    flat = images[:, :, :1, :1].expand_as(images)
    fade = [
        checker((flat + share * (images - flat)).byte(), [ONE_CAPTION]).item() for share in (0.2, 0.55, 0.58, 0.62, 1)
    ]
    assert fade[0] < 0.3 < fade[-1] - 0.5
    assert fade == sorted(fade)
    assert len(set(fade)) >= 4


def test_what_nobody_asked_for_is_seen(checker):
    another = Thing("small", "blue", "circle", 48, 15, 7.0)
    extra = replace(ONE, objects=(*ONE.objects, another))
    assert checker.facts(tensor(extra), [ONE_CAPTION])[0]["alone"] < 0.1
    twice = replace(ONE, objects=(*ONE.objects, replace(ONE.objects[0], x=48.0)))
    assert checker.facts(tensor(twice), [ONE_CAPTION])[0]["alone"] < 0.3


def test_a_background_of_the_objects_colour_is_no_object(checker):
    facts = checker.facts(tensor(replace(ONE, objects=(), background="red")), ["a red circle"])[0]
    assert max(facts.values()) == 0


def test_a_blurred_rim_is_no_object(checker):
    scene = Scene((Thing("large", "red", "circle", 32, 32, 12.0),), "yellow")  # orange lies between the two
    for sigma in (0.7, 1.0, 1.5):
        assert checker(blurred(tensor(scene), sigma), ["an orange circle"]).item() < 0.15


def test_batch_mates_layout_and_input_are_left_alone(checker, truth):
    captions, images = truth
    before = images.clone()
    scores = checker(images, captions)
    assert torch.equal(images, before)
    assert checker.reads_only is True
    order = torch.randperm(150, generator=torch.Generator().manual_seed(1))
    assert torch.equal(checker(images[order], [captions[i] for i in order]), scores[order])
    assert torch.equal(checker(images[40:41], captions[40:41]), scores[40:41])
    channels_last = images.to(memory_format=torch.channels_last)
    assert torch.equal(checker(channels_last, captions), scores)


def test_any_picture_has_a_finite_degree(checker):
    generator = torch.Generator().manual_seed(0)
    captions = world.captions("train", 24)
    for shape in ((64, 64), (1, 1), (7, 200)):
        noise = torch.randint(256, (24, 3, *shape), dtype=torch.uint8, generator=generator)
        for images in (noise, noise // 128 * 255):
            scores = checker(images, captions)
            assert ((scores >= 0) & (scores <= 1)).all()
    assert checker(torch.zeros(0, 3, 64, 64, dtype=torch.uint8), []).shape == (0,)


@pytest.mark.parametrize("prompt", ["a cat", "", "a pink circle", "a red circle left of a red square"])
def test_a_prompt_outside_the_world_is_one_line(prompt):
    images = tensor(ONE)
    reward = rewards.parse("checker")
    with pytest.raises(RewardError, match="nano") as raised:
        reward(images, [prompt])
    assert (raised.value.reward, raised.value.prompt) == ("checker", prompt)
    assert "\n" not in str(raised.value)
    with pytest.raises(RewardError, match="'cat' as word 2"):
        Checker()(images, ["a cat"])


def test_it_is_built_in_and_names_its_version():
    weighted = rewards.parse("checker=0.5,jpeg_compressibility=0")
    assert weighted.settings()["checker"] == {"weight": 0.5, "version": 1}
    with pytest.raises(ConfigError, match="device") as caught:
        rewards.load("checker", device="cpu")
    assert caught.value.setting == "reward checker"
