"""The suite's microbenchmarks: the population linear beside the plain GEMM and its peers, and every other kernel."""

from collections.abc import Callable
from typing import Any

import record
import roofline
import torch
import torch.nn.functional as F
from clock import interleaved
from suite_context import CheckFailed, Context, bounded, full_precision, worst_error

from esengine.kernels import (
    depthwise_gate,
    depthwise_gate_ref,
    es_update,
    es_update_ref,
    factor,
    linear_attention,
    linear_attention_ref,
    linear_streams,
    normals,
    normals_ref,
    population_linear,
    population_linear_ref,
    population_linear_torch,
    signed_sigma,
)
from esengine.kernels.augmented_linear import augmented_operands, population_linear_augmented

R, RANK, SCALE, SIGMA = 2, 1, 4.0, 1e-2
NOISE = {"seed": 0, "step": 1}
FP32_BOUND = 1e-5


@torch.no_grad()
def linear(context: Context) -> dict[str, Any]:
    """Every shape of the bar: plain, ours, batched torch, the challenger over an augmented K and the peers.

    One that fails is recorded, the rest go on.
    """
    scale, shapes = context.scale, {}
    for n_in, n_out in scale.shapes:
        for tokens in scale.tokens:
            shapes[f"{n_in}->{n_out} x{tokens}"] = _within_time(
                context, lambda s=(n_in, n_out, tokens): linear_case(context, *s)
            )
    return {"members": scale.members, "r": R, "k": RANK, "dtype": _name(context.dtype), "shapes": shapes}


@torch.no_grad()
def kernels(context: Context) -> dict[str, Any]:
    """The other linears of the model, the update and the noise, each with its share of the roofline."""
    found = {}
    for n_in, n_out, tokens in context.scale.other_linears:
        found[f"population_linear {n_in}->{n_out} x{tokens}"] = _within_time(
            context, lambda s=(n_in, n_out, tokens): linear_case(context, *s, peers=False)
        )
    width = context.scale.shapes[0][0]
    for shape in ((R, width), (6 * width, R)):
        found[f"es_update {shape[0]}x{shape[1]}"] = _within_time(context, lambda s=shape: update_case(context, s))
    found["normals"] = _within_time(context, lambda: normals_case(context))
    for pixels in context.scale.pixels:
        side = pixels // context.plain.pipeline.vae_scale_factor
        found[f"linear_attention {pixels} px"] = _within_time(context, lambda s=side: attention_case(context, s))
        found[f"depthwise_gate {pixels} px"] = _within_time(context, lambda s=side: gate_case(context, s))
    return found


