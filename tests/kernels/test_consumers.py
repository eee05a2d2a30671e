"""Ops that add a linear's low-rank part where they read its product: RMS norm, residual stream; against fp64."""

import sys

import pytest
import torch
import torch.nn.functional as F

from esengine.kernels import (
    Lora,
    LowRank,
    MemberNoise,
    Modulation,
    factor_ref,
    linear_streams,
    member_factors,
    residual_norm,
    residual_norm_ref,
    rms_norm,
    rms_norm_ref,
    shrink_ref,
    stream_table,
    uses_triton,
)
from esengine.kernels.noise import INTERPRET

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RANKS = [(0, 1), (2, 1), (3, 3), (16, 4)]
MEMBERS, K = (5, 4, 9), 37


def draw(*shape, device, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + seed)).to(device, dtype)


def target(n, r, rank, device, *, t=None, targets=1, stored=True, k=K):
    """A low-rank part of [B, T, N] for each target, as large as the product; without t, h is missing."""
    device = torch.device(device)
    table = stream_table(tuple(linear_streams(f"{i}", direct=not r) for i in range(targets)), device)
    a, b = (draw(targets * r, k, device=device), draw(targets * n, r, device=device)) if r else (None, None)
    noise = MemberNoise(torch.tensor(MEMBERS, device=device), (1 << 63) + 5, 4, 0.1, rank)
    lora = Lora(a, b, 1.5, table)
    h = None if t is None else draw(len(MEMBERS), t, targets * (r + rank), device=device) * (r + rank) ** -0.5
    return LowRank(h, lora, noise, member_factors(lora, noise, k=k, n=n) if stored else None)


