"""One linear, a whole population: every path against the per-member reference and against fp64."""

import json
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from esengine.kernels import (
    Lora,
    MemberNoise,
    configs,
    factor_ref,
    linear_streams,
    low_rank_part,
    low_rank_part_torch,
    member_factors,
    padded_rank,
    population_linear,
    population_linear_ref,
    signed_sigma,
    stream_table,
    uses_triton,
)
from esengine.kernels.fused_linear import linear_config
from esengine.kernels.noise import INTERPRET

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLOOR = 2.0**-20
"""The part of the norm that sums in another order may differ by, and normals of float32 functions (2e-6 of c):
8 units in the last place of fp32."""


def case(*, t=(5,), members=(0, 1, 3), n_in=33, n_out=21, r=2, k=1, dtype=torch.float32, bias=True, device="cpu", **to):
    """Arguments of the op: x [B, *t, in] of unit variance, y of about unit variance with LoRA as strong as W."""
    generator = torch.Generator().manual_seed(n_in + 100 * n_out + r)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    args = {
        "x": draw(len(members), *t, n_in).to(dtype),
        "weight": (draw(n_out, n_in) / n_in**0.5).to(dtype),
        "bias": draw(n_out).to(dtype) if bias else None,
        "a": draw(r, n_in) / n_in**0.5 if r else None,
        "b": draw(n_out, r) / r**0.5 if r else None,
    }
    args = {name: tensor if tensor is None else tensor.to(device) for name, tensor in args.items()}
    keys = dict(seed=(1 << 63) + 5, step=4, sigma=0.1, scale=1.5 if r else 1.0, rank=k) | to
    streams = linear_streams("layer", direct=not r)
    return args | dict(members=torch.tensor(members, device=device), streams=streams, **keys)


