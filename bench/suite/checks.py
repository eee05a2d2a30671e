"""The checks of the suite.

A figure is measured after its check. The error of an output may be at most twice the error of torch's own forward in
the same dtype. A check also fails if it could not distinguish a member from the plain model. A part whose check fails
is still timed, because time on a GPU is rare. Its figures are stored and do not count.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class CheckFailed(RuntimeError):
    """An output is wrong. Its figures do not count.

    Attributes:
        facts: what `bounded` returns, with None for numbers that are not finite. Empty for a check without a bound.
    """

    def __init__(self, message: str, **facts: float):
        super().__init__(message)
        self.facts = {name: value if math.isfinite(value) else None for name, value in facts.items()}

    def record(self) -> dict[str, Any]:
        """For a JSON file: the facts, and the message as `failed`."""
        return {**self.facts, "failed": str(self)}


class Checks:
    """The checks of one part. If one fails, it is recorded and the part goes on to its timings.

    Attributes:
        failed: the messages of the failed checks.
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
    """What `call` returns. If it raises, a record of the failed check or error, so that the rest can go on."""
    try:
        return call()
    except CheckFailed as failure:
        return {"check": failure.record()}
    except Exception as error:  # a peer may fail in any way
        return {"error": f"{type(error).__name__}: {error}"[:500]}


@contextmanager
def full_precision() -> Iterator[None]:
    """Inside, products of fp32 are computed in fp32 and not in tf32."""
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
        CheckFailed: the error is above the bound or is not a number. Or `perturbation`, the error of an output without
            noise, is not above the bound.
    """
    facts = {"error": error, "bound": bound} | ({} if perturbation is None else {"perturbation": perturbation})
    if not error <= bound:
        raise CheckFailed(f"{what}: expected a relative error of at most {bound:.2e}, got {error:.2e}", **facts)
    if perturbation is not None and not perturbation > bound:
        raise CheckFailed(
            f"{what}: the noise moves the output by {perturbation:.2e}, a bound of {bound:.2e} is blind", **facts
        )
    return facts
