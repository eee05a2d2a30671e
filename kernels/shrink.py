"""The low-rank columns of a perturbed linear, for all targets that share x, where x is made or read.

    x' = LayerNorm(x) (1 + scale) + shift          if modulated, else x
    g  = x' [A_1^T .. A_G^T | V_1 .. V_G]          shrink: G (r + k) columns
    h  = s g Mix                                   Mix = [[I, V'], [c U^T, c U^T V']] of each target

Direct mode (r = 0): h = c g. One pass of x per output when it is not modulated; three when it is, the last two from
cache. The noise is built once for each tile of rows: about 54 / BLOCK_T instructions an element of x and target.

Legend: B batch rows, T rows a batch row, M = B T, K in, G targets, r LoRA rank, k noise rank (kp padded),
c = sign * sigma / sqrt(k), s = lora_alpha / r. A tile's columns are r of each target, then k of each, padded to CP.

Source: as `esengine.kernels.population_linear`; Xie et al., SANA (arXiv 2410.10629) for the modulation.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from esengine.kernels.adapters import Adapters, Perturbation
from esengine.kernels.noise import INTERPRET, factor_ref, padded_rank, signed64, signed_sigma, triton

if triton is not None:
    import triton.language as tl

    from esengine.kernels.noise import noise_at, noise_rows, offset

    @triton.jit
    def product(a, b, ROWS: tl.constexpr, PRECISION: tl.constexpr):
        """a [ROWS, L] @ b [L, C] in fp32: on the tensor cores from 16 rows on, their minimum."""
        if ROWS >= 16:
            y = tl.dot(a, b, input_precision=PRECISION)
        else:
            y = tl.sum(a[:, :, None] * b[None, :, :], axis=1)
        return y

    @triton.jit(do_not_specialize=["T", "step"])
    def _shrink_kernel(
        x_ptr, shift_ptr, scale_ptr, a_ptr, streams_ptr, members_ptr, x_out_ptr, h_ptr,
        T,
        stride_xb, stride_xt, stride_xk, stride_sb, stride_ar, stride_ak,
        sigma, lora_scale, eps,
        seed: tl.int64, step: tl.int64,
        K: tl.constexpr, G: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, KP: tl.constexpr, CP: tl.constexpr,
        MODULATED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        b = tl.program_id(0)
        t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
        x_rows = x_ptr + (offset(b, stride_xb) + offset(t, stride_xt))[:, None]
        mean = tl.zeros((BLOCK_T,), tl.float32)
        rstd = tl.zeros((BLOCK_T,), tl.float32)
        if MODULATED:
            for k0 in range(0, K, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                mask = (t[:, None] < T) & (k[None, :] < K)
                mean += tl.sum(tl.load(x_rows + offset(k, stride_xk)[None, :], mask=mask, other=0.0).to(tl.float32), 1)
            mean = mean / K
            for k0 in range(0, K, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                mask = (t[:, None] < T) & (k[None, :] < K)
                x = tl.load(x_rows + offset(k, stride_xk)[None, :], mask=mask, other=0.0).to(tl.float32)
                centred = tl.where(k[None, :] < K, x - mean[:, None], 0.0)
                rstd += tl.sum(centred * centred, 1)
            rstd = 1 / tl.sqrt(rstd / K + eps)

        column = tl.arange(0, CP)
        pair, c = b, 0.0
        if G > 0:
            member = tl.load(members_ptr + b)
            pair = member >> 1
            c = sigma * (1 - 2 * (member & 1)).to(tl.float32)
        g = tl.zeros((BLOCK_T, CP), tl.float32)
        for k0 in range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            mask = (t[:, None] < T) & (k[None, :] < K)
            x = tl.load(x_rows + offset(k, stride_xk)[None, :], mask=mask, other=0.0).to(tl.float32)
            if MODULATED:
                scale = tl.load(scale_ptr + offset(b, stride_sb) + k, mask=k < K, other=0.0).to(tl.float32)
                shift = tl.load(shift_ptr + offset(b, stride_sb) + k, mask=k < K, other=0.0).to(tl.float32)
                x = (x - mean[:, None]) * rstd[:, None] * (1 + scale)[None, :] + shift[None, :]
                x = tl.where(mask, x, 0.0).to(x_out_ptr.dtype.element_ty)
                tl.store(x_out_ptr + offset(b * T + t, K)[:, None] + k[None, :], x, mask=mask)
                x = x.to(tl.float32)
            if G > 0:
                a_ptrs = a_ptr + offset(column, stride_ar)[None, :] + offset(k, stride_ak)[:, None]
                columns = tl.load(a_ptrs, mask=(column < G * R)[None, :] & (k[:, None] < K), other=0.0)
                for i in tl.static_range(G):
                    v = noise_rows(seed, step, tl.load(streams_ptr + 4 * i), pair, k0, BLOCK_K, KP)
                    for j in tl.static_range(RANK):
                        v_j = tl.sum(tl.where(tl.arange(0, KP)[None, :] == j, v, 0.0), axis=1)
                        columns = tl.where(column[None, :] == G * R + i * RANK + j, v_j[:, None], columns)
                g += product(x, columns, BLOCK_T, PRECISION)

        if G > 0:
            low = column < G * R  # column i R + q is row q of target i's A, column G R + i k + j its noise
            h = tl.where(low[None, :], lora_scale * g, 0.0)
            if R == 0:
                h = c * g
            for i in tl.static_range(G if R > 0 else 0):
                own = (column >= i * R) & (column < (i + 1) * R)
                for j in tl.static_range(RANK):
                    u = noise_at(seed, step, tl.load(streams_ptr + 4 * i + 1), pair, (column - i * R) * KP + j)
                    g_v = tl.sum(tl.where((column == G * R + i * RANK + j)[None, :], g, 0.0), axis=1)
                    h += (lora_scale * c * g_v)[:, None] * tl.where(own, u, 0.0)[None, :]
                for j in tl.static_range(RANK):
                    v = noise_at(seed, step, tl.load(streams_ptr + 4 * i + 2), pair, (column - i * R) * KP + j)
                    h_v = c * tl.sum(h * tl.where(own, v, 0.0)[None, :], axis=1)
                    h = tl.where((column == G * R + i * RANK + j)[None, :], h_v[:, None], h)
            h_ptrs = h_ptr + offset(b * T + t, G * (R + RANK))[:, None] + column[None, :]
            tl.store(h_ptrs, h, mask=(t[:, None] < T) & (column < G * (R + RANK))[None, :])


def shrink_config(t: int, columns: int) -> dict[str, int]:
    """Launch configuration for T rows a batch row: below 16, the tensor cores' minimum, products are sums."""
    padded = max(16, triton.next_power_of_2(columns))
    block_t = min(32 if padded <= 128 else 16, triton.next_power_of_2(t))
    block_k = 64 if block_t >= 16 and padded == 16 else 32 if padded <= 32 else 16
    return {"BLOCK_T": block_t, "BLOCK_K": block_k, "CP": padded, "num_warps": 4 if padded <= 32 else 8}


