import hashlib
import itertools
from dataclasses import replace

import numpy as np
import pytest

from esengine.models.nano import world
from esengine.models.nano.world import Scene, Spec, Thing, Wanted, parse

PLAIN = Scene((Thing("large", "red", "square", 32, 32, 12),), "blue")


def specs(split, count, seed=0):
    return [parse(caption) for caption in world.captions(split, count, seed)]


def scenes(count, split="train", seed=0):
    rng = np.random.default_rng(seed)
    return [(spec, world.sample_scene(spec.caption(), rng)) for spec in specs(split, count, seed)]


def digest(*parts):
    return hashlib.sha256(b"\0".join(part if isinstance(part, bytes) else part.encode() for part in parts)).hexdigest()


def test_the_world_never_changes():
    for split, golden in GOLDEN.items():
        captions, images = world.batch(split, 64, 7)
        held_out = world.captions(split, 100)
        assert digest(*held_out, *captions, images.tobytes()) == golden, split


def test_splits_share_no_combination():
    found = {split: {spec.combination() for spec in specs(split, 4000)} for split in world.SPLITS}
    for one, other in itertools.combinations(found.values(), 2):
        assert not one & other
    trained = {parse(caption).combination() for caption in world.batch("train", 4000, 5)[0]}
    assert not trained & (found["validation"] | found["test"])


def test_a_tenth_of_all_combinations_each_is_held_out():
    options = itertools.product(world.COLOURS, world.SHAPES, (None, *world.SIZES), (None, *world.PLACES))
    splits = [Spec((Wanted(colour, shape, size),), place).split for colour, shape, size, place in options]
    assert len(splits) == 576
    assert splits.count("validation") / 576 == pytest.approx(0.1, abs=0.04)
    assert splits.count("test") / 576 == pytest.approx(0.1, abs=0.04)


@pytest.mark.parametrize(("relation", "back"), [("left of", "right of"), ("above", "below")])
def test_a_relation_told_from_the_other_side_is_the_same_combination(relation, back):
    for spec in specs("train", 300):
        if spec.relation:
            told, mirrored = replace(spec, relation=relation), replace(spec, objects=spec.objects[::-1], relation=back)
            assert told.caption() != mirrored.caption()
            assert told.combination() == mirrored.combination()
            assert replace(spec, relation=back).combination() != told.combination()


@pytest.mark.parametrize("split", world.SPLITS)
def test_captions_are_distinct_in_their_split_and_read_back(split):
    captions = world.captions(split, 500, seed=3)
    assert captions == world.captions(split, 500, seed=3) != world.captions(split, 500, seed=4)
    assert captions[:100] == world.captions(split, 100, seed=3)
    assert len({parse(caption).combination() for caption in captions}) == 500
    for caption in captions:
        assert parse(caption).caption() == caption
        assert parse(caption).split == split


def test_read_back_is_what_was_said():
    spec = parse("a small red circle left of an orange square on a yellow background")
    assert spec.objects == (Wanted("red", "circle", "small"), Wanted("orange", "square"))
    assert (spec.place, spec.relation, spec.background) == (None, "left of", "yellow")
    assert parse("an orange cross in the centre") == Spec((Wanted("orange", "cross"),), place="centre")
    assert parse("  A  Large BLUE triangle\tat the top. ") == parse("a large blue triangle at the top")


def test_every_word_occurs_and_no_other():
    captions = world.batch("train", 3000, 0)[0]
    assert {word for caption in captions for word in caption.split()} == set(world.WORDS)
    assert len(set(world.WORDS)) == len(world.WORDS)


@pytest.mark.parametrize(
    ("caption", "said"),
    [
        ("", "expected a or an, got the end as word 1"),
        (" . ", "expected a or an, got the end"),
        ("a", "expected a size or a colour"),
        ("a pink circle", "got 'pink' as word 2 of 'a pink circle'"),
        ("a small circle", r"expected a colour \(red, .*\), got 'circle'"),
        ("a small small red circle", "got 'small' as word 3"),
        ("a red blob", r"expected a shape \(circle, square, triangle, cross\), got 'blob'"),
        ("red circle", "expected a or an, got 'red'"),
        ("a red circle left a blue square", "got 'left' as word 4"),
        ("a red circle left of blue square", "expected a or an, got 'blue'"),
        ("a red circle above a small red square", "expected another colour .* got 'red' as word 7"),
        ("a red circle on a red background", "expected a background of another colour .* got 'red'"),
        ("a red circle above a blue square on a blue background", "another colour .* got 'blue' as word 10"),
        ("a red circle on a blue", "expected background, got the end"),
        ("a red circle on the left at the top", "expected a background, got 'at'"),
        ("a red circle on the left above a blue square", "expected a background, got 'above'"),
        ("a red circle above a blue square below a green cross", "expected a background, got 'below'"),
        ("a red circle on a blue background too", "expected the end, got 'too'"),
        ("a red circle, small", "got 'circle,'"),
        ("a red\x00 circle", r"got 'red\\x00'"),
        ("a réd circle", "got 'réd'"),
        ("x" * 100_000, "got 'x{40}' as word 1 of 'x{100}...'"),
        ("a red circle " * 10_000, "expected a place, a relation or a background, got 'a' as word 4"),
        (None, "expected text, got NoneType"),
        (b"a red circle", "expected text, got bytes"),
    ],
)
def test_other_captions_are_refused_by_the_word(caption, said):
    with pytest.raises(ValueError, match=f"^caption: .*{said}") as raised:
        parse(caption)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400


