import numpy as np
import pytest
import torch
from triton.runtime import interpreter

DEVICES = ["cpu"] + [pytest.param("cuda", marks=pytest.mark.gpu)] * torch.cuda.is_available()


@pytest.fixture(params=DEVICES)
def device(request):
    """The torch path on a CPU, its Triton kernels where TRITON_INTERPRET=1 is set, and CUDA where there is one."""
    return request.param


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """`torch.empty` gives NaN, so that whatever a kernel does not write shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture
def every_row_alike(monkeypatch):
    """The interpreter's dot sums each row of a tile in one order, as a GPU's does.

    Left to numpy it is BLAS's, which on some CPUs has another order at a tile's edge.
    """

    def product(a, b, dtype=None):
        return np.einsum("...mk,...kn->...mn", a, b, dtype=dtype)

    monkeypatch.setattr(interpreter.np, "matmul", product)
