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

from typing import Literal, get_args

import torch
import torch.nn.functional as F

from esengine.kernels import configs
from esengine.kernels.factors import STORE_FROM, member_factors
from esengine.kernels.fused_linear import fused_linear
from esengine.kernels.low_rank_part import low_rank_part
from esengine.kernels.noise import factor, factor_ref, signed_sigma, uses_triton
from esengine.kernels.operands import FLOATS, Lora, MemberNoise, check, check_adapters, check_noise, refuse
from esengine.kernels.shrink import shrink

Path = Literal["epilogue", "addmm"]
JOIN_FROM = 16
"""Rows of a pair from which, on a CPU, A and V are read in one product, and B and U' in another."""


def population_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    adapters: Lora,
    perturbation: MemberNoise,
    *,
    path: Path | None = None,
) -> torch.Tensor:
    """`population_linear_ref` by the fastest way the device has: Triton on a GPU, batched torch elsewhere.

    Deterministic. A row's result depends on T, not on its batch mates; by `addmm` its last bits may, as they do in
    torch's GEMM.

    Args:
        x: [B, ..., K], fp32, bf16 or fp16, any strides.
        weight: [N, K], dtype of x.
        bias: [N], dtype of x, or None.
        adapters: One target: A [r, K] and B [N, r], or None for both in the direct form.
        perturbation: The noise of the batch; members int64 [B] in [0, 2^33).
        path: On a GPU. `epilogue`: shrink, then a GEMM of ours that expands in its epilogue, in fp32, or tf32 where x
            is of half precision. `addmm`: the low-rank part is written in the dtype of x, and torch's own GEMM adds its
            product to it. None: what the device's launch settings say for the shape.

    Returns:
        [B, ..., N], dtype of x.

    Raises:
        ValueError: an operand is of another shape, dtype or device, or of strides that are not said here; by its name.
        RuntimeError: x requires a gradient, which the Triton paths do not have.
    """
    _check(x, weight, bias, adapters, perturbation)
    if path not in (None, *get_args(Path)):
        raise ValueError(f"path: expected one of {', '.join(get_args(Path))} or None, got {path!r}")
    if not uses_triton(x.device):
        return _by_torch(x, weight, bias, adapters, perturbation)
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("x: requires a gradient, which the Triton path does not have; call it under torch.no_grad")
    n, k = weight.shape
    if x.numel() == 0 or n == 0:
        y = x.new_zeros(*x.shape[:-1], n)
        return y if bias is None else y + bias
    x_btk = x.reshape(len(x), -1, k)
    t = x_btk.shape[1]
    factors = member_factors(adapters, perturbation, k=k, n=n) if t >= STORE_FROM else None
    shape = dict(dtype=configs.dtype_name(x.dtype), t=t, k=k, n=n)
    if (path or configs.path("population_linear", x.device, **shape)) == "addmm":
        y = low_rank_part(x_btk, bias, adapters, perturbation, n=n, factors=factors)
        y.view(-1, n).addmm_(x_btk.reshape(-1, k), weight.T)
    else:
        _, h = shrink(x_btk, adapters, perturbation, factors=factors)
        y = fused_linear(x_btk, weight, bias, h=h, adapters=adapters, perturbation=perturbation, factors=factors)
    return y.view(*x.shape[:-1], n)


def _by_torch(x, weight, bias, adapters, perturbation) -> torch.Tensor:
    (v, u, v_out, u_out), rank = adapters.streams.tolist()[0], perturbation.rank
    pairs, slots = torch.unique(perturbation.members >> 1, return_inverse=True)
    noise = dict(seed=perturbation.seed, step=perturbation.step, pairs=pairs, rank=rank)
    lengths = ((v, weight.shape[1]), (u, adapters.r), (v_out, adapters.r), (u_out, len(weight)))
    factors = tuple(factor(stream=s, length=n, **noise)[slots] if n else None for s, n in lengths)
    c = signed_sigma(perturbation.members, perturbation.sigma, rank)
    a, b, scale, _ = adapters
    return population_linear_torch(x, weight, bias, a, b, factors=factors, c=c, scale=scale)


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
    v, u_out = factors[0], factors[3]
    n, k = weight.shape
    if x.numel() == 0 or n == 0:
        return F.linear(x, weight, bias)
    x_pmk, c_pm1 = _rows_of_pairs(x, c, len(v))
    pairs, m, _ = x_pmk.shape
    if a is not None and m >= JOIN_FROM and x.dtype == torch.float32:
        h = _joined(x_pmk, a, factors, c_pm1, scale)
        y_pmn = torch.bmm(h, _columns(b, u_out)) if bias is None else torch.baddbmm(bias, h, _columns(b, u_out))
        y_pmn.view(-1, n).addmm_(x_pmk.reshape(-1, k), weight.T)
        return y_pmn.view(*x.shape[:-1], n)
    y = F.linear(x, weight, bias)
    y_pmn = y.view(pairs, -1, n)
    wide = y_pmn if x.dtype == torch.float32 else y_pmn.float()
    low, h = _separate(x_pmk, a, factors, c_pm1, scale)
    if a is not None:
        wide.view(-1, n).addmm_(low.view(-1, len(a)), b.T, alpha=scale)
    add_outer(wide, h, u_out)
    return y if wide is y_pmn else wide.to(x.dtype).view(y.shape)