def test_scenes_hold_what_captions_name_and_vary_in_the_rest():
    found = scenes(600)
    for spec, scene in found:
        assert len(scene.objects) == len(spec.objects)
        for wanted, thing in zip(spec.objects, scene.objects, strict=True):
            assert (thing.colour, thing.shape) == (wanted.colour, wanted.shape)
            assert thing.size == wanted.size or wanted.size is None
            low, high = world.SIZES[thing.size]
            assert low <= thing.radius <= high
            for centre in (thing.x, thing.y):
                assert world.EXTENT * thing.radius < centre < 64 - world.EXTENT * thing.radius
            assert abs(thing.angle) <= world.ANGLE
            assert abs(thing.shade) <= 1
        colours = [scene.background, *(thing.colour for thing in scene.objects)]
        assert len(set(colours)) == len(colours)
        assert spec.background in (None, scene.background)
        x, y = scene.objects[0].x - 32, scene.objects[0].y - 32
        if spec.place:
            assert {"left": -x, "right": x, "top": -y, "bottom": y, "centre": 20 - max(abs(x), abs(y))}[spec.place] > 11
            assert min(abs(x), abs(y)) <= 7
        if spec.relation:
            other = scene.objects[1]
            right, down = other.x - scene.objects[0].x, other.y - scene.objects[0].y
            along = {"left of": right, "right of": -right, "above": down, "below": -down}[spec.relation]
            assert along >= world.EXTENT * (scene.objects[0].radius + other.radius) + world.GAP - 1e-9
            assert min(abs(right), abs(down)) <= 6
    open_size = {scene.objects[0].size for spec, scene in found if spec.objects[0].size is None}
    open_background = {scene.background for spec, scene in found if spec.background is None}
    assert open_size == set(world.SIZES)
    assert open_background == set(world.COLOURS)


@pytest.mark.parametrize("shape", world.SHAPES)
@pytest.mark.parametrize("angle", [-world.ANGLE, 0, world.ANGLE])
def test_a_shape_stays_in_its_box_and_is_antialiased(shape, angle):
    thing = Thing("large", "white", shape, 32, 32, 13, angle)
    image = world.draw(Scene((thing,), "black")).astype(int)
    assert image.shape == (64, 64, 3)
    background, inside = np.array(world.COLOURS["black"]), np.array(world.COLOURS["white"])
    touched = (image != background).any(2)
    rows, columns = np.nonzero(touched)
    for each in (rows, columns):
        assert each.min() >= 32 - world.EXTENT * 13 - 1
        assert each.max() <= 32 + world.EXTENT * 13
    assert (image[32, 32] == inside).all()
    assert (image[0, 0] == background).all()
    assert ((image[..., 0] > 60) & (image[..., 0] < 200)).sum() > 20


def test_a_picture_is_its_colours_and_its_gradient():
    image = world.draw(PLAIN)
    assert image.dtype == np.uint8
    assert tuple(image[32, 32]) == world.COLOURS["red"]
    assert tuple(image[2, 2]) == world.COLOURS["blue"]
    light = world.draw(replace(PLAIN, gradient=(0.35, 0.0))).astype(int).sum(2)
    assert light[5, 60] > light[5, 3] == light[60, 3]
    shaded = world.draw(replace(PLAIN, shade=1.0)).astype(int).sum(2)
    assert shaded[5, 5] > image.astype(int).sum(2)[5, 5]


def test_batch_mates_have_no_part_in_a_picture():
    together = [scene for _, scene in scenes(70, seed=1)]
    images = world.draw_all(together)
    assert images.shape == (70, 64, 64, 3)
    for i in (0, 31, 32, 69):
        assert np.array_equal(images[i], world.draw(together[i]))
    assert world.draw_all([]).shape == (0, 64, 64, 3)


def test_a_batch_follows_its_seed():
    captions, images = world.batch("test", 50, 3)
    again, same = world.batch("test", 50, 3)
    assert captions == again
    assert np.array_equal(images, same)
    assert captions != world.batch("test", 50, 4)[0]
    assert all(parse(caption).split == "test" for caption in captions)
    assert world.batch("test", 0, 0)[1].shape == (0, 64, 64, 3)


def test_unknown_splits_and_too_many_captions_are_refused():
    rng = np.random.default_rng(0)
    for call in (
        lambda: world.batch("dev", 1, 0),
        lambda: world.captions("dev", 1),
        lambda: world.sample_caption(rng, "dev"),
    ):
        with pytest.raises(ValueError, match="split: expected one of train, validation, test, got 'dev'"):
            call()
    with pytest.raises(ValueError, match="got 'pink'"):
        world.sample_scene("a pink circle", rng)


def test_a_split_runs_out_of_captions(monkeypatch):
    monkeypatch.setattr(world, "COLOURS", {name: world.COLOURS[name] for name in ("red", "green", "blue")})
    monkeypatch.setattr(world, "SHAPES", ("circle",))
    with pytest.raises(ValueError, match=r"count: expected at most about \d+ captions of split validation, got 100000"):
        world.captions("validation", 100_000)


GOLDEN = {
    "train": "36a4ec42972660a0d954472c8c38ea538769ef57cfef61cc9da3dedbdb55641a",
    "validation": "dd57ff77eded317c7d1596dbe9f52990c2c54e62f216d1da22e651df2ed14b6c",
    "test": "83bfdef62bcaf2c4988612b151dd5c8d53ce93d33750ba3f4324a1817f8491bc",
}
"""Of 100 held-out captions and of a batch of 64, with its pixels. A change here is another world: models, judges and
stored results would no longer belong together."""