def linear_case(context: Context, n_in: int, n_out: int, tokens: int, *, peers: bool = True) -> dict[str, Any]:
    """One shape.

    Returns:
        By variant: `check` and, where it passed, `seconds`; `ratios` of throughput over the plain GEMM; the `roofline`
        share of plain and population.
    """
    members, device, dtype = context.scale.members, context.device, context.dtype
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, to: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=to)

    x, weight, bias = normal(members, tokens, n_in), normal(n_out, n_in) * n_in**-0.5, normal(n_out)
    a, b = normal(R, n_in, to=torch.float32) * n_in**-0.5, normal(n_out, R, to=torch.float32)
    ids, streams = torch.arange(members, device=device), linear_streams("bench")
    noise = dict(NOISE, streams=streams, sigma=SIGMA, rank=RANK, scale=SCALE)

    some = [0, 1, members - 1]
    floats = x[some].float(), weight.float(), bias.float()
    with full_precision():
        plain = F.linear(*(t.double() for t in floats))
        expected = population_linear_ref(*floats, a, b, members=ids[some], **noise)
    own = worst_error(F.linear(x[some], weight, bias), plain)
    bound = max(2 * own, FP32_BOUND if dtype == torch.float32 else 0.0)

    prepared: dict[str, Callable[[], Callable[[torch.Tensor], torch.Tensor]]] = {
        "plain": lambda: lambda x: F.linear(x, weight, bias),
        "population": lambda: lambda x: population_linear(x, weight, bias, a, b, members=ids, **noise),
        "stored_torch": lambda: stored_torch(weight, bias, a, b, ids, streams),
        "augmented_k": lambda: lambda x: population_linear_augmented(x, weight, bias, a, b, members=ids, **noise),
        "augmented_k_gemm_alone": lambda: augmented_gemm(x, weight, bias, a, b, ids, noise),
    }
    if peers:
        a_bri, b_bor = member_weights(a, b, ids, streams)
        for name, prepare in context.peers.items():
            weights = weight, bias, a_bri.to(dtype), b_bor.to(dtype), SCALE
            prepared[name] = lambda prepare=prepare, weights=weights: prepare(*weights)

    cases: dict[str, dict[str, Any]] = {}
    timed = {}
    for name, prepare in prepared.items():
        aim = plain if name == "plain" else expected
        # theirs round stored weights, and the sum once more; the challenger's, h, B and U'
        most = 2 * bound if name in context.peers or name.startswith("augmented_k") else bound
        cases[name] = attempt(lambda given=(prepare, name, x, some, aim, most): _checked(*given))
        if "call" in cases[name]:
            call = cases[name].pop("call")
            timed[name] = lambda call=call: call(x)
    for name, seconds in interleaved(timed, context.scale.rounds[0], device=device, cold=True).items():
        cases[name]["seconds"] = seconds
    sizes = dict(rows=members * tokens, n_in=n_in, n_out=n_out, itemsize=x.element_size())
    work = {"plain": roofline.linear_work(**sizes)}
    work["population"] = roofline.population_linear_work(**sizes, members=members, r=R, k=RANK)
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
    c = signed_sigma(ids, SIGMA, RANK)
    return lambda x: population_linear_torch(x, weight, bias, a, b, factors=(v, u, v_out, u_out), c=c, scale=SCALE)


def augmented_gemm(x, weight, bias, a, b, ids, noise) -> Callable[[torch.Tensor], torch.Tensor]:
    """The GEMM over an augmented K by itself: as if x's producer had written the operands of this x."""
    operands = augmented_operands(x, weight, a, b, members=ids, **noise)
    return lambda x: F.linear(*operands, bias)


def member_weights(a, b, ids, streams) -> tuple[torch.Tensor, torch.Tensor]:
    """A_i [B, r, in] and B_i [B, out, r] of every member, fp32, formed and stored as a server of adapters would."""
    v, u, v_out, u_out = _factors(a, b, ids, streams)
    c = signed_sigma(ids, SIGMA, RANK)[:, None, None]
    return a + c * u @ v.mT, b + c * u_out @ v_out.mT


