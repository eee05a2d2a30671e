"""Noise contract v1: published vectors, frozen values, independence of everything but five integers, statistics."""

import math
import struct
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from esengine.kernels import (
    NoisePlan,
    factor,
    factor_ref,
    linear_streams,
    normals,
    normals_ref,
    padded_rank,
    pair_weights,
    philox_ref,
    signed_sigma,
    stream_id,
    uses_triton,
)
from esengine.kernels import noise as contract
from esengine.kernels.noise import INTERPRET

TRITON_ATOL = 2e-6
"""Of normals computed in float32 from normals computed in float64: 1.1e-6 was the most among 6 million, interpreted."""

# Random123, kat_vectors: philox 4x32 10, counter, key, result
PUBLISHED = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]

# (seed, step, stream, pair) and the first six normals
GOLDEN = [
    ((0, 0, 0, 0), "0x1.fb766cp-1 -0x1.d96d5cp-1 -0x1.3c373ep-1 -0x1.eda366p-2 -0x1.3aa6bap-3 0x1.7254ecp-3"),
    ((1, 7, 3755264035, 3), "0x1.d11638p+0 0x1.49df98p+0 -0x1.e45194p-3 0x1.5f6f7ep-1 0x1.ab6b44p-2 0x1.34c75p+0"),
    (
        ((1 << 63) + 12345, (1 << 32) - 1, 0xDEADBEEF, (1 << 32) - 1),
        "-0x1.69e418p-1 0x1.f73ae2p-1 -0x1.6733f6p+0 -0x1.bf0c2p+0 0x1.0d72eap+1 -0x1.0cee72p-3",
    ),
    (
        ((1 << 64) - 1, 1, 5, 1 << 31),
        "-0x1.778b9ep-2 0x1.7d1254p+0 0x1.19413cp+0 0x1.27fd02p+0 0x1.576480p-1 0x1.d90814p+0",
    ),
]
GOLDEN_FACTOR = """0x1.a1e3d8p-2 -0x1.45ef0ep-4 -0x1.e66aaap-1 -0x1.f90c74p-1 -0x1.382cf0p-1 0x1.217f7ap-1
                   0x1.42f6dap-3 0x1.33ac7ap+0 0x1.768f4ep-3"""


def scalar_philox(counter, key):
    """Philox4x32-10 in Python integers, from the paper's figure."""
    (l0, r0, l1, r1), (k0, k1) = counter, key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * l0, 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * l1, 1 << 32)
        l0, r0, l1, r1 = high1 ^ r0 ^ k0, low1, high0 ^ r1 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % (1 << 32), (k1 + 0xBB67AE85) % (1 << 32)
    return l0, r0, l1, r1


def scalar_normal(seed, step, stream, pair, e):
    """Element e of a row, straight from the design's contract, one number at a time."""

    def float32(value):
        return struct.unpack("f", struct.pack("f", value))[0]

    words = scalar_philox((e >> 2, pair, stream, step), (seed % (1 << 32), seed >> 32))
    u = [float32((word >> 8) + 0.5) * 2.0**-24 for word in words]
    lane = e & 3
    radius, angle = math.sqrt(abs(-2 * math.log(u[lane & 2]))), 2 * math.pi * u[(lane & 2) + 1]
    return float32(radius * (math.sin(angle) if lane & 1 else math.cos(angle)))


def row(seed, step, stream, pair, count, device="cpu"):
    return normals(
        seed=seed, step=step, streams=torch.tensor([stream]), pairs=torch.tensor([pair]), count=count, device=device
    )[0].cpu()


def assert_normals(got, expected, device):
    """Bit for bit where torch computes them, to the rounding of float32 functions where Triton does."""
    assert got.dtype == torch.float32
    if uses_triton(device):
        torch.testing.assert_close(got, expected, rtol=0, atol=TRITON_ATOL)
    else:
        assert torch.equal(got, expected)


