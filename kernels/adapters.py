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


def step_tensor(step: int | torch.Tensor, device: torch.device) -> torch.Tensor:
    """int64 [1] on `device`: the tensor itself, or an int filled in by a launch, with no copy from the host.

    Raises:
        ValueError: a tensor of another shape, dtype or device.
    """
    if not isinstance(step, torch.Tensor):
        return torch.full((1,), step, dtype=torch.int64, device=device)
    if step.shape != (1,) or step.dtype != torch.int64 or step.device != device:
        dtype = str(step.dtype).removeprefix("torch.")
        raise ValueError(f"step: expected int64 [1] on {device}, got {dtype} {list(step.shape)} on {step.device}")
    return step


@functools.lru_cache(maxsize=4096)
def stream_table(streams: tuple[Streams, ...], device: torch.device) -> torch.Tensor:
    """int64 [G, 4] on `device`. Kept, because copying it anew for each launch would stall the device."""
    return torch.tensor(streams, dtype=torch.int64).to(device)
