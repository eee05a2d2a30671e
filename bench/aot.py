"""Compile every Triton kernel at SANA-Sprint's shapes without a GPU, and check the machine code.

    python bench/aot.py [--arch 90 80 100] [--json FOLDER] [--also FOLDER_WITH_ANOTHER_TRITON ...]
    TRITON_CACHE_DIR=FOLDER python bench/aot.py --cache        kernels for another machine, which then compiles none

A forward of the model and the public ops run on tensors without storage. Each of their launches is compiled and not
run, with the launcher's configuration and Triton's specialisation. Shapes that share a kernel are compiled once. A
launch that has other settings on some device is compiled for that device too. The report has for each kernel:
registers, spill instructions, shared memory, tensor-core instructions; and for the main loop its instructions and
waits, read from the machine code. The main loop is the innermost loop with the most tensor-core work. `wgmma 1`: one
group of products may still run in the next iteration. `wgmma 0`: each iteration waits for all products.

The exit code is 1 if a kernel spills registers, serialises its main loop, has more instructions in it than
`LOOP_LIMITS` allows, needs too much shared memory, or is launched by no entry of `OPS`; or if a kernel does not compile
for sm_90. For other architectures only the shapes of the reference run are compiled. Kernels that Triton cannot compile
there are counted separately.
"""

import argparse
import importlib
import io
import math
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import cache, partial
from itertools import chain, product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, get_args
from unittest.mock import patch

import record
import torch
import triton
from peft import LoraConfig
from suite import standin
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import esengine.es.population
import esengine.kernels
from esengine.es.population import attach
from esengine.kernels import (
    Lora,
    LowRank,
    MemberNoise,
    Modulation,
    configs,
    depthwise_gate,
    es_update,
    fused_linear,
    linear_attention,
    member_factors,
    normals,
    population_linear,
    residual_norm,
    rms_norm,
    shrink,
    takes_low,
)
from esengine.kernels.configs import dtype_name
from esengine.kernels.population_linear import Path as LinearPath
from esengine.models.families import REFERENCE_TARGETS
from esengine.models.sana.sana_block import fused_parts, patched

SUMMARY = "aot: kernels without spills or a serialised main loop: "
TARGET = 90
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""Bytes of shared memory that one block may have, by architecture."""

LOOP_LIMITS = {("shrink", 3, 2, True, "tf32x3"): 400}
"""Instructions that a round of the main loop, a step of K, may have: by kernel, targets, r, modulated and precision.