def update_case(context: Context, shape: tuple[int, int]) -> dict[str, Any]:
    """`es_update` of one tensor at N = `update_members`, checked at a smaller N against the members one by one."""
    members, few = context.scale.update_members, min(64, context.scale.update_members)
    fitness = torch.linspace(-1, 1, members, device=context.device)
    settings = dict(NOISE, shape=shape, stream_u=1, stream_v=2, rank=RANK)
    check = bounded(
        f"es_update {shape}",
        _relative(es_update(fitness[:few], **settings), es_update_ref(fitness[:few], **settings)),
        FP32_BOUND,
    )
    work = roofline.es_update_work(shape=shape, pairs=members // 2, k=RANK)
    return _timed(context, check, lambda: es_update(fitness, **settings), work) | {"members": members}


def normals_case(context: Context) -> dict[str, Any]:
    """The latents of a chunk."""
    rows, count = context.scale.chunk, 32 * (context.scale.pixels[-1] // 32) ** 2
    ids = torch.arange(rows, device=context.device)
    settings = dict(NOISE, streams=ids, pairs=ids, count=count, device=context.device)
    check = bounded("normals", _relative(normals(**settings), normals_ref(**settings)), FP32_BOUND)
    return _timed(context, check, lambda: normals(**settings), roofline.normals_work(rows=rows, count=count))


def attention_case(context: Context, side: int) -> dict[str, Any]:
    """Self-attention between its projections, of a forward's rows, checked on three."""
    config, rows, dtype = context.plain.transformer.config, context.scale.members, context.dtype
    heads, width = config.num_attention_heads, config.attention_head_dim
    size, generator = (rows, side * side, heads * width), torch.Generator(context.device).manual_seed(0)
    q, k, v = (torch.randn(size, generator=generator, device=context.device, dtype=dtype) for _ in range(3))
    norm = torch.ones(heads * width, device=context.device, dtype=dtype)

    def op(function, q, k, v, norm):
        return function(q, k, v, heads=heads, norm_q=norm, norm_k=norm)

    few = [tensor[:3] for tensor in (q, k, v)]
    expected = op(linear_attention_ref, *(tensor.float() for tensor in (*few, norm)))
    check = _against_rounding("linear_attention", op(linear_attention, *few, norm), expected)
    sizes = dict(batch=rows, tokens=side * side, heads=heads, width=width, itemsize=q.element_size())
    work = roofline.linear_attention_work(**sizes)
    return _timed(context, check, lambda: op(linear_attention, q, k, v, norm), work, dtype)


def gate_case(context: Context, side: int) -> dict[str, Any]:
    """The middle of a feed-forward, of a forward's rows, checked on three."""
    convolution = context.plain.transformer.transformer_blocks[0].ff.conv_depth
    size = context.scale.members, side * side, len(convolution.bias)
    generator = torch.Generator(context.device).manual_seed(0)
    x = torch.randn(size, generator=generator, device=context.device, dtype=context.dtype)
    sizes = dict(height=side, width=side)
    expected = depthwise_gate_ref(x[:3].float(), convolution.weight.float(), convolution.bias.float(), **sizes)
    got = depthwise_gate(x[:3], convolution.weight, convolution.bias, **sizes)
    check = _against_rounding("depthwise_gate", got, expected)
    work = roofline.depthwise_gate_work(tokens=size[0] * size[1], channels=size[2] // 2, itemsize=x.element_size())
    return _timed(
        context, check, lambda: depthwise_gate(x, convolution.weight, convolution.bias, **sizes), work, context.dtype
    )


def attempt(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `call` returns; what it raised, as a failed check or an error, so that the rest can go on."""
    try:
        return call()
    except CheckFailed as failure:
        return {"check": {"failed": str(failure)}}
    except Exception as error:  # a peer may fail in any way
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def roofline_share(context: Context, seconds: dict, work: roofline.Work, dtype: torch.dtype) -> float | None:
    """None where the device's ceiling for the dtype is not known."""
    if context.ceilings is None or dtype not in context.ceilings.flops:
        return None
    return roofline.share(seconds["median"], work, context.ceilings, dtype)


def _checked(prepare, name, x, some, expected, bound) -> dict[str, Any]:
    call = prepare()
    return {"check": bounded(name, worst_error(call(x)[some], expected), bound), "call": call}


def _against_rounding(what: str, got: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    """The check of an op that rounds once at the end: at most twice the error of rounding `expected`."""
    bound = max(2 * worst_error(expected.to(got.dtype), expected), FP32_BOUND)
    return bounded(what, worst_error(got, expected), bound)


def _timed(
    context: Context,
    check: dict,
    call: Callable[[], object],
    work: roofline.Work,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    seconds = interleaved({"op": call}, context.scale.rounds[0], device=context.device, cold=True)["op"]
    return {"check": check, "seconds": seconds, "roofline": roofline_share(context, seconds, work, dtype)}


def _within_time(context: Context, case: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    if context.time_left() <= 0:
        return {"not_measured": "out of time"}
    return attempt(case)


def _factors(a, b, ids, streams) -> tuple[torch.Tensor, ...]:
    """V, U, V', U' of each row, fp32 [B, L, k]."""
    pairs, slots = torch.unique(ids >> 1, return_inverse=True)
    lengths, noise = (a.shape[1], len(a), len(a), len(b)), dict(NOISE, pairs=pairs, rank=RANK)
    return tuple(factor(stream=s, length=n, **noise)[slots] for s, n in zip(streams, lengths, strict=True))


def _relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).double().norm() / expected.double().norm()).item()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
