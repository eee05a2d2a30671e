"""The suite's part on every launch of a step. Each is checked against its reference, then timed against the roofline.

`launches` lists the launches of a population's forward with fused blocks, at the model's shapes, and how often each
occurs. The perturbed linears outside the blocks, the noise of the latents and the update are measured too. The decoder
and the scorer run in torch; the parts `decode_*` and `step_*` have their shares of the roofline.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from esengine.kernels import Modulation, es_update, es_update_ref, normals, normals_ref
from esengine.kernels.factors import STORE_FROM
from suite import roofline
from suite.checks import attempt, bounded, full_precision, worst_error
from suite.clock import interleaved
from suite.context import Context
from suite.linear import linear_case
from suite.ops import (
    FP32_BOUND,
    NOISE,
    REFERENCE,
    K,
    Ops,
    R,
    Sizes,
    adapted,
    drawn,
    leaves_partial_sums,
    ops,
    roofline_share,
    sizes_of,
)

BOUND = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: FP32_BOUND}
"""Relative error: twice the most that rounding a norm costs, since op and reference round both. Wrong noise is 1."""

TILE = 128
"""Columns of a GEMM's tile: a linear makes one partial sum for each."""


class Launch(NamedTuple):
    """One of a forward's launches.

    Attributes:
        name: the op, with its shape.
        times: how often a forward makes it.
        build: build(members, device, dtype) gives call(ops), with operands of that many members.
        work: work(members, itemsize) gives the work of that many members.
    """

    name: str
    times: int
    build: Callable[[int, torch.device, torch.dtype], Callable[[Ops], Any]]
    work: Callable[..., roofline.Work]


def launches(sizes: Sizes, side: int, text: int, *, partial_sums: bool) -> list[Launch]:
    """Of a forward with latents of `side` x `side` tokens and `text` words: the blocks', then the caption's.

    With `partial_sums`, as in bf16, the op that makes x also makes partial sums for the next linear. Without them the
    next linear makes a pass over x.
    """
    return [*block_launches(sizes, side, text, partial_sums), *caption_launches(sizes, text, partial_sums)]


