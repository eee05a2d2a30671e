"""The figures of a record, each with its bar and its verdict."""

from collections.abc import Callable
from typing import Any

PIXELS = (512, 1024)
"""Sides of the images at full scale."""

FILES = "gpu_suite_*.json"
"""Of records at full scale in bench/results, by device."""

BARS: dict[str, tuple[str, float]] = {
    "linear_vs_gemm": (">=", 0.97),
    "forward_vs_compiled": (">=", 1.00),
    "step_vs_inference": (">=", 0.98),
    "step_vs_reference_loop": (">=", 10.0),
    "memory_per_extra_member": ("<=", 64.0),
    "step_images_per_second_small": (">=", 130.0),
    "step_images_per_second_large": (">=", 40.0),
    "update_share": ("<=", 0.01),
}
"""Of the issue, on an H100: ratios of throughput, bytes, images a second at 512 and 1024 px, share of a step."""

FAILED, ERROR, MISSING = "failed check", "error", "not measured"

UNCOUNTED = "does not count"
"""Of a figure whose check failed, or whose peer has not been shown to be the published code's equal."""


def summarize(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The summary of a record. The record may be of an interrupted run.

    Returns:
        By figure: `value` (None if none counts), `bar`, `verdict` (pass, fail, no bar, failed check, error, does not
        count or not measured), `reason` if there is no value, and the figures that it is made of in `detail`. What was
        measured in spite of a failed check is in `uncounted`, with its own `value` and `detail`.
    """
    parts, pixels = record["parts"], [str(side) for side in record["settings"]["pixels"]]
    bars = BARS if record["settings"]["bars"] else {}
    forwards, steps = ([f"{kind}_{side}" for side in pixels] for kind in ("forward", "step"))

    def figure(
        name: str,
        needed: list[str],
        find: Callable[..., tuple[float | None, Any]],
        bar: tuple[str, float] | None = None,
    ) -> dict[str, Any]:
        bar = bar or bars.get(name)
        shown = None if bar is None else f"{bar[0]} {bar[1]:g}"
        known = {part: parts[part]["result"] for part in needed if parts.get(part, {}).get("status") == "ok"}
        value, detail = find(known) if known else (None, None)
        result = {"value": value, "bar": shown, "verdict": MISSING, "detail": detail}
        failed = {part: parts[part]["result"] for part in needed if _failed_with_figures(parts.get(part))}
        if failed:
            result["uncounted"] = dict(zip(("value", "detail"), find(known | failed), strict=True))
        gone = [part for part in needed if part not in known]
        if gone:
            result["reason"] = "; ".join(_why(part, parts.get(part)) for part in gone)
        for status, verdict in (("failed", FAILED), ("error", ERROR)):
            inside = isinstance(detail, dict) and verdict in detail.values()
            if inside or any(parts.get(part, {}).get("status") == status for part in needed):
                return result | {"verdict": verdict, "value": None}
        if value is None and isinstance(detail, dict) and MISSING in detail.values():
            result.setdefault("reason", "out of time")
        if value is None or gone:
            return result
        passed = bar is None or (value >= bar[1] if bar[0] == ">=" else value <= bar[1])
        return result | {"verdict": "no bar" if bar is None else "pass" if passed else "fail"}

    summary = {
        "linear_vs_gemm": figure("linear_vs_gemm", ["linear"], lambda p: _linear(p["linear"])),
        "linear_in_block_vs_gemm": figure("linear_in_block_vs_gemm", ["linear"], lambda p: _in_block(p["linear"])),
        "forward_vs_compiled": figure("forward_vs_compiled", forwards, lambda p: _forward(p)),
        "step_vs_inference": figure("step_vs_inference", steps, lambda p: _step(p)),
        "step_vs_reference_loop": _if_the_peer_counts(
            figure("step_vs_reference_loop", ["reference_loop"], lambda p: _loops(p["reference_loop"])),
            parts.get("reference_loop", {}),
        ),
        "memory_per_extra_member": figure(
            "memory_per_extra_member",
            ["memory"],
            lambda p: (p["memory"]["bytes_per_further_member"], p["memory"]["peak_bytes"]),
        ),
    }
    sizes = zip(steps, pixels, ("small", "large"), strict=True)
    summary["images_per_second"] = {
        side: figure(
            f"step_images_per_second_{which}",
            [part],
            lambda p, part=part: (p[part]["images_per_second"]["step"], p[part]["images_per_second"]),
        )
        for part, side, which in sizes
    }
    for part, side in zip(steps, pixels, strict=True):
        measured = parts.get(part, {}).get("status") == "ok" or _failed_with_figures(parts.get(part))
        how = _how(parts[part]["result"]) if measured else None
        summary["images_per_second"][side]["how"] = how
    summary["update_share"] = figure("update_share", ["update", *steps], _update_share)
    decodes = [f"decode_{side}" for side in pixels]
    summary["roofline_share"] = figure("roofline_share", ["linear", "kernels", *decodes, *steps], _roofline)
    summary["roofline_share"]["missing"] = _without_share(parts)
    summary["roofline_share"]["ceilings"] = record["settings"].get("ceilings", {}).get("source")
    summary["decode_and_overlap"] = figure(
        "decode_and_overlap", [*decodes, "overlap"], lambda p: (None, {name: _over(p[name]) for name in p})
    )
    summary["step_breakdown"] = figure(
        "step_breakdown", steps, lambda p: (None, {part: _breakdown(p[part]) for part in p})
    )
    return summary


def rows(summary: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(figure, value, bar, verdict): the table of a summary."""
    table = []

    def add(name: str, entry: dict[str, Any]) -> None:
        value = "-" if entry["value"] is None else f"{entry['value']:.4g}"
        table.append((name, value, entry["bar"] or "-", entry["verdict"]))
        uncounted = entry.get("uncounted", {}).get("value")
        if uncounted is not None:
            why = UNCOUNTED if entry["verdict"] == UNCOUNTED else f"{UNCOUNTED}, {entry['verdict']}"
            table.append((f"  {why}", f"({uncounted:.4g})", "", ""))

    for name in ("linear_vs_gemm", "linear_in_block_vs_gemm", "forward_vs_compiled", "step_vs_inference"):
        add(name, summary[name])
        for below, value in (summary[name]["detail"] or {}).items():
            table.append((f"  {below}", f"{value:.4g}" if isinstance(value, float) else value, "", ""))
    add("step_vs_reference_loop", summary["step_vs_reference_loop"])
    for below, value in (summary["step_vs_reference_loop"]["detail"] or {}).items():
        table.append((f"  {below}", f"{value:.4g}", "", ""))
    add("memory_per_extra_member, bytes", summary["memory_per_extra_member"])
    for members, peak in (summary["memory_per_extra_member"]["detail"] or {}).items():
        table.append((f"  peak MiB at N = {members}", f"{peak / 2**20:.2f}", "", ""))
    for pixels, entry in summary["images_per_second"].items():
        add(f"images/s of a step, {pixels} px", entry)
        for stage, rate in (entry["detail"] or {}).items():
            if stage != "step":
                table.append((f"  {stage}", f"{rate:.4g}", "", ""))
        for name, chosen in (entry["how"] or {}).items():
            table.append((f"  {name}", chosen, "", ""))
    add("update_share", summary["update_share"])
    if summary["roofline_share"]["ceilings"]:
        table.append((f"ceilings: {summary['roofline_share']['ceilings']}", "", "", ""))
    for name, share in (summary["roofline_share"]["detail"] or {}).items():
        shown = "-" if share is None else f"{share:.3g}"
        table.append((f"roofline share of {name}", shown, "", ""))
    for name, why in summary["roofline_share"]["missing"].items():
        table.append((f"roofline share of {name}", why, "", ""))
    for part, ratios in (summary["decode_and_overlap"]["detail"] or {}).items():
        table += [(f"{part}, {name}", f"{ratio:.4g}", "", "") for name, ratio in ratios.items()]
    for part, shares in (summary["step_breakdown"]["detail"] or {}).items():
        table.append((f"what {part} is made of", ", ".join(f"{n} {100 * s:.1f} %" for n, s in shares.items()), "", ""))
    return table


def _failed_with_figures(part: dict[str, Any] | None) -> bool:
    return part is not None and part["status"] == "failed" and "result" in part


def _why(name: str, part: dict[str, Any] | None) -> str:
    if part is None:
        return f"{name}: not asked for"
    return f"{name}: {part.get('reason', part['status'])}"


def _gone(case: dict[str, Any]) -> str:
    """Why a case has no figure."""
    return FAILED if "failed" in case.get("check", {}) else ERROR if "error" in case else MISSING


def _linear(part: dict[str, Any]) -> tuple[float | None, dict[str, Any]]:
    """The worst shape, if every shape has a figure. And each shape by itself, ours and the peers'."""
    detail: dict[str, Any] = {}
    ours = []
    for shape, case in part["shapes"].items():
        variants = case.get("variants")
        if variants is None:
            detail[shape] = _gone(case)
            ours.append(None)
            continue
        ratios = {name: ratio["of_medians"] for name, ratio in case["ratios"].items()}
        ours.append(ratios.get("population"))
        missing = next((variants[name] for name in ("population", "plain") if "seconds" not in variants[name]), {})
        detail[shape] = ratios.get("population", _gone(missing))
        for name, variant in variants.items():
            if name not in ("plain", "population"):  # the verdict is about ours alone
                detail[f"{shape} {name}"] = ratios.get(name, f"peer: {_gone(variant)}")
    return (None if None in ours or not ours else min(ours)), detail


def _in_block(part: dict[str, Any]) -> tuple[float | None, dict[str, Any]]:
    """The worst of the shapes behind a producer in a block, if each has a figure."""
    detail = {
        name: case["ratio"]["of_medians"] if "ratio" in case else _gone(case) for name, case in part["in_block"].items()
    }
    known = [value for value in detail.values() if isinstance(value, float)]
    return (min(known) if known and len(known) == len(detail) else None), detail


def _how(part: dict[str, Any]) -> dict[str, str]:
    """How the figures of a step were measured."""
    return {
        "decoded": f"{part['decode']} ({part['decode_by']})",
        "overlapped": f"{part['overlap']} ({part['overlap_by']})",
        "graphs": part["graphs"],
    }


def _forward(parts: dict[str, Any]) -> tuple[float | None, dict[str, float]]:
    detail, compiled = {}, []
    for name, part in parts.items():
        for over in ("over_compiled", "over_eager", "over_launched"):
            if over in part["ratios"]:
                detail[f"{name} {over}"] = part["ratios"][over]["of_medians"]
        detail[f"{name} graphs"] = part["graphs"]
        detail[f"{name} compiled by"] = part["compile"]["unit"]
        compiled.append(detail.get(f"{name} over_compiled"))
        if compiled[-1] is None:
            detail[f"{name} over_compiled"] = _gone(next(iter(part["compile"]["modes"].values())))
        for mode, facts in part["compile"]["modes"].items():
            if "uncounted_ratio" in facts:
                shown = f"({facts['uncounted_ratio']['of_medians']:.4g}) {UNCOUNTED}, {FAILED}"
                detail[f"{name} over compiled {mode}"] = shown
    return (None if None in compiled else min(compiled)), detail


def _step(parts: dict[str, Any]) -> tuple[float, dict[str, float]]:
    detail = {name: part["ratio"]["of_medians"] for name, part in parts.items()}
    return min(detail.values()), detail


def _loops(part: dict[str, Any]) -> tuple[float, dict[str, float]]:
    """The ratio to the loop as published. In the detail, to the loop that uses our dtype, decoder and scorer."""
    return part["ratios"]["as_published"], {"over the loop that shares ours": part["ratios"]["shared"]}


def _if_the_peer_counts(entry: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """The figure. Its value moves to `uncounted` unless the peer was found to be as slow as the published code."""
    if part.get("status") != "ok" or part["result"]["as_published_counts"]:
        return entry
    moved = {"value": None, "verdict": UNCOUNTED, "reason": part["result"]["as_published_counts_by"]}
    return entry | moved | {"uncounted": {"value": entry["value"], "detail": None}}


def _update_share(parts: dict[str, Any]) -> tuple[float | None, dict[str, float] | None]:
    """Of a step with N = the update's members and the step's images a member, whose other parts grow with N."""
    if "update" not in parts:
        return None, None
    members, update = parts["update"]["members"], parts["update"]["seconds"]["median"]
    detail = {}
    for name, part in parts.items():
        if name != "update":
            stages = part["stages"]["step"]
            rest = sum(spent for stage, spent in stages.items() if stage != "update")
            detail[name] = update / (update + rest * members / part["population"])
    return (max(detail.values()) if detail else None), detail


def _roofline(parts: dict[str, Any]) -> tuple[None, dict[str, float | None]]:
    """Of every launch of a step, and of decoder and scorer."""
    detail = {}
    for shape, case in parts.get("linear", {}).get("shapes", {}).items():
        for name, share in case.get("roofline", {}).items():
            detail[f"{'linear' if name == 'plain' else 'population_linear'} {shape}"] = share
    for name, case in parts.get("kernels", {}).items():
        share = case.get("roofline")
        if "roofline" in case:
            detail[name] = share.get("population") if isinstance(share, dict) else share
    for part, result in parts.items():
        if part.startswith(("decode_", "step_")):
            detail |= {f"{part} {name}": share for name, share in result["roofline"].items()}
    return None, detail


def _without_share(parts: dict[str, Any]) -> dict[str, str]:
    """Why a launch has none."""
    cases = parts.get("kernels", {}).get("result", {})
    return {name: _gone(case) for name, case in cases.items() if "roofline" not in case}


def _over(part: dict[str, Any]) -> dict[str, float]:
    """Throughput over the decoder as diffusers runs it, or over chunks in turn."""
    if "ratio" in part:
        return {"over in turn": part["ratio"]["of_medians"]}
    return {f"{name} over contiguous": ratio["of_medians"] for name, ratio in part["ratios"].items()}


def _breakdown(part: dict[str, Any]) -> dict[str, float]:
    stages = part["stages"]["step"]
    return {name: spent / sum(stages.values()) for name, spent in stages.items()}
