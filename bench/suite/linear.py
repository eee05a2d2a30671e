"""The population linear compared with the plain GEMM and with its peers: by itself, and inside a block.

    alone     y from x only: the pass over x for h, and the GEMM that expands it, `population_linear`
    in block  the GEMM with h given, and everything that the perturbation adds to the op that makes x: h by `mix` of
              partial sums from the linear attention or from the gated to_out, or h of q, k and v from the modulated
              LayerNorm

`linear_vs_gemm` is the first: one call against one call, as others publish it. The second, `linear_in_block_vs_gemm`,
is what a forward pays: GEMM + mix + (producer with partial sums or h - the same producer without), each with a cold L2.
So all costs of this linear's perturbation are included (`producers.py`). Gate, residual and activation are not, because
a plain block has them too. If no op of the block makes the x of a shape (the caption's, from stored text;
`attn2.to_out`, after torch's attention), the linear runs there as it does alone.
"""

from collections.abc import Callable
from typing import Any, get_args

import record
import torch
import torch.nn.functional as F

import suite.producers
from esengine.kernels import (
    Lora,
    MemberNoise,
    factor,
    linear_streams,
    population_linear,
    population_linear_ref,
    population_linear_torch,
    signed_sigma,
    stream_table,
)
from esengine.kernels.population_linear import Path
from suite import roofline
from suite.checks import attempt, bounded, full_precision, worst_error
from suite.clock import interleaved
from suite.context import Context
from suite.ops import FP32_BOUND, NOISE, SCALE, SIGMA, K, R, roofline_share


@torch.no_grad()
def linear(context: Context) -> dict[str, Any]:
    """Every shape of the bar: plain, ours by each path, batched torch and the peers. And ours in a block.

    In a block it is behind each producer that a block has for the shape. If one fails, it is recorded, and the
    others go on.
    """
    scale, shapes, in_block = context.scale, {}, {}
    for n_in, n_out in scale.shapes:
        for tokens in scale.tokens:
            shape = n_in, n_out, tokens
            shapes[_named(*shape)] = _within_time(context, lambda s=shape: linear_case(context, *s))
            for producer in suite.producers.of(context, n_in, n_out):
                case = lambda s=shape, p=producer: suite.producers.case(context, p, *s)  # noqa: E731
                in_block[f"{_named(*shape)} {producer}"] = _within_time(context, case)
    return {
        "members": scale.members,
        "r": R,
        "k": K,
        "dtype": str(context.dtype).removeprefix("torch."),
        "shapes": shapes,
        "in_block": in_block,
    }


