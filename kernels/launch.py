"""What launchers share: where results are written, how products are computed, and a batch's noise as kernels take it.

Under Triton's interpreter a store to bf16 truncates and a product of bf16 is one of raw integers. So results are
allocated in fp32 there and rounded by torch, and kernels upcast what they multiply.
"""

import torch

from esengine.kernels.factors import places, u_out_at
from esengine.kernels.noise import INTERPRET, padded_rank, signed64, step_tensor
from esengine.kernels.operands import Lora, LowRank, MemberNoise


def output(x: torch.Tensor, *shape: int) -> torch.Tensor:
    """Where a kernel writes a result of x's dtype; give it on as `result.to(x.dtype)`."""
    return torch.empty(*shape, dtype=torch.float32 if INTERPRET else x.dtype, device=x.device)


def exact_products(dtype: torch.dtype) -> dict[str, bool | str]:
    """How a kernel multiplies x of this dtype by fp32 columns.

    bf16: by two bf16 halves of them, 16 bits; fp16: by three products of tf32; fp32: as it is.
    """
    precision = "ieee" if dtype == torch.float32 else "tf32x3"
    return {"SPLIT": dtype == torch.bfloat16, "UPCAST": INTERPRET, "PRECISION": precision}


def noise_arguments(
    adapters: Lora | None, perturbation: MemberNoise | None, factors: torch.Tensor | None, k: int
) -> dict[str, object]:
    """Arguments of a kernel that adds low-rank columns; None and zeros without adapters.

    Args:
        factors: of `member_factors`, or None where the kernel rebuilds them.
        k: columns that the targets read.
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
        **places(k, r, rank).constants,
    )


def low_rank_arguments(low: LowRank | None, perturbation: MemberNoise | None, n: int) -> dict[str, object]:
    """Arguments of a kernel that adds h [B | U']^T to products of N columns a target; None and zeros without.

    Args:
        perturbation: the noise of the batch where the kernel uses it without `low`, too.
        n: columns of a target.
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
        U_OUT_AT=0 if factors is None else u_out_at(factors, n, rank),
        WIDTH=0 if factors is None else factors.shape[-1],
    )


def padded_columns(columns: int) -> int:
    """Low-rank columns of a tile: a power of two, and no fewer than the tensor cores take."""
    return max(16, 1 << (columns - 1).bit_length())


def low_precision(dtype: torch.dtype) -> str:
    """How a kernel multiplies h by [B | U']^T, both fp32: tf32 where the product is of half precision."""
    return "ieee" if dtype == torch.float32 else "tf32"