def exact(x, weight, bias, a, b, *, members, streams, seed, step, sigma, rank, scale):
    """fp64 [B, ..., out] of the low-rank part and of all, with A_i and B_i formed in fp64."""
    deltas = []
    for x_row, member in zip(x.double(), members.tolist(), strict=True):
        c = (1 - 2 * (member % 2)) * sigma / rank**0.5
        noise = dict(seed=seed, step=step, pairs=torch.tensor([member // 2]), rank=rank)

        def draw(stream, length, noise=noise):
            return factor_ref(stream=stream, length=length, **noise)[0].double().to(x.device)

        v, u_out = draw(streams.a_v, weight.shape[1]), draw(streams.b_u, len(weight))
        if a is None:
            deltas.append(x_row @ (c * u_out @ v.T).T)
        else:
            a_member = a.double() + c * draw(streams.a_u, len(a)) @ v.T
            b_member = b.double() + c * u_out @ draw(streams.b_v, len(a)).T
            deltas.append(scale * (x_row @ a_member.T) @ b_member.T)
    delta = torch.stack(deltas)
    return delta, delta + F.linear(x.double(), weight.double(), None if bias is None else bias.double())


def relative(got, expected):
    return float((got.double() - expected).norm() / expected.norm())


def assert_right(y, args):
    """At most twice the error of torch's own linear in this dtype with an exact low-rank part, against fp64.

    Twice, because the result may be rounded twice: once after the shared GEMM and once after the low-rank columns.
    """
    delta, expected = exact(**args)
    own = (F.linear(args["x"], args["weight"], args["bias"]).double() + delta).to(args["x"].dtype)
    assert y.shape == expected.shape
    assert y.dtype == args["x"].dtype
    assert y.isfinite().all()
    assert relative(y, expected) <= 2 * relative(own, expected) + FLOOR


def call(op, args, **options):
    table = stream_table((args["streams"],), args["members"].device)
    adapters = Lora(args["a"], args["b"], args["scale"], table)
    noise = MemberNoise(*(args[name] for name in ("members", "seed", "step", "sigma", "rank")))
    return op(args["x"], args["weight"], args["bias"], adapters, noise, **options)


@pytest.mark.parametrize("t", [1, 2, 5, 15, 16, 17, 33, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_per_member(device, t, dtype):
    """Tiles of 16 and of 64 rows straddle members or divide them."""
    args = case(t=(t,), members=(7, 2, 2, 0, 3), k=2, dtype=dtype, device=device)
    assert_right(call(population_linear, args), args)
    assert_right(call(population_linear_ref, args), args)


@pytest.mark.parametrize("r", [0, 1, 2, 3, 8, 16])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ranks(device, r, k, dtype):
    args = case(r=r, k=k, dtype=dtype, t=(3,) if k % 2 else (17,), n_in=19, n_out=9, device=device)
    assert_right(call(population_linear, args), args)
    assert_right(call(population_linear_ref, args), args)


@pytest.mark.parametrize(
    ("n_in", "n_out"), [(1, 1), (1, 70), (70, 1), (7, 3), (32, 64), (33, 65), (64, 128), (65, 130), (200, 5)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("r", [0, 2])
def test_widths(device, n_in, n_out, dtype, r):
    args = case(n_in=n_in, n_out=n_out, dtype=dtype, r=r, bias=n_in % 2 == 0, device=device)
    assert_right(call(population_linear, args), args)


@pytest.mark.parametrize("t", [(), (6,), (2, 3), (1, 1), (2, 1, 3)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dimensions_of_x(device, t, bias, dtype):
    args = case(t=t, bias=bias, dtype=dtype, device=device)
    assert_right(call(population_linear, args), args)


LAYOUTS = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "batch inside": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every other": lambda x: torch.stack((x, x + 9), -1).flatten(-2)[..., ::2],
    "cut out": lambda x: F.pad(x, (3, 2, 1, 4), value=float("nan"))[:, 1:-4, 3:-2],
    "one row for all": lambda x: x[:1].expand(len(x), -1, -1),
    "one token for all": lambda x: x[:, :1].expand(-1, x.shape[1], -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_of_x(device, layout, bias, dtype):
    args = case(t=(6,), bias=bias, dtype=dtype, device=device)
    args["x"] = LAYOUTS[layout](args["x"])
    assert not args["x"].is_contiguous()
    assert_right(call(population_linear, args), args)


@pytest.mark.parametrize("name", ["weight", "a", "b", "bias"])
def test_strides_of_the_rest(device, name):
    args = case(members=(5, 0, 3), device=device)
    expected = call(population_linear, args)
    tensor = args[name]
    spaced = torch.stack((tensor, tensor + 9), -1).flatten(-2)[..., ::2]
    layouts = [spaced] if tensor.dim() == 1 else [spaced, tensor.mT.contiguous().mT]
    for layout in layouts:
        assert not layout.is_contiguous()
        torch.testing.assert_close(call(population_linear, args | {name: layout}), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "members",
    [
        pytest.param((4, 4, 4, 4), id="repeated"),
        pytest.param((9, 2, 7, 0, 2, 8), id="unsorted"),
        pytest.param((0, 1, 10, 11), id="antithetic"),
        pytest.param(((1 << 32) + 1, 1 << 32, (1 << 33) - 1, 1), id="beyond 32 bits"),
    ],
)
@pytest.mark.parametrize("r", [0, 2])
def test_members(device, members, r):
    args = case(members=members, r=r, t=(3,), device=device)
    y = call(population_linear, args)
    assert_right(y, args)
    same = call(population_linear, args | {"x": args["x"][:1].expand(len(members), -1, -1)})
    for i, member in enumerate(members):
        for j in range(i):
            assert torch.allclose(same[i], same[j], atol=1e-6) == (member == members[j])


def test_large_pairs_are_not_folded(device):
    """Members 2^33 - 2 and 2^32 - 2 have pairs that differ only above bit 31 of the member."""
    args = case(members=((1 << 33) - 2, (1 << 32) - 2), device=device)
    args["x"] = args["x"][:1].expand(2, -1, -1)
    y = call(population_linear, args)
    assert relative(y[0], y[1].double()) > 1e-2


def test_antithetic_direct_members_mirror_the_plain_linear(device):
    args = case(members=(6, 7), r=0, device=device)
    args["x"] = args["x"][:1].expand(2, -1, -1)
    y = call(population_linear, args)
    plain = F.linear(args["x"][0], args["weight"], args["bias"])
    torch.testing.assert_close(y.mean(0), plain, rtol=0, atol=1e-5)
    assert (y[0] - plain).abs().max() > 0.1


def test_direct_form_is_a_shift_of_the_weight(device):
    """y_i = x_i (W + c U' V^T)^T + bias, with the factors of the stream ids .weight.U and .weight.V."""
    args = case(members=(12, 5), r=0, k=3, device=device)
    y = call(population_linear, args)
    for row, member in enumerate((12, 5)):
        noise = dict(seed=args["seed"], step=args["step"], pairs=torch.tensor([member // 2]), rank=3)
        u = factor_ref(stream=args["streams"].b_u, length=21, **noise)[0].to(device)
        v = factor_ref(stream=args["streams"].a_v, length=33, **noise)[0].to(device)
        c = float(signed_sigma(torch.tensor(member), args["sigma"], 3))
        assert abs(c) == pytest.approx(0.1 / 3**0.5)
        expected = F.linear(args["x"][row], args["weight"] + c * u @ v.T, args["bias"])
        torch.testing.assert_close(y[row], expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("shape", [(0, 33), (0, 4, 33), (3, 0, 33), (0, 0, 33)])
@pytest.mark.parametrize("r", [0, 2])
@pytest.mark.parametrize("op", [population_linear, population_linear_ref])
def test_nothing_to_compute(device, op, shape, r):
    args = case(members=tuple(range(shape[0])), r=r, device=device) if shape[0] else case(r=r, device=device)
    if not shape[0]:
        args["members"] = args["members"][:0]
    args["x"] = torch.zeros(shape, device=device)
    assert call(op, args).shape == (*shape[:-1], 21)


@pytest.mark.usefixtures("every_row_alike")
@pytest.mark.parametrize("t", [4, 40])
def test_a_row_alone_is_the_row_in_the_batch(device, t):
    args = case(members=(3, 8, 3, 2), t=(t,), r=3, k=2, device=device)
    whole = call(population_linear, args)
    for order in ([0], [1], [3, 1], [2, 0, 1, 3]):
        mates = args | {"x": args["x"][order], "members": args["members"][order]}
        if uses_triton(device):  # one launch configuration whatever the batch, so the same sums
            assert torch.equal(call(population_linear, mates), whole[order])
        else:
            torch.testing.assert_close(call(population_linear, mates), whole[order], rtol=0, atol=3e-6)


def test_twice_the_same(device):
    args = case(t=(17,), dtype=torch.bfloat16, device=device)
    assert torch.equal(call(population_linear, args), call(population_linear, args))


@pytest.mark.parametrize(("t", "block"), [(43, 64), (205, 128)])
def test_wide_row_tiles(device, t, block):
    """Tiles of 64 and of 128 rows, some of them with two members or more."""
    assert linear_config(torch.device("cpu"), dtype=torch.float32, t=t, k=6, n=5)["BLOCK_M"] == block
    args = case(members=tuple(range(4)), t=(t,), n_in=6, n_out=5, k=2, device=device)
    assert_right(call(population_linear, args), args)


def test_several_groups_of_tiles(device):
    """More than GROUP_M row tiles and several column tiles: every one is visited once."""
    config = linear_config(torch.device("cpu"), dtype=torch.float32, t=14, k=4, n=130)
    assert 154 / config["BLOCK_M"] > config["GROUP_M"]
    args = case(members=tuple(range(11)), t=(14,), n_in=4, n_out=130, r=1, device=device)
    assert_right(call(population_linear, args), args)


@pytest.mark.parametrize(("dtype", "least"), [(torch.bfloat16, 0.98), (torch.float16, 0.9995)])
def test_half_precision_does_not_eat_the_noise(device, dtype, least):
    """(y_0 - y_1) / 2 of the antithetic members is what the noise does: how close does it come to fp64's?

    With W = 0 only the low-rank part is rounded: what is left is the rounding of y itself. Against A_i and B_i formed
    and rounded in this dtype. Correlations measured: bf16 0.9831 and 0.9589, fp16 0.99977 and 0.99927.
    """
    args = case(members=(0, 1), t=(40,), n_in=64, n_out=24, r=4, dtype=dtype, bias=False, sigma=1e-3, device=device)
    args["x"], args["weight"] = args["x"][:1].expand(2, -1, -1), torch.zeros_like(args["weight"])

    def effect(y):
        return ((y[0].double() - y[1].double()) / 2).flatten().cpu()

    noise = dict(seed=args["seed"], step=args["step"], pairs=torch.tensor([0]), rank=1)
    v, u, v_out, u_out = (
        factor_ref(stream=stream, length=length, **noise)[0]
        for stream, length in zip(args["streams"], (64, 4, 4, 24), strict=True)
    )
    formed = []
    for c in (1e-3, -1e-3):
        a, b = ((args["a"].cpu() + c * u @ v.T).to(dtype), (args["b"].cpu() + c * u_out @ v_out.T).to(dtype))
        formed.append((args["scale"] * (args["x"][0].cpu().double() @ a.double().T) @ b.double().T).to(dtype))
    truth = effect(exact(**args)[1])
    ours, naive = (
        float(torch.corrcoef(torch.stack((effect(y), truth)))[0, 1]) for y in (call(population_linear, args), formed)
    )
    assert ours > least
    assert 1 - ours < 0.5 * (1 - naive)


@pytest.mark.parametrize("t", [1, 5, 16, 40])
@pytest.mark.parametrize(("r", "k"), [(0, 1), (2, 1), (3, 2), (16, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_low_rank_part_then_torchs_gemm(device, t, r, k, dtype):
    args = case(t=(t,), members=(7, 2, 2, 0), r=r, k=k, n_in=70, n_out=150, bias=t % 2 == 0, dtype=dtype, device=device)
    assert_right(call(population_linear, args, path="addmm"), args)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_x_on_the_other_path(device, layout):
    args = case(t=(6,), device=device)
    args["x"] = LAYOUTS[layout](args["x"])
    assert_right(call(population_linear, args, path="addmm"), args)


@pytest.mark.parametrize("t", [(), (1,), (5,), (16,), (2, 20)])
@pytest.mark.parametrize(("r", "k"), [(0, 1), (2, 1), (3, 2), (16, 4)])
@pytest.mark.parametrize("stored", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_low_rank_part_alone_on_the_torch_path(t, r, k, stored, dtype):
    """`stored` batch rows share a pair's numbers."""
    args = case(t=t, members=(6, 7, 2, 2, 0, 1), r=r, k=k, dtype=dtype)
    members, streams = args["members"], args["streams"]
    noise = dict(seed=args["seed"], step=args["step"], pairs=(members >> 1)[::stored], rank=k)
    lengths = zip(streams, (33, r, r, 21), strict=True)
    factors = tuple(factor_ref(stream=stream, length=length, **noise) if length else None for stream, length in lengths)
    c = signed_sigma(members, args["sigma"], k)
    got = low_rank_part_torch(args["x"], args["a"], args["b"], factors=factors, c=c, scale=args["scale"])
    delta, _ = exact(**args)
    assert got.dtype == torch.float32
    assert got.shape == delta.shape
    assert relative(got, delta) < 2 * FLOOR
    nothing = low_rank_part_torch(args["x"][:0], args["a"], args["b"], factors=factors, c=c[:0], scale=1.0)
    assert nothing.shape == (0, *t, 21)


@pytest.mark.parametrize("t", [1, 20])
def test_the_low_rank_part_by_the_device(device, t):
    """What is added to a base layer's own product: in the dtype of x, at the size of the part."""
    args = case(t=(t,), members=(7, 2, 2, 0), bias=False, device=device)
    adapters = Lora(args["a"], args["b"], args["scale"], stream_table((args["streams"],), args["x"].device))
    noise = MemberNoise(*(args[name] for name in ("members", "seed", "step", "sigma", "rank")))
    stored = member_factors(adapters, noise, k=33, n=21)
    for factors in (None, stored):
        got = low_rank_part(args["x"], None, adapters, noise, n=21, factors=factors)
        assert relative(got.cpu(), exact(**args)[0].cpu()) < 4 * FLOOR
    if uses_triton(device):
        x = args["x"].requires_grad_()
        with pytest.raises(RuntimeError, match="x: requires a gradient"):
            low_rank_part(x, None, adapters, noise, n=21)


def test_launch_settings_choose_the_path(device, monkeypatch, tmp_path):
    if not uses_triton(device):
        pytest.skip("paths are the Triton kernels'")
    module, taken = sys.modules["esengine.kernels.population_linear"], []
    for name in ("low_rank_part", "fused_linear"):
        op = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, op=op, name=name, **k: (taken.append(name), op(*a, **k))[1])
    args = case(device=device)
    call(population_linear, args)
    call(population_linear, args, path="addmm")
    document = configs.load(configs.DEFAULT) | {"paths": {"population_linear": [{"when": {}, "path": "addmm"}]}}
    (tmp_path / "addmm.json").write_text(json.dumps(document))
    monkeypatch.setenv(configs.OVERRIDE, str(tmp_path / "addmm.json"))
    call(population_linear, args)
    call(population_linear, args, path="epilogue")
    assert taken == ["fused_linear", "low_rank_part", "low_rank_part", "fused_linear"]
    with pytest.raises(ValueError, match="path: expected one of epilogue, addmm or None, got 'cublas'"):
        call(population_linear, args, path="cublas")


BAD = {
    "x of one dimension": (
        "x",
        lambda t: t[0, 0],
        r"x: expected float32, bfloat16 or float16 \[B, ..., 33\], got",
    ),
    "x of another width": ("x", lambda t: t[..., :-1], r"x: expected .*\[B, ..., 33\], got float32 \[3, 5, 32\] on"),
    "x of float64": ("x", lambda t: t.double(), r"x: expected float32, bfloat16 or float16 .*, got float64"),
    "x of integers": ("x", lambda t: t.long(), r"x: expected .*, got int64"),
    "weight of another dtype": (
        "weight",
        lambda t: t.bfloat16(),
        r"weight: expected float32 \[N, K\] on .* bfloat16",
    ),
    "weight elsewhere": ("weight", lambda t: t.to("meta"), r"weight: expected .* on (cpu|cuda:0), got .* on meta"),
    "bias too long": ("bias", lambda t: F.pad(t, (0, 1)), r"bias: expected float32 \[21\] on .*, got float32 \[22\]"),
    "bias elsewhere": ("bias", lambda t: t.to("meta"), r"bias: expected .*, got .* on meta"),
    "a without b": ("b", lambda t: None, "adapters: expected a and b, or neither, got one of them"),
    "b without a": ("a", lambda t: None, "adapters: expected a and b, or neither, got one of them"),
    "a of another width": ("a", lambda t: t[:, :-1], r"a: expected float32 \[G r, 33\] on .*, got float32 \[2, 32\]"),
    "a of another dtype": ("a", lambda t: t.half(), r"a: expected float32 .*, got float16"),
    "a elsewhere": ("a", lambda t: t.to("meta"), r"a: expected .*, got .* on meta"),
    "b transposed": ("b", lambda t: t.mT, r"b: expected float32 \[21, 2\] on .*, got float32 \[2, 21\]"),
    "b of another dtype": ("b", lambda t: t.bfloat16(), r"b: expected float32 .*, got bfloat16"),
    "members too few": (
        "members",
        lambda t: t[:-1],
        r"members: expected int64 \[3\], contiguous, on .*, got int64 \[2\]",
    ),
    "members of int32": (
        "members",
        lambda t: t.int(),
        r"members: expected int64 \[3\], contiguous, on .*, got int32 \[3\]",
    ),
    "members far apart": (
        "members",
        lambda t: torch.stack((t, t), -1)[:, 0],
        r"members: expected int64 \[3\], contiguous, on .* with strides \[2\]",
    ),
    "members of two dimensions": (
        "members",
        lambda t: t[:, None],
        r"members: expected int64 \[3\], contiguous, on .* int64 \[3, 1\]",
    ),
    "members elsewhere": ("members", lambda t: t.to("meta"), r"members: expected .*, got .* on meta"),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("op", [population_linear, population_linear_ref])
def test_wrong_arguments_are_named(device, op, bad):
    name, change, message = BAD[bad]
    args = case(device=device)
    with pytest.raises(ValueError, match=message):
        call(op, args | {name: change(args[name])})


@pytest.mark.parametrize(("name", "value"), [("seed", -1), ("seed", 1 << 64), ("step", -1), ("step", 1 << 32)])
def test_keys_out_of_range(device, name, value):
    with pytest.raises(ValueError, match=rf"{name}: expected an integer in \[0, 2\^.*, got {value}"):
        call(population_linear, case(device=device, **{name: value}))


BIG_STRIDES = """
import sys, torch, triton, triton.language as tl
from esengine.kernels import Lora, MemberNoise, linear_streams, population_linear_ref, stream_table
from esengine.kernels import population_linear as op
from esengine.kernels.noise import INTERPRET
if sys.argv[1] == "32":
    @triton.jit
    def narrow(index, stride):
        return index * stride
    for module in ("shrink", "fused_linear", "low_rank"):
        sys.modules[f"esengine.kernels.{module}"].offset = narrow
device = "cpu" if INTERPRET else "cuda"
try:
    storage = torch.empty((1 << 31) + 64, dtype=torch.bfloat16, device=device)
except RuntimeError as error:
    print(error)
    sys.exit(77)
x = storage.as_strided((3, 2, 5), (1 << 30, 8, 1))
for row in range(3):
    x[row] = torch.arange(10).view(2, 5) + row
weight, a, b = torch.ones(3, 5, dtype=x.dtype), torch.ones(1, 5), torch.ones(3, 1)
adapters = Lora(a.to(device), b.to(device), 1.0, stream_table((linear_streams("x"),), x.device))
operands = x, weight.to(device), None, adapters, MemberNoise(torch.tensor([0, 3, 4]).to(device), 1, 1, 0.1, 1)
got, expected = op(*operands), population_linear_ref(*operands)
sys.exit(0 if torch.allclose(got.float(), expected.float(), rtol=1e-2) else 3)
"""


@pytest.mark.parametrize("bits", [64, 32])
def test_offsets_beyond_31_bits(tmp_path, bits):
    """x spans 2^31 elements of memory, of which three rows are touched. With 32-bit offsets it fails, as it must."""
    if not (INTERPRET or torch.cuda.is_available()):
        pytest.skip("offsets are the Triton kernels'")
    script = tmp_path / "strides.py"
    script.write_text(BIG_STRIDES)
    done = subprocess.run([sys.executable, script, str(bits)], capture_output=True, text=True, timeout=120)
    if done.returncode == 77:
        pytest.skip(f"2^31 elements cannot be reserved: {done.stdout.strip().splitlines()[0]}")
    wrong = done.returncode == 3 or done.returncode < 0 or "illegal memory access" in done.stderr
    assert done.returncode == 0 if bits == 64 else wrong, f"exit code {done.returncode}\n{done.stdout}{done.stderr}"


def test_triton_is_what_the_interpreter_runs(monkeypatch):
    """So that a green interpreted run means that the kernels ran."""
    if not INTERPRET:
        pytest.skip("TRITON_INTERPRET is not set")
    import sys as system

    module = system.modules["esengine.kernels.population_linear"]
    seen = []
    fused = module.fused_linear
    monkeypatch.setattr(module, "fused_linear", lambda *args, **kwargs: (seen.append(args), fused(*args, **kwargs))[1])
    call(population_linear, case())
    assert len(seen) == 1


def test_padded_ranks():
    assert [padded_rank(k) for k in range(1, 9)] == [1, 2, 4, 4, 8, 8, 8, 8]
    assert re.fullmatch(r"\d+", str(padded_rank(16)))


@pytest.mark.skipif(uses_triton(torch.device("cpu")), reason="the Triton path has no gradient")
@pytest.mark.parametrize("t", [1, 8, 40])  # below and above the rows at which columns are joined
@pytest.mark.parametrize("bias", [True, False])
def test_on_a_cpu_gradients_are_those_of_the_reference(t, bias):
    torch.manual_seed(0)
    x, weight = torch.randn(4, t, 12, requires_grad=True), torch.randn(9, 12)
    b = torch.randn(9) if bias else None
    lora_a, lora_b = torch.randn(3, 12, requires_grad=True), torch.randn(9, 3, requires_grad=True)
    adapters = Lora(lora_a, lora_b, 0.5, torch.arange(4).view(1, 4))
    noise = MemberNoise(torch.tensor([0, 1, 6, 7]), 3, 2, 0.3, 2)
    draw = torch.randn(4, t, 9)
    found = [
        torch.autograd.grad((op(x, weight, b, adapters, noise) * draw).sum(), (x, lora_a, lora_b))
        for op in (population_linear, population_linear_ref)
    ]
    for got, expected in zip(*found, strict=True):
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4)
