"""What each op must compute and move, what a device can do, and so the share of the roofline that a time reaches.

    seconds at the roofline = max(flops / matmul ceiling, operations / vector ceiling, bytes / memory ceiling)

FLOPs are those of matrix products, an addition and a multiplication each. Operations are single instructions of the
vector units: Philox and Box-Muller. Bytes count every operand and result once, as if a cache kept everything that is
reused.

Legend: M rows in all, T rows a member, K in, N out, r LoRA rank, k noise rank (kp padded), P pairs, L x S a tensor,
G targets that read the same x.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from record import interleaved
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from esengine.kernels import padded_rank

PHILOX_OPERATIONS = 83
"""Instructions of one Philox4x32-10 call, four words; counted in sm_90 machine code."""

BOX_MULLER_OPERATIONS = 33
"""Instructions of one normal, from its words; counted there too."""


class Work(NamedTuple):
    """flops of matrix products, operations of the vector units, bytes of memory."""

    flops: float
    operations: float
    bytes: float


class Ceilings(NamedTuple):
    """The most that a device reaches per second: FLOPs by dtype of the product, vector operations, bytes."""

    flops: dict[torch.dtype, float]
    operations: float
    bytes: float


KNOWN = {
    # achievable dense bf16 and copy bandwidth, below the data sheet: on paper for the H100, measured for the H200.
    # vector issue is 132 SMs x 128 lanes x 1.755 GHz; both are the same chip beside another memory
    "H100": Ceilings({torch.bfloat16: 750e12, torch.float16: 750e12, torch.float32: 55e12}, 29.6e12, 3.0e12),
    "H200": Ceilings({torch.bfloat16: 788e12, torch.float16: 788e12, torch.float32: 55e12}, 29.6e12, 4.3e12),
}


class Chosen(NamedTuple):
    """A device's ceilings, None for an unknown device, and their source in a sentence."""

    ceilings: Ceilings | None
    source: str

    def record(self) -> dict[str, Any]:
        """For a JSON file: `source`, and each ceiling a second, None where there is none."""
        found = {"source": self.source}
        if self.ceilings is None:
            return found
        flops = {str(dtype).removeprefix("torch."): value for dtype, value in self.ceilings.flops.items()}
        operations = self.ceilings.operations if math.isfinite(self.ceilings.operations) else None
        return found | {"flops": flops, "operations": operations, "bytes": self.ceilings.bytes}


def choose(name: str, measured: Mapping[str, float] | None = None) -> Chosen:
    """The ceilings of a GPU by its name. One of the keys of `KNOWN` must be a word of it.

    Args:
        name: such as `NVIDIA H200`.
        measured: `ceilings` of a record of `device_smoke.py` on this device: `copy_gb_per_second` and
            `matmul_tflop_per_second`. They replace those of the table.
    """
    part = next((part for part in KNOWN if re.search(rf"\b{part}\b", name)), None)
    known = None if part is None else KNOWN[part]
    if measured is None:
        source = f"unknown device {name}: no ceilings" if known is None else f"bench/suite/roofline.py, {part}"
        return Chosen(known, source)
    product, copied = 1e12 * measured["matmul_tflop_per_second"], 1e9 * measured["copy_gb_per_second"]
    flops = {} if known is None else known.flops
    flops = {**flops, torch.bfloat16: product, torch.float16: product}
    rest = (
        "of an unknown device, vector instructions unbounded"
        if known is None
        else f"else bench/suite/roofline.py, {part}"
    )
    operations = math.inf if known is None else known.operations
    return Chosen(Ceilings(flops, operations, copied), f"copy and bf16 product as measured by smoke, {rest}")


