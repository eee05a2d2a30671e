"""Recognises memory that has run out, raises it as `OutOfMemory` with its numbers, and frees memory for another try."""

import errno
import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from esengine.base.errors import OutOfMemory

_ASKED = re.compile(r"(?:tried|unable) to allocate ([\d.]+ \w+)", re.IGNORECASE)
_FREE = re.compile(r"([\d.]+ \w+) is free")
_SAID = re.compile(
    r"out of memory|(can't|cannot) allocate memory|could not (create|execute) a (primitive|memory object)|bad_alloc"
    r"|alloc_failed|failed to allocate|not enough memory",
    re.IGNORECASE,
)
"""What CUDA, torch's allocators, oneDNN, the C++ library, cuBLAS and safetensors say."""


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, says that memory has run out.

    These are `OutOfMemory`, Python's and NumPy's MemoryError, a system call's ENOMEM, and a RuntimeError of torch or
    a library below it, on a GPU or a CPU.
    """
    while error is not None:
        if isinstance(error, OutOfMemory | MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        library = isinstance(error, RuntimeError) or type(error).__name__ == "SafetensorError"
        if library and _SAID.search(str(error)):
            return True
        error = error.__cause__
    return False


@contextmanager
def oom_guard(what: str, advice: str) -> Iterator[None]:
    """Turn an out-of-memory error into `OutOfMemory`: `what`, the bytes asked for and free or its words, `advice`."""
    try:
        yield
    except OutOfMemory:
        raise
    except Exception as error:
        if not out_of_memory(error):
            raise
        text = str(error)
        found = zip(("asked for", "free"), (_ASKED.search(text), _FREE.search(text)), strict=True)
        numbers = ", ".join(f"{name} {number[1]}" for name, number in found if number)
        words = (
            "" if isinstance(error, torch.OutOfMemoryError) else " ".join(text.split())[:100] or type(error).__name__
        )
        details = f" ({numbers or words})" if numbers or words else ""
        raise OutOfMemory(f"{what} do not fit into memory{details}: {advice}") from error


def give_back(device: torch.device) -> None:
    """Free memory that nothing references, so that smaller batches fit."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
