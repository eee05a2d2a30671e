"""Rewards that fail on some images, asked by nobody but the test. See also test_faults.py."""

import pytest
import torch

from esengine.base.errors import RewardError
from esengine.rewards import COMBINED, Weighted
from esengine.rewards.fault_tolerant import MAX_IN_A_ROW, FaultTolerant


def bearing(bad, images, least):
    """Over images of which image p has value p, with a reward that raises on those of `bad`; and how it was asked."""
    asked = []

    def score(images, prompts):
        places = images[:, 0, 0, 0].tolist()
        asked.append(places)
        if bad & set(places):
            raise RuntimeError("down")
        return torch.tensor(places, dtype=torch.float32)

    return FaultTolerant(Weighted([("own", score, 1.0)]), images, least), asked


def batch(places):
    images = torch.tensor(places, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    return images, [f"prompt {place}" for place in places]


def test_a_dead_service_is_asked_a_few_times_a_batch():
    reward, asked = bearing(set(range(96)), 96, least=96)
    for places in (range(48), range(48, 96)):
        scores = reward.score(*batch([*places]))
        assert scores[COMBINED].isnan().all()
        assert scores["own"].shape == (48,)
    first, second = asked[: len(asked) // 2], asked[len(asked) // 2 :]
    assert first == [[*range(48)], *([place] for place in range(MAX_IN_A_ROW))]
    assert len(second) == len(first)
    assert reward.bad == 96


def test_images_that_are_not_asked_for_count_as_bad():
    reward, asked = bearing(set(range(48)), 470, least=0)
    with pytest.raises(RewardError, match="48 of 470 images") as caught:
        reward.score(*batch([*range(48)]), step=3)
    assert (caught.value.reward, caught.value.step) == ("own", 3)
    assert len(asked) == 1 + MAX_IN_A_ROW


def test_failures_with_a_score_between_them_end_no_batch():
    bad = {place for place in range(48) if place % MAX_IN_A_ROW}
    reward, asked = bearing(bad, 48, least=48)
    scores = reward.score(*batch([*range(48)]))
    assert len(asked) == 49
    assert scores["own"].isfinite().tolist() == [place not in bad for place in range(48)]
    assert reward.bad == len(bad)
