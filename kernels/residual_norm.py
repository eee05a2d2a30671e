"""The residual stream: adds a linear's plain product and its low-rank part, and prepares the input of the next linear.

    z = residual + gate (y + h [B | U']^T)              in fp32, rounded once; gate and low-rank part are optional
    x = LayerNorm(z) (1 + scale) + shift                optional; of the rounded z, without weights
    g = z [A^T | V],   h' = s g Mix                     optional instead of x: low-rank columns of the next linear

y is the plain product of a linear. h belongs to one target; `esengine.kernels.shrink` defines h and Mix. y is read
once. A program has whole rows. While it writes z, it sums g or the statistics of LayerNorm. x needs a second pass over
z, which is in the cache.

Legend: B batch rows, T rows a batch row, N columns, r LoRA rank, k noise rank (kp padded), CP padded columns of h,
NEXT_CP padded columns of h'.

Source: as `esengine.kernels.population_linear`; Xie et al., SANA (arXiv 2410.10629) for the modulation.
"""

from typing import NamedTuple

import torch

from esengine.kernels import configs
from esengine.kernels.factors import check_factors, check_low_rank, factor_starts, low_rank_ref
from esengine.kernels.launch import exact_products, low_precision, low_rank_arguments, output, padded_columns
from esengine.kernels.noise import triton, uses_triton
from esengine.kernels.operands import LowRank, check, check_adapters, check_noise, check_x, refuse
from esengine.kernels.shrink import Modulation, shrink_ref

if triton is not None:
    import triton.language as tl

    from esengine.kernels.low_rank import expand_columns, h_tile, low_rank_columns, mixed, product, within
    from esengine.kernels.noise import offset

    @triton.jit(
        do_not_specialize=["T", "seed"],
        do_not_specialize_on_alignment=["members_ptr", "step_ptr", "factors_ptr", "next_factors_ptr"],
    )
    def _residual_norm_kernel(
        y_ptr, residual_ptr, gate_ptr, h_ptr, b_ptr, streams_ptr, members_ptr, step_ptr, factors_ptr,
        shift_ptr, scale_ptr, a_ptr, next_streams_ptr, next_factors_ptr, z_ptr, x_ptr, next_h_ptr,
        T,
        stride_gb, stride_bn, stride_br, stride_sb, stride_cb, stride_ar, stride_ak,
        sigma, lora_scale, eps,
        seed: tl.int64,
        N: tl.constexpr, G: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, KP: tl.constexpr, CP: tl.constexpr,
        U_OUT_AT: tl.constexpr, WIDTH: tl.constexpr,
        NEXT_R: tl.constexpr, NEXT_CP: tl.constexpr, U_AT: tl.constexpr, V_OUT_AT: tl.constexpr,
        NEXT_WIDTH: tl.constexpr,
        SPLIT: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, LOW_PRECISION: tl.constexpr,
        BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    ):  # fmt: skip
        b = tl.program_id(0)
        t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
        real, rows = t < T, offset(b * T + t, N)[:, None]
        pair, step, c, h, next_factors = b, 0, 0.0, 0.0, next_factors_ptr
        if members_ptr is not None:
            member, step = tl.load(members_ptr + b), tl.load(step_ptr)
            pair, c = member >> 1, sigma * (1 - 2 * (member & 1)).to(tl.float32)
        if h_ptr is not None:
            h = h_tile(h_ptr, b * T + t, real, 0, G, R, RANK, CP)
        if next_factors_ptr is not None:
            next_factors = next_factors_ptr + offset(b, NEXT_WIDTH)
        g = tl.zeros((BLOCK_T, NEXT_CP), tl.float32)
        # sums of differences to about the row's first element: a mean far from zero cancels no digits
        first = tl.load(y_ptr + rows, mask=real[:, None], other=0.0).to(tl.float32)
        if gate_ptr is not None:
            first *= tl.load(gate_ptr + offset(b, stride_gb)).to(tl.float32)
        first += tl.load(residual_ptr + rows, mask=real[:, None], other=0.0).to(tl.float32)
        sums = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        squares = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        for n0 in range(0, N, BLOCK_N):
            n, inside = n0 + tl.arange(0, BLOCK_N), within(n0, N, BLOCK_N)
            mask = real[:, None] & inside[None, :]
            z = tl.load(y_ptr + rows + n[None, :], mask=mask, other=0.0).to(tl.float32)
            if h_ptr is not None:
                columns = expand_columns(
                    b_ptr, streams_ptr, factors_ptr, stride_bn, stride_br, seed, step, pair, b, 0, n0, N, N,
                    G, R, RANK, KP, CP, U_OUT_AT, WIDTH, BLOCK_N,
                )  # fmt: skip
                z = product(h, columns, z, BLOCK_T, False, UPCAST, LOW_PRECISION)
            if gate_ptr is not None:
                z *= tl.load(gate_ptr + offset(b, stride_gb) + n, mask=inside, other=0.0).to(tl.float32)[None, :]
            z += tl.load(residual_ptr + rows + n[None, :], mask=mask, other=0.0).to(tl.float32)
            z = z.to(z_ptr.dtype.element_ty)
            tl.store(z_ptr + rows + n[None, :], z, mask=mask)
            if x_ptr is not None:
                shifted = tl.where(inside[None, :], z.to(tl.float32) - first, 0.0)
                sums += shifted
                squares += shifted * shifted
            if next_streams_ptr is not None:
                next_columns = low_rank_columns(
                    a_ptr, next_streams_ptr, next_factors, stride_ar, stride_ak, seed, step, pair, n0, N,
                    1, NEXT_R, RANK, KP, NEXT_CP, BLOCK_N, NEXT_WIDTH,
                )  # fmt: skip
                z = tl.where(inside[None, :], z, 0.0)  # beyond N there is noise
                g = product(z, next_columns, g, BLOCK_T, SPLIT, UPCAST, PRECISION)

        if next_streams_ptr is not None:
            next_h = mixed(
                g, next_streams_ptr, next_factors, seed, step, pair, c, lora_scale, 1, NEXT_R, RANK, KP, NEXT_CP,
                U_AT, V_OUT_AT, NEXT_WIDTH,
            )  # fmt: skip
            column = tl.arange(0, NEXT_CP)[None, :]
            next_h_ptrs = next_h_ptr + offset(b * T + t, NEXT_R + RANK)[:, None] + column
            tl.store(next_h_ptrs, next_h, mask=real[:, None] & (column < NEXT_R + RANK))
        if x_ptr is not None:
            shifted_mean = tl.sum(sums, axis=1) / N
            mean = tl.sum(first, axis=1) + shifted_mean
            rstd = 1 / tl.sqrt(tl.maximum(tl.sum(squares, axis=1) / N - shifted_mean * shifted_mean, 0.0) + eps)
            tl.debug_barrier()  # wait for z of the program's other threads
            for n0 in range(0, N, BLOCK_N):
                n, inside = n0 + tl.arange(0, BLOCK_N), within(n0, N, BLOCK_N)
                mask = real[:, None] & inside[None, :]
                x = tl.load(z_ptr + rows + n[None, :], mask=mask, other=0.0).to(tl.float32)
                scale = tl.load(scale_ptr + offset(b, stride_cb) + n, mask=inside, other=0.0).to(tl.float32)
                shift = tl.load(shift_ptr + offset(b, stride_sb) + n, mask=inside, other=0.0).to(tl.float32)
                x = (x - mean[:, None]) * rstd[:, None] * (1 + scale)[None, :] + shift[None, :]
                tl.store(x_ptr + rows + n[None, :], x.to(x_ptr.dtype.element_ty), mask=mask)


