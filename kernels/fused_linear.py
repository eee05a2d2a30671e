"""A GEMM whose epilogue does what would else be passes over y: low-rank columns, activation, gated residual.

    z = x W^T + bias + h [B | U']^T          expand: U' rebuilt, or read where it was stored
    z = z sigmoid(z)                         if asked, SiLU; or GELU by tanh, z sigmoid(1.596 (z + 0.044715 z^3))
    y = residual + gate z                    if asked; rounded once
    g_p = y_p [A^T | V]_p                    if asked: of the linear that reads y, tile p's share of its shrink

W holds G targets of N columns each, one below the other, each with columns of its own in h (see
`esengine.kernels.shrink`, which has put c and s into h). No noise is in the loop over K: there it would make the
compiler wait for every product.

The expand is one more product, in tf32 where x is of half precision: 2^-11 of the low-rank part, below its rounding.

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
from esengine.kernels.shrink import check_then, shares_ref

if triton is not None:
    import triton.language as tl

    from esengine.kernels.low_rank import column, low_rank_columns, split_bf16
    from esengine.kernels.noise import noise_rows, offset

    @triton.jit(
        do_not_specialize=["M", "T", "seed"], do_not_specialize_on_alignment=["members_ptr", "step_ptr", "factors_ptr"]
    )
    def _linear_kernel(
        x_ptr, w_ptr, bias_ptr, b_ptr, h_ptr, streams_ptr, members_ptr, step_ptr, factors_ptr, residual_ptr, gate_ptr,
        y_ptr, a_ptr, then_ptr, shares_ptr,
        M, N, T,
        stride_xb, stride_xt, stride_xk, stride_wn, stride_wk, stride_bn, stride_br, stride_gb, stride_ar, stride_ak,
        seed: tl.int64,
        K: tl.constexpr, G: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, KP: tl.constexpr,
        U_AT: tl.constexpr, V_OUT_AT: tl.constexpr, U_OUT_AT: tl.constexpr, WIDTH: tl.constexpr,
        KD: tl.constexpr, QD: tl.constexpr, ACTIVATION: tl.constexpr,
        UPCAST: tl.constexpr, PRECISION: tl.constexpr, THEN_R: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    ):  # fmt: skip
        # programs of one group of row tiles share columns of W in L2; no tile straddles two targets
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
            # columns of all members that the tile touches, gathered first: one product then costs half the registers
            step = tl.load(step_ptr)
            for q0 in tl.range(0, KD, QD, num_stages=1):
                q = q0 + tl.arange(0, QD)
                columns = tl.zeros((QD, BLOCK_N), tl.float32)
                if factors_ptr is not None:  # one load for both: each column has a place and a stride of its own
                    member = first_row + (q - R) // RANK
                    starts = factors_ptr + offset(member * G + target, WIDTH) + U_OUT_AT + (q - R) % RANK
                    strides = tl.full((QD,), KP, tl.int32)
                    if b_ptr is not None:
                        own_b = b_ptr + offset(q, stride_br) + offset(target * N, stride_bn)
                        starts = tl.where(q < R, own_b, starts)
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
                own = (q < R)[None, :] | ((row - first_row)[:, None] == ((q - R) // RANK)[None, :])
                h_ptrs = h_ptr + offset(m, G * (R + RANK))[:, None] + h_column[None, :]
                h = tl.load(h_ptrs, mask=(m < M)[:, None] & own, other=0.0)
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
            while gated_row <= last_row:  # a row of gates at a time: a tile of their addresses fills the registers
                gates = tl.load(gate_ptr + offset(gated_row, stride_gb) + n, mask=real_n, other=0.0).to(tl.float32)
                acc = tl.where((row == gated_row)[:, None], acc * gates[None, :], acc)
                gated_row += 1
        y_offsets = offset(m, G * N)[:, None] + n[None, :]
        if residual_ptr is not None:
            acc += tl.load(residual_ptr + y_offsets, mask=mask, other=0.0).to(tl.float32)
        y = acc.to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + y_offsets, y, mask=mask)
        if then_ptr is not None:
            g, step = tl.zeros((BLOCK_M, 16), tl.float32), tl.load(step_ptr)
            y = tl.where(real_n[None, :], y, 0.0)
            then_row = first_row
            while then_row <= last_row:  # each member's own noise; few tiles touch more than one
                pair = tl.load(members_ptr + then_row) >> 1
                own = low_rank_columns(
                    a_ptr, then_ptr, None, stride_ar, stride_ak, seed, step, pair, first_n, N,
                    1, THEN_R, RANK, KP, 16, BLOCK_N, 0,
                )  # fmt: skip
                upper, lower = split_bf16(own, True, UPCAST)
                g = tl.where((row == then_row)[:, None], tl.dot(y, upper, tl.dot(y, lower)), g)
                then_row += 1
            column_t = tl.arange(0, 16)[None, :]
            shares = shares_ptr + (offset(tile_n, M) + m)[:, None] * (THEN_R + RANK) + column_t
            tl.store(shares, g, mask=(m[:, None] < M) & (column_t < THEN_R + RANK))


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
    """Launch configuration for T rows a batch row; columns: r + k, or 0 without adapters.

    By default, up to 16 rows take a tile of 16: it touches few members, each of which costs it a pass of noise. In bf16
    many rows take 128 x 256, which balances products and shared memory, where no supported Triton spills: not with a
    residual, nor with many columns. In fp32, too, the tiles are such as none spills.
    """
    values = dict(dtype=configs.named(dtype), t=t, k=k, n=n, columns=columns, residual=residual, gated=gated)
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
    then: Lora | None = None,
    factors: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`fused_linear_ref` by the fastest way the device has: Triton on a GPU, the reference itself elsewhere.

    A row's result does not depend on its batch mates.

    Args:
        x: [B, T, K], fp32, bf16 or fp16, any strides.
        weight: [G N, K], dtype of x.
        bias: [G N] or None.
        h: fp32 [B, T, G (r + k)], contiguous, from `shrink` with the same adapters and perturbation.
        adapters: The G targets. None: one target without low-rank columns.
        perturbation: The noise of the batch; with `adapters`.
        activation: Applied before the gate and the residual.
        residual: [B, T, G N], dtype of x, or None.
        gate: [B, G N], one for each batch row, last stride 1, or None.
        then: A target that reads y, with r + k of at most 16; with `perturbation`, and one target here.
        factors: Of `member_factors` for `adapters` and `perturbation`, so that they are not rebuilt here.

    Returns:
        y [B, T, G N], dtype of x, contiguous; with `then` also its shares for `mix`, fp32 [P, B, T, r + k], P >= 1.

    Raises:
        ValueError: an operand is of another shape, dtype or device, or of strides that are not said here; by its name.
    """
    if not uses_triton(x.device):
        return fused_linear_ref(
            x, weight, bias, h=h, adapters=adapters, perturbation=perturbation, activation=activation,
            residual=residual, gate=gate, then=then, factors=factors,
        )  # fmt: skip
    _check(x, weight, bias, h, adapters, perturbation, activation, residual, gate, then, factors)
    batch, t, k = x.shape
    m, targets = batch * t, adapters.targets if adapters else 1
    n = len(weight) // targets
    y = output(x, batch, t, len(weight))
    given = dict(columns=0 if h is None else h.shape[-1] // targets, residual=residual is not None)
    config = linear_config(x.device, dtype=x.dtype, t=t, k=k, n=n, gated=gate is not None, **given)
    parts, shares = targets * triton.cdiv(n, config["BLOCK_N"]), None
    if then is not None:
        columns = check_then(then, perturbation, x.dtype)
        shares = torch.empty(parts, batch, t, columns, dtype=torch.float32, device=x.device)
    if y.numel() == 0:
        return y.to(x.dtype) if then is None else (y.to(x.dtype), shares)
    noise = noise_arguments(adapters or then, perturbation, None if adapters is None else factors, k)
    noise |= {"G": targets} | ({"R": 0} if adapters is None else {})
    b, a = None if adapters is None else adapters.b, None if then is None else then.a
    block_m, rank = config["BLOCK_M"], noise["RANK"]
    touched = 1 if t % block_m == 0 else (block_m + t - 2) // t + 1  # batch rows that one tile can touch
    columns = max(16, triton.next_power_of_2(noise["R"] + rank * touched))
    with torch.cuda.device_of(x):
        _linear_kernel[(triton.cdiv(m, block_m) * parts,)](
            x, weight, None if bias is None else bias.contiguous(), b, h,
            residual_ptr=None if residual is None else residual.contiguous(), gate_ptr=gate, y_ptr=y,
            a_ptr=a, then_ptr=None if then is None else then.streams, shares_ptr=shares,
            M=m, N=n, T=t, stride_xb=x.stride(0), stride_xt=x.stride(1), stride_xk=x.stride(2),
            stride_wn=weight.stride(0), stride_wk=weight.stride(1),
            stride_bn=0 if b is None else b.stride(0), stride_br=0 if b is None else b.stride(1),
            stride_gb=0 if gate is None else gate.stride(0),
            stride_ar=0 if a is None else a.stride(0), stride_ak=0 if a is None else a.stride(1),
            K=k, KD=columns, QD=min(columns, 16 if x.dtype == torch.float32 else 64),
            ACTIVATION=activation, UPCAST=INTERPRET, PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
            THEN_R=0 if then is None else then.r, **noise, **config,
        )  # fmt: skip
    y = y.to(x.dtype)
    return y if then is None else (y, shares)


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
    then: Lora | None = None,
    factors: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """y = residual + gate act(x W^T + bias + h [B | U']^T), in fp32, one member and target at a time, rounded once.

    Arguments as in `fused_linear`.
    """
    _check(x, weight, bias, h, adapters, perturbation, activation, residual, gate, then, factors)
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
    return y if then is None else (y, shares_ref(y, then, perturbation))


def _check(x, weight, bias, h, adapters, perturbation, activation, residual, gate, then, factors) -> None:
    """Raises ValueError for what does not fit, by its name. See `fused_linear`."""
    if activation not in (None, *get_args(Activation)):
        raise ValueError(f"activation: expected one of {', '.join(get_args(Activation))} or None, got {activation!r}")
    check_x(x)
    batch, t, k = x.shape
    targets = adapters.targets if adapters else 1
    if then is not None and targets != 1:
        raise ValueError(f"then: expected to follow one target, got {targets}")
    if weight.dim() != 2 or len(weight) % targets:
        refuse("weight", f"[G N, {k}] of G = {targets} targets", weight)
    n, like = len(weight), dict(dtype=x.dtype, device=x.device)
    check("weight", weight, (n, k), **like)
    check("bias", bias, (n,), **like)
    check("residual", residual, (batch, t, n), **like)
    check("gate", gate, (batch, n), **like, strides="last")
    if (adapters is None) != (h is None):
        raise ValueError("h, adapters: expected both or neither, got one of them")
    if perturbation is None and (adapters or then):
        raise ValueError("perturbation: expected the noise of the batch beside adapters or then, got None")
    if perturbation is not None:
        check_noise(perturbation, batch, x.device)
    if adapters is not None:
        check_adapters("adapters", adapters, k, n // targets, x.device)
        columns = targets * (adapters.r + perturbation.rank)
        check("h", h, (batch, t, columns), torch.float32, x.device, strides="all")
    check_factors(factors, adapters, perturbation, batch, k, n // targets)
    if then is not None:
        check_then(then, perturbation, x.dtype)
        check_adapters("then", then, n, None, x.device)
