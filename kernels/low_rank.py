"""Device code that kernels share: the low-rank columns of a tile, their products, and the mix of g to h.

A kernel rebuilds a member's factors for each tile of rows, or it loads the factors that `member_factors` stored. A
stored number is used by all T rows of its batch row.

Legend: G targets, r LoRA rank, k noise rank (kp padded), K rows of V; a tile's columns are r of each target, then k of
each, padded to CP. `U_AT`, `V_OUT_AT`, `U_OUT_AT`, `WIDTH`: `FactorStarts` of the stored factors.
"""

import triton
import triton.language as tl

from esengine.kernels.noise import noise_at, noise_rows, offset


@triton.jit
def column(tile, j, KP: tl.constexpr):
    """float32 [ROWS]: column j of a [ROWS, KP] tile."""
    return tl.sum(tl.where(tl.arange(0, KP)[None, :] == j, tile, 0.0), axis=1)


@triton.jit
def within(k0, K, BLOCK_K: tl.constexpr):
    """Mask of the columns k0.. that are below K. All true at compile time if K is a multiple of the block."""
    inside = k0 + tl.arange(0, BLOCK_K) < K
    if isinstance(K, tl.constexpr):  # noqa: SIM102  Triton decides the outer one first
        if K % BLOCK_K == 0:
            inside = tl.full((BLOCK_K,), True, tl.int1)
    return inside


@triton.jit
def split_bf16(x, SPLIT: tl.constexpr, UPCAST: tl.constexpr):
    """Two bf16 parts of an fp32 tile, the larger first. Their sum is x to a relative 2^-16. Not SPLIT: x twice."""
    upper, lower = x, x
    if SPLIT:
        upper = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        lower = (x - upper).to(tl.bfloat16)
        if UPCAST:
            lower = lower.to(tl.float32)
        else:
            upper = upper.to(tl.bfloat16)
    return upper, lower