def hexes(text):
    return torch.tensor([float.fromhex(x) for x in text.split()], dtype=torch.float32)


@pytest.mark.parametrize(("counter", "key", "expected"), PUBLISHED)
def test_published_philox_vectors(counter, key, expected):
    counter, key, expected = ([int(word, 16) for word in text.split()] for text in (counter, key, expected))
    assert [int(word) for word in philox_ref([torch.tensor(word) for word in counter], tuple(key))] == expected
    assert list(scalar_philox(counter, key)) == expected


@pytest.mark.skipif(not INTERPRET, reason="tl.philox on the CPU needs TRITON_INTERPRET=1")
@pytest.mark.parametrize(("counter", "key", "expected"), PUBLISHED)
def test_tritons_philox_gives_the_published_vectors(counter, key, expected):
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(out_ptr, seed: tl.int64, c0: tl.int64, c1: tl.int64, c2: tl.int64, c3: tl.int64):
        zero = tl.zeros((1,), tl.int64)
        words = (zero + c0).to(tl.uint32), (zero + c1).to(tl.uint32), (zero + c2).to(tl.uint32)
        x0, x1, x2, x3 = tl.philox(seed, *words, (zero + c3).to(tl.uint32))
        at = tl.arange(0, 1)
        tl.store(out_ptr + at, x0.to(tl.int64))
        tl.store(out_ptr + 1 + at, x1.to(tl.int64))
        tl.store(out_ptr + 2 + at, x2.to(tl.int64))
        tl.store(out_ptr + 3 + at, x3.to(tl.int64))

    counter, key, expected = ([int(word, 16) for word in text.split()] for text in (counter, key, expected))
    out = torch.empty(4, dtype=torch.int64)
    seed = key[0] | key[1] << 32
    kernel[(1,)](out, seed - (1 << 64) if seed >> 63 else seed, *counter)
    assert [value & 0xFFFFFFFF for value in out.tolist()] == expected


@pytest.mark.parametrize(("where", "expected"), GOLDEN)
def test_golden_normals(device, where, expected):
    expected = hexes(expected)
    assert_normals(row(*where, 6, device), expected, device)
    assert [scalar_normal(*where, e) for e in range(6)] == expected.tolist()


@pytest.mark.parametrize("step", [0, 7, (1 << 32) - 1])
def test_the_step_in_memory_is_the_step(device, step):
    keys = dict(seed=5, streams=torch.tensor([1, 2]), pairs=torch.tensor([3, 4]), count=9, device=device)
    assert torch.equal(normals(**keys, step=torch.tensor([step], device=device)), normals(**keys, step=step))


def test_golden_factor_of_rank_3_skips_the_padding(device):
    name = "transformer_blocks.0.attn1.to_q.lora_B.U"
    where = dict(seed=(1 << 63) + 1, step=2, stream=stream_id(name))
    got = factor(**where, pairs=torch.tensor([9], device=device), length=3, rank=3)
    assert got.shape == (1, 3, 3)
    assert_normals(got[0].cpu().flatten(), hexes(GOLDEN_FACTOR), device)
    by_hand = [scalar_normal(*where.values(), 9, 4 * line + column) for line in range(3) for column in range(3)]
    assert hexes(GOLDEN_FACTOR).tolist() == by_hand


def test_golden_stream_ids():
    assert stream_id("a") == 1431053258
    assert stream_id("transformer_blocks.0.attn1.to_q.lora_A.V") == 566890634
    assert linear_streams("x") == (1768743134, 1963478620, 3482230632, 3867281172)
    assert linear_streams("x", direct=True) == (1164468097, 0, 0, 221670032)
    assert linear_streams("x").a_v == stream_id("x.lora_A.V")
    assert linear_streams("x").b_u == stream_id("x.lora_B.U")


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", [0, 1 << 40, (1 << 63) + 7])
def test_against_the_contract_one_number_at_a_time(device, rank, seed):
    step, stream, pairs, length, kp = 3, stream_id("some.layer.lora_A.V"), [0, 1, 1 << 20, (1 << 32) - 1], 7, 1
    while kp < rank:
        kp *= 2
    assert padded_rank(rank) == kp
    got = factor(seed=seed, step=step, stream=stream, pairs=torch.tensor(pairs, device=device), length=7, rank=rank)
    expected = [
        [[scalar_normal(seed, step, stream, pair, line * kp + j) for j in range(rank)] for line in range(length)]
        for pair in pairs
    ]
    assert_normals(got.cpu(), torch.tensor(expected, dtype=torch.float32), device)


