"""Noise contract v1: every normal number is a pure function of five integers (seed, step, stream, pair, element).

    x0..x3 = Philox4x32-10(key = seed, counter = (e >> 2, pair, stream, step))          four 32-bit words
    u_j    = ((x_j >> 8) + 0.5) * 2^-24                                                 in float32, round to nearest
    n0, n1 = sqrt(-2 ln u0) (cos, sin)(2 pi u1)        n2, n3 = sqrt(-2 ln u2) (cos, sin)(2 pi u3)
    element e is n_{e & 3}

A factor [L, k] is row-major with k padded to the next power of two: e = row * kp + column. `stream` identifies the
tensor. `pair` is member // 2: the antithetic members 2j and 2j + 1 share their noise. The caller applies the sign.

Legend: P rows of noise, L length of a factor, k noise rank, kp padded rank, Q counters of four normals each.

On a CPU, ln, cos and sin are computed in float64 and rounded once. So an element has the same bits at every position of
a tensor. A GPU computes them in float32, and its results agree up to that rounding. The integers and u are exact on
every device.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); Box and Muller (1958).
"""

import hashlib
import math
import sys
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # not installed: the torch path needs no Triton
    triton = None

CONTRACT = 1
INTERPRET = triton is not None and bool(triton.knobs.runtime.interpret)
"""Whether Triton runs its interpreter: kernels then run on CPU tensors, and bf16 is converted to fp32 in products."""

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_FACTORS = np.array(_MULTIPLIERS, np.uint64)[:, None, None]
_STEPS = np.arange(10, dtype=np.uint64)[:, None, None, None] * np.array(_WEYL, np.uint64)[:, None, None]
_M0, _M1 = map(np.uint64, _MULTIPLIERS)
_32, _LOW, _UPPER_24 = np.uint64(32), np.uint64(_MASK), np.uint64(0xFFFFFF00)


class Streams(NamedTuple):
    """Stream ids of one linear's factors. A = [r, in] is perturbed by a_u [r, k] a_v [in, k]^T, B = [out, r] by
    b_u [out, k] b_v [r, k]^T. In direct mode (r = 0) W = [out, in] is perturbed by b_u [out, k] a_v [in, k]^T."""

    a_v: int
    a_u: int
    b_v: int
    b_u: int


def stream_id(name: str) -> int:
    """The 32-bit stream id of a tensor's name: the first four bytes of its BLAKE2b, little endian."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")


def linear_streams(name: str, *, direct: bool = False) -> Streams:
    """The stream ids of the linear called `name`, in LoRA form or in direct form."""
    if direct:
        return Streams(stream_id(f"{name}.weight.V"), 0, 0, stream_id(f"{name}.weight.U"))
    return Streams(*(stream_id(f"{name}.{factor}") for factor in ("lora_A.V", "lora_A.U", "lora_B.V", "lora_B.U")))


def padded_rank(rank: int) -> int:
    """k padded to the next power of two: the row length of a factor in the contract."""
    return 1 << (rank - 1).bit_length()


def check_rank(rank: int) -> None:
    """Raise ValueError unless the noise rank is an integer >= 1."""
    if not isinstance(rank, int):
        raise ValueError(f"rank: expected an integer, got {rank!r}")
    if rank < 1:
        raise ValueError(f"rank: expected at least 1, got {rank}")


def pair_weights(fitness: torch.Tensor) -> torch.Tensor:
    """f_2j - f_2j+1, fp32 [N / 2]: the weight of a pair's noise, because its two members have opposite signs."""
    return fitness[0::2] - fitness[1::2]


def signed_sigma(members: torch.Tensor, sigma: float, rank: int) -> torch.Tensor:
    """c [B] float32: sign * sigma / sqrt(k), with sign +1 for even members and -1 for odd ones."""
    return (1 - 2 * (members & 1)).float() * (sigma / math.sqrt(rank))


def key_words(seed: int, step: int) -> tuple[int, int]:
    """The two 32-bit words of Philox's key. Raise ValueError for a seed or step outside the contract's range."""
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed: expected an integer in [0, 2^64), got {seed}")
    if not 0 <= step < 1 << 32:
        raise ValueError(f"step: expected an integer in [0, 2^32), got {step}")
    return seed & _MASK, seed >> 32


