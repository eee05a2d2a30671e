"""The ES gradient of one tensor: the fitness-weighted sum of all members' noise. The noise is rebuilt, not stored.

    sum_i f_i E_i = 1 / sqrt(k) sum_j (f_2j - f_2j+1) U_j V_j^T

E_i is the signed low-rank noise of member i, with unit variance. Antithetic members share U_j and V_j. Pairs are summed
in fixed order in fp32, so the result depends only on the fitness vector. Memory does not grow with the population.

Legend: N population size, L x S the tensor, k noise rank (kp padded), U [L, k], V [S, k].

Source: Sarkar et al. (arXiv 2511.16652), eq. 7; Salimans et al., "Evolution Strategies as a Scalable Alternative to
Reinforcement Learning" (arXiv 1703.03864), section 2.1 for the antithetic pairs.
"""

import math
from collections.abc import Sequence

import torch

from esengine.kernels import configs
from esengine.kernels.noise import (
    Memory,
    NoisePlan,
    check_rank,
    factor_ref,
    key_words,
    padded_rank,
    pair_weights,
    signed64,
    triton,
    uses_triton,
)

PAIRS_PER_CHUNK = 64
"""Pairs that are summed in one product on the torch path. Constant, so that the order of the sum never changes."""

if triton is not None:
    import triton.language as tl

    from esengine.kernels.low_rank import column
    from esengine.kernels.noise import noise_rows, offset

    @triton.jit(do_not_specialize=["PAIRS", "seed", "step", "stream_u", "stream_v"])
    def _update_kernel(
        weights_ptr, out_ptr,
        PAIRS, L, S, scale,
        seed: tl.int64, step: tl.int64, stream_u: tl.int64, stream_v: tl.int64,
        RANK: tl.constexpr, KP: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr,
    ):  # fmt: skip
        first_l, first_s = tl.program_id(0) * BLOCK_L, tl.program_id(1) * BLOCK_S
        acc = tl.zeros((BLOCK_L, BLOCK_S), tl.float32)
        pair = PAIRS * 0
        while pair < PAIRS:  # Triton 3.6's interpreter has no range with a run-time bound
            weight = tl.load(weights_ptr + pair)
            u = noise_rows(seed, step, stream_u, pair, first_l, BLOCK_L, KP)
            v = weight * noise_rows(seed, step, stream_v, pair, first_s, BLOCK_S, KP)
            for j in tl.static_range(RANK):
                acc += column(u, j, KP)[:, None] * column(v, j, KP)[None, :]
            pair += 1
        row, col = first_l + tl.arange(0, BLOCK_L), first_s + tl.arange(0, BLOCK_S)
        mask = (row[:, None] < L) & (col[None, :] < S)
        tl.store(out_ptr + offset(row, S)[:, None] + col[None, :], acc * scale, mask=mask)


def update_config(device: torch.device, *, rows: int, cols: int) -> dict[str, int]:
    """Launch configuration. A short factor (the LoRA rank) gets a short side of the tile."""
    found = configs.settings("es_update", device, rows=rows, cols=cols)

    def side(limit: int, length: int) -> int:
        return min(limit, max(4, triton.next_power_of_2(length)))

    return found | {"BLOCK_L": side(found["BLOCK_L"], rows), "BLOCK_S": side(found["BLOCK_S"], cols)}


def es_update(
    fitness: torch.Tensor, *, shape: tuple[int, int], stream_u: int, stream_v: int, seed: int, step: int, rank: int
) -> torch.Tensor:
    """sum_i f_i E_i of one tensor. Triton on a GPU, chunks of pairs in torch elsewhere.

    Args:
        fitness: fp32 [N], N even.
        shape: (L, S) of the perturbed tensor.
        stream_u, stream_v: stream ids of its factors U [L, k] and V [S, k].
        seed, step: of the noise contract.
        rank: noise rank k.

    Returns:
        fp32 [L, S] on the device of `fitness`.

    Raises:
        ValueError: if `fitness` is not fp32 [N] with N even and at least 2.
    """
    check_fitness(fitness)
    key_words(seed, step)
    check_rank(rank)
    if len(shape) != 2 or min(shape) < 0:
        raise ValueError(f"shape: expected (L, S), got {tuple(shape)}")
    weights = pair_weights(fitness)
    if 0 in shape:
        return torch.zeros(shape, dtype=torch.float32, device=fitness.device)
    if not uses_triton(fitness.device):
        total = torch.zeros(shape, dtype=torch.float32, device=fitness.device)
        for start in range(0, len(weights), PAIRS_PER_CHUNK):
            chunk = weights[start : start + PAIRS_PER_CHUNK]
            pairs = torch.arange(start, start + len(chunk), device=fitness.device)
            noise = dict(seed=seed, step=step, pairs=pairs, rank=rank)
            u = factor_ref(stream=stream_u, length=shape[0], **noise)
            v = factor_ref(stream=stream_v, length=shape[1], **noise)
            total += es_update_chunk(chunk, u, v)
        return total
    out = torch.empty(shape, dtype=torch.float32, device=fitness.device)
    config = update_config(fitness.device, rows=shape[0], cols=shape[1])
    grid = (triton.cdiv(shape[0], config["BLOCK_L"]), triton.cdiv(shape[1], config["BLOCK_S"]))
    with torch.cuda.device_of(out):
        _update_kernel[grid](
            weights.contiguous(), out,
            PAIRS=len(weights), L=shape[0], S=shape[1], scale=1 / math.sqrt(rank),
            seed=signed64(seed), step=step, stream_u=stream_u, stream_v=stream_v,
            RANK=rank, KP=padded_rank(rank), **config,
        )  # fmt: skip
    return out