class Stream(NamedTuple):
    """z [B, T, N], the modulated x [B, T, N] or None, and the low-rank part of the next linear or None."""

    z: torch.Tensor
    x: torch.Tensor | None
    next_lora: LowRank | None


def residual_config(
    device: torch.device, *, dtype: torch.dtype, t: int, n: int, columns: int, next_columns: int
) -> dict[str, int]:
    """Launch configuration for T rows a batch row. `columns`, `next_columns`: r + k of the two targets, or 0."""
    values = dict(dtype=configs.dtype_name(dtype), t=t, n=n, columns=columns, next_columns=next_columns)
    found = configs.settings("residual_norm", device, **values)
    return found | {"BLOCK_T": min(found["BLOCK_T"], triton.next_power_of_2(t))}


def residual_norm(
    y: torch.Tensor,
    residual: torch.Tensor,
    *,
    gate: torch.Tensor | None = None,
    low: LowRank | None = None,
    modulation: Modulation | None = None,
    next_lora: LowRank | None = None,
) -> Stream:
    """z = residual + gate (y + low), and x or h' from z. Triton on a GPU, `residual_norm_ref` elsewhere.

    Deterministic. A row's result does not depend on the other rows of the batch.

    Args:
        y: [B, T, N], fp32, bf16 or fp16.
        residual: [B, T, N], dtype of y.
        gate: [B, N], dtype of y, one row for each batch row, last stride 1, or None.
        low: The low-rank part of y, of one target. None: y is complete.
        modulation: Shift and scale that make x from z. None: no x.
        next_lora: The low-rank part of the one target that reads z, with h None, and with the same perturbation as
            `low`. Not together with `modulation`. None: no h'.

    Returns:
        z and x [B, T, N], dtype of y, and `next_lora` with its h, fp32 [B, T, r + k]. x and `next_lora` may be None.

    Raises:
        ValueError: An operand has the wrong shape, dtype, device or strides. The message names it.
    """
    if not uses_triton(y.device):
        return residual_norm_ref(y, residual, gate=gate, low=low, modulation=modulation, next_lora=next_lora)
    _check(y, residual, gate, low, modulation, next_lora)
    batch, t, n = y.shape
    z, x = output(y, batch, t, n), None if modulation is None else output(y, batch, t, n)
    columns, reads = (0 if each is None else each.adapters.r + each.perturbation.rank for each in (low, next_lora))
    h = None if next_lora is None else torch.empty(batch, t, reads, dtype=torch.float32, device=y.device)
    if z.numel():
        shift, scale, eps = modulation or (None, None, 0.0)
        config = residual_config(y.device, dtype=y.dtype, t=t, n=n, columns=columns, next_columns=reads)
        with torch.cuda.device_of(y):
            _residual_norm_kernel[(batch, triton.cdiv(t, config["BLOCK_T"]))](
                y.contiguous(), residual.contiguous(), gate,
                shift_ptr=shift, scale_ptr=scale, z_ptr=z, x_ptr=x, next_h_ptr=h,
                T=t, stride_gb=0 if gate is None else gate.stride(0),
                stride_sb=0 if shift is None else shift.stride(0), stride_cb=0 if scale is None else scale.stride(0),
                eps=eps, N=n, LOW_PRECISION=low_precision(y.dtype),
                **low_rank_arguments(low, None if next_lora is None else next_lora.perturbation, n),
                **_next_arguments(next_lora, n),
                **exact_products(y.dtype), **config,
            )  # fmt: skip
    x = None if x is None else x.to(y.dtype)
    return Stream(z.to(y.dtype), x, None if next_lora is None else next_lora._replace(h=h))