def signed64(seed: int) -> int:
    """A 64-bit seed as the int64 that a kernel takes."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed


def uses_triton(device: torch.device | str) -> bool:
    """Whether ops on this device use Triton: CUDA with Triton installed, or any device under the interpreter."""
    return triton is not None and (INTERPRET or torch.device(device).type == "cuda")


def step_tensor(step: int | torch.Tensor, device: torch.device) -> torch.Tensor:
    """The step as int64 [1] on `device`. A tensor is returned unchanged. An int needs no copy from the host.

    Raises:
        ValueError: The tensor has the wrong shape, dtype or device.
    """
    if not isinstance(step, torch.Tensor):
        return torch.full((1,), step, dtype=torch.int64, device=device)
    if step.shape != (1,) or step.dtype != torch.int64 or step.device != device:
        dtype = str(step.dtype).removeprefix("torch.")
        raise ValueError(f"step: expected int64 [1] on {device}, got {dtype} {list(step.shape)} on {step.device}")
    return step


if triton is not None:

    @triton.jit
    def box_muller(x_radius, x_angle):
        u = ((x_radius >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-08
        radius = tl.sqrt(tl.maximum(-2.0 * tl.log(u), 0.0))
        # quadrant in integers, then Cephes' polynomials on [-pi/4, pi/4]; tl.cos spills registers
        turn = (x_angle >> 8).to(tl.int32)
        quadrant = (turn + 2097152) >> 22
        half = tl.where(turn < 8388608, 0.5, (turn & 1).to(tl.float32))  # as float32 rounds turn + 0.5
        phi = ((turn - (quadrant << 22)).to(tl.float32) + half) * 3.7450702829239286e-07
        z = phi * phi
        s = phi + phi * z * (-1.6666654611e-1 + z * (8.3321608736e-3 - z * 1.9515295891e-4))
        c = 1.0 - 0.5 * z + z * z * (4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5))
        odd = (quadrant & 1) == 1
        cos = tl.where(odd, s, c) * (1 - ((quadrant + 1) & 2)).to(tl.float32)
        sin = tl.where(odd, c, s) * (1 - (quadrant & 2)).to(tl.float32)
        return radius * cos, radius * sin

    @triton.jit
    def noise_rows(seed, step, stream, pair, row0, ROWS: tl.constexpr, KP: tl.constexpr):
        """float32 [ROWS, KP]: rows row0.. of a factor. ROWS, KP: powers of 2. row0 * KP, ROWS * KP: multiples of 4."""
        quads = row0 * KP // 4 + tl.arange(0, ROWS * KP // 4)
        zero = tl.zeros_like(quads).to(tl.int64)
        words = (zero + quads).to(tl.uint32), (zero + pair).to(tl.uint32)
        x0, x1, x2, x3 = tl.philox(seed, *words, (zero + stream).to(tl.uint32), (zero + step).to(tl.uint32))
        n0, n1 = box_muller(x0, x1)
        n2, n3 = box_muller(x2, x3)
        lanes = tl.join(tl.join(n0, n2), tl.join(n1, n3))  # [quads, 2, 2], row-major n0 n1 n2 n3
        return tl.reshape(lanes, (ROWS, KP))

    @triton.jit
    def noise_at(seed, step, stream, pair, e):
        """float32, shape of e: single elements of factors. `stream`, `pair` and `e` broadcast to one shape."""
        zero = (e + stream + pair).to(tl.int64) * 0
        words = ((zero + (e >> 2)).to(tl.uint32), (zero + pair).to(tl.uint32), (zero + stream).to(tl.uint32))
        x0, x1, x2, x3 = tl.philox(seed, *words, (zero + step).to(tl.uint32))
        lane = (zero + e) & 3
        cos, sin = box_muller(tl.where(lane < 2, x0, x2), tl.where(lane < 2, x1, x3))
        return tl.where((lane & 1) == 0, cos, sin)

    @triton.jit
    def offset(index, stride):
        """index * stride in 64 bits, because activations and weights can have more than 2^31 elements."""
        return index.to(tl.int64) * stride

    @triton.jit(do_not_specialize=["seed", "count"], do_not_specialize_on_alignment=["step_ptr"])
    def _normals_kernel(
        out_ptr, streams_ptr, pairs_ptr, step_ptr, seed: tl.int64, count, stride_op, BLOCK: tl.constexpr
    ):
        row = tl.program_id(0)
        first = tl.program_id(1) * BLOCK
        stream, pair = tl.load(streams_ptr + row), tl.load(pairs_ptr + row)
        noise = tl.reshape(noise_rows(seed, tl.load(step_ptr), stream, pair, first, BLOCK, 1), (BLOCK,))
        e = first + tl.arange(0, BLOCK)
        tl.store(out_ptr + offset(row, stride_op) + e, noise, mask=e < count)


def normals(
    *,
    seed: int,
    step: int | torch.Tensor,
    streams: torch.Tensor,
    pairs: torch.Tensor,
    count: int,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """The first `count` normals of each of P (stream, pair). Triton on a GPU, `normals_ref` elsewhere.

    Args:
        seed: the run's seed, in [0, 2^64).
        step: in [0, 2^32). Or int64 [1] on `device`, which the Triton path reads there.
        streams: int64 [P], values in [0, 2^32).
        pairs: int64 [P], values in [0, 2^32).
        count: normals in each row.
        device: device of the result.

    Returns:
        float32 [P, count].

    Raises:
        ValueError: An argument has the wrong shape or dtype, or is out of range. The message names it.
    """
    _check(streams, pairs, count)
    if not uses_triton(device):
        return normals_ref(seed=seed, step=step, streams=streams, pairs=pairs, count=count, device=device)
    if not isinstance(step, torch.Tensor):  # a tensor's value is not read: that would wait for the device
        key_words(seed, step)
    streams, pairs = streams.to(device).contiguous(), pairs.to(device).contiguous()
    out = torch.empty(len(pairs), count, dtype=torch.float32, device=device)
    if out.numel():
        block = 1024
        grid = (len(pairs), triton.cdiv(count, block))
        with torch.cuda.device_of(out):
            _normals_kernel[grid](
                out, streams, pairs, step_tensor(step, out.device),
                seed=signed64(seed), count=count, stride_op=out.stride(0), BLOCK=block,
            )  # fmt: skip
    return out


def factor(
    *, seed: int, step: int | torch.Tensor, stream: int, pairs: torch.Tensor, length: int, rank: int
) -> torch.Tensor:
    """One low-rank factor for each of P pairs. Triton on a GPU, `factor_ref` elsewhere.

    Args:
        seed, step: as in `normals`.
        stream: stream id of the factor.
        pairs: int64 [P].
        length, rank: L and k.

    Returns:
        float32 [P, L, k] on the device of `pairs`.
    """
    check_rank(rank)
    kp = padded_rank(rank)
    streams = torch.full_like(pairs, stream)
    rows = normals(seed=seed, step=step, streams=streams, pairs=pairs, count=length * kp, device=pairs.device)
    return rows.view(-1, length, kp)[:, :, :rank]


def philox_ref(counter: Sequence[torch.Tensor], key: tuple[int, int]) -> list[torch.Tensor]:
    """Philox4x32-10 on int64 tensors that hold 32-bit words.

    Args:
        counter: four int64 tensors of one broadcastable shape, values in [0, 2^32).
        key: two 32-bit words, low word of the seed first.

    Returns:
        Four int64 tensors, values in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # the product wraps to a negative int64; the mask after the arithmetic shift drops the copied sign bits
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, high1 = (p0 >> 32).bitwise_and_(_MASK), (p1 >> 32).bitwise_and_(_MASK)
        c0, c2 = (high1 ^ c1).bitwise_xor_(k0), (high0 ^ c3).bitwise_xor_(k1)
        c1, c3 = p1.bitwise_and_(_MASK), p0.bitwise_and_(_MASK)
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return [c0, c1, c2, c3]


