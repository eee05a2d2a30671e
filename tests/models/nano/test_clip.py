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


def test_half_a_batch_differs_in_one_word(monkeypatch):
    monkeypatch.setattr(clip, "BATCH", 64)
    captions, images, whole = clip.batch(3)
    assert images.shape == (64, 3, 64, 64)
    assert 0 <= images.min() <= images.max() <= 1
    assert 16 < int(whole.sum()) < 48
    differing = [
        sum(a != b for a, b in zip(first.split(), second.split(), strict=True))
        for first, second in zip(captions[:32], captions[32:], strict=True)
    ]
    assert set(differing) <= {0, 1}
    assert sum(differing) > 24
    assert all(world.parse(caption).split == "train" for caption in captions)
    again = clip.batch(3)
    assert again[0] == captions
    assert torch.equal(again[1], images)


def test_faults_change_images():
    _, drawn = world.batch("train", 40, 1)
    images = torch.from_numpy(np.ascontiguousarray(drawn)).permute(0, 3, 1, 2).float() / 255
    bad = clip.damaged(images, torch.Generator().manual_seed(0))
    assert bad.shape == images.shape
    assert (bad >= 0).all()
    assert (bad <= 1).all()
    changed = (bad - images).abs().flatten(1).mean(1) > 1e-3
    assert changed.float().mean() > 0.9  # black and white cannot be oversaturated
