"""The factors of a batch's members, computed once and stored for all rows that use them.

    [V | U | V' | U'] of each target, for the pair of each batch row

A kernel that rebuilds factors computes them once for each tile of 32 to 128 rows. If a batch row has more rows than
that, it is faster to store the factors and read them: E numbers for each target and batch row, about as many as one or
two rows of x. They are kept for one linear only. So memory does not grow with the population.

Legend: B batch rows, G targets, K in, N out, r LoRA rank, kp padded noise rank.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from esengine.kernels.noise import factor_ref, padded_rank, signed64, step_tensor, triton, uses_triton
from esengine.kernels.operands import Lora, LowRank, MemberNoise, check, check_adapters, check_noise, refuse

BLOCK = 512
"""Numbers that one program computes. Each factor starts at a multiple of it."""

STORE_FROM = 16
"""From this number of rows a batch row on, storing is faster. It writes and reads 4 (K + N) bytes more."""

if triton is not None:
    import triton.language as tl

    from esengine.kernels.noise import noise_rows, offset

    @triton.jit(do_not_specialize=["seed"], do_not_specialize_on_alignment=["members_ptr", "step_ptr"])
    def _factors_kernel(
        out_ptr, streams_ptr, members_ptr, step_ptr,
        seed: tl.int64,
        G: tl.constexpr, U_AT: tl.constexpr, V_OUT_AT: tl.constexpr, U_OUT_AT: tl.constexpr, WIDTH: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        b, blocks = tl.program_id(0), WIDTH // BLOCK
        target, first = tl.program_id(1) // blocks, tl.program_id(1) % blocks * BLOCK
        factor, start = 0, 0
        if first >= U_OUT_AT:
            factor, start = 3, U_OUT_AT
        elif first >= V_OUT_AT:
            factor, start = 2, V_OUT_AT
        elif first >= U_AT:
            factor, start = 1, U_AT
        pair, stream = tl.load(members_ptr + b) >> 1, tl.load(streams_ptr + 4 * target + factor)
        noise = noise_rows(seed, tl.load(step_ptr), stream, pair, first - start, BLOCK, 1)
        out = out_ptr + offset(b * G + target, WIDTH) + first + tl.arange(0, BLOCK)
        tl.store(out, tl.reshape(noise, (BLOCK,)))


class FactorStarts(NamedTuple):
    """Start of each factor within the E numbers of a target. V starts at 0. Each factor is row-major [length, kp]."""

    u: int
    v_out: int
    u_out: int

    @property
    def constants(self) -> dict[str, int]:
        """The same as kernel arguments."""
        return {"U_AT": self.u, "V_OUT_AT": self.v_out, "U_OUT_AT": self.u_out}


def factor_starts(k: int, r: int, rank: int) -> FactorStarts:
    """The starts for targets that read K columns. They do not depend on N."""
    u = _span(k, rank)
    return FactorStarts(u, u + _span(r, rank), u + 2 * _span(r, rank))


def factor_width(k: int, n: int, r: int, rank: int) -> int:
    """E, the count of numbers for one target and batch row."""
    return factor_starts(k, r, rank).u_out + _span(n, rank)


def u_out_start(factors: torch.Tensor, n: int, rank: int) -> int:
    """Start of U' for targets that write N columns. It does not depend on K."""
    return factors.shape[-1] - _span(n, rank)


