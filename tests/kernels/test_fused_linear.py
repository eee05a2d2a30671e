"""Shrink and the fused GEMM: stacked targets, modulation and every epilogue against the reference."""

import pytest
import torch
import torch.nn.functional as F

from esengine.kernels import (
    Adapters,
    Modulation,
    Perturbation,
    fused_linear,
    fused_linear_ref,
    linear_streams,
    population_linear_ref,
    shrink,
    shrink_ref,
    stream_table,
)
from esengine.kernels.noise import INTERPRET

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Relative error of one rounding to nearest of a norm, doubled; fp32: sums in another order."""

pytestmark = pytest.mark.skipif(
    not (INTERPRET or torch.cuda.is_available()), reason="Triton kernels need TRITON_INTERPRET=1 or a GPU"
)


@pytest.fixture
def device():
    return "cpu" if INTERPRET else "cuda"


def draw(*shape, seed=0, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(device, dtype)


def case(*, batch=3, t=5, k=33, n=21, targets=3, r=2, rank=1, dtype=torch.float32, device="cpu"):
    """x, W, bias, adapters and perturbation of `targets` stacked linears."""
    names = tuple(linear_streams(f"layer{i}", direct=not r) for i in range(targets))
    a = draw(targets * r, k, seed=1, device=device) / k**0.5 if r else None
    b = draw(targets * n, r, seed=2, device=device) if r else None
    adapters = Adapters(a, b, stream_table(names, torch.device(device)), 1.5 if r else 1.0)
    members = torch.tensor([7, 2, 2, 0, 3][:batch], device=device)
    perturbation = Perturbation(members, seed=(1 << 63) + 5, step=4, sigma=0.1, rank=rank)
    weight = draw(targets * n, k, seed=3, dtype=dtype, device=device) / k**0.5
    x, bias = draw(batch, t, k, seed=4, dtype=dtype, device=device), draw(targets * n, dtype=dtype, device=device)
    return x, weight, bias, adapters, perturbation, names


def assert_close(got, expected, dtype=torch.float32):
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    assert got.isfinite().all()
    error = (got.double() - expected.double()).norm() / expected.double().norm()
    assert error <= ROUNDING[dtype]


@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize("r", [0, 2, 8])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("t", [1, 17])
def test_shrink_of_stacked_targets(device, targets, r, rank, t):
    x, _, _, adapters, perturbation, _ = case(targets=targets, r=r, rank=rank, t=t, k=37, device=device)
    same, h = shrink(x, adapters, perturbation)
    assert same is x
    assert_close(h, shrink_ref(x, adapters, perturbation)[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t", [1, 16, 35])
@pytest.mark.parametrize("targets", [0, 3])
def test_modulated(device, dtype, t, targets):
    x, _, _, adapters, perturbation, _ = case(t=t, k=70, dtype=dtype, device=device)
    x = 3 * x + 50  # a mean that a one-pass variance would drown in
    table = draw(3, 6, 70, dtype=dtype, device=device)
    modulation = Modulation(table[:, 1], table[:, 4])
    adapters, perturbation = (adapters, perturbation) if targets else (None, None)
    got, h = shrink(x, adapters, perturbation, modulation)
    expected, h_expected = shrink_ref(x, adapters, perturbation, modulation)
    # fp32 of values near 50 leaves 2^-18 of a unit deviation
    error = (got.double() - expected.double()).norm() / expected.double().norm()
    assert error <= max(ROUNDING[dtype], 2.0**-16)
    if targets:
        own = shrink_ref(got, adapters, perturbation)[1]
        assert_close(h, own, dtype if INTERPRET else torch.float32)  # the interpreter keeps x' in fp32 for the product
        assert (h - h_expected).norm() <= max(ROUNDING[dtype], 2.0**-15) * h_expected.norm()
    else:
        assert h is None


def test_modulated_by_torch(device):
    """The reference itself, against torch's own modules."""
    x, *_ = case(k=70, device=device)
    shift, scale = draw(3, 70, device=device), draw(3, 70, seed=9, device=device)
    expected = F.layer_norm(x, (70,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    assert_close(shrink_ref(x, None, None, Modulation(shift, scale))[0], expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("targets", [1, 2, 3])
@pytest.mark.parametrize(("t", "n"), [(1, 21), (17, 64), (40, 70)])
def test_stacked_targets(device, dtype, targets, t, n):
    x, weight, bias, adapters, perturbation, names = case(targets=targets, t=t, n=n, dtype=dtype, device=device)
    h = shrink(x, adapters, perturbation)[1]
    y = fused_linear(x, weight, bias, h=h, adapters=adapters, perturbation=perturbation)
    assert_close(y, fused_linear_ref(x, weight, bias, h=h, adapters=adapters, perturbation=perturbation), dtype)
    for i, streams in enumerate(names):
        rows, low = slice(i * n, (i + 1) * n), slice(2 * i, 2 * i + 2)
        alone = population_linear_ref(
            x, weight[rows], bias[rows], adapters.a[low], adapters.b[rows], members=perturbation.members,
            streams=streams, seed=perturbation.seed, step=4, sigma=0.1, rank=1, scale=1.5,
        )  # fmt: skip
        assert_close(y[..., rows].contiguous(), alone, dtype)


@pytest.mark.parametrize(("targets", "r", "rank"), [(3, 24, 1), (1, 70, 2), (1, 128, 1)])
def test_large_ranks(device, targets, r, rank):
    """More low-rank columns than one product takes."""
    x, weight, bias, adapters, perturbation, _ = case(
        batch=2, targets=targets, r=r, rank=rank, t=17, k=20, device=device
    )
    h = shrink(x, adapters, perturbation)[1]
    assert_close(h, shrink_ref(x, adapters, perturbation)[1])
    settings = dict(h=h, adapters=adapters, perturbation=perturbation)
    assert_close(fused_linear(x, weight, bias, **settings), fused_linear_ref(x, weight, bias, **settings))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("expand", [False, True])
def test_epilogues(device, dtype, silu, gated, residual, expand):
    x, weight, bias, adapters, perturbation, _ = case(targets=1, t=17, n=70, dtype=dtype, device=device)
    table = draw(3, 6, 70, dtype=dtype, device=device)
    options = dict(silu=silu, gate=table[:, 2] if gated else None)
    options["residual"] = draw(3, 17, 70, seed=5, dtype=dtype, device=device) if residual else None
    if expand:
        h = shrink(x, adapters, perturbation)[1]
        options |= dict(h=h, adapters=adapters, perturbation=perturbation)
    assert_close(fused_linear(x, weight, bias, **options), fused_linear_ref(x, weight, bias, **options), dtype)


def test_strides(device):
    x, weight, bias, adapters, perturbation, _ = case(t=6, k=40, device=device)
    wide = torch.cat((x, x), 2).transpose(0, 1).contiguous().transpose(0, 1)[..., :40]
    modulation = Modulation(draw(3, 40, device=device), draw(3, 40, seed=9, device=device))
    strided, dense = (shrink(rows, adapters, perturbation, modulation) for rows in (wide, x))
    assert torch.equal(strided[0], dense[0])
    assert torch.equal(strided[1], dense[1])
    assert torch.equal(fused_linear(wide, weight, bias), fused_linear(x, weight, bias))


def test_a_row_does_not_depend_on_its_batch_mates(device):
    x, weight, bias, adapters, perturbation, _ = case(batch=5, t=17, device=device)
    modulation = Modulation(draw(5, 33, device=device), draw(5, 33, seed=9, device=device))

    def run(rows):
        here = perturbation._replace(members=perturbation.members[rows].contiguous())
        shifted, h = shrink(x[rows], adapters, here, Modulation(modulation.shift[rows], modulation.scale[rows]))
        return fused_linear(shifted, weight, bias, h=h, adapters=adapters, perturbation=here, silu=True)

    every = run(slice(None))
    for row in range(5):
        assert torch.equal(run(slice(row, row + 1))[0], every[row])


def test_nothing_to_compute(device):
    x, weight, bias, adapters, perturbation, _ = case(device=device)
    none = perturbation._replace(members=perturbation.members[:0])
    modulation = Modulation(x[:0, 0], x[:0, 0])
    shifted, h = shrink(x[:0], adapters, none, modulation)
    assert shifted.shape == (0, 5, 33)
    assert h.shape == (0, 5, 9)
    assert fused_linear(shifted, weight, bias, h=h, adapters=adapters, perturbation=none).shape == (0, 5, 63)
    shifted, h = shrink(x[:, :0], None, None, Modulation(x[:, 0], x[:, 0]))
    assert shifted.shape == (3, 0, 33)
    assert h is None