q|k|v of the reference run: there the kernel is bound by issue slots, not by bytes."""

TENSOR_CORES = {
    "wgmma": re.compile(r"\b[HQI]GMMA\.(\d+x\d+x\d+)"),
    "tcgen05": re.compile(r"\b()UTC[HQIO]MMA\b"),
    "mma.sync": re.compile(r"\b()[HQIDO]MMA\."),
}
WAITS = {
    "wgmma": re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\w+)"),
    "cp.async": re.compile(r"(?<!WARPGROUP\.)DEPBAR\.LE SB0, 0x(\w+)"),
    "mbarrier": re.compile(r"SYNCS\.PHASECHK()"),
}
"""Waits for products and for copies. A number is how many groups may still be under way; an mbarrier has none."""


class Case(NamedTuple):
    """One call of a public op on tensors without storage, at one shape."""

    shape: str
    call: Callable[[], object]
    reference: bool = True
    """A shape and dtype of the reference run: compiled for every architecture."""


class Launch(NamedTuple):
    """One kernel launch of a case with one file of settings. `arch` is the file's architecture, or None for any.

    Launches of several shapes that Triton compiles to one kernel are one Launch with all the shapes.
    """

    shape: str
    reference: bool
    file: str
    arch: int | None
    kernel: JITFunction
    args: tuple
    kwargs: dict[str, Any]


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def linear_cases() -> Iterator[Case]:
    """Attention, text tokens, time embedding, output projection. Other dtypes and ranks at three of the shapes."""
    shapes = [
        (2240, 2240, 1024),
        (2240, 2240, 256),
        (2304, 2240, 40),
        (2240, 13440, 1),
        (2240, 32, 1024),
        (256, 2240, 1),
    ]
    ranks = {
        torch.bfloat16: ((2, 1), (16, 4), (0, 1), (64, 1), (128, 1)),
        torch.float16: ((2, 1),),
        torch.float32: ((2, 1), (16, 4), (0, 1)),
    }
    for dtype, pairs in ranks.items():
        for r, k in pairs:
            reference = (dtype, r) == (torch.bfloat16, 2)
            for n_in, n_out, tokens in shapes if reference else shapes[1:4]:
                bias = empty(n_out, dtype=dtype) if r else None
                a, b = (empty(r, n_in), empty(n_out, r)) if r else (None, None)
                call = partial(
                    population_linear,
                    empty(64, tokens, n_in, dtype=dtype),
                    empty(n_out, n_in, dtype=dtype),
                    bias,
                    Lora(a, b, 4.0, empty(1, 4, dtype=torch.int64)),
                    MemberNoise(empty(64, dtype=torch.int64), seed=0, step=1, sigma=1e-2, rank=k),
                )
                for path in get_args(LinearPath):
                    name = f"{n_in}->{n_out} x{tokens} {dtype_name(dtype)} r{r} k{k}, {path}"
                    yield Case(name, partial(call, path=path), reference and path == "epilogue")


def update_cases() -> Iterator[Case]:
    for shape, k in (((2, 2240), 1), ((13440, 16), 4), ((2240, 2240), 1)):
        call = partial(es_update, empty(128), shape=shape, stream_u=1, stream_v=2, seed=0, step=1, rank=k)
        yield Case(f"{shape[0]}x{shape[1]} k{k}", call)


def normals_cases() -> Iterator[Case]:
    ids = empty(8, dtype=torch.int64)
    yield Case("8x32768", partial(normals, seed=0, step=1, streams=ids, pairs=ids, count=32768, device="meta"))


def gate_cases() -> Iterator[Case]:
    """The Mix-FFN of a 512 px and of a 1024 px image."""
    channels = 5600
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for side in (16, 32):
            x, weight = empty(64, side**2, 2 * channels, dtype=dtype), empty(2 * channels, 1, 3, 3, dtype=dtype)
            call = partial(depthwise_gate, x, weight, empty(2 * channels, dtype=dtype), height=side, width=side)
            yield Case(f"{channels} channels {side}x{side} {dtype_name(dtype)}", call, dtype == torch.bfloat16)


def attention_cases() -> Iterator[Case]:
    """70 heads of 32, with the norms across heads; q, k and v are slices of one projection."""
    heads, width = 70, 2240
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for tokens in (256, 1024):
            q, k, v = empty(64, tokens, 3 * width, dtype=dtype).split(width, dim=-1)
            norm = empty(width, dtype=dtype)
            call = partial(linear_attention, q, k, v, heads=heads, norm_q=norm, norm_k=norm)
            yield Case(f"{heads} heads of 32 x{tokens} {dtype_name(dtype)}", call, dtype == torch.bfloat16)


def block_cases() -> Iterator[Case]:
    """Launches of a fused block besides the plain linear, in fp32 too and at other ranks than the forward's."""
    width, channels = 2240, 5600
    perturbation = MemberNoise(empty(64, dtype=torch.int64), seed=0, step=1, sigma=1e-2, rank=1)
    for dtype in (torch.bfloat16, torch.float32):
        ranks = (16, 64) if dtype == torch.bfloat16 else (2, 16, 64)
        table = empty(64, 6, width, dtype=dtype)
        modulation, gate = Modulation(table[:, 0], table[:, 1]), table[:, 2]

        def weight(n: int, k: int, dtype=dtype) -> torch.Tensor:
            return empty(n, k, dtype=dtype)

        for tokens in (256, 1024):
            x, wide = empty(64, tokens, width, dtype=dtype), empty(64, tokens, channels, dtype=dtype)
            calls = {
                "modulated": partial(shrink, x, None, None, modulation),
                "silu": partial(
                    fused_linear, x, weight(2 * channels, width), empty(2 * channels, dtype=dtype), activation="silu"
                ),
                "gated": partial(fused_linear, wide, weight(width, channels), residual=x, gate=gate),
            }
            gated = {"residual": x, "gate": gate}
            stacks = [(3, r, {}) for r in ranks] + ([(2, 2, {}), (1, 2, gated)] if 2 in ranks else [])
            for targets, r, options in stacks:
                streams = empty(targets, 4, dtype=torch.int64)
                adapters = Lora(empty(r * targets, width), empty(targets * width, r), 4.0, streams)
                h = empty(64, tokens, (r + 1) * targets)
                with recorded_launches():
                    factors = member_factors(adapters, perturbation, k=width, n=width)
                given = (x, adapters, perturbation, modulation, factors)
                calls[f"modulated, {targets} targets of r{r}"] = partial(shrink, *given)
                calls[f"{targets} targets of r{r}{', gated' if options else ''}"] = partial(
                    fused_linear, x, weight(targets * width, width), empty(targets * width, dtype=dtype),
                    h=h, adapters=adapters, perturbation=perturbation, factors=factors, **options,
                )  # fmt: skip
            for name, call in calls.items():
                yield Case(f"block: {name} x{tokens} {dtype_name(dtype)}", call, reference=False)


