"""A linear's output onto the residual stream, whose low-rank part is added where it is read, and what reads the stream.

    z = residual + gate (y + h [B | U']^T)              in fp32, gate and low-rank part if asked; rounded once
    x = LayerNorm(z) (1 + scale) + shift                if asked; of the rounded z, without weights
    g = z [A^T | V],   h' = s g Mix                     or if asked: low-rank columns of the linear `then` that reads z

y is the plain product, of whatever made it; h is of one target, as `esengine.kernels.shrink` makes it, where Mix is.
One pass of y. A program has whole rows: while it writes z it sums g, or what LayerNorm needs. x takes a second pass of
z, from cache.

Legend: B batch rows, T rows a batch row, N columns, r LoRA rank, k noise rank (kp padded), CP columns of h, padded,
THEN_CP of h'.

Source: as `esengine.kernels.population_linear`; Xie et al., SANA (arXiv 2410.10629) for the modulation.
"""

from typing import NamedTuple

import torch

from esengine.kernels import configs
from esengine.kernels.factors import check_factors, check_low_rank, low_rank_ref, places
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
        do_not_specialize_on_alignment=["members_ptr", "step_ptr", "factors_ptr", "then_factors_ptr"],
    )
    def _residual_norm_kernel(
        y_ptr, residual_ptr, gate_ptr, h_ptr, b_ptr, streams_ptr, members_ptr, step_ptr, factors_ptr,
        shift_ptr, scale_ptr, a_ptr, then_ptr, then_factors_ptr, z_ptr, x_ptr, then_h_ptr,
        T,
        stride_gb, stride_bn, stride_br, stride_sb, stride_cb, stride_ar, stride_ak,
        sigma, lora_scale, eps,
        seed: tl.int64,
        N: tl.constexpr, G: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, KP: tl.constexpr, CP: tl.constexpr,
        U_OUT_AT: tl.constexpr, WIDTH: tl.constexpr,
        THEN_R: tl.constexpr, THEN_CP: tl.constexpr, U_AT: tl.constexpr, V_OUT_AT: tl.constexpr,
        THEN_WIDTH: tl.constexpr,
        SPLIT: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, LOW_PRECISION: tl.constexpr,
        BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    ):  # fmt: skip
        b = tl.program_id(0)
        t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
        real, rows = t < T, offset(b * T + t, N)[:, None]
        pair, step, c, h, then_factors = b, 0, 0.0, 0.0, then_factors_ptr
        if members_ptr is not None:
            member, step = tl.load(members_ptr + b), tl.load(step_ptr)
            pair, c = member >> 1, sigma * (1 - 2 * (member & 1)).to(tl.float32)
        if h_ptr is not None:
            h = h_tile(h_ptr, b * T + t, real, 0, G, R, RANK, CP)
        if then_factors_ptr is not None:
            then_factors = then_factors_ptr + offset(b, THEN_WIDTH)
        g = tl.zeros((BLOCK_T, THEN_CP), tl.float32)
        # sums of what differs from nearly the row's first element: a mean far from zero then cancels nothing
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
            if then_ptr is not None:
                then_columns = low_rank_columns(
                    a_ptr, then_ptr, then_factors, stride_ar, stride_ak, seed, step, pair, n0, N,
                    1, THEN_R, RANK, KP, THEN_CP, BLOCK_N, THEN_WIDTH,
                )  # fmt: skip
                z = tl.where(inside[None, :], z, 0.0)  # beyond N there is noise
                g = product(z, then_columns, g, BLOCK_T, SPLIT, UPCAST, PRECISION)

        if then_ptr is not None:
            then_h = mixed(
                g, then_ptr, then_factors, seed, step, pair, c, lora_scale, 1, THEN_R, RANK, KP, THEN_CP,
                U_AT, V_OUT_AT, THEN_WIDTH,
            )  # fmt: skip
            column = tl.arange(0, THEN_CP)[None, :]
            then_ptrs = then_h_ptr + offset(b * T + t, THEN_R + RANK)[:, None] + column
            tl.store(then_ptrs, then_h, mask=real[:, None] & (column < THEN_R + RANK))
        if x_ptr is not None:
            shifted_mean = tl.sum(sums, axis=1) / N
            mean = tl.sum(first, axis=1) + shifted_mean
            rstd = 1 / tl.sqrt(tl.maximum(tl.sum(squares, axis=1) / N - shifted_mean * shifted_mean, 0.0) + eps)
            tl.debug_barrier()  # z of the program's other threads
            for n0 in range(0, N, BLOCK_N):
                n, inside = n0 + tl.arange(0, BLOCK_N), within(n0, N, BLOCK_N)
                mask = real[:, None] & inside[None, :]
                x = tl.load(z_ptr + rows + n[None, :], mask=mask, other=0.0).to(tl.float32)
                scale = tl.load(scale_ptr + offset(b, stride_cb) + n, mask=inside, other=0.0).to(tl.float32)
                shift = tl.load(shift_ptr + offset(b, stride_sb) + n, mask=inside, other=0.0).to(tl.float32)
                x = (x - mean[:, None]) * rstd[:, None] * (1 + scale)[None, :] + shift[None, :]
                tl.store(x_ptr + rows + n[None, :], x.to(x_ptr.dtype.element_ty), mask=mask)


