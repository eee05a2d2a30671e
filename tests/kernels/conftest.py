import pytest
import torch

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