def consumer_cases() -> Iterator[Case]:
    """The ops that add a low-rank part to a product that they read, in every dtype and at several ranks."""
    width, heads = 2240, 70
    ranks = {
        torch.bfloat16: ((2, 1), (16, 4), (0, 1), (64, 1), (128, 1)),
        torch.float16: ((2, 1),),
        torch.float32: ((2, 1), (16, 4), (0, 1), (64, 1)),
    }
    for dtype, r, k, stored in (
        *((dtype, r, k, True) for dtype, pairs in ranks.items() for r, k in pairs),
        (torch.bfloat16, 2, 1, False),
        (torch.float32, 2, 1, False),
    ):
        perturbation = MemberNoise(empty(64, dtype=torch.int64), seed=0, step=1, sigma=1e-2, rank=k)
        for tokens in (256, 1024) if stored else (8, 256):
            lows = {}
            for targets in (1, 3):
                a, b = (empty(r * targets, width), empty(targets * width, r)) if r else (None, None)
                adapters = Lora(a, b, 4.0, empty(targets, 4, dtype=torch.int64))
                with recorded_launches():
                    factors = member_factors(adapters, perturbation, k=width, n=width) if stored else None
                lows[targets] = LowRank(empty(64, tokens, targets * (r + k)), adapters, perturbation, factors)
            table, norm = empty(64, 6, width, dtype=dtype), empty(width, dtype=dtype)
            modulation, gate, low = Modulation(table[:, 0], table[:, 1]), table[:, 2], lows[1]
            y = empty(64, tokens, width, dtype=dtype)
            qkv = empty(64, tokens, 3 * width, dtype=dtype).split(width, dim=-1)
            attention = partial(linear_attention, *qkv, heads=heads, norm_q=norm, norm_k=norm, low=lows[3])
            calls = {
                "norm": partial(rms_norm, y, norm, 1e-5, low),
                "gated, then": partial(residual_norm, y, y, gate=gate, low=low, next_lora=low._replace(h=None)),
                "modulated": partial(residual_norm, y, y, low=low, modulation=modulation),
            } | ({"attention": attention} if takes_low(lows[3].adapters, k) else {})
            for name, call in calls.items():
                noise = "stored" if stored else "rebuilt"
                yield Case(f"consumer: {name} x{tokens} {dtype_name(dtype)} r{r} k{k} {noise}", call, reference=False)


