"""The suite's checks.

A figure is taken after its check: an output may be off the reference by at most twice what torch's own forward in the
same dtype is off it, and a check that could not tell a member from the plain model is a failure too. A part whose
check fails is timed all the same, because a GPU is rare. Its figures are stored and do not count.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class CheckFailed(RuntimeError):
    """An output is not what it has to be: no figure of it counts.

    Attributes:
        facts: as `bounded` returns them, with None for what is not finite; empty for a check without a bound.
    """

    def __init__(self, message: str, **facts: float):
        super().__init__(message)
        self.facts = {name: value if math.isfinite(value) else None for name, value in facts.items()}

    def record(self) -> dict[str, Any]:
        """For a JSON file: the facts, and the message as `failed`."""
        return {**self.facts, "failed": str(self)}


class Checks:
    """The checks of one part. One that fails is recorded, and the part goes on to its timings.

    Attributes:
        failed: the messages of those that failed.
    """

    def __init__(self):
        self.failed: list[str] = []

    def __call__(self, check: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
        """What `check` returns, or `CheckFailed.record` of what it raised."""
        try:
            return check() or {}
        except CheckFailed as failure:
            self.failed.append(str(failure))
            return failure.record()


def attempt(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `call` returns; what it raised, as a failed check or an error, so that the rest can go on."""
    try:
        return call()
    except CheckFailed as failure:
        return {"check": failure.record()}
    except Exception as error:  # a peer may fail in any way
        return {"error": f"{type(error).__name__}: {error}"[:500]}


@contextmanager
def full_precision() -> Iterator[None]:
    """Inside, products of fp32 are of fp32, not of tf32."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def worst_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 error of the worst row."""
    difference = (got.double() - expected.double()).flatten(1).norm(dim=1)
    return (difference / expected.double().flatten(1).norm(dim=1)).max().item()


def bounded(what: str, error: float, bound: float, perturbation: float | None = None) -> dict[str, float]:
    """The facts of a passed check.

    Raises:
        CheckFailed: the error is above the bound or not a number, or `perturbation`, what an output without noise
            would be off, is not above it.
    """
    facts = {"error": error, "bound": bound} | ({} if perturbation is None else {"perturbation": perturbation})
    if not error <= bound:
        raise CheckFailed(f"{what}: expected a relative error of at most {bound:.2e}, got {error:.2e}", **facts)
    if perturbation is not None and not perturbation > bound:
        raise CheckFailed(
            f"{what}: the noise moves the output by {perturbation:.2e}, a bound of {bound:.2e} is blind", **facts
        )
    return facts
