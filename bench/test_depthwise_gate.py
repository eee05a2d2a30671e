"""Depthwise convolution and gate beside torch's three operations on the same memory, channels last."""

import pytest
import torch
import torch.nn.functional as F
from suite.roofline import depthwise_gate_work

from esengine.kernels.depthwise_gate import depthwise_gate

CPU = [(64, 8, 8, 320), (8, 16, 16, 560), (1, 16, 16, 5600)]
GPU = [(64, 16, 16, 5600), (256, 16, 16, 5600), (64, 32, 32, 5600), (1, 32, 32, 5600)]


def case(shape, device):
    images, height, width, channels = shape
    marks = pytest.mark.gpu if device == "cuda" else ()
    return pytest.param(*shape, device, id=f"{device}-{images}x{height}x{width}x{channels}", marks=marks)


@pytest.mark.parametrize("peer", ["depthwise_gate", "torch"])
@pytest.mark.parametrize(
    ("images", "height", "width", "channels", "device"),
    [case(shape, "cpu") for shape in CPU] + [case(shape, "cuda") for shape in GPU],
)
def test_depthwise_gate(clock, device_at_hand, images, height, width, channels, device, peer):
    device_at_hand(device)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    x = F.silu(normal(images, height * width, 2 * channels))
    weight, bias = normal(2 * channels, 1, 3, 3) / 3, normal(2 * channels)
    calls = {
        "depthwise_gate": lambda: depthwise_gate(x, weight, bias, height=height, width=width),
        "torch": lambda: three_operations(x, weight, bias, height, width),
    }
    some = slice(0, images, max(1, images // 2))
    expected = three_operations(x[some].double(), weight.double(), bias.double(), height, width)
    error = ((calls[peer]()[some].double() - expected).norm() / expected.norm()).item()
    rounded = 1 if peer == "depthwise_gate" else 3
    assert error < (1e-6 if dtype == torch.float32 else rounded * 2**-9)  # 2^-9 is half a unit in the last place

    work = depthwise_gate_work(tokens=images * height * width, channels=channels, itemsize=x.element_size())
    facts = dict(op="depthwise_gate", peer=peer, images=images, height=height, width=width, channels=channels)
    clock(calls[peer], work, device=device, dtype=dtype, relative_error=error, **facts)


def three_operations(x, weight, bias, height, width):
    """[B, T, C] as diffusers' module computes it, on a channels-last view of the tokens."""
    x_bchw = x.unflatten(1, (height, width)).movedim(-1, 1)
    z, gate = F.conv2d(x_bchw, weight, bias, padding=1, groups=len(weight)).chunk(2, dim=1)
    return (z * F.silu(gate)).movedim(1, -1).flatten(1, 2)