def _span(length: int, rank: int) -> int:
    return -(-length * padded_rank(rank) // BLOCK) * BLOCK


def check_factors(
    factors: torch.Tensor | None,
    adapters: Lora | None,
    perturbation: MemberNoise | None,
    batch: int,
    k: int | None,
    n: int | None,
) -> None:
    """Raise ValueError if the factors do not match the operands. None passes. K or N that is None is not checked."""
    if factors is None:
        return
    if adapters is None:
        raise ValueError("factors: expected adapters beside them, got None")
    rank = perturbation.rank
    least = factor_width(k or 1, n or 0, adapters.r, rank)
    size = "E" if None in (k, n) else least
    check("factors", factors, (batch, adapters.targets, size), torch.float32, adapters.streams.device, strides="all")
    if factors.shape[-1] < least or factors.shape[-1] % BLOCK:
        raise ValueError(
            f"factors: expected at least {least} numbers a target, of member_factors, got {factors.shape[-1]}"
        )


def check_low_rank(low: LowRank | None, shape: Sequence[int], device: torch.device, *, targets: int = 1) -> None:
    """Raise ValueError unless the low-rank part has [B, T, N] for each of `targets` targets. None passes."""
    if low is None:
        return
    (h, adapters, perturbation, factors), (batch, t, n) = low, shape
    if perturbation is None:
        raise ValueError("low.perturbation: expected the noise of the batch, got None")
    check_noise(perturbation, batch, device)
    if adapters.targets != targets:
        refuse("low.adapters.streams", f"int64 [{targets}, 4]", adapters.streams)
    k = None if adapters.a is None else (adapters.a.shape[-1:] or ("K",))[0]
    check_adapters("low.adapters", adapters, k, n, device)
    if h is None:
        raise ValueError("low.h: expected what shrink or mix made, got None")
    columns = targets * (adapters.r + perturbation.rank)
    check("low.h", h, (batch, t, columns), torch.float32, device, strides="all")
    check_factors(factors, adapters, perturbation, batch, k, n)


def low_rank_ref(low: LowRank | None, n: int) -> torch.Tensor | float:
    """h [B | U']^T of all targets, concatenated, fp32 [B, T, G N]. 0 if `low` is None.

    Args:
        n: N, the columns of a target.
    """
    if low is None:
        return 0.0
    h, adapters, perturbation, _ = low
    g, r, rank = adapters.targets, adapters.r, perturbation.rank
    noise = dict(seed=perturbation.seed, step=int(perturbation.step), pairs=perturbation.members >> 1, rank=rank)
    parts = []
    for i, (*_, stream) in enumerate(adapters.streams.tolist()):
        part = h[..., g * r + i * rank : g * r + (i + 1) * rank] @ factor_ref(stream=stream, length=n, **noise).mT
        if r:
            part = part + h[..., i * r : (i + 1) * r] @ adapters.b[i * n : (i + 1) * n].T
        parts.append(part)
    return torch.cat(parts, -1)


def _check(adapters: Lora, perturbation: MemberNoise, k: int, n: int) -> None:
    """Raise ValueError for an operand that does not match. See `member_factors`."""
    check_noise(perturbation, len(perturbation.members), adapters.streams.device)
    check_adapters("adapters", adapters, k, None, adapters.streams.device)
    if k < 0 or n < 0:
        raise ValueError(f"k, n: expected numbers of columns, got {k} and {n}")


def member_factors(adapters: Lora, perturbation: MemberNoise, *, k: int, n: int) -> torch.Tensor:
    """All factors of the targets for each batch row. Triton on a GPU, `member_factors_ref` elsewhere.

    Args:
        adapters: The G targets.
        perturbation: The noise of the batch.
        k: K, the columns that the targets read.
        n: N, the columns that each target writes.

    Returns:
        fp32 [B, G, E]: V [K, kp], U [r, kp], V' [r, kp], U' [N, kp], row-major. `factor_starts` says where each starts.
        Numbers between the factors, and columns from k on, are undefined.

    Raises:
        ValueError: An operand has the wrong shape, dtype, device or range. The message names it.
    """
    device = adapters.streams.device
    if not uses_triton(device):
        return member_factors_ref(adapters, perturbation, k=k, n=n)
    batch, g, rank = len(perturbation.members), adapters.targets, perturbation.rank
    _check(adapters, perturbation, k, n)
    out = torch.empty(batch, g, factor_width(k, n, adapters.r, rank), dtype=torch.float32, device=device)
    if out.numel():
        with torch.cuda.device_of(out):
            _factors_kernel[(batch, g * (out.shape[-1] // BLOCK))](
                out, adapters.streams, perturbation.members, step_tensor(perturbation.step, device),
                seed=signed64(perturbation.seed),
                G=g, WIDTH=out.shape[-1], BLOCK=BLOCK, **factor_starts(k, adapters.r, rank).constants,
            )  # fmt: skip
    return out


def member_factors_ref(adapters: Lora, perturbation: MemberNoise, *, k: int, n: int) -> torch.Tensor:
    """All factors of the targets for each batch row, by the noise contract. Arguments as in `member_factors`."""
    r, rank, device = adapters.r, perturbation.rank, adapters.streams.device
    _check(adapters, perturbation, k, n)
    out = torch.zeros(len(perturbation.members), adapters.targets, factor_width(k, n, r, rank), device=device)
    noise = dict(seed=perturbation.seed, step=int(perturbation.step), pairs=perturbation.members >> 1, rank=rank)
    for i, streams in enumerate(adapters.streams.tolist()):
        for stream, length, start in zip(streams, (k, r, r, n), (0, *factor_starts(k, r, rank)), strict=True):
            kp = padded_rank(rank)
            rows = out[:, i, start : start + length * kp].unflatten(-1, (length, kp)) if length else None
            if rows is not None:
                rows[..., :rank] = factor_ref(stream=stream, length=length, **noise)
    return out
