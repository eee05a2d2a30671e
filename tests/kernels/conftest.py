import pytest
import torch

torch.set_num_threads(1)

CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
)


@pytest.fixture(params=["cpu", CUDA])
def device(request):
    """The torch path on a CPU, its Triton kernels where TRITON_INTERPRET=1 is set, and CUDA where there is one."""
    return request.param
