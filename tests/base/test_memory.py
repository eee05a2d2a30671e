"""Which errors say that memory has run out."""

import errno

import numpy as np
import pytest
import torch

from esengine.base.errors import OutOfMemory
from esengine.base.memory import oom_guard, out_of_memory

MUCH = 1 << 55


def real(function):
    """The error that a call raises for lack of memory."""
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError("there was memory")


SAYS_SO = {
    "python": lambda: bytearray(MUCH),
    "numpy": lambda: np.empty(MUCH, np.uint8),
    "torch": lambda: torch.empty(MUCH, dtype=torch.uint8),
}


@pytest.mark.parametrize("place", SAYS_SO)
def test_real_errors(place):
    assert out_of_memory(real(SAYS_SO[place]))
    with pytest.raises(OutOfMemory, match="3 images do not fit into memory") as caught, oom_guard("3 images", "wait"):
        SAYS_SO[place]()
    assert out_of_memory(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("could not create a primitive"),
        RuntimeError("could not create a memory object"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        torch.OutOfMemoryError("CUDA out of memory"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=str,
)
def test_words_of_libraries(error):
    assert out_of_memory(error)
    with pytest.raises(OutOfMemory), oom_guard("an update", "wait"):
        raise error
    with pytest.raises(OutOfMemory), oom_guard("an update", "wait"):
        raise KeyError("scores") from error


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), OSError(errno.ENOSPC, "full"), ValueError("memory")])
def test_other_errors_are_left(error):
    assert not out_of_memory(error)
    with pytest.raises(type(error)), oom_guard("an update", "wait"):
        raise error
