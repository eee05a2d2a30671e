"""ReLU linear attention with RMS norm across heads: SANA's self-attention between the projections.

    q'_t = relu(w_q q_t / sqrt(mean q_t^2 + eps)),   k'_t alike         means over all H D columns, r = 1 / sqrt(...)
    S = sum_t k'_t v_t^T,   z = sum_t k'_t                              per batch row and head
    y_t = q'_t S / (q'_t z + 1e-15)
    g_h = y_h [A^T | V]_h                    optional: for the linear that reads y, the partial sum of head h

q, k and v are complete, or they are plain products. In the second case their low-rank parts h [B | U']^T are added in
fp32 when they are loaded.

The factor r of q cancels, so q is read once. p = relu(sign(w_q) q) replaces q'. |w_q| is multiplied into S and z. 1e-15
is multiplied by sqrt(eps), the smallest value of 1 / r. The result differs from the formula in two cases: q'_t z is
below about 1e-9, or q_t is not finite. A NaN in q_t stays in its head.

Rounding: v and p are bf16. k', S and z are fp32 and are multiplied as two bf16 parts, which hold 16 bits. Errors
relative to the norm, emulated in torch at D = 32 with T 256 and 1024 against fp64, before the last rounding: 4e-6. With
tf32 products 2e-4. With q' and k' rounded to bf16, as in diffusers, 1.5e-3. The last rounding itself is 1.7e-3. With a
low-rank part v and p are fp32 and are split too, which costs one more product each.

Bytes: one pass over k for r, then q, k and v once, and y is written. These are five rows of H D, where the minimum is
four, and 8 M bytes for r. Programs run from the last batch row to the first, because the first pass leaves the end of k
in L2. Instructions in sm_90 machine code: 422 in each of two warps for 32 tokens of a head of 32. Calculated for B =
64, T = 1024, H = 70 on an H100: 0.49 ms of memory, 0.13 ms of issue slots. Not measured.

Legend: B batch rows, T tokens, M = B T, H heads, D their width (DP padded), C = H D.

Source: Katharopoulos et al., "Transformers are RNNs" (arXiv 2006.16236), eq. 4-6; Xie et al., SANA (arXiv 2410.10629).
"""

import math

import torch

from esengine.kernels import configs
from esengine.kernels.factors import check_low_rank, low_rank_ref
from esengine.kernels.launch import exact_products, low_precision, low_rank_arguments, output
from esengine.kernels.noise import triton, uses_triton
from esengine.kernels.operands import Lora, LowRank, MemberNoise, check_adapters, check_noise
from esengine.kernels.rms_norm import norm_config
from esengine.kernels.shrink import check_next_lora, partial_sums_ref