def test_every_integer_of_the_contract_changes_the_numbers(device):
    where = [5, 6, 7, 8]
    base = row(*where, 64, device)
    for i, top in enumerate((64, 32, 32, 32)):
        for bit in (0, 15, 31, top - 1):
            other = list(where)
            other[i] ^= 1 << bit
            assert (row(*other, 64, device) == base).sum() <= 1


def test_an_element_does_not_depend_on_its_neighbours(device):
    """Bit for bit: other counts, batch mates, order and slices give the same element."""
    streams, pairs = torch.tensor([11, 12, 11, 4294967295, 12]), torch.tensor([4, 4, 0, 4294967295, 9])
    whole = normals(seed=3, step=2, streams=streams, pairs=pairs, count=1500, device=device)
    for count in (1, 2, 3, 4, 5, 7, 64, 1023, 1025):
        assert torch.equal(
            normals(seed=3, step=2, streams=streams, pairs=pairs, count=count, device=device), whole[:, :count]
        )
    order = torch.tensor([3, 0, 4, 2, 1, 0])
    mixed = normals(seed=3, step=2, streams=streams[order], pairs=pairs[order], count=1500, device=device)
    assert torch.equal(mixed, whole[order])
    for i in range(5):
        alone = normals(seed=3, step=2, streams=streams[i : i + 1], pairs=pairs[i : i + 1], count=1500, device=device)
        assert torch.equal(alone[0], whole[i])


def test_bits_hold_over_many_elements():
    """A million elements in one row, in rows of odd lengths and a few at a time: vector and scalar code agree."""
    ids = dict(streams=torch.tensor([9]), pairs=torch.tensor([1]))
    whole = normals_ref(seed=1, step=0, **ids, count=1 << 20)[0]
    for count in (99_991, 524_287):
        assert torch.equal(normals_ref(seed=1, step=0, **ids, count=count)[0], whole[:count])
    many = dict(streams=torch.arange(3000), pairs=torch.arange(3000))
    rows = normals_ref(seed=1, step=0, **many, count=5)
    for i in range(0, 3000, 30):
        one = dict(streams=many["streams"][i : i + 1], pairs=many["pairs"][i : i + 1])
        assert torch.equal(normals_ref(seed=1, step=0, **one, count=5)[0], rows[i])


def test_non_contiguous_pairs(device):
    pairs = torch.arange(8, device=device)
    settings = dict(seed=1, step=0, stream=3, length=5, rank=2)
    whole = factor(pairs=pairs, **settings)
    assert torch.equal(factor(pairs=pairs[::2], **settings), whole[::2])
    assert torch.equal(factor(pairs=pairs[1::3], **settings), whole[1::3])
    assert torch.equal(factor(pairs=pairs[2].expand(3), **settings), whole[[2, 2, 2]])


