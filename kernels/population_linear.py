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

from esengine.kernels import configs
from esengine.kernels.augmented_linear import population_linear_augmented
from esengine.kernels.fused_linear import fused_linear
from esengine.kernels.noise import Streams, factor, factor_ref, key_words, signed_sigma, uses_triton
from esengine.kernels.operands import Lora, MemberNoise, check_linear, stream_table
from esengine.kernels.shrink import shrink


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
    step: int | torch.Tensor,
    sigma: float,
    rank: int,
    scale: float = 1.0,
) -> torch.Tensor:
    """The Triton path: shrink, then a GEMM whose epilogue rebuilds U' and expands. Arguments as in the reference.

    Deterministic; a row's result depends on T, not on its batch mates. The LoRA columns stay in fp32, but for the
    expand of a half-precision x, which rounds them to tf32. Where the device's launch settings say so for a shape,
    `population_linear_augmented` instead, with its own accuracy.
    """
    check_linear(x, weight, bias, a, b, members)
    if not isinstance(step, torch.Tensor):  # to look at a tensor is to wait for the device
        key_words(seed, step)
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("x: requires a gradient, which the Triton path does not have; call it under torch.no_grad")
    if x.numel() == 0 or len(weight) == 0:
        return x.new_empty(*x.shape[:-1], len(weight))
    x_btk = x.reshape(len(x), -1, x.shape[-1])
    shape = dict(dtype=configs.named(x.dtype), t=x_btk.shape[1], k=x.shape[-1], n=len(weight))
    if configs.path("population_linear", x.device, **shape) == "augmented":
        noise = dict(members=members, streams=streams, seed=seed, step=step, sigma=sigma, rank=rank, scale=scale)
        return population_linear_augmented(x, weight, bias, a, b, **noise)
    adapters = Lora(a, b, scale, stream_table((streams,), x.device))
    perturbation = MemberNoise(members.contiguous(), seed, step, sigma, rank)
    _, h = shrink(x_btk, adapters, perturbation)
    y = fused_linear(x_btk, weight, bias, h=h, adapters=adapters, perturbation=perturbation)
    return y.view(*x.shape[:-1], len(weight))


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
    """The batched torch path: the shared GEMMs, and the noise of all pairs in small batched products.

    Args:
        x, weight, bias, a, b, scale: as in `population_linear_ref`.
        factors: V [P, in, k], U [P, r, k], V' [P, r, k], U' [P, out, k], fp32, of pairs: batch rows p B / P to
            (p + 1) B / P are of pair p. U and V' are None in the direct form.
        c: fp32 [B], sign * sigma / sqrt(k) of each batch row.

    Returns:
        [B, ..., out], dtype of x.
    """
    v, u, v_out, u_out = factors
    y = F.linear(x, weight, bias)
    if y.numel() == 0:
        return y
    pairs, n = len(v), len(weight)
    x_pmk = x.reshape(pairs, -1, x.shape[-1]).float()  # m: rows of a pair, of all its batch rows
    c_pm1 = c[:, None].expand(-1, x_pmk.shape[0] * x_pmk.shape[1] // len(c)).reshape(pairs, -1, 1)
    y_pmn = y.view(pairs, -1, n)
    wide = y_pmn if x.dtype == torch.float32 else y_pmn.float()
    h = torch.bmm(v.mT, x_pmk.mT).mT.mul_(c_pm1)  # [P, m, k]; on a CPU this side up is up to three times as fast
    if a is not None:
        low = add_outer(F.linear(x_pmk, a), h, u)  # [P, m, r]
        h = torch.bmm(low, v_out).mul_(scale * c_pm1)
        wide.view(-1, n).addmm_(low.view(-1, len(a)), b.T, alpha=scale)
    add_outer(wide, h, u_out)
    return y if wide is y_pmn else wide.to(x.dtype).view(y.shape)


def add_outer(y: torch.Tensor, h: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """y += h u^T in place: y [P, m, n], h [P, m, k], u [P, n, k]. For k = 1 BLAS is the slower way."""
    return y.addcmul_(h, u.mT) if h.shape[-1] == 1 else y.baddbmm_(h, u.mT)


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
    step: int | torch.Tensor,
    sigma: float,
    rank: int,
    scale: float = 1.0,
) -> torch.Tensor:
    """`population_linear_ref` by the fastest way the device has: Triton on a GPU, batched torch elsewhere."""
    settings = dict(members=members, seed=seed, step=step, streams=streams, sigma=sigma, rank=rank, scale=scale)
    if uses_triton(x.device):
        return population_linear_triton(x, weight, bias, a, b, **settings)
    check_linear(x, weight, bias, a, b, members)
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
    step: int | torch.Tensor,
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
        seed, step: of the noise contract; the step also as int64 [1] on the device of x, which is read there.
        sigma: noise scale.
        rank: noise rank k.
        scale: s = lora_alpha / r.

    Returns:
        [B, ..., out], dtype of x.
    """
    check_linear(x, weight, bias, a, b, members)
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
