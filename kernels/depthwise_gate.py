"""The middle of SANA's GLUMBConv, on tokens: a depthwise 3x3 convolution of 2C channels. The second C gate the first C.

    z_hwc = bias_c + sum_{i, j in -1..1} weight_{c, i + 1, j + 1} x_{h + i, w + j, c}         zero outside the image
    y_hwc = z_hwc silu(z_{h, w, C + c})

Legend: B images, H rows, W columns, T = H W tokens in row-major order, C channels of y. A program computes STRIP rows,
from top to bottom, of BLOCK_W columns and BLOCK_C channels of x and of its gate. It reads every row of the image once,
with the left and right neighbours. It adds each row to the sums of three rows of y, and keeps two sums in registers.

Source: Xie et al., "SANA" (arXiv 2410.10629), Mix-FFN; diffusers' `GLUMBConv`, from `conv_depth` to the product.
"""

import torch
import torch.nn.functional as F

from esengine.kernels import configs
from esengine.kernels.launch import output
from esengine.kernels.noise import triton, uses_triton

if triton is not None:
    import triton.language as tl

    from esengine.kernels.noise import offset

    @triton.jit
    def _load_taps(w_ptr, c, mask, stride_wc, stride_wi, stride_wj):
        """Nine fp32 [1, BLOCK_C]: the weight of channels c, row-major."""
        taps = ()
        for tap in tl.static_range(9):
            ptrs = w_ptr + offset(c, stride_wc) + tap // 3 * stride_wi + tap % 3 * stride_wj
            taps = taps + (tl.load(ptrs, mask=mask, other=0.0).to(tl.float32),)  # noqa: RUF005
        return taps

    @triton.jit
    def _load_row(ptrs, left, middle, right, inside, C: tl.constexpr, stride_xt: tl.constexpr):
        """Six [BLOCK_W, BLOCK_C]: columns w - 1, w and w + 1 of a row of x, then of its gate."""
        return (
            tl.load(ptrs - stride_xt, mask=left & inside, other=0.0),
            tl.load(ptrs, mask=middle & inside, other=0.0),
            tl.load(ptrs + stride_xt, mask=right & inside, other=0.0),
            tl.load(ptrs + C - stride_xt, mask=left & inside, other=0.0),
            tl.load(ptrs + C, mask=middle & inside, other=0.0),
            tl.load(ptrs + C + stride_xt, mask=right & inside, other=0.0),
        )

    @triton.jit
    def _add(z, row, taps, HALF: tl.constexpr, I: tl.constexpr):
        """z + row I of the weight times a row of x (HALF 0) or of its gate (HALF 1)."""
        for j in tl.static_range(3):
            z += row[3 * HALF + j].to(tl.float32) * taps[3 * I + j]
        return z

    @triton.jit
    def _depthwise_gate_kernel(
        x_ptr, w_ptr, bias_ptr, y_ptr,
        H, tiles_h, tiles_w,
        stride_xb, stride_yb, stride_wc, stride_wi, stride_wj,
        W: tl.constexpr, C: tl.constexpr, stride_xt: tl.constexpr,
        STRIP: tl.constexpr, UNROLL: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
    ):  # fmt: skip
        # W, C and stride_xt are compile-time: the addresses of a row's loads are then one register plus constants
        tiles_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
        pid = tl.program_id(0)
        tile = pid // tiles_c
        c = pid % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
        w = tile % tiles_w * BLOCK_W + tl.arange(0, BLOCK_W)[:, None]
        first = tile // tiles_w % tiles_h * STRIP
        b = tile // tiles_w // tiles_h

        h, mask = tl.full((1, 1), first, tl.int32), c < C  # dimensions for h: the interpreter broadcasts no scalar mask
        taps = _load_taps(w_ptr, c, mask, stride_wc, stride_wi, stride_wj)
        gate_taps = _load_taps(w_ptr, C + c, mask, stride_wc, stride_wi, stride_wj)
        bias = tl.zeros((BLOCK_W, BLOCK_C), dtype=tl.float32)
        gate_bias = bias
        if bias_ptr is not None:
            bias += tl.load(bias_ptr + c, mask=mask, other=0.0).to(tl.float32)
            gate_bias += tl.load(bias_ptr + C + c, mask=mask, other=0.0).to(tl.float32)

        left, middle, right = mask & (w > 0) & (w < W), mask & (w < W), mask & (w < W - 1)
        x_ptrs = x_ptr + offset(b, stride_xb) + offset(first * W + w, stride_xt) + c
        y_ptrs = y_ptr + offset(b, stride_yb) + offset(first * W + w, C) + c

        # in z_0 the row below is missing, in z_1 its own row too
        above = _load_row(x_ptrs - W * stride_xt, left, middle, right, h > 0, C, stride_xt)
        row = _load_row(x_ptrs, left, middle, right, h < H, C, stride_xt)
        z_0 = _add(_add(bias, above, taps, 0, 0), row, taps, 0, 1)
        gate_0 = _add(_add(gate_bias, above, gate_taps, 1, 0), row, gate_taps, 1, 1)
        z_1, gate_1 = _add(bias, row, taps, 0, 0), _add(gate_bias, row, gate_taps, 1, 0)
        for _ in range(0, STRIP, UNROLL):
            rows = ()
            for u in tl.static_range(UNROLL):  # issue all loads before the first is used
                x_ptrs += W * stride_xt
                rows = rows + (_load_row(x_ptrs, left, middle, right, h + u + 1 < H, C, stride_xt),)  # noqa: RUF005
            for u in tl.static_range(UNROLL):
                z, gate = _add(z_0, rows[u], taps, 0, 2), _add(gate_0, rows[u], gate_taps, 1, 2)
                z_0, gate_0 = _add(z_1, rows[u], taps, 0, 1), _add(gate_1, rows[u], gate_taps, 1, 1)
                z_1, gate_1 = _add(bias, rows[u], taps, 0, 0), _add(gate_bias, rows[u], gate_taps, 1, 0)
                y = z * gate / (1.0 + tl.exp(-gate))
                tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=middle & (h + u < H))
                y_ptrs += W * C
            h += UNROLL


