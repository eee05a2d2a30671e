"""The suite's parts on the whole model: a forward, a step, the reference run's loop, the update and memory."""

import copy
import gc
import itertools
import statistics
from collections.abc import Callable
from typing import Any

import peer_ratio
import record
import torch
from forward import LiveBytes
from peers import published, reference_loop
from torch._dynamo.utils import counters

import esengine
from esengine.kernels import es_update_ref
from esengine.models import Rows, SanaSprint, graphs
from suite import standin
from suite.checks import CheckFailed, Checks, attempt, bounded, full_precision, worst_error
from suite.clock import Laps, interleaved
from suite.context import STEP, Context, Exact
from suite.decode import score_work
from suite.ops import roofline_share


@torch.no_grad()
def forward(context: Context, pixels: int) -> dict[str, Any]:
    """The population forward and the plain one without adapter, eager and compiled, same inputs, in turns."""
    check = context.checks(lambda: context.check_members(pixels))
    exact = Exact(context).forward(pixels, [0])
    variants = {
        "population": lambda: context.forward(context.model, pixels, context.population),
        "eager": lambda: context.forward(context.plain, pixels),
    }
    if graphs.supported(context.device) and not context.graphs_failed:
        variants["population launched"] = lambda: context.forward(
            context.model, pixels, context.population, graphs="never"
        )
        replay = context.checks(lambda: _check_replay(pixels, variants, check["bound"]))
    else:
        replay = None
    modes: dict[str, Any] = {}
    compiled: dict[str, SanaSprint] = {}
    for number, mode in enumerate(context.compile_modes):
        if number and context.time_left() < context.scale.compile_seconds:
            modes[mode] = {"not_measured": "out of time"}
            continue
        modes[mode] = attempt(lambda mode=mode: _compile(context, mode, pixels, exact, check["bound"]))
        if "model" in modes[mode]:
            model = compiled[f"compiled {mode}"] = modes[mode].pop("model")
            variants[f"compiled {mode}"] = lambda model=model: context.forward(model, pixels)
    seconds = interleaved(variants, context.scale.rounds[1], device=context.device)
    for mode, facts in modes.items():
        if "failed" in facts.get("check", {}):
            del compiled[f"compiled {mode}"]
            facts["uncounted_ratio"] = record.ratio(seconds[f"compiled {mode}"], seconds["population"])
    fastest = min(compiled, key=lambda name: seconds[name]["median"], default=None)
    if fastest is not None:
        context.compiled[pixels] = compiled[fastest]
    return {
        "pixels": pixels,
        "members": context.scale.members,
        "images_per_member": 1,
        "text_tokens": context.scale.text_tokens,
        "targets": list(reference_loop.TARGETS),
        "backend": context.population.backend,
        "plan": context.model.plan(context.population, context.settings(pixels)),
        "graphs": context.graphs(),
        "check": check,
        "check_replay": replay,
        "compile": {
            "backend": context.compile_backend,
            "unit": context.compile_unit,
            "modes": modes,
            "fastest": fastest,
        },
        "seconds": seconds,
        "ratios": {
            "over_eager": record.ratio(seconds["eager"], seconds["population"]),
            **(
                {"over_launched": record.ratio(seconds["population launched"], seconds["population"])}
                if "population launched" in seconds
                else {}
            ),
            **({} if fastest is None else {"over_compiled": record.ratio(seconds[fastest], seconds["population"])}),
        },
    }


@torch.no_grad()
def step(context: Context, pixels: int) -> dict[str, Any]:
    """An ES step, ask to tell, against plain generation, decoding and scoring of as many images of the same prompts.

    Both decode as `Context.how` says.
    """
    check = context.checks(lambda: context.check_members(pixels))
    context.scorer  # noqa: B018  made before the clock starts
    engine, plain = context.engine(), context.compiled.get(pixels, context.plain)
    stages: dict[str, list[dict[str, float]]] = {"step": [], "inference": []}

    def es_step(overlap: bool) -> None:
        laps, task = Laps(context.device), engine.ask()
        scores = _score_task(context, context.model, task, pixels, laps, engine.population, overlap)
        engine.tell(task, scores)
        laps.lap("update")
        stages["step"].append(laps.seconds())

    def inference(overlap: bool) -> None:
        laps = Laps(context.device)
        _score_task(context, plain, engine.ask(), pixels, laps, None, overlap)
        stages["inference"].append(laps.seconds())

    check_step = context.checks(lambda: _check_step(context, engine, pixels))
    overlap = context.overlaps()
    variants = {"step": lambda: es_step(overlap), "inference": lambda: inference(overlap)}
    seconds = interleaved(variants, context.scale.rounds[2], device=context.device)
    if overlap:  # its stages run at once: those of two more in turn are shown
        for taken in stages.values():
            taken.clear()
        for _ in range(2):
            es_step(overlap=False)
            inference(overlap=False)
    images = engine.ask().images
    median = {  # the first of each warmed up
        variant: {name: statistics.median(taken[name] for taken in laps[1:]) for name in laps[0]}
        for variant, laps in stages.items()
    }
    rates = {name: images / spent for name, spent in median["step"].items() if name != "update"}
    score = {"median": median["step"]["score"]}
    return {
        "pixels": pixels,
        "population": engine.size,
        "images": images,
        "chunk": context.scale.chunk,
        "decode_chunk": context.scale.decode_chunk,
        **context.how(pixels),
        "inference_transformer": "compiled" if pixels in context.compiled else "eager",
        "check": check,
        "check_step": check_step,
        "seconds": seconds,
        "stages": median,
        "images_per_second": {**rates, "step": images / seconds["step"]["median"]},
        "roofline": {
            "score": roofline_share(context, score, score_work(context.scale.name, images), context.dtype),
        },
        "ratio": record.ratio(seconds["inference"], seconds["step"]),
    }


