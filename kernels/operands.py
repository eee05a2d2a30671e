"""What a perturbed linear needs beside its weight: LoRA targets that share one input, and the noise of a batch.

Legend: G targets stacked, r LoRA rank, k noise rank, K in, N out of one target, B batch rows.
"""

import functools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, NoReturn

import torch

from esengine.kernels.noise import Streams, check_rank, key_words, step_tensor


class MemberNoise(NamedTuple):
    """The noise of a batch: members int64 [B] on the device; seed, step, sigma and rank k of contract v1.

    A step that is a tensor, int64 [1] on the device, is read when the kernels run: a CUDA graph replays the next step
    once that is written into it, where an int would be frozen with the launch.
    """

    members: torch.Tensor
    seed: int
    step: int | torch.Tensor
    sigma: float
    rank: int

    @property
    def c(self) -> float:
        """sigma / sqrt(k): c of an even member."""
        return self.sigma / math.sqrt(self.rank)


class Lora(NamedTuple):
    """G >= 1 targets of equal shape, rank and scale that read the same x, such as to_q, to_k and to_v.

    Attributes:
        a: fp32 [G r, K], the targets' A one below the other; None for the direct form.
        b: fp32 [G N, r], likewise; None for the direct form.
        scale: s = lora_alpha / r.
        streams: int64 [G, 4] on the device, `Streams` of each target; `stream_table` makes it.
    """

    a: torch.Tensor | None
    b: torch.Tensor | None
    scale: float
    streams: torch.Tensor

    @property
    def targets(self) -> int:
        return len(self.streams)

    @property
    def r(self) -> int:
        return 0 if self.a is None else len(self.a) // self.targets


class LowRank(NamedTuple):
    """The low-rank part h [B | U']^T of linears whose plain product is made elsewhere, for the op that reads them.

    Attributes:
        h: fp32 [B, T, G (r + k)], contiguous, from `shrink` or `mix`; None where the op that is given it makes h.
        adapters: the G targets.
        perturbation: the noise of the batch.
        factors: of `member_factors` for the two, or None: rebuilt in the kernel.
    """

    h: torch.Tensor | None
    adapters: Lora
    perturbation: MemberNoise
    factors: torch.Tensor | None = None


@functools.lru_cache(maxsize=4096)
def stream_table(streams: tuple[Streams, ...], device: torch.device) -> torch.Tensor:
    """int64 [G, 4] on `device`. Kept, because copying it anew for each launch would stall the device."""
    return torch.tensor(streams, dtype=torch.int64).to(device)


FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""What x may be. Weights and all that is added to y are of its dtype, adapters and low-rank columns of float32."""


def named(dtype: torch.dtype) -> str:
    """A dtype as people write it: `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def refuse(name: str, expected: str, tensor: torch.Tensor) -> NoReturn:
    """Raises ValueError for an operand: what was expected and what came."""
    got = f"{named(tensor.dtype)} {list(tensor.shape)}"
    if "stride" in expected or "contiguous" in expected:
        got += f" with strides {list(tensor.stride())}"
    raise ValueError(f"{name}: expected {expected}, got {got} on {tensor.device}")


def check(
    name: str,
    tensor: torch.Tensor | None,
    shape: Sequence[int | str],
    dtype: torch.dtype,
    device: torch.device,
    *,
    strides: Literal["any", "last", "all"] = "any",
) -> None:
    """Raises ValueError for an operand of another shape, dtype or device; None passes.

    Args:
        shape: a size each, or the name of one that may be any.
        strides: that the kernel takes: any, a last one of 1, or those of a contiguous tensor.
    """
    if tensor is None:
        return
    sizes = [got if isinstance(size, str) else size for size, got in zip(shape, tensor.shape, strict=False)]
    fits = tensor.dim() == len(shape) and list(tensor.shape) == sizes
    fits &= tensor.dtype == dtype and tensor.device == device
    if strides == "last":
        fits &= tensor.dim() == 0 or tensor.shape[-1] <= 1 or tensor.stride(-1) == 1
    elif strides == "all":
        fits &= tensor.is_contiguous()
    if not fits:
        how = {"any": "", "last": ", last stride 1,", "all": ", contiguous,"}[strides]
        refuse(name, f"{named(dtype)} [{', '.join(map(str, shape))}]{how} on {device}", tensor)


def check_x(x: torch.Tensor, name: str = "x", last: str = "K") -> None:
    """Raises ValueError for an x that is not [B, T, K] of `FLOATS`."""
    if x.dim() != 3 or x.dtype not in FLOATS:
        refuse(name, f"float32, bfloat16 or float16 [B, T, {last}]", x)


def check_noise(noise: MemberNoise, batch: int, device: torch.device) -> None:
    """Raises ValueError for noise that is not of `batch` rows on `device`, or out of the contract's range."""
    check("members", noise.members, (batch,), torch.int64, device, strides="all")
    if isinstance(noise.step, torch.Tensor):  # to look at it is to wait for the device
        step_tensor(noise.step, device)
    key_words(noise.seed, 0 if isinstance(noise.step, torch.Tensor) else noise.step)
    check_rank(noise.rank)


def check_streams(name: str, adapters: Lora, device: torch.device) -> None:
    """Raises ValueError for streams that are not of one target or more."""
    check(f"{name}.streams", adapters.streams, ("G", 4), torch.int64, device, strides="all")
    if not len(adapters.streams):
        refuse(f"{name}.streams", "int64 [G, 4] of at least one target", adapters.streams)


def check_adapters(name: str, adapters: Lora, k: int, n: int | None, device: torch.device) -> None:
    """Raises ValueError for targets whose A does not read K columns, or, with `n`, whose B does not write N each."""
    a, b, _, streams = adapters
    check_streams(name, adapters, device)
    if n is not None and (a is None) != (b is None):
        raise ValueError(f"{name}: expected a and b, or neither, got one of them")
    if a is None:
        return
    check(f"{name}.a", a, ("G r", k), torch.float32, device)
    if len(a) % len(streams):
        refuse(f"{name}.a", f"float32 [G r, {k}] of G = {len(streams)} targets", a)
    if n is not None:
        check(f"{name}.b", b, (n * len(streams), len(a) // len(streams)), torch.float32, device)
