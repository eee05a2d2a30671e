"""Measure launch settings on a device, and write the file that every later launch on that device reads.

    python bench/tune.py [--budget-minutes 8]                         on a CUDA device: kernels/configs/<device>.json
    TRITON_INTERPRET=1 python bench/tune.py --scale tiny --out FILE   everything at toy size; the figures mean nothing

A task is an op at a shape of SANA-Sprint. Candidates that fail the gate of `bench/aot.py` are dropped. Candidates whose
result differs from the reference are dropped too. The others are timed in turns, with a cold L2. The fastest becomes an
entry, with its median and the default's. There is no entry if the default is the fastest, or if the winner is not
faster by `MARGIN`. Then the paths of a linear are timed at each shape, with these settings. If no time is left for a
task, it keeps the default, and the file names it.
"""

import argparse
import hashlib
import itertools
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, get_args
from unittest.mock import patch

import aot
import record
import torch
from suite import clock

from esengine.kernels import (
    Lora,
    LowRank,
    MemberNoise,
    Modulation,
    configs,
    depthwise_gate,
    depthwise_gate_ref,
    es_update,
    es_update_ref,
    fused_linear,
    fused_linear_ref,
    linear_attention,
    linear_attention_ref,
    low_rank_part,
    low_rank_part_ref,
    member_factors,
    mix,
    mix_ref,
    population_linear,
    residual_norm,
    residual_norm_ref,
    rms_norm,
    rms_norm_ref,
    shrink,
    shrink_ref,
)
from esengine.kernels.factors import STORE_FROM
from esengine.kernels.noise import INTERPRET
from esengine.kernels.population_linear import Path as LinearPath

DTYPE = torch.bfloat16
LORA_RANK, NOISE_RANK, SIGMA = 2, 1, 0.1
BOUND = 2.0**-8
"""Relative error: twice that of rounding a norm to bf16. Wrong noise is an error of about `SIGMA`."""
MARGIN = 0.01
"""A candidate must be this much faster than the default. Smaller differences may be chance."""

Calls = tuple[Callable[[], Any], Callable[[], Any]]


class Scale(NamedTuple):
    """Sizes of a run: those of SANA-Sprint 1.6B, or of a toy.

    Attributes:
        width, text_width, channels, heads: of the transformer. channels: of the gated half of a Mix-FFN.
        sides: sides of the latent images, in tokens.
        text: tokens of a prompt.
        rows: members of a timed batch. A check has three.
        population: N of the timed update.
        rounds: samples of each candidate.
        most: candidates of a task besides the default.
    """

    width: int = 2240
    text_width: int = 2304
    channels: int = 5600
    heads: int = 70
    sides: tuple[int, ...] = (16, 32)
    text: int = 40
    rows: int = 64
    population: int = 1024
    rounds: int = 15
    most: int | None = None


SCALES = {
    "full": Scale(),
    "tiny": Scale(
        width=32, text_width=48, channels=16, heads=2, sides=(5,), text=3, rows=3, population=8, rounds=2, most=1
    ),
}


class Task(NamedTuple):
    """One op at one shape, and the launches that the winner is used for.

    Attributes:
        op: a name of `configs.OPS`.
        kernel: the kernel that it launches.
        values: the op's conditions at the shape.
        bands: [least, most] for the conditions that the winner covers as a range.
        grid: candidates, each a `launch` of an entry.
        build: build(rows, device) gives the op's call and its reference's, on operands of that many members.
    """

    op: str
    kernel: str
    values: dict[str, Any]
    bands: dict[str, list[int | None]]
    grid: list[dict[str, int]]
    build: Callable[[int, torch.device], Calls]

    @property
    def shape(self) -> str:
        return " ".join(f"{name} {value}" for name, value in self.values.items())


