"""The protocol of rewards."""

import math
import numbers
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from esengine.base.errors import EsengineError, RewardError
from esengine.base.printable import plain, shown


class Reward(Protocol):
    """Any callable that scores finished images. Higher is better. It needs no gradient and gets none.

    Optional attributes:
        settings(): returns a dict for a result's record.
        reads_only = True: a promise never to write into `images`. The reward then gets the batch itself, not a copy.
        overlaps = True: the reward mostly waits, such as for a service. Training then calls it in a separate thread
            while the next chunk renders.
        check_prompts(prompts): raises ConfigError for prompts that it cannot score, before anything is rendered.
    """

    def __call__(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Score images, uint8 [B, 3, H, W]. Image i was rendered from prompt i.

        Returns B finite numbers, one for each image: a tensor [B] (float32, or another real dtype) on any device, a
        numpy array [B], or a list. See `as_scores`.
        """
        ...


def as_scores(returned: object, count: int) -> torch.Tensor:
    """What a reward returned, as float32 [count]. A tensor stays on its device.

    Wider floats are rounded to float32. Integers must be exact in float32. Masked values of a numpy array become NaN.

    Raises:
        RewardError: the value is not `count` real numbers: it has another shape or type, or a number is missing or
            float32 cannot hold it.
    """
    expected = f"expected {count} numbers, one for each image: a float32 tensor [{count}], a numpy array or a list"
    if isinstance(returned, torch.Tensor):
        if returned.layout != torch.strided:
            raise RewardError(f"returned a tensor of layout {returned.layout}; expected a dense one")
        scores = returned.detach()
        if scores.dtype in (torch.uint16, torch.uint32, torch.uint64):
            return as_scores(scores.cpu().numpy(), count)
    elif isinstance(returned, np.ndarray) and returned.dtype.kind in "fiu":
        if np.ma.is_masked(returned) and returned.ndim == 1:
            return as_scores([math.nan if each is None else each for each in returned.tolist()], count)
        if returned.ndim == 1 and returned.dtype.newbyteorder("=") not in _ARRAYS:  # torch has no such dtype
            return as_scores(returned.tolist(), count)
        scores = torch.from_numpy(np.array(returned, dtype=returned.dtype.newbyteorder("="), order="C"))
    elif isinstance(returned, list | tuple):
        scores = [_number(each, place, expected) for place, each in enumerate(returned)]
        scores = torch.tensor(scores, dtype=torch.float64)
    else:
        raise RewardError(f"returned {describe(returned)}; {expected}")
    real = scores.dtype.is_floating_point or scores.dtype in _INTEGERS
    if scores.shape != (count,) or not real:
        raise RewardError(f"returned {describe(returned)}; {expected}")
    if scores.dtype == torch.float32:
        return scores
    if scores.dtype == torch.int64 and len(scores) and scores.abs().max() > 1 << 53:  # beyond exact fp64
        return as_scores(scores.tolist(), count)
    found = scores.to(torch.float32)
    if scores.dtype in _INTEGERS and not torch.equal(found.to(torch.float64), scores.to(torch.float64)):
        raise RewardError(_INEXACT)
    if (lost := scores.isfinite() & ~found.isfinite()).any():
        raise RewardError(f"returned {scores[lost][0]:g}, which float32 cannot hold; expected a finite float32 score")
    return found


_INEXACT = "returned integers that float32 cannot hold exactly; expected float32 scores"
_ARRAYS = [np.dtype(each) for each in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1")]
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _number(value: object, place: int, expected: str) -> float:
    """One score of a list: a Python or numpy number, or a tensor or array that holds one."""
    if isinstance(value, np.ma.MaskedArray) and value.ndim == 0 and np.ma.is_masked(value):
        return math.nan
    if isinstance(value, torch.Tensor | np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise RewardError(f"returned {plain(repr(value))[:60]} for image {place}; {expected}")
    if isinstance(value, numbers.Integral) and (abs(value) >= 1 << 127 or int(np.float32(int(value))) != value):
        raise RewardError(_INEXACT)
    try:
        return float(value)
    except OverflowError:
        raise RewardError(f"returned a number for image {place} that float32 cannot hold; {expected}") from None


def describe(value: object) -> str:
    """A value's type, or its dtype and shape if it has them."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, np.ndarray):
        return f"numpy {value.dtype} {list(value.shape)}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    return type(value).__name__


class Encoder(Protocol):
    """Turns images into features, once for all rewards with the same encoder."""

    def image_features(self, images: torch.Tensor) -> torch.Tensor:
        """Features of images, uint8 [B, 3, H, W]. Must not write into the images. Returns [B, D]."""
        ...


@runtime_checkable
class FeatureReward(Protocol):
    """A reward that scores an encoder's features. `Weighted.score` makes one image pass for each distinct encoder."""

    encoder: Encoder

    def score_features(self, features: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Score what `encoder.image_features` returned, [B, D]. Returns finite float32 [B]."""
        ...

    def __call__(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Score images as any `Reward` does."""
        ...


def settings_of(reward: Reward) -> dict[str, Any]:
    """A reward's `settings()`, or an empty dict if it has none."""
    settings = getattr(reward, "settings", None)
    return dict(settings()) if callable(settings) else {}


def reason(error: BaseException) -> str:
    """An exception as one short line: its type, unless it is an EsengineError, and the beginning of its message."""
    try:
        message = shown(error)[:300]
    except Exception:  # its __str__ raises
        message = ""
    if isinstance(error, EsengineError) and message:
        return message
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
