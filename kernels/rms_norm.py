"""RMS norm of a linear's output. It adds the linear's low-rank part when it loads the plain product.

    y' = y + h [B | U']^T                               in fp32, optional
    x  = weight y' / sqrt(mean y'^2 + eps)              mean over the N columns; rounded once

y is the plain product of a linear. h belongs to one target, see `esengine.kernels.shrink`. y and [B | U'] are read
twice, the second time from the cache.

Legend: B batch rows, T rows a batch row, N columns, r LoRA rank, k noise rank (kp padded), CP padded columns of h.

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (arXiv 1910.07467), eq. 4; the rest as
`esengine.kernels.population_linear`.
"""

import torch
import torch.nn.functional as F

from esengine.kernels import configs
from esengine.kernels.factors import check_low_rank, low_rank_ref
from esengine.kernels.launch import low_precision, low_rank_arguments, output
from esengine.kernels.noise import triton, uses_triton
from esengine.kernels.operands import FLOATS, LowRank, check_x, refuse

if triton is not None:
    import triton.language as tl

    from esengine.kernels.low_rank import expand_columns, h_tile, product, within
    from esengine.kernels.noise import offset

    @triton.jit
    def row_rstd(
        x_rows, stride_xn, real, h, b_ptr, streams_ptr, factors_ptr, stride_bn, stride_br, seed, step, pair, row,
        target, eps,
        N: tl.constexpr, G: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, KP: tl.constexpr, CP: tl.constexpr,
        U_OUT_AT: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
        ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    ):  # fmt: skip
        """float32 [ROWS]: 1 / sqrt(mean square + eps) of rows of x. With G > 0 their low-rank part is added first."""
        squares = tl.zeros((ROWS, BLOCK_N), tl.float32)
        for n0 in range(0, N, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)
            mask = real[:, None] & within(n0, N, BLOCK_N)[None, :]
            x = tl.load(x_rows + offset(n, stride_xn)[None, :], mask=mask, other=0.0).to(tl.float32)
            if G > 0:
                columns = expand_columns(
                    b_ptr, streams_ptr, factors_ptr, stride_bn, stride_br, seed, step, pair, row, target, n0, N, N,
                    G, R, RANK, KP, CP, U_OUT_AT, WIDTH, BLOCK_N,
                )  # fmt: skip
                x = product(h, columns, x, ROWS, False, False, PRECISION)
            squares += x * x
        return 1 / tl.sqrt(tl.sum(squares, axis=1) / N + eps)

    @triton.jit(
        do_not_specialize=["T", "seed"], do_not_specialize_on_alignment=["members_ptr", "step_ptr", "factors_ptr"]
    )
    def _rms_norm_kernel(
        y_ptr, weight_ptr, h_ptr, b_ptr, streams_ptr, members_ptr, step_ptr, factors_ptr, x_ptr,
        T,
        stride_yb, stride_yt, stride_yn, stride_bn, stride_br,
        eps,
        seed: tl.int64,
        N: tl.constexpr, G: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, KP: tl.constexpr, CP: tl.constexpr,
        U_OUT_AT: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
        BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    ):  # fmt: skip
        b = tl.program_id(0)
        t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
        y_rows, real = y_ptr + (offset(b, stride_yb) + offset(t, stride_yt))[:, None], t < T
        step, pair = tl.load(step_ptr), tl.load(members_ptr + b) >> 1
        h = h_tile(h_ptr, b * T + t, real, 0, G, R, RANK, CP)
        rstd = row_rstd(
            y_rows, stride_yn, real, h, b_ptr, streams_ptr, factors_ptr, stride_bn, stride_br, seed, step, pair, b, 0,
            eps, N, G, R, RANK, KP, CP, U_OUT_AT, WIDTH, PRECISION, BLOCK_T, BLOCK_N,
        )  # fmt: skip
        for n0 in range(0, N, BLOCK_N):
            n, inside = n0 + tl.arange(0, BLOCK_N), within(n0, N, BLOCK_N)
            mask = real[:, None] & inside[None, :]
            y = tl.load(y_rows + offset(n, stride_yn)[None, :], mask=mask, other=0.0).to(tl.float32)
            columns = expand_columns(
                b_ptr, streams_ptr, factors_ptr, stride_bn, stride_br, seed, step, pair, b, 0, n0, N, N,
                G, R, RANK, KP, CP, U_OUT_AT, WIDTH, BLOCK_N,
            )  # fmt: skip
            y = product(h, columns, y, BLOCK_T, False, False, PRECISION)
            weight = tl.load(weight_ptr + n, mask=inside, other=0.0).to(tl.float32)
            x = (y * rstd[:, None] * weight[None, :]).to(x_ptr.dtype.element_ty)
            tl.store(x_ptr + offset(b * T + t, N)[:, None] + n[None, :], x, mask=mask)


