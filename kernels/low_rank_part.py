"""The low-rank part of a perturbed linear without the product of W, which is added afterwards.

    C = bias + h [B | U']^T          h of one target, as in `esengine.kernels.shrink`
    y = C + x W^T                    added by the caller: `torch.addmm` in `population_linear`, or any base layer

One kernel reads x and writes C in the dtype of x. The rounding of C is small, because C is small compared with y: in
bf16 it is 2^-9 of the low-rank part. The product of W is added in fp32, and y is rounded once.

Legend: B batch rows, T rows a batch row, K in, N out, r LoRA rank, k noise rank (kp padded). A tile's columns are r,
then k, padded to CP.

Source: as `esengine.kernels.population_linear`.
"""

import torch

from esengine.kernels import configs
from esengine.kernels.factors import check_factors
from esengine.kernels.launch import exact_products, noise_arguments, output
from esengine.kernels.noise import factor_ref, triton, uses_triton
from esengine.kernels.operands import Lora, MemberNoise, check, check_adapters, check_noise, check_x, refuse
from esengine.kernels.shrink import shrink_ref

if triton is not None:
    import triton.language as tl

    from esengine.kernels.low_rank import expand_columns, low_rank_columns, mixed, product, within
    from esengine.kernels.noise import offset

    @triton.jit(
        do_not_specialize=["T", "seed"], do_not_specialize_on_alignment=["members_ptr", "step_ptr", "factors_ptr"]
    )
    def _low_rank_kernel(
        x_ptr, a_ptr, b_ptr, bias_ptr, streams_ptr, members_ptr, step_ptr, factors_ptr, c_ptr,
        T,
        stride_xb, stride_xt, stride_xk, stride_ar, stride_ak, stride_bn, stride_br,
        sigma, lora_scale,
        seed: tl.int64,
        K: tl.constexpr, N: tl.constexpr,
        G: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, KP: tl.constexpr, CP: tl.constexpr,
        U_AT: tl.constexpr, V_OUT_AT: tl.constexpr, U_OUT_AT: tl.constexpr, WIDTH: tl.constexpr,
        SPLIT: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
        BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
    ):  # fmt: skip
        b = tl.program_id(0)
        t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
        x_rows = x_ptr + (offset(b, stride_xb) + offset(t, stride_xt))[:, None]
        member, step, factors = tl.load(members_ptr + b), tl.load(step_ptr), factors_ptr
        pair, sign = member >> 1, sigma * (1 - 2 * (member & 1)).to(tl.float32)
        if factors_ptr is not None:
            factors = factors_ptr + offset(b, WIDTH)
        g = tl.zeros((BLOCK_T, CP), tl.float32)
        for k0 in range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            mask = (t[:, None] < T) & within(k0, K, BLOCK_K)[None, :]
            x = tl.load(x_rows + offset(k, stride_xk)[None, :], mask=mask, other=0.0)
            if UPCAST:
                x = x.to(tl.float32)
            columns = low_rank_columns(
                a_ptr, streams_ptr, factors, stride_ar, stride_ak, seed, step, pair, k0, K,
                1, R, RANK, KP, CP, BLOCK_K, WIDTH,
            )  # fmt: skip
            g = product(x, columns, g, BLOCK_T, SPLIT, UPCAST, PRECISION)
        h = mixed(
            g, streams_ptr, factors, seed, step, pair, sign, lora_scale, 1, R, RANK, KP, CP, U_AT, V_OUT_AT, WIDTH
        )
        for n0 in range(0, N, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)
            columns = expand_columns(
                b_ptr, streams_ptr, factors_ptr, stride_bn, stride_br, seed, step, pair, b, 0, n0, N, N,
                1, R, RANK, KP, CP, U_OUT_AT, WIDTH, BLOCK_N,
            )  # fmt: skip
            y = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
            y = product(h, columns, y, BLOCK_T, False, UPCAST, "ieee" if PRECISION == "ieee" else "tf32")
            if bias_ptr is not None:
                y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
            c_ptrs = c_ptr + offset(b * T + t, N)[:, None] + n[None, :]
            tl.store(c_ptrs, y.to(c_ptr.dtype.element_ty), mask=(t[:, None] < T) & (n < N)[None, :])