class Stream(NamedTuple):
    """The residual stream, and of it what was asked for: x [B, T, N] or None, then with its h or None."""

    z: torch.Tensor
    x: torch.Tensor | None
    then: LowRank | None


def residual_config(
    device: torch.device, *, dtype: torch.dtype, t: int, n: int, columns: int, then: int
) -> dict[str, int]:
    """Launch configuration for T rows a batch row; columns, then: r + k of the two targets, or 0 without."""
    values = dict(dtype=configs.named(dtype), t=t, n=n, columns=columns, then=then)
    found = configs.settings("residual_norm", device, **values)
    return found | {"BLOCK_T": min(found["BLOCK_T"], triton.next_power_of_2(t))}


def residual_norm(
    y: torch.Tensor,
    residual: torch.Tensor,
    *,
    gate: torch.Tensor | None = None,
    low: LowRank | None = None,
    modulation: Modulation | None = None,
    then: LowRank | None = None,
) -> Stream:
    """`residual_norm_ref` by the fastest way the device has: Triton on a GPU, the reference itself elsewhere.

    Deterministic. A row's result does not depend on its batch mates.

    Args:
        y: [B, T, N], fp32, bf16 or fp16.
        residual: [B, T, N], dtype of y.
        gate: [B, N], one for each batch row, last stride 1, or None.
        low: The low-rank part of y, of one target. None: y is whole.
        modulation: What makes x of z. None: no x.
        then: One target that reads z, with h None, and the same perturbation as `low`; not with `modulation`. None: no
            h'.

    Returns:
        z and x [B, T, N], dtype of y, and `then` with its h, fp32 [B, T, r + k]; None for what was not asked for.

    Raises:
        ValueError: an operand is of another shape, dtype or device, or of strides that are not said here; by its name.
    """
    if not uses_triton(y.device):
        return residual_norm_ref(y, residual, gate=gate, low=low, modulation=modulation, then=then)
    _check(y, residual, gate, low, modulation, then)
    batch, t, n = y.shape
    z, x = output(y, batch, t, n), None if modulation is None else output(y, batch, t, n)
    columns, reads = (0 if each is None else each.adapters.r + each.perturbation.rank for each in (low, then))
    h = None if then is None else torch.empty(batch, t, reads, dtype=torch.float32, device=y.device)
    if z.numel():
        shift, scale, eps = modulation or (None, None, 0.0)
        config = residual_config(y.device, dtype=y.dtype, t=t, n=n, columns=columns, then=reads)
        with torch.cuda.device_of(y):
            _residual_norm_kernel[(batch, triton.cdiv(t, config["BLOCK_T"]))](
                y.contiguous(), residual.contiguous(), gate,
                shift_ptr=shift, scale_ptr=scale, z_ptr=z, x_ptr=x, then_h_ptr=h,
                T=t, stride_gb=0 if gate is None else gate.stride(0),
                stride_sb=0 if shift is None else shift.stride(0), stride_cb=0 if scale is None else scale.stride(0),
                eps=eps, N=n, LOW_PRECISION=low_precision(y.dtype),
                **low_rank_arguments(low, None if then is None else then.perturbation, n), **_then_arguments(then, n),
                **exact_products(y.dtype), **config,
            )  # fmt: skip
    x = None if x is None else x.to(y.dtype)
    return Stream(z.to(y.dtype), x, None if then is None else then._replace(h=h))


