"""Combines several rewards: checks each output and computes the weighted sum."""

import copy
import functools
import logging
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from esengine.base.errors import ConfigError, OutOfMemory, RewardError
from esengine.base.memory import give_back, oom_guard
from esengine.base.prompt_files import METADATA, Metadata
from esengine.models.text_limits import Cut
from esengine.rewards.base import (
    Encoder,
    FeatureReward,
    Reward,
    as_scores,
    describe,
    reason,
    settings_of,
    takes_metadata,
)
from esengine.rewards.spec import COMBINED, Term

_log = logging.getLogger(__name__)


class Weighted:
    """Rewards and their weights. A reward of weight 0 is scored and reported but is not in the sum.

    Args:
        terms: loaded terms. (name, reward, weight) is short for a term without options.
        note: called with a warning on out-of-memory. From then on batches are scored in smaller parts.

    Attributes:
        strict: whether the answer for one image must be of shape [1], see `as_scores`.

    Raises:
        ConfigError: no terms, a name used twice or reserved, a weight that is not finite, or only weights of 0.
    """

    def __init__(self, terms: Sequence[Term | tuple[str, Reward, float]], note: Callable[[str], None] = _log.warning):
        self.terms = tuple(
            term if isinstance(term, Term) else Term(term[0], reward=term[1], weight=term[2]) for term in terms
        )
        self.note = note
        self.limit: int | None = None
        self.strict = False
        self._deferred: list[tuple[dict[str, torch.Tensor], list[str], dict]] | None = None
        self.check(self.terms)
        self._take_metadata = {term.name: takes_metadata(_scorer(term.reward)) for term in self.terms}

    @staticmethod
    def check(terms: Sequence[Term]) -> None:
        """Check names and weights before anything is loaded. Raises as the class does."""
        names = [term.name for term in terms]
        for term in terms:
            if term.name == COMBINED:
                raise ConfigError(f"reward {COMBINED}: that name is reserved for the weighted sum")
            if names.count(term.name) > 1:
                raise ConfigError(f"reward {term.name}: given {names.count(term.name)} times, expected once")
            if not math.isfinite(term.weight):
                raise ConfigError(f"reward {term.name}: expected a finite weight, got {term.weight}")
        if not any(term.weight for term in terms):
            raise ConfigError(f"rewards: expected at least one with a weight other than 0, got {names}")

    def check_prompts(self, prompts: Sequence[str], metadata: Sequence[Metadata] | None = None) -> None:
        """Raises ConfigError for prompts, or their metadata, that a reward cannot score: see `Reward`."""
        for term in self.terms:
            if callable(check := getattr(term.reward, "check_prompts", None)):
                columns = _columns(metadata, len(prompts))
                check(prompts, **{METADATA: columns} if takes_metadata(check) else {})

    def cut_prompts(self, prompts: Sequence[str]) -> list[Cut]:
        """How many of the prompts the rewards' text encoders cut. Rewards that share an encoder are one entry."""
        found: dict[tuple[Any, Cut], list[str]] = {}
        for term in self.terms:
            cut = getattr(term.reward, "cut_prompts", lambda prompts: None)(prompts)
            if cut is not None:
                found.setdefault((getattr(term.reward, "encoder", term.name), cut), []).append(term.name)
        return [cut._replace(by=f"for {', '.join(names)}") for (_, cut), names in found.items()]

    @property
    def names(self) -> list[str]:
        """Names of the terms, in their order."""
        return [term.name for term in self.terms]

    def score(
        self,
        images: torch.Tensor,
        prompts: list[str],
        *,
        metadata: Sequence[Metadata] | None = None,
        step: int | None = None,
        members: Sequence[int] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Score a batch with every reward.

        Args:
            images: uint8 [B, 3, H, W]. Each reward gets its own copy unless it has `reads_only`, so none can damage
                another's input. Rewards with the same encoder share one image pass.
            prompts: B texts.
            metadata: B dicts of the prompts' columns, for rewards that take them. None: B empty ones.
            step: for the error message.
            members: B population members, for the error message.

        Returns:
            float32 [B] on the images' device: each reward's score under its name, and sum_j w_j score_j, accumulated in
            fp64, under "combined". For a single reward of weight 1 the sum equals its score bit for bit.

        Raises:
            RewardError: see `checked`; also if the sum overflows float32.
            OutOfMemory: not even one image fits.
            ValueError: images have another dtype or shape, or prompts or members have another length.
        """
        metadata = _columns(metadata, len(images))
        if self.limit is None or len(images) <= self.limit:
            try:
                return self._score(images, prompts, metadata, step, members)
            except OutOfMemory as error:
                if len(images) <= 1:
                    raise
                self.limit = len(images) // 2
                self.note(f"warning: {error}; from here on {self.limit} are scored together")
            give_back(images.device)  # after the except block: the error holds tensors
        parts = [slice(start, start + self.limit) for start in range(0, len(images), self.limit)]
        found = [
            self.score(
                images[part],
                prompts[part],
                metadata=metadata[part],
                step=step,
                members=None if members is None else members[part],
            )
            for part in parts
        ]
        return {name: torch.cat([each[name] for each in found]) for name in found[0]}

    def _score(
        self,
        images: torch.Tensor,
        prompts: list[str],
        metadata: Sequence[Metadata],
        step: int | None,
        members: Sequence[int] | None,
    ) -> dict[str, torch.Tensor]:
        where, at_once = dict(step=step, members=members), not _waits(images.device)
        scores = self.call(images, prompts, metadata, finite=at_once, **where)
        weighted = (term.weight * scores[term.name].double() for term in self.terms)
        scores[COMBINED] = functools.reduce(operator.add, weighted).float()
        if at_once:
            _require_all_finite(scores, prompts, **where)
        elif self._deferred is not None:
            kept = {name: score.clone() for name, score in scores.items()}  # the caller may overwrite its own
            self._deferred.append((kept, list(prompts), where))
        else:
            _require_all_finite(scores, prompts, **where)
        return scores

    def call(
        self, images: torch.Tensor, prompts: list[str], metadata: Sequence[Metadata], *, finite: bool, **where
    ) -> dict[str, torch.Tensor]:
        """Each reward's score by its name, float32 [B]. See `checked` if they must be `finite`, else `asked`."""
        passes: dict[Encoder, torch.Tensor] = {}
        ask, scores = checked if finite else asked, {}
        for term in self.terms:
            columns = metadata if self._take_metadata[term.name] else None
            reward = _shared(term.reward, passes)
            scores[term.name] = ask(term.name, reward, images, prompts, metadata=columns, strict=self.strict, **where)
        return scores

    @contextmanager
    def deferred_checks(self) -> Iterator[None]:
        """Within the context, GPU scores are checked only on exit. Exit raises for the first one that is not finite.

        So a step of many chunks waits for the device once. Discard what was computed from such scores.

        Raises:
            RewardError: on exit, as `score` raises it.
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

    def __call__(
        self, images: torch.Tensor, prompts: list[str], metadata: Sequence[Metadata] | None = None
    ) -> torch.Tensor:
        """The weighted sum alone, as a reward: images uint8 [B, 3, H, W] to float32 [B] on their device."""
        return self.score(images, prompts, metadata=metadata)[COMBINED]

    def settings(self) -> dict[str, dict[str, Any]]:
        """Each reward's weight and its `settings()`, for a result's record."""
        return {term.name: {"weight": term.weight, **settings_of(term.reward)} for term in self.terms}


class _FromFeatures:
    """A feature reward that shares its encoder's pass over this batch. The first reward makes the pass."""

    reads_only = True

    def __init__(self, reward: FeatureReward, passes: dict[Encoder, torch.Tensor]):
        self.reward, self.passes = reward, passes

    def __call__(self, images: torch.Tensor, prompts: list[str], **metadata: list[Metadata]) -> torch.Tensor:
        if self.reward.encoder not in self.passes:
            self.passes[self.reward.encoder] = self.reward.encoder.image_features(images)
        return self.reward.score_features(self.passes[self.reward.encoder].clone(), prompts, **metadata)


def _shared(reward: Reward, passes: dict[Encoder, torch.Tensor]) -> Reward:
    return _FromFeatures(reward, passes) if isinstance(reward, FeatureReward) else reward


def _scorer(reward: Reward) -> Callable[..., Any]:
    """What `Weighted` calls of a reward: itself, or the method of a feature reward."""
    return reward.score_features if isinstance(reward, FeatureReward) else reward


def _columns(metadata: Sequence[Metadata] | None, count: int) -> Sequence[Metadata]:
    """The metadata of `count` images or prompts: empty dicts if there is none."""
    return [{} for _ in range(count)] if metadata is None else metadata


def checked(
    name: str,
    reward: Reward,
    images: torch.Tensor,
    prompts: list[str],
    *,
    metadata: Sequence[Metadata] | None = None,
    strict: bool = False,
    **where,
) -> torch.Tensor:
    """As `asked`, with the same arguments, but scores must be finite.

    Raises:
        RewardError: as `asked`; also if a score is not finite.
    """
    score = asked(name, reward, images, prompts, metadata=metadata, strict=strict, **where)
    _require_finite(name, score, prompts, **where)
    return score


def asked(
    name: str,
    reward: Reward,
    images: torch.Tensor,
    prompts: list[str],
    *,
    metadata: Sequence[Metadata] | None = None,
    strict: bool = False,
    step: int | None = None,
    members: Sequence[int] | None = None,
) -> torch.Tensor:
    """Call one reward without gradients and check what it returns. It gets a copy of the batch unless `reads_only`.

    Args: as `Weighted.score`; `name` is for the error message. With `metadata` None the reward is called without it.
        `strict` is that of `as_scores`.

    Returns:
        float32 [B], a copy on the images' device.

    Raises:
        RewardError: the reward raised (chained as the cause), or did not return float32 [B]. The message names the
            reward, the step, the members of the offending images and their prompt.
        OutOfMemory: torch ran out of memory inside the reward.
        ValueError: images have another dtype or shape, or prompts or members have another length.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images: expected uint8 [B, 3, H, W], got {describe(images)}")
    for argument, values in (("prompts", prompts), (METADATA, metadata), ("members", members)):
        if values is not None and len(values) != len(images):
            raise ValueError(f"{argument}: expected {len(images)}, one for each image, got {len(values)}")
    try:
        with oom_guard(f"{len(images)} images and reward {name}", "give it a smaller model, or a device of its own"):
            score = _asked(reward, images, prompts, metadata, strict)
    except (KeyboardInterrupt, OutOfMemory):
        raise
    except BaseException as e:  # external code may raise anything
        why = reason(e) if isinstance(e, RewardError) else f"raised {reason(e)}"
        rows = e.images if isinstance(e, RewardError) and e.reward is None and e.images else range(len(images))
        raise _reward_error(why, name, rows, prompts, step, members) from e
    return score


def _asked(
    reward: Reward, images: torch.Tensor, prompts: list[str], metadata: Sequence[Metadata] | None, strict: bool
) -> torch.Tensor:
    """A copy of what the reward returns, float32 [B] on the images' device. May raise any error."""
    given = {} if metadata is None else {METADATA: list(metadata)}
    if getattr(reward, "reads_only", False) is not True:
        images, given = images.clone(), copy.deepcopy(given)
    with torch.no_grad():
        score = reward(images, list(prompts), **given)
        return as_scores(score, len(images), strict).to(images.device, copy=True)


def _waits(device: torch.device) -> bool:
    """Whether reading values on this device waits for kernels launched before."""
    return device.type != "cpu"


def _require_all_finite(scores: dict[str, torch.Tensor], prompts, step=None, members=None) -> None:
    """Raises RewardError for the first score that is not finite. Waits for the device once."""
    if not torch.stack(list(scores.values())).isfinite().all():
        for name, score in scores.items():
            if name == COMBINED and len(bad := torch.nonzero(~score.isfinite()).flatten().tolist()):
                parts = ", ".join(f"{part} {each[bad[0]]:g}" for part, each in scores.items() if part != COMBINED)
                what = f"is {score[bad[0]]:g}, a sum that float32 cannot hold, of {parts}; expected smaller ones"
                raise _reward_error(what, name, bad, prompts, step, members)
            _require_finite(name, score, prompts, step, members)


def _require_finite(name, score, prompts, step=None, members=None) -> None:
    bad = torch.nonzero(~torch.isfinite(score)).flatten().tolist()
    if bad:
        values = ", ".join(dict.fromkeys(str(v) for v in score[bad].tolist()))
        what = f"returned {values}; expected a finite float32 score"
        raise _reward_error(what, name, bad, prompts, step, members)


def _reward_error(what: str, name: str, rows: Sequence[int], prompts, step=None, members=None) -> RewardError:
    """The error of a reward on some rows of a batch. Members identify the rows; without members, their places do."""
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
    prompt = texts[0] if texts else None
    return RewardError(f"{', '.join(parts)}: {what}", reward=name, step=step, images=ids, prompt=prompt)