def low_rank_config(device: torch.device, *, dtype: torch.dtype, t: int, k: int, columns: int) -> dict[str, int]:
    """Launch configuration for T rows a batch row."""
    found = configs.settings("low_rank_part", device, dtype=configs.dtype_name(dtype), t=t, k=k, columns=columns)
    padded = max(16, triton.next_power_of_2(columns))
    return found | {"BLOCK_T": min(found["BLOCK_T"], triton.next_power_of_2(t)), "CP": padded}


def low_rank_part(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    adapters: Lora,
    perturbation: MemberNoise,
    *,
    n: int,
    factors: torch.Tensor | None = None,
) -> torch.Tensor:
    """C = bias + h [B | U']^T of one target. Triton on a GPU, `low_rank_part_ref` elsewhere.

    A row's result does not depend on the other rows of the batch.

    Args:
        x: [B, T, K], fp32, bf16 or fp16, any strides.
        bias: [N], dtype of x, or None.
        adapters: One target.
        perturbation: The noise of the batch.
        n: N, the columns of y.
        factors: From `member_factors` with the same adapters and perturbation. None: rebuilt for each tile of rows.

    Returns:
        [B, T, N], dtype of x, contiguous.

    Raises:
        ValueError: An operand has the wrong shape, dtype, device or strides. The message names it.
        RuntimeError: On a GPU, x requires a gradient.
    """
    if not uses_triton(x.device):
        return low_rank_part_ref(x, bias, adapters, perturbation, n=n, factors=factors)
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("x: requires a gradient, which the Triton path does not have; call it under torch.no_grad")
    _check(x, bias, adapters, perturbation, n, factors)
    batch, t, k = x.shape
    c = output(x, batch, t, n)
    if c.numel() == 0:
        return c.to(x.dtype)
    a, b = adapters.a, adapters.b
    config = low_rank_config(x.device, dtype=x.dtype, t=t, k=k, columns=adapters.r + perturbation.rank)
    with torch.cuda.device_of(x):
        _low_rank_kernel[(batch, triton.cdiv(t, config["BLOCK_T"]))](
            x, a, b, None if bias is None else bias.contiguous(), c_ptr=c,
            T=t, stride_xb=x.stride(0), stride_xt=x.stride(1), stride_xk=x.stride(2),
            stride_ar=0 if a is None else a.stride(0), stride_ak=0 if a is None else a.stride(1),
            stride_bn=0 if b is None else b.stride(0), stride_br=0 if b is None else b.stride(1),
            sigma=perturbation.c, lora_scale=adapters.scale, K=k, N=n,
            **noise_arguments(adapters, perturbation, factors, k), **exact_products(x.dtype), **config,
        )  # fmt: skip
    return c.to(x.dtype)


def low_rank_part_ref(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    adapters: Lora,
    perturbation: MemberNoise,
    *,
    n: int,
    factors: torch.Tensor | None = None,
) -> torch.Tensor:
    """C = bias + h [B | U']^T, in fp32, rounded once. Arguments as in `low_rank_part`."""
    _check(x, bias, adapters, perturbation, n, factors)
    _, h = shrink_ref(x, adapters, perturbation)
    c = torch.zeros(*x.shape[:2], n, device=x.device) if bias is None else bias.float().repeat(*x.shape[:2], 1)
    low, high = h.split((adapters.r, perturbation.rank), dim=-1)
    if adapters.r:
        c += low @ adapters.b.T
    noise = dict(seed=perturbation.seed, step=int(perturbation.step), rank=perturbation.rank)
    pairs, stream = perturbation.members >> 1, int(adapters.streams[0, 3])
    c += high @ factor_ref(stream=stream, pairs=pairs, length=n, **noise).mT
    return c.to(x.dtype)


def _check(x, bias, adapters, perturbation, n, factors) -> None:
    """Raise ValueError for an operand that does not match. See `low_rank_part`."""
    check_x(x)
    batch, _, k = x.shape
    check_noise(perturbation, batch, x.device)
    check_adapters("adapters", adapters, k, n, x.device)
    if adapters.targets != 1:
        refuse("adapters.streams", "int64 [1, 4], of one target,", adapters.streams)
    check("bias", bias, (n,), x.dtype, x.device)
    check_factors(factors, adapters, perturbation, batch, k, n)
