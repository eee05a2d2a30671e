"""One linear, a whole population: every batch row goes through its own member's perturbed LoRA in one batched call.

    A_i = A + c U V^T        B_i = B + c U' V'^T        y_i = x_i W^T + bias + s (x_i A_i^T) B_i^T

Never formed: A_i and B_i, whose rounding would eat the noise. Instead, in fp32, with the noise in columns of its own,

    g = x [A^T | V]                                 shrink: r + k columns
    h = s g Mix,   Mix = [[I, V'], [c U^T, c U^T V']]
    y = x W^T + bias + h [B | c U']^T               expand: rounded once

Direct mode (r = 0, EGGROLL on W itself): y_i = x_i W^T + bias + c (x_i V) U'^T.

Legend: B batch rows, T rows a batch row (tokens), M = B T, K in, N out, r LoRA rank, k noise rank (kp padded),
c = sign * sigma / sqrt(k), s = lora_alpha / r. Noise by contract v1, `esengine.kernels.noise`.

Source: Sarkar et al., "Evolution Strategies at the Hyperscale" (arXiv 2511.16652), eq. 4-6; Hu et al., LoRA (arXiv
2106.09685).
"""

import torch
import torch.nn.functional as F

from esengine.kernels.noise import (
    INTERPRET,
    Streams,
    factor,
    factor_ref,
    key_words,
    padded_rank,
    signed64,
    signed_sigma,
    triton,
    uses_triton,
)

