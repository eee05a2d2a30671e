"""What a perturbed linear needs beside its weight: LoRA targets that share one input, and the noise of a batch.

Legend: G targets stacked, r LoRA rank, k noise rank, K in, N out of one target, B batch rows.
"""

import functools
from typing import NamedTuple

import torch

from esengine.kernels.noise import Streams


class Perturbation(NamedTuple):
    """The noise of a batch: members int64 [B] on the device; seed, step, sigma and rank k of contract v1.

    A step that is a tensor, int64 [1] on the device, is read when the kernels run: a CUDA graph replays the next step
    once that is written into it, where an int would be frozen with the launch.
    """

    members: torch.Tensor
    seed: int
    step: int | torch.Tensor
    sigma: float
    rank: int


class Adapters(NamedTuple):
    """G >= 1 targets of equal shape, rank and scale that read the same x, such as to_q, to_k and to_v.

    Attributes:
        a: fp32 [G r, K], the targets' A one below the other; None for the direct form.
        b: fp32 [G N, r], likewise; None for the direct form.
        streams: int64 [G, 4] on the device, `Streams` of each target; `stream_table` makes it.
        scale: s = lora_alpha / r.
    """

    a: torch.Tensor | None
    b: torch.Tensor | None
    streams: torch.Tensor
    scale: float = 1.0

    @property
    def targets(self) -> int:
        return len(self.streams)

    @property
    def r(self) -> int:
        return 0 if self.a is None else len(self.a) // self.targets


@functools.lru_cache(maxsize=4096)
def stream_table(streams: tuple[Streams, ...], device: torch.device) -> torch.Tensor:
    """int64 [G, 4] on `device`. Kept, because copying it anew for each launch would stall the device."""
    return torch.tensor(streams, dtype=torch.int64).to(device)


def check_linear(x, weight, bias, a, b, members) -> None:
    """Raises ValueError for an operand of a perturbed linear that does not fit. See `population_linear_ref`."""

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
