"""The README's table of results, drawn from the stored files; a test holds the two together."""

import json
from pathlib import Path

from suite_summary import BARS, FILES, PIXELS

RESULTS = Path(__file__).parent / "results"

FIGURES = {
    "linear_vs_gemm": "`linear_vs_gemm`: perturbed linear over the plain cuBLAS GEMM, one call each, worst shape",
    "linear_in_block_vs_gemm": "`linear_in_block_vs_gemm`: the same with all that it costs inside a fused block",
    "forward_vs_compiled": "`forward_vs_compiled`: population forward over diffusers' compiled one without noise",
    "step_vs_inference": "`step_vs_inference`: ES step over plain generation, decoding and scoring",
    "step_vs_reference_loop": "`step_vs_reference_loop`: ES step over the published algorithm's",
    "memory_per_extra_member": "bytes of memory for each further member at a fixed chunk, SANA-Sprint 1.6B",
    "step_images_per_second_large": f"images/s of a whole step, {PIXELS[1]} px",
    "step_images_per_second_small": f"images/s of a whole step, {PIXELS[0]} px",
    "update_share": "share of a step that the update takes, N 1024",
}
"""The speed issue's, by their names in a record's summary or in `BARS`."""


def rows() -> list[str]:
    """One Markdown row a figure: what, figure, device, file."""
    lines = []

    def add(what: str, figure: str, device: str, file: str) -> None:
        lines.append(f"| {what} | {figure} | {device} | `bench/results/{file}` |")

    file = "cpu_demo.json"
    demo = _read(file)
    runs, seeds = demo["runs"].values(), ", ".join(demo["runs"])
    prompts = demo["runs"]["0"]["prompts"]
    for judge in ("combined", "checker", "pickscore"):
        overall = [run["groups"][0]["rows"] for run in runs]
        paired = [adapter["against_first"][judge] for _, adapter in overall]
        gains = ", ".join(f"{p['difference']:+.3f} ± {p['standard_error']:.3f}" for p in paired)
        bases = ", ".join(f"{base['mean'][judge]:.3f}" for base, _ in overall)
        what = f"demo: gain in {judge} on {prompts} validation captions, base {bases}, seeds {seeds}"
        add(what, gains, demo["device"], file)
    seconds = ", ".join(f"{run['seconds']:.0f}" for run in runs)
    add("demo: seconds of `esengine train`", seconds, demo["device"], file)

    file = "cpu_forward.json"
    forward = _read(file)
    device = forward["environment"]["device"]
    for name, layout in forward["layouts"].items():
        ratios = layout["ratios"]
        for pair, what in (
            ("population / plain", "population forward over the plain forward of the same batch"),
            ("loop / population", "setting each member's weights and looping, over the population forward"),
        ):
            ratio = ratios[pair]
            spread = f"{ratio['of_medians']:.2f} (p20 {ratio['paired_p20']:.2f}, p80 {ratio['paired_p80']:.2f})"
            add(f"{what}, tiny SANA, {name}", spread, device, file)
    memory = forward["memory"]["bytes_per_further_member"]
    figure = f"{memory['forward']:.0f} B forward, {memory['update']:.0f} B update"
    add("memory for each further member at a fixed chunk, N 16384 to 65536", figure, device, file)

    file = "cpu_scaling.json"
    scaling = _read(file)
    one, *more = scaling["runs"].items()
    for count, run in more:
        what = (
            f"images/s of steps with {count} processes over {count} times those of {one[0]}, tiny SANA, a thread each"
        )
        add(what, f"{run['efficiency']:.2f}", scaling["device"], file)
    modelled = ", ".join(f"{share:.2f} with {count}" for count, share in scaling["modelled_efficiency"].items())
    add("the same as modelled from one process's step", modelled, scaling["device"], file)

    file = "nano_base.json"
    nano = _read(file)
    captions = nano["settings"]["count"]
    for judge in ("checker", "pickscore"):
        scores = {name: f"{s['mean']:.3f} ± {s['standard_error']:.3f}" for name, s in nano["scores"][judge].items()}
        what = f"sana-sprint-nano, {judge} on {captions} held-out captions: one step, two steps, ground truth"
        add(what, ", ".join(scores[name] for name in ("1 step", "2 steps", "drawn")), nano["device"], file)

    file = "nano_checker.json"
    checker = _read(file)
    drawn = checker["conditions"]["as drawn"]
    what = f"checker on {checker['settings']['count']} true pictures of captions: mean, share of at least 0.95"
    add(what, f"{drawn['mean']:.4f}, {drawn['share_at_least_0.95']:.4f}", checker["device"], file)

    file = "nano_headline.json"
    headline = _read(file)
    report = headline["report"]
    groups = {group["name"]: group["rows"] for group in report["groups"]}

    def gains(judge: str, rows: list[dict]) -> str:
        """The base's score, then by how much the others are above it."""
        above = (row["against_first"][judge] for row in rows[1:])
        cells = (f"{paired['difference']:+.4f} ± {paired['standard_error']:.4f}" for paired in above)
        return ", ".join([f"{rows[0]['mean'][judge]:.4f}", *cells])

    optimised, which = headline["config"]["reward"], "base in one step, then above it: seeds 0, 1, 2, base in two steps"
    for judge in report["scores"]:
        shown = f"`{optimised}`, which was optimised" if judge == "combined" else judge
        what = f"nano headline, {report['prompts']} test captions, {shown}: {which}"
        add(what, gains(judge, groups["all"]), headline["device"], file)
    for name in (name for name in groups if "object" in name):
        what = f"nano headline, checker, the {groups[name][0]['count']} captions of {name}"
        add(what, gains("checker", groups[name]), headline["device"], file)
    for judge in ("combined", "checker", "pickscore"):
        what = f"nano headline, {judge}: share of the gap to two steps that is closed"
        add(what, _closed(report, judge), headline["device"], file)

    file = "nano_fresh.json"
    fresh = _read(file)
    report = fresh["report"]
    captions = f"the headline's adapters on {report['prompts']} test captions that no setting was chosen by"
    for judge in ("combined", "checker", "pickscore"):
        (rows,) = (group["rows"] for group in report["groups"] if group["by"] == "overall")
        add(f"{captions}, {judge}: {which}", gains(judge, rows), fresh["device"], file)
    for judge in ("combined", "checker", "pickscore"):
        what = f"{captions}, {judge}: share of the gap to two steps that is closed"
        add(what, _closed(report, judge), fresh["device"], file)

    for version in ("3.9", "3.6"):
        file = f"aot_sm90_triton-{version}.json"
        aot = _read(file)
        clean = sum("error" not in row and "fault" not in row for row in aot["rows"])
        what = f"kernels compiled for sm_90 without spills or a serialised main loop, Triton {version}"
        add(what, f"{clean} of {len(aot['rows'])}", "no GPU", file)
    for row in suite_rows(RESULTS):
        add(*row)
    return lines


