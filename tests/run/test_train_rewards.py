"""A reward that fails in the middle of a run leaves the step before it."""

import dataclasses
import sys
import types

import pytest
import torch
from safetensors.torch import load_file

from esengine.base.errors import RewardError
from esengine.run import checkpoint
from esengine.run.train import train


def brightness(images, prompts):
    return images.float().mean(dim=(1, 2, 3)) / 255


FAILURES = {
    "raises": (lambda images: 1 / 0, "raised ZeroDivisionError"),
    "nan": (lambda images: torch.full((len(images),), float("nan")), "returned nan"),
    "shape": (lambda images: torch.zeros(1, len(images)), r"returned float32 \[1, 3\]"),
    "dtype": (lambda images: torch.zeros(len(images), dtype=torch.bool), r"returned bool \[3\]"),
    "list": (lambda images: [0.0] * (len(images) + 1), "returned a list of 4"),
}


@pytest.fixture(scope="module")
def bright(small, tmp_path_factory):
    """Runs with a reward that never fails, of one step and of three."""
    root = tmp_path_factory.mktemp("bright")
    with pytest.MonkeyPatch.context() as patch:
        module = types.ModuleType("own")
        module.score = brightness
        patch.setitem(sys.modules, "own", module)
        for steps in (1, 3):
            train(small(root / str(steps), steps=steps, reward="own:score", checkpoint_every=3, strip_every=0))
    return root


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failing_reward_leaves_the_step_before_it(small, bright, tmp_path, reward, outcome, failure):
    broken, words = FAILURES[failure]
    calls, failing = 0, True

    def score(images, prompts):
        nonlocal calls
        calls += 1
        # the first measure, three chunks of step 0, the second chunk of step 1: members 1, 2 of two prompts
        return broken(images) if failing and calls == 6 else brightness(images, prompts)

    config = small(tmp_path / "run", steps=3, reward=reward(score), checkpoint_every=3, strip_every=0)
    with pytest.raises(RewardError, match=rf"reward own:score, step 1, members 1, 2 .*{words}") as caught:
        train(config)
    assert "\n" not in str(caught.value)

    kept = checkpoint.load_latest(tmp_path / "run" / "checkpoints")
    assert kept.step == 1
    state = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    expected = load_file(bright / "1" / "adapter" / "adapter_model.safetensors")
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor)
        assert torch.equal(kept.tensors["adapter/" + name.removeprefix("base_model.model.")], tensor)

    failing = False
    train(dataclasses.replace(config, resume=True))
    assert outcome(tmp_path / "run") == outcome(bright / "3")
