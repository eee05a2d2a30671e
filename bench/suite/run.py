"""The GPU suite: every speed figure in one run. Each figure has a correctness check first.

    python bench/suite                           full size, on a CUDA device, within 8 minutes
    python bench/suite --parts cold              the most important parts, planned for 300 s
    python bench/suite --plan                    print the parts and the assumed time of each
    python bench/suite --predict H100            print what the figures should be, by the roofline
    python bench/suite --scale tiny --device cpu run everything at toy size; the figures mean nothing

If a part's check fails, the part is recorded as failed. Its figures are stored, but they do not count. If a part
raises, it is recorded as an error. The other parts still run, unless the device itself failed. A part that would not
end within the budget is skipped. A part that runs past the budget is stopped. The record is written before and after
every part. So if the process dies, the record names the part. The exit code is 1 if a part failed or raised.
"""

import argparse
import gc
import json
import os
import re
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import record
import torch

import suite.decode
import suite.kernels
import suite.linear
import suite.model
import suite.predict
from esengine.models.settings import RenderSettings
from esengine.sampling.build import allow_tf32
from suite import roofline
from suite.checks import CheckFailed, Checks
from suite.context import COLD, SCALES, Context, Scale
from suite.summary import ERROR, FAILED, FILES, rows, summarize

RESULTS = Path(__file__).parents[1] / "results"


GRACE = 15
"""Seconds past the budget after which a part is stopped. A part of many cases ends before, with its results."""


class TimeUp(BaseException):
    """The budget ended inside a part. Not an Exception, so that no handler takes it for a failure of the part."""


def parts(scale: Scale) -> dict[str, Callable[[Context], dict[str, Any]]]:
    """The parts by name, in the order in which they are measured. If the budget ends, the last ones are missing.

    The parts of a cold run come first. They decode in the eager mode and without overlap. `--parts decode_512 overlap
    step_512` measures a step with what the first two find fastest.
    """
    small, large = scale.pixels
    return {
        "linear": suite.linear.linear,
        "update": suite.model.update,
        f"forward_{small}": lambda context: suite.model.forward(context, small),
        f"step_{small}": lambda context: suite.model.step(context, small),
        "memory": suite.model.memory,
        f"forward_{large}": lambda context: suite.model.forward(context, large),
        f"step_{large}": lambda context: suite.model.step(context, large),
        f"decode_{small}": lambda context: suite.decode.decode(context, small),
        "overlap": suite.decode.overlap,
        "reference_loop": suite.model.loop,
        f"decode_{large}": lambda context: suite.decode.decode(context, large),
        "kernels": suite.kernels.kernels,
    }


def kind(scale: Scale, name: str) -> str:
    """The name of a part in `PART_SECONDS` and `COLD`, where the sizes of images are small and large."""
    for pixels, size in zip(scale.pixels, ("small", "large"), strict=True):
        if name.endswith(f"_{pixels}"):
            return f"{name.removesuffix(str(pixels))}{size}"
    return name


def needed(scale: Scale, name: str) -> float:
    """The seconds that a part is assumed to take."""
    return scale.part_seconds.get(kind(scale, name), 0.0)


def selected(scale: Scale, chosen: Sequence[str] | None = None) -> list[str]:
    """The names of the parts to measure, in order: all, or the chosen ones in the given order.

    Args:
        chosen: names of parts. `cold` stands for those of a cold run.

    Raises:
        ValueError: there is no such part.
    """
    known = list(parts(scale))
    if not chosen:
        return known
    names: list[str] = []
    for name in chosen:
        if name not in (*known, "cold"):
            raise ValueError(f"parts: expected cold or some of {', '.join(known)}, got {name!r}")
        names += [each for each in known if kind(scale, each) in COLD] if name == "cold" else [name]
    return list(dict.fromkeys(names))


def plan(scale: Scale, names: Iterable[str], budget: float) -> str:
    """A line for each part: its assumed time, when it should end, and whether it would be skipped."""
    lines, end, names = [], 0.0, list(names)
    if not scale.part_seconds:
        return f"plan: {', '.join(names)}; at the {scale.name} scale nothing is assumed of their time"
    for name in names:
        seconds = needed(scale, name)
        if end + seconds > budget:
            lines.append(f"{name:16} {seconds:5.0f} s  not within the budget of {budget:.0f} s")
            continue
        end += seconds
        lines.append(f"{name:16} {seconds:5.0f} s  ends after {end:.0f} s")
    return "\n".join(["plan, assumed and not measured:", *lines, f"{'in all':16} {end:5.0f} s"])