def test_nothing_asked_nothing_given(device):
    none = torch.zeros(0, dtype=torch.int64)
    assert normals(seed=0, step=0, streams=none, pairs=none, count=4, device=device).shape == (0, 4)
    one = torch.zeros(1, dtype=torch.int64)
    assert normals(seed=0, step=0, streams=one, pairs=one, count=0, device=device).shape == (1, 0)


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_a_plan_gives_the_factors_of_each_stream(rank):
    shapes = [(stream_id("a"), 5), (stream_id("b"), 1), (7, 33), (0xFFFFFFFF, 2)]
    plan, pairs = NoisePlan(shapes, rank), torch.tensor([5, 0, 1 << 31])
    block = plan.block(seed=1 << 63, step=4, pairs=pairs)
    assert [tuple(noise.shape) for noise in block] == [(3, length, rank) for _, length in shapes]
    for noise, (stream, length) in zip(block, shapes, strict=True):
        settings = dict(seed=1 << 63, step=4, stream=stream, length=length, rank=rank)
        assert torch.equal(noise, factor_ref(pairs=pairs, **settings))
        alone = NoisePlan([(stream, length)], rank).block(seed=1 << 63, step=4, pairs=pairs[2:])
        assert torch.equal(alone[0], noise[2:])


def test_antithetic_members_share_a_pair_with_opposite_signs():
    members = torch.tensor([0, 1, 2, 3, (1 << 33) - 2, (1 << 33) - 1])
    c = signed_sigma(members, 0.5, 4)
    assert c.dtype == torch.float32
    assert c.tolist() == [0.25, -0.25] * 3
    assert pair_weights(torch.tensor([1.0, 3.0, 0.5, -0.5])).tolist() == [-2.0, 1.0]


@pytest.mark.parametrize(
    ("seed", "step", "message"),
    [
        (-1, 0, r"seed: expected an integer in \[0, 2\^64\), got -1"),
        (1 << 64, 0, r"seed: expected an integer in \[0, 2\^64\), got 18446744073709551616"),
        (0, -1, r"step: expected an integer in \[0, 2\^32\), got -1"),
        (0, 1 << 32, r"step: expected an integer in \[0, 2\^32\), got 4294967296"),
    ],
)
def test_seed_and_step_out_of_range(device, seed, step, message):
    one = torch.zeros(1, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=message):
        normals(seed=seed, step=step, streams=one, pairs=one, count=1, device=device)
    with pytest.raises(ValueError, match=message):
        factor_ref(seed=seed, step=step, stream=0, pairs=one, length=1, rank=1)
    with pytest.raises(ValueError, match=message):
        NoisePlan([(0, 1)], 1).block(seed=seed, step=step, pairs=one.cpu())


def test_triton_agrees_with_the_reference(device):
    if not uses_triton(device):
        pytest.skip("torch is what runs here")
    n = 1 << 15
    ids = dict(streams=torch.tensor([0, 1, stream_id("x")]), pairs=torch.tensor([0, 77, 4294967295]), count=n)
    for seed in (0, (1 << 64) - 2):
        got = normals(seed=seed, step=9, **ids, device=device).cpu()
        torch.testing.assert_close(got, normals_ref(seed=seed, step=9, **ids), rtol=0, atol=TRITON_ATOL)


def moments(x):
    x = x.double()
    centred = x - x.mean()
    var = centred.square().mean()
    return float(x.mean()), float(var), float(centred.pow(3).mean() / var**1.5), float(centred.pow(4).mean() / var**2)


def test_the_numbers_are_standard_normal():
    """Four-sigma bounds of a normal sample: mean, variance, skewness, kurtosis; Kolmogorov-Smirnov at p = 1e-4."""
    n = 1 << 19
    x = normals_ref(seed=12, step=1, streams=torch.tensor([stream_id("a")]), pairs=torch.tensor([0]), count=n)[0]
    mean, var, skew, kurtosis = moments(x)
    assert abs(mean) < 4 * math.sqrt(1 / n)
    assert abs(var - 1) < 4 * math.sqrt(2 / n)
    assert abs(skew) < 4 * math.sqrt(6 / n)
    assert abs(kurtosis - 3) < 4 * math.sqrt(24 / n)
    cdf = torch.special.ndtr(x.double().sort().values)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = max(float((cdf - steps[:-1]).max()), float((steps[1:] - cdf).max()))
    assert distance * math.sqrt(n) < 2.23
    assert 4.4 < float(x.abs().max()) < 5.9  # sqrt(2 ln 2^25) is the end of the range
    for lane in range(4):
        mean, var, _, _ = moments(x[lane::4])
        assert abs(mean) < 4 * math.sqrt(4 / n)
        assert abs(var - 1) < 4 * math.sqrt(8 / n)


