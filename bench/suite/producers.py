"""The perturbed linear inside the fused block: the op that makes its x also prepares its low-rank columns.

x, sums = linear_attention(q, k, v, next_lora=linear)   h = mix(sums)     before to_out
x, sums = to_out(y, residual, gate, next_lora=linear)   h = mix(sums)     before the next attention's to_q
x, h    = shrink(LayerNorm(z) (1 + scale) + shift)                        before q|k|v
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
from suite.ops import FP32_BOUND, REFERENCE, K, Ops, R, Sizes, adapted, drawn, leaves_partial_sums, ops, sizes_of


class Producer(NamedTuple):
    """An op that makes x, with its operands.

    Attributes:
        without: makes x [B, T, K] for a plain linear.
        leaving: makes x, and for a perturbed linear its h or the partial sums of it.
        partial_sums: whether `mix` makes h from the partial sums.
    """

    without: Callable[[Ops], torch.Tensor]
    leaving: Callable[[Ops], tuple[torch.Tensor, torch.Tensor]]
    partial_sums: bool


def attention(sizes: Sizes, draw: Callable, members: int, t: int, next_lora: Lora, noise: MemberNoise) -> Producer:
    w = sizes.width
    qkv = draw(members, t, 3 * w).split(w, dim=-1)
    options = dict(heads=sizes.heads, norm_q=draw(w), norm_k=draw(w))
    return Producer(
        lambda op: op.attention(*qkv, **options),
        lambda op: op.attention(*qkv, next_lora=next_lora, perturbation=noise, **options),
        partial_sums=True,
    )


def to_out(sizes: Sizes, draw: Callable, members: int, t: int, next_lora: Lora, noise: MemberNoise) -> Producer:
    w = sizes.width
    x, weight, bias = draw(members, t, w), draw(w, w) * w**-0.5, draw(w)
    adapters, _ = adapted(draw, members, 1, w, w)
    options = dict(h=draw(members, t, R + K, to=torch.float32), adapters=adapters, perturbation=noise)
    options |= dict(residual=draw(members, t, w), gate=draw(members, 6, w)[:, 2])
    return Producer(
        lambda op: op.linear(x, weight, bias, **options),
        lambda op: op.linear(x, weight, bias, next_lora=next_lora, **options),
        partial_sums=True,
    )


def modulation(sizes: Sizes, draw: Callable, members: int, t: int, next_lora: Lora, noise: MemberNoise) -> Producer:
    x, table = draw(members, t, sizes.width), draw(members, 6, sizes.width)
    given = Modulation(table[:, 0], table[:, 1])
    return Producer(
        lambda op: op.shrink(x, None, None, given)[0],
        lambda op: op.shrink(x, next_lora, noise, given, op.factors(next_lora, noise, k=sizes.width, n=sizes.width)),
        partial_sums=False,
    )


PRODUCERS = {"behind linear_attention": attention, "behind to_out": to_out, "behind the modulation": modulation}


def of(context: Context, n_in: int, n_out: int) -> list[str]:
    """Names of the producers that a block has before a linear of this shape. None if the linear makes its own pass."""
    width = sizes_of(context.scale.name).width
    if (n_in, n_out) == (width, 3 * width):
        return ["behind the modulation"]
    return ["behind linear_attention", "behind to_out"] * (
        n_in == n_out == width and leaves_partial_sums(context.dtype)
    )


def case(context: Context, producer: str, n_in: int, n_out: int, tokens: int) -> dict[str, Any]:
    """One linear behind one producer. 3 K columns are the three stacked targets q|k|v.

    Returns:
        `check` of the whole chain. `seconds` of plain GEMM, linear, mix, producer with and without, and of `in_block`:
        their sum in each round, linear + mix + with - without. `ratio` of its throughput over the plain GEMM.
    """
    sizes, device, dtype = sizes_of(context.scale.name), context.device, context.dtype
    op, targets = ops(device), 3 if n_out == 3 * n_in else 1
    draw = drawn(device, dtype)
    weight, bias = draw(n_out, n_in) * n_in**-0.5, draw(n_out) if targets == 1 else None

    def built(members: int) -> tuple[Producer, Lora, MemberNoise]:
        draw = drawn(device, dtype)
        next_lora, noise = adapted(draw, members, targets, n_in, n_out // targets)
        return PRODUCERS[producer](sizes, draw, members, tokens, next_lora, noise), next_lora, noise

    def produced(made: Producer, next_lora: Lora, noise: MemberNoise) -> tuple[torch.Tensor, ...]:
        x, left = made.leaving(op)
        return x, left, op.mix(left, next_lora, noise) if made.partial_sums else left

    def stored(made: Producer, next_lora: Lora, noise: MemberNoise) -> torch.Tensor | None:
        """As in a block, which stores factors where there is a shrink of their own."""
        return None if made.partial_sums else op.factors(next_lora, noise, k=n_in, n=n_out // targets)

    few, next_lora, noise = built(3)
    x, _, h = produced(few, next_lora, noise)
    with full_precision():
        floats = x.float(), weight.float(), None if bias is None else bias.float()
        plain = F.linear(*(None if t is None else t.double() for t in floats))
        low = REFERENCE.shrink(floats[0], next_lora, noise)[1]
        expected = REFERENCE.linear(*floats, h=low, adapters=next_lora, perturbation=noise)
    bound = max(2 * worst_error(F.linear(x, weight, bias), plain), FP32_BOUND if dtype == torch.float32 else 0.0)
    got = op.linear(
        x,
        weight,
        bias,
        h=h,
        adapters=next_lora,
        perturbation=noise,
        factors=stored(few, next_lora, noise),
    )
    check = bounded(producer, worst_error(got, expected), bound, perturbation=worst_error(plain, expected))

    made, next_lora, noise = built(context.scale.members)
    (x, left, h), factors = produced(made, next_lora, noise), stored(made, next_lora, noise)
    variants = {
        "plain": lambda: F.linear(x, weight, bias),
        "linear": lambda: op.linear(x, weight, bias, h=h, adapters=next_lora, perturbation=noise, factors=factors),
        "with": lambda: made.leaving(op),
        "without": lambda: made.without(op),
    }
    if made.partial_sums:
        variants["mix"] = lambda: op.mix(left, next_lora, noise)
    seconds = interleaved(variants, context.scale.rounds[0], device=device, cold=True)
    signs = {"linear": 1, "mix": 1, "with": 1, "without": -1}
    rounds = zip(*([signs[n] * s for s in seconds[n]["samples"]] for n in variants if n != "plain"), strict=True)
    seconds["in_block"] = record.summary([sum(taken) for taken in rounds])
    return {"check": check, "seconds": seconds, "ratio": record.ratio(seconds["plain"], seconds["in_block"])}