def es_update_chunk(weights: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The sum of a chunk of pairs, fp32: weights [P], U [P, ..., L, k], V [P, ..., S, k] -> [..., L, S]."""
    left, right = _factors(weights, u, v)
    return left @ right


def _factors(weights: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two operands of the product: [..., L, P k] and [..., P k, S]."""
    scaled = u * (weights / math.sqrt(u.shape[-1])).view(-1, *[1] * (u.dim() - 1))
    return scaled.movedim(0, -2).flatten(-2), v.movedim(0, -2).flatten(-2).mT


class UpdatePlan:
    """The ES gradients of many tensors at once, in torch. All tensors of a shape are in one product.

    Args:
        tensors: shape (L, S), stream_u and stream_v of each. The streams must differ.
        rank: noise rank k.
        device: device of all tensors.

    Attributes:
        noise: the plan of all factors.
        places: for each tensor the indices of U and V in `noise`.
    """

    def __init__(self, tensors: Sequence[tuple[tuple[int, int], int, int]], rank: int, device: torch.device | str):
        self.count, self.device = len(tensors), torch.device(device)
        self.groups: dict[tuple[int, int], list[int]] = {}
        for place, (shape, _, _) in enumerate(tensors):
            self.groups.setdefault(tuple(shape), []).append(place)
        factors, self.places = [], [(0, 0)] * self.count
        for (rows, cols), places in self.groups.items():
            for i, place in enumerate(places):
                self.places[place] = len(factors) + i, len(factors) + len(places) + i
            factors += [(tensors[place][1], rows) for place in places]
            factors += [(tensors[place][2], cols) for place in places]
        self.noise, self._memory = NoisePlan(factors, rank, device), Memory()

    def sums(self, fitness: torch.Tensor, *, seed: int, step: int) -> list[torch.Tensor]:
        """`es_update_ref` of every tensor, fp32 [L, S] each, as views of one tensor."""
        check_fitness(fitness)
        key_words(seed, step)
        sizes = [len(places) * math.prod(shape) for shape, places in self.groups.items()]
        if self.device.type == "cpu":
            flat = torch.from_numpy(self._memory.take((sum(sizes),)))
        else:
            flat = torch.empty(sum(sizes), device=self.device)
        totals = [
            part.view(len(places), *shape)
            for part, (shape, places) in zip(flat.split(sizes), self.groups.items(), strict=True)
        ]
        for start, weights in enumerate(pair_weights(fitness).split(PAIRS_PER_CHUNK)):
            pairs = start * PAIRS_PER_CHUNK + torch.arange(len(weights), device=self.device)
            noise, first = self.noise.stacks(seed=seed, step=step, pairs=pairs), 0
            for total, places in zip(totals, self.groups.values(), strict=True):
                u, v = noise(first, len(places)), noise(first + len(places), len(places))
                factors = _factors(weights, u, v)
                total.baddbmm_(*factors) if start else torch.bmm(*factors, out=total)
                first += 2 * len(places)
        found: list[torch.Tensor] = [torch.empty(0)] * self.count
        for total, places in zip(totals, self.groups.values(), strict=True):
            for place, each in zip(places, total.unbind(), strict=True):
                found[place] = each
        return found


def es_update_ref(
    fitness: torch.Tensor, *, shape: tuple[int, int], stream_u: int, stream_v: int, seed: int, step: int, rank: int
) -> torch.Tensor:
    """sum_i f_i E_i, one member at a time with its noise formed. Arguments as in `es_update`."""
    check_fitness(fitness)
    total = torch.zeros(shape, dtype=torch.float32, device=fitness.device)
    for member, f in enumerate(fitness):
        noise = dict(seed=seed, step=step, pairs=torch.tensor([member // 2], device=fitness.device), rank=rank)
        u = factor_ref(stream=stream_u, length=shape[0], **noise)[0]
        v = factor_ref(stream=stream_v, length=shape[1], **noise)[0]
        total += f * (1 - 2 * (member % 2)) / math.sqrt(rank) * u @ v.T
    return total


def check_fitness(fitness: torch.Tensor) -> None:
    """Raises ValueError unless `fitness` is float32 [N] with an even N of at least 2."""
    if fitness.dim() != 1 or fitness.dtype != torch.float32 or len(fitness) < 2 or len(fitness) % 2:
        dtype = str(fitness.dtype).removeprefix("torch.")
        raise ValueError(f"fitness: expected float32 [N] with N even, got {dtype} {list(fitness.shape)}")
