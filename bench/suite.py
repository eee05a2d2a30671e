"""The GPU suite: every figure of the speed issue, correctness first, in one run.

    python bench/suite.py                                        full size, on a CUDA device, within 8 minutes
    python bench/suite.py --scale tiny --device cpu              the whole path at toy size; its figures mean nothing

A part whose check fails is recorded as failed, one that raises as an error, one for which no time is left as not
measured; the rest goes on. The record is written after every part. Exit code 1 if a part failed or raised.
"""

import argparse
import gc
import re
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import record
import suite_decode
import suite_linear
import suite_model
import torch
from suite_context import SCALES, CheckFailed, Context, Scale
from suite_summary import ERROR, FAILED, rows, summarize

RESULTS = Path(__file__).parent / "results"


def parts(scale: Scale) -> dict[str, Callable[[Context], dict[str, Any]]]:
    """By name, in the order in which they are measured: what the budget cuts off is the end."""
    small, large = scale.pixels
    return {
        "linear": suite_linear.linear,
        f"forward_{small}": lambda context: suite_model.forward(context, small),
        f"step_{small}": lambda context: suite_model.step(context, small),
        f"forward_{large}": lambda context: suite_model.forward(context, large),
        f"step_{large}": lambda context: suite_model.step(context, large),
        "reference_loop": suite_model.loop,
        "update": suite_model.update,
        "kernels": suite_linear.kernels,
        "memory": suite_model.memory,
        f"decode_{small}": lambda context: suite_decode.decode(context, small),
        f"decode_{large}": lambda context: suite_decode.decode(context, large),
        "overlap": suite_decode.overlap,
    }


def run_part(part: Callable[[Context], dict[str, Any]], context: Context) -> dict[str, Any]:
    """`status` ok, failed, error or not measured, with the result or the reason, and the wall time spent."""
    if context.time_left() <= 0:
        return {"status": "not measured", "reason": "out of time"}
    start = time.monotonic()
    try:
        outcome = {"status": "ok", "result": part(context)}
    except CheckFailed as failure:
        outcome = {"status": "failed", "reason": str(failure)}
    except Exception as error:  # whatever it is, it is stored, and the rest goes on
        reason = f"{type(error).__name__}: {error}"[:500]
        outcome = {"status": "error", "reason": reason, "traceback": traceback.format_exc()[-4000:]}
    gc.collect()
    if context.device.type == "cuda":
        torch.cuda.empty_cache()
    return outcome | {"wall_seconds": time.monotonic() - start}


def run(
    context: Context, *, chosen: list[str] | None = None, budget: float | None = None, json_path: Path | None = None
) -> dict[str, Any]:
    """Measures the chosen parts, or all, and writes the record after each.

    Raises:
        ValueError: no part of that name.
    """
    known = parts(context.scale)
    for name in chosen or ():
        if name not in known:
            raise ValueError(f"parts: expected some of {', '.join(known)}, got {name!r}")
    results: dict[str, Any] = {
        "benchmark": "gpu_suite",
        "settings": {
            **asdict(context.scale),
            "device": str(context.device),
            "dtype": str(context.dtype).removeprefix("torch."),
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "budget_seconds": budget,
            "weights": "random, from the published configurations",
        },
        "environment": record.environment(context.device),
        "parts": {},
    }
    for name, part in known.items():
        if chosen and name not in chosen:
            continue
        outcome = results["parts"][name] = run_part(part, context)
        print(f"{name:16} {outcome['status']:12} {outcome.get('reason', '')}", flush=True)
        results["summary"] = summarize(results)
        results["load_average_after"] = record.environment(context.device)["load_average"]
        if json_path is not None:
            record.write(json_path, results)
    return results


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
    parser.add_argument("--budget", type=float, default=420, help="seconds after which nothing more is begun (420)")
    parser.add_argument("--parts", nargs="+", help="only these")
    parser.add_argument("--peer", nargs="+", default=[], metavar="MODULE:FUNCTION", help="more multi-adapter linears")
    parser.add_argument("--chunk", type=int, help="images in one forward of a step")
    parser.add_argument("--decode-chunk", type=int, help="images in one call of the decoder")
    parser.add_argument("--compile-backend", help="of torch.compile; inductor, and eager at tiny scale")
    parser.add_argument(
        "--compile-modes", nargs="+", default=["default"], help="measured each; the fastest counts (default)"
    )
    options = parser.parse_args(arguments)
    deadline, device = time.monotonic() + options.budget, torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device: torch sees no CUDA device; --scale tiny --device cpu runs without one")
    if device.type == "cuda":
        torch.cuda.set_device(device if device.index is not None else 0)
        torch.set_float32_matmul_precision("high")  # what torch.compile asks of its users, for every variant
    scale = SCALES[options.scale]
    scale = replace(scale, chunk=options.chunk or scale.chunk, decode_chunk=options.decode_chunk or scale.decode_chunk)
    try:
        context = Context(
            scale,
            device,
            deadline=deadline,
            compile_backend=options.compile_backend or ("inductor" if scale.name == "full" else "eager"),
            compile_modes=tuple(options.compile_modes),
            peers=tuple(options.peer),
        )
        path = options.json
        if path is None and scale.name == "full":
            name = re.sub(r"\W+", "_", record.device_name(device)).strip("_").lower()
            path = RESULTS / f"gpu_suite_{name}.json"
        results = run(context, chosen=options.parts, budget=options.budget, json_path=path)
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    print(table(results["summary"]))
    if path is not None:
        print(f"wrote {path}")
    broken = any(part["status"] in ("failed", "error") for part in results["parts"].values())
    return int(broken or any({FAILED, ERROR} & set(line) for line in rows(results["summary"])))


if __name__ == "__main__":
    sys.exit(main())
