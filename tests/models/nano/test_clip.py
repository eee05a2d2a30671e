"""clip-nano: its processor, its batches, and that what is trained loads as a reward."""

import numpy as np
import pytest
import torch

from esengine import rewards
from esengine.models.nano import clip, world
from esengine.rewards.clip import Aesthetic, NoArtifacts


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two steps of training: the folder of the judge."""
    folder = tmp_path_factory.mktemp("clip")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip, "BATCH", 16)
        clip.save_clip(folder / "out", clip.train_clip(folder / "work", steps=2, seed=0))
    return folder


def test_each_word_of_the_world_is_a_token(trained):
    ids, mask = clip.load_tokenize(trained / "out")(sorted(world.WORDS))
    assert ids.shape == (len(world.WORDS), 3)
    assert mask.all()
    assert len({tuple(row) for row in ids.tolist()}) == len(world.WORDS)


def test_training_goes_on_where_it_stopped(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(clip, "BATCH", 16)
    clip.train_clip(tmp_path, steps=2, seed=0)
    once = clip.read_clip(trained / "work").state_dict()
    for name, value in clip.read_clip(tmp_path).state_dict().items():
        assert torch.equal(value, once[name]), name


def test_the_folder_is_a_judge_for_every_reward(trained):
    captions, images = world.batch("validation", 6, 0)
    images = torch.from_numpy(images).permute(0, 3, 1, 2)
    for name in ("pickscore", "clip_text", "aesthetic", "no_artifacts"):
        scores = rewards.load(name, model=str(trained / "out"))(images, captions)
        assert scores.shape == (6,)
        assert scores.isfinite().all()


def test_the_texts_of_quality_are_those_of_the_rewards():
    assert Aesthetic.text == clip.FINE
    assert NoArtifacts.text == clip.POOR


def facts_of(caption):
    """The caption's facts, those of the second object apart."""
    spec = world.parse(caption)
    return [(each.colour, each.shape, each.size) for each in spec.objects], spec.place, spec.relation, spec.background


def test_half_a_batch_is_wrong_in_one_fact_and_each_scene_comes_twice(monkeypatch):
    monkeypatch.setattr(clip, "BATCH", 256)
    captions, scenes, images = clip.batch(3)
    assert images.shape == (256, 3, 64, 64)
    assert 0 <= images.min() <= images.max() <= 1
    drawn, bad = images.split(128)
    assert torch.equal(drawn, torch.from_numpy(world.draw_all(scenes)).permute(0, 3, 1, 2).float() / 255)
    assert ((bad - drawn).abs().flatten(1).mean(1) > 1e-4).float().mean() > 0.9
    kinds = {"place": 0, "relation": 0, "background": 0, "objects": 0}
    for first, second in zip(captions[:64], captions[64:], strict=True):
        one, other = facts_of(first), facts_of(second)
        names = ("objects", "place", "relation", "background")
        differing = [name for name, a, b in zip(names, one, other, strict=True) if a != b]
        assert len(differing) <= 1, (first, second)
        for name in differing:
            kinds[name] += 1
    assert min(kinds.values()) >= 3, kinds
    assert all(world.parse(caption).split == "train" for caption in captions)
    again = clip.batch(3)
    assert again[0] == captions
    assert torch.equal(again[2], images)


def test_facts_are_those_of_the_scene():
    red, blue = (world.Thing("small", colour, shape, x, 40.0, 7.0) for colour, shape, x in
                 (("red", "cross", 16.0), ("blue", "square", 48.0)))  # fmt: skip
    there, where, shape, background = clip.facts([world.Scene((red, blue), "white"), world.Scene((blue,), "black")])
    colours = list(world.COLOURS)
    assert there.nonzero().tolist() == [
        [0, colours.index("red")],
        [0, colours.index("blue")],
        [1, colours.index("blue")],
    ]
    assert where[0, colours.index("red")].tolist() == [-1.0, 0.5, -1.0]
    assert where[1, colours.index("blue")].tolist() == [1.0, 0.5, -1.0]
    assert [world.SHAPES[i] for i in shape[there]] == ["cross", "square", "square"]
    assert [colours[i] for i in background] == ["white", "black"]


def test_faults_change_images():
    _, drawn = world.batch("train", 40, 1)
    images = torch.from_numpy(np.ascontiguousarray(drawn)).permute(0, 3, 1, 2).float() / 255
    bad = clip.damaged(images, torch.Generator().manual_seed(0))
    assert bad.shape == images.shape
    assert (bad >= 0).all()
    assert (bad <= 1).all()
    changed = (bad - images).abs().flatten(1).mean(1) > 1e-3
    assert changed.float().mean() > 0.9  # black and white cannot be oversaturated
