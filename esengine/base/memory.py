"""Memory that runs out: told by our own error, with the numbers that torch gives, and given back for another try."""

import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from esengine.base.errors import OutOfMemory

_ASKED = re.compile(r"tried to allocate ([\d.]+ \w+)", re.IGNORECASE)
_FREE = re.compile(r"([\d.]+ \w+) is free")


@contextmanager
def fits(what: str, advice: str) -> Iterator[None]:
    """Out of memory inside becomes an `OutOfMemory`: `what` does not fit, the bytes asked for and free, `advice`."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):  # of the CPU
            raise
        found = zip(("asked for", "free"), (_ASKED.search(str(error)), _FREE.search(str(error))), strict=True)
        numbers = ", ".join(f"{name} {number[1]}" for name, number in found if number)
        told = f" ({numbers})" if numbers else ""
        raise OutOfMemory(f"{what} do not fit into memory{told}: {advice}") from error


def give_back(device: torch.device) -> None:
    """Return what nothing holds any more, so that smaller pieces find room."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