def tasks(scale: Scale) -> list[Task]:
    """The tasks in the order in which they are measured. What takes most of a forward comes first."""
    images = [side * side for side in scale.sides]
    width, text, found = scale.width, scale.text, []
    for t in images:
        found += [
            linear_task(t, width, width, images, targets=3),
            linear_task(t, width, width, images, gated=True),
            linear_task(t, width, 2 * scale.channels, images, targets=0, activation="silu"),
            linear_task(t, scale.channels, width, images, targets=0, gated=True),
            linear_task(t, width, 3 * width, images),
            linear_task(t, scale.text_width, width, images),
        ]
    for t in images:
        for targets, modulated in ((3, True), (1, False), (0, True)):
            found.append(shrink_task(t, width, targets, images, modulated=modulated))
        found.append(low_rank_task(t, width, width, images))
        found.append(attention_task(t, scale, images))
        found += [attention_low_task(t, scale, images), norm_task(t, width, images)]
        found += [residual_task(t, width, images, with_next=with_next) for with_next in (True, False)]
    found += [
        *(mix_task(t, width, images) for t in images),
        rstd_task(images[-1], scale),
        *(gate_task(side, scale.channels) for side in scale.sides),
    ]
    found += [linear_task(text, width, width, images, targets=2), linear_task(text, scale.text_width, width, images)]
    found += [linear_task(1, width, 6 * width, images), *(linear_task(t, width, 32, images) for t in images)]
    found += [shrink_task(text, width, 2, images), shrink_task(1, width, 1, images)]
    found += [update_task(rows, cols, scale.population) for rows, cols in ((LORA_RANK, width), (width, LORA_RANK))]
    return found


def linear_task(t: int, k: int, n: int, images: list[int], *, targets: int = 1, activation=None, gated=False) -> Task:
    """`fused_linear` of `targets` perturbed linears, or of a plain one for 0."""

    def build(rows: int, device: torch.device) -> Calls:
        draw, count = normals(device), max(targets, 1)
        options = {"activation": activation}
        if gated:
            options |= {"residual": draw(rows, t, n), "gate": draw(rows, 6, n)[:, 2]}
        if targets:
            columns = targets * (LORA_RANK + NOISE_RANK)
            given = adapted(draw, rows, targets, k, n)
            options |= given | {"h": draw(rows, t, columns, to=torch.float32), "factors": stored(given, t, k, n)}
        args = draw(rows, t, k), draw(count * n, k) * k**-0.5, None if gated else draw(count * n)
        return partial(fused_linear, *args, **options), partial(fused_linear_ref, *args, **options)

    if t <= 16:
        grid = product(BLOCK_M=(16,), BLOCK_N=(32, 64, 128), BLOCK_K=(64, 128), num_warps=(4, 8), num_stages=(3, 4))
    else:
        block_m = (32, 64) if t <= 128 else (64, 128)
        grid = product(BLOCK_M=block_m, BLOCK_N=(64, 128, 256), BLOCK_K=(64,), num_warps=(4, 8), num_stages=(3, 4))
    # of the accumulator, a thread has 128 registers at most
    grid = [each | {"GROUP_M": 8} for each in grid if each["BLOCK_M"] * each["BLOCK_N"] <= 4096 * each["num_warps"]]
    columns = LORA_RANK + NOISE_RANK if targets else 0
    values = dict(dtype=configs.dtype_name(DTYPE), t=t, k=k, n=n, columns=columns, residual=gated, gated=gated)
    return Task("fused_linear", "_linear_kernel", values, {"t": band(t, images)}, grid, build)


def shrink_task(t: int, k: int, targets: int, images: list[int], *, modulated: bool = False) -> Task:
    def build(rows: int, device: torch.device) -> Calls:
        draw = normals(device)
        table = draw(rows, 6, k)
        more = adapted(draw, rows, targets, k, k) if targets else {"adapters": None, "perturbation": None}
        options = more | {"modulation": Modulation(table[:, 0], table[:, 1]) if modulated else None}
        options["factors"] = stored(more, t, k, k) if targets else None
        x = draw(rows, t, k)
        return partial(shrink, x, **options), partial(shrink_ref, x, **options)

    grid = product(BLOCK_T=(16, 32, 64), BLOCK_K=(32, 64, 128), num_warps=(4, 8), num_stages=(3,))
    columns = targets * (LORA_RANK + NOISE_RANK)
    values = dict(dtype=configs.dtype_name(DTYPE), t=t, k=k, columns=columns, modulated=modulated)
    return Task("shrink", "_shrink_kernel", values, {"t": band(t, images)}, grid, build)