def gate_config(device: torch.device, *, dtype: torch.dtype, height: int, width: int, channels: int) -> dict[str, int]:
    """Launch configuration for H x W. Strips have about equal heights, at most STRIP. Narrow images get more channels.

    In the default file a thread has four channels of one column. Bytes of an output: 2 numbers read and 1 written, 6
    bytes in bf16. That is 0.46 cycles of an H100's multiprocessor at 3.0 TB/s, enough for 59 instructions. The loop has
    45. Registers: 4 (18 taps + 2 biases + 4 sums) + 12 for each loaded row in bf16: with four rows 144, and
    temporaries. With at most 168, three programs of 128 threads fit on a multiprocessor and have 24 KiB of loads in
    flight. With eight channels a thread and two rows it is 255: two programs and 16 KiB.
    """
    values = dict(dtype=configs.dtype_name(dtype), height=height, width=width, channels=channels)
    found = configs.settings("depthwise_gate", device, **values)
    strip, unroll = triton.cdiv(height, triton.cdiv(height, found["STRIP"])), found["UNROLL"]
    block_w = min(found["BLOCK_W"], triton.next_power_of_2(width))
    return found | {
        "STRIP": triton.cdiv(strip, unroll) * unroll,
        "BLOCK_W": block_w,
        "BLOCK_C": found["BLOCK_W"] * found["BLOCK_C"] // block_w,
    }


