"""Pictures of a suite's record, drawn only from the stored JSON.

python bench/suite/plots.py bench/results/gpu_suite_<device>.json [--out FOLDER]
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt


def draw(record: dict[str, Any], folder: Path) -> list[Path]:
    """Writes what the record has figures for: linears.png, ratios.png, step.png, memory.png, roofline.png.

    Returns:
        The files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    summary, written = record["summary"], []
    for name, make in (
        ("linears", _linears),
        ("ratios", _ratios),
        ("step", _step),
        ("memory", _memory),
        ("roofline", _roofline),
    ):
        figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
        if make(axes, summary):
            axes.set_title(f"{axes.get_title()}\n{_origin(record)}", fontsize=9)
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=120)
            written.append(path)
        plt.close(figure)
    return written


def _linears(axes, summary: dict[str, Any]) -> bool:
    entry = summary["linear_vs_gemm"]
    known = {name: value for name, value in (entry["detail"] or {}).items() if isinstance(value, float)}
    _bars(axes, known, entry["bar"])
    axes.set_title("throughput over the plain GEMM")
    return bool(known)


def _ratios(axes, summary: dict[str, Any]) -> bool:
    known = {}
    for name in ("forward_vs_compiled", "step_vs_inference"):
        for below, value in (summary[name]["detail"] or {}).items():
            if isinstance(value, float):
                known[below if name == "forward_vs_compiled" else f"{below} over inference"] = value
    _bars(axes, known, None)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_title("throughput of the population over the plain model")
    return bool(known)


def _step(axes, summary: dict[str, Any]) -> bool:
    parts = summary["step_breakdown"]["detail"] or {}
    left = dict.fromkeys(parts, 0.0)
    for stage in dict.fromkeys(stage for shares in parts.values() for stage in shares):
        shares = [100 * parts[part].get(stage, 0.0) for part in parts]
        axes.barh(list(parts), shares, left=list(left.values()), label=stage)
        left = {part: left[part] + share for part, share in zip(parts, shares, strict=True)}
    if parts:
        axes.legend(ncols=4)
    axes.set_xlabel("% of the step")
    axes.set_title("what a step is made of")
    return bool(parts)


def _memory(axes, summary: dict[str, Any]) -> bool:
    peaks = summary["memory_per_extra_member"]["detail"] or {}
    axes.plot([int(members) for members in peaks], [peak / 2**30 for peak in peaks.values()], marker="o")
    if peaks:
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
    axes.set_xlabel("population")
    axes.set_ylabel("peak GiB")
    axes.set_title("memory of a step at one chunk")
    return bool(peaks)


def _roofline(axes, summary: dict[str, Any]) -> bool:
    shares = {n: v for n, v in (summary["roofline_share"]["detail"] or {}).items() if v is not None}
    _bars(axes, shares, ">= 1")
    axes.set_title("share of the roofline")
    return bool(shares)


def _bars(axes, values: dict[str, float], bar: str | None) -> None:
    names = list(values)[::-1]
    drawn = axes.barh(names, [values[name] for name in names])
    axes.bar_label(drawn, fmt="%.3g", padding=2, fontsize=8)
    axes.tick_params(axis="y", labelsize=7)
    if bar:
        axes.axvline(float(bar.split()[1]), color="black", linestyle="--", linewidth=0.8)


def _origin(record: dict[str, Any]) -> str:
    place = record["environment"]
    commit = (place["commit"] or "no commit")[:10] + (" (dirty)" if place["dirty"] else "")
    versions = ", ".join(f"{name} {place['versions'][name]}" for name in ("torch", "triton") if place["versions"][name])
    return f"{place['device']}, {versions}, {commit}, {record['settings']['name']} scale"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("json", type=Path, help="a record of the GPU suite")
    parser.add_argument("--out", type=Path, help="folder of the pictures; default: beside the record")
    options = parser.parse_args()
    record = json.loads(options.json.read_text(encoding="utf-8"))
    for path in draw(record, options.out or options.json.with_suffix("")):
        print(path)


if __name__ == "__main__":
    main()
