"""Stored factors: the numbers of the contract, and the same results with them as without."""

import pytest
import torch

from esengine.kernels import (
    Lora,
    MemberNoise,
    Modulation,
    factor_ref,
    fused_linear,
    linear_streams,
    low_rank_part,
    low_rank_part_ref,
    member_factors,
    member_factors_ref,
    padded_rank,
    shrink,
    stream_table,
    uses_triton,
)
from esengine.kernels.factors import factor_starts, factor_width

K, N, MEMBERS = 37, 21, (5, 4, 9, 5)


def draw(*shape, device, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


def operands(device, *, targets=2, r=3, rank=2):
    table = stream_table(tuple(linear_streams(f"layer{i}", direct=not r) for i in range(targets)), torch.device(device))
    a, b = (draw(targets * r, K, device=device), draw(targets * N, r, device=device)) if r else (None, None)
    noise = MemberNoise(torch.tensor(MEMBERS, device=device), (1 << 63) + 5, 4, 0.1, rank)
    return Lora(a, b, 1.5, table), noise


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("r", [0, 3, 200])
def test_numbers_are_the_contracts(device, r, rank):
    adapters, noise = operands(device, r=r, rank=rank)
    factors = member_factors(adapters, noise, k=K, n=N)
    assert factors.shape == (4, 2, factor_width(K, N, r, rank))
    kp = padded_rank(rank)
    for i, streams in enumerate(adapters.streams.tolist()):
        for stream, length, start in zip(streams, (K, r, r, N), (0, *factor_starts(K, r, rank)), strict=True):
            if length == 0:
                continue
            pairs = noise.members >> 1
            expected = factor_ref(
                seed=noise.seed, step=noise.step, stream=stream, pairs=pairs, length=length, rank=rank
            )
            got = factors[:, i, start : start + length * kp].view(4, length, kp)[..., :rank]
            torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)


def test_step_of_a_tensor(device):
    adapters, noise = operands(device)
    step = torch.full((1,), noise.step, dtype=torch.int64, device=device)
    same = member_factors(adapters, noise._replace(step=step), k=K, n=N)
    assert torch.equal(same, member_factors(adapters, noise, k=K, n=N))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("targets", "r", "rank"), [(1, 2, 1), (2, 3, 2), (3, 0, 1), (1, 16, 4)])
@pytest.mark.parametrize("t", [1, 5, 40])
def test_stored_factors_change_nothing(device, t, targets, r, rank, dtype):
    adapters, noise = operands(device, targets=targets, r=r, rank=rank)
    x, weight = draw(4, t, K, device=device, dtype=dtype), draw(targets * N, K, device=device, dtype=dtype) * K**-0.5
    factors = member_factors(adapters, noise, k=K, n=N)
    modulation = Modulation(draw(4, K, device=device, dtype=dtype), draw(4, K, device=device, dtype=dtype))
    for given in (None, modulation):
        (y, h), (y_stored, h_stored) = (shrink(x, adapters, noise, given, each) for each in (None, factors))
        assert torch.equal(y, y_stored)
        torch.testing.assert_close(h_stored, h, rtol=2e-5, atol=2e-5)
    options = dict(h=h, adapters=adapters, perturbation=noise)
    got, expected = (fused_linear(x, weight, factors=each, **options) for each in (factors, None))
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("r", "rank"), [(0, 1), (2, 1), (3, 2), (16, 4), (40, 1)])
@pytest.mark.parametrize("t", [1, 17])
@pytest.mark.parametrize("stored", [True, False])
def test_low_rank_part(device, t, r, rank, dtype, stored):
    adapters, noise = operands(device, targets=1, r=r, rank=rank)
    x, bias = draw(4, t, K, device=device, dtype=dtype), draw(N, device=device, dtype=dtype) if t > 1 else None
    factors = member_factors(adapters, noise, k=K, n=N) if stored else None
    got = low_rank_part(x, bias, adapters, noise, n=N, factors=factors)
    expected = low_rank_part_ref(x, bias, adapters, noise, n=N)
    assert got.dtype == dtype
    exact = low_rank_part_ref(x.float(), None if bias is None else bias.float(), adapters, noise, n=N)
    own = (expected.float() - exact).norm() / exact.norm()
    assert (got.float() - exact).norm() / exact.norm() <= 2 * own + 2e-6 + (2e-3 if dtype != torch.float32 else 0)


@pytest.mark.parametrize("op", [member_factors, member_factors_ref])
def test_members_elsewhere_are_refused(device, op):
    adapters, noise = operands(device)
    with pytest.raises(ValueError, match="members: expected int64"):
        op(adapters, noise._replace(members=noise.members.int()), k=K, n=N)


@pytest.mark.parametrize(
    "change",
    [lambda f: f[:, :1], lambda f: f.bfloat16(), lambda f: f[..., :-1], lambda f: f[:3], lambda f: f[..., :512]],
)
def test_factors_of_other_operands_are_refused(device, change):
    adapters, noise = operands(device)
    x, weight = draw(4, 5, K, device=device), draw(2 * N, K, device=device)
    factors = change(member_factors(adapters, noise, k=K, n=N))
    with pytest.raises(ValueError, match="factors: expected"):
        shrink(x, adapters, noise, factors=factors.contiguous())
    h = torch.zeros(4, 5, 2 * 5, device=device)
    with pytest.raises(ValueError, match="factors: expected"):
        fused_linear(x, weight, h=h, adapters=adapters, perturbation=noise, factors=factors.contiguous())
    with pytest.raises(ValueError, match="factors: expected adapters beside them"):
        shrink(x, None, None, Modulation(x[:, 0], x[:, 1]), factors)


def test_poisoned_places_are_written(device):
    if not uses_triton(device):
        pytest.skip("the kernel's")
    adapters, noise = operands(device)
    assert member_factors(adapters, noise, k=K, n=N).isfinite().all()
