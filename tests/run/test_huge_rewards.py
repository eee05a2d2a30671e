"""Finite scores of any size: right arithmetic, or an error that names the reward and the value."""

import json
import math

import journals
import numpy as np
import pytest
import torch

from esengine.base.errors import RewardError
from esengine.run import checkpoint
from esengine.run.settings import ESSettings
from esengine.run.train import train
from esengine.sampling.settings import ImageSettings


def brightness(images, prompts):
    return images.double().mean(dim=(1, 2, 3)) / 255


def scaled(factor, shift=0.0):
    return lambda images, prompts: (factor * brightness(images, prompts) + shift).float()


def falling(images, prompts):
    return [3e38 - 1e36 * place for place in range(len(images))]


def of_both_signs(images, prompts):
    return torch.where(brightness(images, prompts).float() > 0.48, 3e38, -3e38)


@pytest.fixture
def shortly(small, tmp_path):
    def run(name="run", **changes):
        settings = dict(steps=2, es=ESSettings(prompts_per_step=2, repeats=2), image=ImageSettings(chunk=16))
        config = small(tmp_path / name, **settings | changes)
        return train(config, changes_note.get(name)), tmp_path / name

    changes_note = {}
    run.notes = changes_note
    return run


@pytest.mark.parametrize(
    "score",
    [scaled(3.4e38), scaled(1.0, 3e38), falling, of_both_signs],
    ids=["factor", "shift", "falling", "of both signs"],
)
def test_large_scores_are_added_without_loss(shortly, reward, notes, score):
    shortly.notes["run"] = notes
    result, run = shortly(reward=reward(score))
    for step in journals.steps(run):
        for name in ("reward", "reward_best", "reward_worst", "reward_std"):
            assert step[name] is not None, name
            assert math.isfinite(step[name])
        assert step["reward_worst"] <= step["reward"] <= step["reward_best"]
    assert not [line for line in notes.said if "dropped" in line or "no strip" in line], notes.said
    assert all(np.isfinite(list(row["mean"].values())).all() for row in result.comparison.overall)


def test_a_factor_changes_nothing_but_the_scale(shortly, reward):
    _, one = shortly("one", reward=reward(scaled(1.0)))
    _, other = shortly("other", reward=reward(scaled(2.0**127)))
    assert journals.fitness(one) == journals.fitness(other)
    for small, large in zip(journals.steps(one), journals.steps(other), strict=True):
        for name in ("reward", "reward_best", "reward_std"):
            assert large[name] == small[name] * 2.0**127


BEYOND = {
    "a list": lambda images, prompts: [1e300] * len(images),
    "numpy": lambda images, prompts: np.full(len(images), -1e39),
    "torch": lambda images, prompts: torch.full((len(images),), 4e38, dtype=torch.float64),
}


@pytest.mark.parametrize("kind", BEYOND)
def test_what_float32_cannot_hold_is_named(shortly, reward, tmp_path, kind):
    with pytest.raises(RewardError, match=r"own:score, step 0.*(1e\+300|-1e\+39|4e\+38)") as caught:
        shortly(reward=reward(BEYOND[kind]), heldout_every=0)
    assert caught.value.reward == "own:score"
    assert checkpoint.load_latest(tmp_path / "run" / "checkpoints").step == 0


def test_a_sum_that_overflows_names_its_parts(shortly, reward, tmp_path):
    name = reward(scaled(0.0, 3e38), other=scaled(0.0, 2.0))
    with pytest.raises(RewardError, match=r"combined, step 0.*own:score 3e\+38, own:other 2"):
        shortly(reward=f"{name}=2,own:other=1", heldout_every=0)


def test_a_step_that_changes_nothing_says_so_once(shortly, reward, notes):
    shortly.notes["run"] = notes
    _, run = shortly(reward=reward(scaled(0.0, 3e38)))
    assert not any(map(any, journals.fitness(run)))
    (line,) = [line for line in notes.said if "changes nothing" in line]
    assert "step 0" in line


def test_an_error_in_what_is_measured_leaves_the_step_before(shortly, reward, monkeypatch, tmp_path):
    calls = []

    def metrics(*args):
        calls.append(args)
        if len(calls) == 2:
            raise ZeroDivisionError
        return whole(*args)

    from esengine.run import loop

    whole = loop._metrics
    monkeypatch.setattr(loop, "_metrics", metrics)
    with pytest.raises(ZeroDivisionError):
        shortly(reward=reward(scaled(1.0)), checkpoint_every=5)
    assert checkpoint.load_latest(tmp_path / "run" / "checkpoints").step == 1
    lines = (tmp_path / "run" / "journal.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines].count("step") == 1
