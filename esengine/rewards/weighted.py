"""Several rewards as one: each output checked, then their weighted sum."""

import functools
import math
import operator
from collections.abc import Sequence

import torch

from esengine.errors import ConfigError, RewardError
from esengine.rewards.registry import Reward, load, reason

COMBINED = "combined"


class Weighted:
    """Rewards and their weights. A reward of weight 0 is scored and reported but has no part in the sum.

    Args:
        terms: (name, reward, weight) for each reward.

    Raises:
        ConfigError: no terms, a name used twice or reserved, a weight that is not finite, or no weight but 0.
    """

    def __init__(self, terms: Sequence[tuple[str, Reward, float]]):
        self.terms = tuple(terms)
        names = [name for name, _, _ in self.terms]
        for name, _, weight in self.terms:
            if name == COMBINED:
                raise ConfigError(f"reward {name}: that name is reserved for the weighted sum")
            if names.count(name) > 1:
                raise ConfigError(f"reward {name}: given {names.count(name)} times, expected once")
            if not math.isfinite(weight):
                raise ConfigError(f"reward {name}: expected a finite weight, got {weight}")
        if not any(weight for _, _, weight in self.terms):
            raise ConfigError(f"rewards: expected at least one with a weight other than 0, got {names}")

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
            images: uint8 [B, 3, H, W]. Each reward gets a copy of its own, so none can damage another's input.
            prompts: B texts.
            step: for the error's text.
            members: B population members, for the error's text.

        Returns:
            float32 [B] on the images' device under each reward's name, and sum_j w_j score_j, accumulated in fp64,
            under "combined". One reward of weight 1 is its own sum, bit for bit.

        Raises:
            RewardError: see `checked`; also when the sum itself overflows float32.
            ValueError: images, prompts or members do not fit each other.
        """
        scores = {
            name: checked(name, reward, images, prompts, step=step, members=members) for name, reward, _ in self.terms
        }
        total = functools.reduce(operator.add, (w * scores[name].double() for name, _, w in self.terms)).float()
        _require_finite(COMBINED, total, prompts, step, members)
        return {**scores, COMBINED: total}


def parse(spec: str) -> Weighted:
    """Read "name", "name=weight" or several with commas between: "jpeg_compressibility=1.0,my.module:score=0.5".

    Raises:
        ConfigError: an empty item, a weight that is not a number, or what `load` and `Weighted` refuse.
    """
    terms = []
    for item in spec.split(","):
        name, equals, weight = (part.strip() for part in item.partition("="))
        if not name:
            raise ConfigError(f"rewards: expected name or name=weight between commas, got {spec!r}")
        try:
            value = float(weight) if equals else 1.0
        except ValueError as e:
            raise ConfigError(f"reward {name}: expected a number for its weight, got {weight!r}") from e
        terms.append((name, load(name), value))
    return Weighted(terms)


def checked(
    name: str,
    reward: Reward,
    images: torch.Tensor,
    prompts: list[str],
    *,
    step: int | None = None,
    members: Sequence[int] | None = None,
) -> torch.Tensor:
    """Call one reward on a copy of the batch, without gradients, and check what it returns.

    Args: as `Weighted.score`; name is for the error's text.

    Returns:
        float32 [B], a copy on the images' device.

    Raises:
        RewardError: the reward raised (chained as the cause), or did not return finite float32 [B]. The text names
            the reward, the step, the members of the offending images and their prompt.
        ValueError: images, prompts or members do not fit each other.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images: expected uint8 [B, 3, H, W], got {_describe(images)}")
    for argument, values in (("prompts", prompts), ("members", members)):
        if values is not None and len(values) != len(images):
            raise ValueError(f"{argument}: expected {len(images)}, one for each image, got {len(values)}")
    everything = range(len(images))
    try:
        with torch.no_grad():
            score = reward(images.clone(), list(prompts))
    except (Exception, SystemExit) as e:
        raise RewardError(f"{_where(name, everything, prompts, step, members)}: raised {reason(e)}") from e
    if not isinstance(score, torch.Tensor) or score.dtype != torch.float32 or score.shape != (len(images),):
        raise RewardError(
            f"{_where(name, everything, prompts, step, members)}: "
            f"returned {_describe(score)}; expected a tensor float32 [{len(images)}]"
        )
    score = score.detach().to(images.device, copy=True)
    _require_finite(name, score, prompts, step, members)
    return score


def _require_finite(name, score, prompts, step, members) -> None:
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


def _describe(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__