def norm_config(device: torch.device, *, dtype: torch.dtype, t: int, n: int, columns: int) -> dict[str, int]:
    """Launch configuration for T rows a batch row. `columns` is r + k."""
    found = configs.settings("rms_norm", device, dtype=configs.dtype_name(dtype), t=t, n=n, columns=columns)
    return found | {"BLOCK_T": min(found["BLOCK_T"], triton.next_power_of_2(t))}


def rms_norm(y: torch.Tensor, weight: torch.Tensor, eps: float, low: LowRank | None = None) -> torch.Tensor:
    """RMS norm over the last dimension. Triton on a GPU, or `F.rms_norm` if there is no low-rank part.

    Elsewhere `rms_norm_ref`.

    Deterministic. A row's result does not depend on the other rows of the batch.

    Args:
        y: [B, T, N], fp32, bf16 or fp16, any strides.
        weight: [N], fp32, bf16 or fp16.
        eps: Added to the mean square, positive.
        low: The low-rank part of y, of one target. None: y is complete.

    Returns:
        [B, T, N], dtype of y.

    Raises:
        ValueError: An operand has the wrong shape, dtype or device, or is out of range. The message names it.
    """
    if not uses_triton(y.device):
        return rms_norm_ref(y, weight, eps, low)
    _check(y, weight, eps, low)
    if low is None:
        return F.rms_norm(y, weight.shape, weight.to(y.dtype), eps)
    batch, t, n = y.shape
    x = output(y, batch, t, n)
    if x.numel() == 0:
        return x.to(y.dtype)
    config = norm_config(y.device, dtype=y.dtype, t=t, n=n, columns=low.adapters.r + low.perturbation.rank)
    with torch.cuda.device_of(y):
        _rms_norm_kernel[(batch, triton.cdiv(t, config["BLOCK_T"]))](
            y, weight.contiguous(), x_ptr=x, T=t, stride_yb=y.stride(0), stride_yt=y.stride(1), stride_yn=y.stride(2),
            eps=eps, N=n, PRECISION=low_precision(y.dtype), **low_rank_arguments(low, None, n), **config,
        )  # fmt: skip
    return x.to(y.dtype)


def rms_norm_ref(y: torch.Tensor, weight: torch.Tensor, eps: float, low: LowRank | None = None) -> torch.Tensor:
    """The norm in fp32, rounded once. Arguments as in `rms_norm`."""
    _check(y, weight, eps, low)
    wide = y.float() + low_rank_ref(low, y.shape[-1])
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(y.dtype)


def _check(y, weight, eps, low) -> None:
    """Raise ValueError for an operand that does not match. See `rms_norm`."""
    check_x(y, "y", "N")
    if weight.shape != y.shape[-1:] or weight.dtype not in FLOATS or weight.device != y.device:
        refuse("weight", f"float32, bfloat16 or float16 [{y.shape[-1]}] on {y.device}", weight)
    if not eps > 0:
        raise ValueError(f"eps: expected a positive number, got {eps}")
    check_low_rank(low, y.shape, y.device)
