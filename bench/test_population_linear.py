"""Population linear beside its peers on the same rows: the plain GEMM, batched torch, and one member at a time."""

import pytest
import torch
import torch.nn.functional as F
from suite.roofline import linear_work, population_linear_work

from esengine.kernels import (
    Lora,
    MemberNoise,
    linear_streams,
    population_linear,
    population_linear_ref,
    stream_table,
)
from esengine.kernels.population_linear import population_linear_torch

KEYS = {"seed": 0, "step": 1, "sigma": 1e-2}
R, RANK, SCALE = 2, 1, 4.0

CPU = [
    # in, out, rows a member, members: tiny SANA's own, then SANA-Sprint's on fewer rows
    *[(128, 128, 64, 64), (128, 128, 40, 64), (128, 768, 1, 64), (128, 8, 64, 64)],
    *[(2240, 2240, 64, 8), (2240, 6720, 16, 8), (2304, 2240, 40, 8), (2240, 13440, 1, 8), (2240, 32, 64, 8)],
]
GPU = [
    (n_in, n_out, rows, 64)
    for n_in, n_out, all_rows in (
        (2240, 2240, (256, 1024)),
        (2240, 6720, (256, 1024)),
        (2304, 2240, (40, 300)),
        (2240, 13440, (1,)),
        (2240, 32, (256, 1024)),
    )
    for rows in all_rows
]


def case(shape, device):
    n_in, n_out, rows, members = shape
    marks = pytest.mark.gpu if device == "cuda" else ()
    return pytest.param(*shape, device, id=f"{device}-{n_in}to{n_out}x{rows}x{members}", marks=marks)


@pytest.mark.parametrize("peer", ["plain", "population", "batched_torch", "loop"])
@pytest.mark.parametrize(
    ("n_in", "n_out", "rows", "members", "device"),
    [case(shape, "cpu") for shape in CPU] + [case(shape, "cuda") for shape in GPU],
)
def test_population_linear(clock, device_at_hand, n_in, n_out, rows, members, device, peer):
    device_at_hand(device)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, to=dtype):
        return torch.randn(*shape, generator=generator).to(device, to)

    x, weight, bias = normal(members, rows, n_in), normal(n_out, n_in) * n_in**-0.5, normal(n_out)
    a, b = normal(R, n_in, to=torch.float32) * n_in**-0.5, normal(n_out, R, to=torch.float32)
    ids, streams = torch.arange(members, device=device), linear_streams("bench")
    target, noise = Lora(a, b, SCALE, stream_table((streams,), ids.device)), MemberNoise(ids, *KEYS.values(), RANK)

    def population(x=x, ids=ids):
        return population_linear(x, weight, bias, target, noise._replace(members=ids))

    calls = {
        "plain": lambda: F.linear(x, weight, bias),
        "population": population,
        "batched_torch": lambda: batched_torch(x, weight, bias, a, b, ids, streams),
        "loop": lambda: torch.cat([population(x[i : i + 1], ids[i : i + 1]) for i in range(members)]),
    }
    some = slice(0, members, max(1, members // 4))  # the reference forms every member's weights
    if peer == "plain":
        expected = F.linear(x[some].double(), weight.double(), bias.double())
    else:
        expected = population_linear_ref(
            x[some].float(), weight.float(), bias.float(), target, noise._replace(members=ids[some].contiguous())
        ).double()
    error = ((calls[peer]()[some].double() - expected).norm() / expected.norm()).item()
    assert error < (2e-6 if dtype == torch.float32 else 4e-3)  # bf16 rounds the result once: 2^-9 at most

    sizes = dict(rows=members * rows, n_in=n_in, n_out=n_out, itemsize=x.element_size())
    work = linear_work(**sizes) if peer == "plain" else population_linear_work(**sizes, members=members, r=R, k=RANK)
    facts = dict(op="population_linear", peer=peer, n_in=n_in, n_out=n_out, rows=rows, members=members, r=R, k=RANK)
    rounds = 3 if peer == "loop" else 12
    clock(calls[peer], work, device=device, dtype=dtype, rounds=rounds, relative_error=error, **facts)


def batched_torch(x, weight, bias, a, b, ids, streams):
    """The torch path with its noise built by the fastest op of the device, on a CPU what `population_linear` does."""
    from esengine.kernels import factor, signed_sigma

    pairs, slots = torch.unique(ids >> 1, return_inverse=True)
    lengths = weight.shape[1], len(a), len(a), len(weight)
    noise = dict(seed=KEYS["seed"], step=KEYS["step"], pairs=pairs, rank=RANK)
    factors = tuple(factor(stream=s, length=n, **noise)[slots] for s, n in zip(streams, lengths, strict=True))
    c = signed_sigma(ids, KEYS["sigma"], RANK)
    return population_linear_torch(x, weight, bias, a, b, factors=factors, c=c, scale=SCALE)
