"""The protocol of rewards."""

import functools
import inspect
import math
import numbers
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from esengine.base.errors import EsengineError, RewardError
from esengine.base.printable import plain, shown
from esengine.base.prompt_files import METADATA


class Reward(Protocol):
    """Any callable that scores finished images. Higher is better. It needs no gradient and gets none.

    It may take a third argument `metadata`, by keyword: the columns of each prompt in the prompt file besides the
    prompt, see `takes_metadata` and `esengine.base.prompt_files`. Without this argument it is called with images and
    prompts alone.

    Optional attributes:
        settings(): returns a dict for a result's record.
        reads_only = True: a promise never to write into `images` and `metadata`. The reward then gets the batch itself,
            not a copy.
        overlaps = True: the reward mostly waits, such as for a service. Training then calls it in a separate thread
            while the next chunk renders.
        no_trial = True: the reward is not called on two dummy images before the model loads.
        check_prompts(prompts): raises ConfigError for prompts that it cannot score, before anything is rendered. It may
            take `metadata` too.
    """

    def __call__(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Score images, uint8 [B, 3, H, W]. Image i was rendered from prompt i.

        Returns B finite numbers, one for each image: a tensor [B] (float32, or another real dtype) on any device, a
        numpy array [B], or a list. None or NaN: the image has no score. See `as_scores`.
        """
        ...


def takes_metadata(call: Callable[..., Any]) -> bool:
    """Whether a reward, or one of its methods, takes `metadata` by keyword: by that name, or by `**kwargs`.

    A torch module takes what its `forward` takes. An argument that `functools.partial` has given already is not given
    again. A callable whose signature cannot be read does not take it.
    """
    if isinstance(call, functools.partial) and METADATA in call.keywords:
        return False
    while isinstance(call, functools.partial) and isinstance(call.func, torch.nn.Module):
        call = functools.partial(call.func.forward, *call.args, **call.keywords)
    call = call.forward if isinstance(call, torch.nn.Module) else call
    try:
        parameters = inspect.signature(call).parameters.values()
    except (TypeError, ValueError):
        return False
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return any(
        each.kind is inspect.Parameter.VAR_KEYWORD or (each.name == METADATA and each.kind in by_name)
        for each in parameters
    )


def as_scores(returned: object, count: int, strict: bool = False) -> torch.Tensor:
    """What a reward returned, as float32 [count]. A tensor stays on its device, without its graph.

    Wider floats are rounded to float32. Integers must be exact in float32. None, and what a numpy array masks, is NaN:
    no score. A tensor or an array [count, 1] is taken as [count]. For one image a single number will do,
    unless `strict`: then [1, 1] and a single number are refused, because the same reward may answer [1, B] or a mean.

    Raises:
        RewardError: the value is not `count` real numbers: it has another shape or type (bool and complex are not
            converted), or float32 cannot hold a number. For a float, `images` has the places of those in the batch.
    """
    expected = f"expected {count} numbers, one for each image: a float32 tensor [{count}], a numpy array or a list"
    found = returned
    if isinstance(found, torch.Tensor):
        if found.layout != torch.strided:
            raise RewardError(f"returned a tensor of layout {found.layout}; expected a dense one")
        found = found.detach()
    if isinstance(found, torch.Tensor | np.ndarray):
        if not (strict and count == 1) and (found.shape == (count, 1) or (count == 1 and found.ndim == 0)):
            found = found.reshape(count)
        if found.shape != (count,):
            raise RewardError(f"returned {describe(returned)}; {expected}")
    elif count == 1 and not strict and isinstance(found, numbers.Real):
        found = [found]
    if isinstance(found, np.ndarray):
        found = _from_numpy(found)
    elif isinstance(found, torch.Tensor) and found.dtype in _UNSIGNED:
        found = _from_numpy(found.cpu().numpy())
    if isinstance(found, list | tuple) and len(found) == count:
        scores = [_number(each, place, expected) for place, each in enumerate(found)]
        found = torch.tensor(scores, dtype=torch.float64)
    if not isinstance(found, torch.Tensor) or not (found.dtype.is_floating_point or found.dtype in _INTEGERS):
        raise RewardError(f"returned {describe(returned)}; {expected}")
    return _rounded(found)


def _from_numpy(array: np.ndarray) -> torch.Tensor | list | np.ndarray:
    """An array [B] of real numbers as a tensor, or as a list if torch has no such dtype. Others as they are."""
    if np.ma.is_masked(array) and array.dtype.kind in "fiu":
        return array.tolist()  # None where masked
    if array.dtype.newbyteorder("=") in _ARRAYS:
        return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
    return array.tolist() if array.dtype.kind in "fiuO" else array


def _rounded(scores: torch.Tensor) -> torch.Tensor:
    """Real scores as float32. Raises RewardError for one that float32 cannot hold."""
    if scores.dtype == torch.float32:
        return scores
    if scores.dtype == torch.int64 and len(scores) and scores.abs().max() > 1 << 53:  # beyond exact fp64
        scores = torch.tensor([_number(each, place, "") for place, each in enumerate(scores.tolist())])
    found = scores.to(torch.float32)
    if scores.dtype in _INTEGERS and not torch.equal(found.to(torch.float64), scores.to(torch.float64)):
        raise RewardError(_INEXACT)
    if (lost := scores.isfinite() & ~found.isfinite()).any():
        what = f"returned {scores[lost][0]:g}, which float32 cannot hold: it would be inf"
        rows = torch.nonzero(lost).flatten().tolist()
        raise RewardError(f"{what}; expected a finite float32 score", images=rows)
    return found


_INEXACT = "returned integers that float32 cannot hold exactly; expected float32 scores"
_ARRAYS = [np.dtype(each) for each in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1")]
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)


def _number(value: object, place: int, expected: str) -> float:
    """One score of a list: None, a Python or numpy number, or a tensor or array that holds one."""
    if value is None or (isinstance(value, np.ma.MaskedArray) and value.ndim == 0 and np.ma.is_masked(value)):
        return math.nan
    if isinstance(value, torch.Tensor | np.ndarray) and math.prod(value.shape) == 1:
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