def _then_arguments(then: LowRank | None, n: int) -> dict[str, object]:
    """Arguments of the kernel that are of the target that reads z; None and zeros without."""
    if then is None:
        found = dict(a_ptr=None, then_ptr=None, then_factors_ptr=None, stride_ar=0, stride_ak=0)
        return found | dict(sigma=0.0, lora_scale=0.0, THEN_R=0, THEN_CP=16, U_AT=0, V_OUT_AT=0, THEN_WIDTH=0)
    _, adapters, perturbation, factors = then
    a, at = adapters.a, places(n, adapters.r, perturbation.rank)
    return dict(
        a_ptr=a,
        then_ptr=adapters.streams,
        then_factors_ptr=factors,
        stride_ar=0 if a is None else a.stride(0),
        stride_ak=0 if a is None else a.stride(1),
        sigma=perturbation.c,
        lora_scale=adapters.scale,
        THEN_R=adapters.r,
        THEN_CP=padded_columns(adapters.r + perturbation.rank),
        U_AT=at.u,
        V_OUT_AT=at.v_out,
        THEN_WIDTH=0 if factors is None else factors.shape[-1],
    )


def residual_norm_ref(
    y: torch.Tensor,
    residual: torch.Tensor,
    *,
    gate: torch.Tensor | None = None,
    low: LowRank | None = None,
    modulation: Modulation | None = None,
    then: LowRank | None = None,
) -> Stream:
    """The sum in fp32, rounded once; then what was asked for of it. Arguments as in `residual_norm`."""
    _check(y, residual, gate, low, modulation, then)
    wide = y.float() + low_rank_ref(low, y.shape[-1])
    if gate is not None:
        wide = wide * gate.float()[:, None]
    z, x = (wide + residual.float()).to(y.dtype), None
    if modulation is not None:
        x, _ = shrink_ref(z, None, None, modulation)
    if then is not None:
        then = then._replace(h=shrink_ref(z, then.adapters, then.perturbation)[1])
    return Stream(z, x, then)


def _check(y, residual, gate, low, modulation, then) -> None:
    """Raises ValueError for what does not fit, by its name. See `residual_norm`."""
    check_x(y, "y", "N")
    batch, _, n = y.shape
    check("residual", residual, y.shape, y.dtype, y.device)
    check("gate", gate, (batch, n), y.dtype, y.device, strides="last")
    check_low_rank(low, y.shape, y.device)
    if modulation is not None:
        for name, each in (("shift", modulation.shift), ("scale", modulation.scale)):
            check(name, each, (batch, n), y.dtype, y.device, strides="last")
    if then is None:
        return
    if modulation is not None:
        raise ValueError("modulation, then: expected at most one of them, got both")
    check_noise(then.perturbation, batch, y.device)
    if then.adapters.targets != 1:
        refuse("then.adapters.streams", "int64 [1, 4], of one target,", then.adapters.streams)
    check_adapters("then.adapters", then.adapters, n, None, y.device)
    check_factors(then.factors, then.adapters, then.perturbation, batch, n, None)
    if then.h is not None:
        raise ValueError("then.h: expected None, as it is made here, got a tensor")
    if low is not None and low.perturbation is not then.perturbation:
        raise ValueError("then.perturbation: expected the same object as low's, got another")
