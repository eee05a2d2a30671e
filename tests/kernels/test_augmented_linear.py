"""The linear over an augmented K: against the per-member reference, within the rounding of its low-rank columns."""

import json

import pytest
import torch
import torch.nn.functional as F

from esengine.kernels import (
    configs,
    factor_ref,
    linear_streams,
    population_linear,
    population_linear_ref,
    shrink_ref,
    stream_table,
    uses_triton,
)
from esengine.kernels.augmented_linear import (
    augment_input,
    augment_weight,
    augmented_columns,
    augmented_operands,
    population_linear_augmented,
)
from esengine.kernels.operands import Lora, MemberNoise

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
UNIT = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Largest relative error of rounding one element to nearest; fp32 columns are not rounded."""
FLOOR = 2.0**-20
"""fp32 sums in another order: 8 units in the last place of the norm."""
TENSORS = ("x", "weight", "bias", "a", "b")


def case(*, t=(5,), members=(0, 1, 3), n_in=33, n_out=21, r=2, k=1, dtype=torch.float32, bias=True, device="cpu", **to):
    """Arguments of the op: x [B, *t, in] of unit variance, y of about unit variance with LoRA as strong as W."""
    generator = torch.Generator().manual_seed(n_in + 100 * n_out + r)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    tensors = {
        "x": draw(len(members), *t, n_in).to(dtype),
        "weight": (draw(n_out, n_in) / n_in**0.5).to(dtype),
        "bias": draw(n_out).to(dtype) if bias else None,
        "a": draw(r, n_in) / n_in**0.5 if r else None,
        "b": draw(n_out, r) / r**0.5 if r else None,
    }
    args = {name: tensor if tensor is None else tensor.to(device) for name, tensor in tensors.items()}
    keys = dict(seed=(1 << 63) + 5, step=4, sigma=0.1, scale=1.5 if r else 1.0, rank=k) | to
    streams = linear_streams("layer", direct=not r)
    return args | dict(members=torch.tensor(members, device=device), streams=streams, **keys)


def call(op, args):
    return op(*(args[name] for name in TENSORS), **{name: args[name] for name in args if name not in TENSORS})


def columns(args):
    """h [B, T, r + k] and the columns [B, N, r + k] that it meets, fp32."""
    x = args["x"].reshape(len(args["x"]), -1, args["x"].shape[-1])
    adapters = Lora(args["a"], args["b"], args["scale"], stream_table((args["streams"],), x.device))
    perturbation = MemberNoise(args["members"], args["seed"], args["step"], args["sigma"], args["rank"])
    u = noise_out(args, args["members"] >> 1)
    e = u if args["b"] is None else torch.cat((args["b"].expand(len(x), -1, -1), u), 2)
    return shrink_ref(x, adapters, perturbation)[1], e


def noise_out(args, pairs):
    keys = {name: args[name] for name in ("seed", "step", "rank")}
    return factor_ref(stream=args["streams"].b_u, pairs=pairs, length=len(args["weight"]), **keys)


def tolerance(args, expected):
    """Absolute, of the norm of y: the op may be off by twice torch's own error, and by both factors' rounding.

    With |h' - h| <= u |h| and |e' - e| <= u |e|, column j is off by at most (2 u + u^2) |h_j| |e_j|, and all columns of
    a batch row by their sum.
    """
    h, e = columns(args)
    u = UNIT[args["x"].dtype]
    rounding = (2 * u + u * u) * (h.double().norm(dim=1) * e.double().norm(dim=1)).sum(1).norm()
    plain = F.linear(args["x"], args["weight"], args["bias"]).double()
    exact = F.linear(*(None if args[n] is None else args[n].double() for n in TENSORS[:3]))
    own = ((plain + expected - exact).to(args["x"].dtype).double() - expected).norm()
    return float(2 * own + rounding + FLOOR * expected.norm())


def reference(args):
    """fp64 of `population_linear_ref` in fp32: rounded once, to fp32."""
    floats = {name: None if args[name] is None else args[name].float() for name in TENSORS}
    return call(population_linear_ref, args | floats).double()


def assert_right(y, args):
    expected = reference(args)
    assert y.shape == expected.shape
    assert y.dtype == args["x"].dtype
    assert y.isfinite().all()
    assert (y.double() - expected).norm() <= tolerance(args, expected)


@pytest.mark.parametrize("t", [1, 5, 16, 33])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_per_member(device, t, dtype):
    args = case(t=(t,), members=(7, 2, 2, 0, 3), k=2, dtype=dtype, device=device)
    assert_right(call(population_linear_augmented, args), args)


@pytest.mark.parametrize("r", [0, 1, 3, 8])
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ranks(device, r, k, dtype):
    args = case(r=r, k=k, dtype=dtype, n_in=19, n_out=9, device=device)
    assert_right(call(population_linear_augmented, args), args)


@pytest.mark.parametrize(("n_in", "n_out"), [(1, 1), (1, 70), (70, 1), (64, 64), (65, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("r", [0, 2])
def test_widths(device, n_in, n_out, dtype, r):
    args = case(n_in=n_in, n_out=n_out, dtype=dtype, r=r, bias=n_in % 2 == 0, device=device)
    assert_right(call(population_linear_augmented, args), args)


@pytest.mark.parametrize("t", [(), (6,), (2, 3), (1, 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_dimensions_of_x(device, t, bias):
    args = case(t=t, bias=bias, dtype=torch.bfloat16, device=device)
    assert_right(call(population_linear_augmented, args), args)


LAYOUTS = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "every other": lambda x: torch.stack((x, x + 9), -1).flatten(-2)[..., ::2],
    "one row for all": lambda x: x[:1].expand(len(x), -1, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_x(device, layout):
    args = case(t=(6,), dtype=torch.bfloat16, device=device)
    args["x"] = LAYOUTS[layout](args["x"])
    assert not args["x"].is_contiguous()
    assert_right(call(population_linear_augmented, args), args)


@pytest.mark.parametrize("name", ["weight", "a", "b", "bias", "members"])
def test_strides_of_the_rest(device, name):
    args = case(members=(5, 0, 3), device=device)
    spaced = torch.stack((args[name], args[name] + 9), -1).flatten(-2)[..., ::2]
    assert not spaced.is_contiguous()
    expected = call(population_linear_augmented, args)
    assert torch.equal(call(population_linear_augmented, args | {name: spaced}), expected)


@pytest.mark.parametrize(
    "members",
    [
        pytest.param((4, 4, 4, 4), id="one pair"),
        pytest.param((9, 2, 7, 0, 2, 8), id="unsorted"),
        pytest.param((10, 11, 0, 1), id="antithetic"),
        pytest.param(((1 << 32) + 1, 1 << 32, (1 << 33) - 1, 1), id="beyond 32 bits"),
        pytest.param(tuple(range(0, 96, 2)), id="48 pairs"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("r", [0, 2])
def test_members(device, members, dtype, r):
    """Each row meets its own pair and sign: the tolerance is well below what the noise does."""
    args = case(members=members, r=r, t=(2,), n_in=17, dtype=dtype, device=device)
    y, expected = call(population_linear_augmented, args), reference(args)
    assert_right(y, args)
    for other in (args["members"] ^ 1, args["members"] ^ 2, args["members"].flip(0) ^ 4):
        wrong = reference(args | {"members": other})
        assert (wrong - expected).norm() > 2 * tolerance(args, expected)


@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)])
def test_both_factors_are_rounded_and_nothing_else(device, dtype, unit):
    """W = 0, summed in fp64 over the operands: the low-rank part is off, by at most `unit` of its columns in norm."""
    args = case(t=(40,), n_in=64, n_out=48, dtype=dtype, bias=False, device=device)
    args["weight"] = torch.zeros_like(args["weight"])
    settings = {name: args[name] for name in args if name not in TENSORS}
    x, weight = augmented_operands(args["x"], args["weight"], args["a"], args["b"], **settings)
    h, e = (tensor.double() for tensor in columns(args))
    error = (F.linear(x.double(), weight.double()) - h @ e.mT).norm()
    size = (h.norm(dim=1) * e.norm(dim=1)).sum(1).norm()
    assert unit / 16 < error / size <= unit


@pytest.mark.parametrize("dtype", DTYPES)
def test_operands_column_by_column(dtype):
    args = case(members=(6, 1, 7), k=3, dtype=dtype)
    pairs, slots = torch.tensor([0, 3]), torch.tensor([1, 0, 1])
    h, u = columns(args)[0], noise_out(args, pairs)
    x = augment_input(args["x"], h, slots, pairs=2, rank=3)
    weight = augment_weight(args["weight"], args["b"], u)
    assert x.shape == (3, 5, 48 if dtype == torch.float32 else 64)
    assert weight.shape == (21, x.shape[-1])
    assert torch.equal(x[..., :33], args["x"])
    assert torch.equal(x[..., 33:35], h[..., :2].to(dtype))
    for row, slot in enumerate((1, 0, 1)):
        own, other = 35 + 3 * slot, 38 - 3 * slot
        assert torch.equal(x[row, :, own : own + 3], h[row, :, 2:].to(dtype))
        assert not x[row, :, other : other + 3].any()
    assert torch.equal(weight[:, :35], torch.cat((args["weight"], args["b"].to(dtype)), 1))
    assert torch.equal(weight[:, 35:41], torch.cat((u[0], u[1]), 1).to(dtype))
    assert not x[..., 41:].any()
    assert not weight[:, 41:].any()


def test_columns():
    """2240 -> 2304 holds 60 pairs at r = 4, k = 1."""
    assert augmented_columns(2240, 4 + 60, torch.bfloat16) == 2304
    assert augmented_columns(2240, 4 + 61, torch.float16) == 2368
    assert augmented_columns(2240, 4 + 61, torch.float32) == 2312
    assert augmented_columns(33, 3, torch.bfloat16) == 64


@pytest.mark.parametrize("shape", [(0, 33), (0, 4, 33), (3, 0, 33), (3, 2, 0, 33)])
@pytest.mark.parametrize("r", [0, 2])
def test_nothing_to_compute(device, shape, r):
    args = case(members=tuple(range(3)), r=r, device=device)
    args |= {"x": torch.zeros(shape, device=device), "members": args["members"][: shape[0]]}
    assert call(population_linear_augmented, args).shape == (*shape[:-1], 21)


def test_twice_the_same(device):
    args = case(t=(17,), dtype=torch.bfloat16, device=device)
    assert torch.equal(call(population_linear_augmented, args), call(population_linear_augmented, args))


def test_a_row_alone_is_the_row_in_the_batch(device):
    """But for the order of the sum."""
    args = case(members=(3, 8, 3, 2), k=2, device=device)
    whole = call(population_linear_augmented, args)
    for order in ([1], [3, 1], [2, 0, 1, 3]):
        mates = args | {"x": args["x"][order], "members": args["members"][order]}
        torch.testing.assert_close(call(population_linear_augmented, mates), whole[order], rtol=0, atol=3e-6)


def test_a_value_that_is_not_finite_stays_in_its_row(device):
    args = case(device=device)
    args["x"] = args["x"].index_fill(0, torch.tensor([1], device=device), float("inf"))
    y = call(population_linear_augmented, args)
    assert y[[0, 2]].isfinite().all()
    assert not y[1].isfinite().any()


def test_gradients(device):
    args = case(device=device)
    args |= {name: args[name].requires_grad_() for name in ("x", "weight", "a", "b")}
    with pytest.raises(RuntimeError, match="x: requires a gradient"):
        call(population_linear_augmented, args)
    args["x"] = args["x"].detach()
    assert not call(population_linear_augmented, args).requires_grad


def test_what_does_not_fit_is_refused(device):
    args = case(device=device)
    for name, value, message in (
        ("x", args["x"].double(), "x: expected float32, bfloat16 or float16"),
        ("weight", args["weight"].half(), "weight: expected float32"),
        ("b", None, "a, b: expected both tensors or both None"),
        ("members", args["members"].int(), r"members: expected int64 \[3\] on .*, got int32 \[3\]"),
        ("seed", -1, "seed: expected an integer"),
    ):
        with pytest.raises(ValueError, match=message):
            call(population_linear_augmented, args | {name: value})
    h = torch.zeros(3, 5, 3)
    slots = torch.zeros(3, dtype=torch.int64)
    x, weight, b = (args[name].cpu() for name in ("x", "weight", "b"))
    with pytest.raises(ValueError, match=r"h: expected \[3, 5, r \+ 1\], got \[3, 4, 3\]"):
        augment_input(x, h[:, :4], slots, pairs=1, rank=1)
    with pytest.raises(ValueError, match=r"h: expected \[3, 5, r \+ 4\], got \[3, 5, 3\]"):
        augment_input(x, h, slots, pairs=1, rank=4)
    with pytest.raises(ValueError, match=r"slots: expected int64 \[3\], got int32 \[3\]"):
        augment_input(x, h, slots.int(), pairs=1, rank=1)
    with pytest.raises(ValueError, match=r"u: expected \[P, 21, k\], got \[2, 20, 1\]"):
        augment_weight(weight, b, torch.zeros(2, 20, 1))
    with pytest.raises(ValueError, match=r"b: expected \[21, r\], got \[2, 21\]"):
        augment_weight(weight, b.mT, torch.zeros(2, 21, 1))


def test_it_takes_the_kernel_where_there_is_one(device, monkeypatch):
    from esengine.kernels import augmented_linear

    taken = []
    for name in ("shrink", "shrink_ref"):
        op = getattr(augmented_linear, name)
        monkeypatch.setattr(augmented_linear, name, lambda *args, op=op, name=name: (taken.append(name), op(*args))[1])
    call(population_linear_augmented, case(device=device))
    assert taken == ["shrink" if uses_triton(device) else "shrink_ref"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_step_in_memory_is_the_step(device, dtype):
    args = case(dtype=dtype, device=device)
    expected = call(population_linear_augmented, args)
    step = torch.tensor([args["step"]], device=device)
    assert torch.equal(call(population_linear_augmented, args | {"step": step}), expected)
    if uses_triton(device):
        with pytest.raises(ValueError, match=r"step: expected int64 \[1\]"):
            call(population_linear_augmented, args | {"step": step.int()})


def test_rows_of_one_pair_have_a_place_each(device):
    """So that the shapes follow from the batch alone: to count the pairs would be to wait for the device."""
    args = case(members=(4, 5, 4, 9), device=device)
    settings = {name: args[name] for name in args if name not in TENSORS}
    x, weight = augmented_operands(args["x"], args["weight"], args["a"], args["b"], **settings)
    assert x.shape == (4, 5, augmented_columns(33, 2 + 4, torch.float32))
    assert torch.equal(weight[:, 35], weight[:, 36])
    assert torch.equal(weight[:, 35], weight[:, 37])
    assert not torch.equal(weight[:, 35], weight[:, 38])
    assert [(row[:, 35:39] != 0).any(0).tolist() for row in x] == torch.eye(4).bool().tolist()


def test_it_is_the_path_that_a_file_of_settings_chooses(device, monkeypatch, tmp_path):
    if not uses_triton(device):
        pytest.skip("paths are the Triton kernels'")
    contents = json.loads(configs.DEFAULT.read_text())
    contents["paths"] = {"population_linear": [{"when": {"t": [5, None]}, "path": "augmented"}]}
    (tmp_path / "paths.json").write_text(json.dumps(contents))
    for t in (5, 4):
        args = case(t=(t,), device=device)
        monkeypatch.delenv(configs.OVERRIDE, raising=False)
        plain = call(population_linear, args)
        monkeypatch.setenv(configs.OVERRIDE, str(tmp_path / "paths.json"))
        got = call(population_linear, args)
        assert torch.equal(got, call(population_linear_augmented, args) if t == 5 else plain)
        assert_right(got, args)
