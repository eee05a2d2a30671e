"""ReLU linear attention with RMS norm across heads: SANA's self-attention between the projections.

    q'_t = relu(w_q q_t / sqrt(mean q_t^2 + eps)),   k'_t alike         means over all H D columns, r = 1 / sqrt(...)
    S = sum_t k'_t v_t^T,   z = sum_t k'_t                              per batch row and head
    y_t = q'_t S / (q'_t z + 1e-15)
    g_h = y_h [A^T | V]_h                    if asked: of the linear that reads y, head h's share of its shrink

q's own rstd cancels, so q is read once: p = relu(sign(w_q) q) stands for q', |w_q| goes into S and z, and 1e-15 shrinks
by sqrt(eps), the least that 1 / rstd can be. That differs from the formula where q'_t z is below about 1e-9, or where
q_t is not finite: its NaN stays in its own head.

Rounding: v and p are bf16 as they are, k', S and z fp32, multiplied as two bf16 halves each, 16 bits. Emulated in torch
at D = 32 with T 256 and 1024, against fp64 and before the last rounding: 4e-6 of the norm; tf32 products 2e-4, rounding
q' and k' to bf16 as diffusers does 1.5e-3, the last rounding 1.7e-3.

Bytes: one pass of k for r, then q, k and v once, y written: five rows of H D where four are the least, and 8 M of r.
Programs run from the last batch row to the first, as the first pass leaves the end of k in L2. Instructions, in sm_90
machine code: 422 in each of two warps for 32 tokens of a head of 32. On paper, for B = 64, T = 1024, H = 70 on an H100:
0.49 ms of memory, 0.13 ms of issue slots; not measured.

Legend: B batch rows, T tokens, M = B T, H heads, D their width (DP padded), C = H D.

Source: Katharopoulos et al., "Transformers are RNNs" (arXiv 2006.16236), eq. 4-6; Xie et al., SANA (arXiv 2410.10629).
"""

import math

import torch

from esengine.kernels import configs
from esengine.kernels.launch import exact_products, output
from esengine.kernels.noise import padded_rank, signed64, step_tensor, triton, uses_triton
from esengine.kernels.operands import Lora, MemberNoise
from esengine.kernels.shrink import check_then, shares_ref