def exact_part(low, n):
    """h [B | U']^T in fp64, one member and target at a time."""
    h, (_, b, _, streams), noise, _ = low
    g, k = len(streams), noise.rank
    r, out = h.shape[-1] // g - k, torch.zeros(*h.shape[:2], g * n, dtype=torch.float64, device=h.device)
    for row, member in enumerate(noise.members.tolist()):
        for i, (*_, stream) in enumerate(streams.tolist()):
            pair = torch.tensor([member // 2], device=h.device)
            u = factor_ref(seed=noise.seed, step=noise.step, stream=stream, pairs=pair, length=n, rank=k)[0]
            columns = torch.cat((*([b[i * n : (i + 1) * n]] if r else []), u), -1).double()
            own = torch.cat((h[row, :, i * r : (i + 1) * r], h[row, :, g * r + i * k : g * r + (i + 1) * k]), -1)
            out[row, :, i * n : (i + 1) * n] = own.double() @ columns.T
    return out


def relative(got, expected):
    return float((got.double() - expected).norm() / expected.norm())


def assert_rounded_once(got, expected, dtype):
    """At most 1.02 times the error of the exact result rounded once, and sums in another order; h is in tf32."""
    assert got.shape == expected.shape
    assert got.dtype == dtype
    assert got.isfinite().all()
    slack = 2.0**-20 if dtype == torch.float32 or INTERPRET or not got.is_cuda else 2.0**-11
    assert relative(got, expected) <= 1.02 * relative(expected.to(dtype), expected) + slack


def exact_norm(y, weight, eps, low):
    wide = y.double() + (0 if low is None else exact_part(low, y.shape[-1]))
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def alone(low, row):
    """The low-rank part of one batch row."""
    one = slice(row, row + 1)
    noise = low.perturbation._replace(members=low.perturbation.members[one])
    cut = [None if x is None else x[one].contiguous() for x in (low.h, low.factors)]
    return LowRank(cut[0], low.adapters, noise, cut[1])


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("r", "rank"), RANKS)
def test_rms_norm(device, r, rank, dtype, stored):
    for t, n in ((1, 70), (17, 21)):
        y, weight = draw(3, t, n, device=device, dtype=dtype), draw(n, device=device, dtype=dtype)
        low = target(n, r, rank, device, t=t, stored=stored)
        for op in (rms_norm, rms_norm_ref):
            assert_rounded_once(op(y, weight, 1e-5, low), exact_norm(y, weight, 1e-5, low), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_of_a_whole_product_is_torchs(device, dtype):
    y, weight = draw(3, 5, 42, device=device, dtype=dtype)[..., :21], draw(21, device=device, dtype=dtype)
    for op in (rms_norm, rms_norm_ref):
        assert_rounded_once(op(y, weight, 1e-5), exact_norm(y, weight, 1e-5, None), dtype)
    if uses_triton(device):
        assert torch.equal(rms_norm(y, weight, 1e-5), F.rms_norm(y, [21], weight, 1e-5))


def test_rms_norm_of_strides_and_of_a_wider_weight(device):
    y = draw(5, 3, 21, device=device, dtype=torch.bfloat16).transpose(0, 1)
    low, weight = target(21, 2, 1, device, t=5), draw(42, device=device)[::2]
    got = rms_norm(y, weight, 1e-2, low)
    assert got.is_contiguous() or not uses_triton(device)
    assert_rounded_once(got, exact_norm(y, weight, 1e-2, low), torch.bfloat16)


def streams_of(n, t, dtype, device, *, gated=True):
    y, residual = (draw(3, t, n, device=device, dtype=dtype, seed=seed) for seed in (1, 2))
    modulation = Modulation(*(draw(3, n, device=device, dtype=dtype, seed=seed) for seed in (3, 4)))
    return y, residual, draw(3, n, device=device, dtype=dtype, seed=5) if gated else None, modulation


def exact_stream(y, residual, gate, low):
    wide = y.double() + (0 if low is None else exact_part(low, y.shape[-1]))
    return residual.double() + (wide if gate is None else wide * gate.double()[:, None])


def assert_stream(got, y, residual, gate, low, modulation, next_lora):
    assert_rounded_once(got.z, exact_stream(y, residual, gate, low), y.dtype)
    assert (got.x is None) == (modulation is None)
    assert (got.next_lora is None) == (next_lora is None)
    # the interpreter reads z before it is rounded
    bound = torch.finfo(y.dtype).eps * (2 if INTERPRET else 0.6) + 2.0**-15
    if modulation is not None:
        shift, scale, eps = modulation
        normed = F.layer_norm(got.z.double(), got.z.shape[-1:], eps=eps)
        x = normed * (1 + scale.double()[:, None]) + shift.double()[:, None]
        assert got.x.dtype == y.dtype
        assert relative(got.x, x) <= bound
    if next_lora is not None:
        assert got.next_lora[1:] == next_lora[1:]
        assert (
            relative(got.next_lora.h, shrink_ref(got.z, next_lora.adapters, next_lora.perturbation)[1].double())
            <= bound
        )


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("r", "rank"), RANKS)
def test_residual_norm(device, r, rank, dtype, stored):
    """As the fused block asks for it, and at one row."""
    for t, n, gated, modulated, followed in (
        (17, 21, True, False, True),
        (5, 70, False, True, False),
        (1, 70, True, False, True),
    ):
        y, residual, gate, modulation = streams_of(n, t, dtype, device, gated=gated)
        low = target(n, r, rank, device, t=t, stored=stored)
        next_lora = target(n, r, rank, device, stored=stored, k=n)._replace(perturbation=low.perturbation)
        options = dict(
            gate=gate, low=low, modulation=modulation if modulated else None, next_lora=next_lora if followed else None
        )
        for op in (residual_norm, residual_norm_ref):
            got = op(y, residual, **options)
            assert_stream(got, y, residual, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [True, False])
def test_residual_norm_of_a_whole_product(device, dtype, gated):
    y, residual, gate, modulation = streams_of(70, 33, dtype, device, gated=gated)
    got = residual_norm(y, residual, gate=gate)
    assert_stream(got, y, residual, gate, None, None, None)
    next_lora = target(70, 2, 1, device, k=70)
    options = dict(gate=gate, low=None, modulation=None, next_lora=next_lora)
    assert_stream(residual_norm(y.mT.contiguous().mT, residual, **options), y, residual, **options)
    options |= dict(modulation=modulation, next_lora=None)
    assert_stream(residual_norm(y, residual.mT.contiguous().mT, **options), y, residual, **options)


def test_a_mean_far_from_zero_is_not_felt(device):
    y, residual, gate, modulation = streams_of(70, 5, torch.float32, device)
    low = target(70, 2, 1, device, t=5)
    for far in ((y, residual + 3000), (y + 3000, residual)):
        got = residual_norm(*far, gate=torch.ones_like(gate), low=low, modulation=modulation)
        normed = F.layer_norm(got.z.double(), (70,), eps=1e-6)
        x = normed * (1 + modulation.scale.double()[:, None]) + modulation.shift.double()[:, None]
        assert relative(got.x, x) <= 2e-4


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_alone_is_the_row_in_the_batch(device, every_row_alike, dtype, stored):
    if not uses_triton(device):
        pytest.skip("the references' sums are torch's")
    y, residual, gate, modulation = streams_of(21, 19, dtype, device)
    low = target(21, 3, 2, device, t=19, stored=stored)
    next_lora = target(21, 3, 2, device, stored=stored, k=21)._replace(perturbation=low.perturbation)
    whole = residual_norm(y, residual, gate=gate, low=low, modulation=modulation)
    followed = residual_norm(y, residual, gate=gate, low=low, next_lora=next_lora)
    normed = rms_norm(y, gate[0], 1e-5, low)
    for row in range(3):
        one, own = slice(row, row + 1), alone(low, row)
        reader = alone(next_lora, row)._replace(perturbation=own.perturbation)
        cut = modulation._replace(shift=modulation.shift[one], scale=modulation.scale[one])
        got = residual_norm(y[one], residual[one], gate=gate[one], low=own, modulation=cut)
        assert torch.equal(got.z, whole.z[one])
        assert torch.equal(got.x, whole.x[one])
        got = residual_norm(y[one], residual[one], gate=gate[one], low=own, next_lora=reader)
        assert torch.equal(got.next_lora.h, followed.next_lora.h[one])
        assert torch.equal(rms_norm(y[one], gate[0], 1e-5, own), normed[one])


@pytest.mark.parametrize("t", [0, 4])
def test_nothing_to_compute(device, t):
    y = torch.zeros(3 if t == 0 else 0, t, 8, device=device, dtype=torch.bfloat16)
    low = target(8, 2, 1, device, t=t)
    if t:
        low = LowRank(low.h[:0], low.adapters, low.perturbation._replace(members=low.perturbation.members[:0]))
    next_lora = LowRank(None, target(8, 2, 1, device, k=8).adapters, low.perturbation)
    assert residual_norm(y, y, low=low, modulation=Modulation(y.sum(1), y.sum(1))).x.shape == y.shape
    got = residual_norm(y, y, low=low, next_lora=next_lora)
    assert got.z.shape == rms_norm(y, y.new_ones(8), 1e-5, low).shape == y.shape
    assert got.next_lora.h.shape == (*y.shape[:2], 3)


def test_a_step_of_a_tensor(device):
    y, residual, gate, _ = streams_of(21, 3, torch.float32, device)
    low = target(21, 2, 1, device, t=3, stored=False)
    step = torch.full((1,), low.perturbation.step, dtype=torch.int64, device=device)
    same = low._replace(perturbation=low.perturbation._replace(step=step))
    assert torch.equal(residual_norm(y, residual, low=same).z, residual_norm(y, residual, low=low).z)
    assert torch.equal(rms_norm(y, gate[0], 1e-5, same), rms_norm(y, gate[0], 1e-5, low))


def of_noise(**changes):
    return lambda low: low._replace(perturbation=low.perturbation._replace(**changes))


def of_lora(name, change):
    return lambda low: low._replace(adapters=low.adapters._replace(**{name: change(getattr(low.adapters, name))}))


BAD_LOW = {
    "no h": (lambda low: low._replace(h=None), "low.h: expected what shrink or mix made, got None"),
    "h of half precision": (lambda low: low._replace(h=low.h.half()), r"low.h: expected float32 \[3, 5, 3\].* float16"),
    "h of another width": (lambda low: low._replace(h=low.h[..., 1:].contiguous()), r"low.h: expected .*\[3, 5, 2\]"),
    "h strided": (lambda low: low._replace(h=low.h.mT.contiguous().mT), r"low.h: expected .* contiguous.* strides"),
    "b of another width": (of_lora("b", lambda b: b[:, 1:]), r"low.adapters\.b: expected float32 \[21, 2\]"),
    "two targets": (of_lora("streams", lambda s: s.repeat(2, 1)), r"low.adapters.streams: expected int64 \[1, 4\]"),
    "members of int32": (of_noise(members=torch.zeros(3, dtype=torch.int32)), r"members: expected int64 \[3\]"),
    "rank of nought": (of_noise(rank=0), "rank: expected at least 1"),
    "factors of another batch": (lambda low: low._replace(factors=low.factors[1:]), "factors: expected float32"),
    "factors too few": (
        lambda low: low._replace(factors=low.factors[..., 512:].contiguous()),
        "factors: expected float32",
    ),
}


@pytest.mark.parametrize("bad", BAD_LOW)
@pytest.mark.parametrize("reference", [True, False])
def test_a_wrong_low_rank_part_is_refused_by_name(device, bad, reference):
    change, words = BAD_LOW[bad]
    y, residual, gate, _ = streams_of(21, 5, torch.float32, device)
    low = change(target(21, 2, 1, device, t=5))
    with pytest.raises(ValueError, match=words):
        (rms_norm_ref if reference else rms_norm)(y, gate[0], 1e-5, low)
    with pytest.raises(ValueError, match=words):
        (residual_norm_ref if reference else residual_norm)(y, residual, low=low)


@pytest.mark.parametrize("op", [rms_norm, rms_norm_ref])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(y=torch.zeros(5, 21)), r"y: expected float32, bfloat16 or float16 \[B, T, N\], got float32 \[5, 21\]"),
        (dict(y=torch.zeros(3, 5, 21, dtype=torch.float64)), "y: expected .* got float64"),
        (dict(weight=torch.zeros(20)), r"weight: expected .* \[21\] on .* got float32 \[20\]"),
        (dict(weight=torch.zeros(21, device="meta")), "weight: expected .* on meta"),
        (dict(eps=0.0), "eps: expected a positive number, got 0.0"),
        (dict(eps=float("nan")), "eps: expected a positive number, got nan"),
    ],
)
def test_a_wrong_operand_of_the_norm_is_refused_by_name(op, change, words):
    given = dict(y=torch.zeros(3, 5, 21), weight=torch.zeros(21), eps=1e-5) | change
    with pytest.raises(ValueError, match=words):
        op(**given)