def depthwise_gate(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, height: int, width: int
) -> torch.Tensor:
    """Depthwise 3x3 convolution and gate, on tokens. Triton on a GPU, `depthwise_gate_ref` elsewhere.

    Deterministic: an output is one sum in one order, independent of the batch. x is copied if its channels are not
    adjacent in memory. Each (W, C, token stride of x) is compiled once.

    Args:
        x: [B, T, 2C], fp32, bf16 or fp16, any strides: the output of `conv_inverted` and its SiLU.
        weight: [2C, 1, 3, 3], dtype of x, `conv_depth.weight`. The second half of the channels gates the first.
        bias: [2C], dtype of x, `conv_depth.bias`, or None.
        height, width: H and W, with H W = T.

    Returns:
        [B, T, C], dtype of x, contiguous.

    Raises:
        ValueError: An operand has the wrong shape, dtype or device. The message names it.
        RuntimeError: x requires a gradient, which the Triton path does not have.
    """
    if not uses_triton(x.device):
        return depthwise_gate_ref(x, weight, bias, height=height, width=width)
    _check(x, weight, bias, height, width)
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("x: requires a gradient, which the Triton path does not have; call it under torch.no_grad")
    batch, t, channels = x.shape
    y = output(x, batch, t, channels // 2)
    if y.numel() == 0:
        return y.to(x.dtype)
    if x.stride(2) != 1:
        x = x.contiguous()
    config = gate_config(x.device, dtype=x.dtype, height=height, width=width, channels=channels // 2)
    tiles_h, tiles_w = triton.cdiv(height, config["STRIP"]), triton.cdiv(width, config["BLOCK_W"])
    grid = (batch * tiles_h * tiles_w * triton.cdiv(channels // 2, config["BLOCK_C"]),)
    with torch.cuda.device_of(x):
        _depthwise_gate_kernel[grid](
            x, weight, None if bias is None else bias.contiguous(), y,
            H=height, tiles_h=tiles_h, tiles_w=tiles_w, stride_xb=x.stride(0), stride_yb=y.stride(0),
            stride_wc=weight.stride(0), stride_wi=weight.stride(2), stride_wj=weight.stride(3),
            W=width, C=channels // 2, stride_xt=x.stride(1), **config,
        )  # fmt: skip
    return y.to(x.dtype)


def depthwise_gate_ref(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, height: int, width: int
) -> torch.Tensor:
    """y = z silu(gate) in fp32, rounded once. z and gate: the first and last C channels of the convolution of x.

    Arguments as in `depthwise_gate`.
    """
    _check(x, weight, bias, height, width)
    x_bchw = x.float().unflatten(1, (height, width)).movedim(3, 1)
    z = F.conv2d(x_bchw, weight.float(), None if bias is None else bias.float(), padding=1, groups=len(weight))
    z, gate = z.chunk(2, dim=1)
    return (z * F.silu(gate)).movedim(1, 3).flatten(1, 2).to(x.dtype).contiguous()


def _check(x, weight, bias, height, width) -> None:
    def fail(name, expected, tensor):
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{name}: expected {expected}, got {dtype} {list(tensor.shape)} on {tensor.device}")

    for name, size in (("height", height), ("width", width)):
        if size < 1:
            raise ValueError(f"{name}: expected a positive integer, got {size}")
    if x.dim() != 3 or x.shape[1] != height * width or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        fail("x", f"float32, bfloat16 or float16 [B, {height} * {width}, 2C]", x)
    channels, dtype = x.shape[2], str(x.dtype).removeprefix("torch.")
    if channels % 2 or not channels:
        fail("x", f"{dtype} [B, {height * width}, 2C] with C >= 1", x)
    if weight.shape != (channels, 1, 3, 3) or weight.dtype != x.dtype or weight.device != x.device:
        fail("weight", f"{dtype} [{channels}, 1, 3, 3] on {x.device}", weight)
    if bias is not None and (bias.shape != (channels,) or bias.dtype != x.dtype or bias.device != x.device):
        fail("bias", f"{dtype} [{channels}] on {x.device}", bias)
