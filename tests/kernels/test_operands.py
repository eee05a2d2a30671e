"""Operands that do not fit are refused by name, by op and reference; where Triton does not run, the ops still do."""

import pytest
import torch

from esengine.kernels import (
    Lora,
    MemberNoise,
    Modulation,
    fused_linear,
    fused_linear_ref,
    linear_streams,
    mix,
    mix_ref,
    shrink,
    shrink_ref,
    stream_table,
    uses_triton,
)

B, T, K, N, G, R, RANK = 3, 4, 16, 8, 2, 2, 1


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() and uses_triton("cuda") else "cpu")


def draw(*shape, device, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


def adapters(device, targets=G, k=K, n=N):
    table = stream_table(tuple(linear_streams(f"layer{i}") for i in range(targets)), device)
    return Lora(draw(targets * R, k, device=device), draw(targets * n, R, device=device), 1.5, table)


def operands(device, dtype=torch.float32):
    """All that `fused_linear` takes, for G targets."""
    keys = MemberNoise(torch.tensor([4, 1, 0], device=device), seed=3, step=2, sigma=0.1, rank=RANK)
    x, lora = draw(B, T, K, device=device, dtype=dtype), adapters(device)
    return {
        "x": x,
        "weight": draw(G * N, K, device=device, dtype=dtype),
        "bias": draw(G * N, device=device, dtype=dtype),
        "h": shrink_ref(x, lora, keys)[1],
        "adapters": lora,
        "perturbation": keys,
        "residual": draw(B, T, G * N, device=device, dtype=dtype),
        "gate": draw(B, G * N, device=device, dtype=dtype),
    }


def strided(tensor, step=3):
    """The same numbers, `step` apart in the last dimension."""
    wide = tensor.new_zeros(*tensor.shape[:-1], tensor.shape[-1] * step)
    wide[..., ::step] = tensor
    return wide[..., ::step]


def of_lora(**changes):
    return lambda lora: lora._replace(**{name: change(getattr(lora, name)) for name, change in changes.items()})


WRONG = {
    "x of two dimensions": ("x", lambda x: x[0], r"x: expected float32, bfloat16 or float16 \[B, T, K\], got"),
    "x of fp64": ("x", lambda x: x.double(), r"x: expected .* got float64 \[3, 4, 16\]"),
    "weight of fp16 under fp32": ("weight", lambda w: w.half(), r"weight: expected float32 \[16, 16\] .* got float16"),
    "weight of another width": ("weight", lambda w: w[:, 1:], r"weight: expected float32 \[16, 16\] .* \[16, 15\]"),
    "weight of odd rows": (
        "weight",
        lambda w: w[1:],
        r"weight: expected \[G N, 16\] of G = 2 targets, got .* \[15, 16\]",
    ),
    "bias of another length": ("bias", lambda b: b[1:], r"bias: expected float32 \[16\] .* got float32 \[15\]"),
    "bias elsewhere": ("bias", lambda b: b.to("meta"), r"bias: expected .* got .* on meta"),
    "h of another width": (
        "h",
        lambda h: h[..., 1:].contiguous(),
        r"h: expected float32 \[3, 4, 6\].* got .* \[3, 4, 5\]",
    ),
    "h strided": ("h", strided, r"h: expected .* contiguous.* with strides \[72, 18, 3\]"),
    "h of half precision": ("h", lambda h: h.half(), r"h: expected float32 .* got float16"),
    "h missing": ("h", lambda h: None, "h, adapters: expected both or neither"),
    "gate strided": ("gate", strided, r"gate: expected float32 \[3, 16\], last stride 1, .* with strides \[48, 3\]"),
    "gate a token": ("gate", lambda g: g[:, None], r"gate: expected float32 \[3, 16\].* got float32 \[3, 1, 16\]"),
    "gate of another dtype": ("gate", lambda g: g.bfloat16(), r"gate: expected float32 .* got bfloat16"),
    "residual of one batch row": ("residual", lambda r: r[:1], r"residual: expected float32 \[3, 4, 16\]"),
    "no perturbation": ("perturbation", lambda p: None, "perturbation: expected the noise of the batch"),
    "members strided": (
        "perturbation",
        lambda p: p._replace(members=strided(p.members)),
        r"members: expected int64 \[3\], contiguous, .* with strides \[3\]",
    ),
    "members of int32": (
        "perturbation",
        lambda p: p._replace(members=p.members.int()),
        r"members: expected int64 \[3\].* got int32",
    ),
    "members too few": (
        "perturbation",
        lambda p: p._replace(members=p.members[1:].clone()),
        r"members: expected int64 \[3\].* \[2\]",
    ),
    "step out of range": ("perturbation", lambda p: p._replace(step=-1), "step: expected an integer"),
    "seed out of range": ("perturbation", lambda p: p._replace(seed=1 << 64), "seed: expected an integer"),
    "rank of nought": ("perturbation", lambda p: p._replace(rank=0), "rank: expected at least 1"),
    "a of half precision": ("adapters", of_lora(a=torch.Tensor.half), r"adapters\.a: expected float32 \[G r, 16\]"),
    "a of odd rows": ("adapters", of_lora(a=lambda a: a[1:]), r"adapters\.a: expected .* of G = 2 targets"),
    "b of another width": ("adapters", of_lora(b=lambda b: b[:, 1:]), r"adapters\.b: expected float32 \[16, 2\]"),
    "b missing": ("adapters", of_lora(b=lambda b: None), "adapters: expected a and b, or neither"),
    "streams of three": (
        "adapters",
        of_lora(streams=lambda s: s[:, :3]),
        r"adapters\.streams: expected int64 \[G, 4\]",
    ),
    "activation": ("activation", lambda a: "relu", "activation: expected one of silu, gelu_tanh or None, got 'relu'"),
}


@pytest.mark.parametrize("op", [fused_linear, fused_linear_ref])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_operand_of_the_fused_linear_is_refused_by_name(device, op, wrong):
    name, change, words = WRONG[wrong]
    given = operands(device)
    given[name] = change(given.get(name))
    with pytest.raises(ValueError, match=words):
        op(given.pop("x"), given.pop("weight"), given.pop("bias"), **given)


OF_SHRINK = ["x of two dimensions", "x of fp64", "no perturbation", "members strided", "members of int32"]
OF_SHRINK += ["members too few", "step out of range", "rank of nought", "a of half precision", "streams of three"]


@pytest.mark.parametrize("op", [shrink, shrink_ref])
@pytest.mark.parametrize("wrong", OF_SHRINK)
def test_a_wrong_operand_of_shrink_is_refused_by_name(device, op, wrong):
    name, change, words = WRONG[wrong]
    given = {each: operands(device)[each] for each in ("x", "adapters", "perturbation")}
    given[name] = change(given[name])
    with pytest.raises(ValueError, match=words):
        op(*given.values())


@pytest.mark.parametrize("op", [shrink, shrink_ref])
@pytest.mark.parametrize("name", ["shift", "scale"])
@pytest.mark.parametrize(
    ("change", "got"),
    [
        (strided, r"with strides \[48, 3\]"),
        (lambda t: t.half(), "got float16"),
        (lambda t: t[:, 1:], r"\[3, 15\]"),
        (lambda t: t[0], r"\[16\]"),
    ],
)
def test_a_wrong_modulation_is_refused_by_name(device, op, name, change, got):
    modulation = Modulation(draw(B, K, device=device), draw(B, K, device=device))
    modulation = modulation._replace(**{name: change(getattr(modulation, name))})
    with pytest.raises(ValueError, match=rf"{name}: expected float32 \[3, 16\], last stride 1, .*{got}"):
        op(draw(B, T, K, device=device), None, None, modulation)


@pytest.mark.parametrize("op", [mix, mix_ref])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.half(), "got float16"),
        (strided, "with strides"),
        (lambda s: s[..., 1:].contiguous(), r"\[2, 3, 4, 3\].* got float32 \[2, 3, 4, 2\]"),
        (lambda s: s[0], r"\[3, 4, 3\]"),
    ],
)
def test_wrong_partial_sums_are_refused_by_name(device, op, change, words):
    partial_sums, keys = draw(2, B, T, R + RANK, device=device), operands(device)["perturbation"]
    with pytest.raises(ValueError, match=f"partial_sums: expected .*{words}"):
        op(change(partial_sums), adapters(device, targets=1), keys)


@pytest.mark.skipif(uses_triton("cpu"), reason="the interpreter runs Triton's kernels on a CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_triton_the_ops_give_what_the_references_do(dtype):
    given = operands(torch.device("cpu"), dtype)
    lora, keys, x = given["adapters"], given["perturbation"], given["x"]
    modulation = Modulation(*(draw(B, K, device="cpu", dtype=dtype) for _ in range(2)))
    pairs = zip(shrink(x, lora, keys, modulation), shrink_ref(x, lora, keys, modulation), strict=True)
    assert all(torch.equal(got, expected) for got, expected in pairs)
    arguments = given.pop("x"), given.pop("weight"), given.pop("bias")
    assert torch.equal(fused_linear(*arguments, **given), fused_linear_ref(*arguments, **given))
    partial_sums = draw(2, B, T, R + RANK, device="cpu")
    one = adapters(torch.device("cpu"), targets=1)
    assert torch.equal(mix(partial_sums, one, keys), mix_ref(partial_sums, one, keys))
