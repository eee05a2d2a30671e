"""Noise rows: as many normals as one linear's V and U' need for the pairs of a chunk."""

import pytest
import torch
from suite.roofline import normals_work

from esengine.kernels import NoisePlan, factor_ref, linear_streams, normals, normals_ref

KEYS = {"seed": 0, "step": 1}
CASES = [
    # pairs, normals in a row, device
    pytest.param(32, 256, "cpu", id="tiny"),
    pytest.param(32, 2240 + 2240, "cpu", id="2240"),
    pytest.param(32, 2240 + 2240, "cuda", id="gpu-2240", marks=pytest.mark.gpu),
    pytest.param(32, 2240 + 13440, "cuda", id="gpu-13440", marks=pytest.mark.gpu),
    pytest.param(2048, 2240 + 2240, "cuda", id="gpu-2240-4096-members", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize(("pairs", "count", "device"), CASES)
def test_normals(clock, device_at_hand, pairs, count, device):
    device_at_hand(device)
    ids = dict(streams=torch.full((pairs,), 7), pairs=torch.arange(pairs))

    def call():
        return normals(**KEYS, **ids, count=count, device=device)

    expected = normals_ref(**KEYS, **ids, count=count)
    torch.testing.assert_close(call().cpu(), expected, rtol=2e-5, atol=2e-6)  # a GPU's fp32 logarithm and sine
    work = normals_work(rows=pairs, count=count)
    clock(call, work, device=device, dtype=torch.float32, op="normals", pairs=pairs, count=count)


def test_plan_of_a_whole_model(clock):
    """Every factor of tiny SANA's 40 linears for 64 members, as the CPU's forward asks for them."""
    streams = [linear_streams(str(layer)) for layer in range(40)]
    shapes = [pair for s in streams for pair in zip(s, (128, 2, 2, 128), strict=True)]
    plan, pairs = NoisePlan(shapes, rank=1), torch.arange(32)

    def call():
        return plan.block(**KEYS, pairs=pairs)

    block = call()
    for i in (0, 1, len(shapes) - 1):
        stream, length = shapes[i]
        assert torch.equal(block[i], factor_ref(**KEYS, stream=stream, pairs=pairs, length=length, rank=1))
    work = normals_work(rows=len(pairs), count=sum(length for _, length in shapes))
    clock(call, work, device="cpu", dtype=torch.float32, op="plan", pairs=len(pairs), factors=len(shapes))
