"""The low-rank columns h of a perturbed linear, for all targets that read the same x.

    x' = LayerNorm(x) (1 + scale) + shift          with a modulation, else x
    g  = x' [A_1^T .. A_G^T | V_1 .. V_G]          shrink: G (r + k) columns
    h  = s g Mix                                   Mix = [[I, V'], [c U^T, c U^T V']] of each target

Direct mode (r = 0): h = c g. `shrink` computes all of it. Another way: the op that computes x also computes partial
sums of g (`next_lora` of `fused_linear` and of `linear_attention`), and `mix` adds them and applies Mix. This saves a
pass over x.

x is read once, or twice with a modulation, the second time from the cache. x in bf16 is exact, so only the columns are
split into two bf16 parts. Without stored factors the noise is rebuilt for each tile of rows.

Legend: B batch rows, T rows a batch row, M = B T, K in, G targets, r LoRA rank, k noise rank (kp padded),
c = sign * sigma / sqrt(k), s = lora_alpha / r. A tile's columns are r of each target, then k of each, padded to CP.

Source: as `esengine.kernels.population_linear`; Xie et al., SANA (arXiv 2410.10629) for the modulation.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from esengine.kernels import configs
from esengine.kernels.factors import check_factors
from esengine.kernels.launch import exact_products, noise_arguments, output
from esengine.kernels.noise import factor_ref, padded_rank, signed64, signed_sigma, step_tensor, triton, uses_triton
from esengine.kernels.operands import (
    Lora,
    MemberNoise,
    check,
    check_adapters,
    check_noise,
    check_streams,
    check_x,
    refuse,
)

if triton is not None:
    import triton.language as tl

    from esengine.kernels.low_rank import low_rank_columns, mixed, product, within
    from esengine.kernels.noise import offset

    @triton.jit(do_not_specialize=["T", "seed"], do_not_specialize_on_alignment=["members_ptr", "step_ptr"])
    def _shrink_kernel(
        x_ptr, shift_ptr, scale_ptr, a_ptr, streams_ptr, members_ptr, step_ptr, factors_ptr, x_out_ptr, h_ptr,
        T,
        stride_xb, stride_xt, stride_xk, stride_sb, stride_cb, stride_ar, stride_ak,
        sigma, lora_scale, eps,
        seed: tl.int64,
        K: tl.constexpr, G: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, KP: tl.constexpr, CP: tl.constexpr,
        U_AT: tl.constexpr, V_OUT_AT: tl.constexpr, U_OUT_AT: tl.constexpr, WIDTH: tl.constexpr,
        MODULATED: tl.constexpr, SPLIT: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
        BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        b = tl.program_id(0)
        t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
        x_rows, real = x_ptr + (offset(b, stride_xb) + offset(t, stride_xt))[:, None], t[:, None] < T
        mean = tl.zeros((BLOCK_T,), tl.float32)
        rstd = tl.zeros((BLOCK_T,), tl.float32)
        if MODULATED:
            # sums of differences to the row's first element: a mean far from zero cancels no digits
            first = tl.load(x_rows, mask=real, other=0.0).to(tl.float32)
            sums = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
            squares = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
            for k0 in range(0, K, BLOCK_K):
                k, inside = k0 + tl.arange(0, BLOCK_K), within(k0, K, BLOCK_K)[None, :]
                x = tl.load(x_rows + offset(k, stride_xk)[None, :], mask=real & inside, other=0.0).to(tl.float32)
                x = tl.where(inside, x - first, 0.0)
                sums += x
                squares += x * x
            shifted = tl.sum(sums, axis=1) / K
            mean = tl.sum(first, axis=1) + shifted
            rstd = 1 / tl.sqrt(tl.maximum(tl.sum(squares, axis=1) / K - shifted * shifted, 0.0) + eps)

        pair, c, step, factors = b, 0.0, 0, factors_ptr
        if G > 0:
            member, step = tl.load(members_ptr + b), tl.load(step_ptr)
            pair = member >> 1
            c = sigma * (1 - 2 * (member & 1)).to(tl.float32)
        if factors_ptr is not None:
            factors = factors_ptr + offset(b * G, WIDTH)
        g = tl.zeros((BLOCK_T, CP), tl.float32)
        for k0 in range(0, K, BLOCK_K):
            k, inside = k0 + tl.arange(0, BLOCK_K), within(k0, K, BLOCK_K)
            x = tl.load(x_rows + offset(k, stride_xk)[None, :], mask=real & inside[None, :], other=0.0)
            if MODULATED:
                scale = tl.load(scale_ptr + offset(b, stride_cb) + k, mask=inside, other=0.0).to(tl.float32)
                shift = tl.load(shift_ptr + offset(b, stride_sb) + k, mask=inside, other=0.0).to(tl.float32)
                x = (x.to(tl.float32) - mean[:, None]) * rstd[:, None] * (1 + scale)[None, :] + shift[None, :]
                x = tl.where(inside[None, :], x, 0.0).to(x_out_ptr.dtype.element_ty)
                places = x_out_ptr + offset(b * T + t, K)[:, None] + k[None, :]
                tl.store(places, x, mask=real & inside[None, :])
            if UPCAST:
                x = x.to(tl.float32)
            if G > 0:
                columns = low_rank_columns(
                    a_ptr, streams_ptr, factors, stride_ar, stride_ak, seed, step, pair, k0, K,
                    G, R, RANK, KP, CP, BLOCK_K, WIDTH,
                )  # fmt: skip
                g = product(x, columns, g, BLOCK_T, SPLIT, UPCAST, PRECISION)

        if G > 0:
            column = tl.arange(0, CP)
            h = mixed(
                g, streams_ptr, factors, seed, step, pair, c, lora_scale, G, R, RANK, KP, CP, U_AT, V_OUT_AT, WIDTH
            )
            h_ptrs = h_ptr + offset(b * T + t, G * (R + RANK))[:, None] + column[None, :]
            tl.store(h_ptrs, h, mask=(t[:, None] < T) & (column < G * (R + RANK))[None, :])

    @triton.jit(do_not_specialize=["T", "seed"], do_not_specialize_on_alignment=["members_ptr", "step_ptr"])
    def _mix_kernel(
        sums_ptr, streams_ptr, members_ptr, step_ptr, h_ptr,
        T,
        stride_gp,
        sigma, lora_scale,
        seed: tl.int64,
        PARTS: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, KP: tl.constexpr, CP: tl.constexpr,
        BLOCK_T: tl.constexpr,
    ):  # fmt: skip
        b, column = tl.program_id(0), tl.arange(0, CP)
        t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
        places = offset(b * T + t, R + RANK)[:, None] + column[None, :]
        mask = (t[:, None] < T) & (column < R + RANK)[None, :]
        g = tl.zeros((BLOCK_T, CP), tl.float32)
        for part in tl.range(0, PARTS, loop_unroll_factor=8):  # eight loads overlap; the order of the sum is fixed
            g += tl.load(sums_ptr + offset(part + 0 * b, stride_gp) + places, mask=mask, other=0.0)
        member = tl.load(members_ptr + b)
        c = sigma * (1 - 2 * (member & 1)).to(tl.float32)
        h = mixed(
            g, streams_ptr, None, seed, tl.load(step_ptr), member >> 1, c, lora_scale, 1, R, RANK, KP, CP, 0, 0, 0
        )
        tl.store(h_ptr + places, h, mask=mask)


def shrink_config(
    device: torch.device, *, dtype: torch.dtype, t: int, k: int, columns: int, modulated: bool = False
) -> dict[str, int]:
    """Launch configuration for T rows a batch row. Below 16 rows, the minimum, no tensor cores are used."""
    values = dict(dtype=configs.dtype_name(dtype), t=t, k=k, columns=columns, modulated=modulated)
    found = configs.settings("shrink", device, **values)
    block_t, padded = min(found["BLOCK_T"], triton.next_power_of_2(t)), max(16, triton.next_power_of_2(columns))
    return found | {"BLOCK_T": block_t, "CP": padded}


class Modulation(NamedTuple):
    """LayerNorm without weights, then x (1 + scale) + shift. shift and scale: [B, K], dtype of x, last stride 1."""

    shift: torch.Tensor
    scale: torch.Tensor
    eps: float = 1e-6


def shrink(
    x: torch.Tensor,
    adapters: Lora | None,
    perturbation: MemberNoise | None,
    modulation: Modulation | None = None,
    factors: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x' and the low-rank columns h of all targets that read it. Triton on a GPU, `shrink_ref` elsewhere.

    A row's result does not depend on the other rows of the batch.

    Args:
        x: [B, T, K], fp32, bf16 or fp16, any strides.
        adapters: The G targets. None: only the modulation.
        perturbation: The noise of the batch. Needed with `adapters`.
        modulation: Makes x' from x. None: x' is x.
        factors: From `member_factors` with the same adapters and perturbation. None: rebuilt for each tile of rows.

    Returns:
        x' [B, T, K], dtype of x, and h fp32 [B, T, G (r + k)] or None. The columns are r of each target, then k of
        each. h is computed from the rounded x', which the linear multiplies too.

    Raises:
        ValueError: An operand has the wrong shape, dtype, device or strides. The message names it.
    """
    if not uses_triton(x.device):
        return shrink_ref(x, adapters, perturbation, modulation, factors)
    _check(x, adapters, perturbation, modulation, factors)
    if modulation is None and adapters is None:
        return x, None
    batch, t, k = x.shape
    noise, h, scale = noise_arguments(adapters, perturbation, factors, k), None, 1.0
    columns = noise["G"] * (noise["R"] + noise["RANK"])
    if adapters is not None:
        h, scale = torch.empty(batch, t, columns, dtype=torch.float32, device=x.device), adapters.scale
    x_out = x if modulation is None else output(x, batch, t, k)
    if batch * t == 0:
        return x_out.to(x.dtype), h
    shift, gain, eps = modulation or (None, None, 0.0)
    a, modulated = None if adapters is None else adapters.a, modulation is not None
    config = shrink_config(x.device, dtype=x.dtype, t=t, k=k, columns=columns, modulated=modulated)
    with torch.cuda.device_of(x):
        _shrink_kernel[(batch, triton.cdiv(t, config["BLOCK_T"]))](
            x, shift, gain, a, x_out_ptr=x_out, h_ptr=h,
            T=t, stride_xb=x.stride(0), stride_xt=x.stride(1), stride_xk=x.stride(2),
            stride_sb=shift.stride(0) if modulated else 0, stride_cb=gain.stride(0) if modulated else 0,
            stride_ar=0 if a is None else a.stride(0), stride_ak=0 if a is None else a.stride(1),
            sigma=0.0 if perturbation is None else perturbation.c, lora_scale=scale, eps=eps,
            K=k, MODULATED=modulated, **noise, **exact_products(x.dtype), **config,
        )  # fmt: skip
    return x_out.to(x.dtype), h


