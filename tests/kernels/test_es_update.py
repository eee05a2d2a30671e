"""The ES gradient of one tensor: sum_i f_i E_i against the member-by-member reference and against fp64."""

import math
import sys

import pytest
import torch

from esengine.kernels import (
    PAIRS_PER_CHUNK,
    UpdatePlan,
    es_update,
    es_update_chunk,
    es_update_ref,
    factor_ref,
    pair_weights,
)
from esengine.kernels.noise import uses_triton

KEYS = dict(stream_u=3_000_000_001, stream_v=17, seed=(1 << 63) + 9, step=5)


def fitness_of(n, device="cpu"):
    return torch.randn(n, generator=torch.Generator().manual_seed(n)).to(device)


def exact(fitness, *, shape, stream_u, stream_v, seed, step, rank):
    """fp64 [L, S] from the noise of every member."""
    total = torch.zeros(shape, dtype=torch.float64)
    for member, f in enumerate(fitness.tolist()):
        noise = dict(seed=seed, step=step, pairs=torch.tensor([member // 2]), rank=rank)
        u = factor_ref(stream=stream_u, length=shape[0], **noise)[0].double()
        v = factor_ref(stream=stream_v, length=shape[1], **noise)[0].double()
        total += f * (-1) ** member * (u @ v.T) / math.sqrt(rank)
    return total


def relative(got, expected):
    return float((got.cpu().double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("shape", [(1, 1), (1, 37), (2, 40), (33, 3), (16, 16), (65, 70), (5, 130)])
@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_against_the_reference(device, shape, rank):
    fitness = fitness_of(10, device)
    expected = exact(fitness, shape=shape, rank=rank, **KEYS)
    got, ref = (op(fitness, shape=shape, rank=rank, **KEYS) for op in (es_update, es_update_ref))
    assert got.shape == shape
    assert got.dtype == torch.float32
    assert got.device == fitness.device
    # the reference sums the same numbers in fp32 in another order; normals of float32 functions add 2e-6
    assert relative(got, expected) <= 2 * relative(ref, expected) + 2e-6
    assert relative(ref, expected) < 1e-6


@pytest.mark.parametrize("n", [2, 2 * PAIRS_PER_CHUNK, 2 * PAIRS_PER_CHUNK + 2, 6 * PAIRS_PER_CHUNK - 2])
def test_population_sizes_around_the_chunk(device, n):
    fitness = fitness_of(n, device)
    settings = dict(shape=(3, 11), rank=1, **KEYS)
    assert relative(es_update(fitness, **settings), exact(fitness, **settings)) < 4e-6


def test_twice_the_same_bits(device):
    fitness, settings = fitness_of(140, device), dict(shape=(4, 17), rank=2, **KEYS)
    once = es_update(fitness, **settings)
    assert torch.equal(es_update(fitness.clone(), **settings), once)
    every_other = torch.stack((fitness, fitness + 9), 1).flatten()[::2]
    assert torch.equal(es_update(every_other, **settings), once)


@pytest.mark.skipif(uses_triton("cpu"), reason="the torch path's order of summing")
def test_chunks_are_summed_in_order():
    """The bits are those of one product per PAIRS_PER_CHUNK pairs, in the order of the pairs."""
    fitness, shape = fitness_of(2 * PAIRS_PER_CHUNK + 20), (4, 9)
    total = torch.zeros(shape)
    for first in (0, PAIRS_PER_CHUNK):
        weights = pair_weights(fitness)[first : first + PAIRS_PER_CHUNK]
        noise = dict(seed=KEYS["seed"], step=5, pairs=first + torch.arange(len(weights)), rank=2)
        u = factor_ref(stream=KEYS["stream_u"], length=4, **noise)
        v = factor_ref(stream=KEYS["stream_v"], length=9, **noise)
        total += es_update_chunk(weights, u, v)
    assert torch.equal(es_update(fitness, shape=shape, rank=2, **KEYS), total)


@pytest.mark.skipif(uses_triton("cpu"), reason="a Triton kernel keeps one tile in registers")
def test_memory_does_not_grow_with_the_population(monkeypatch):
    """No request for noise is longer at N = 4096 than at one chunk, and every pair is asked for once."""
    module = sys.modules["esengine.kernels.es_update"]
    asked = []

    def counting(*, pairs, length, rank, **keys):
        asked.append(pairs)
        return factor_ref(pairs=pairs, length=length, rank=rank, **keys)

    monkeypatch.setattr(module, "factor_ref", counting)
    es_update(torch.zeros(4096), shape=(2, 8), rank=1, **KEYS)
    assert max(len(pairs) for pairs in asked) == PAIRS_PER_CHUNK
    assert torch.equal(torch.cat(asked[::2]), torch.arange(2048))


def test_linear_in_the_fitness(device):
    f, g = fitness_of(16, device), fitness_of(18, device)[:16]
    settings = dict(shape=(5, 21), rank=2, **KEYS)
    total = es_update(2 * f - 3 * g, **settings)
    parts = 2 * es_update(f, **settings) - 3 * es_update(g, **settings)
    torch.testing.assert_close(total, parts, rtol=0, atol=1e-5 * float(parts.abs().max()))
    assert torch.equal(es_update(4 * f, **settings), 4 * es_update(f, **settings))


def test_a_constant_changes_nothing(device):
    """Bit for bit where adding it is exact: antithetic members cancel."""
    f = torch.tensor([0.25, -1.5, 3.0, 0.0, -0.75, 2.0, 2.0, 1.0], device=device)
    settings = dict(shape=(6, 10), rank=1, **KEYS)
    assert torch.equal(es_update(f + 16, **settings), es_update(f, **settings))
    assert torch.equal(es_update(torch.full_like(f, 7), **settings), torch.zeros(6, 10, device=device))


def test_antithetic_members_pull_opposite_ways(device):
    settings = dict(shape=(6, 10), rank=3, **KEYS)
    one, two = (es_update(torch.tensor(f, device=device), **settings) for f in ([0.0, 0, 1, 0], [0.0, 0, 0, 1]))
    assert torch.equal(one, -two)
    assert one.abs().max() > 0.5


def test_estimates_the_gradient_of_a_linear_objective(device):
    """f_i = <G, E_i>: mean_i f_i E_i estimates G. 256 rank-1 draws of 12 entries: cos > 0.93."""
    shape, n = (3, 4), 512
    goal = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    noise = dict(seed=KEYS["seed"], step=5, pairs=torch.arange(n // 2), rank=1)
    u = factor_ref(stream=KEYS["stream_u"], length=3, **noise)
    v = factor_ref(stream=KEYS["stream_v"], length=4, **noise)
    along = torch.einsum("plk,psk,ls->p", u, v, goal)
    fitness = torch.stack((along, -along), 1).flatten().to(device)
    estimate = es_update(fitness, shape=shape, rank=1, **KEYS).cpu() / n
    assert torch.nn.functional.cosine_similarity(estimate.flatten(), goal.flatten(), 0) > 0.93
    # f^2 has variance at most 8 |G|^4 for rank-1 noise: four sigma of its mean over the pairs
    along = float((estimate * goal).sum() / goal.square().sum())
    assert abs(along - 1) < 4 * math.sqrt(8 / (n / 2))


@pytest.mark.parametrize(
    ("fitness", "got"),
    [
        (torch.zeros(5), r"float32 \[5\]"),
        (torch.zeros(0), r"float32 \[0\]"),
        (torch.zeros(2, 2), r"float32 \[2, 2\]"),
        (torch.tensor(1.0), r"float32 \[\]"),
        (torch.zeros(4, dtype=torch.float64), r"float64 \[4\]"),
        (torch.zeros(4, dtype=torch.bfloat16), r"bfloat16 \[4\]"),
        (torch.zeros(4, dtype=torch.int64), r"int64 \[4\]"),
    ],
)
@pytest.mark.parametrize("op", [es_update, es_update_ref])
def test_wrong_fitness(device, op, fitness, got):
    with pytest.raises(ValueError, match=rf"fitness: expected float32 \[N\] with N even, got {got}"):
        op(fitness.to(device), shape=(2, 2), rank=1, **KEYS)


@pytest.mark.parametrize(("name", "value"), [("seed", -1), ("seed", 1 << 64), ("step", -1), ("step", 1 << 32)])
def test_keys_out_of_range(device, name, value):
    with pytest.raises(ValueError, match=rf"{name}: expected an integer in \[0, 2\^.*, got {value}"):
        es_update(torch.zeros(4, device=device), shape=(2, 2), rank=1, **(KEYS | {name: value}))


@pytest.mark.parametrize("rank", [1, 3])
def test_a_plan_sums_every_tensor_as_the_op_does(rank):
    tensors = [((2, 9), 1, 2), ((7, 2), 3, 4), ((2, 9), 5, 6), ((1, 1), 7, 8)]
    fitness = fitness_of(2 * PAIRS_PER_CHUNK + 20)
    plan = UpdatePlan(tensors, rank, "cpu")
    for _ in range(2):  # the second from noise that was kept
        found = plan.sums(fitness, seed=3, step=2)
        for (shape, u, v), got in zip(tensors, found, strict=True):
            expected = es_update_ref(fitness, shape=shape, stream_u=u, stream_v=v, seed=3, step=2, rank=rank)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="fitness"):
        plan.sums(fitness[:3], seed=3, step=2)
    with pytest.raises(ValueError, match="step"):
        plan.sums(fitness, seed=3, step=-1)
