"""Fault-tolerant rewards. Failed images score NaN; the run stops above 10 %."""

from contextlib import AbstractContextManager, nullcontext

import torch

from esengine.base.errors import RewardError
from esengine.base.prompt_files import METADATA
from esengine.rewards import COMBINED, Weighted

MAX_BAD = 0.1
"""Largest share of images without a score in a run with `on_bad_reward: drop-pair`."""


MAX_IN_A_ROW = 8
"""After this many failures in a row, the rest of the batch is not scored."""


class FaultTolerant:
    """Scores like `Weighted`, but gives NaN where a reward raises or returns no finite number.

    A batch that a reward fails on is scored image by image, until too many are bad. After `MAX_IN_A_ROW` failures in a
    row the rest of the batch counts as bad without a call, because a service that is down may fail only at its timeout.

    Args:
        reward: the rewards that score.
        images: number of images to score in all.
        least: this many may be bad in any case.

    Attributes:
        bad: number of images without a score so far.
        first: the error of the first of them.
    """

    def __init__(self, reward: Weighted, images: int, least: int = 0):
        self.reward, self.images, self.most = reward, images, max(least, int(MAX_BAD * images))
        self.terms, self.names, self.settings = reward.terms, reward.names, reward.settings
        self.bad, self.first = 0, None

    def score(
        self, images: torch.Tensor, prompts: list[str], *, metadata=None, step=None, members=None
    ) -> dict[str, torch.Tensor]:
        """As `Weighted.score`.

        Raises:
            RewardError: too many images are bad; the first failure is the cause.
        """
        try:
            given = {} if metadata is None else {METADATA: metadata}
            return self.reward.score(images, prompts, **given, step=step, members=members)
        except RewardError as error:
            if len(images) == 1:
                return self._nothing(error, images, step)
            strict = isinstance(error.__cause__, RewardError)  # an answer of another shape may fit one image by chance
        before, self.reward.strict = self.reward.strict, strict
        try:
            return self._one_by_one(images, prompts, metadata=metadata, step=step, members=members)
        finally:
            self.reward.strict = before

    def _one_by_one(
        self, images: torch.Tensor, prompts: list[str], *, metadata, step, members
    ) -> dict[str, torch.Tensor]:
        parts, row = [], 0
        for i in range(len(images)):
            if row == MAX_IN_A_ROW:
                parts.append(self._nothing(self.first, images[i:], step))
                break
            before, one = self.bad, slice(i, i + 1)
            of_one = dict(metadata=metadata and metadata[one], step=step, members=members and members[one])
            parts.append(self.score(images[one], prompts[one], **of_one))
            row = row + 1 if self.bad > before else 0
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def deferred_checks(self) -> AbstractContextManager:
        """Defers nothing. A bad image raises at once, so that the rest of its batch can be scored one by one."""
        return nullcontext()

    def _nothing(self, error: RewardError, images: torch.Tensor, step: int | None) -> dict[str, torch.Tensor]:
        self.bad, self.first = self.bad + len(images), self.first or error
        if self.bad > self.most:
            when = "" if step is None else f"step {step}: "
            first = self.first
            facts = {"reward": first.reward, "step": step, "images": first.images, "prompt": first.prompt}
            raise RewardError(f"{when}{too_many(self.bad, self.images)}; the first: {first}", **facts) from first
        return dict.fromkeys([*self.names, COMBINED], torch.full((len(images),), torch.nan, device=images.device))


def too_many(bad: int, images: int) -> str:
    return f"{bad} of {images} images have no score, more than {MAX_BAD:.0%}"