@contextmanager
def stopped_after(seconds: float) -> Iterator[None]:
    """Inside, `TimeUp` is raised after so many seconds. Only in the main thread, which alone gets signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number, frame):
        raise TimeUp

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_part(part: Callable[[Context], dict[str, Any]], context: Context, *, least: float = 0.0) -> dict[str, Any]:
    """`status` (ok, failed, error, skipped), with the result or the reason, and the wall time.

    Args:
        part: what to measure.
        least: seconds that it needs. With less time left it does not start.

    Returns:
        With `fatal` true if the device no longer answers: everything after that would fail. A part with a failed
        check has a result too, whose figures do not count.
    """
    left = context.time_left()
    if left <= 0:
        return {"status": "skipped", "reason": "out of time"}
    if left < least:
        return {"status": "skipped", "reason": f"needs about {least:.0f} s, {left:.0f} s are left"}
    start, context.checks = time.monotonic(), Checks()
    try:
        with stopped_after(left + GRACE):
            outcome = {"status": "ok", "result": part(context)}
        if context.checks.failed:
            outcome |= {"status": "failed", "reason": "; ".join(context.checks.failed)}
    except TimeUp:
        outcome = {"status": "skipped", "reason": f"stopped {GRACE} s past the end of the budget"}
    except CheckFailed as failure:
        outcome = {"status": "failed", "reason": str(failure)}
    except (Exception, SystemExit) as error:  # whatever it is, it is stored, and the rest goes on
        outcome = _error(error)
    try:
        gc.collect()
        if context.device.type == "cuda":
            torch.cuda.synchronize(context.device)  # an error that stays raises here, whoever has swallowed it before
            torch.cuda.empty_cache()
    except Exception as error:
        # what the part has found before stays beside the reason
        outcome = outcome | (_error(error) if outcome["status"] != "error" else {}) | {"fatal": True}
    return outcome | {"wall_seconds": time.monotonic() - start}


def _error(error: BaseException) -> dict[str, Any]:
    reason = f"{type(error).__name__}: {error}"[:500]
    return {"status": "error", "reason": reason, "traceback": "".join(traceback.format_exception(error))[-4000:]}


def run(
    context: Context,
    *,
    chosen: list[str] | None = None,
    budget: float | None = None,
    json_path: Path | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Measure the chosen parts, or all. Write the record before and after each.

    Args:
        resume: keep the parts that are ok in the record at `json_path`, and do not measure them again.

    Raises:
        ValueError: there is no such part, or the record to resume is of another device or other versions.
    """
    known, wanted = parts(context.scale), selected(context.scale, chosen)
    results: dict[str, Any] = {
        "benchmark": "gpu_suite",
        "settings": {
            **asdict(context.scale),
            "device": str(context.device),
            "dtype": str(context.dtype).removeprefix("torch."),
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "budget_seconds": budget,
            "compile_backend": context.compile_backend,
            "compile_unit": context.compile_unit,
            "compile_decoder": context.compile_decoder,
            "ceilings": context.limits.record(),
            "decode": context.decode,
            "overlap": context.overlap,
            "weights": "random, from the published configurations",
        },
        "environment": record.environment(context.device),
        "parts": {},
    }

    def keep(name: str, outcome: dict[str, Any]) -> None:
        results["parts"][name] = outcome
        results["summary"] = summarize(results)
        results["load_average_after"] = list(os.getloadavg())
        if json_path is not None:
            record.write(json_path, results)

    kept = _finished(json_path, results) if resume and json_path is not None and json_path.exists() else {}
    lost = None
    for name in [each for each in known if each in kept]:
        keep(name, kept[name])
        print(f"{name:16} ok       of an earlier run", flush=True)
    wanted = [name for name in wanted if name not in kept]
    print(plan(context.scale, wanted, max(context.time_left(), 0.0)), flush=True)
    for name in wanted:
        if lost is None:
            keep(name, {"status": "error", "reason": "the process ended in it"})
            outcome = run_part(known[name], context, least=needed(context.scale, name))
            lost = name if outcome.get("fatal") else None
        else:
            outcome = {"status": "skipped", "reason": f"the device failed in {lost}"}
        keep(name, outcome)
        print(f"{name:16} {outcome['status']:8} {outcome.get('reason', '')}", flush=True)
    return results