def _next_arguments(next_lora: LowRank | None, n: int) -> dict[str, object]:
    """Kernel arguments for the target that reads z. Without one they are None and zeros."""
    if next_lora is None:
        found = dict(a_ptr=None, next_streams_ptr=None, next_factors_ptr=None, stride_ar=0, stride_ak=0)
        return found | dict(sigma=0.0, lora_scale=0.0, NEXT_R=0, NEXT_CP=16, U_AT=0, V_OUT_AT=0, NEXT_WIDTH=0)
    _, adapters, perturbation, factors = next_lora
    a, at = adapters.a, factor_starts(n, adapters.r, perturbation.rank)
    return dict(
        a_ptr=a,
        next_streams_ptr=adapters.streams,
        next_factors_ptr=factors,
        stride_ar=0 if a is None else a.stride(0),
        stride_ak=0 if a is None else a.stride(1),
        sigma=perturbation.c,
        lora_scale=adapters.scale,
        NEXT_R=adapters.r,
        NEXT_CP=padded_columns(adapters.r + perturbation.rank),
        U_AT=at.u,
        V_OUT_AT=at.v_out,
        NEXT_WIDTH=0 if factors is None else factors.shape[-1],
    )


def residual_norm_ref(
    y: torch.Tensor,
    residual: torch.Tensor,
    *,
    gate: torch.Tensor | None = None,
    low: LowRank | None = None,
    modulation: Modulation | None = None,
    next_lora: LowRank | None = None,
) -> Stream:
    """z in fp32, rounded once, then x or h' from the rounded z. Arguments as in `residual_norm`."""
    _check(y, residual, gate, low, modulation, next_lora)
    wide = y.float() + low_rank_ref(low, y.shape[-1])
    if gate is not None:
        wide = wide * gate.float()[:, None]
    z, x = (wide + residual.float()).to(y.dtype), None
    if modulation is not None:
        x, _ = shrink_ref(z, None, None, modulation)
    if next_lora is not None:
        next_lora = next_lora._replace(h=shrink_ref(z, next_lora.adapters, next_lora.perturbation)[1])
    return Stream(z, x, next_lora)


def _check(y, residual, gate, low, modulation, next_lora) -> None:
    """Raise ValueError for an operand that does not match. See `residual_norm`."""
    check_x(y, "y", "N")
    batch, _, n = y.shape
    check("residual", residual, y.shape, y.dtype, y.device)
    check("gate", gate, (batch, n), y.dtype, y.device, strides="last")
    check_low_rank(low, y.shape, y.device)
    if modulation is not None:
        for name, each in (("shift", modulation.shift), ("scale", modulation.scale)):
            check(name, each, (batch, n), y.dtype, y.device, strides="last")
    if next_lora is None:
        return
    if modulation is not None:
        raise ValueError("modulation, next_lora: expected at most one of them, got both")
    check_noise(next_lora.perturbation, batch, y.device)
    if next_lora.adapters.targets != 1:
        refuse("next_lora.adapters.streams", "int64 [1, 4], of one target,", next_lora.adapters.streams)
    check_adapters("next_lora.adapters", next_lora.adapters, n, None, y.device)
    check_factors(next_lora.factors, next_lora.adapters, next_lora.perturbation, batch, n, None)
    if next_lora.h is not None:
        raise ValueError("next_lora.h: expected None, as it is made here, got a tensor")
    if low is not None and low.perturbation is not next_lora.perturbation:
        raise ValueError("next_lora.perturbation: expected the same object as low's, got another")