def test_rows_are_uncorrelated():
    """Rows that differ in one integer alone, next to it or far: no correlation beyond 4.5 sigma, over 780 pairs."""
    n = 1 << 13
    rows = [row(seed, 0, 1, 0, n) for seed in (0, 1, 2, 1 << 32, 1 << 63)]
    rows += [row(0, step, 1, 0, n) for step in (1, 2, 3, 1 << 16)]
    rows += [row(0, 0, stream, 0, n) for stream in (0, 2, 3, *linear_streams("a"), *linear_streams("b"))]
    rows += [row(0, 0, 1, pair, n) for pair in range(1, 21)]
    x = torch.stack(rows).double()
    x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
    correlation = (x @ x.T / n).fill_diagonal_(0)
    assert float(correlation.abs().max()) * math.sqrt(n) < 4.5
    squares = x.square() - 1
    correlation = (squares @ squares.T / (2 * n)).fill_diagonal_(0)
    assert float(correlation.abs().max()) * math.sqrt(n) < 5.5  # heavier tails than a normal's


def test_neighbouring_elements_are_uncorrelated():
    n = 1 << 17
    x = row(4, 4, 4, 4, n).double()
    for lag in (1, 2, 3, 4, 8, 64, 1024):
        assert abs(float((x[lag:] * x[:-lag]).mean())) * math.sqrt(n - lag) < 4
        assert abs(float((x[lag:].square() - 1).mul(x[:-lag].square() - 1).mean() / 2)) * math.sqrt(n - lag) < 4.5


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (700, 300), (2, 140_000)])
def test_what_a_cpu_fills_in_place_has_the_bits_of_the_reference(shape):
    """Some shapes take several blocks, in one direction or the other."""
    quads, streams = torch.arange(shape[1]), torch.full((shape[1],), 0xFFFFFFFF)
    pairs = torch.arange(shape[0])[:, None] + (1 << 32) - shape[0]
    seed, step = (1 << 64) - 3, (1 << 32) - 1
    got = contract.quads_ref(seed=seed, step=step, quads=quads, streams=streams, pairs=pairs)
    expected = contract._quads(quads, pairs, streams, torch.tensor(step), contract.key_words(seed, step))
    assert torch.equal(got.view(torch.int32), expected.view(torch.int32))


def test_a_plan_keeps_what_is_small_and_gives_the_same_bits(monkeypatch):
    plan, made, quads_ref = NoisePlan([(7, 5), (8, 3)], 2), [], contract.quads_ref
    monkeypatch.setattr(contract, "quads_ref", lambda **counter: made.append(1) or quads_ref(**counter))

    def made_anew(pairs, seed=0, step=1):
        """How many times the plan made numbers, which must be those of another plan."""
        made.clear()
        got = plan.block(seed=seed, step=step, pairs=pairs)
        count = len(made)
        expected = NoisePlan(plan.shapes, plan.rank).block(seed=seed, step=step, pairs=pairs)
        assert all(map(torch.equal, got, expected))
        return count

    assert made_anew(torch.arange(3, 9)) == 1
    for kept in (torch.arange(3, 9), torch.arange(4, 7), torch.arange(3, 4), torch.arange(8, 9)):
        assert made_anew(kept) == 0
    for others in (torch.tensor([4, 6, 5]), torch.tensor([3, 5]), torch.tensor([4, 4]), torch.arange(4, 10)):
        assert made_anew(others) == 1
    assert made_anew(torch.arange(4, 10), step=2) == made_anew(torch.arange(4, 10), step=2, seed=1) == 1
    made_anew(torch.empty(0, dtype=torch.int64))
    monkeypatch.setattr(contract, "KEPT_BYTES", 0)
    assert made_anew(torch.arange(3)) == made_anew(torch.arange(3)) == 1


