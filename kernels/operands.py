"""The operands of a perturbed linear besides its weight: LoRA targets that read the same x, and the noise of a batch.

Legend: G targets stacked, r LoRA rank, k noise rank, K in, N out of one target, B batch rows.
"""

import functools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, NoReturn

import torch

from esengine.kernels.configs import dtype_name
from esengine.kernels.noise import Streams, check_rank, key_words, step_tensor


class MemberNoise(NamedTuple):
    """The noise of a batch, by contract v1.

    Attributes:
        members: int64 [B] on the device, the member of each batch row.
        seed: the run's seed, in [0, 2^64).
        step: the ES step, in [0, 2^32). Or int64 [1] on the device: the kernels then read it when they run. So a CUDA
            graph can be replayed at another step. An int is captured with the launch.
        sigma: the noise scale.
        rank: the noise rank k.
    """

    members: torch.Tensor
    seed: int
    step: int | torch.Tensor
    sigma: float
    rank: int

    @property
    def c(self) -> float:
        """sigma / sqrt(k), the c of an even member."""
        return self.sigma / math.sqrt(self.rank)


class Lora(NamedTuple):
    """G >= 1 targets of equal shape, rank and scale that read the same x, such as to_q, to_k and to_v.

    Attributes:
        a: fp32 [G r, K], A of the first target, then of the next. None: direct mode.
        b: fp32 [G N, r], in the same order. None: direct mode.
        scale: s = lora_alpha / r.
        streams: int64 [G, 4] on the device, the `Streams` of each target, from `stream_table`.
    """

    a: torch.Tensor | None
    b: torch.Tensor | None
    scale: float
    streams: torch.Tensor

    @property
    def targets(self) -> int:
        """Number of targets that share x."""
        return len(self.streams)

    @property
    def r(self) -> int:
        """LoRA rank; 0 without a LoRA."""
        return 0 if self.a is None else len(self.a) // self.targets


class LowRank(NamedTuple):
    """The low-rank part h [B | U']^T of linears, for an op that reads their plain product and adds this part.

    Attributes:
        h: fp32 [B, T, G (r + k)], contiguous, from `shrink` or `mix`. None: the op computes h itself.
        adapters: the G targets.
        perturbation: the noise of the batch.
        factors: from `member_factors` with these adapters and perturbation. None: the kernel rebuilds them.
    """

    h: torch.Tensor | None
    adapters: Lora
    perturbation: MemberNoise
    factors: torch.Tensor | None = None


@functools.lru_cache(maxsize=4096)
def stream_table(streams: tuple[Streams, ...], device: torch.device) -> torch.Tensor:
    """The streams as int64 [G, 4] on `device`. Cached, because a copy at each launch would stall the device."""
    return torch.tensor(streams, dtype=torch.int64).to(device)


FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of x. Weights and everything that is added to y have the dtype of x. Adapters and h are float32."""


def refuse(name: str, expected: str, tensor: torch.Tensor) -> NoReturn:
    """Raise ValueError for an operand. The message says what was expected and what was given."""
    got = f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"
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
    """Raise ValueError if an operand has the wrong shape, dtype, device or strides. None passes.

    Args:
        shape: the sizes. A name stands for any size.
        strides: `any`; `last`: the last stride is 1; `all`: contiguous.
    """
    if tensor is None:
        return
    sizes = [got if isinstance(size, str) else size for size, got in zip(shape, tensor.shape, strict=False)]
    matches = tensor.dim() == len(shape) and list(tensor.shape) == sizes
    matches &= tensor.dtype == dtype and tensor.device == device
    if strides == "last":
        matches &= tensor.dim() == 0 or tensor.shape[-1] <= 1 or tensor.stride(-1) == 1
    elif strides == "all":
        matches &= tensor.is_contiguous()
    if not matches:
        how = {"any": "", "last": ", last stride 1,", "all": ", contiguous,"}[strides]
        refuse(name, f"{dtype_name(dtype)} [{', '.join(map(str, shape))}]{how} on {device}", tensor)


def check_x(x: torch.Tensor, name: str = "x", last: str = "K") -> None:
    """Raise ValueError unless x is [B, T, K] of a dtype in `FLOATS`."""
    if x.dim() != 3 or x.dtype not in FLOATS:
        refuse(name, f"float32, bfloat16 or float16 [B, T, {last}]", x)


def check_noise(noise: MemberNoise, batch: int, device: torch.device) -> None:
    """Raise ValueError unless the noise has `batch` rows on `device` and is in the contract's range."""
    check("members", noise.members, (batch,), torch.int64, device, strides="all")
    if isinstance(noise.step, torch.Tensor):  # its value is not read: that would wait for the device
        step_tensor(noise.step, device)
    key_words(noise.seed, 0 if isinstance(noise.step, torch.Tensor) else noise.step)
    check_rank(noise.rank)


def check_streams(name: str, adapters: Lora, device: torch.device) -> None:
    """Raise ValueError unless the streams are int64 [G, 4] with G >= 1."""
    check(f"{name}.streams", adapters.streams, ("G", 4), torch.int64, device, strides="all")
    if not len(adapters.streams):
        refuse(f"{name}.streams", "int64 [G, 4] of at least one target", adapters.streams)


def check_adapters(name: str, adapters: Lora, k: int, n: int | None, device: torch.device) -> None:
    """Raise ValueError unless A of each target reads K columns and, if `n` is given, B writes N columns."""
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