def block_launches(sizes: Sizes, side: int, text: int, partial_sums: bool) -> Iterator[Launch]:
    """The launches of a block, in their order."""
    w, c, n, t, heads = sizes.width, sizes.channels, sizes.blocks, side * side, sizes.heads
    at, words, left, next_width = (
        f"x{t}",
        f"text x{text}",
        ", partial sums" if partial_sums else "",
        w if partial_sums else 0,
    )
    yield shrink_launch(f"shrink q|k|v, modulated {at}", n, t, w, targets=3, modulated=True)
    yield linear_launch(f"linear q|k|v {at}", n, t, w, w, targets=3, bias=False, stored=True)
    yield attention_launch(f"linear_attention{left} {at}", n, t, w, heads, partial_sums)
    yield low_rank_launch(f"to_out {at}", n, t, w, heads if partial_sums else 0)
    gated = dict(targets=1, residual=True, gated=True, next_width=next_width, stored=not partial_sums)
    yield linear_launch(f"linear to_out, gated{left} {at}", n, t, w, w, **gated)
    yield low_rank_launch(f"to_q {at}", n, t, w, -(-w // TILE) if partial_sums else 0)
    yield linear_launch(f"linear to_q {at}", n, t, w, w, targets=1, stored=not partial_sums)
    yield shrink_launch(f"shrink k|v, {words}", n, text, w, targets=2)
    yield linear_launch(f"linear k|v, {words}", n, text, w, w, targets=2, stored=True)
    yield norm_launch(f"rms norm of q {at}", n, t, w)
    yield norm_launch(f"rms norm of k, {words}", n, text, w)
    yield cross_launch(f"cross_attention {at}", n, t, text, w, sizes.cross_heads)
    yield shrink_launch(f"shrink cross to_out {at}", n, t, w, targets=1)
    yield linear_launch(f"linear cross to_out, residual {at}", n, t, w, w, targets=1, residual=True, stored=True)
    yield shrink_launch(f"modulation {at}", n, t, w, targets=0, modulated=True)
    yield linear_launch(f"linear inverted, SiLU {at}", n, t, w, 2 * c, activation="silu")
    yield gate_launch(f"depthwise_gate {at}", n, side, c)
    yield linear_launch(f"linear point, gated {at}", n, t, c, w, bias=False, residual=True, gated=True)


def caption_launches(sizes: Sizes, text: int, partial_sums: bool) -> Iterator[Launch]:
    """The projection of the text states, before the first block."""
    w, k, words, left = sizes.width, sizes.text_width, f"text x{text}", ", partial sums" if partial_sums else ""
    first = dict(targets=1, activation="gelu_tanh", next_width=w if partial_sums else 0, stored=True)
    yield shrink_launch(f"shrink caption, {words}", 1, text, k, targets=1, n=w)
    yield linear_launch(f"linear caption, GELU{left}, {words}", 1, text, k, w, **first)
    yield low_rank_launch(f"caption 2, {words}", 1, text, w, -(-w // TILE) if partial_sums else 0)
    yield linear_launch(f"linear caption 2, {words}", 1, text, w, w, targets=1, stored=not partial_sums)


def low_rank_launch(name: str, times: int, t: int, width: int, parts: int) -> Launch:
    """The launch that gives a linear its h: the mix of `parts` partial sums, or for 0 a shrink of x."""
    if parts:
        return mix_launch(f"mix of {parts}, {name}", times, t, width, parts)
    return shrink_launch(f"shrink {name}", times, t, width, targets=1)


def shrink_launch(
    name: str, times: int, t: int, k: int, *, targets: int, modulated: bool = False, n: int | None = None
) -> Launch:
    """h of so many targets [n, k], n = k if not given, and their stored factors."""
    n = k if n is None else n

    def build(members, device, dtype):
        draw = drawn(device, dtype)
        x, table = draw(members, t, k), draw(members, 6, k)
        given = adapted(draw, members, targets, k, k) if targets else (None, None)
        modulation = Modulation(table[:, 0], table[:, 1]) if modulated else None
        if not targets or t < STORE_FROM:
            return lambda ops: ops.shrink(x, *given, modulation)
        # as in a block: their factors are stored first, for the linear too
        return lambda ops: ops.shrink(x, *given, modulation, ops.factors(*given, k=k, n=n))

    def work(members, itemsize):
        rank = dict(r=R, k=K) if targets else {}
        sizes = dict(rows=members * t, members=members, n_in=k, itemsize=itemsize)
        return roofline.shrink_work(**sizes, targets=targets, modulated=modulated, **rank)

    return Launch(name, times, build, work)


def linear_launch(
    name: str,
    times: int,
    t: int,
    k: int,
    n: int,
    *,
    targets: int = 0,
    bias: bool = True,
    activation: str | None = None,
    residual: bool = False,
    gated: bool = False,
    next_width: int = 0,
    stored: bool = False,
) -> Launch:
    """`targets` perturbed linears [n, k], 0 for a plain one.

    `next_width`: width of the linear that gets partial sums, or 0.

    `stored`: its factors were stored for the shrink before it.
    """
    out = max(targets, 1) * n

    def build(members, device, dtype):
        draw, options = drawn(device, dtype), {"activation": activation}
        x, weight, offset = draw(members, t, k), draw(out, k) * k**-0.5, draw(out) if bias else None
        if targets:
            adapters, perturbation = adapted(draw, members, targets, k, n)
            options |= dict(adapters=adapters, perturbation=perturbation)
            options["h"] = draw(members, t, targets * (R + K), to=torch.float32)
            if stored and t >= STORE_FROM:
                options["factors"] = ops(device).factors(adapters, perturbation, k=k, n=n)
        if residual:
            options["residual"] = draw(members, t, n)
        if gated:
            options["gate"] = draw(members, 6, n)[:, 2]
        if next_width:
            options["next_lora"], options["perturbation"] = adapted(draw, members, 1, next_width, next_width)
        return lambda ops: ops.linear(x, weight, offset, **options)

    def work(members, itemsize):
        low = dict(targets=targets, r=R, k=K) if targets else {}
        partial_sums = dict(next_columns=R + K, parts=-(-n // TILE)) if next_width else {}
        sizes = dict(rows=members * t, members=members, n_in=k, n_out=out, itemsize=itemsize)
        return roofline.fused_linear_work(**sizes, bias=bias, residual=residual, gated=gated, **low, **partial_sums)

    return Launch(name, times, build, work)


def mix_launch(name: str, times: int, t: int, width: int, parts: int) -> Launch:
    def build(members, device, dtype):
        draw = drawn(device, dtype)
        partial_sums, given = draw(parts, members, t, R + K, to=torch.float32), adapted(draw, members, 1, width, width)
        return lambda ops: ops.mix(partial_sums, *given)

    def work(members, itemsize):
        return roofline.mix_work(rows=members * t, parts=parts, r=R, k=K)

    return Launch(name, times, build, work)


def attention_launch(name: str, times: int, t: int, width: int, heads: int, partial_sums: bool) -> Launch:
    def build(members, device, dtype):
        draw = drawn(device, dtype)
        qkv, norms = draw(members, t, 3 * width).split(width, dim=-1), dict(norm_q=draw(width), norm_k=draw(width))
        next_lora, perturbation = adapted(draw, members, 1, width, width) if partial_sums else (None, None)
        return lambda ops: ops.attention(*qkv, heads=heads, next_lora=next_lora, perturbation=perturbation, **norms)

    def work(members, itemsize):
        sizes = dict(batch=members, tokens=t, heads=heads, width=width // heads, itemsize=itemsize)
        return roofline.linear_attention_work(**sizes, next_columns=partial_sums * (R + K))

    return Launch(name, times, build, work)


def norm_launch(name: str, times: int, t: int, width: int) -> Launch:
    def build(members, device, dtype):
        draw = drawn(device, dtype)
        x, weight = draw(members, t, width), draw(width)
        return lambda ops: ops.norm(x, weight)

    def work(members, itemsize):
        return roofline.norm_work(rows=members * t, columns=width, itemsize=itemsize)

    return Launch(name, times, build, work)


def cross_launch(name: str, times: int, t: int, text: int, width: int, heads: int) -> Launch:
    def build(members, device, dtype):
        draw = drawn(device, dtype)
        q, (k, v) = draw(members, t, width), draw(members, text, 2 * width).split(width, dim=-1)
        return lambda ops: ops.cross(q, k, v, heads)

    def work(members, itemsize):
        sizes = dict(batch=members, tokens=t, text=text, heads=heads, width=width // heads, itemsize=itemsize)
        return roofline.cross_attention_work(**sizes)

    return Launch(name, times, build, work)


def gate_launch(name: str, times: int, side: int, channels: int) -> Launch:
    def build(members, device, dtype):
        draw = drawn(device, dtype)
        x, weight = draw(members, side * side, 2 * channels), draw(2 * channels, 1, 3, 3) / 3
        bias, sizes = draw(2 * channels), dict(height=side, width=side)
        return lambda ops: ops.gate(x, weight, bias, **sizes)

    def work(members, itemsize):
        return roofline.depthwise_gate_work(tokens=members * side * side, channels=channels, itemsize=itemsize)

    return Launch(name, times, build, work)


@torch.no_grad()
def kernels(context: Context) -> dict[str, Any]:
    """Every launch of a step, each with its check, its seconds and its share of the roofline.

    If one fails, it is recorded, and the others go on.
    """
    found, scale = {}, context.scale

    def measure(name: str, case: Callable[[], dict[str, Any]]) -> None:
        if name not in found:  # those on text are the same at every size of image
            found[name] = attempt(case) if context.time_left() > 0 else {"not_measured": "out of time"}

    sizes, partial_sums = sizes_of(scale.name), leaves_partial_sums(context.dtype)
    for pixels in scale.pixels:
        side = pixels // context.plain.pipeline.vae_scale_factor
        for launch in launches(sizes, side, scale.text_tokens, partial_sums=partial_sums):
            measure(launch.name, lambda launch=launch: launch_case(context, launch))
    for n_in, n_out, tokens in scale.other_linears:
        case = lambda s=(n_in, n_out, tokens): linear_case(context, *s, peers=False)  # noqa: E731
        measure(f"population_linear {n_in}->{n_out} x{tokens}", case)
    for shape in ((R, sizes.width), (6 * sizes.width, R)):
        measure(f"es_update {shape[0]}x{shape[1]}", lambda s=shape: update_case(context, s))
    measure("normals", lambda: normals_case(context))
    return found


def launch_case(context: Context, launch: Launch) -> dict[str, Any]:
    """Of a forward's rows, checked on three."""
    device, dtype = context.device, context.dtype
    check = check_launch(launch, ops(device), device, dtype)
    call, op = launch.build(context.scale.members, device, dtype), ops(device)
    work = launch.work(members=context.scale.members, itemsize=dtype.itemsize)
    return {"times_a_forward": launch.times} | _timed(context, check, lambda: call(op), work, dtype)


def check_launch(launch: Launch, op: Ops, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Check every output of three members against the reference: at most `BOUND` of the norm of a member's output.

    Raises:
        CheckFailed: an error is larger.
    """
    call = launch.build(3, device, dtype)
    with full_precision():
        expected = call(REFERENCE)
    errors = [worst_error(got, aim) for got, aim in zip(_outputs(call(op)), _outputs(expected), strict=True)]
    return bounded(launch.name, max(errors), BOUND[dtype])


def update_case(context: Context, shape: tuple[int, int]) -> dict[str, Any]:
    """`es_update` of one tensor at N = `update_members`, checked at a smaller N against the members one by one."""
    members, few = context.scale.update_members, min(64, context.scale.update_members)
    fitness = torch.linspace(-1, 1, members, device=context.device)
    settings = dict(NOISE, shape=shape, stream_u=1, stream_v=2, rank=K)
    with full_precision():
        expected = es_update_ref(fitness[:few], **settings)
    check = bounded(f"es_update {shape}", _relative(es_update(fitness[:few], **settings), expected), FP32_BOUND)
    work = roofline.es_update_work(shape=shape, pairs=members // 2, k=K)
    return _timed(context, check, lambda: es_update(fitness, **settings), work) | {"members": members}


def normals_case(context: Context) -> dict[str, Any]:
    """The latents of a chunk."""
    rows, count = context.scale.chunk, 32 * (context.scale.pixels[-1] // 32) ** 2
    ids = torch.arange(rows, device=context.device)
    settings = dict(NOISE, streams=ids, pairs=ids, count=count, device=context.device)
    check = bounded("normals", _relative(normals(**settings), normals_ref(**settings)), FP32_BOUND)
    return _timed(context, check, lambda: normals(**settings), roofline.normals_work(rows=rows, count=count))


def _outputs(result: Any) -> list[torch.Tensor]:
    """Partial sums [P, B, T, C], added up. Their number depends on the launch."""
    results = result if isinstance(result, tuple) else (result,)
    return [each.sum(0) if each.dim() == 4 else each for each in results if each is not None]


def _timed(
    context: Context,
    check: dict,
    call: Callable[[], object],
    work: roofline.Work,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    seconds = interleaved({"op": call}, context.scale.rounds[0], device=context.device, cold=True)["op"]
    return {"check": check, "seconds": seconds, "roofline": roofline_share(context, seconds, work, dtype)}


def _relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).double().norm() / expected.double().norm()).item()