def smoke_ceilings(path: Path, device: torch.device) -> dict[str, float]:
    """The ceilings in a record of `device_smoke.py`. Raises ValueError for another file or another device."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        was, ceilings = found["environment"]["device"], found["ceilings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--smoke: expected a record of device_smoke.py, got {path} ({error!r})") from error
    if was != record.device_name(device):
        raise ValueError(f"--smoke: expected a record of {record.device_name(device)}, {path} is of {was}")
    return ceilings


def _finished(path: Path, now: dict[str, Any]) -> dict[str, Any]:
    """The parts of a record that are ok. Raises ValueError if its environment differs from `now`."""
    before = json.loads(path.read_text(encoding="utf-8"))
    for name in ("device", "versions", "commit", "kernel_settings"):
        was, is_ = before["environment"].get(name), now["environment"].get(name)
        if was != is_:
            raise ValueError(f"--resume: {path} has {name} {was}, this run {is_}; give another --json")
    return {name: part for name, part in before["parts"].items() if part["status"] == "ok"}


def table(summary: dict[str, Any]) -> str:
    """The summary as aligned text."""
    lines = [("figure", "value", "bar", "verdict"), *rows(summary)]
    widths = [max(len(line[column]) for line in lines if line[2] or not column) for column in range(3)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, (*widths, 0), strict=True)).rstrip() for line in lines
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="full", help="size of the stand-in models")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for the tiny scale")
    parser.add_argument("--json", type=Path, help="default at full scale: bench/results/gpu_suite_<device>.json")
    parser.add_argument(
        "--budget", type=float, default=450, help=f"seconds (450); a part that runs {GRACE} s longer is stopped"
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        metavar="PART",
        help="measure only these, in this order; cold stands for linear, update, forward_512, step_512, memory, "
        "forward_1024 and step_1024",
    )
    parser.add_argument("--plan", action="store_true", help="print the assumed time of each part, and end")
    parser.add_argument("--resume", action="store_true", help="keep the parts that are ok in the file of --json")
    parser.add_argument("--smoke", type=Path, help="a record of device_smoke.py; its ceilings replace the known ones")
    parser.add_argument("--peer", nargs="+", default=[], metavar="MODULE:FUNCTION", help="more multi-adapter linears")
    parser.add_argument("--chunk", type=int, help="images in one forward of a step")
    parser.add_argument("--decode-chunk", type=int, help="images in one call of the decoder")
    parser.add_argument(
        "--decode",
        choices=("auto", *get_args(get_type_hints(RenderSettings)["decode"])),
        default="auto",
        help="how a step decodes; auto: the fastest in this run's decode part, eager without it",
    )
    parser.add_argument(
        "--overlap",
        choices=("auto", "always", "never"),
        default="auto",
        help="a step decodes one chunk while the next is denoised; auto: if this run's overlap part finds it faster",
    )
    parser.add_argument("--compile-backend", help="backend of torch.compile (inductor; eager at tiny scale)")
    parser.add_argument(
        "--compile-modes",
        nargs="+",
        default=["default"],
        help="modes of torch.compile; each is measured, the fastest counts (default)",
    )
    parser.add_argument(
        "--compile-unit",
        choices=("blocks", "model"),
        default="blocks",
        help="compile each block of the plain transformer, or the whole transformer, which takes minutes (blocks)",
    )
    parser.add_argument(
        "--compile-decoder", action="store_true", help="decode_512 and decode_1024 measure a compiled decoder too"
    )
    parser.add_argument(
        "--predict",
        choices=roofline.KNOWN,
        help="print what the figures should be on this device, by the roofline and assumptions, and end",
    )
    options = parser.parse_args(arguments)
    if options.predict:
        print("\n".join(suite.predict.tables(options.predict)))
        return 0
    deadline, device = time.monotonic() + options.budget, torch.device(options.device)
    if options.plan:
        try:
            print(plan(SCALES[options.scale], selected(SCALES[options.scale], options.parts), options.budget))
        except ValueError as error:
            parser.error(str(error))
        return 0
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device: torch sees no CUDA device; --scale tiny --device cpu runs without one")
    if device.type == "cuda":
        torch.cuda.set_device(device if device.index is not None else 0)
    scale = SCALES[options.scale]
    scale = replace(scale, chunk=options.chunk or scale.chunk, decode_chunk=options.decode_chunk or scale.decode_chunk)
    try:
        context = Context(
            scale,
            device,
            deadline=deadline,
            compile_backend=options.compile_backend or ("inductor" if scale.name == "full" else "eager"),
            compile_modes=tuple(options.compile_modes),
            compile_unit=options.compile_unit,
            compile_decoder=options.compile_decoder,
            peers=tuple(options.peer),
            decode=options.decode,
            overlap=options.overlap,
            smoke=None if options.smoke is None else smoke_ceilings(options.smoke, device),
        )
        allow_tf32(device, context.dtype)
        path = options.json
        if path is None and scale.name == "full":
            name = re.sub(r"\W+", "_", record.device_name(device)).strip("_").lower()
            path = RESULTS / FILES.replace("*", name)
        wanted = dict(chosen=options.parts, budget=options.budget, json_path=path, resume=options.resume)
        results = run(context, **wanted)
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    print(table(results["summary"]))
    if path is not None:
        print(f"wrote {path}")
    broken = any(part["status"] in ("failed", "error") for part in results["parts"].values())
    return int(broken or any({FAILED, ERROR} & set(line) for line in rows(results["summary"])))