if triton is not None:
    import triton.language as tl

    from esengine.kernels.low_rank import expand_columns, h_tile, low_rank_columns, split_bf16
    from esengine.kernels.low_rank import product as low_rank_product
    from esengine.kernels.noise import offset
    from esengine.kernels.rms_norm import row_rstd

    @triton.jit
    def relu(x):
        """relu that keeps NaN."""
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)

    @triton.jit
    def product(a, b, a_rest, b_rest, acc, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
        """acc + a b in fp32, and + a_rest b_rest if SPLIT."""
        if SPLIT:
            acc = tl.dot(a_rest, b_rest, acc)
        return tl.dot(a, b, acc, input_precision=PRECISION)

    @triton.jit(
        do_not_specialize=["T", "seed"], do_not_specialize_on_alignment=["members_ptr", "step_ptr", "factors_ptr"]
    )
    def _rstd_kernel(
        x_ptr, h_ptr, b_ptr, streams_ptr, members_ptr, step_ptr, factors_ptr, rstd_ptr,
        T,
        stride_xb, stride_xt, stride_xc, stride_bn, stride_br,
        eps,
        seed: tl.int64,
        C: tl.constexpr, G: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, KP: tl.constexpr, CP: tl.constexpr,
        U_OUT_AT: tl.constexpr, WIDTH: tl.constexpr, TARGET: tl.constexpr, PRECISION: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    ):  # fmt: skip
        b = tl.program_id(0)
        t = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
        x_rows = x_ptr + (offset(b, stride_xb) + offset(t, stride_xt))[:, None]
        pair, step, h = b, 0, 0.0
        if h_ptr is not None:
            pair, step = tl.load(members_ptr + b) >> 1, tl.load(step_ptr)
            h = h_tile(h_ptr, b * T + t, t < T, TARGET, G, R, RANK, CP)
        rstd = row_rstd(
            x_rows, stride_xc, t < T, h, b_ptr, streams_ptr, factors_ptr, stride_bn, stride_br, seed, step, pair, b,
            TARGET, eps, C, G, R, RANK, KP, CP, U_OUT_AT, WIDTH, PRECISION, BLOCK_M, BLOCK_C,
        )  # fmt: skip
        tl.store(rstd_ptr + b * T + t, rstd, mask=t < T)

    @triton.jit(do_not_specialize=["seed"], do_not_specialize_on_alignment=["members_ptr", "step_ptr", "factors_ptr"])
    def _attention_kernel(
        q_ptr, k_ptr, v_ptr, norm_q_ptr, norm_k_ptr, rstd_ptr, y_ptr,
        h_ptr, b_ptr, streams_ptr, members_ptr, step_ptr, factors_ptr, a_ptr, next_streams_ptr, sums_ptr,
        stride_qb, stride_qt, stride_qc, stride_kb, stride_kt, stride_kc, stride_vb, stride_vt, stride_vc,
        stride_bn, stride_br, stride_ar, stride_ak,
        tiny,
        seed: tl.int64,
        T: tl.constexpr, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
        G: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, KP: tl.constexpr, CP: tl.constexpr,
        U_OUT_AT: tl.constexpr, WIDTH: tl.constexpr, NEXT_R: tl.constexpr,
        SPLIT: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, LOW_PRECISION: tl.constexpr,
        BLOCK_T: tl.constexpr,
    ):  # fmt: skip
        pid = tl.num_programs(0) - 1 - tl.program_id(0)
        b, d = pid // H, tl.arange(0, DP)
        c0 = pid % H * D
        c = c0 + d
        pair, step = b, 0
        if members_ptr is not None:
            pair, step = tl.load(members_ptr + b) >> 1, tl.load(step_ptr)
        q_cols = q_ptr + (offset(b, stride_qb) + offset(c, stride_qc))[None, :]
        k_cols = k_ptr + (offset(b, stride_kb) + offset(c, stride_kc))[None, :]
        v_cols = v_ptr + (offset(b, stride_vb) + offset(c, stride_vc))[None, :]
        weight_q = tl.full((DP,), 1.0, tl.float32)
        weight_k = tl.full((DP,), 1.0, tl.float32)
        if norm_q_ptr is not None:
            weight_q = tl.load(norm_q_ptr + c, mask=d < D, other=0.0).to(tl.float32)
        if norm_k_ptr is not None:
            weight_k = tl.load(norm_k_ptr + c, mask=d < D, other=0.0).to(tl.float32)

        if h_ptr is not None:
            k_low = expand_columns(
                b_ptr, streams_ptr, factors_ptr, stride_bn, stride_br, seed, step, pair, b, 1, c0, c0 + D, H * D,
                G, R, RANK, KP, CP, U_OUT_AT, WIDTH, DP,
            )  # fmt: skip
            v_low = expand_columns(
                b_ptr, streams_ptr, factors_ptr, stride_bn, stride_br, seed, step, pair, b, 2, c0, c0 + D, H * D,
                G, R, RANK, KP, CP, U_OUT_AT, WIDTH, DP,
            )  # fmt: skip
        first = tl.arange(0, 16)[None, :] == 0  # a sum is a product with 16 columns, of which the first is ones
        state = tl.zeros((DP, DP), tl.float32)
        key_sum = tl.zeros((DP, 16), tl.float32)
        for t0 in range(0, T, BLOCK_T):
            t = t0 + tl.arange(0, BLOCK_T)
            mask = (t[:, None] < T) & (d[None, :] < D)
            k = tl.load(k_cols + offset(t, stride_kt)[:, None], mask=mask, other=0.0).to(tl.float32)
            v = tl.load(v_cols + offset(t, stride_vt)[:, None], mask=mask, other=0.0)
            if h_ptr is not None:
                h = h_tile(h_ptr, b * T + t, t < T, 1, G, R, RANK, CP)
                k = low_rank_product(h, k_low, k, BLOCK_T, False, UPCAST, LOW_PRECISION)
                h = h_tile(h_ptr, b * T + t, t < T, 2, G, R, RANK, CP)
                v = low_rank_product(h, v_low, v.to(tl.float32), BLOCK_T, False, UPCAST, LOW_PRECISION)
            if norm_k_ptr is not None:
                k *= weight_k[None, :]
                k *= tl.load(rstd_ptr + offset(b, T) + t, mask=t < T, other=0.0)[:, None]
            upper, lower = split_bf16(tl.trans(relu(k)), SPLIT, UPCAST)
            if h_ptr is not None and SPLIT:
                v, v_rest = split_bf16(v, SPLIT, UPCAST)
                state = tl.dot(upper, v_rest, state)
            v = v.to(upper.dtype)
            ones = tl.where(first, tl.full((BLOCK_T, 1), 1.0, tl.float32), 0.0).to(upper.dtype)
            state = product(upper, v, lower, v, state, SPLIT, PRECISION)
            key_sum = product(upper, ones, lower, ones, key_sum, SPLIT, PRECISION)

        weight = tl.abs(weight_q)[:, None]
        s_upper, s_lower = split_bf16(state * weight, SPLIT, UPCAST)
        z_upper, z_lower = split_bf16(key_sum * weight, SPLIT, UPCAST)
        sign = tl.where(weight_q < 0, -1.0, 1.0)
        if next_streams_ptr is not None:
            next_columns = low_rank_columns(
                a_ptr, next_streams_ptr, None, stride_ar, stride_ak, seed, step, pair, c0, c0 + D,
                1, NEXT_R, RANK, KP, 16, DP, 0,
            )  # fmt: skip
            next_upper, next_lower = split_bf16(next_columns, SPLIT, UPCAST)
            partial_sums = sums_ptr + offset(pid % H, tl.num_programs(0) // H * T) * (NEXT_R + RANK)
        if h_ptr is not None:
            q_low = expand_columns(
                b_ptr, streams_ptr, factors_ptr, stride_bn, stride_br, seed, step, pair, b, 0, c0, c0 + D, H * D,
                G, R, RANK, KP, CP, U_OUT_AT, WIDTH, DP,
            )  # fmt: skip
        for t0 in range(0, T, BLOCK_T):
            t = t0 + tl.arange(0, BLOCK_T)
            mask = (t[:, None] < T) & (d[None, :] < D)
            q = tl.load(q_cols + offset(t, stride_qt)[:, None], mask=mask, other=0.0).to(tl.float32)
            total = tl.zeros((BLOCK_T, 16), tl.float32)
            y = tl.zeros((BLOCK_T, DP), tl.float32)
            if h_ptr is not None:
                h = h_tile(h_ptr, b * T + t, t < T, 0, G, R, RANK, CP)
                q = low_rank_product(h, q_low, q, BLOCK_T, False, UPCAST, LOW_PRECISION)
            if norm_q_ptr is not None:
                q *= sign[None, :]
            q = relu(q)
            if h_ptr is not None and SPLIT:
                q, q_rest = split_bf16(q, SPLIT, UPCAST)
                total, y = tl.dot(q_rest, z_upper, total), tl.dot(q_rest, s_upper, y)
            q = q.to(s_upper.dtype)
            total = tl.sum(product(q, z_upper, q, z_lower, total, SPLIT, PRECISION), axis=1)
            y = product(q, s_upper, q, s_lower, y, SPLIT, PRECISION) * (1 / (total + tiny))[:, None]
            y_ptrs = y_ptr + (offset(b, T) + t)[:, None] * (H * D) + c[None, :]
            y = y.to(y_ptr.dtype.element_ty)
            tl.store(y_ptrs, y, mask=mask)
            if next_streams_ptr is not None:
                g = tl.zeros((BLOCK_T, 16), tl.float32)
                g = product(y, next_upper, y, next_lower, g, SPLIT, PRECISION)
                column = tl.arange(0, 16)[None, :]
                places = (offset(b, T) + t)[:, None] * (NEXT_R + RANK) + column
                tl.store(partial_sums + places, g, mask=(t[:, None] < T) & (column < NEXT_R + RANK))


MAX_LOW_COLUMNS = 32
"""Largest r + k of a low-rank part. A program keeps the columns of its head in registers."""


def takes_low(adapters: Lora, rank: int) -> bool:
    """Whether `linear_attention` can add the low-rank parts of q, k and v."""
    return adapters.targets == 3 and adapters.r + rank <= MAX_LOW_COLUMNS


def attention_config(
    device: torch.device, *, dtype: torch.dtype, t: int, d: int, low: LowRank | None
) -> dict[str, int]:
    """Launch configuration for T tokens and heads of width d."""
    values = dict(dtype=configs.dtype_name(dtype), t=t, d=d)
    if low is None:
        found = configs.settings("linear_attention", device, **values)
    else:
        columns = low.adapters.r + low.perturbation.rank
        found = configs.settings("linear_attention_low", device, columns=columns, **values)
    return found | {"DP": max(16, triton.next_power_of_2(d))}


def rstd_config(device: torch.device, *, dtype: torch.dtype, c: int, t: int, low: LowRank | None) -> dict[str, int]:
    """Launch configuration for rows of C columns, T a batch row. With a low-rank part that of `rms_norm`."""
    if low is None:
        found = configs.settings("linear_attention_rstd", device, dtype=configs.dtype_name(dtype), c=c)
        return found | {"BLOCK_M": min(found["BLOCK_M"], triton.next_power_of_2(t))}
    found = norm_config(device, dtype=dtype, t=t, n=c, columns=low.adapters.r + low.perturbation.rank)
    return found | {"BLOCK_M": found.pop("BLOCK_T"), "BLOCK_C": found.pop("BLOCK_N")}


def linear_attention_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    heads: int,
    norm_q: torch.Tensor | None = None,
    norm_k: torch.Tensor | None = None,
    eps: float = 1e-5,
    next_lora: Lora | None = None,
    perturbation: MemberNoise | None = None,
    low: LowRank | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The Triton path: r of the rows of k, then one program for each head of a batch row.

    Arguments as in `linear_attention`. Deterministic. A batch row's result does not depend on the other rows of the
    batch. Sums over tokens are in fp32, in one order. A product has two bf16 parts if q is bf16, three tf32 parts if q
    is fp16, and is in fp32 otherwise.
    """
    _check(q, k, v, heads, norm_q, norm_k, eps, next_lora, perturbation, low)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, norm_q, norm_k)):
        raise RuntimeError("q, k, v: one requires a gradient, which the Triton path does not have")
    batch, t, c = q.shape
    d, y, partial_sums = c // heads, output(q, batch, t, c), None
    if low is not None:
        perturbation = low.perturbation
        if d % 4 and low.factors is None:
            raise ValueError(f"low: expected heads of a multiple of 4 columns, or stored factors, got {d} and none")
    if next_lora is not None:
        if d % 4:
            raise ValueError(f"next_lora: expected heads of a multiple of 4 columns, got {d}")
        columns = check_next_lora(next_lora, perturbation, q.dtype)
        partial_sums = torch.empty(heads, batch, t, columns, dtype=torch.float32, device=q.device)
    if y.numel() == 0:
        return y.to(q.dtype) if next_lora is None else (y.to(q.dtype), partial_sums)
    rstd, a = None, None if next_lora is None else next_lora.a
    noise = low_rank_arguments(low, None if next_lora is None else perturbation, c)
    if norm_k is not None:
        rstd = torch.empty(batch * t, dtype=torch.float32, device=q.device)
        block = rstd_config(q.device, dtype=q.dtype, c=c, t=t, low=low)
        with torch.cuda.device_of(q):
            _rstd_kernel[(batch, triton.cdiv(t, block["BLOCK_M"]))](
                k, rstd_ptr=rstd, T=t, stride_xb=k.stride(0), stride_xt=k.stride(1), stride_xc=k.stride(2),
                eps=eps, C=c, TARGET=1, PRECISION=low_precision(q.dtype), **noise, **block,
            )  # fmt: skip
    config = attention_config(q.device, dtype=q.dtype, t=t, d=d, low=low)
    with torch.cuda.device_of(q):
        _attention_kernel[(batch * heads,)](
            q, k, v, None if norm_q is None else norm_q.contiguous(), None if norm_k is None else norm_k.contiguous(),
            rstd, y, a_ptr=a, next_streams_ptr=None if next_lora is None else next_lora.streams, sums_ptr=partial_sums,
            stride_qb=q.stride(0), stride_qt=q.stride(1), stride_qc=q.stride(2),
            stride_kb=k.stride(0), stride_kt=k.stride(1), stride_kc=k.stride(2),
            stride_vb=v.stride(0), stride_vt=v.stride(1), stride_vc=v.stride(2),
            stride_ar=0 if a is None else a.stride(0), stride_ak=0 if a is None else a.stride(1),
            tiny=1e-15 if norm_q is None else 1e-15 * math.sqrt(eps),
            T=t, H=heads, D=d, NEXT_R=0 if next_lora is None else next_lora.r, LOW_PRECISION=low_precision(q.dtype),
            **noise, **exact_products(q.dtype), **config,
        )  # fmt: skip
    y = y.to(q.dtype)
    return y if next_lora is None else (y, partial_sums)


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    heads: int,
    norm_q: torch.Tensor | None = None,
    norm_k: torch.Tensor | None = None,
    eps: float = 1e-5,
    next_lora: Lora | None = None,
    perturbation: MemberNoise | None = None,
    low: LowRank | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """ReLU linear attention with RMS norm across heads. Triton on a GPU, `linear_attention_ref` elsewhere.

    A batch row's result does not depend on the other rows of the batch.

    Args:
        q, k, v: [B, T, H * D], fp32, bf16 or fp16, any strides, such as slices of one stacked projection. D <= 64.
        heads: H.
        norm_q, norm_k: weights [H * D] of the RMS norm over all heads, fp32, bf16 or fp16. None: no norm.
        eps: added to the mean square, positive.
        next_lora: One target that reads y. Then r + k is at most 16, q is bf16, and D is a multiple of 4.
        perturbation: The noise of the batch. Needed with `next_lora`, unless `low` has it.
        low: The low-rank part of q, k and v: three targets of H * D columns, r + k at most 32. Without stored factors D
            is a multiple of 4. None: q, k and v are complete.

    Returns:
        y [B, T, H * D], dtype of q. With `next_lora` also the partial sums that `mix` reads, fp32 [P, B, T, r + k],
        P >= 1.

    Raises:
        ValueError: An argument has the wrong shape, dtype or device, or is out of range. The message names it.
    """
    op = linear_attention_triton if uses_triton(q.device) else linear_attention_ref
    options = dict(norm_q=norm_q, norm_k=norm_k, eps=eps, next_lora=next_lora, perturbation=perturbation, low=low)
    return op(q, k, v, heads=heads, **options)


def linear_attention_ref(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    heads: int,
    norm_q: torch.Tensor | None = None,
    norm_k: torch.Tensor | None = None,
    eps: float = 1e-5,
    next_lora: Lora | None = None,
    perturbation: MemberNoise | None = None,
    low: LowRank | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Linear attention of all heads, in fp32, rounded once at the end.

    diffusers first rounds the normalised q and k to the storage dtype. In fp32 the formulas are equal.

    Arguments as in `linear_attention`.
    """
    _check(q, k, v, heads, norm_q, norm_k, eps, next_lora, perturbation, low)
    dtype = q.dtype
    if low is not None:
        perturbation, parts = low.perturbation, low_rank_ref(low, q.shape[-1]).chunk(3, -1)
        q, k, v = (x.float() + part for x, part in zip((q, k, v), parts, strict=True))

    def features(x, weight):  # [B, H, T, D]
        x = x.float()
        if weight is not None:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()
        return x.relu().unflatten(-1, (heads, -1)).transpose(1, 2)

    queries, keys = features(q, norm_q), features(k, norm_k)
    state = keys.mT @ v.float().unflatten(-1, (heads, -1)).transpose(1, 2)  # [B, H, D, D]
    total = queries @ keys.sum(2).unsqueeze(-1)  # [B, H, T, 1]
    y = (queries @ state / (total + 1e-15)).transpose(1, 2).flatten(2).to(dtype)
    return y if next_lora is None else (y, partial_sums_ref(y, next_lora, perturbation))


def _check(q, k, v, heads, norm_q, norm_k, eps, next_lora, perturbation, low) -> None:
    def fail(name, expected, tensor):
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{name}: expected {expected}, got {dtype} {list(tensor.shape)} on {tensor.device}")

    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    if q.dim() != 3 or q.dtype not in dtypes:
        fail("q", "float32, bfloat16 or float16 [B, T, H * D]", q)
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape or x.dtype != q.dtype or x.device != q.device:
            fail(name, f"{str(q.dtype).removeprefix('torch.')} {list(q.shape)} on {q.device}", x)
    c = q.shape[-1]
    if heads < 1 or c < heads or c % heads or c // heads > 64:
        raise ValueError(f"heads: expected a divisor of {c} that leaves heads of 1 to 64, got {heads}")
    for name, weight in (("norm_q", norm_q), ("norm_k", norm_k)):
        if weight is not None and (weight.shape != (c,) or weight.dtype not in dtypes or weight.device != q.device):
            fail(name, f"float32, bfloat16 or float16 [{c}] on {q.device}", weight)
    if not eps > 0:
        raise ValueError(f"eps: expected a positive number, got {eps}")
    check_low_rank(low, q.shape, q.device, targets=3)
    if low is not None and not takes_low(low.adapters, low.perturbation.rank):
        columns = low.adapters.r + low.perturbation.rank
        raise ValueError(f"low: expected r + k of at most {MAX_LOW_COLUMNS}, got {columns}; add it in the linear")
    if low is not None and perturbation is not None and perturbation is not low.perturbation:
        raise ValueError("perturbation: expected the same object as low's, or None, got another")
    if next_lora is not None:
        perturbation = low.perturbation if perturbation is None and low is not None else perturbation
        if perturbation is None:
            raise ValueError("perturbation: expected the noise of the batch beside next_lora, got None")
        check_noise(perturbation, len(q), q.device)
        check_adapters("next_lora", next_lora, c, None, q.device)
        check_next_lora(next_lora, perturbation, q.dtype)
        if c // heads % 4:
            raise ValueError(f"next_lora: expected heads of a multiple of 4 columns, got {c // heads}")