def mix_config(device: torch.device, *, t: int, columns: int) -> dict[str, int]:
    """Launch configuration for T rows a batch row."""
    found = configs.settings("mix", device, t=t, columns=columns)
    return found | {"CP": max(16, triton.next_power_of_2(columns))}


def takes_partial_sums(next_lora: Lora, rank: int, dtype: torch.dtype) -> bool:
    """Whether the op that makes x can make partial sums for these targets: one target, r + k <= 16, bf16."""
    return next_lora.targets == 1 and next_lora.r + rank <= 16 and dtype == torch.bfloat16


def check_next_lora(next_lora: Lora, perturbation: MemberNoise, dtype: torch.dtype) -> int:
    """r + k of a target for which partial sums can be made. Raise ValueError for any other."""
    columns = next_lora.r + perturbation.rank
    if not takes_partial_sums(next_lora, perturbation.rank, dtype):
        got = f"{next_lora.targets} with {columns} of {dtype}".replace("torch.", "")
        raise ValueError(f"next_lora: expected one target with r + k of at most 16, of bfloat16, got {got}; use shrink")
    return columns


def mix(partial_sums: torch.Tensor, adapters: Lora, perturbation: MemberNoise) -> torch.Tensor:
    """h = s g Mix, where g is the sum of the partial sums. Triton on a GPU, `mix_ref` elsewhere.

    The partial sums are added in their order.

    Args:
        partial_sums: fp32 [P, B, T, r + k], contiguous. Their sum over P is x [A^T | V].
        adapters: The target that reads x.
        perturbation: The noise of the batch.

    Returns:
        h fp32 [B, T, r + k], the same as from `shrink`.

    Raises:
        ValueError: An operand has the wrong shape, dtype, device or strides. The message names it.
    """
    if not uses_triton(partial_sums.device):
        return mix_ref(partial_sums, adapters, perturbation)
    _check_partial_sums(partial_sums, adapters, perturbation)
    parts, batch, t, columns = partial_sums.shape
    h = torch.empty(batch, t, columns, dtype=torch.float32, device=partial_sums.device)
    if h.numel() == 0:
        return h
    config = mix_config(partial_sums.device, t=t, columns=columns)
    with torch.cuda.device_of(partial_sums):
        _mix_kernel[(batch, triton.cdiv(t, config["BLOCK_T"]))](
            partial_sums, adapters.streams, perturbation.members, step_tensor(perturbation.step, h.device), h,
            PARTS=parts, T=t, stride_gp=partial_sums.stride(0), sigma=perturbation.c, lora_scale=adapters.scale,
            seed=signed64(perturbation.seed), R=adapters.r, RANK=perturbation.rank, KP=padded_rank(perturbation.rank),
            **config,
        )  # fmt: skip
    return h