def path_shapes(scale: Scale) -> list[tuple[int, int, int]]:
    """T, K, N of the linears whose path is measured: attention, text, time and output."""
    width, images = scale.width, [side * side for side in scale.sides]
    found = [(t, width, width) for t in (*images, scale.text)]
    return [*found, (scale.text, scale.text_width, width), (1, width, 6 * width), *((t, width, 32) for t in images)]


def low_rank_task(t: int, k: int, n: int, images: list[int]) -> Task:
    """`low_rank_part` of one target."""

    def build(rows: int, device: torch.device) -> Calls:
        draw = normals(device)
        given, x, bias = adapted(draw, rows, 1, k, n), draw(rows, t, k), draw(n)
        options = given | {"n": n, "factors": stored(given, t, k, n)}
        return partial(low_rank_part, x, bias, **options), partial(low_rank_part_ref, x, bias, **options)

    grid = product(BLOCK_T=(16, 32, 64), BLOCK_K=(32, 64, 128), BLOCK_N=(64, 128), num_warps=(4, 8), num_stages=(3,))
    values = dict(dtype=configs.dtype_name(DTYPE), t=t, k=k, columns=LORA_RANK + NOISE_RANK)
    return Task("low_rank_part", "_low_rank_kernel", values, {"t": band(t, images)}, grid, build)


def path_of(t: int, k: int, n: int, scale: Scale, device: torch.device) -> dict[str, Any]:
    """An entry for `paths`: the faster path of one linear at a shape, and both medians."""
    draw = normals(device)
    x, weight, bias, given = draw(scale.rows, t, k), draw(n, k) * k**-0.5, draw(n), adapted(draw, scale.rows, 1, k, n)
    calls = {
        way: partial(population_linear, x, weight, bias, *given.values(), path=way) for way in get_args(LinearPath)
    }
    taken = clock.interleaved(calls, scale.rounds, device=device, cold=True)
    seconds = {way: each["median"] for way, each in taken.items()}
    images = [side * side for side in scale.sides]
    when = dict(dtype=configs.dtype_name(DTYPE), t=band(t, images), k=k, n=n)
    return {"when": when, "path": min(seconds, key=seconds.get), "measured": {"rows": scale.rows, "seconds": seconds}}


def attention_calls(t: int, width: int, heads: int, rows: int, device: torch.device) -> Calls:
    draw = normals(device)
    q, k, v = draw(rows, t, 3 * width).split(width, dim=-1)
    options = dict(heads=heads, norm_q=draw(width), norm_k=draw(width))
    return partial(linear_attention, q, k, v, **options), partial(linear_attention_ref, q, k, v, **options)