if triton is not None:
    import triton.language as tl

    from esengine.kernels.noise import noise_rows, offset

    @triton.jit
    def column(tile, j, KP: tl.constexpr):
        """float32 [ROWS]: column j of a [ROWS, KP] tile."""
        return tl.sum(tl.where(tl.arange(0, KP)[None, :] == j, tile, 0.0), axis=1)

    @triton.jit(do_not_specialize=["step", "stream_av", "stream_au", "stream_bv"])
    def _shrink_kernel(
        x_ptr, a_ptr, members_ptr, h_ptr,
        T,
        stride_xb, stride_xt, stride_xk, stride_ar, stride_ak,
        sigma, scale,
        seed: tl.int64, step: tl.int64, stream_av: tl.int64, stream_au: tl.int64, stream_bv: tl.int64,
        K: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, RANK: tl.constexpr, KP: tl.constexpr,
        BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        b = tl.program_id(0)
        t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
        member = tl.load(members_ptr + b)
        pair = member >> 1
        c = sigma * (1 - 2 * (member & 1)).to(tl.float32)
        x_rows = x_ptr + offset(b, stride_xb) + offset(t, stride_xt)[:, None]

        r = tl.arange(0, RP)
        j = tl.arange(0, KP)
        g_v = tl.zeros((BLOCK_T, KP), tl.float32)
        g_a = tl.zeros((BLOCK_T, RP), tl.float32)
        for k0 in range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            mask = (t[:, None] < T) & (k[None, :] < K)
            x = tl.load(x_rows + offset(k, stride_xk)[None, :], mask=mask, other=0.0).to(tl.float32)
            v = noise_rows(seed, step, stream_av, pair, k0, BLOCK_K, KP)
            g_v += tl.sum(x[:, :, None] * v[None, :, :], axis=1)
            if R > 0:
                a_ptrs = a_ptr + offset(k, stride_ak)[:, None] + offset(r, stride_ar)[None, :]
                a = tl.load(a_ptrs, mask=(k[:, None] < K) & (r[None, :] < R), other=0.0)
                if BLOCK_T >= 16:
                    g_a = tl.dot(x, a, g_a, input_precision=PRECISION)
                else:
                    g_a += tl.sum(x[:, :, None] * a[None, :, :], axis=1)

        h_rows = h_ptr + offset(b * T + t, R + RANK)[:, None]
        stored = (t[:, None] < T) & (j[None, :] < RANK)
        if R > 0:
            real = (r[:, None] < R) & (j[None, :] < RANK)
            u = tl.where(real, noise_rows(seed, step, stream_au, pair, 0, RP, KP), 0.0)
            v = tl.where(real, noise_rows(seed, step, stream_bv, pair, 0, RP, KP), 0.0)
            h = scale * (g_a + c * tl.sum(g_v[:, None, :] * u[None, :, :], axis=2))
            tl.store(h_rows + r[None, :], h, mask=(t[:, None] < T) & (r[None, :] < R))
            tl.store(h_rows + R + j[None, :], c * tl.sum(h[:, :, None] * v[None, :, :], axis=1), mask=stored)
        else:
            tl.store(h_rows + j[None, :], c * g_v, mask=stored)

    @triton.jit(do_not_specialize=["step", "stream_bu"])
    def _expand_kernel(
        x_ptr, w_ptr, bias_ptr, b_ptr, h_ptr, members_ptr, y_ptr,
        M, N, T,
        stride_xb, stride_xt, stride_xk, stride_wn, stride_wk, stride_bn, stride_br,
        seed: tl.int64, step: tl.int64, stream_bu: tl.int64,
        K: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, KP: tl.constexpr, SLOTS: tl.constexpr,
        HAS_BIAS: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    ):  # fmt: skip
        # programs of one group of row tiles share columns of W in L2
        pid, tiles_m, tiles_n = tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
        group = pid // (GROUP_M * tiles_n)
        group_m = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
        tile_m = group * GROUP_M + (pid % (GROUP_M * tiles_n)) % group_m
        tile_n = (pid % (GROUP_M * tiles_n)) // group_m

        m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        row = m // T  # the batch row, and with it the member, of each row of the tile
        x_rows = x_ptr + (offset(row, stride_xb) + offset(m % T, stride_xt))[:, None]
        w_cols = w_ptr + offset(n, stride_wn)[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k0 in range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            x_mask, w_mask = (m[:, None] < M) & (k[None, :] < K), (k[:, None] < K) & (n[None, :] < N)
            x = tl.load(x_rows + offset(k, stride_xk)[None, :], mask=x_mask, other=0.0)
            w = tl.load(w_cols + offset(k, stride_wk)[:, None], mask=w_mask, other=0.0)
            if UPCAST:
                x, w = x.to(tl.float32), w.to(tl.float32)
            acc = tl.dot(x, w, acc, input_precision=PRECISION)

        h_rows = h_ptr + offset(m, R + RANK)
        for j in range(R):
            h = tl.load(h_rows + j, mask=m < M, other=0.0)
            acc += h[:, None] * tl.load(b_ptr + offset(n, stride_bn) + j * stride_br, mask=n < N, other=0.0)[None, :]
        first = tile_m * BLOCK_M // T
        for slot in range(SLOTS):  # the tile may straddle members
            b = first + slot
            pair = tl.load(members_ptr + b, mask=b * T < M, other=0) >> 1
            u = noise_rows(seed, step, stream_bu, pair, tile_n * BLOCK_N, BLOCK_N, KP)
            for i in tl.static_range(RANK):
                h = tl.load(h_rows + R + i, mask=(m < M) & (row == b), other=0.0)
                acc += h[:, None] * column(u, i, KP)[None, :]
        if HAS_BIAS:
            acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        y_ptrs = y_ptr + offset(m, N)[:, None] + n[None, :]
        tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


def shrink_config(t: int, kp: int) -> dict[str, int]:
    """Launch configuration of the shrink for T rows a member: below 16, the tensor cores' minimum, it sums."""
    block_t = min(32, triton.next_power_of_2(t))
    return {"BLOCK_T": block_t, "BLOCK_K": max(16, 32 // kp), "num_warps": 4}


def expand_config(t: int, dtype: torch.dtype) -> dict[str, int]:
    """Launch configuration of the expanding GEMM for T rows a member.

    Up to 16 rows a member, a tile of 16 rows: it touches few members, each of which costs it a pass of noise. Nothing
    here depends on the batch, and with it the order of a row's sum.
    """
    block_m = 16 if t <= 16 else 64 if t <= 128 else 128
    wide = dtype != torch.float32
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": 128 if wide and block_m > 16 else 64,
        "BLOCK_K": 64 if wide else 32,
        "GROUP_M": 8,
        "num_warps": 8 if block_m == 128 else 4,
        "num_stages": 3,
    }


def population_linear_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    *,
    members: torch.Tensor,
    streams: Streams,
    seed: int,
    step: int,
    sigma: float,
    rank: int,
    scale: float = 1.0,
) -> torch.Tensor:
    """The Triton path: shrink, then a GEMM whose epilogue rebuilds U' and expands. Arguments as in the reference.

    Deterministic; a row's result depends on T, not on its batch mates. Noise and the LoRA columns stay in fp32
    (three tf32 products where x is of half precision).
    """
    _check(x, weight, bias, a, b, members)
    key_words(seed, step)
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("x: requires a gradient, which the Triton path does not have; call it under torch.no_grad")
    (n, k), r, kp = weight.shape, 0 if a is None else len(a), padded_rank(rank)
    # under the interpreter a store to bf16 truncates, so it writes fp32 and torch rounds
    y = torch.empty(*x.shape[:-1], n, device=x.device, dtype=torch.float32 if INTERPRET else x.dtype)
    if y.numel() == 0:
        return y.to(x.dtype)
    x_btk = x.reshape(len(x), -1, k)
    batch, t, _ = x_btk.shape
    m, members = batch * t, members.contiguous()
    h = torch.empty(m, r + rank, dtype=torch.float32, device=x.device)
    noise = dict(seed=signed64(seed), step=step)
    ieee = x.dtype == torch.float32
    strides = dict(zip(("stride_xb", "stride_xt", "stride_xk"), x_btk.stride(), strict=True))

    config = shrink_config(t, kp)
    grid = (batch, triton.cdiv(t, config["BLOCK_T"]))
    with torch.cuda.device_of(x):
        _shrink_kernel[grid](
            x_btk, x_btk if a is None else a, members, h,
            T=t, **strides,
            stride_ar=0 if a is None else a.stride(0), stride_ak=0 if a is None else a.stride(1),
            sigma=float(signed_sigma(torch.tensor(0), sigma, rank)), scale=scale,
            **noise, stream_av=streams.a_v, stream_au=streams.a_u, stream_bv=streams.b_v,
            K=k, R=r, RP=max(16, padded_rank(max(r, 1))), RANK=rank, KP=kp,
            PRECISION="ieee" if ieee else "tf32x3", **config,
        )  # fmt: skip

    config = expand_config(t, x.dtype)
    block_m = config["BLOCK_M"]
    slots = 1 if t % block_m == 0 else (block_m + t - 2) // t + 1  # batch rows that one tile can touch
    grid = (triton.cdiv(m, block_m) * triton.cdiv(n, config["BLOCK_N"]),)
    with torch.cuda.device_of(x):
        _expand_kernel[grid](
            x_btk, weight, weight if bias is None else bias.contiguous(), h if b is None else b, h, members, y,
            M=m, N=n, T=t, **strides,
            stride_wn=weight.stride(0), stride_wk=weight.stride(1),
            stride_bn=0 if b is None else b.stride(0), stride_br=0 if b is None else b.stride(1),
            **noise, stream_bu=streams.b_u,
            K=k, R=r, RANK=rank, KP=kp, SLOTS=slots, HAS_BIAS=bias is not None,
            UPCAST=INTERPRET, PRECISION="ieee" if ieee else "tf32", **config,
        )  # fmt: skip
    return y.to(x.dtype)


def population_linear_torch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    *,
    factors: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor],
    c: torch.Tensor,
    scale: float = 1.0,
) -> torch.Tensor:
    """The batched torch path: one shared GEMM, and the low-rank columns of all members in three small batched products.

    Args:
        x, weight, bias, a, b, scale: as in `population_linear_ref`.
        factors: V [B, in, k], U [B, r, k], V' [B, r, k], U' [B, out, k], fp32, of each batch row's pair; U and V' are
            None in the direct form.
        c: fp32 [B], sign * sigma / sqrt(k) of each batch row.

    Returns:
        [B, ..., out], dtype of x.
    """
    v, u, v_out, u_out = factors
    y = F.linear(x, weight, bias)
    if y.numel() == 0:
        return y
    batch, n = len(x), len(weight)
    x_bkt = x.reshape(batch, -1, x.shape[-1]).float().mT
    c = c[:, None, None]
    if a is None:
        h = c * torch.bmm(v.mT, x_bkt)
        expand = u_out.mT
    else:
        r = len(a)
        g = torch.bmm(torch.cat((a.expand(batch, -1, -1), v.mT), 1), x_bkt)  # [B, r + k, T]
        h = torch.baddbmm(g[:, :r], c * u, g[:, r:], beta=scale, alpha=scale)
        h = torch.cat((h, torch.bmm((c * v_out).mT, h)), 1)
        expand = torch.cat((b.T.expand(batch, -1, -1), u_out.mT), 1)  # [B, r + k, out]
    y_btn = y.view(batch, -1, n)
    if x.dtype == torch.float32:
        y_btn.baddbmm_(h.mT, expand)
        return y
    return torch.baddbmm(y_btn.float(), h.mT, expand).to(x.dtype).view(y.shape)