@triton.jit
def product(x, columns, acc, ROWS: tl.constexpr, SPLIT: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """acc + x [ROWS, L] @ columns [L, C] in fp32. From 16 rows on, the minimum, on the tensor cores.

    SPLIT: x is bf16, and the columns are multiplied as two bf16 parts.
    """
    if ROWS < 16:
        acc += tl.sum(x.to(tl.float32)[:, :, None] * columns[None, :, :], axis=1)
    elif SPLIT:
        upper, lower = split_bf16(columns, True, UPCAST)
        acc = tl.dot(x, upper, tl.dot(x, lower, acc))
    else:
        acc = tl.dot(x.to(tl.float32), columns, acc, input_precision=PRECISION)
    return acc


@triton.jit
def low_rank_columns(
    a_ptr, streams_ptr, factors_ptr, stride_ar, stride_ak, seed, step, pair, k0, K,
    G: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, KP: tl.constexpr, CP: tl.constexpr,
    BLOCK_K: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK_K, CP]: rows k0.. of [A_1^T .. A_G^T | V_1 .. V_G]. From row K on x must be zero."""
    k, column = k0 + tl.arange(0, BLOCK_K), tl.arange(0, CP)
    inside, place = within(k0, K, BLOCK_K)[:, None], column - G * R
    columns = tl.zeros((BLOCK_K, CP), tl.float32)
    if factors_ptr is not None:  # one load: each column has its address and its stride
        starts = factors_ptr + (place // RANK * WIDTH + place % RANK)
        strides = tl.full((CP,), KP, tl.int32)
        if R > 0:
            starts = tl.where(place < 0, a_ptr + offset(column, stride_ar), starts)
            strides = tl.where(place < 0, stride_ak, strides)
        ptrs = starts[None, :] + offset(k[:, None], strides[None, :])
        columns = tl.load(ptrs, mask=inside & (place < G * RANK)[None, :], other=0.0)
    else:
        if R > 0:
            a_ptrs = a_ptr + offset(column, stride_ar)[None, :] + offset(k, stride_ak)[:, None]
            columns = tl.load(a_ptrs, mask=inside & (place < 0)[None, :], other=0.0)
        for i in tl.static_range(G):
            v = noise_rows(seed, step, tl.load(streams_ptr + 4 * i), pair, k0, BLOCK_K, KP)
            for j in tl.static_range(RANK):
                v_j = tl.sum(tl.where(tl.arange(0, KP)[None, :] == j, v, 0.0), axis=1)
                columns = tl.where(column[None, :] == G * R + i * RANK + j, v_j[:, None], columns)
    return columns


@triton.jit
def small_factor(
    streams_ptr, factors_ptr, seed, step, pair, e, mask,
    FACTOR: tl.constexpr, AT: tl.constexpr,
):  # fmt: skip
    """float32, shape of e: elements of U (FACTOR 1) or V' (2) of one target. Zero where `mask` is false."""
    if factors_ptr is not None:
        numbers = tl.load(factors_ptr + AT + e, mask=mask, other=0.0)
    else:
        numbers = tl.where(mask, noise_at(seed, step, tl.load(streams_ptr + FACTOR), pair, e), 0.0)
    return numbers


@triton.jit
def mixed(
    g, streams_ptr, factors_ptr, seed, step, pair, c, lora_scale,
    G: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, KP: tl.constexpr, CP: tl.constexpr,
    U_AT: tl.constexpr, V_OUT_AT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """h [ROWS, CP] from g. Column i R + q belongs to row q of A of target i, column G R + i k + j to its noise."""
    column = tl.arange(0, CP)
    h = tl.where((column < G * R)[None, :], lora_scale * g, 0.0)
    if R == 0:
        h = c * g
    for i in tl.static_range(G if R > 0 else 0):
        of_target = (column >= i * R) & (column < (i + 1) * R)
        streams, factors = streams_ptr + 4 * i, factors_ptr
        if factors_ptr is not None:
            factors = factors_ptr + i * WIDTH
        for j in tl.static_range(RANK):
            e = (column - i * R) * KP + j
            u = small_factor(streams, factors, seed, step, pair, e, of_target, 1, U_AT)
            g_v = tl.sum(tl.where((column == G * R + i * RANK + j)[None, :], g, 0.0), axis=1)
            h += (lora_scale * c * g_v)[:, None] * u[None, :]
        for j in tl.static_range(RANK):
            e = (column - i * R) * KP + j
            v = small_factor(streams, factors, seed, step, pair, e, of_target, 2, V_OUT_AT)
            h_v = c * tl.sum(h * v[None, :], axis=1)
            h = tl.where((column == G * R + i * RANK + j)[None, :], h_v[:, None], h)
    return h


@triton.jit
def h_tile(
    h_ptr, rows, real, target,
    G: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, CP: tl.constexpr,
):  # fmt: skip
    """float32 [ROWS, CP]: h of one target, r columns, then k, from rows of h [.., G (r + k)]. Zero where not `real`."""
    q = tl.arange(0, CP)
    column = tl.where(q < R, target * R + q, G * R + target * RANK + q - R)
    ptrs = h_ptr + offset(rows, G * (R + RANK))[:, None] + column[None, :]
    return tl.load(ptrs, mask=real[:, None] & (q < R + RANK)[None, :], other=0.0)


@triton.jit
def expand_columns(
    b_ptr, streams_ptr, factors_ptr, stride_bn, stride_br, seed, step, pair, row, target, n0, end, N,
    G: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, KP: tl.constexpr, CP: tl.constexpr,
    U_OUT_AT: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """float32 [CP, BLOCK_N]: columns n0.. of [B | U']^T of one target and one batch row. Zero from column `end` on.

    Without stored factors n0 KP must be a multiple of 4.
    """
    q, n, inside = tl.arange(0, CP), n0 + tl.arange(0, BLOCK_N), within(n0, end, BLOCK_N)[None, :]
    columns = tl.zeros((CP, BLOCK_N), tl.float32)
    b_starts = q
    if b_ptr is not None:
        b_starts = b_ptr + offset(tl.full((CP,), target * N, tl.int32), stride_bn) + offset(q, stride_br)
    if factors_ptr is not None:  # one load: each column has its address and its stride
        starts = factors_ptr + offset(row * G + target, WIDTH) + U_OUT_AT + (q - R)
        strides = tl.full((CP,), KP, tl.int32)
        if b_ptr is not None:
            starts = tl.where(q < R, b_starts, starts)
            strides = tl.where(q < R, stride_bn, strides)
        ptrs = starts[:, None] + offset(n[None, :], strides[:, None])
        columns = tl.load(ptrs, mask=(q < R + RANK)[:, None] & inside, other=0.0)
    else:
        if b_ptr is not None:
            b_ptrs = b_starts[:, None] + offset(n, stride_bn)[None, :]
            columns = tl.load(b_ptrs, mask=(q < R)[:, None] & inside, other=0.0)
        u = noise_rows(seed, step, tl.load(streams_ptr + 4 * target + 3), pair, n0, BLOCK_N, KP)
        for i in tl.static_range(RANK):
            columns = tl.where((q == R + i)[:, None] & inside, column(u, i, KP)[None, :], columns)
    return columns
