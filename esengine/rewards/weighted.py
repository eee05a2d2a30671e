"""Several rewards as one: each output checked, then their weighted sum."""

import functools
import logging
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from esengine.base.errors import ConfigError, OutOfMemory, RewardError
from esengine.base.memory import fits, give_back
from esengine.rewards.base import Encoder, FeatureReward, Reward, as_scores, describe, reason, settings_of
from esengine.rewards.spec import COMBINED

_log = logging.getLogger(__name__)


class Weighted:
    """Rewards and their weights. A reward of weight 0 is scored and reported but has no part in the sum.

    Args:
        terms: (name, reward, weight) for each reward.

        note: told when memory runs out and a batch is scored in smaller parts from then on.

    Raises:
        ConfigError: no terms, a name used twice or reserved, a weight that is not finite, or no weight but 0.
    """

    def __init__(self, terms: Sequence[tuple[str, Reward, float]], note: Callable[[str], None] = _log.warning):
        self.terms, self.note = tuple(terms), note
        self.limit: int | None = None
        self._deferred: list[tuple[dict[str, torch.Tensor], list[str], dict]] | None = None
        self.check([(name, weight) for name, _, weight in self.terms])

    @staticmethod
    def check(weights: Sequence[tuple[str, float]]) -> None:
        """Refuse names and weights that cannot stand together, before anything is loaded. Raises as the class."""
        names = [name for name, _ in weights]
        for name, weight in weights:
            if name == COMBINED:
                raise ConfigError(f"reward {name}: that name is reserved for the weighted sum")
            if names.count(name) > 1:
                raise ConfigError(f"reward {name}: given {names.count(name)} times, expected once")
            if not math.isfinite(weight):
                raise ConfigError(f"reward {name}: expected a finite weight, got {weight}")
        if not any(weight for _, weight in weights):
            raise ConfigError(f"rewards: expected at least one with a weight other than 0, got {names}")

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises ConfigError for prompts that a reward says it cannot score: see `Reward`."""
        for _, reward, _ in self.terms:
            if callable(check := getattr(reward, "check_prompts", None)):
                check(prompts)

    @property
    def names(self) -> list[str]:
        return [name for name, _, _ in self.terms]

    def score(
        self,
        images: torch.Tensor,
        prompts: list[str],
        *,
        step: int | None = None,
        members: Sequence[int] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Score a batch with every reward.

        Args:
            images: uint8 [B, 3, H, W]. A reward gets a copy of its own, unless it promises to read only, so none can
                damage another's input. Rewards that hold the same encoder share one image pass.
            prompts: B texts.
            step: for the error's text.
            members: B population members, for the error's text.

        Returns:
            float32 [B] on the images' device under each reward's name, and sum_j w_j score_j, accumulated in fp64,
            under "combined". One reward of weight 1 is its own sum, bit for bit.

        Raises:
            RewardError: see `checked`; also when the sum itself overflows float32.
            OutOfMemory: not even one image fits.
            ValueError: images, prompts or members do not fit each other.
        """
        if self.limit is None or len(images) <= self.limit:
            try:
                return self._score(images, prompts, step, members)
            except OutOfMemory as error:
                if len(images) <= 1:
                    raise
                self.limit = len(images) // 2
                self.note(f"warning: {error}; from here on {self.limit} are scored together")
            give_back(images.device)  # not while the error lives, which holds tensors
        parts = [slice(start, start + self.limit) for start in range(0, len(images), self.limit)]
        found = [
            self.score(images[part], prompts[part], step=step, members=None if members is None else members[part])
            for part in parts
        ]
        return {name: torch.cat([each[name] for each in found]) for name in found[0]}

    def _score(
        self, images: torch.Tensor, prompts: list[str], step: int | None, members: Sequence[int] | None
    ) -> dict[str, torch.Tensor]:
        passes: dict[Encoder, torch.Tensor] = {}
        where, at_once = dict(step=step, members=members), not _waits(images.device)
        ask = checked if at_once else asked
        scores = {name: ask(name, _shared(reward, passes), images, prompts, **where) for name, reward, _ in self.terms}
        total = functools.reduce(operator.add, (w * scores[name].double() for name, _, w in self.terms)).float()
        scores[COMBINED] = total
        if at_once:
            _require_finite(COMBINED, total, prompts, **where)
        elif self._deferred is not None:
            kept = {name: score.clone() for name, score in scores.items()}  # the caller may write into its own
            self._deferred.append((kept, list(prompts), where))
        else:
            _require_all_finite(scores, prompts, **where)
        return scores

    @contextmanager
    def deferred_checks(self) -> Iterator[None]:
        """Inside, scores on a GPU that are not finite raise nothing; the end does, for the first of them.

        So a step of many chunks waits for the device once. What was made of such scores is to be thrown away.

        Raises:
            RewardError: At the end, as `score` raises it.
        """
        if self._deferred is not None:
            raise RuntimeError("deferred_checks: already inside one; contexts do not nest")
        self._deferred = []
        try:
            yield
            for scores, prompts, where in self._deferred:
                _require_all_finite(scores, prompts, **where)
        finally:
            self._deferred = None

    def __call__(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """The weighted sum alone, as a reward: images uint8 [B, 3, H, W] to float32 [B] on their device."""
        return self.score(images, prompts)[COMBINED]

    def settings(self) -> dict[str, dict[str, Any]]:
        """Each reward's weight and what it says of itself, for the record of a result."""
        return {name: {"weight": weight, **settings_of(reward)} for name, reward, weight in self.terms}


class _FromFeatures:
    """A feature reward whose encoder's pass over this batch is made once, by whichever reward comes first."""

    reads_only = True

    def __init__(self, reward: FeatureReward, passes: dict[Encoder, torch.Tensor]):
        self.reward, self.passes = reward, passes

    def __call__(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        if self.reward.encoder not in self.passes:
            self.passes[self.reward.encoder] = self.reward.encoder.image_features(images)
        return self.reward.score_features(self.passes[self.reward.encoder].clone(), prompts)


def _shared(reward: Reward, passes: dict[Encoder, torch.Tensor]) -> Reward:
    return _FromFeatures(reward, passes) if isinstance(reward, FeatureReward) else reward


def checked(name: str, reward: Reward, images: torch.Tensor, prompts: list[str], **where) -> torch.Tensor:
    """`asked`, and an error for what is not finite. Same arguments.

    Raises:
        RewardError: also when a score is not finite.
    """
    score = asked(name, reward, images, prompts, **where)
    _require_finite(name, score, prompts, **where)
    return score


def asked(
    name: str,
    reward: Reward,
    images: torch.Tensor,
    prompts: list[str],
    *,
    step: int | None = None,
    members: Sequence[int] | None = None,
) -> torch.Tensor:
    """Call one reward without gradients, on a copy of the batch unless it reads only, and check what it returns.

    Args: as `Weighted.score`; name is for the error's text.

    Returns:
        float32 [B], a copy on the images' device.

    Raises:
        RewardError: the reward raised (chained as the cause), or did not return float32 [B]. The text names the reward,
            the step, the members of the offending images and their prompt.
        OutOfMemory: torch said so inside the reward.
        ValueError: images, prompts or members do not fit each other.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images: expected uint8 [B, 3, H, W], got {describe(images)}")
    for argument, values in (("prompts", prompts), ("members", members)):
        if values is not None and len(values) != len(images):
            raise ValueError(f"{argument}: expected {len(images)}, one for each image, got {len(values)}")
    try:
        with fits(f"{len(images)} images and reward {name}", "give it a smaller model, or a device of its own"):
            score = _asked(reward, images, prompts)
    except (KeyboardInterrupt, OutOfMemory):
        raise
    except BaseException as e:  # somebody else's code may raise anything
        said = reason(e) if isinstance(e, RewardError) else f"raised {reason(e)}"
        raise RewardError(f"{_where(name, range(len(images)), prompts, step, members)}: {said}") from e
    return score


def _asked(reward: Reward, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """A copy of what the reward returns, float32 [B] on the images' device, or an error of any kind."""
    with torch.no_grad():
        score = reward(images if getattr(reward, "reads_only", False) is True else images.clone(), list(prompts))
        return as_scores(score, len(images)).to(images.device, copy=True)


def _waits(device: torch.device) -> bool:
    """Whether to look at numbers there is to wait for what was launched before."""
    return device.type != "cpu"


def _require_all_finite(scores: dict[str, torch.Tensor], prompts, step=None, members=None) -> None:
    """Waits for the device once. The first that is not finite is named."""
    if not torch.stack(list(scores.values())).isfinite().all():
        for name, score in scores.items():
            _require_finite(name, score, prompts, step, members)


def _require_finite(name, score, prompts, step=None, members=None) -> None:
    bad = torch.nonzero(~torch.isfinite(score)).flatten().tolist()
    if bad:
        values = ", ".join(dict.fromkeys(str(v) for v in score[bad].tolist()))
        raise RewardError(
            f"{_where(name, bad, prompts, step, members)}: returned {values}; expected a finite float32 score"
        )


def _where(name: str, rows: Sequence[int], prompts: list[str], step: int | None, members: Sequence[int] | None) -> str:
    noun = "image" if members is None else "member"
    ids = list(dict.fromkeys(row if members is None else int(members[row]) for row in rows))
    texts = list(dict.fromkeys(prompts[row] for row in rows))
    parts = [f"reward {name}"]
    if step is not None:
        parts.append(f"step {step}")
    if ids:
        some = ", ".join(str(i) for i in ids[:8]) + (f", ... ({len(ids)} in all)" if len(ids) > 8 else "")
        first = texts[0] if len(texts[0]) <= 80 else texts[0][:77] + "..."
        others = f" and {len(texts) - 1} more" if len(texts) > 1 else ""
        parts.append(f"{noun}{'s' if len(ids) > 1 else ''} {some} (prompt {first!r}{others})")
    return ", ".join(parts)