@torch.no_grad()
def loop(context: Context) -> dict[str, Any]:
    """A step of the published run by the two loops of `peers`, against ours. A few members are timed and scaled to N.

    The figure against the loop as published counts if a stored record says that the loop is as slow as the published
    code, see `bench/peer_ratio.py`.
    """
    pixels, total = context.scale.pixels[0], context.scale.reference_population
    check = context.checks(lambda: context.check_members(pixels))
    images = reference_loop.PROMPTS * reference_loop.REPEATS
    loops = {"as_published": _published(context, pixels), "shared": _shared(context, pixels)}
    checks = {
        name: context.checks(lambda loop=loop, model=model: _check_loop(context, loop, model, pixels, check["bound"]))
        for name, (loop, model) in loops.items()
    }
    batch = max(1, context.scale.chunk // images) + max(1, context.scale.chunk // images) % 2  # members, even
    engine = context.engine(population=batch, prompts=reference_loop.PROMPTS, repeats=reference_loop.REPEATS)
    task, shared = engine.ask(), loops["shared"][0]
    noise = shared.noise(STEP, total)
    turns = {name: itertools.cycle(range(total)) for name in loops}
    variants: dict[str, Callable[[], object]] = {
        name: lambda name=name, loop=loop: loop.evaluate(STEP, noise[next(turns[name])], task.prompts)
        for name, (loop, _) in loops.items()
    }
    variants["our_members"] = lambda: _score_task(
        context, context.model, task, pixels, Laps(context.device), context.population
    )
    seconds = interleaved(variants, context.scale.rounds[2], device=context.device)
    scores = torch.randn(total, reference_loop.PROMPTS, reference_loop.REPEATS)
    fitness = torch.linspace(-1, 1, total, device=context.device)
    updates = interleaved(
        {
            "reference_noise_and_update": lambda: shared.update(shared.noise(STEP, total), scores),
            "our_update": lambda: context.population.update(step=STEP, fitness=fitness),
        },
        context.scale.rounds[2],
        device=context.device,
    )
    outside = updates["reference_noise_and_update"]["median"]
    step_seconds = {name: total * seconds[name]["median"] + outside for name in loops}
    ours = total / batch * seconds["our_members"]["median"] + updates["our_update"]["median"]
    counts, why = peer_ratio.stored_verdict()
    return {
        "pixels": pixels,
        "population": total,
        "images_per_member": images,
        "reference_text_length": context.scale.reference_text,
        "reference_compiled": "no",
        "scaled": (
            f"from single members of the reference and {batch} members of ours, each to the population of {total}: "
            "members cost the same"
        ),
        **context.how(pixels),
        "check": {"population": check, **checks},
        "seconds": {**seconds, **updates},
        "step_seconds": {**step_seconds, "ours": ours},
        "ratios": {name: spent / ours for name, spent in step_seconds.items()},
        "as_published_counts": counts,
        "as_published_counts_by": why,
    }


def _shared(context: Context, pixels: int) -> tuple[reference_loop.SharedLoop, SanaSprint]:
    """The loop in our dtype, with our decoder and scorer, and the model whose weights it sets."""
    model = context.copy_of_plain()
    options = dict(settings=context.settings(pixels), text_length=context.scale.reference_text)
    return reference_loop.SharedLoop(model, context.texts, context.scorer, **options), model


def _published(context: Context, pixels: int) -> tuple[published.PublishedLoop, SanaSprint]:
    """The loop as published, on float32 copies, and the model whose weights it sets.

    Texts that are no prompts get the token ids of a prompt. The work is the same.
    """
    tokenize, prompts = context.scorer.encoder.tokenize, context.texts.prompts
    model = context.copy_of_plain()
    model.transformer.float()
    vae = copy.deepcopy(context.plain.vae).float().to(memory_format=torch.contiguous_format)
    pick = standin.clip(context.scale.name, device=context.device)
    small = standin.clip(context.scale.name, small=True, device=context.device, seed=1)
    judges = (
        published.made_up_judge(clip, lambda text: tokenize(text if text in prompts else prompts[0]))
        for clip in (pick, small)
    )
    scorer = published.Scorer(*judges)
    options = dict(pixels=pixels, text_length=context.scale.reference_text)
    return published.PublishedLoop(model.transformer, vae, context.texts, scorer, **options), model


@torch.no_grad()
def update(context: Context) -> dict[str, Any]:
    """The update of the whole adapter at N = `update_members`. Two tensors' gradients are checked member by member."""
    population, few = context.population, min(64, context.scale.update_members)
    fitness = torch.linspace(-1, 1, few, device=context.device)
    gradient = population.gradient(step=STEP, fitness=fitness)
    name, layer = next(iter(population.layers.items()))
    errors = []
    for side, streams in (("A", layer.streams[1::-1]), ("B", layer.streams[:1:-1])):
        key = f"{name}.lora_{side}.weight"
        noise = dict(seed=population.noise.seed, step=STEP, rank=population.noise.rank)
        with full_precision():
            expected = es_update_ref(
                fitness, shape=tuple(gradient[key].shape), stream_u=streams[0], stream_v=streams[1], **noise
            )
        errors.append(worst_error(few * gradient[key][None], expected[None]))
    check = context.checks(lambda: bounded(f"gradient of {name}", max(errors), 1e-5))
    full = torch.linspace(-1, 1, context.scale.update_members, device=context.device)
    seconds = interleaved(
        {"update": lambda: population.update(step=STEP, fitness=full)}, context.scale.rounds[1], device=context.device
    )["update"]
    return {"members": context.scale.update_members, "check": check, "seconds": seconds}


@torch.no_grad()
def memory(context: Context) -> dict[str, Any]:
    """Peak memory of a step by N at one chunk: the first, the last and two middle chunks, then the update from all N.

    The scores of the other chunks are random, because rendering is the same work for every chunk. On CUDA it is the
    peak of the allocator, on a CPU the bytes of live tensors.
    """
    pixels = context.scale.pixels[0]
    check = context.checks(lambda: context.check_members(pixels))
    context.scorer  # noqa: B018
    peaks = {members: _peak(context, lambda n=members: _few_chunks(context, n, pixels)) for members in _sizes(context)}
    *_, few, many = peaks
    return {
        "pixels": pixels,
        "chunk": context.scale.chunk,
        "prompts": context.scale.prompts,
        "repeats": context.scale.repeats,
        "check": check,
        "peak_bytes": peaks,
        "bytes_per_further_member": (peaks[many] - peaks[few]) / (many - few),
        "stored_member_bytes": sum(parameter.nbytes for parameter in context.population.parameters().values()),
    }


def _sizes(context: Context) -> tuple[int, ...]:
    chunk_members = context.scale.chunk // (context.scale.prompts * context.scale.repeats)
    return tuple(n for n in context.scale.memory_members if n >= chunk_members)


def _few_chunks(context: Context, members: int, pixels: int) -> None:
    engine = context.engine(population=members)
    task = engine.ask()
    scores = torch.randn(task.images, device=context.device)
    columns, chunk = task.rows(), context.scale.chunk
    last = task.images - chunk
    for first in sorted({0, last // 3 // chunk * chunk, last // 2 // chunk * chunk, last}):
        rows = Rows(*(column[first : first + chunk] for column in columns))
        scores[first : first + chunk] = _chunk(context, context.model, task, rows, pixels, None, engine.population)
    engine.tell(task, scores)


def _peak(context: Context, work: Callable[[], None]) -> int:
    context.model.release_graphs()
    gc.collect()
    if context.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(context.device)
        work()
        return torch.cuda.max_memory_allocated(context.device)
    with LiveBytes() as live:
        work()
    return live.peak


def _compile(context: Context, mode: str, pixels: int, exact: torch.Tensor, bound: float) -> dict[str, Any]:
    """Compile the plain transformer for this shape, and check it. Returns the model and the cost of its compilation.

    A failed check is in the result. The model is timed then too, and its ratio does not count.
    """
    options = {} if mode == "default" else {"mode": mode}
    options |= {"backend": context.compile_backend, "dynamic": False}
    model = copy.copy(context.plain)
    if context.compile_unit == "model":
        model.transformer = torch.compile(context.plain.transformer, **options)
    else:
        model.transformer = blocks_compiled(context.plain.transformer, **options)
    before, cached = context.time_left(), _inductor_cache()
    got = context.forward(model, pixels)[:1]
    if context.device.type == "cuda":
        torch.cuda.synchronize(context.device)
    seconds = before - context.time_left()
    check = Checks()(lambda: bounded(f"compiled {mode}", worst_error(got, exact), bound))
    cache = {name: count - cached[name] for name, count in _inductor_cache().items()}
    return {"first_call_seconds": seconds, "inductor_cache": cache, "check": check, "model": model}


def _inductor_cache() -> dict[str, int]:
    """How many graphs Inductor took from its cache in this process, and how many it compiled."""
    return {many: counters["inductor"][f"fxgraph_cache_{one}"] for one, many in (("hit", "hits"), ("miss", "misses"))}


def blocks_compiled(transformer: torch.nn.Module, **options) -> torch.nn.Module:
    """A transformer with the same weights whose blocks are compiled one by one. The given one stays eager.

    All blocks but the first share one artefact. The first block's input has the layout of the patch embedding. So there
    are two compilations for any number of blocks. diffusers calls this regional compilation.

    Args:
        transformer: has `transformer_blocks`.
        options: options of torch.compile.
    """
    model = copy.copy(transformer)
    model._modules = dict(transformer._modules)
    model.transformer_blocks = torch.nn.ModuleList(copy.copy(block) for block in transformer.transformer_blocks)
    for block in model.transformer_blocks:
        block.compile(**options)
    return model


def _score_task(
    context: Context,
    model: SanaSprint,
    task: esengine.es.engine.Task,
    pixels: int,
    laps: Laps,
    population: esengine.Population | None = None,
    overlap: bool = False,
) -> torch.Tensor:
    """float32 [N, P, R] of a whole task, chunk by chunk. Without a population every image is the plain model's.

    With overlap, a chunk is decoded while the next is denoised. The only lap is then `all but the update`.
    """
    chunks = task.rows().split(context.scale.chunk)
    if not overlap:
        parts = [_chunk(context, model, task, rows, pixels, laps, population) for rows in chunks]
        return torch.cat(parts).view(task.shape)
    if population is None:
        chunks = [rows._replace(members=None) for rows in chunks]
    drawn = model.render_chunks(
        context.texts,
        chunks,
        seed=0,
        step=task.step,
        population=population,
        settings=context.settings(pixels, overlap=True),
        text_length=context.scale.text_tokens,
    )
    words = ([context.texts.prompts[index] for index in rows.prompts.tolist()] for rows in chunks)
    scores = torch.cat([context.scorer(images, named) for images, named in zip(drawn, words, strict=True)])
    laps.lap("all but the update")
    return scores.view(task.shape)


def _chunk(context, model, task, rows, pixels, laps: Laps | None, population) -> torch.Tensor:
    """float32 [B] of one chunk."""
    settings = context.settings(pixels)
    x0_bchw = context.denoise(model, pixels, task.step, rows, population)
    if laps is not None:
        laps.lap("transformer")
    images = model.decode(x0_bchw, chunk=settings.decode_chunk, mode=settings.decode)
    if laps is not None:
        laps.lap("decode")
    scores = context.scorer(images, [context.texts.prompts[index] for index in rows.prompts.tolist()])
    if laps is not None:
        laps.lap("score")
    return scores


def _check_replay(pixels: int, variants: dict[str, Callable[[], torch.Tensor]], bound: float) -> dict[str, float]:
    """Check that a forward replayed from a graph, as `check_members` made it, equals that of single launches."""
    replayed = variants["population"]()
    return bounded(f"replay at {pixels} px", worst_error(replayed, variants["population launched"]()), bound)


def _check_step(context: Context, engine: esengine.Engine, pixels: int) -> None:
    """Check that a chunk's scores repeat bit for bit, are finite, and differ between members."""
    task = engine.ask()
    rows = task.rows().split(context.scale.chunk)[0]
    first, again = (_chunk(context, context.model, task, rows, pixels, None, engine.population) for _ in range(2))
    if not torch.equal(first, again):
        gap = (first - again).abs().max().item()
        raise CheckFailed(f"step at {pixels} px: expected the same scores twice, they differ by {gap:.2e}")
    one = rows[1] == rows[1][0]  # one prompt's
    if not first.isfinite().all() or not first[one.to(first.device)].std() > 0:
        raise CheckFailed(f"step at {pixels} px: expected finite scores that differ between members")


def _check_loop(
    context: Context, loop: reference_loop.ReferenceLoop, model: SanaSprint, pixels: int, bound: float
) -> dict[str, float]:
    """The loop's transformer with one of our members' weights set, against that member in higher precision."""
    prefix = esengine.es.population.PEFT_PREFIX
    state = context.population.member_state_dict(step=STEP, member=1)
    expected = Exact(context).forward(pixels, [1], state)
    loop.set_weights(loop.joined({name.removeprefix(prefix): tensor for name, tensor in state.items()}))
    got = context.forward(model, pixels, rows=[1])
    return bounded("reference loop", worst_error(got, expected), bound)
