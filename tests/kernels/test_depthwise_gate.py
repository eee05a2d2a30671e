"""Depthwise 3x3 and gate: against fp64, and in the place of diffusers' module."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from esengine.kernels.depthwise_gate import depthwise_gate, depthwise_gate_ref
from esengine.kernels.noise import INTERPRET, uses_triton

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLOOR = 2.0**-21
"""The part of the norm that sums of ten terms in another order may differ by: four units in the last place of fp32."""


def case(batch=2, height=4, width=5, channels=6, *, dtype=torch.float32, bias=True, device="cpu"):
    generator = torch.Generator().manual_seed(height + 100 * width + channels)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    return {
        "x": draw(batch, height * width, 2 * channels),
        "weight": draw(2 * channels, 1, 3, 3) / 2,
        "bias": draw(2 * channels) if bias else None,
        "height": height,
        "width": width,
    }


def call(op, args):
    return op(args["x"], args["weight"], args["bias"], height=args["height"], width=args["width"])


def torch_own(x, weight, bias, height, width, dtype):
    """The module's operations in `dtype`, each rounded."""
    x_bchw = x.to(dtype).unflatten(1, (height, width)).movedim(-1, 1)
    z = F.conv2d(x_bchw, weight.to(dtype), None if bias is None else bias.to(dtype), padding=1, groups=len(weight))
    z, gate = z.chunk(2, dim=1)
    return (z * F.silu(gate)).movedim(1, -1).flatten(1, 2)


def relative(got, expected):
    return float((got.double() - expected).norm() / expected.norm())


def assert_right(y, args):
    """No further from fp64 than torch's own operations in this dtype, which round three times, but for the order."""
    dtype = args["x"].dtype
    expected = torch_own(**args, dtype=torch.float64)
    assert y.shape == expected.shape
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert y.isfinite().all()
    assert relative(y, expected) <= relative(torch_own(**args, dtype=dtype), expected) + FLOOR