@pytest.mark.parametrize("op", [residual_norm, residual_norm_ref])
@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("y", lambda y: y[0], r"y: expected float32, bfloat16 or float16 \[B, T, N\], got"),
        ("residual", lambda x: x[:1], r"residual: expected float32 \[3, 5, 21\] .* \[1, 5, 21\]"),
        ("residual", lambda x: x.half(), "residual: expected float32 .* got float16"),
        ("gate", lambda g: g[:, None], r"gate: expected float32 \[3, 21\].* got float32 \[3, 1, 21\]"),
        ("gate", lambda g: g.mT.contiguous().mT, r"gate: expected .* last stride 1.* strides"),
        ("modulation", lambda m: m._replace(shift=m.shift[1:]), r"shift: expected float32 \[3, 21\]"),
        ("modulation", lambda m: m._replace(scale=m.scale.half()), "scale: expected float32 .* got float16"),
        ("next_lora", of_lora("a", lambda a: a[:, 1:]), r"next_lora.adapters.a: expected float32 \[G r, 21\]"),
        ("next_lora", of_lora("streams", lambda s: s.repeat(2, 1)), "next_lora.adapters.streams: .* of one target"),
        (
            "next_lora",
            lambda next_lora: next_lora._replace(h=torch.zeros(3, 5, 3)),
            "next_lora.h: expected None, as it is made here",
        ),
        ("next_lora", lambda next_lora: next_lora._replace(factors=next_lora.factors[:, :, 1:]), "factors: expected"),
        ("next_lora", of_noise(rank=0), "rank: expected at least 1"),
        ("next_lora", of_noise(), "next_lora.perturbation: expected the same object as low's"),
    ],
)
def test_a_wrong_operand_of_the_stream_is_refused_by_name(op, name, change, words):
    y, residual, gate, modulation = streams_of(21, 5, torch.float32, "cpu")
    low = target(21, 2, 1, "cpu", t=5)
    next_lora = target(21, 2, 1, "cpu", k=21)._replace(perturbation=low.perturbation)
    given = dict(y=y, residual=residual, gate=gate, modulation=modulation, next_lora=next_lora)
    given[name] = change(given[name])
    given["next_lora" if name == "modulation" else "modulation"] = None
    with pytest.raises(ValueError, match=words):
        op(given.pop("y"), given.pop("residual"), low=low, **given)


@pytest.mark.parametrize("op", [residual_norm, residual_norm_ref])
def test_modulation_and_a_reader_are_not_both(op):
    y, _, _, modulation = streams_of(21, 5, torch.float32, "cpu")
    with pytest.raises(ValueError, match="modulation, next_lora: expected at most one of them, got both"):
        op(y, y, modulation=modulation, next_lora=target(21, 2, 1, "cpu", k=21))


@pytest.mark.parametrize("name", ["rms_norm", "residual_norm"])
def test_triton_is_what_the_interpreter_runs(monkeypatch, name):
    if not INTERPRET:
        pytest.skip("TRITON_INTERPRET is not set")
    monkeypatch.setattr(
        sys.modules[f"esengine.kernels.{name}"], f"{name}_ref", lambda *args, **kwargs: pytest.fail("it ran")
    )
    y, low = draw(3, 5, 21, device="cpu"), target(21, 2, 1, "cpu", t=5)
    if name == "rms_norm":
        rms_norm(y, y[0, 0], 1e-5, low)
    else:
        residual_norm(y, y, low=low)
