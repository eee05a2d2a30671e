"""Rewards that fail on some images: those have no score, NaN, up to a share of all of them."""

from contextlib import AbstractContextManager, nullcontext

import torch

from esengine.base.errors import RewardError
from esengine.rewards import COMBINED, Weighted

MOST_BAD = 0.1
"""Share of the images without a score that a run with `on_bad_reward: drop-pair` bears."""


MOST_IN_A_ROW = 8
"""Images that a reward may fail on one after the other before the others of their batch are not asked for."""


class Bearing:
    """Scores like `Weighted`, but for NaN where a reward raises or gives no finite number.

    A batch that a reward fails on is asked for image by image, until too many are bad. After `MOST_IN_A_ROW` failures
    the others of the batch count as bad, unasked: a service that is down may take its time limit to say so.

    Args:
        reward: whose scores.
        images: that are to be scored in all.
        least: so many may be bad in any case.

    Attributes:
        bad: images without a score so far.
        first: what the first of them failed with.
    """

    def __init__(self, reward: Weighted, images: int, least: int = 0):
        self.reward, self.images, self.most = reward, images, max(least, int(MOST_BAD * images))
        self.terms, self.names, self.settings = reward.terms, reward.names, reward.settings
        self.bad, self.first = 0, None

    def score(self, images: torch.Tensor, prompts: list[str], *, step=None, members=None) -> dict[str, torch.Tensor]:
        """As `Weighted.score`.

        Raises:
            RewardError: too many images are bad; the first failure is the cause.
        """
        try:
            return self.reward.score(images, prompts, step=step, members=members)
        except RewardError as error:
            if len(images) == 1:
                return self._nothing(error, images, step)
        parts, row = [], 0
        for i in range(len(images)):
            if row == MOST_IN_A_ROW:
                parts.append(self._nothing(self.first, images[i:], step))
                break
            before, one = self.bad, slice(i, i + 1)
            parts.append(self.score(images[one], prompts[one], step=step, members=members and members[one]))
            row = row + 1 if self.bad > before else 0
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def deferred_checks(self) -> AbstractContextManager:
        """Nothing is put off: a bad image shows at once, so that the others of its batch can be asked for alone."""
        return nullcontext()

    def _nothing(self, error: RewardError, images: torch.Tensor, step: int | None) -> dict[str, torch.Tensor]:
        self.bad, self.first = self.bad + len(images), self.first or error
        if self.bad > self.most:
            when = "" if step is None else f"step {step}: "
            raise RewardError(f"{when}{too_many(self.bad, self.images)}; the first: {self.first}") from self.first
        return dict.fromkeys([*self.names, COMBINED], torch.full((len(images),), torch.nan, device=images.device))


def too_many(bad: int, images: int) -> str:
    return f"{bad} of {images} images have no score, more than {MOST_BAD:.0%}"