def normals_work(*, rows: int, count: int) -> Work:
    """Noise [P, count] fp32, written once: a Philox call for four normals, nothing read but the ids."""
    quads = rows * ((count + 3) // 4)
    return Work(0, quads * (PHILOX_OPERATIONS + 4 * BOX_MULLER_OPERATIONS), 4 * rows * count)


def linear_work(*, rows: int, n_in: int, n_out: int, itemsize: int, bias: bool = True) -> Work:
    """y = x W^T + bias: 2 M K N."""
    values = rows * n_in + n_in * n_out + rows * n_out + bias * n_out
    return Work(2 * rows * n_in * n_out, 0, itemsize * values)


def population_linear_work(
    *, rows: int, members: int, n_in: int, n_out: int, r: int, k: int, itemsize: int, bias: bool = True
) -> Work:
    """The plain linear, and beside it

        shrink  g = x [A^T | V]          2 M K (r + k)
        mix     h = s g Mix              2 M (r + k)^2, which is 2 M k^2 saved in the direct form
        expand  y += h [B | c U']^T      2 M (r + k) N

    with A and B read once, fp32, and the factors of members / 2 antithetic pairs built once, never read.
    """
    plain = linear_work(rows=rows, n_in=n_in, n_out=n_out, itemsize=itemsize, bias=bias)
    columns = r + k
    flops = 2 * rows * columns * (n_in + n_out) + (2 * rows * columns**2 if r else 0)
    noise = sum(normals_work(rows=members // 2, count=padded_rank(k) * length).operations for length in (n_in, n_out))
    small = 2 * normals_work(rows=members // 2, count=padded_rank(k) * r).operations if r else 0
    return Work(plain.flops + flops, noise + small, plain.bytes + 4 * r * (n_in + n_out) + 8 * members)


def shrink_work(
    *,
    rows: int,
    members: int,
    n_in: int,
    targets: int,
    r: int = 0,
    k: int = 0,
    itemsize: int,
    modulated: bool = False,
) -> Work:
    """h of G targets: 2 M K G (r + k) and the mix; x read once. Modulated: x' written, five operations an element."""
    columns, noise = targets * (r + k), 0
    if targets:
        noise = targets * normals_work(rows=members // 2, count=padded_rank(k) * n_in).operations
    flops = 2 * rows * n_in * columns + (2 * rows * targets * (r + k) ** 2 if r else 0)
    values = rows * n_in * (1 + modulated) + 2 * modulated * members * n_in
    return Work(
        flops, noise + 5 * modulated * rows * n_in, itemsize * values + 4 * (rows * columns + targets * r * n_in)
    )


def mix_work(*, rows: int, parts: int, r: int, k: int) -> Work:
    """h from `parts` partial sums of g, fp32: an addition each, and 2 M (r + k)^2."""
    columns = r + k
    return Work(2 * rows * columns**2 if r else 0, rows * columns * parts, 4 * rows * columns * (parts + 1))


def fused_linear_work(
    *,
    rows: int,
    members: int,
    n_in: int,
    n_out: int,
    itemsize: int,
    targets: int = 0,
    r: int = 0,
    k: int = 0,
    bias: bool = True,
    residual: bool = False,
    gated: bool = False,
    next_columns: int = 0,
    parts: int = 0,
) -> Work:
    """The plain linear to all N, and beside it the expand of h of G targets, 2 M (r + k) N; a residual and a gate, read
    once; `parts` partial sums of C = `next_columns` for the linear that reads y, 2 M N C."""
    plain = linear_work(rows=rows, n_in=n_in, n_out=n_out, itemsize=itemsize, bias=bias)
    noise = normals_work(rows=members // 2, count=padded_rank(k) * n_out).operations
    extra = itemsize * (residual * rows * n_out + gated * members * n_out)
    small = 4 * (rows * (targets * (r + k) + parts * next_columns) + (r * n_out if targets else 0))
    flops = 2 * rows * n_out * ((r + k if targets else 0) + next_columns)
    return Work(plain.flops + flops, noise * (bool(targets) + bool(next_columns)), plain.bytes + extra + small)


def es_update_work(*, shape: tuple[int, int], pairs: int, k: int) -> Work:
    """sum_j w_j U_j V_j^T: 2 P k L S, the factors of every pair built once, the fp32 sum written once."""
    rows, cols = shape
    noise = sum(normals_work(rows=pairs, count=padded_rank(k) * length).operations for length in shape)
    return Work(2 * pairs * k * rows * cols, noise, 4 * rows * cols + 4 * pairs)


def linear_attention_work(
    *, batch: int, tokens: int, heads: int, width: int, itemsize: int, next_columns: int = 0
) -> Work:
    """S = K^T V with the sum of K, and Q S with its divisor: 4 D (D + 1) a token and head; q, k, v read, y written.
    With C = `next_columns` of the linear that reads y: 2 D C more, and a partial sum of each head is written."""
    rows = batch * tokens * heads
    return Work(
        4 * rows * width * (width + 1) + 2 * rows * width * next_columns,
        0,
        rows * (4 * itemsize * width + 4 * next_columns),
    )


def norm_work(*, rows: int, columns: int, itemsize: int) -> Work:
    """An RMS norm with weights: four operations an element; x read, y written."""
    return Work(0, 4 * rows * columns, itemsize * (2 * rows + 1) * columns)


def cross_attention_work(*, batch: int, tokens: int, text: int, heads: int, width: int, itemsize: int) -> Work:
    """Q K^T and P V, 4 D a token, word and head; of a score a difference, an exponential, a sum, a maximum and a
    rounding; q, k and v read, y written."""
    scores = batch * tokens * text * heads
    return Work(4 * scores * width, 5 * scores, itemsize * 2 * batch * (tokens + text) * heads * width)


def depthwise_gate_work(*, tokens: int, channels: int, itemsize: int, bias: bool = True) -> Work:
    """z silu(gate) of 2C channels: 18 multiply-adds an output, and an exponential, a sum, a quotient and two products
    of the gate; x is read once, [tokens, C] written once, the weight's 18 taps a channel of y read once."""
    values = 3 * tokens * channels + (18 + 2 * bias) * channels
    return Work(0, 23 * tokens * channels, itemsize * values)


def products(call: Callable[[], object]) -> Work:
    """The matrix products and convolutions that `call` makes, on tensors without storage too: their FLOPs, and their
    operands and results once each, as if what stands between them cost nothing."""
    found = _Products()
    with torch.no_grad(), found:
        call()
    return Work(found.flops, 0, found.bytes)


class _Products(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.flops = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=out)
            self.bytes += sum(leaf.nbytes for leaf in tree_leaves((args, kwargs, out)) if torch.is_tensor(leaf))
        return out


def ceilings(device: torch.device | str = "cpu") -> Ceilings | None:
    """The ceilings of a GPU from the table, None if it is not there. For a CPU those that this process reaches now.

    For a CPU they are the medians of a 1536^3 fp32 product and of a 256 MiB copy (read and written). One vector
    operation is assumed to last as long as one multiply-add, two FLOPs.
    """
    if torch.device(device).type == "cuda":
        return choose(torch.cuda.get_device_name(device)).ceilings
    size, x = 1536, torch.randn(1536, 1536)
    source = torch.zeros(1 << 26)
    target = torch.empty_like(source)
    taken = interleaved({"product": lambda: x @ x, "copy": lambda: target.copy_(source)}, rounds=7)
    flops = 2 * size**3 / taken["product"]["median"]
    return Ceilings({torch.float32: flops}, flops / 2, 2 * source.nbytes / taken["copy"]["median"])


def floor(work: Work, limits: Ceilings, dtype: torch.dtype = torch.float32) -> float:
    """Seconds at the roofline.

    Raises:
        ValueError: the ceilings lack `dtype`.
    """
    if dtype not in limits.flops:
        raise ValueError(f"dtype: expected one of {sorted(map(str, limits.flops))}, got {dtype}")
    return max(work.flops / limits.flops[dtype], work.operations / limits.operations, work.bytes / limits.bytes)


def share(seconds: float, work: Work, limits: Ceilings, dtype: torch.dtype = torch.float32) -> float:
    """The share of its time that an op would need at the device's ceilings. 1 is the roofline.

    Raises:
        ValueError: `seconds` is not positive, or the ceilings lack `dtype`.
    """
    if not seconds > 0:
        raise ValueError(f"seconds: expected a positive number, got {seconds}")
    return floor(work, limits, dtype) / seconds