def forward_cases(paths: Sequence[str] = configs.PATHS["sana_block"].names) -> Iterator[Case]:
    """The launches of a forward of SANA-Sprint 1.6B with the reference run's targets, at 512 and 1024 px, by each path.

    The model runs on tensors without storage, and each launch is a case. Two blocks are enough: the first has the input
    from the patch embedding, and the second stands for the others.
    """
    model = standin.transformer(device="meta", dtype=torch.bfloat16)
    model.transformer_blocks = model.transformer_blocks[:2]
    members, text = torch.arange(64), empty(64, 40, model.config.caption_channels, dtype=torch.bfloat16)
    inputs = dict(encoder_attention_mask=empty(64, 40, dtype=torch.int64), timestep=empty(64), guidance=empty(64))
    model.to_empty(device="cpu")  # attach wants weights in memory
    with recorded_launches():
        population = attach(model, LoraConfig(r=2, lora_alpha=8, target_modules=list(REFERENCE_TARGETS)))
        model.to("meta")
    chosen = configs.path
    for path, side in product(paths, (16, 32)):
        x = empty(64, model.config.in_channels, side, side, dtype=torch.bfloat16)

        def by_path(op: str, *args, path: str = path, **conditions) -> str:
            return path if op == "sana_block" else chosen(op, *args, **conditions)

        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(patch.object(configs, "path", by_path))
            recorded = stack.enter_context(recorded_launches())
            stack.enter_context(population.perturbed(step=1, members=members))
            parts = fused_parts(model, True)
            assert parts, "the blocks have no fused form"
            with patched(parts, population.perturbation):
                model(x, text, **inputs)
        for kernel, args, kwargs in recorded:
            sizes = {name: kwargs[name] for name in ("M", "N", "K", "T", "H", "W", "C", "PARTS") if name in kwargs}
            shape = " ".join(f"{name} {value}" for name, value in sizes.items())
            name = f"forward: {shape} bfloat16" + f", {path}" * (path != "epilogue")
            yield Case(name, partial(kernel[(1,)], *args, **kwargs), path == "epilogue")


OPS = (
    forward_cases,
    linear_cases,
    block_cases,
    consumer_cases,
    update_cases,
    normals_cases,
    gate_cases,
    attention_cases,
)
"""An entry for the whole forward and for each op: its calls at the shapes that matter."""


def modules() -> list:
    """Every module of `esengine.kernels`."""
    found = pkgutil.iter_modules(esengine.kernels.__path__, "esengine.kernels.")
    return [importlib.import_module(module.name) for module in found]


@contextmanager
def recorded_launches() -> Iterator[list[tuple[JITFunction, tuple, dict]]]:
    """Inside, the ops take the Triton path on meta tensors. Their launches are recorded, not run."""
    launches = []

    def note(kernel, *args, grid, warmup, **kwargs):
        launches.append((kernel, args, kwargs))

    with ExitStack() as stack:
        stack.enter_context(patch.object(JITFunction, "run", note))
        stack.enter_context(patch.object(torch, "is_autocast_enabled", lambda *device: False))  # it knows no meta
        for module in (*modules(), esengine.es.population):
            if hasattr(module, "uses_triton"):
                stack.enter_context(patch.object(module, "uses_triton", lambda device: True))
        yield launches


def launches_with(file: Path) -> list[Launch]:
    """Every launch of every case, with the settings of one file."""
    found, arch = [], configs.load(file)["made"]["arch"]
    with patch.dict(os.environ, {configs.OVERRIDE: str(file)}):
        for case in chain.from_iterable(op() for op in OPS):
            with recorded_launches() as recorded:
                case.call()
            found += [Launch(case.shape, case.reference, file.name, arch, *launch) for launch in recorded]
    return found


def built_for(launch: Launch) -> tuple:
    """A key for the kernel that Triton would specialise for the launch. Launches with equal keys share a kernel."""

    def kind(name: str, value: Any) -> Any:
        parameter = parameters.get(name)
        if isinstance(value, torch.Tensor):
            return value.dtype
        if parameter is None or parameter.is_constexpr or not isinstance(value, (int, float)):
            return value
        if isinstance(value, float) or parameter.do_not_specialize:
            return type(value)
        return value == 1, value % 16 == 0, -(1 << 31) <= value < 1 << 31

    parameters = {parameter.name: parameter for parameter in launch.kernel.params}
    values = dict(zip(parameters, launch.args, strict=False)) | launch.kwargs
    return launch.kernel.fn.__name__, *((name, kind(name, values[name])) for name in sorted(values))