def _closed(report: dict, judge: str) -> str:
    """Of each entry between base and two steps, the share of the gap that it closes, with its standard error."""
    closed = report["gap_closed"][judge]
    return ", ".join(f"{share:.0%} ± {closed['standard_error'][name]:.0%}" for name, share in closed["share"].items())


def suite_rows(folder: Path) -> list[tuple[str, str, str, str]]:
    """(what, figure, device, file) of every figure of the GPU suite, by each of its records in a folder.

    Without a record, and where one has no value, the figure says so; its bar stands beside it.
    """
    found = []
    for file in sorted(folder.glob(FILES)):
        record = json.loads(file.read_text(encoding="utf-8"))
        summary = dict(record["summary"])
        for size, pixels in zip(("small", "large"), map(str, record["settings"]["pixels"]), strict=True):
            summary[f"step_images_per_second_{size}"] = summary["images_per_second"][pixels]
        found.append((summary, record["environment"]["device"], file.name))
    lines = []
    for summary, device, file in found or [({}, "NVIDIA H100", FILES)]:
        for name, what in FIGURES.items():
            bar = " ".join((BARS[name][0], f"{BARS[name][1]:g}")) if name in BARS else None
            entry = summary.get(name, {"value": None, "verdict": "not measured"})
            value = entry["verdict"] if entry["value"] is None else f"{entry['value']:.4g}"
            lines.append((what, value + (f" (bar {bar})" if bar else ""), device, file))
    return lines


def _read(file: str) -> dict:
    return json.loads((RESULTS / file).read_text(encoding="utf-8"))


if __name__ == "__main__":
    print("\n".join(rows()))
