"""A linear layer in one kernel: the epilogue of the GEMM adds low-rank columns, activation, gate and residual.

    z = x W^T + bias + h [B | U']^T          expand: U' rebuilt, or read from stored factors
    z = z sigmoid(z)                         optional: SiLU, or GELU by tanh, z sigmoid(1.596 (z + 0.044715 z^3))
    y = residual + gate z                    optional; rounded once
    g_p = y_p [A^T | V]_p                    optional: for the linear that reads y, the partial sum of tile p

W contains G targets of N columns each. Each target has its columns in h, and h contains c and s (see
`esengine.kernels.shrink`). There is no noise in the loop over K. It would make the compiler wait for every product.

The expand is one more product. If x has half precision, it is in tf32: an error of 2^-11 of the low-rank part, which is
below the rounding of y.

Legend: B batch rows, T rows a batch row, M = B T, K in, G targets of N columns, r LoRA rank, k noise rank (kp padded),
KD low-rank columns of a tile, padded, QD of them in one product.

Source: as `esengine.kernels.population_linear`.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F

from esengine.kernels import configs
from esengine.kernels.factors import check_factors
from esengine.kernels.launch import noise_arguments, output
from esengine.kernels.noise import INTERPRET, factor_ref, triton, uses_triton
from esengine.kernels.operands import Lora, MemberNoise, check, check_adapters, check_noise, check_x, refuse
from esengine.kernels.shrink import check_next_lora, partial_sums_ref

if triton is not None:
    import triton.language as tl

    from esengine.kernels.low_rank import column, low_rank_columns, split_bf16
    from esengine.kernels.noise import noise_rows, offset

    @triton.jit(
        do_not_specialize=["M", "T", "seed"], do_not_specialize_on_alignment=["members_ptr", "step_ptr", "factors_ptr"]
    )
    def _linear_kernel(
        x_ptr, w_ptr, bias_ptr, b_ptr, h_ptr, streams_ptr, members_ptr, step_ptr, factors_ptr, residual_ptr, gate_ptr,
        y_ptr, a_ptr, next_streams_ptr, sums_ptr,
        M, N, T,
        stride_xb, stride_xt, stride_xk, stride_wn, stride_wk, stride_bn, stride_br, stride_gb, stride_ar, stride_ak,
        seed: tl.int64,
        K: tl.constexpr, G: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, KP: tl.constexpr,
        U_AT: tl.constexpr, V_OUT_AT: tl.constexpr, U_OUT_AT: tl.constexpr, WIDTH: tl.constexpr,
        KD: tl.constexpr, QD: tl.constexpr, ACTIVATION: tl.constexpr,
        UPCAST: tl.constexpr, PRECISION: tl.constexpr, NEXT_R: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    ):  # fmt: skip
        # programs of one group of row tiles share columns of W in L2; no tile covers two targets
        pid, tiles_m, tiles = tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
        group = pid // (GROUP_M * G * tiles)
        group_m = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
        tile_m = group * GROUP_M + (pid % (GROUP_M * G * tiles)) % group_m
        tile_n = (pid % (GROUP_M * G * tiles)) // group_m
        target, first_n = tile_n // tiles, (tile_n % tiles) * BLOCK_N

        m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        real_n = first_n + tl.arange(0, BLOCK_N) < N
        n = target * N + first_n + tl.arange(0, BLOCK_N)
        row = m // T  # the batch row, and with it the member, of each row of the tile
        first_row, last_row = tile_m * BLOCK_M // T, (tl.minimum((tile_m + 1) * BLOCK_M, M) - 1) // T
        x_rows = x_ptr + (offset(row, stride_xb) + offset(m % T, stride_xt))[:, None]
        w_cols = w_ptr + offset(n, stride_wn)[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k0 in range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            x_mask, w_mask = (m[:, None] < M) & (k[None, :] < K), (k[:, None] < K) & real_n[None, :]
            x = tl.load(x_rows + offset(k, stride_xk)[None, :], mask=x_mask, other=0.0)
            w = tl.load(w_cols + offset(k, stride_wk)[:, None], mask=w_mask, other=0.0)
            if UPCAST:
                x, w = x.to(tl.float32), w.to(tl.float32)
            acc = tl.dot(x, w, acc, input_precision=PRECISION)

        if h_ptr is not None:
            # first gather the columns of all members of the tile: one product needs half the registers of several
            step = tl.load(step_ptr)
            for q0 in tl.range(0, KD, QD, num_stages=1):
                q = q0 + tl.arange(0, QD)
                columns = tl.zeros((QD, BLOCK_N), tl.float32)
                if factors_ptr is not None:  # one load: each column has its address and stride
                    member = first_row + (q - R) // RANK
                    starts = factors_ptr + offset(member * G + target, WIDTH) + U_OUT_AT + (q - R) % RANK
                    strides = tl.full((QD,), KP, tl.int32)
                    if b_ptr is not None:
                        b_starts = b_ptr + offset(q, stride_br) + offset(target * N, stride_bn)
                        starts = tl.where(q < R, b_starts, starts)
                        strides = tl.where(q < R, stride_bn, strides)
                    ptrs = starts[:, None] + offset((first_n + tl.arange(0, BLOCK_N))[None, :], strides[:, None])
                    columns = tl.load(ptrs, mask=(member <= last_row)[:, None] & real_n[None, :], other=0.0)
                elif b_ptr is not None:
                    b_ptrs = b_ptr + offset(n, stride_bn)[None, :] + offset(q, stride_br)[:, None]
                    columns = tl.load(b_ptrs, mask=(q < R)[:, None] & real_n[None, :], other=0.0)
                if factors_ptr is None and q0 + QD > R:
                    stream, member_row = tl.load(streams_ptr + 4 * target + 3), first_row
                    while member_row <= last_row:  # Triton 3.6's interpreter has no range of a run-time number
                        pair = tl.load(members_ptr + member_row) >> 1
                        u = noise_rows(seed, step, stream, pair, first_n, BLOCK_N, KP)
                        for i in tl.static_range(RANK):
                            place = R + (member_row - first_row) * RANK + i
                            columns = tl.where((q == place)[:, None], column(u, i, KP)[None, :], columns)
                        member_row += 1
                h_column = tl.where(q < R, target * R + q, G * R + target * RANK + (q - R) % RANK)
                of_row = (q < R)[None, :] | ((row - first_row)[:, None] == ((q - R) // RANK)[None, :])
                h_ptrs = h_ptr + offset(m, G * (R + RANK))[:, None] + h_column[None, :]
                h = tl.load(h_ptrs, mask=(m < M)[:, None] & of_row, other=0.0)
                acc = tl.dot(h, columns, acc, input_precision=PRECISION)
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + n, mask=real_n, other=0.0).to(tl.float32)[None, :]
        if ACTIVATION == "silu":
            acc = acc / (1 + tl.exp(-acc))
        elif ACTIVATION == "gelu_tanh":
            acc = acc / (1 + tl.exp(-1.5957691216057308 * (acc + 0.044715 * acc * acc * acc)))  # 2 sqrt(2 / pi)
        mask = (m[:, None] < M) & real_n[None, :]
        if gate_ptr is not None:
            gated_row = first_row
            while gated_row <= last_row:  # a row at a time: addresses of a whole tile would fill the registers
                gates = tl.load(gate_ptr + offset(gated_row, stride_gb) + n, mask=real_n, other=0.0).to(tl.float32)
                acc = tl.where((row == gated_row)[:, None], acc * gates[None, :], acc)
                gated_row += 1
        y_offsets = offset(m, G * N)[:, None] + n[None, :]
        if residual_ptr is not None:
            acc += tl.load(residual_ptr + y_offsets, mask=mask, other=0.0).to(tl.float32)
        y = acc.to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + y_offsets, y, mask=mask)
        if next_streams_ptr is not None:
            g, step = tl.zeros((BLOCK_M, 16), tl.float32), tl.load(step_ptr)
            y = tl.where(real_n[None, :], y, 0.0)
            next_row = first_row
            while next_row <= last_row:  # the noise of each member; few tiles have more than one
                pair = tl.load(members_ptr + next_row) >> 1
                next_columns = low_rank_columns(
                    a_ptr, next_streams_ptr, None, stride_ar, stride_ak, seed, step, pair, first_n, N,
                    1, NEXT_R, RANK, KP, 16, BLOCK_N, 0,
                )  # fmt: skip
                upper, lower = split_bf16(next_columns, True, UPCAST)
                g = tl.where((row == next_row)[:, None], tl.dot(y, upper, tl.dot(y, lower)), g)
                next_row += 1
            column_t = tl.arange(0, 16)[None, :]
            partial_sums = sums_ptr + (offset(tile_n, M) + m)[:, None] * (NEXT_R + RANK) + column_t
            tl.store(partial_sums, g, mask=(m[:, None] < M) & (column_t < NEXT_R + RANK))


Activation = Literal["silu", "gelu_tanh"]


def linear_config(
    device: torch.device,
    *,
    dtype: torch.dtype,
    t: int,
    k: int,
    n: int,
    columns: int = 0,
    residual: bool = False,
    gated: bool = False,
) -> dict[str, int]:
    """Launch configuration for T rows a batch row. `columns` is r + k, or 0 without adapters.

    In the default file: up to 16 rows take a tile of 16 rows. It contains few members, and each member costs a pass of
    noise. With many rows bf16 takes 128 x 256, which balances products and shared memory. With a residual or with many
    columns this tile spills registers in a supported Triton, so a smaller one is taken. In fp32 no tile spills.
    """
    values = dict(dtype=configs.dtype_name(dtype), t=t, k=k, n=n, columns=columns, residual=residual, gated=gated)
    return configs.settings("fused_linear", device, **values)


def fused_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    h: torch.Tensor | None = None,
    adapters: Lora | None = None,
    perturbation: MemberNoise | None = None,
    activation: Activation | None = None,
    residual: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    next_lora: Lora | None = None,
    factors: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """y = residual + gate act(x W^T + bias + h [B | U']^T). Triton on a GPU, `fused_linear_ref` elsewhere.

    A row's result does not depend on the other rows of the batch.

    Args:
        x: [B, T, K], fp32, bf16 or fp16, any strides.
        weight: [G N, K], dtype of x.
        bias: [G N] or None.
        h: fp32 [B, T, G (r + k)], contiguous, from `shrink` with the same adapters and perturbation.
        adapters: The G targets. None: one target without low-rank columns.
        perturbation: The noise of the batch. Needed with `adapters` and with `next_lora`.
        activation: Applied before the gate and the residual.
        residual: [B, T, G N], dtype of x, or None.
        gate: [B, G N], dtype of x, one row for each batch row, last stride 1, or None.
        next_lora: One target that reads y. Then G is 1, r + k is at most 16, and x is bf16.
        factors: From `member_factors` with `adapters` and `perturbation`. None: rebuilt for each tile.

    Returns:
        y [B, T, G N], dtype of x, contiguous. With `next_lora` also the partial sums that `mix` reads, fp32
        [P, B, T, r + k], P >= 1.

    Raises:
        ValueError: An operand has the wrong shape, dtype, device or strides. The message names it.
    """
    if not uses_triton(x.device):
        return fused_linear_ref(
            x, weight, bias, h=h, adapters=adapters, perturbation=perturbation, activation=activation,
            residual=residual, gate=gate, next_lora=next_lora, factors=factors,
        )  # fmt: skip
    _check(x, weight, bias, h, adapters, perturbation, activation, residual, gate, next_lora, factors)
    batch, t, k = x.shape
    m, targets = batch * t, adapters.targets if adapters else 1
    n = len(weight) // targets
    y = output(x, batch, t, len(weight))
    given = dict(columns=0 if h is None else h.shape[-1] // targets, residual=residual is not None)
    config = linear_config(x.device, dtype=x.dtype, t=t, k=k, n=n, gated=gate is not None, **given)
    parts, partial_sums = targets * triton.cdiv(n, config["BLOCK_N"]), None
    if next_lora is not None:
        columns = check_next_lora(next_lora, perturbation, x.dtype)
        partial_sums = torch.empty(parts, batch, t, columns, dtype=torch.float32, device=x.device)
    if y.numel() == 0:
        return y.to(x.dtype) if next_lora is None else (y.to(x.dtype), partial_sums)
    noise = noise_arguments(adapters or next_lora, perturbation, None if adapters is None else factors, k)
    noise |= {"G": targets} | ({"R": 0} if adapters is None else {})
    b, a = None if adapters is None else adapters.b, None if next_lora is None else next_lora.a
    block_m, rank = config["BLOCK_M"], noise["RANK"]
    touched = 1 if t % block_m == 0 else (block_m + t - 2) // t + 1  # largest number of batch rows in one tile
    columns = max(16, triton.next_power_of_2(noise["R"] + rank * touched))
    with torch.cuda.device_of(x):
        _linear_kernel[(triton.cdiv(m, block_m) * parts,)](
            x, weight, None if bias is None else bias.contiguous(), b, h,
            residual_ptr=None if residual is None else residual.contiguous(), gate_ptr=gate, y_ptr=y,
            a_ptr=a, next_streams_ptr=None if next_lora is None else next_lora.streams, sums_ptr=partial_sums,
            M=m, N=n, T=t, stride_xb=x.stride(0), stride_xt=x.stride(1), stride_xk=x.stride(2),
            stride_wn=weight.stride(0), stride_wk=weight.stride(1),
            stride_bn=0 if b is None else b.stride(0), stride_br=0 if b is None else b.stride(1),
            stride_gb=0 if gate is None else gate.stride(0),
            stride_ar=0 if a is None else a.stride(0), stride_ak=0 if a is None else a.stride(1),
            K=k, KD=columns, QD=min(columns, 16 if x.dtype == torch.float32 else 64),
            ACTIVATION=activation, UPCAST=INTERPRET, PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
            NEXT_R=0 if next_lora is None else next_lora.r, **noise, **config,
        )  # fmt: skip
    y = y.to(x.dtype)
    return y if next_lora is None else (y, partial_sums)


def fused_linear_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    h: torch.Tensor | None = None,
    adapters: Lora | None = None,
    perturbation: MemberNoise | None = None,
    activation: Activation | None = None,
    residual: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    next_lora: Lora | None = None,
    factors: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """y = residual + gate act(x W^T + bias + h [B | U']^T) in fp32, one member and target at a time, rounded once.

    Arguments as in `fused_linear`.
    """
    _check(x, weight, bias, h, adapters, perturbation, activation, residual, gate, next_lora, factors)
    y = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    if adapters is not None:
        g, r, rank = adapters.targets, adapters.r, perturbation.rank
        n = len(weight) // g
        for row, member in enumerate(perturbation.members.tolist()):
            pair = torch.tensor([member // 2], device=x.device)
            noise = dict(seed=perturbation.seed, step=int(perturbation.step), pairs=pair, rank=rank)
            for i, (*_, stream) in enumerate(adapters.streams.tolist()):
                columns = y[row, :, i * n : (i + 1) * n]
                if r:
                    columns += h[row, :, i * r : (i + 1) * r] @ adapters.b[i * n : (i + 1) * n].T
                high = h[row, :, g * r + i * rank : g * r + (i + 1) * rank]
                columns += high @ factor_ref(stream=stream, length=n, **noise)[0].T
    if activation is not None:
        y = F.silu(y) if activation == "silu" else F.gelu(y, approximate="tanh")
    if gate is not None:
        y = y * gate.float()[:, None]
    if residual is not None:
        y = y + residual.float()
    y = y.to(x.dtype)
    return y if next_lora is None else (y, partial_sums_ref(y, next_lora, perturbation))


def _check(x, weight, bias, h, adapters, perturbation, activation, residual, gate, next_lora, factors) -> None:
    """Raise ValueError for an operand that does not match. See `fused_linear`."""
    if activation not in (None, *get_args(Activation)):
        raise ValueError(f"activation: expected one of {', '.join(get_args(Activation))} or None, got {activation!r}")
    check_x(x)
    batch, t, k = x.shape
    targets = adapters.targets if adapters else 1
    if next_lora is not None and targets != 1:
        raise ValueError(f"next_lora: expected to follow one target, got {targets}")
    if weight.dim() != 2 or len(weight) % targets:
        refuse("weight", f"[G N, {k}] of G = {targets} targets", weight)
    n, like = len(weight), dict(dtype=x.dtype, device=x.device)
    check("weight", weight, (n, k), **like)
    check("bias", bias, (n,), **like)
    check("residual", residual, (batch, t, n), **like)
    check("gate", gate, (batch, n), **like, strides="last")
    if (adapters is None) != (h is None):
        raise ValueError("h, adapters: expected both or neither, got one of them")
    if perturbation is None and (adapters or next_lora):
        raise ValueError("perturbation: expected the noise of the batch beside adapters or next_lora, got None")
    if perturbation is not None:
        check_noise(perturbation, batch, x.device)
    if adapters is not None:
        check_adapters("adapters", adapters, k, n // targets, x.device)
        columns = targets * (adapters.r + perturbation.rank)
        check("h", h, (batch, t, columns), torch.float32, x.device, strides="all")
    check_factors(factors, adapters, perturbation, batch, k, n // targets)
    if next_lora is not None:
        check_next_lora(next_lora, perturbation, x.dtype)
        check_adapters("next_lora", next_lora, n, None, x.device)