class Modulation(NamedTuple):
    """LayerNorm without weights, then x (1 + scale) + shift: shift and scale [B, K], last stride 1."""

    shift: torch.Tensor
    scale: torch.Tensor
    eps: float = 1e-6


def shrink(
    x: torch.Tensor,
    adapters: Adapters | None,
    perturbation: Perturbation | None,
    modulation: Modulation | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The Triton path of `shrink_ref`. Same arguments. Sums of a row do not depend on its batch mates."""
    if modulation is None and adapters is None:
        return x, None
    batch, t, k = x.shape
    none = Adapters(None, None, x.new_empty(0)), Perturbation(x, 0, 0, 0.0, 1)  # its pointers are never read
    adapters, perturbation, h = adapters or none[0], perturbation or none[1], None
    g, r, rank = adapters.targets, adapters.r, perturbation.rank
    if g:
        h = torch.empty(batch, t, g * (r + rank), dtype=torch.float32, device=x.device)
    # under the interpreter a store to bf16 truncates, so it writes fp32 and torch rounds
    dtype = torch.float32 if INTERPRET else x.dtype
    x_out = x if modulation is None else torch.empty(batch, t, k, dtype=dtype, device=x.device)
    if batch * t == 0:
        return x_out.to(x.dtype), h
    shift, scale, eps = modulation or (x, x, 0.0)
    a = x if r == 0 else adapters.a
    config = shrink_config(t, g * (r + rank))
    with torch.cuda.device_of(x):
        _shrink_kernel[(batch, triton.cdiv(t, config["BLOCK_T"]))](
            x, shift, scale, a, adapters.streams, perturbation.members, x_out, x if h is None else h,
            T=t, stride_xb=x.stride(0), stride_xt=x.stride(1), stride_xk=x.stride(2), stride_sb=shift.stride(0),
            stride_ar=a.stride(0), stride_ak=a.stride(1),
            sigma=float(signed_sigma(torch.tensor(0), perturbation.sigma, rank)), lora_scale=adapters.scale, eps=eps,
            seed=signed64(perturbation.seed), step=perturbation.step,
            K=k, G=g, R=r, RANK=rank, KP=padded_rank(rank), MODULATED=modulation is not None,
            PRECISION="ieee" if x.dtype == torch.float32 else "tf32x3", **config,
        )  # fmt: skip
    return x_out.to(x.dtype), h


def shrink_ref(
    x: torch.Tensor,
    adapters: Adapters | None,
    perturbation: Perturbation | None,
    modulation: Modulation | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x', and the low-rank columns of every target that reads it, one member at a time in fp32.

    Args:
        x: [B, T, K], fp32, bf16 or fp16, any strides.
        adapters: The G targets. None: only the modulation.
        perturbation: The noise of the batch; with `adapters`.
        modulation: What makes x' of x. None: x' is x.

    Returns:
        x' [B, T, K], dtype of x, and h fp32 [B, T, G (r + k)] or None. Columns are r of each target, then k of each.
        h is of the rounded x', which is what the linear multiplies.
    """
    if modulation is not None:
        normed = F.layer_norm(x.float(), x.shape[-1:], eps=modulation.eps)
        x = (normed * (1 + modulation.scale.float()[:, None]) + modulation.shift.float()[:, None]).to(x.dtype)
    if adapters is None:
        return x, None
    g, r, rank = adapters.targets, adapters.r, perturbation.rank
    h = torch.empty(*x.shape[:2], g * (r + rank), device=x.device)
    for row, member in enumerate(perturbation.members.tolist()):
        pair = torch.tensor([member // 2], device=x.device)
        noise = dict(seed=perturbation.seed, step=perturbation.step, pairs=pair, rank=rank)
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