def attention_task(t: int, scale: Scale, images: list[int]) -> Task:
    build = partial(attention_calls, t, scale.width, scale.heads)
    grid = product(BLOCK_T=(16, 32, 64, 128), num_warps=(1, 2, 4), num_stages=(2, 3))
    values = dict(dtype=configs.dtype_name(DTYPE), t=t, d=scale.width // scale.heads)
    return Task("linear_attention", "_attention_kernel", values, {"t": band(t, images)}, grid, build)


def low_rank_of(draw: Callable, rows: int, t: int, targets: int, n: int) -> LowRank:
    """Low-rank parts of `targets` products of N columns, with stored factors, as in a block's path `consumer`."""
    given = adapted(draw, rows, targets, n, n)
    h = draw(rows, t, targets * (LORA_RANK + NOISE_RANK), to=torch.float32)
    return LowRank(h, *given.values(), stored(given, t, n, n))


def attention_low_task(t: int, scale: Scale, images: list[int]) -> Task:
    """`linear_attention` that adds the low-rank parts of q, k and v."""

    def build(rows: int, device: torch.device) -> Calls:
        draw = normals(device)
        args = draw(rows, t, 3 * scale.width).split(scale.width, dim=-1)
        options = dict(heads=scale.heads, norm_q=draw(scale.width), norm_k=draw(scale.width))
        options["low"] = low_rank_of(draw, rows, t, 3, scale.width)
        return partial(linear_attention, *args, **options), partial(linear_attention_ref, *args, **options)

    grid = product(BLOCK_T=(16, 32, 64), num_warps=(1, 2, 4), num_stages=(2, 3))
    columns = LORA_RANK + NOISE_RANK
    values = dict(dtype=configs.dtype_name(DTYPE), t=t, d=scale.width // scale.heads, columns=columns)
    return Task("linear_attention_low", "_attention_kernel", values, {"t": band(t, images)}, grid, build)


def residual_task(t: int, n: int, images: list[int], *, with_next: bool) -> Task:
    """`residual_norm` of a product with its low-rank part: gated, before a linear, or modulated."""
    columns = LORA_RANK + NOISE_RANK

    def build(rows: int, device: torch.device) -> Calls:
        draw = normals(device)
        args, table = (draw(rows, t, n), draw(rows, t, n)), draw(rows, 6, n)
        options: dict[str, Any] = {"low": low_rank_of(draw, rows, t, 1, n)}
        if with_next:
            reader = low_rank_of(draw, rows, t, 1, n)._replace(h=None, perturbation=options["low"].perturbation)
            options |= {"gate": table[:, 2], "next_lora": reader}
        else:
            options["modulation"] = Modulation(table[:, 0], table[:, 1])

        def flat(stream) -> tuple:
            return stream.z, stream.x, None if stream.next_lora is None else stream.next_lora.h

        return lambda: flat(residual_norm(*args, **options)), lambda: flat(residual_norm_ref(*args, **options))

    grid = product(BLOCK_T=(16, 32), BLOCK_N=(32, 64, 128), num_warps=(4, 8), num_stages=(3,))
    values = dict(dtype=configs.dtype_name(DTYPE), t=t, n=n, columns=columns, next_columns=columns if with_next else 0)
    return Task("residual_norm", "_residual_norm_kernel", values, {"t": band(t, images)}, grid, build)


def norm_task(t: int, n: int, images: list[int]) -> Task:
    """`rms_norm` of a product with its low-rank part."""

    def build(rows: int, device: torch.device) -> Calls:
        draw = normals(device)
        args = draw(rows, t, n), draw(n), 1e-5, low_rank_of(draw, rows, t, 1, n)
        return partial(rms_norm, *args), partial(rms_norm_ref, *args)

    grid = product(BLOCK_T=(16, 32), BLOCK_N=(32, 64, 128), num_warps=(4, 8), num_stages=(3,))
    values = dict(dtype=configs.dtype_name(DTYPE), t=t, n=n, columns=LORA_RANK + NOISE_RANK)
    return Task("rms_norm", "_rms_norm_kernel", values, {"t": band(t, images)}, grid, build)


def rstd_task(t: int, scale: Scale) -> Task:
    build = partial(attention_calls, t, scale.width, scale.heads)
    grid = product(BLOCK_M=(4, 8, 16), BLOCK_C=(256, 512, 1024), num_warps=(4, 8), num_stages=(3,))
    values = dict(dtype=configs.dtype_name(DTYPE), c=scale.width)
    return Task("linear_attention_rstd", "_rstd_kernel", values, {}, grid, build)


def mix_task(t: int, width: int, images: list[int]) -> Task:
    parts, columns = -(-width // 128), LORA_RANK + NOISE_RANK  # the partial sums of a linear with 128 columns in a tile

    def build(rows: int, device: torch.device) -> Calls:
        draw = normals(device)
        args = draw(parts, rows, t, columns, to=torch.float32), *adapted(draw, rows, 1, width, width).values()
        return partial(mix, *args), partial(mix_ref, *args)

    grid = product(BLOCK_T=(32, 64, 128, 256), num_warps=(1, 2, 4), num_stages=(3,))
    return Task("mix", "_mix_kernel", dict(t=t, columns=columns), {"t": band(t, images)}, grid, build)


def gate_task(side: int, channels: int) -> Task:
    def build(rows: int, device: torch.device) -> Calls:
        draw = normals(device)
        args = draw(rows, side * side, 2 * channels), draw(2 * channels, 1, 3, 3), draw(2 * channels)
        sizes = dict(height=side, width=side)
        return partial(depthwise_gate, *args, **sizes), partial(depthwise_gate_ref, *args, **sizes)

    tile = dict(BLOCK_W=(8, 16), BLOCK_C=(32, 64), num_warps=(4, 8), num_stages=(3,))
    grid = product(STRIP=(8, 16, 32), UNROLL=(2, 4), **tile)
    # two to eight channels of one column a thread
    grid = [each for each in grid if 64 <= each["BLOCK_W"] * each["BLOCK_C"] // each["num_warps"] <= 256]
    values = dict(dtype=configs.dtype_name(DTYPE), height=side, width=side, channels=channels)
    return Task("depthwise_gate", "_depthwise_gate_kernel", values, {}, grid, build)


def update_task(rows: int, cols: int, population: int) -> Task:
    def build(members: int, device: torch.device) -> Calls:
        # a check has few members, as the reference forms them one by one
        fitness = torch.linspace(-1, 1, population if members > 3 else 4, device=device)
        options = dict(shape=(rows, cols), stream_u=1, stream_v=2, seed=0, step=1, rank=NOISE_RANK)
        return partial(es_update, fitness, **options), partial(es_update_ref, fitness, **options)

    grid = product(BLOCK_L=(16, 32, 64, 128), BLOCK_S=(16, 32, 64, 128), num_warps=(1, 2, 4), num_stages=(3,))
    # a tile is no longer on its short side than the tensor
    short = "BLOCK_L" if rows <= 16 else "BLOCK_S"
    grid = [each for each in grid if each[short] == 16]
    return Task("es_update", "_update_kernel", dict(rows=rows, cols=cols), {}, grid, build)


def adapted(draw: Callable[..., torch.Tensor], rows: int, targets: int, k: int, n: int) -> dict[str, Any]:
    """Lora of `targets` linears, and the noise of one member for each row."""
    device = draw(1).device
    ids, streams = (torch.arange(size, device=device) for size in (rows, 4 * targets))
    a = draw(targets * LORA_RANK, k, to=torch.float32) * k**-0.5
    b = draw(targets * n, LORA_RANK, to=torch.float32)
    adapters = Lora(a, b, 4.0, streams.view(targets, 4))
    # as the model gives it: a tensor that the kernels read
    step = torch.full((1,), 1, dtype=torch.int64, device=device)
    return {"adapters": adapters, "perturbation": MemberNoise(ids, 0, step, SIGMA, NOISE_RANK)}


def stored(given: dict[str, Any], t: int, k: int, n: int) -> torch.Tensor | None:
    """Their factors, if a block stores them."""
    return member_factors(*given.values(), k=k, n=n) if t >= STORE_FROM else None


def normals(device: torch.device) -> Callable[..., torch.Tensor]:
    """Gives draw(*shape, to=DTYPE). Every build draws the same numbers."""
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)

    def draw(*shape: int, to: torch.dtype = DTYPE) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=to)

    return draw


def product(**choices: Sequence[int]) -> list[dict[str, int]]:
    """Every combination, as a dict each."""
    return [dict(zip(choices, chosen, strict=True)) for chosen in itertools.product(*choices.values())]


def band(t: int, images: list[int]) -> list[int | None]:
    """The range of rows a member that a measurement at `t` is used for: up to 16, text, or the nearest image size."""
    if t not in images:
        return [None, 16] if t <= 16 else [17, 128]
    place = images.index(t)
    least = 129 if place == 0 else 1 + 2 * images[place - 1]
    return [min(least, t), None if place == len(images) - 1 else 2 * t]


def settings_file(folder: Path, op: str, launch: dict[str, int]) -> Path:
    """The default file with these settings for every launch of `op`. Written and read once."""
    contents = json.loads(configs.DEFAULT.read_text())
    contents["ops"][op] = [{"when": {}, "launch": launch}]
    text = json.dumps(contents)
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()}.json"  # files are kept by path: one for each content
    if not path.exists():
        path.write_text(text)
    configs.load(path)
    return path


@contextmanager
def choosing() -> Iterator[Callable[[Path], None]]:
    """Gives choose(file): from then on, until the end, launches read that file. It costs a launch no time."""
    chosen = [configs.DEFAULT]
    with patch.object(configs, "config_file", lambda device: chosen[0]):
        yield partial(chosen.__setitem__, 0)


@contextmanager
def using(folder: Path, op: str, launch: dict[str, int]) -> Iterator[None]:
    """Inside, every launch of `op` has these settings, and other launches have the default ones."""
    with choosing() as choose:
        choose(settings_file(folder, op, launch))
        yield


def default_launch(task: Task) -> dict[str, int]:
    with patch.dict(os.environ, {configs.OVERRIDE: str(configs.DEFAULT)}):
        return configs.settings(task.op, torch.device("cpu"), **task.values)


def candidates(task: Task, most: int | None) -> list[dict[str, int]]:
    """The default first, then at most `most` of the grid."""
    first = default_launch(task)
    return [first, *[each for each in task.grid if each != first][:most]]


def fault(scale: Scale, index: int, launch: dict[str, int], arch: int) -> str | None:
    """Why the compile gate rejects a candidate. None if it passes."""
    task = tasks(scale)[index]
    with (
        tempfile.TemporaryDirectory() as folder,
        using(Path(folder), task.op, launch),
        aot.recorded_launches() as recorded,
    ):
        call, _ = task.build(scale.rows, torch.device("meta"))
        recorded.clear()  # what the operands took
        call()
    try:
        for kernel, args, kwargs in recorded:
            if kernel.fn.__name__ == task.kernel:
                row = aot.judge(*aot.compiled(kernel, args, kwargs, arch), arch)
                if "fault" in row:
                    return row["fault"]
    except Exception as error:  # a candidate may fail to compile in any way; it is only dropped
        return f"{type(error).__name__}: {error}"[:300]
    return None


def wrong(got: Any, expected: Any) -> str | None:
    """The error of an output, if it is more than `BOUND` of its norm."""
    for g, e in zip(*(x if isinstance(x, tuple) else (x,) for x in (got, expected)), strict=True):
        if e is None:
            continue
        error = (g.double() - e.double()).norm() / e.double().norm()
        if not error <= BOUND:  # NaN too
            return f"off the reference by {error:.2e} of its norm, bound {BOUND:.2e}"
    return None


def measure(task: Task, launches: list[dict[str, int]], scale: Scale, device: torch.device, folder: Path) -> dict:
    """An entry for the fastest of `launches`. The first is the default. If it is the fastest, there is no `launch`.

    Only calls are timed. A candidate's settings are resolved by a call before the clock starts.
    """
    call, reference = task.build(min(3, scale.rows), device)
    expected, dropped, right = reference(), [], {}
    for index, launch in enumerate(launches):
        try:
            with using(folder, task.op, launch):
                reason = wrong(call(), expected)
        except Exception as error:  # such as too much shared memory
            reason = f"{type(error).__name__}: {error}"[:300]
        if reason is None:
            right[index] = launch
        else:
            dropped.append({"launch": launch, "reason": reason})
    if 0 not in right:
        raise RuntimeError(f"{task.op} {task.shape}: the default itself fails: {dropped[0]['reason']}")
    call, _ = task.build(scale.rows, device)

    with choosing() as choose:

        def timed(file: Path) -> None:
            choose(file)
            call()

        variants = {str(i): partial(timed, settings_file(folder, task.op, launch)) for i, launch in right.items()}
        taken = clock.interleaved(variants, scale.rounds, device=device, cold=True)
    seconds = {name: each["median"] for name, each in taken.items()}
    best = min(seconds, key=seconds.get)
    faster = seconds[best] < (1 - MARGIN) * seconds["0"]
    measured = {
        "at": task.shape,
        "rows": scale.rows,
        "seconds": seconds[best if faster else "0"],
        "default_seconds": seconds["0"],
        "timed": len(right),
        "dropped": dropped,
    }
    chosen = {"launch": right[int(best)]} if faster else {}
    return {"when": task.values | task.bands} | chosen | {"measured": measured}


def tune(scale: Scale, device: torch.device, *, deadline: float, jobs: int, command: str) -> dict[str, Any]:
    """The contents of the device's file. Prints a line for each task."""
    every = tasks(scale)
    offered = [candidates(task, scale.most) for task in every]
    arch = None
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        arch = 10 * major + minor
    entries: dict[str, list[dict]] = {op: [] for op in configs.OPS}
    kept, unmeasured = [], []
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool,
    ):
        # the interpreter compiles nothing, so that there is nothing to judge
        judged = [
            [pool.submit(fault, scale, index, launch, arch) for launch in launches] if not INTERPRET else []
            for index, launches in enumerate(offered)
        ]
        for task, launches, futures in zip(every, offered, judged, strict=True):
            if time.monotonic() > deadline:
                unmeasured.append(f"{task.op} {task.shape}")
                for future in futures:
                    future.cancel()
                continue
            faults = [future.result() for future in futures] or [None] * len(launches)
            # the default stays: what it does is what a winner is compared with
            passed = [launch for i, launch in enumerate(launches) if i == 0 or faults[i] is None]
            entry = measure(task, passed, scale, device, Path(folder))
            entry["measured"]["faulted"] = len(launches) - len(passed)
            (entries[task.op] if "launch" in entry else kept).append(entry)
            figures = entry["measured"]
            gain = figures["default_seconds"] / figures["seconds"]
            print(f"{task.op}  {task.shape}  {1e6 * figures['seconds']:.1f} us, {gain:.3f}x the default", flush=True)
    usual, paths = configs.load(configs.DEFAULT)["ops"], []
    ops = {op: found + usual[op] for op, found in entries.items()}
    with tempfile.TemporaryDirectory() as folder, choosing() as choose:
        file = Path(folder) / "tuned.json"
        file.write_text(json.dumps({"made": configs.load(configs.DEFAULT)["made"], "ops": ops}))
        choose(file)
        for t, k, n in path_shapes(scale):
            if time.monotonic() > deadline:
                unmeasured.append(f"paths t {t} k {k} n {n}")
                continue
            paths.append(path_of(t, k, n, scale, device))
            print(f"path  t {t} k {k} n {n}  {paths[-1]['path']}", flush=True)
    about = record.environment(device) | {"kernel_settings": None}
    made = {"command": command, "arch": arch, "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    made |= about | {"default_kept": kept, "unmeasured": unmeasured}
    return {"made": made, "ops": ops, "paths": {"population_linear": paths}}


def main(words: list[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--budget-minutes", type=float, default=8, help="no task is begun after that")
    parser.add_argument("--out", type=Path, help="the file to write; default: the device's own in kernels/configs")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="compilers at a time")
    options = parser.parse_args(words)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not INTERPRET:
        parser.error("device: expected a CUDA device, or TRITON_INTERPRET=1 for the toy size, got neither")
    if device.type == "cpu" and options.out is None:
        parser.error("out: expected a file, as what the interpreter finds is for no device")
    deadline = time.monotonic() + 60 * options.budget_minutes
    command = shlex.join(["python", "bench/tune.py", *words])
    with torch.no_grad():
        contents = tune(SCALES[options.scale], device, deadline=deadline, jobs=options.jobs, command=command)
    out = options.out or configs.FOLDER / f"{configs.slug(torch.cuda.get_device_name(device))}.json"
    record.write(out, contents)
    configs.load(out)
    print(f"{out}: {sum(map(len, contents['ops'].values()))} entries, {len(contents['made']['unmeasured'])} tasks left")
    return 0


if __name__ == "__main__":
    sys.exit(main())
