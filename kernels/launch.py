"""Code that launchers share: memory for results, settings of products, and a batch's noise as kernel arguments.

Triton's interpreter truncates on a store to bf16, and it multiplies bf16 numbers as raw integers. So under the
interpreter results are allocated in fp32 and rounded by torch, and kernels convert operands to fp32 before a product.
"""

import torch

from esengine.kernels.factors import factor_starts, u_out_start
from esengine.kernels.noise import INTERPRET, padded_rank, signed64, step_tensor
from esengine.kernels.operands import Lora, LowRank, MemberNoise


def output(x: torch.Tensor, *shape: int) -> torch.Tensor:
    """Memory for a result of x's dtype. Return the result as `result.to(x.dtype)`, because of the interpreter."""
    return torch.empty(*shape, dtype=torch.float32 if INTERPRET else x.dtype, device=x.device)


def exact_products(dtype: torch.dtype) -> dict[str, bool | str]:
    """Kernel arguments that set how x of this dtype is multiplied by fp32 columns.

    bf16: the columns are split into two bf16 parts, which hold 16 bits. fp16: three tf32 products. fp32: one fp32
    product.
    """
    precision = "ieee" if dtype == torch.float32 else "tf32x3"
    return {"SPLIT": dtype == torch.bfloat16, "UPCAST": INTERPRET, "PRECISION": precision}


def noise_arguments(
    adapters: Lora | None, perturbation: MemberNoise | None, factors: torch.Tensor | None, k: int
) -> dict[str, object]:
    """Arguments of a kernel that computes low-rank columns. Without adapters they are None and zeros.

    Args:
        factors: from `member_factors`. None: the kernel rebuilds them.
        k: K, the columns that the targets read.
    """
    if adapters is None:
        found = dict(streams_ptr=None, members_ptr=None, step_ptr=None, factors_ptr=None, seed=0)
        return found | dict(G=0, R=0, RANK=1, KP=1, WIDTH=0, U_AT=0, V_OUT_AT=0, U_OUT_AT=0)
    r, rank = adapters.r, perturbation.rank
    return dict(
        streams_ptr=adapters.streams,
        members_ptr=perturbation.members,
        step_ptr=step_tensor(perturbation.step, adapters.streams.device),
        factors_ptr=factors,
        seed=signed64(perturbation.seed),
        G=adapters.targets,
        R=r,
        RANK=rank,
        KP=padded_rank(rank),
        WIDTH=0 if factors is None else factors.shape[-1],
        **factor_starts(k, r, rank).constants,
    )


def low_rank_arguments(low: LowRank | None, perturbation: MemberNoise | None, n: int) -> dict[str, object]:
    """Arguments of a kernel that adds h [B | U']^T to a product. Without `low` they are None and zeros.

    Args:
        perturbation: the noise of the batch, for a kernel that uses it without `low` too.
        n: N, the columns of a target.
    """
    h, adapters, perturbation, factors = low or LowRank(None, Lora(None, None, 1.0, None), perturbation)
    b, rank = adapters.b, 1 if perturbation is None else perturbation.rank
    return dict(
        h_ptr=h,
        b_ptr=b,
        streams_ptr=adapters.streams,
        members_ptr=None if perturbation is None else perturbation.members,
        step_ptr=None if perturbation is None else step_tensor(perturbation.step, perturbation.members.device),
        factors_ptr=factors,
        stride_bn=0 if b is None else b.stride(0),
        stride_br=0 if b is None else b.stride(1),
        seed=0 if perturbation is None else signed64(perturbation.seed),
        G=0 if low is None else adapters.targets,
        R=adapters.r,
        RANK=rank,
        KP=padded_rank(rank),
        CP=padded_columns(adapters.r + rank),
        U_OUT_AT=0 if factors is None else u_out_start(factors, n, rank),
        WIDTH=0 if factors is None else factors.shape[-1],
    )


def padded_columns(columns: int) -> int:
    """Number of low-rank columns of a tile: a power of two, at least 16, the tensor cores' minimum."""
    return max(16, 1 << (columns - 1).bit_length())


def low_precision(dtype: torch.dtype) -> str:
    """Precision of the product of h and [B | U']^T, both fp32: tf32 if y is of half precision."""
    return "ieee" if dtype == torch.float32 else "tf32"