def low_rank_part_torch(
    x: torch.Tensor,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    *,
    factors: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor],
    c: torch.Tensor,
    scale: float = 1.0,
) -> torch.Tensor:
    """The low-rank part alone, y_i - x_i W^T - bias, for a base layer that computes its product itself.

    Arguments as in `population_linear_torch`.

    Returns:
        fp32 [B, ..., out].
    """
    u_out = factors[3]
    if x.numel() == 0:
        return torch.zeros(*x.shape[:-1], u_out.shape[1], device=x.device)
    x_pmk, c_pm1 = _rows_of_pairs(x, c, len(u_out))
    if a is None:
        y = torch.bmm(_separate(x_pmk, a, factors, c_pm1, scale)[1], u_out.mT)
    elif x_pmk.shape[1] >= JOIN_FROM:
        y = torch.bmm(_joined(x_pmk, a, factors, c_pm1, scale), _columns(b, u_out))
    else:
        low, h = _separate(x_pmk, a, factors, c_pm1, scale)
        y = add_outer(F.linear(low, b).mul_(scale), h, u_out)
    return y.view(*x.shape[:-1], u_out.shape[1])


def _rows_of_pairs(x: torch.Tensor, c: torch.Tensor, pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x as fp32 [P, m, K] and c as [P, m, 1]; m: rows of a pair, of all its batch rows."""
    x_pmk = x.reshape(pairs, -1, x.shape[-1]).float()
    m = x_pmk.shape[1]
    return x_pmk, c[:, None].expand(-1, pairs * m // len(c)).reshape(pairs, m, 1)


def _columns(b: torch.Tensor, u_out: torch.Tensor) -> torch.Tensor:
    """[B | U']^T of each pair, [P, r + k, N]."""
    return torch.cat((b.T.expand(len(u_out), -1, -1), u_out.mT), 1)


def _separate(x_pmk: torch.Tensor, a: torch.Tensor | None, factors, c_pm1: torch.Tensor, scale: float):
    """x A_i^T without its scale [P, m, r], or None in the direct form; and the columns of U' [P, m, k]."""
    v, u, v_out, _ = factors
    h = torch.bmm(v.mT, x_pmk.mT).mT.mul_(c_pm1)  # [P, m, k]; on a CPU this side up is up to three times as fast
    if a is None:
        return None, h
    low = add_outer(F.linear(x_pmk, a), h, u)
    return low, torch.bmm(low, v_out).mul_(scale * c_pm1)


def _joined(x_pmk: torch.Tensor, a: torch.Tensor, factors, c_pm1: torch.Tensor, scale: float) -> torch.Tensor:
    """h [P, m, r + k], A and V read in one product. Worth the copies of A for each pair from `JOIN_FROM` rows on."""
    v, u, v_out, _ = factors
    h = torch.bmm(x_pmk, torch.cat((a.expand(len(v), -1, -1), v.mT), 1).mT)
    low, noise = h[..., : len(a)], h[..., len(a) :]  # autograd lets slices be changed in place
    add_outer(low, noise.mul_(c_pm1), u).mul_(scale)
    noise.copy_(torch.bmm(low, v_out).mul_(c_pm1))
    return h


def add_outer(y: torch.Tensor, h: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """y += h u^T in place: y [P, m, n], h [P, m, k], u [P, n, k]. For k = 1 BLAS is the slower way."""
    return y.addcmul_(h, u.mT) if h.shape[-1] == 1 else y.baddbmm_(h, u.mT)


def population_linear_ref(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, adapters: Lora, perturbation: MemberNoise
) -> torch.Tensor:
    """y_i = x_i W^T + bias + s (x_i A_i^T) B_i^T, one member at a time with A_i and B_i formed, in fp32.

    Arguments as in `population_linear`, but for the path.
    """
    _check(x, weight, bias, adapters, perturbation)
    (a, b, scale, streams), (members, seed, step, sigma, rank) = adapters, perturbation
    (a_v, a_u, b_v, b_u), rows = streams.tolist()[0], []
    for x_row, member in zip(x.float(), members.tolist(), strict=True):
        c = float(signed_sigma(torch.tensor(member), sigma, rank))
        noise = dict(seed=seed, step=step, pairs=torch.tensor([member // 2], device=x.device), rank=rank)
        v = factor_ref(stream=a_v, length=weight.shape[1], **noise)[0]
        u_out = factor_ref(stream=b_u, length=weight.shape[0], **noise)[0]
        if a is None:
            rows.append(F.linear(x_row, weight.float() + c * u_out @ v.T, _float(bias)))
            continue
        a_member = a + c * factor_ref(stream=a_u, length=len(a), **noise)[0] @ v.T
        b_member = b + c * u_out @ factor_ref(stream=b_v, length=len(a), **noise)[0].T
        rows.append(F.linear(x_row, weight.float(), _float(bias)) + scale * (x_row @ a_member.T) @ b_member.T)
    return torch.stack(rows).to(x.dtype) if rows else x.new_empty(*x.shape[:-1], len(weight))


def _float(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.float()


def _check(x, weight, bias, adapters, perturbation) -> None:
    """Raises ValueError for what does not fit, by its name. See `population_linear`."""
    if weight.dim() != 2:
        refuse("weight", "[N, K]", weight)
    n, k = weight.shape
    if x.dim() < 2 or x.shape[-1] != k or x.dtype not in FLOATS:
        refuse("x", f"float32, bfloat16 or float16 [B, ..., {k}]", x)
    check("weight", weight, ("N", "K"), x.dtype, x.device)
    check("bias", bias, (n,), x.dtype, x.device)
    check_noise(perturbation, len(x), x.device)
    check_adapters("adapters", adapters, k, n, x.device)
    if adapters.targets != 1:
        refuse("adapters.streams", "int64 [1, 4], of one target,", adapters.streams)