@cache
def launches() -> list[Launch]:
    """Every launch with the default settings, and those that a device's file adds. Each kernel once."""
    found: dict[tuple, Launch] = {}
    files = sorted(set(configs.FOLDER.glob("*.json")) - {configs.DEFAULT})
    for launch in chain.from_iterable(map(launches_with, (configs.DEFAULT, *files))):
        built = built_for(launch)
        key = built if launch.arch is None or built in found else (*built, launch.arch)
        kept = found.setdefault(key, launch)
        shapes = dict.fromkeys((*kept.shape.split("; "), launch.shape))
        found[key] = kept._replace(shape="; ".join(shapes), reference=kept.reference or launch.reference)
    return list(found.values())


def unlaunched() -> list[str]:
    """Kernels of the package that no case launches."""
    here = {
        value.fn.__name__
        for module in modules()
        for value in vars(module).values()
        if isinstance(value, JITFunction) and value.fn.__name__.endswith("_kernel")
    }
    return sorted(here - {launch.kernel.fn.__name__ for launch in launches()})


class AbsentGPU:
    """What Triton's runtime asks of a driver before a launch, for a GPU that is not there."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # keeps the architectures apart in Triton's cache of compiled kernels

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(kernel: JITFunction, args: tuple, kwargs: dict[str, Any], arch: int) -> tuple[Any, str]:
    """The kernel of one launch as the runtime would compile it, and the log of ptxas."""
    with (
        patch.object(triton.runtime.driver, "_active", AbsentGPU(arch)),
        patch.dict(kernel.device_caches, clear=True),
        triton.knobs.nvidia.scope(),
        triton.knobs.compilation.scope(),
        redirect_stdout(io.StringIO()) as ptxas_log,
    ):
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.compilation.always_compile = True  # a cached kernel has no log
        return kernel.warmup(*args, grid=(1,), **kwargs), ptxas_log.getvalue()


def fill_cache(arch: int) -> tuple[int, int]:
    """Compile every kernel of `launches()` into Triton's cache, TRITON_CACHE_DIR, as the runtime stores it.

    Returns:
        The number of kernels, and how many of them were compiled now. The second time it is 0.
    """
    compiles = 0

    def on_compile(*, cache_hit: bool, **facts) -> None:
        nonlocal compiles
        compiles += not cache_hit

    here = [launch for launch in launches() if launch.arch in (None, arch)]
    with patch.object(triton.runtime.driver, "_active", AbsentGPU(arch)), triton.knobs.compilation.scope():
        triton.knobs.compilation.listener = on_compile
        for launch in here:
            with patch.dict(launch.kernel.device_caches, clear=True):
                launch.kernel.warmup(*launch.args, grid=(1,), **launch.kwargs)
    return len(here), compiles


def disassembly(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout


def main_loop(sass: str) -> str:
    """The innermost loop with the most tensor-core work, from a branch's target to the branch. "" if there is none.

    If two spans overlap, the shorter is the loop. The longer is a loop around it, or a wait that the compiler moved
    away and that jumps back.
    """
    lines = sass.splitlines()
    labels = {line.split(":")[0]: index for index, line in enumerate(lines) if line.startswith(".L")}
    spans = []
    for end, line in enumerate(lines):
        branch = re.search(r"\bBRA\S* .*`\((\.L\w+)\)", line)
        if branch and labels[branch[1]] < end:
            spans.append((labels[branch[1]], end))
    loops: dict[tuple[int, int], int] = {}
    for start, end in sorted(spans, key=lambda span: span[1] - span[0]):
        work = tensor_core_work("\n".join(lines[start:end]))
        if work and all(end < first or last < start for first, last in loops):
            loops[start, end] = work
    start, end = max(loops, key=loops.get, default=(0, 0))
    return "\n".join(lines[start:end])


def tensor_core_work(sass: str) -> int:
    """Number of tensor-core instructions, each weighted by its m n k if its name has them."""
    found = chain.from_iterable(pattern.findall(sass) for pattern in TENSOR_CORES.values())
    return sum(math.prod(map(int, re.findall(r"\d+", name))) for name in found)


def drains(code: str, groups: list[int], unrolled: bool) -> bool:
    """Whether each iteration of a main loop waits for all products, although that is not needed.

    If no loop is left, the waits are judged except for the last and an epilogue's, which must wait for all products.
    """
    if unrolled:
        return len(groups) > 3 and groups.count(0) > len(groups) / 2
    first: dict[str, str] = {}
    for register, operands in re.findall(r"\b[HQI]GMMA\.\S+ (R\d+),(.*)", code):
        first.setdefault(register, operands)
    return 0 in groups and any("RZ" not in operands for operands in first.values())


def judge(kernel, log: str, arch: int) -> dict[str, Any]:
    """The figures of a row. If the kernel must not be used as it is, "fault" says why."""
    sass = disassembly(kernel.asm["cubin"])
    counts = {kind: len(pattern.findall(sass)) for kind, pattern in TENSOR_CORES.items()}
    loop, waits = main_loop(sass), {}
    code = loop or (sass if counts["wgmma"] else "")
    for kind, pattern in WAITS.items():
        if found := pattern.findall(code):
            waits[kind] = [int(groups, 16) for groups in found if groups]
    row = {
        "registers": int(re.search(r"Used (\d+) registers", log)[1]),
        "stack": int(re.search(r"(\d+) bytes stack frame", log)[1]),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "shared": kernel.metadata.shared,
        "mma": sum(counts.values()),
        "mma_kind": next((kind for kind, count in counts.items() if count), None),
        "main_loop": bool(loop),
        "loop_instructions": len(re.findall(r"/\*[0-9a-f]{4,}\*/ +\S", loop)),
        "waits": waits,
    }
    warning = re.search(r"wgmma\.mma_async instructions are serialized.*", log)
    if row["spills"]:
        row["fault"] = "spills registers"
    elif warning or drains(code, waits.get("wgmma", []), not loop):
        row["fault"] = "serialised main loop: " + (warning[0] if warning else "a round waits for all of its products")
    elif row["shared"] > SHARED_LIMIT.get(arch, row["shared"]):
        row["fault"] = f"needs {row['shared']} bytes of shared memory, sm_{arch} has {SHARED_LIMIT[arch]}"
    return row


def row_of(index: int, arch: int) -> dict[str, Any]:
    """The row of the report for one launch of `launches()`."""
    launch = launches()[index]
    config = {
        parameter.name: launch.kwargs[parameter.name] for parameter in launch.kernel.params if parameter.is_constexpr
    }
    head = {"arch": arch, "kernel": launch.kernel.fn.__name__.strip("_"), "shape": launch.shape, "file": launch.file}
    row = head | {"config": config}
    try:
        kernel, log = compiled(launch.kernel, launch.args, launch.kwargs, arch)
        config |= {name: getattr(kernel.metadata, name) for name in ("num_warps", "num_stages")}
        row |= judge(kernel, log, arch)
        known = tuple(config.get(key) for key in ("G", "R", "MODULATED", "PRECISION"))
        most = LOOP_LIMITS.get((head["kernel"].removesuffix("_kernel"), *known), math.inf)
        if row["loop_instructions"] > most and arch == TARGET:
            row.setdefault("fault", f"main loop of {row['loop_instructions']} instructions, {most} at most")
        return row
    except Exception as error:  # the report names every kernel that fails, not only the first
        lines = f"{type(error).__name__}: {error}".strip().splitlines()
        return row | {"error": " ".join(dict.fromkeys((lines[0], lines[-1].strip())))}


def described(row: dict[str, Any]) -> str:
    """A row in one line of text."""
    head = f"sm_{row['arch']} {row['kernel']}  {row['shape']}  {row['file']}"
    if "error" in row:
        return f"{head}  {row['error']}"
    config = " ".join(f"{name} {value}" for name, value in row["config"].items())
    groups = {kind: " ".join(map(str, dict.fromkeys(each))) or "yes" for kind, each in row["waits"].items()}
    waits = ", ".join(f"{kind} {each}" for kind, each in groups.items())
    return "  ".join(
        [
            head,
            f"[{config}]",
            f"registers {row['registers']}  spills {row['spills']}  shared {row['shared']}",
            f"{row['mma']} {row['mma_kind']}" if row["mma"] else "no tensor cores",
            f"{row['loop_instructions']} instructions a round" if row["main_loop"] else "no main loop",
            f"waits in the main loop: {waits or ('none' if row['main_loop'] else 'no such loop')}",
            *([row["fault"]] if "fault" in row else []),
        ]
    )


def failed(row: dict[str, Any]) -> bool:
    return "fault" in row or ("error" in row and row["arch"] == TARGET)


def under_another_triton(folder: Path, options: argparse.Namespace) -> tuple[int, str]:
    """The same report by the Triton in `folder`, printed as it comes. Returns the exit code and the last line."""
    words = ["--arch", *map(str, options.arch), "--jobs", str(options.jobs)]
    words += ["--json", str(options.json)] if options.json else []
    path = os.pathsep.join(filter(None, [str(folder.resolve()), os.environ.get("PYTHONPATH")]))
    variables, last = os.environ | {"PYTHONPATH": path}, ""
    with subprocess.Popen(
        [sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, env=variables
    ) as child:
        for last in child.stdout:
            print(last, end="", flush=True)
    return child.returncode, last.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[TARGET], help="compute capabilities, 90 for Hopper")
    parser.add_argument("--json", type=Path, help="a folder: also write the table of each architecture there")
    parser.add_argument("--also", type=Path, nargs="+", default=[], help="folders of other Tritons to report on too")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time")
    parser.add_argument(
        "--cache", action="store_true", help="judge nothing, fill TRITON_CACHE_DIR for the first --arch"
    )
    options = parser.parse_args()
    if options.cache:
        count, compiles = fill_cache(options.arch[0])
        print(f"cache: {count} kernels for sm_{options.arch[0]}, {compiles} compiled, triton {triton.__version__}")
        return 0
    tasks = [
        (index, arch)
        for arch in options.arch
        for index, launch in enumerate(launches())
        if launch.arch in (None, arch) and (arch == TARGET or launch.reference)
    ]
    rows, forgotten = [], unlaunched()
    for name in forgotten:
        print(f"FAIL {name}: no entry of OPS launches it")
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for row in pool.map(row_of, *zip(*tasks, strict=True)):
            rows.append(row)
            print("FAIL" if failed(row) else "n/a " if "error" in row else "ok  ", described(row), flush=True)

    parts = []
    for arch in options.arch:
        here = [row for row in rows if row["arch"] == arch]
        absent = sum("error" in row and not failed(row) for row in here)
        good = len(here) - absent - sum(map(failed, here))
        parts.append(f"{good} of {len(here) - absent} on sm_{arch}" + f" ({absent} not compiled)" * bool(absent))
        if options.json:
            table = {"what": "bench/aot.py", "arch": arch, "rows": here, "unlaunched": forgotten}
            version = ".".join(triton.__version__.split(".")[:2])
            record.write(options.json / f"aot_sm{arch}_triton-{version}.json", table | record.environment())
    codes = [int(bool(forgotten) or any(map(failed, rows)))]
    summary = f"{SUMMARY}triton {triton.__version__}: {', '.join(parts)}"
    for folder in options.also:
        code, last = under_another_triton(folder, options)
        codes.append(code)
        summary += "; " + last.removeprefix(SUMMARY)
    print(summary, flush=True)
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