def linear_case(context: Context, n_in: int, n_out: int, tokens: int, *, peers: bool = True) -> dict[str, Any]:
    """One shape.

    Returns:
        By variant: `check` and, if it passed, `seconds`; `ratios` of throughput over the plain GEMM; the `roofline`
        share of plain and population.
    """
    members, device, dtype = context.scale.members, context.device, context.dtype
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, to: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=to)

    x, weight, bias = normal(members, tokens, n_in), normal(n_out, n_in) * n_in**-0.5, normal(n_out)
    a, b = normal(R, n_in, to=torch.float32) * n_in**-0.5, normal(n_out, R, to=torch.float32)
    ids, streams = torch.arange(members, device=device), linear_streams("bench")
    lora = Lora(a, b, SCALE, stream_table((streams,), a.device))
    noise = MemberNoise(ids, NOISE["seed"], NOISE["step"], SIGMA, K)
    # as the model gives it: a tensor that the kernels read
    ours = noise._replace(step=torch.full((1,), NOISE["step"], dtype=torch.int64, device=device))

    some = [0, 1, members - 1]
    floats = x[some].float(), weight.float(), bias.float()
    with full_precision():
        plain = F.linear(*(t.double() for t in floats))
        expected = population_linear_ref(*floats, lora, noise._replace(members=ids[some]))
    own = worst_error(F.linear(x[some], weight, bias), plain)
    bound = max(2 * own, FP32_BOUND if dtype == torch.float32 else 0.0)

    prepared: dict[str, Callable[[], Callable[[torch.Tensor], torch.Tensor]]] = {
        "plain": lambda: lambda x: F.linear(x, weight, bias),
        "population": lambda: lambda x: population_linear(x, weight, bias, lora, ours),
        "stored_torch": lambda: stored_torch(weight, bias, a, b, ids, streams),
    }
    for path in get_args(Path):
        prepared[path] = lambda path=path: lambda x: population_linear(x, weight, bias, lora, ours, path=path)
    if peers:
        a_bri, b_bor = member_weights(a, b, ids, streams)
        for name, prepare in context.peers.items():
            weights = weight, bias, a_bri.to(dtype), b_bor.to(dtype), SCALE
            prepared[name] = lambda prepare=prepare, weights=weights: prepare(*weights)

    cases: dict[str, dict[str, Any]] = {}
    timed = {}
    for name, prepare in prepared.items():
        aim = plain if name == "plain" else expected
        # theirs round stored weights, and the sum once more
        most = 2 * bound if name in context.peers else bound
        cases[name] = attempt(lambda given=(prepare, name, x, some, aim, most): _checked(*given))
        if "call" in cases[name]:
            call = cases[name].pop("call")
            timed[name] = lambda call=call: call(x)
    for name, seconds in interleaved(timed, context.scale.rounds[0], device=device, cold=True).items():
        cases[name]["seconds"] = seconds
    sizes = dict(rows=members * tokens, n_in=n_in, n_out=n_out, itemsize=x.element_size())
    work = {"plain": roofline.linear_work(**sizes)}
    work["population"] = roofline.population_linear_work(**sizes, members=members, r=R, k=K)
    return {
        "variants": cases,
        "ratios": {
            name: record.ratio(cases["plain"]["seconds"], case["seconds"])
            for name, case in cases.items()
            if name != "plain" and "seconds" in case and "seconds" in cases["plain"]
        },
        "roofline": {
            name: roofline_share(context, cases[name]["seconds"], work[name], dtype)
            for name in work
            if "seconds" in cases[name]
        },
    }


def stored_torch(weight, bias, a, b, ids, streams) -> Callable[[torch.Tensor], torch.Tensor]:
    """The batched torch path with every member's factors stored beforehand."""
    v, u, v_out, u_out = _factors(a, b, ids, streams)
    c = signed_sigma(ids, SIGMA, K)
    return lambda x: population_linear_torch(x, weight, bias, a, b, factors=(v, u, v_out, u_out), c=c, scale=SCALE)


def member_weights(a, b, ids, streams) -> tuple[torch.Tensor, torch.Tensor]:
    """A_i [B, r, in] and B_i [B, out, r] of every member, fp32, stored, as a server of adapters would have them."""
    v, u, v_out, u_out = _factors(a, b, ids, streams)
    c = signed_sigma(ids, SIGMA, K)[:, None, None]
    return a + c * u @ v.mT, b + c * u_out @ v_out.mT


def _checked(prepare, name, x, some, expected, bound) -> dict[str, Any]:
    call = prepare()
    return {"check": bounded(name, worst_error(call(x)[some], expected), bound), "call": call}


def _within_time(context: Context, case: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    return attempt(case) if context.time_left() > 0 else {"not_measured": "out of time"}


def _factors(a, b, ids, streams) -> tuple[torch.Tensor, ...]:
    """V, U, V', U' of each row, fp32 [B, L, k]."""
    pairs, slots = torch.unique(ids >> 1, return_inverse=True)
    lengths, noise = (a.shape[1], len(a), len(a), len(b)), dict(NOISE, pairs=pairs, rank=K)
    return tuple(factor(stream=s, length=n, **noise)[slots] for s, n in zip(streams, lengths, strict=True))


def _named(n_in: int, n_out: int, tokens: int) -> str:
    return f"{n_in}->{n_out} x{tokens}"