def quads_ref(
    *,
    seed: int,
    step: int,
    quads: torch.Tensor,
    streams: torch.Tensor,
    pairs: torch.Tensor,
    memory: "Memory | None" = None,
) -> torch.Tensor:
    """Four normals for each counter: float32 [..., 4]. `quads` (e >> 2), `streams`, `pairs`: int64 that broadcast.

    `memory` is used on a CPU. A caller that calls repeatedly passes the same one.
    """
    if quads.device.type != "cpu" or pairs.dim() != 2:
        return _quads(quads, pairs, streams, torch.tensor(step, device=quads.device), key_words(seed, step))
    counter = [word.numpy().view(np.uint64) for word in (quads, pairs, streams)]
    counter = [word if word.ndim == 2 else word[None] for word in counter]
    (height, length), memory = np.broadcast(*counter).shape, memory or Memory()
    out, keys = memory.take((height, length, 4)), _round_keys(key_words(seed, step))
    width = min(length, _AT_ONCE)
    rows = max(1, _AT_ONCE // max(1, width))
    rows = math.ceil(height / max(1, math.ceil(height / rows)))  # blocks of equal size
    for row in range(0, height, max(1, rows)):
        for column in range(0, length, max(1, width)):
            block = slice(row, row + rows), slice(column, column + width)
            words = [
                word[tuple(part if size > 1 else slice(1) for part, size in zip(block, word.shape, strict=True))]
                for word in counter
            ]
            _fill(out[block], words, step, keys, memory.buffers)
    return torch.from_numpy(out)


_AT_ONCE = 1 << 15
"""Counters that a CPU computes in one block, with 1.5 MB of buffers."""

KEPT_BYTES = 1 << 26
"""Largest noise in bytes that a plan keeps until its next call. Constant, so memory does not grow with N."""


class Memory(threading.local):
    """Buffers for noise on a CPU, reused by later calls. Getting new memory can take as long as computing the noise.

    Each thread has its own buffers.
    """

    def __reduce__(self):
        return Memory, ()

    def __init__(self):
        self.buffers = np.empty(6 * _AT_ONCE, np.uint64)
        self._last = np.empty(0, np.float32)

    def take(self, shape: tuple[int, ...]) -> np.ndarray:
        """An uninitialised float32 array. It reuses the memory of the last one if nothing refers to that any more."""
        count = math.prod(shape)
        if self._last.size < count or sys.getrefcount(self._last) > 2:
            self._last = np.empty(count, np.float32)
        taken = self._last[:count].reshape(shape)
        if taken.nbytes > KEPT_BYTES:
            self._last = np.empty(0, np.float32)
        return taken


def _quads(quads, pairs, streams, step, key: tuple[int, int]) -> torch.Tensor:
    words = philox_ref([quads, pairs, streams, step], key)
    wide = torch.float32 if quads.is_cuda else torch.float64
    shape = torch.broadcast_shapes(*(word.shape for word in words))
    out = torch.empty(*shape, 4, dtype=torch.float32, device=quads.device)
    for first in (0, 2):
        u_radius, u_angle = (
            ((word >> 8).to(torch.float32) + 0.5).mul_(2**-24).to(wide) for word in words[first : first + 2]
        )
        radius, angle = u_radius.log_().mul_(-2).clamp_min_(0).sqrt_(), u_angle.mul_(2 * math.pi)
        out[..., first], out[..., first + 1] = radius * angle.cos(), radius * angle.sin()
    return out


def _round_keys(key: tuple[int, int]) -> np.ndarray:
    """The key in each of Philox's ten rounds: uint64 [10, 2, 1, 1]."""
    return np.array(key, np.uint64)[:, None, None] + _STEPS & _LOW


def _fill(out: np.ndarray, counter: Sequence[np.ndarray], step: int, keys: np.ndarray, buffers: np.ndarray) -> None:
    """Write the normals of a block of counters into `out`, float32 [R, Q, 4]. The bits are those of `_quads`.

    NumPy's integer operations are faster on one core. Logarithms, roots, cosines and sines are torch's, because the
    contract on a CPU has their last bits.

    Args:
        counter: uint64 quads, pairs and streams that broadcast to [R, Q].
        keys: the keys of the rounds, from `_round_keys`.
        buffers: uint64, at least 6 R Q, overwritten.
    """
    rows, columns = out.shape[:2]
    *words, spare = _philox(counter, step, keys, buffers[: 6 * rows * columns].reshape(3, 2, rows, columns))
    narrow = spare.reshape(-1).view(np.float32)[: spare.size].reshape(spare.shape)
    for word in words:
        word &= _UPPER_24
        np.copyto(narrow, word.view(np.int64), casting="same_kind")
        narrow += np.float32(128)
        narrow *= np.float32(2**-32)
        np.copyto(word.view(np.float64), narrow)
    radius, angle = (word.view(np.float64) for word in words)  # [2, R, Q]: lanes 0 and 1, lanes 2 and 3
    roots = torch.from_numpy(radius)
    roots.log_().mul_(-2).sqrt_()
    angle *= 2 * math.pi
    product, lanes = spare.view(np.float64), out.reshape(rows, columns, 2, 2).transpose(3, 2, 0, 1)
    for function, lane in zip((torch.cos, torch.sin), lanes, strict=True):
        function(torch.from_numpy(angle), out=torch.from_numpy(product))
        np.multiply(product, radius, out=lane, casting="same_kind")


def _philox(
    counter: Sequence[np.ndarray], step: int, keys: np.ndarray, buffers: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`philox_ref` in three buffers uint64 [2, R, Q]. Returns words 0 and 2, words 1 and 3, and the free buffer.

    Only the lower 32 bits of a word are used. In the first three rounds many words are constant along a row or column.
    """
    (quads, pairs, streams), (even, odd, product) = counter, buffers
    p0, p1 = quads * _M0, streams * _M1
    np.bitwise_xor((p1 >> _32) ^ keys[0][0], pairs, out=even[0])
    c1, c2, c3 = p1 & _LOW, (p0 >> _32) ^ np.uint64(step) ^ keys[0][1], p0 & _LOW

    p1 = c2 * _M1
    np.multiply(even[0], _M0, out=odd[1])
    c0, c1 = (p1 >> _32) ^ c1 ^ keys[1][0], p1 & _LOW
    np.right_shift(odd[1], _32, out=even[1])
    even[1] ^= c3 ^ keys[1][1]

    p0 = c0 * _M0
    np.multiply(even[1], _M1, out=odd[0])
    np.right_shift(odd[0], _32, out=even[0])
    even[0] ^= c1 ^ keys[2][0]
    np.bitwise_xor(odd[1], (p0 >> _32) ^ keys[2][1], out=even[1])
    even[1] &= _LOW
    odd[1] = p0

    for key in keys[3:]:
        np.multiply(even, _FACTORS, out=product[::-1])
        np.right_shift(product, _32, out=even)
        even ^= odd
        even ^= key
        even &= _LOW
        odd, product = product, odd
    return even, odd, product


def normals_ref(
    *,
    seed: int,
    step: int | torch.Tensor,
    streams: torch.Tensor,
    pairs: torch.Tensor,
    count: int,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """The first `count` normals of each of P (stream, pair), in torch. Arguments as in `normals`."""
    _check(streams, pairs, count)
    quads = torch.arange((count + 3) // 4, device=device)
    streams, pairs = streams.to(device)[:, None], pairs.to(device)[:, None]
    return quads_ref(seed=seed, step=int(step), quads=quads, streams=streams, pairs=pairs).flatten(1)[:, :count]


def _check(streams: torch.Tensor, pairs: torch.Tensor, count: int) -> None:
    """Raise ValueError for an operand that does not match. See `normals`."""
    for name, ids in (("streams", streams), ("pairs", pairs)):
        if ids.dtype != torch.int64 or ids.dim() != 1 or len(ids) != len(pairs):
            dtype = str(ids.dtype).removeprefix("torch.")
            raise ValueError(f"{name}: expected int64 [{len(pairs)}], one for each row, got {dtype} {list(ids.shape)}")
    if count < 0:
        raise ValueError(f"count: expected at least 0, got {count}")


def factor_ref(
    *, seed: int, step: int | torch.Tensor, stream: int, pairs: torch.Tensor, length: int, rank: int
) -> torch.Tensor:
    """One low-rank factor for each of P pairs, from `normals_ref`. Arguments as in `factor`."""
    check_rank(rank)
    kp = padded_rank(rank)
    streams = torch.full_like(pairs, stream)
    rows = normals_ref(seed=seed, step=step, streams=streams, pairs=pairs, count=length * kp, device=pairs.device)
    return rows.view(-1, length, kp)[:, :, :rank]


class NoisePlan:
    """Computes all factors of many tensors in one call. The counters are prepared once.

    Args:
        shapes: (stream, length) of every factor. Stream ids must differ.
        rank: the noise rank k.
        device: device of the counters and the noise.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], rank: int, device: torch.device | str = "cpu"):
        self.shapes, self.rank, self.kp = list(shapes), rank, padded_rank(rank)
        counts = [(length * self.kp + 3) // 4 for _, length in self.shapes]
        quads = [torch.arange(count) for count in counts]
        streams = [torch.full((count,), stream) for count, (stream, _) in zip(counts, self.shapes, strict=True)]
        self.quads = torch.cat(quads).to(device)
        self.streams = torch.cat(streams).to(device)
        self.offsets = [0]
        for count in counts:
            self.offsets.append(self.offsets[-1] + 4 * count)
        self._kept: tuple[tuple[int, int], int, torch.Tensor] | None = None
        self._memory = Memory()

    def block(
        self, *, seed: int, step: int, pairs: torch.Tensor, slots: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """Every factor of the plan for P pairs, as views of one buffer. Memory grows only with P, or with B.

        Args:
            seed, step: as in `normals`.
            pairs: int64 [P].
            slots: int64 [B], for each batch row the index of its pair in `pairs`.

        Returns:
            float32 [P, length, rank] for each factor, or [B, length, rank] with `slots`.
        """
        noise = self._numbers(seed, step, pairs)
        if slots is not None:
            noise = noise.index_select(0, slots)  # one gather of whole rows is much faster than one for each factor
        base, size, strides = noise.storage_offset(), len(noise), (noise.stride(0), self.kp, 1)
        return [
            noise.as_strided((size, length, self.rank), strides, base + start)
            for start, (_, length) in zip(self.offsets, self.shapes, strict=False)
        ]

    def stacks(self, *, seed: int, step: int, pairs: torch.Tensor) -> Callable[[int, int], torch.Tensor]:
        """As `block`, but returns a function of (first, count) that gives `count` factors of equal length.

        `first` is the index of the first of them in the plan. The result is a view, float32 [P, count, length, rank].
        """
        noise = self._numbers(seed, step, pairs)

        def stack(first: int, count: int) -> torch.Tensor:
            start, each = self.offsets[first], self.offsets[first + 1] - self.offsets[first]
            shape, strides = (len(noise), count, self.shapes[first][1], self.rank), (noise.stride(0), each, self.kp, 1)
            return noise.as_strided(shape, strides, noise.storage_offset() + start)

        return stack

    def _numbers(self, seed: int, step: int, pairs: torch.Tensor) -> torch.Tensor:
        """All numbers, float32 [P, offsets[-1]]. Do not write into them: small ones are kept for the next call."""
        first, count = int(pairs[0]) if len(pairs) else 0, len(pairs)
        in_order = pairs.tolist() == list(range(first, first + count))
        kept = self._kept  # read once, because another thread may set it
        if kept is not None and kept[0] == (seed, step) and in_order:
            start = first - kept[1]
            found = kept[2][max(start, 0) : max(start, 0) + count]
            if start >= 0 and len(found) == count:
                return found
        kept = self._kept = None  # frees its memory for the next
        counter = dict(quads=self.quads, streams=self.streams, pairs=pairs[:, None])
        noise = quads_ref(seed=seed, step=step, **counter, memory=self._memory).flatten(1)
        if noise.nbytes <= KEPT_BYTES and in_order:
            self._kept = (seed, step), first, noise
        return noise
