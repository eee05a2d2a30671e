"""Turns torch's out-of-memory errors into `OutOfMemory`, with torch's numbers, and frees memory for another try."""

import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from esengine.base.errors import OutOfMemory

_ASKED = re.compile(r"tried to allocate ([\d.]+ \w+)", re.IGNORECASE)
_FREE = re.compile(r"([\d.]+ \w+) is free")


@contextmanager
def oom_guard(what: str, advice: str) -> Iterator[None]:
    """Turn an out-of-memory error into `OutOfMemory` that has `what`, the bytes asked for and free, and `advice`."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):  # on a CPU
            raise
        found = zip(("asked for", "free"), (_ASKED.search(str(error)), _FREE.search(str(error))), strict=True)
        numbers = ", ".join(f"{name} {number[1]}" for name, number in found if number)
        details = f" ({numbers})" if numbers else ""
        raise OutOfMemory(f"{what} do not fit into memory{details}: {advice}") from error


def give_back(device: torch.device) -> None:
    """Free memory that nothing references, so that smaller batches fit."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
