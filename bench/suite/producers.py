"""The perturbed linear as it runs inside the fused block: what makes its x leaves what its low-rank columns need.

x, shares = linear_attention(q, k, v, then=linear)          h = mix(shares)      before to_out
x, shares = to_out(y, residual, gate, then=linear)          h = mix(shares)      before the next attention's to_q
x, h      = shrink(LayerNorm(z) (1 + scale) + shift)                             before q|k|v
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import record
import torch
import torch.nn.functional as F

from esengine.kernels import Lora, MemberNoise, Modulation
from suite.checks import bounded, full_precision, worst_error
from suite.clock import interleaved
from suite.context import Context
from suite.ops import FP32_BOUND, REFERENCE, K, Ops, R, Sizes, adapted, drawn, leaves_shares, ops, sizes_of


class Producer(NamedTuple):
    """An op that makes x, on operands of its own.

    Attributes:
        without: x [B, T, K] for a plain linear.
        leaving: x, and for a perturbed one its h, or the shares of it.
        shares: whether `mix` has to make h of them.
    """

    without: Callable[[Ops], torch.Tensor]
    leaving: Callable[[Ops], tuple[torch.Tensor, torch.Tensor]]
    shares: bool


def attention(sizes: Sizes, draw: Callable, members: int, t: int, then: Lora, keys: MemberNoise) -> Producer:
    w = sizes.width
    qkv = draw(members, t, 3 * w).split(w, dim=-1)
    options = dict(heads=sizes.heads, norm_q=draw(w), norm_k=draw(w))
    return Producer(
        lambda op: op.attention(*qkv, **options),
        lambda op: op.attention(*qkv, then=then, perturbation=keys, **options),
        shares=True,
    )


def to_out(sizes: Sizes, draw: Callable, members: int, t: int, then: Lora, keys: MemberNoise) -> Producer:
    w = sizes.width
    x, weight, bias = draw(members, t, w), draw(w, w) * w**-0.5, draw(w)
    own, _ = adapted(draw, members, 1, w, w)
    options = dict(h=draw(members, t, R + K, to=torch.float32), adapters=own, perturbation=keys)
    options |= dict(residual=draw(members, t, w), gate=draw(members, 6, w)[:, 2])
    return Producer(
        lambda op: op.linear(x, weight, bias, **options),
        lambda op: op.linear(x, weight, bias, then=then, **options),
        shares=True,
    )


def modulation(sizes: Sizes, draw: Callable, members: int, t: int, then: Lora, keys: MemberNoise) -> Producer:
    x, table = draw(members, t, sizes.width), draw(members, 6, sizes.width)
    given = Modulation(table[:, 0], table[:, 1])
    return Producer(
        lambda op: op.shrink(x, None, None, given)[0],
        lambda op: op.shrink(x, then, keys, given, op.factors(then, keys, k=sizes.width, n=sizes.width)),
        shares=False,
    )


PRODUCERS = {"behind linear_attention": attention, "behind to_out": to_out, "behind the modulation": modulation}


def of(context: Context, n_in: int, n_out: int) -> list[str]:
    """Names of those that a block has before a linear of this shape; none where the linear has a pass of its own."""
    width = sizes_of(context.scale.name).width
    if (n_in, n_out) == (width, 3 * width):
        return ["behind the modulation"]
    return ["behind linear_attention", "behind to_out"] * (n_in == n_out == width and leaves_shares(context.dtype))


def case(context: Context, producer: str, n_in: int, n_out: int, tokens: int) -> dict[str, Any]:
    """One linear behind one producer; 3 K columns are the three stacked targets q|k|v.

    Returns:
        `check` of the whole chain; `seconds` of plain GEMM, linear, mix, producer with and without, and of `in_block`,
        their sum round by round: linear + mix + with - without; `ratio` of its throughput over the plain GEMM.
    """
    sizes, device, dtype = sizes_of(context.scale.name), context.device, context.dtype
    op, targets = ops(device), 3 if n_out == 3 * n_in else 1
    draw = drawn(device, dtype)
    weight, bias = draw(n_out, n_in) * n_in**-0.5, draw(n_out) if targets == 1 else None

    def built(members: int) -> tuple[Producer, Lora, MemberNoise]:
        draw = drawn(device, dtype)
        then, keys = adapted(draw, members, targets, n_in, n_out // targets)
        return PRODUCERS[producer](sizes, draw, members, tokens, then, keys), then, keys

    def produced(made: Producer, then: Lora, keys: MemberNoise) -> tuple[torch.Tensor, ...]:
        x, left = made.leaving(op)
        return x, left, op.mix(left, then, keys) if made.shares else left

    def stored(made: Producer, then: Lora, keys: MemberNoise) -> torch.Tensor | None:
        """As in a block, which stores factors where there is a shrink of their own."""
        return None if made.shares else op.factors(then, keys, k=n_in, n=n_out // targets)

    few, then, keys = built(3)
    x, _, h = produced(few, then, keys)
    with full_precision():
        floats = x.float(), weight.float(), None if bias is None else bias.float()
        plain = F.linear(*(None if t is None else t.double() for t in floats))
        low = REFERENCE.shrink(floats[0], then, keys)[1]
        expected = REFERENCE.linear(*floats, h=low, adapters=then, perturbation=keys)
    bound = max(2 * worst_error(F.linear(x, weight, bias), plain), FP32_BOUND if dtype == torch.float32 else 0.0)
    got = op.linear(x, weight, bias, h=h, adapters=then, perturbation=keys, factors=stored(few, then, keys))
    check = bounded(producer, worst_error(got, expected), bound, perturbation=worst_error(plain, expected))

    made, then, keys = built(context.scale.members)
    (x, left, h), factors = produced(made, then, keys), stored(made, then, keys)
    variants = {
        "plain": lambda: F.linear(x, weight, bias),
        "linear": lambda: op.linear(x, weight, bias, h=h, adapters=then, perturbation=keys, factors=factors),
        "with": lambda: made.leaving(op),
        "without": lambda: made.without(op),
    }
    if made.shares:
        variants["mix"] = lambda: op.mix(left, then, keys)
    seconds = interleaved(variants, context.scale.rounds[0], device=device, cold=True)
    signs = {"linear": 1, "mix": 1, "with": 1, "without": -1}
    rounds = zip(*([signs[n] * s for s in seconds[n]["samples"]] for n in variants if n != "plain"), strict=True)
    seconds["in_block"] = record.summary([sum(taken) for taken in rounds])
    return {"check": check, "seconds": seconds, "ratio": record.ratio(seconds["plain"], seconds["in_block"])}
