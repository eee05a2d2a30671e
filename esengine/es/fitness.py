"""Computes one fitness for each member from a population's scores.

Symbols: s[n, p, r] is the score of member n on prompt p, repeat r; N, P, R their counts. All in float64 inside.

    c[n, p, r] = s[n, p, r] - mean_{n, r} s[:, p, :]        removes each prompt's mean
    f[n]       = mean_{p, r} c[n, p, r] / d[p]

    d[p] = d = sqrt(mean_{n, p, r} c^2)                     global: one standard deviation for all prompts
    d[p] = max(sqrt(mean_{n, r} c[:, p, :]^2), d / 100)     own: each prompt's, so that all weigh the same; less than a
                                                            hundredth of the global one counts as rounding error

f is in units of one standard deviation and is rounded to 9 decimals, which is finer than float32 resolves. The rounding
makes mathematically equal members exactly equal, so ties stay ties and a flat population stays flat.
"""

from typing import Any

import numpy as np
import torch

METHODS = ("zscore", "centered_rank", "none")
PROMPT_STDS = ("global", "own")


def as_float32(values: Any, name: str) -> torch.Tensor:
    """A list, a tuple or a numpy array of numbers as a float32 tensor. A tensor is returned as it is.

    Numbers are rounded to float32. Masked values of an array become NaN.

    Raises:
        TypeError: the values are something else, or some are no real numbers.
        ValueError: a finite number is too large for float32.
    """
    if isinstance(values, torch.Tensor):
        return values
    try:
        if not isinstance(values, list | tuple | np.ndarray):
            raise ValueError
        found = np.ma.asanyarray(values)
        if found.dtype.kind not in "fiu" and found.size:
            raise ValueError
    except (ValueError, TypeError, RuntimeError) as error:  # of numpy: lists of unequal lengths
        what = f"{type(values).__name__} of other things" if isinstance(values, list | tuple) else type(values).__name__
        what = f"array of {values.dtype}" if isinstance(values, np.ndarray) else what
        expected = "a float32 tensor, or real numbers in a list, a tuple or a numpy array"
        raise TypeError(f"{name}: expected {expected}, got {what}") from error
    wide = found.astype(np.float64)
    wide = np.array(wide.filled(np.nan) if isinstance(wide, np.ma.MaskedArray) else wide)
    rounded = torch.from_numpy(wide).float()
    lost = torch.from_numpy(np.isfinite(wide)) & ~rounded.isfinite()
    if lost.any():
        raise ValueError(f"{name}: expected numbers that float32 can hold, got {wide[lost.numpy()][0]:g}")
    return rounded


def prompt_normalized(scores: torch.Tensor, prompt_std: str = "global") -> torch.Tensor:
    """Scores minus their prompt's mean, divided by a (biased) standard deviation and averaged for each member.

    Args:
        scores: float32 [N, P, R], finite.
        prompt_std: one of `PROMPT_STDS`.

    Returns:
        float32 [N] on the scores' device; zeros if no prompt's scores vary.

    Raises:
        ValueError: scores of another shape or dtype, with an empty dimension or a value that is not finite; or an
            unknown `prompt_std`.

    Source: `global` is the published run's; `own` is GRPO's, Shao et al., arXiv 2402.03300.
    """
    return _normalized(scores, prompt_std).float()


def shape(scores: torch.Tensor, method: str = "zscore", prompt_std: str = "global") -> torch.Tensor:
    """Shape prompt-normalised scores f into the fitness that the update takes.

        zscore         (f - mean f) / std f, biased std
        centered_rank  rank(f) / (N - 1) - 1/2 in [-1/2, 1/2]; equal members share their average rank
        none           f

    The result is bitwise deterministic on one device. Reordering members reorders it, up to float32 rounding.

    Args:
        scores: float32 [N, P, R], finite.
        method: one of `METHODS`.
        prompt_std: one of `PROMPT_STDS`.

    Returns:
        float32 [N] on the scores' device; zeros if all members are equal.

    Raises:
        ValueError: as `prompt_normalized`, or an unknown method.

    Source: centred ranks are those of Salimans et al., arXiv 1703.03864.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    f = _normalized(scores, prompt_std)
    if (f == f[0]).all():  # rounding can make their mean differ from them, and dividing by std would amplify that
        return torch.zeros_like(f, dtype=torch.float32)
    if method == "zscore":
        f = (f - f.mean()) / f.std(unbiased=False)
    elif method == "centered_rank":
        _, group, count = torch.unique(f, return_inverse=True, return_counts=True)
        rank = count.cumsum(0) - (count + 1) / 2  # average rank of the group, from 0
        f = rank.double()[group] / (len(f) - 1) - 0.5
    return f.float()


def _normalized(scores: torch.Tensor, prompt_std: str) -> torch.Tensor:
    if prompt_std not in PROMPT_STDS:
        raise ValueError(f"prompt_std: expected one of {', '.join(PROMPT_STDS)}, got {prompt_std!r}")
    scores = as_float32(scores, "scores")
    if scores.ndim != 3 or scores.numel() == 0 or scores.dtype != torch.float32:
        raise ValueError(f"scores: expected float32 [N, P, R], none of them 0, got {scores.dtype} {list(scores.shape)}")
    if not torch.isfinite(scores).all():
        bad = torch.nonzero(~torch.isfinite(scores))[0].tolist()
        raise ValueError(
            f"scores: expected finite values, got {scores[tuple(bad)].item()} at [member, prompt, repeat] {bad}"
        )
    s = scores.double()
    c = s - s.mean(dim=(0, 2), keepdim=True)  # exactly 0 for a prompt whose float32 scores are all equal
    std = c.square().mean().sqrt()
    if std == 0:
        return torch.zeros_like(c[:, 0, 0])
    if prompt_std == "own":
        c = c / c.square().mean(dim=(0, 2), keepdim=True).sqrt().clamp(min=std / 100)
        std = 1.0
    return (c.mean(dim=(1, 2)) / std).round(decimals=9)