if triton is not None:
    import triton.language as tl

    from esengine.kernels.low_rank import halves, low_rank_columns
    from esengine.kernels.noise import offset

    @triton.jit
    def relu(x):
        """relu, NaN where x is."""
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)

    @triton.jit
    def product(a, b, a_rest, b_rest, acc, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
        """acc + a b, and if split + a_rest b_rest, in fp32."""
        if SPLIT:
            acc = tl.dot(a_rest, b_rest, acc)
        return tl.dot(a, b, acc, input_precision=PRECISION)

    @triton.jit
    def _rstd_kernel(
        x_ptr, rstd_ptr,
        M, T,
        stride_xb, stride_xt, stride_xc,
        eps,
        C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    ):  # fmt: skip
        m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        x_rows = x_ptr + (offset(m // T, stride_xb) + offset(m % T, stride_xt))[:, None]
        squares = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        for c0 in range(0, C, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            mask = (m[:, None] < M) & (c[None, :] < C)
            x = tl.load(x_rows + offset(c, stride_xc)[None, :], mask=mask, other=0.0).to(tl.float32)
            squares += x * x
        tl.store(rstd_ptr + m, 1 / tl.sqrt(tl.sum(squares, axis=1) / C + eps), mask=m < M)

    @triton.jit(do_not_specialize=["seed"], do_not_specialize_on_alignment=["members_ptr", "step_ptr"])
    def _attention_kernel(
        q_ptr, k_ptr, v_ptr, norm_q_ptr, norm_k_ptr, rstd_ptr, y_ptr,
        a_ptr, then_ptr, members_ptr, step_ptr, shares_ptr,
        stride_qb, stride_qt, stride_qc, stride_kb, stride_kt, stride_kc, stride_vb, stride_vt, stride_vc,
        stride_ar, stride_ak,
        tiny,
        seed: tl.int64,
        T: tl.constexpr, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
        SPLIT: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
        R: tl.constexpr, RANK: tl.constexpr, KP: tl.constexpr, BLOCK_T: tl.constexpr,
    ):  # fmt: skip
        pid = tl.num_programs(0) - 1 - tl.program_id(0)
        b, d = pid // H, tl.arange(0, DP)
        c = pid % H * D + d
        q_cols = q_ptr + (offset(b, stride_qb) + offset(c, stride_qc))[None, :]
        k_cols = k_ptr + (offset(b, stride_kb) + offset(c, stride_kc))[None, :]
        v_cols = v_ptr + (offset(b, stride_vb) + offset(c, stride_vc))[None, :]
        weight_q = tl.full((DP,), 1.0, tl.float32)
        weight_k = tl.full((DP,), 1.0, tl.float32)
        if norm_q_ptr is not None:
            weight_q = tl.load(norm_q_ptr + c, mask=d < D, other=0.0).to(tl.float32)
        if norm_k_ptr is not None:
            weight_k = tl.load(norm_k_ptr + c, mask=d < D, other=0.0).to(tl.float32)

        first = tl.arange(0, 16)[None, :] == 0  # a sum over rows or columns is a product with one column of 16
        state = tl.zeros((DP, DP), tl.float32)
        keys = tl.zeros((DP, 16), tl.float32)
        for t0 in range(0, T, BLOCK_T):
            t = t0 + tl.arange(0, BLOCK_T)
            mask = (t[:, None] < T) & (d[None, :] < D)
            k = tl.load(k_cols + offset(t, stride_kt)[:, None], mask=mask, other=0.0).to(tl.float32)
            v = tl.load(v_cols + offset(t, stride_vt)[:, None], mask=mask, other=0.0)
            if norm_k_ptr is not None:
                k *= weight_k[None, :]
                k *= tl.load(rstd_ptr + offset(b, T) + t, mask=t < T, other=0.0)[:, None]
            upper, lower = halves(tl.trans(relu(k)), SPLIT, UPCAST)
            v = v.to(upper.dtype)
            ones = tl.where(first, tl.full((BLOCK_T, 1), 1.0, tl.float32), 0.0).to(upper.dtype)
            state = product(upper, v, lower, v, state, SPLIT, PRECISION)
            keys = product(upper, ones, lower, ones, keys, SPLIT, PRECISION)

        weight = tl.abs(weight_q)[:, None]
        s_upper, s_lower = halves(state * weight, SPLIT, UPCAST)
        z_upper, z_lower = halves(keys * weight, SPLIT, UPCAST)
        sign = tl.where(weight_q < 0, -1.0, 1.0)
        if then_ptr is not None:
            pair, step, c0 = tl.load(members_ptr + b) >> 1, tl.load(step_ptr), pid % H * D
            own = low_rank_columns(
                a_ptr, then_ptr, None, stride_ar, stride_ak, seed, step, pair, c0, c0 + D, 1, R, RANK, KP, 16, DP, 0
            )
            own_upper, own_lower = halves(own, SPLIT, UPCAST)
            shares = shares_ptr + offset(pid % H, tl.num_programs(0) // H * T) * (R + RANK)
        for t0 in range(0, T, BLOCK_T):
            t = t0 + tl.arange(0, BLOCK_T)
            mask = (t[:, None] < T) & (d[None, :] < D)
            q = tl.load(q_cols + offset(t, stride_qt)[:, None], mask=mask, other=0.0).to(tl.float32)
            if norm_q_ptr is not None:
                q *= sign[None, :]
            q = relu(q).to(s_upper.dtype)
            total = tl.zeros((BLOCK_T, 16), tl.float32)
            total = tl.sum(product(q, z_upper, q, z_lower, total, SPLIT, PRECISION), axis=1)
            y = tl.zeros((BLOCK_T, DP), tl.float32)
            y = product(q, s_upper, q, s_lower, y, SPLIT, PRECISION) * (1 / (total + tiny))[:, None]
            y_ptrs = y_ptr + (offset(b, T) + t)[:, None] * (H * D) + c[None, :]
            y = y.to(y_ptr.dtype.element_ty)
            tl.store(y_ptrs, y, mask=mask)
            if then_ptr is not None:
                g = tl.zeros((BLOCK_T, 16), tl.float32)
                g = product(y, own_upper, y, own_lower, g, SPLIT, PRECISION)
                column = tl.arange(0, 16)[None, :]
                places = (offset(b, T) + t)[:, None] * (R + RANK) + column
                tl.store(shares + places, g, mask=(t[:, None] < T) & (column < R + RANK))


def attention_config(device: torch.device, *, dtype: torch.dtype, t: int, d: int) -> dict[str, int]:
    """Launch configuration for T tokens and heads of width d."""
    found = configs.settings("linear_attention", device, dtype=configs.named(dtype), t=t, d=d)
    return found | {"DP": max(16, triton.next_power_of_2(d))}


def rstd_config(device: torch.device, *, dtype: torch.dtype, c: int) -> dict[str, int]:
    """Launch configuration for rows of C columns."""
    return configs.settings("linear_attention_rstd", device, dtype=configs.named(dtype), c=c)


def linear_attention_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    heads: int,
    norm_q: torch.Tensor | None = None,
    norm_k: torch.Tensor | None = None,
    eps: float = 1e-5,
    then: Lora | None = None,
    perturbation: MemberNoise | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The Triton path: rstd of k's rows, then one program for each head of a batch row. Arguments as in the reference.

    Deterministic; a batch row's result does not depend on its batch mates. Sums over tokens are in fp32, in one order.
    Products are of bf16 halves where q is bf16, of three tf32 parts where it is fp16, and exact where it is fp32.
    """
    _check(q, k, v, heads, norm_q, norm_k, eps)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, norm_q, norm_k)):
        raise RuntimeError("q, k, v: one requires a gradient, which the Triton path does not have")
    batch, t, c = q.shape
    y = output(q, batch, t, c)
    shares, keys = None, perturbation or MemberNoise(None, 0, 0, 0.0, 1)
    if then is not None:
        if c // heads % 4:
            raise ValueError(f"then: expected heads of a multiple of 4 columns, got {c // heads}")
        shares = torch.empty(heads, batch, t, check_then(then, keys, q.dtype), dtype=torch.float32, device=q.device)
    if y.numel() == 0:
        return y.to(q.dtype) if then is None else (y.to(q.dtype), shares)
    rstd, a = None, None if then is None else then.a
    if norm_k is not None:
        rstd = torch.empty(batch * t, dtype=torch.float32, device=q.device)
        block = rstd_config(q.device, dtype=q.dtype, c=c)
        with torch.cuda.device_of(q):
            _rstd_kernel[(triton.cdiv(batch * t, block["BLOCK_M"]),)](
                k, rstd, M=batch * t, T=t, stride_xb=k.stride(0), stride_xt=k.stride(1), stride_xc=k.stride(2),
                eps=eps, C=c, **block,
            )  # fmt: skip
    config = attention_config(q.device, dtype=q.dtype, t=t, d=c // heads)
    with torch.cuda.device_of(q):
        _attention_kernel[(batch * heads,)](
            q, k, v, None if norm_q is None else norm_q.contiguous(), None if norm_k is None else norm_k.contiguous(),
            rstd, y, a, None if then is None else then.streams, keys.members,
            None if then is None else step_tensor(keys.step, q.device), shares,
            stride_qb=q.stride(0), stride_qt=q.stride(1), stride_qc=q.stride(2),
            stride_kb=k.stride(0), stride_kt=k.stride(1), stride_kc=k.stride(2),
            stride_vb=v.stride(0), stride_vt=v.stride(1), stride_vc=v.stride(2),
            stride_ar=0 if a is None else a.stride(0), stride_ak=0 if a is None else a.stride(1),
            seed=signed64(keys.seed), tiny=1e-15 if norm_q is None else 1e-15 * math.sqrt(eps),
            T=t, H=heads, D=c // heads, R=0 if then is None else then.r, RANK=keys.rank, KP=padded_rank(keys.rank),
            **exact_products(q.dtype), **config,
        )  # fmt: skip
    y = y.to(q.dtype)
    return y if then is None else (y, shares)


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    heads: int,
    norm_q: torch.Tensor | None = None,
    norm_k: torch.Tensor | None = None,
    eps: float = 1e-5,
    then: Lora | None = None,
    perturbation: MemberNoise | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`linear_attention_ref` by the fastest way the device has: Triton on a GPU, the reference elsewhere."""
    op = linear_attention_triton if uses_triton(q.device) else linear_attention_ref
    options = dict(norm_q=norm_q, norm_k=norm_k, eps=eps, then=then, perturbation=perturbation)
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
    then: Lora | None = None,
    perturbation: MemberNoise | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Linear attention of all heads, in fp32, rounded once at the end.

    diffusers rounds the normed q and k to the storage dtype first; in fp32 the two are the same formula.

    Args:
        q, k, v: [B, T, H * D], fp32, bf16 or fp16, any strides: slices of one stacked projection are welcome. D <= 64.
        heads: H.
        norm_q, norm_k: weights [H * D] of the RMS norm over all heads, fp32, bf16 or fp16, or None for no norm.
        eps: added to the mean square, positive.
        then: A target that reads y, with r + k of at most 16; with the `perturbation` of the batch. D a multiple of 4.

    Returns:
        y [B, T, H * D], dtype of q; with `then` also its shares for `mix`, fp32 [P, B, T, r + k], P >= 1.

    Raises:
        ValueError: an argument is of another shape, dtype or device, or out of range.
    """
    _check(q, k, v, heads, norm_q, norm_k, eps)

    def features(x, weight):  # [B, H, T, D]
        x = x.float()
        if weight is not None:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()
        return x.relu().unflatten(-1, (heads, -1)).transpose(1, 2)

    queries, keys = features(q, norm_q), features(k, norm_k)
    state = keys.mT @ v.float().unflatten(-1, (heads, -1)).transpose(1, 2)  # [B, H, D, D]
    total = queries @ keys.sum(2).unsqueeze(-1)  # [B, H, T, 1]
    y = (queries @ state / (total + 1e-15)).transpose(1, 2).flatten(2).to(q.dtype)
    return y if then is None else (y, shares_ref(y, then, perturbation))


def _check(q, k, v, heads, norm_q, norm_k, eps) -> None:
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
