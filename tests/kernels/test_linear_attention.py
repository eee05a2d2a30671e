"""ReLU linear attention: every path against fp64, against diffusers' own attention module, and against itself."""

import subprocess
import sys

import pytest
import torch

from esengine.kernels import (
    Lora,
    LowRank,
    MemberNoise,
    linear_attention,
    linear_attention_ref,
    linear_streams,
    member_factors,
    mix,
    shrink_ref,
    stream_table,
    uses_triton,
)
from esengine.kernels.factors import low_rank_ref
from esengine.kernels.noise import INTERPRET
from esengine.kernels.shrink import partial_sums_ref

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLOOR = 2.0**-20
"""The part of the norm that sums in another order may differ by: 8 units in the last place of fp32."""
HALVES = 2.0**-15
"""What two bf16 halves lose of k', S and z, 2^-16 of each at most and of either sign."""


def case(*, batch=2, t=33, heads=3, d=16, dtype=torch.float32, norms=(True, True), device="cpu", **to):
    """Arguments of the op: q, k, v of unit variance, slices of one stacked projection; some weights are negative."""
    generator = torch.Generator().manual_seed(100 * t + 10 * heads + d)
    q, k, v = torch.randn(batch, t, 3 * heads * d, generator=generator).to(device, dtype).chunk(3, -1)
    weights = (0.5 + torch.randn(2, heads * d, generator=generator)).to(device, dtype)
    norm_q, norm_k = (weight if there else None for weight, there in zip(weights, norms, strict=True))
    return dict(q=q, k=k, v=v, heads=heads, norm_q=norm_q, norm_k=norm_k) | to


def call(op, args):
    return op(args["q"], args["k"], args["v"], **{name: args[name] for name in args if name not in ("q", "k", "v")})


def exact(args):
    """fp64 [B, T, H * D] by the formula, one token and head at a time."""
    heads, eps = args["heads"], args.get("eps", 1e-5)

    def features(x, weight):
        x = x.double()
        if weight is not None:
            x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
        return x.clamp_min(0).unflatten(-1, (heads, -1))

    q, k = features(args["q"], args["norm_q"]), features(args["k"], args["norm_k"])
    v = args["v"].double().unflatten(-1, (heads, -1))
    attention = torch.einsum("bthd,bshd->bhts", q, k)
    return torch.einsum("bhts,bshd->bthd", attention / (attention.sum(-1, keepdim=True) + 1e-15), v).flatten(2)


def relative(got, expected):
    return float((got.double() - expected).norm() / expected.norm())


def assert_right(y, args):
    """At most 1.02 times the error of the exact result rounded to this dtype: the result is rounded once."""
    expected, dtype = exact(args), args["q"].dtype
    assert y.shape == expected.shape
    assert y.dtype == dtype
    assert y.isfinite().all()
    slack = HALVES if dtype == torch.bfloat16 else FLOOR
    assert relative(y, expected) <= 1.02 * relative(expected.to(dtype), expected) + slack


@pytest.mark.parametrize("t", [1, 7, 32, 33, 65])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens(device, t, dtype):
    args = case(t=t, dtype=dtype, device=device)
    assert_right(call(linear_attention, args), args)
    assert_right(call(linear_attention_ref, args), args)


