"""The perturbed linear as one plain GEMM over a longer K: the expand and its noise are columns of the operands.

    h = [s x A_i^T | c s (x A_i^T) V']                                     shrink: r + k columns, fp32
    y = [x | h_low | e_p (x) h_noise | 0] [W | B | U'_1 .. U'_P | 0]^T + bias

e_p is one-hot in the place of the row's pair, so that of the P pairs' U' a row meets its own. Direct form (r = 0):
h = c x V. The op gives each batch row a place of its own, P = B: to find the distinct pairs, whose number sets the
shapes, is to wait for the device, which no CUDA graph can.

Cost on paper, not measured: (in, out) = (2240, 2240), bf16, 750 TFLOP/s, 3.0 TB/s, where the plain GEMM takes 13.4 ns
a row. 2240 -> 2304 columns hold 60 pairs at r = 4, k = 1 and are +2.9 %; with the shrink in x's producer, the fused
expand is +2.7 % in all. Near equal: it wins where the fused kernel's main loop is further from cuBLAS than this is.
K grows by k P: 64 columns, +2.9 %, for every further 64 pairs at k = 1, and 64 rows at r = 2, a place each, take 2368.
Copying x is 9088 bytes a row, 3.0 ns or +23 %: it wins only where the producer writes x into the buffer itself. Copying
W is 6.8 us a call, whatever the rows. `configs.path` of "population_linear" chooses by shape.

Accuracy: h, B and U' are rounded to the dtype of x, which the fused path does not do. To each low-rank column this adds
2^-9 of its norm per factor in bf16 (an element: at most 2^-8), so 2^-8 for both; 2^-12 and 2^-11 in fp16, whose
columns below 2^-14 lose more. fp32 adds nothing.

Legend: B batch rows, T rows a batch row, K in, N out, r LoRA rank, k noise rank, P pairs, C columns of the operands,
c = sign * sigma / sqrt(k), s = lora_alpha / r.

Source: as `esengine.kernels.population_linear`.
"""

import torch
import torch.nn.functional as F

from esengine.kernels.noise import Streams, factor, key_words, uses_triton
from esengine.kernels.operands import Lora, MemberNoise, check_linear, stream_table
from esengine.kernels.shrink import shrink, shrink_ref


def augmented_columns(k: int, extra: int, dtype: torch.dtype) -> int:
    """C: K + extra, padded to 8 columns in fp32 and to 64 in half precision, a tensor core's tile."""
    multiple = 8 if dtype == torch.float32 else 64
    return -(-(k + extra) // multiple) * multiple


def augment_weight(weight: torch.Tensor, b: torch.Tensor | None, u: torch.Tensor) -> torch.Tensor:
    """[W | B | U'_1 .. U'_P | 0], the half that all rows share.

    Args:
        weight: [N, K], fp32, bf16 or fp16.
        b: fp32 [N, r], or None for the direct form.
        u: fp32 [P, N, k], U' of each pair.

    Returns:
        [N, C], dtype of weight, contiguous.

    Raises:
        ValueError: for a shape that does not fit.
    """
    n, k = weight.shape
    if u.dim() != 3 or u.shape[1] != n:
        raise ValueError(f"u: expected [P, {n}, k], got {list(u.shape)}")
    if b is not None and (b.dim() != 2 or len(b) != n):
        raise ValueError(f"b: expected [{n}, r], got {list(b.shape)}")
    pairs, _, rank = u.shape
    first = k if b is None else k + b.shape[1]
    last = first + pairs * rank
    out = torch.empty(n, augmented_columns(k, last - k, weight.dtype), dtype=weight.dtype, device=weight.device)
    out[:, :k] = weight
    if b is not None:
        out[:, k:first] = b
    out[:, first:last].unflatten(1, (pairs, rank)).copy_(u.transpose(0, 1))
    out[:, last:] = 0
    return out


def augment_input(x: torch.Tensor, h: torch.Tensor, slots: torch.Tensor, *, pairs: int, rank: int) -> torch.Tensor:
    """[x | h_low | one-hot(slot) * h_noise | 0], the half of each row: a copy of x, which its producer could save.

    Args:
        x: [B, T, K], fp32, bf16 or fp16, any strides.
        h: fp32 [B, T, r + k], from `shrink`.
        slots: int64 [B], the place of each batch row's pair among the P, in [0, P).
        pairs: P.
        rank: noise rank k.

    Returns:
        [B, T, C], dtype of x, contiguous.

    Raises:
        ValueError: for a shape that does not fit.
    """
    batch, t, k = x.shape
    r = h.shape[-1] - rank
    if h.shape[:-1] != (batch, t) or r < 0:
        raise ValueError(f"h: expected [{batch}, {t}, r + {rank}], got {list(h.shape)}")
    if slots.shape != (batch,) or slots.dtype != torch.int64:
        dtype = str(slots.dtype).removeprefix("torch.")
        raise ValueError(f"slots: expected int64 [{batch}], got {dtype} {list(slots.shape)}")
    extra = r + pairs * rank
    out = torch.empty(batch, t, augmented_columns(k, extra, x.dtype), dtype=x.dtype, device=x.device)
    out[..., :k] = x
    out[..., k : k + r] = h[..., :r]
    out[..., k + r :] = 0
    noise = out[..., k + r : k + extra].unflatten(-1, (pairs, rank))  # [B, T, P, k]
    noise[torch.arange(batch, device=x.device), :, slots] = h[..., r:].to(x.dtype)
    return out


def augmented_operands(
    x: torch.Tensor,
    weight: torch.Tensor,
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both operands of the GEMM, [B, T, C] and [N, C], of x [B, T, K]. Arguments as in `population_linear_ref`."""
    adapters = Lora(a, b, scale, stream_table((streams,), x.device))
    perturbation = MemberNoise(members.contiguous(), seed, step, sigma, rank)
    _, h = (shrink if uses_triton(x.device) else shrink_ref)(x, adapters, perturbation)
    u = factor(seed=seed, step=step, stream=streams.b_u, pairs=members >> 1, length=len(weight), rank=rank)
    slots = torch.arange(len(x), device=x.device)
    return augment_input(x, h, slots, pairs=len(x), rank=rank), augment_weight(weight, b, u)


def population_linear_augmented(
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
    """`population_linear_ref` by one `F.linear` over augmented operands. Same arguments.

    Less accurate than `population_linear`: the module says by how much. The same call gives the same bits where the
    device's GEMM does; a row's last bits may depend on the batch, as B and the row's place in it set the order of the
    sum. Nothing waits for the device.

    Returns:
        [B, ..., out], dtype of x.

    Raises:
        ValueError: for a tensor of another shape, dtype or device, or a seed or step out of range.
        RuntimeError: x requires a gradient, which this path does not have.
    """
    check_linear(x, weight, bias, a, b, members)
    if not isinstance(step, torch.Tensor):  # to look at a tensor is to wait for the device
        key_words(seed, step)
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("x: requires a gradient, which the augmented path does not have; call it under no_grad")
    t = x.shape[1:-1].numel()
    if len(x) * t == 0 or len(weight) == 0:
        return x.new_empty(*x.shape[:-1], len(weight))
    noise = dict(members=members, streams=streams, seed=seed, step=step, sigma=sigma, rank=rank, scale=scale)
    with torch.no_grad():
        operands = augmented_operands(x.reshape(len(x), t, x.shape[-1]), weight, a, b, **noise)
        return F.linear(*operands, bias).view(*x.shape[:-1], len(weight))