@pytest.mark.parametrize(
    ("height", "width"),
    [
        (1, 1),
        (1, 9),
        (9, 1),
        (1, 2),
        (2, 1),
        (3, 3),
        (4, 4),
        (5, 7),
        (7, 5),
        (8, 16),
        (6, 17),
        (3, 33),
        (33, 2),
        (65, 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes(device, height, width, dtype):
    """Less than a group of four rows, several strips of 32 rows and tiles of 16 columns, whole and not."""
    args = case(height=height, width=width, channels=5, dtype=dtype, device=device)
    assert_right(call(depthwise_gate, args), args)
    assert_right(call(depthwise_gate_ref, args), args)


@pytest.mark.parametrize("channels", [1, 2, 33, 64, 130])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_channels(device, channels, bias, dtype):
    args = case(batch=1, channels=channels, bias=bias, dtype=dtype, device=device)
    assert_right(call(depthwise_gate, args), args)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounded_once(device, dtype):
    """y is the nearest value of the dtype to the exact one, but for ties that fp32 breaks."""
    args = case(height=16, width=16, channels=40, dtype=dtype, device=device)
    y, exact = call(depthwise_gate, args), torch_own(**args, dtype=torch.float64)
    if dtype == torch.float32:
        assert (y - exact).abs().max() < 2e-5
    else:
        assert (y == exact.to(dtype)).double().mean() > 0.999


def test_every_tap(device):
    """An impulse in the image's middle, corner and edge comes out as the weight, turned by half a turn and cut."""
    args = case(batch=1, height=5, width=6, channels=3, bias=False, device=device)
    weight = torch.arange(1.0, 55.0, device=device).view(6, 1, 3, 3)
    weight[3:] = 0
    for row, column in [(2, 2), (0, 0), (4, 5), (0, 3), (3, 0)]:
        x = torch.zeros(1, 5, 6, 6, device=device)
        x[:, row, column, :3] = 1
        # a bias of the gate alone: silu(40) = 40
        bias = torch.tensor([0.0, 0, 0, 40, 40, 40], device=device)
        y = call(depthwise_gate, args | {"x": x.flatten(1, 2), "weight": weight, "bias": bias}).view(5, 6, 3) / 40
        for i in range(5):
            for j in range(6):
                tap = (1 + row - i, 1 + column - j)
                expected = weight[:3, 0][(slice(None), *tap)] if min(tap) >= 0 and max(tap) <= 2 else torch.zeros(3)
                torch.testing.assert_close(y[i, j].cpu(), expected.cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_place_of_diffusers_module(device, dtype):
    """GLUMBConv with its middle replaced, no further from fp64 than the module itself."""
    from diffusers.models.transformers.sana_transformer import GLUMBConv

    torch.manual_seed(0)
    module = GLUMBConv(12, 12, expand_ratio=2.5, norm_type=None, residual_connection=False).to(device, dtype)
    x_bchw = torch.randn(2, 12, 7, 5, device=device, dtype=dtype)
    with torch.no_grad():
        hidden = F.silu(module.conv_inverted(x_bchw))
        y_btc = depthwise_gate(
            hidden.flatten(2).mT, module.conv_depth.weight, module.conv_depth.bias, height=7, width=5
        )
        got = module.conv_point(y_btc.mT.unflatten(2, (7, 5)))
        own = module(x_bchw)
        expected = module.double()(x_bchw.double())
    assert relative(got, expected) <= relative(own, expected) + FLOOR


@pytest.mark.parametrize("gate", [-1e4, -100.0, -90.0, 100.0, 1e4])
def test_saturated_gates(device, gate):
    """exp(-gate) overflows in fp32 from 89 on: the product is 0 then, and not NaN."""
    args = case(batch=1, channels=2, device=device)
    args["bias"] = torch.tensor([0.0, 1.0, gate, gate], device=device)
    exact = torch_own(**args, dtype=torch.float64)
    torch.testing.assert_close(call(depthwise_gate, args).double(), exact, rtol=1e-5, atol=1e-30)


LAYOUTS = {
    "tokens apart": lambda x: F.pad(x, (0, 3))[..., :-3],
    "tokens odd bytes apart": lambda x: F.pad(x, (0, 1))[..., :-1],
    "images apart": lambda x: F.pad(x, (0, 0, 0, 2))[:, :-2],
    "channels first": lambda x: x.mT.contiguous().mT,
    "channels every other": lambda x: torch.stack((x, x + 9), -1).flatten(-2)[..., ::2],
    "batch inside": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "channels cut": lambda x: F.pad(x, (1, 0))[..., 1:],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_of_x(device, layout, dtype):
    args = case(dtype=dtype, device=device)
    expected = call(depthwise_gate, args)
    args["x"] = LAYOUTS[layout](args["x"])
    assert not args["x"].is_contiguous()
    y = call(depthwise_gate, args)
    assert y.is_contiguous()
    torch.testing.assert_close(y, expected, rtol=0, atol=0 if uses_triton(device) or dtype != torch.float32 else 1e-6)


def test_one_image_for_the_whole_batch(device):
    args = case(batch=1, device=device)
    expected = call(depthwise_gate, args)
    args["x"] = args["x"].expand(3, -1, -1)
    torch.testing.assert_close(call(depthwise_gate, args), expected.expand(3, -1, -1), rtol=1e-5, atol=1e-6)


def test_strides_of_the_rest(device):
    args = case(device=device)
    expected = call(depthwise_gate, args)
    taps_first = args["weight"].permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    spaced = torch.stack((args["bias"], args["bias"] + 9), -1).flatten()[::2]
    turned = args["weight"].mT.contiguous().mT
    for change in ({"weight": taps_first}, {"weight": turned}, {"bias": spaced}):
        assert not next(iter(change.values())).is_contiguous()
        torch.testing.assert_close(call(depthwise_gate, args | change), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("op", [depthwise_gate, depthwise_gate_ref])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_images(device, op, dtype):
    y = call(op, case(batch=0, dtype=dtype, device=device))
    assert y.shape == (0, 20, 6)
    assert y.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_image_alone_is_the_image_in_the_batch(device, dtype):
    args = case(batch=3, height=5, width=18, channels=7, dtype=dtype, device=device)
    whole = call(depthwise_gate, args)
    for order in ([1], [2, 0]):
        assert torch.equal(call(depthwise_gate, args | {"x": args["x"][order]}), whole[order])


def test_images_do_not_touch(device):
    """Padding is zero above, below and beside an image, not what lies there in memory: here NaN."""
    args = case(batch=3, height=3, width=4, device=device)
    expected = call(depthwise_gate, args)[1]
    padded = F.pad(args["x"], (0, 0, 0, 0))
    padded[0], padded[2] = float("nan"), float("nan")
    torch.testing.assert_close(call(depthwise_gate, args | {"x": padded})[1], expected, rtol=0, atol=1e-6)


def test_x_is_left_alone(device):
    args = case(device=device)
    before = {name: args[name].clone() for name in ("x", "weight", "bias")}
    call(depthwise_gate, args)
    assert all(torch.equal(args[name], value) for name, value in before.items())


def test_gradients(device):
    """The Triton path says that it has none; torch has."""
    args = case(device=device)
    args["x"].requires_grad_()
    if not uses_triton(device):
        assert call(depthwise_gate, args).requires_grad
        return
    with pytest.raises(RuntimeError, match="x: requires a gradient"):
        call(depthwise_gate, args)
    with torch.no_grad():
        assert not call(depthwise_gate, args).requires_grad


BAD = {
    "x of two dimensions": ("x", lambda t: t[0], r"x: expected .*\[B, 4 \* 5, 2C\], got float32 \[20, 12\] on"),
    "x of four dimensions": ("x", lambda t: t.unflatten(1, (4, 5)), r"x: expected .*, got float32 \[2, 4, 5, 12\]"),
    "x of other tokens": ("x", lambda t: t[:, 1:], r"x: expected .*\[B, 4 \* 5, 2C\], got float32 \[2, 19, 12\]"),
    "x of odd channels": (
        "x",
        lambda t: t[..., 1:],
        r"x: expected float32 \[B, 20, 2C\] .*, got float32 \[2, 20, 11\]",
    ),
    "x without channels": ("x", lambda t: t[..., :0], r"x: expected .* C >= 1, got float32 \[2, 20, 0\]"),
    "x of float64": ("x", lambda t: t.double(), r"x: expected float32, bfloat16 or float16 .*, got float64"),
    "x of integers": ("x", lambda t: t.long(), r"x: expected .*, got int64"),
    "weight of other channels": (
        "weight",
        lambda t: t[1:],
        r"weight: expected float32 \[12, 1, 3, 3\] on .*\[11, 1, 3",
    ),
    "weight of five taps": ("weight", lambda t: F.pad(t, (1, 1)), r"weight: expected .*, got float32 \[12, 1, 3, 5\]"),
    "weight without its 1": ("weight", lambda t: t[:, 0], r"weight: expected .*, got float32 \[12, 3, 3\]"),
    "weight of another dtype": ("weight", lambda t: t.bfloat16(), r"weight: expected float32 .*, got bfloat16"),
    "weight elsewhere": ("weight", lambda t: t.to("meta"), r"weight: expected .* on (cpu|cuda:0), got .* on meta"),
    "bias too short": ("bias", lambda t: t[:6], r"bias: expected float32 \[12\] on .*, got float32 \[6\]"),
    "bias of another dtype": ("bias", lambda t: t.half(), r"bias: expected float32 .*, got float16"),
    "bias elsewhere": ("bias", lambda t: t.to("meta"), r"bias: expected .*, got .* on meta"),
    "no height": ("height", lambda n: 0, r"height: expected a positive integer, got 0"),
    "negative sizes": ("width", lambda n: -n, r"width: expected a positive integer, got -5"),
    "another height": ("height", lambda n: 5, r"x: expected .*\[B, 5 \* 5, 2C\], got float32 \[2, 20, 12\]"),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("op", [depthwise_gate, depthwise_gate_ref])
def test_wrong_arguments_are_named(device, op, bad):
    name, change, message = BAD[bad]
    args = case(device=device)
    with pytest.raises(ValueError, match=message):
        call(op, args | {name: change(args[name])})


BIG_STRIDES = """
import sys, torch, triton, triton.language as tl
from esengine.kernels.depthwise_gate import depthwise_gate as op, depthwise_gate_ref
from esengine.kernels.noise import INTERPRET
module = sys.modules["esengine.kernels.depthwise_gate"]
if sys.argv[2] == "32":
    @triton.jit
    def narrow(index, stride):
        return index * stride
    module.offset = narrow
device = "cpu" if INTERPRET else "cuda"
try:
    storage = torch.empty((1 << 31) + 64, dtype=torch.bfloat16, device=device)
except RuntimeError as error:
    print(error)
    sys.exit(77)
# three images, or the three rows of one image, 2^30 elements apart
images = sys.argv[1] == "images"
x = storage.as_strided((3, 2, 4) if images else (1, 3, 4), (1 << 30, 8, 1) if images else (0, 1 << 30, 1))
x.copy_(torch.arange(x.numel()).view(x.shape) % 7 - 3)
weight = torch.arange(-18, 18, device=device).view(4, 1, 3, 3).to(x.dtype) / 8
size = dict(height=1, width=2) if images else dict(height=3, width=1)
got, expected = op(x, weight, None, **size), depthwise_gate_ref(x, weight, None, **size)
sys.exit(0 if torch.allclose(got.float(), expected.float(), rtol=1e-2, atol=1e-2) else 3)
"""


@pytest.mark.parametrize("bits", [64, 32])
def test_offsets_beyond_31_bits(tmp_path, bits):
    """x spans 2^31 elements of memory, of which a few are touched. With 32-bit offsets it fails, as it must."""
    run_big_strides(tmp_path, "images", bits)


def test_token_strides_beyond_31_bits(tmp_path):
    """The rows of an image are reached by constants, which are as wide as they need to be."""
    run_big_strides(tmp_path, "rows", 64)


def run_big_strides(tmp_path, what, bits):
    if not (INTERPRET or torch.cuda.is_available()):
        pytest.skip("offsets are the Triton kernel's")
    script = tmp_path / "strides.py"
    script.write_text(BIG_STRIDES)
    done = subprocess.run([sys.executable, script, what, str(bits)], capture_output=True, text=True, timeout=120)
    if done.returncode == 77:
        pytest.skip(f"2^31 elements cannot be reserved: {done.stdout.strip().splitlines()[0]}")
    wrong = done.returncode == 3 or done.returncode < 0 or "illegal memory access" in done.stderr
    assert done.returncode == 0 if bits == 64 else wrong, f"exit code {done.returncode}\n{done.stdout}{done.stderr}"


def test_triton_is_what_the_interpreter_runs(monkeypatch):
    """So that a green interpreted run means that the kernel ran."""
    if not INTERPRET:
        pytest.skip("TRITON_INTERPRET is not set")
    monkeypatch.setattr(sys.modules["esengine.kernels.depthwise_gate"], "depthwise_gate_ref", None)
    args = case()
    assert_right(call(depthwise_gate, args), args)
