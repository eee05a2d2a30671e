"""The ES update of one tensor: A's short shape, B's, and W's own in the direct form, beside stored noise."""

import pytest
import torch
from suite.roofline import es_update_work

from esengine.kernels import es_update, es_update_chunk, es_update_ref, factor, pair_weights

KEYS = {"seed": 0, "step": 1}
STREAMS = {"stream_u": 1, "stream_v": 2}
SHAPES = [((2, 128), 64, "cpu"), ((128, 2), 64, "cpu"), ((2, 2240), 64, "cpu"), ((2240, 2240), 64, "cpu")]
SHAPES += [
    (shape, members, "cuda") for shape in ((2, 2240), (2240, 2), (13440, 2), (2240, 2240)) for members in (128, 4096)
]


@pytest.mark.parametrize("peer", ["rebuilt", "stored"])
@pytest.mark.parametrize(
    ("shape", "members", "device"),
    [
        pytest.param(
            *case, id=f"{case[2]}-{case[0][0]}x{case[0][1]}-{case[1]}", marks=[pytest.mark.gpu][: case[2] == "cuda"]
        )
        for case in SHAPES
    ],
)
def test_es_update(clock, device_at_hand, shape, members, device, peer):
    """`rebuilt` is the op; `stored` one product of factors that lie ready, whose memory grows with N."""
    device_at_hand(device)
    fitness = torch.linspace(-1, 1, members, device=device)[
        torch.randperm(members, generator=torch.Generator().manual_seed(0))
    ]
    noise = dict(KEYS, pairs=torch.arange(members // 2, device=device), rank=1)
    u, v = factor(stream=1, length=shape[0], **noise), factor(stream=2, length=shape[1], **noise)

    def rebuilt(fitness=fitness):
        return es_update(fitness, shape=shape, **STREAMS, **KEYS, rank=1)

    calls = {"rebuilt": rebuilt, "stored": lambda: es_update_chunk(pair_weights(fitness), u, v)}
    few = fitness[:16]
    expected = es_update_ref(few.cpu(), shape=shape, **STREAMS, **KEYS, rank=1)
    error = ((rebuilt(few).cpu() - expected).norm() / expected.norm()).item()
    assert error < 1e-5
    full, one_product = rebuilt(), calls["stored"]()
    assert ((full - one_product).norm() / one_product.norm()).item() < 1e-4  # another order of N / 2 fp32 terms

    work = es_update_work(shape=shape, pairs=members // 2, k=1)
    facts = dict(op="es_update", peer=peer, shape=list(shape), members=members, k=1, relative_error=error)
    clock(calls[peer], work, device=device, dtype=torch.float32, **facts)