def test_memory_is_taken_again_only_when_nobody_holds_it(monkeypatch):
    """Noise that somebody still looks at is not overwritten by the next."""
    plan = NoisePlan([(7, 50), (8, 30)], 2)
    held = plan.block(seed=0, step=1, pairs=torch.arange(3))[1]
    before, address = held.clone(), held.untyped_storage().data_ptr()
    other = plan.block(seed=0, step=2, pairs=torch.arange(3))[1]
    assert torch.equal(held, before)
    assert other.untyped_storage().data_ptr() != address
    address = other.untyped_storage().data_ptr()
    del other
    again = plan.block(seed=0, step=1, pairs=torch.arange(2))
    assert again[0].untyped_storage().data_ptr() == address
    assert torch.equal(again[1], before[:2])
    monkeypatch.setattr(contract, "KEPT_BYTES", 0)
    del again
    plan.block(seed=0, step=3, pairs=torch.arange(3))
    assert not plan._memory._last.size


def test_a_stack_is_the_factors_of_one_length():
    plan, pairs = NoisePlan([(1, 5), (2, 5), (3, 3), (4, 3)], 3), torch.tensor([2, 7])
    block, stack = (getattr(plan, name)(seed=3, step=4, pairs=pairs) for name in ("block", "stacks"))
    for first in (0, 2):
        assert torch.equal(stack(first, 2), torch.stack(block[first : first + 2], 1))


@pytest.mark.parametrize(("pairs", "count"), [(64, 40_000), (7, 70_000), (40_000, 3), (3, 140_001), (1, 1), (0, 5)])
def test_any_shape_is_filled_in_blocks_as_in_one_go(pairs, count):
    """Rows and columns that do not divide the buffers: against the formula, which takes all counters at once."""
    ids = torch.arange(pairs) * 7919 + 3
    keys = dict(seed=(1 << 63) + 11, step=4)
    got = contract.normals_ref(**keys, streams=ids + 1, pairs=ids, count=count)
    quads = torch.arange((count + 3) // 4)
    words = quads, ids[:, None], ids[:, None] + 1, torch.tensor(4)
    expected = contract._quads(*words, contract.key_words(*keys.values())).flatten(1)[:, :count]
    assert torch.equal(got.view(torch.int32), expected.view(torch.int32))


def test_threads_do_not_share_their_memory():
    plan = contract.NoisePlan([(3, 500), (4, 700)], rank=2)
    pairs = torch.arange(16)

    def made(step):
        return [each.clone() for each in plan.block(seed=1, step=step, pairs=pairs)]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(made, [step % 3 for step in range(60)]))
    for step, got in enumerate(found):
        fresh = contract.NoisePlan([(3, 500), (4, 700)], rank=2).block(seed=1, step=step % 3, pairs=pairs)
        assert all(torch.equal(a, b) for a, b in zip(got, fresh, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(streams=torch.tensor([1])), r"streams: expected int64 \[3\]"),
        (dict(pairs=torch.zeros(3)), r"pairs: expected int64 \[3\]"),
        (dict(count=-1), "count: expected at least 0"),
    ],
)
def test_ids_that_do_not_fit_are_named(change, message):
    keys = dict(seed=0, step=0, streams=torch.arange(3), pairs=torch.arange(3), count=5)
    for op in (contract.normals, contract.normals_ref):
        with pytest.raises(ValueError, match=message):
            op(**keys | change)


@pytest.mark.parametrize("rank", [0, -1, 1.5])
def test_ranks_that_are_none_are_refused(rank):
    with pytest.raises(ValueError, match=r"rank: expected (at least 1|an integer), got"):
        contract.factor(seed=0, step=0, stream=1, pairs=torch.arange(2), length=3, rank=rank)