def population_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    *,
    members: torch.Tensor,
    streams: Streams,
    seed: int,
    step: int,
    sigma: float,
    rank: int,
    scale: float = 1.0,
) -> torch.Tensor:
    """`population_linear_ref` by the fastest way the device has: Triton on a GPU, batched torch elsewhere."""
    settings = dict(members=members, seed=seed, step=step, streams=streams, sigma=sigma, rank=rank, scale=scale)
    if uses_triton(x.device):
        return population_linear_triton(x, weight, bias, a, b, **settings)
    _check(x, weight, bias, a, b, members)
    pairs, slots = torch.unique(members >> 1, return_inverse=True)
    noise = dict(seed=seed, step=step, pairs=pairs, rank=rank)
    lengths = (weight.shape[1], 0, 0, len(weight)) if a is None else (weight.shape[1], len(a), len(a), len(weight))
    factors = [factor(stream=s, length=n, **noise)[slots] if n else None for s, n in zip(streams, lengths, strict=True)]
    c = signed_sigma(members, sigma, rank)
    return population_linear_torch(x, weight, bias, a, b, factors=tuple(factors), c=c, scale=scale)


def population_linear_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    *,
    members: torch.Tensor,
    streams: Streams,
    seed: int,
    step: int,
    sigma: float,
    rank: int,
    scale: float = 1.0,
) -> torch.Tensor:
    """Each batch row through its own member's LoRA, one member at a time with its weights formed, in fp32.

    Args:
        x: [B, ..., in], fp32, bf16 or fp16, any strides.
        weight: [out, in], dtype of x.
        bias: [out] or None.
        a: LoRA A [r, in] fp32, or None for the direct form.
        b: LoRA B [out, r] fp32, or None for the direct form.
        members: int64 [B], the member of each batch row, in [0, 2^33).
        streams: stream ids of the linear's factors, from `linear_streams`.
        seed, step: of the noise contract.
        sigma: noise scale.
        rank: noise rank k.
        scale: s = lora_alpha / r.

    Returns:
        [B, ..., out], dtype of x.
    """
    _check(x, weight, bias, a, b, members)
    rows = []
    for x_row, member in zip(x.float(), members.tolist(), strict=True):
        c = float(signed_sigma(torch.tensor(member), sigma, rank))
        noise = dict(seed=seed, step=step, pairs=torch.tensor([member // 2], device=x.device), rank=rank)
        v = factor_ref(stream=streams.a_v, length=weight.shape[1], **noise)[0]
        u_out = factor_ref(stream=streams.b_u, length=weight.shape[0], **noise)[0]
        if a is None:
            rows.append(F.linear(x_row, weight.float() + c * u_out @ v.T, _float(bias)))
            continue
        a_member = a + c * factor_ref(stream=streams.a_u, length=len(a), **noise)[0] @ v.T
        b_member = b + c * u_out @ factor_ref(stream=streams.b_v, length=len(a), **noise)[0].T
        rows.append(F.linear(x_row, weight.float(), _float(bias)) + scale * (x_row @ a_member.T) @ b_member.T)
    return torch.stack(rows).to(x.dtype) if rows else x.new_empty(*x.shape[:-1], len(weight))


def _float(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.float()


def _check(x, weight, bias, a, b, members) -> None:
    def fail(name, expected, tensor):
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{name}: expected {expected}, got {dtype} {list(tensor.shape)} on {tensor.device}")

    if weight.dim() != 2:
        fail("weight", "[out, in]", weight)
    n, k = weight.shape
    if x.dim() < 2 or x.shape[-1] != k or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        fail("x", f"float32, bfloat16 or float16 [B, ..., {k}]", x)
    if weight.dtype != x.dtype or weight.device != x.device:
        fail("weight", f"{str(x.dtype).removeprefix('torch.')} [out, in] on {x.device}", weight)
    if bias is not None and (bias.shape != (n,) or bias.dtype != x.dtype or bias.device != x.device):
        fail("bias", f"{str(x.dtype).removeprefix('torch.')} [{n}] on {x.device}", bias)
    if (a is None) != (b is None):
        raise ValueError("a, b: expected both tensors or both None, got one of each")
    if a is not None:
        if a.dim() != 2 or a.shape[1] != k or a.dtype != torch.float32 or a.device != x.device:
            fail("a", f"float32 [r, {k}] on {x.device}", a)
        if b.shape != (n, len(a)) or b.dtype != torch.float32 or b.device != x.device:
            fail("b", f"float32 [{n}, {len(a)}] on {x.device}", b)
    if members.shape != x.shape[:1] or members.dtype != torch.int64 or members.device != x.device:
        fail("members", f"int64 [{len(x)}] on {x.device}", members)