def mix_ref(partial_sums: torch.Tensor, adapters: Lora, perturbation: MemberNoise) -> torch.Tensor:
    """h = s g Mix of one target, g the sum of the partial sums. Arguments as in `mix`."""
    _check_partial_sums(partial_sums, adapters, perturbation)
    g, r, rank, h = partial_sums.sum(0), adapters.r, perturbation.rank, torch.empty_like(partial_sums[0])
    (_, a_u, b_v, _), seed, step = adapters.streams.tolist()[0], perturbation.seed, int(perturbation.step)
    for row, member in enumerate(perturbation.members.tolist()):
        noise = dict(seed=seed, step=step, pairs=torch.tensor([member // 2], device=g.device), length=r, rank=rank)
        c = float(signed_sigma(torch.tensor(member), perturbation.sigma, rank))
        low, high = g[row].split((r, rank), dim=-1)
        if r == 0:
            h[row] = c * high
            continue
        low = adapters.scale * (low + c * high @ factor_ref(stream=a_u, **noise)[0].T)
        h[row] = torch.cat((low, c * low @ factor_ref(stream=b_v, **noise)[0]), -1)
    return h


def partial_sums_ref(x: torch.Tensor, next_lora: Lora, perturbation: MemberNoise) -> torch.Tensor:
    """x [A^T | V] of the target `next_lora`, fp32 [1, B, T, r + k], as a single partial sum."""
    check_next_lora(next_lora, perturbation, x.dtype)
    members, (a_v, *_) = perturbation.members, next_lora.streams.tolist()[0]
    noise = dict(seed=perturbation.seed, step=int(perturbation.step), pairs=members >> 1, rank=perturbation.rank)
    v = factor_ref(stream=a_v, length=x.shape[-1], **noise)
    low = [] if next_lora.a is None else [x.float() @ next_lora.a.T]
    return torch.cat((*low, x.float() @ v), -1)[None]


def shrink_ref(
    x: torch.Tensor,
    adapters: Lora | None,
    perturbation: MemberNoise | None,
    modulation: Modulation | None = None,
    factors: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x' = LayerNorm(x) (1 + scale) + shift, and of each target h = s [g + c (x' V) U^T | c (..) V'], g = x' A^T.

    One member at a time in fp32. Arguments as in `shrink`.
    """
    _check(x, adapters, perturbation, modulation, factors)
    if modulation is not None:
        normed = F.layer_norm(x.float(), x.shape[-1:], eps=modulation.eps)
        x = (normed * (1 + modulation.scale.float()[:, None]) + modulation.shift.float()[:, None]).to(x.dtype)
    if adapters is None:
        return x, None
    g, r, rank = adapters.targets, adapters.r, perturbation.rank
    h = torch.empty(*x.shape[:2], g * (r + rank), device=x.device)
    for row, member in enumerate(perturbation.members.tolist()):
        pair = torch.tensor([member // 2], device=x.device)
        noise = dict(seed=perturbation.seed, step=int(perturbation.step), pairs=pair, rank=rank)
        c = float(signed_sigma(torch.tensor(member), perturbation.sigma, rank))
        x_tk = x[row].float()
        for i, (a_v, a_u, b_v, _) in enumerate(adapters.streams.tolist()):
            low, high = h[row, :, i * r : (i + 1) * r], h[row, :, g * r + i * rank : g * r + (i + 1) * rank]
            v = factor_ref(stream=a_v, length=x.shape[-1], **noise)[0]
            if r == 0:
                high.copy_(c * (x_tk @ v))
                continue
            a, u = adapters.a[i * r : (i + 1) * r], factor_ref(stream=a_u, length=r, **noise)[0]
            low.copy_(adapters.scale * (x_tk @ (a + c * u @ v.T).T))
            high.copy_(c * (low @ factor_ref(stream=b_v, length=r, **noise)[0]))
    return x, h


def _check(x, adapters, perturbation, modulation, factors) -> None:
    """Raise ValueError for an operand that does not match. See `shrink`."""
    check_x(x)
    batch, _, k = x.shape
    if modulation is not None:
        for name, each in (("shift", modulation.shift), ("scale", modulation.scale)):
            check(name, each, (batch, k), x.dtype, x.device, strides="last")
    if adapters is not None:
        if perturbation is None:
            raise ValueError("perturbation: expected the noise of the batch beside adapters, got None")
        check_noise(perturbation, batch, x.device)
        check_adapters("adapters", adapters, k, None, x.device)
    check_factors(factors, adapters, perturbation, batch, k, None)


def _check_partial_sums(partial_sums, adapters, perturbation) -> None:
    """Raise ValueError for an operand that does not match. See `mix`."""
    check_streams("adapters", adapters, adapters.streams.device)
    columns = adapters.r + perturbation.rank
    if (
        adapters.targets != 1
        or partial_sums.dim() != 4
        or partial_sums.dtype != torch.float32
        or not partial_sums.is_contiguous()
    ):
        refuse("partial_sums", f"float32 [P, B, T, {columns}], contiguous, of one target", partial_sums)
    check("partial_sums", partial_sums, (*partial_sums.shape[:3], columns), torch.float32, adapters.streams.device)
    if not len(partial_sums):
        refuse("partial_sums", f"float32 [P, B, T, {columns}] of at least one partial sum", partial_sums)
    check_noise(perturbation, partial_sums.shape[1], partial_sums.device)