@pytest.mark.parametrize(
    ("heads", "d"), [(1, 1), (5, 1), (2, 7), (5, 7), (1, 8), (4, 8), (3, 16), (5, 16), (1, 32), (2, 32), (4, 32)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads(device, heads, d, dtype):
    args = case(heads=heads, d=d, t=7, dtype=dtype, device=device)
    assert_right(call(linear_attention, args), args)
    assert_right(call(linear_attention_ref, args), args)


@pytest.mark.parametrize(("heads", "d"), [(2, 33), (1, 64), (3, 50)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_heads(device, heads, d, dtype):
    args = case(heads=heads, d=d, t=20, dtype=dtype, device=device)
    assert_right(call(linear_attention, args), args)


def test_wide_rows(device):
    """More columns than one block of the norm's pass, and more rows."""
    args = case(heads=70, d=32, t=9, batch=3, dtype=torch.bfloat16, device=device)
    assert_right(call(linear_attention, args), args)


@pytest.mark.parametrize("norms", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_norms(device, norms, dtype):
    args = case(norms=norms, dtype=dtype, device=device)
    assert_right(call(linear_attention, args), args)
    assert_right(call(linear_attention_ref, args), args)


def test_eps_counts(device):
    """Rows as small as sqrt(eps): another eps is another weight of their tokens."""
    args = case(device=device)
    args["k"] = args["k"] * torch.logspace(-4, 0, 33, device=device)[None, :, None]
    small, large = args | {"eps": 1e-12}, args | {"eps": 1e-2}
    for each in (small, large):
        assert_right(call(linear_attention, each), each)
    assert relative(call(linear_attention, small), exact(large)) > 0.1


def test_scale_of_q_cancels(device):
    """Whatever q's size: 1e-15 in the divisor is not felt, as its own share shrinks with q."""
    args = case(device=device)
    for scale in (1e-12, 1e-6, 1e6):
        scaled = args | {"q": args["q"] * scale}
        assert_right(call(linear_attention, scaled), scaled)
        assert_right(call(linear_attention_ref, scaled), scaled)


def test_nothing_positive_gives_zero(device):
    """A head whose q or k are all negative divides zero by 1e-15."""
    args = case(norms=(False, False), device=device)
    for name in ("q", "k"):
        negative = args | {name: -args[name].abs()}
        for op in (linear_attention, linear_attention_ref):
            assert torch.equal(call(op, negative), torch.zeros_like(args["q"]))


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("norms", [(True, True), (False, False)])
def test_a_nan_is_not_hidden(device, name, norms):
    """relu keeps it: NaN reaches at least the same head of the same token."""
    args = case(norms=norms, device=device)
    args[name] = args[name].clone()
    args[name][1, 4, 20] = float("nan")
    for op in (linear_attention, linear_attention_ref):
        y = call(op, args)
        assert y[1, 4].isnan()[20 if name == "v" else slice(16, 32)].all()
        assert y[0].isfinite().all()


LAYOUTS = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "batch inside": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every other": lambda x: torch.stack((x, x + 9), -1).flatten(-2)[..., ::2],
    "one row for all": lambda x: x[:1].expand(len(x), -1, -1),
    "one token for all": lambda x: x[:, :1].expand(-1, x.shape[1], -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides(device, layout, name, dtype):
    args = case(t=7, dtype=dtype, device=device)
    args[name] = LAYOUTS[layout](args[name])
    y = call(linear_attention, args)
    assert_right(y, args)
    assert y.is_contiguous()


def test_strided_weights_of_another_dtype(device):
    args = case(dtype=torch.bfloat16, device=device)
    args["norm_q"] = torch.stack((args["norm_q"].float(), args["norm_q"].float() + 9), -1)[:, 0]
    assert_right(call(linear_attention, args), args)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("d", [8, 32])
@pytest.mark.parametrize("t", [7, 33])
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_diffusers(device, heads, d, t, dtype):
    """The Attention module that SANA builds, its projections taken out: as near to fp64 as diffusers, or nearer."""
    processors = pytest.importorskip("diffusers.models.attention_processor")
    args = case(heads=heads, d=d, t=t, dtype=dtype, device=device)
    module = processors.Attention(
        query_dim=heads * d, heads=heads, dim_head=d, kv_heads=heads, qk_norm="rms_norm_across_heads", bias=False,
        processor=processors.SanaLinearAttnProcessor2_0(),
    ).to(device, dtype)  # fmt: skip
    for name in ("q", "k", "v"):
        setattr(module, f"to_{name}", Given(args[name]))
    module.to_out[0] = torch.nn.Identity()
    with torch.no_grad():
        module.norm_q.weight.copy_(args["norm_q"])
        module.norm_k.weight.copy_(args["norm_k"])
        theirs = module(args["q"])
    expected = exact(args | {"eps": module.norm_q.eps})
    assert module.norm_q.eps == module.norm_k.eps == 1e-5
    for op in (linear_attention, linear_attention_ref):
        ours = call(op, args)
        assert ours.dtype == theirs.dtype
        assert relative(ours, expected) <= relative(theirs, expected) + FLOOR
        assert relative(ours, theirs.double()) <= 2 * relative(theirs, expected) + FLOOR


class Given(torch.nn.Module):
    """A projection whose output is known."""

    def __init__(self, y):
        super().__init__()
        self.y = y

    def forward(self, x):
        return self.y


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
@pytest.mark.parametrize("op", [linear_attention, linear_attention_ref])
def test_nothing_to_compute(device, op, shape):
    args = case(batch=shape[0], t=shape[1], dtype=torch.bfloat16, device=device)
    y = call(op, args)
    assert y.shape == (*shape, 48)
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("t", [5, 40])
def test_a_row_alone_is_the_row_in_the_batch(device, t, dtype):
    args = case(batch=4, t=t, dtype=dtype, device=device)
    whole = call(linear_attention, args)
    for order in ([0], [1], [3, 1], [2, 0, 1, 3]):
        mates = args | {name: args[name][order] for name in ("q", "k", "v")}
        if uses_triton(device):  # one launch configuration whatever the batch, so the same sums
            assert torch.equal(call(linear_attention, mates), whole[order])
        else:
            torch.testing.assert_close(call(linear_attention, mates), whole[order], rtol=2**-7, atol=2e-6)


def test_a_nan_stays_in_its_row(device):
    """What a batch mate holds does not matter even where products are masked."""
    args = case(batch=3, t=40, device=device)
    whole = call(linear_attention, args)
    poisoned = args | {name: args[name].clone() for name in ("q", "k", "v")}
    for name in ("q", "k", "v"):
        poisoned[name][1] = float("nan")
    y = call(linear_attention, poisoned)
    assert torch.equal(y[[0, 2]], whole[[0, 2]])
    assert y[1].isnan().all()


def test_twice_the_same(device):
    args = case(t=65, dtype=torch.bfloat16, device=device)
    assert torch.equal(call(linear_attention, args), call(linear_attention, args))


def test_gradients(device):
    """The reference has them; Triton says that it has none."""
    args = case(device=device)
    args["v"] = args["v"].clone().requires_grad_()
    if uses_triton(device):
        with pytest.raises(RuntimeError, match="q, k, v: one requires a gradient"):
            call(linear_attention, args)
        with torch.no_grad():
            assert call(linear_attention, args).isfinite().all()
    else:
        call(linear_attention, args).sum().backward()
        assert args["v"].grad.isfinite().all()


BAD = {
    "q of two dimensions": ("q", lambda x: x[0], r"q: expected float32, bfloat16 or float16 \[B, T, H \* D\], got"),
    "q of float64": ("q", lambda x: x.double(), r"q: expected .*, got float64 \[2, 33, 48\] on"),
    "k of another length": ("k", lambda x: x[:, 1:], r"k: expected float32 \[2, 33, 48\] on .*, got .*\[2, 32, 48\]"),
    "k of another dtype": ("k", lambda x: x.half(), r"k: expected float32 .*, got float16"),
    "v of another batch": ("v", lambda x: x[:1], r"v: expected float32 \[2, 33, 48\] on .*, got float32 \[1, 33, 48\]"),
    "v elsewhere": ("v", lambda x: x.to("meta"), r"v: expected .* on (cpu|cuda:0), got .* on meta"),
    "no heads": ("heads", lambda _: 0, "heads: expected a divisor of 48 that leaves heads of 1 to 64, got 0"),
    "heads that leave a rest": ("heads", lambda _: 5, "heads: expected a divisor of 48 .*, got 5"),
    "more heads than columns": ("heads", lambda _: 96, "heads: expected a divisor of 48 .*, got 96"),
    "norm_q too short": ("norm_q", lambda x: x[1:], r"norm_q: expected .* \[48\] on .*, got float32 \[47\]"),
    "norm_q of a head": ("norm_q", lambda x: x[:16], r"norm_q: expected .* \[48\] on .*, got float32 \[16\]"),
    "norm_k of float64": ("norm_k", lambda x: x.double(), r"norm_k: expected .*, got float64 \[48\]"),
    "norm_k elsewhere": ("norm_k", lambda x: x.to("meta"), r"norm_k: expected .* on (cpu|cuda:0), got .* on meta"),
    "eps of zero": ("eps", lambda _: 0.0, "eps: expected a positive number, got 0.0"),
    "eps that is no number": ("eps", lambda _: float("nan"), "eps: expected a positive number, got nan"),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("op", [linear_attention, linear_attention_ref])
def test_wrong_arguments_are_named(device, op, bad):
    name, change, message = BAD[bad]
    args = case(device=device)
    with pytest.raises(ValueError, match=message):
        call(op, args | {name: change(args.get(name))})


def test_heads_too_wide(device):
    args = case(heads=1, d=65, t=2, device=device)
    with pytest.raises(ValueError, match="heads: expected a divisor of 65 that leaves heads of 1 to 64, got 1"):
        call(linear_attention, args)


BIG_STRIDES = """
import sys, torch, triton, triton.language as tl
from esengine.kernels import linear_attention, linear_attention_ref
from esengine.kernels.factors import low_rank_ref
from esengine.kernels.noise import INTERPRET
module = sys.modules["esengine.kernels.linear_attention"]
if sys.argv[1] == "32":
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
q, k, v = (storage[first:].as_strided((3, 2, 6), (1 << 30, 18, 1)) for first in (0, 6, 12))
for x in (q, k, v):
    x.copy_(torch.randn(3, 2, 6))
norm = torch.ones(6, device=device)
settings = dict(heads=2, norm_q=norm, norm_k=norm)
got, expected = linear_attention(q, k, v, **settings), linear_attention_ref(q, k, v, **settings)
sys.exit(0 if torch.allclose(got.float(), expected.float(), rtol=2**-7) else 3)
"""


@pytest.mark.parametrize("bits", [64, 32])
def test_offsets_beyond_31_bits(tmp_path, bits):
    """q, k and v span 2^31 elements, of which three rows are touched. With 32-bit offsets it fails, as it must."""
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
    module, seen = sys.modules["esengine.kernels.linear_attention"], []
    monkeypatch.setattr(module, "linear_attention_triton", lambda *args, **kwargs: seen.append(args))
    call(linear_attention, case())
    assert len(seen) == 1


def following(c, r, rank, device):
    """A linear of C columns that reads what attention makes, and the noise of two members."""
    streams = stream_table((linear_streams("to_out", direct=not r),), torch.device(device))
    a = torch.randn(r, c, generator=torch.Generator().manual_seed(0)).to(device) if r else None
    return Lora(a, None, 1.5, streams), MemberNoise(torch.tensor([5, 2], device=device), 1 << 63, 4, 0.1, rank)


@pytest.mark.parametrize(("heads", "d"), [(3, 16), (2, 32), (5, 12), (2, 40)])
@pytest.mark.parametrize(("r", "rank"), [(0, 1), (2, 1), (4, 3)])
def test_partial_sums(device, heads, d, r, rank):
    """y as without them, and what the next linear needs of it."""
    next_lora, perturbation = following(heads * d, r, rank, device)
    args = case(heads=heads, d=d, dtype=torch.bfloat16, device=device)
    y, partial_sums = call(linear_attention, args | dict(next_lora=next_lora, perturbation=perturbation))
    assert torch.equal(y, call(linear_attention, args))
    assert partial_sums.shape[1:] == (2, 33, r + rank)
    # the interpreter multiplies y before it is rounded
    bound = 2.0**-7 if INTERPRET else HALVES
    assert relative(partial_sums.sum(0), partial_sums_ref(y, next_lora, perturbation)[0].double()) <= bound
    if uses_triton(device):
        h = mix(partial_sums, next_lora, perturbation)
        assert relative(h, shrink_ref(y, next_lora, perturbation)[1].double()) <= bound


def test_partial_sums_need_bf16_and_heads_of_whole_quads(device):
    next_lora, perturbation = following(14, 2, 1, device)
    options = dict(next_lora=next_lora, perturbation=perturbation)
    with pytest.raises(ValueError, match="next_lora: expected heads of a multiple of 4 columns, got 7"):
        call(linear_attention, case(heads=2, d=7, dtype=torch.bfloat16, device=device) | options)
    options["next_lora"], _ = following(16, 2, 1, device)
    with pytest.raises(ValueError, match="next_lora: expected one target"):
        call(linear_attention, case(heads=2, d=8, device=device) | options)


def plain_and_part(args, r, rank, device, *, stored):
    """`low` for q, k and v of `args`, half as large as they are, and the arguments of what they are with it, fp64."""
    t, c, device = args["q"].shape[1], args["q"].shape[-1], torch.device(device)
    streams = stream_table(tuple(linear_streams(f"to_{name}", direct=not r) for name in "qkv"), device)
    generator = torch.Generator().manual_seed(r)
    a, b = (torch.randn(3 * size, r, generator=generator).to(device) if r else None for size in (20, c))
    lora = Lora(None if a is None else a.view(3 * r, 20), b, 1.5, streams)
    noise = MemberNoise(torch.tensor([5, 2], device=device), 1 << 63, 4, 0.1, rank)
    h = torch.randn(2, t, 3 * (r + rank), generator=generator).to(device) / 2 * (r + rank) ** -0.5
    low = LowRank(h, lora, noise, member_factors(lora, noise, k=20, n=c) if stored else None)
    parts = low_rank_ref(LowRank(h, lora, noise), c).double().chunk(3, -1)
    whole = {name: args[name].double() + part for name, part in zip("qkv", parts, strict=True)}
    return low, args | whole


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("r", "rank"), [(0, 1), (2, 1), (3, 3), (16, 4)])
def test_low_rank_part_is_added_in_fp32_before_the_norms(device, r, rank, dtype, stored):
    for t, heads, d, norms in ((33, 3, 16, (True, True)), (7, 2, 12, (True, False)), (1, 1, 40, (False, False))):
        args = case(t=t, heads=heads, d=d, dtype=dtype, norms=norms, device=device)
        low, whole = plain_and_part(args, r, rank, device, stored=stored)
        expected = exact(whole)
        slack = HALVES if dtype == torch.bfloat16 else FLOOR
        slack += 2.0**-11 if dtype != torch.float32 and device == "cuda" else 0
        for op in (linear_attention, linear_attention_ref):
            y = call(op, args | {"low": low})
            assert y.dtype == dtype
            assert relative(y, expected) <= 1.02 * relative(expected.to(dtype), expected) + slack
            assert relative(y, exact(args)) > 0.01


def test_low_rank_part_of_heads_that_are_no_whole_quads(device):
    """Which only stored factors serve, as rebuilt ones come by four."""
    args = case(heads=2, d=7, device=device)
    low, whole = plain_and_part(args, 2, 1, device, stored=True)
    assert relative(call(linear_attention, args | {"low": low}), exact(whole)) <= 2 * FLOOR
    if uses_triton(device):
        with pytest.raises(ValueError, match="low: expected heads of a multiple of 4 columns, or stored factors"):
            call(linear_attention, args | {"low": low._replace(factors=None)})


@pytest.mark.parametrize("r", [0, 2])
def test_low_rank_part_and_partial_sums(device, r):
    next_lora, _ = following(48, 2, 1, device)
    args = case(dtype=torch.bfloat16, device=device)
    low, _ = plain_and_part(args, r, 1, device, stored=True)
    y, partial_sums = call(linear_attention, args | dict(next_lora=next_lora, low=low, perturbation=low.perturbation))
    assert torch.equal(y, call(linear_attention, args | {"low": low}))
    bound = 2.0**-7 if INTERPRET else HALVES
    assert relative(partial_sums.sum(0), partial_sums_ref(y, next_lora, low.perturbation)[0].double()) <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_with_a_low_rank_part_alone_is_the_row_in_the_batch(device, every_row_alike, dtype):
    if not uses_triton(device):
        pytest.skip("the reference's sums are torch's")
    args = case(t=19, dtype=dtype, device=device)
    low, _ = plain_and_part(args, 2, 1, device, stored=True)
    whole = call(linear_attention, args | {"low": low})
    for row in range(2):
        one = slice(row, row + 1)
        noise = low.perturbation._replace(members=low.perturbation.members[one])
        own = low._replace(h=low.h[one], perturbation=noise, factors=low.factors[one])
        got = call(linear_attention, args | {name: args[name][one] for name in "qkv"} | {"low": own})
        assert torch.equal(got, whole[one])


@pytest.mark.parametrize("op", [linear_attention, linear_attention_ref])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda low: low._replace(h=low.h[:, 1:].contiguous()), r"low.h: expected float32 \[2, 33, 9\], contiguous"),
        (lambda low: low._replace(h=None), "low.h: expected what shrink or mix made, got None"),
        (
            lambda low: low._replace(adapters=low.adapters._replace(streams=low.adapters.streams[:1])),
            r"low.adapters.streams: expected int64 \[3, 4\]",
        ),
        (
            lambda low: low._replace(adapters=low.adapters._replace(b=low.adapters.b[1:])),
            r"low.adapters.b: expected float32 \[144, 2\]",
        ),
        (lambda low: low._replace(factors=low.factors[:, :2].contiguous()), "factors: expected float32"),
        (lambda low: low._replace(perturbation=low.perturbation._replace(rank=0)), "rank: expected at least 1"),
    ],
)
def test_a_wrong_low_rank_part_is_refused_by_name(device, op, change, words):
    args = case(device=device)
    low, _ = plain_and_part(args, 2, 1, device, stored=True)
    with pytest.raises(ValueError, match=words):
        call(op, args | {"low": change(low)})
    with pytest.raises(ValueError, match="perturbation: expected the same object as low's, or None, got another"):
        call(op, args | {"low": low, "perturbation": low.perturbation._replace()})


@pytest.mark.parametrize("op", [linear_attention, linear_attention_ref])
def test_many_low_rank_columns_are_refused(device, op):
    args = case(device=device)
    low, _ = plain_and_part(args, 32, 1, device, stored=False)
    with pytest.raises(ValueError, match=r"low: expected r \+ k of at most 32, got 33; add"):
        call(op, args | {"low": low})
