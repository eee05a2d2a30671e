"""The tables of bench/README.md, made from the stored files; a test holds the two together.

    python bench/table.py            print the generated part
    python bench/table.py --write    put it between the two markers of bench/README.md

`highlights` is the short table of the root README.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from suite.summary import BARS, FILES, PIXELS

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent / "README.md"
BEGIN = "<!-- begin: made by `python bench/table.py --write` -->"
END = "<!-- end -->"

FIGURES = {
    "linear_vs_gemm": "`linear_vs_gemm`: perturbed linear over the plain cuBLAS GEMM, worst shape",
    "linear_in_block_vs_gemm": "`linear_in_block_vs_gemm`: the same with all its costs inside a fused block",
    "forward_vs_compiled": "`forward_vs_compiled`: population forward over diffusers' compiled plain one",
    "step_vs_inference": "`step_vs_inference`: ES step over plain generation, decoding and scoring",
    "step_vs_reference_loop": "`step_vs_reference_loop`: ES step over the published algorithm's",
    "memory_per_extra_member": "bytes of memory for each further member at a fixed chunk",
    "step_images_per_second_large": f"images/s of a whole step, {PIXELS[1]} px",
    "step_images_per_second_small": f"images/s of a whole step, {PIXELS[0]} px",
    "update_share": "share of a step that the update takes, N 1024",
}
"""The suite's figures, by their names in a record's summary or in `BARS`."""

ELSEWHERE = {
    "nano_search.json": ("settings of ES, one at a time, short trials", "bench/NANO.md"),
    "nano_refine.json": ("the best of them together, longer trials", "bench/NANO.md"),
    "nano_settle.json": ("one setting at a time around today's", "bench/NANO.md"),
    "nano_compare.json": ("rival settings at equal images", "bench/NANO.md"),
    "nano_dissect.json": ("the headline's adapters taken apart", "bench/NANO.md"),
    "nano_reach.json": ("what A makes of the layers' inputs", "bench/NANO.md"),
    "nano_training.json": ("curves of the model's training", "models/nano/sana-sprint-nano/README.md"),
    "nano_training_again.json": ("a second training, compared", "models/nano/sana-sprint-nano/README.md"),
}
"""Files whose tables stand on another page: what each is, and where."""


class Section(NamedTuple):
    """One stored file of the page.

    Attributes:
        title: heading.
        what: what was measured, a line each.
        device: the machine it ran on.
        files: below bench/results.
        command: what wrote them.
        tables: tables and notes, in their order, each a list of lines.
    """

    title: str
    what: list[str]
    device: str
    files: list[str]
    command: str
    tables: list[list[str]]

    def lines(self) -> list[str]:
        files = ", ".join(f"`bench/results/{file}`" for file in self.files)
        head = [f"### {self.title}", "", *self.what, "", f"- device: {self.device}", f"- file: {files}"]
        body = [line for table in self.tables for line in ("", *table)]
        return [*head, f"- command: `{self.command}`", *body]


def sections() -> list[Section]:
    """Every section of the generated part, in the order of the page."""
    nano = [_demo(), _headline(), _fresh(), _base(), _checker(), _clip()]
    return [*nano, _forward(), _generic(), _drop_in(), _peer_ratio(), _kernels(), _scaling(), _aot(), *_suite()]


def generated() -> list[str]:
    """The lines between the markers."""
    lines = [line for section in sections() for line in (*section.lines(), "")]
    rows = [[f"`bench/results/{file}`", what, f"`{page}`"] for file, (what, page) in ELSEWHERE.items()]
    return [*lines, "### Results on other pages", "", *_table(["file", "what", "page"], rows)]


def highlights() -> list[str]:
    """The six rows of the root README's table: what, figure, file below bench/results."""
    demo, forward = _read("cpu_demo.json"), _read("cpu_forward.json")
    prompts = demo["runs"]["0"]["prompts"]
    gains = (run["groups"][0]["rows"][1]["against_first"]["combined"] for run in demo["runs"].values())
    headline, fresh = (_read(f"nano_{name}.json")["report"] for name in ("headline", "fresh"))
    ratio = forward["layouts"]["64 members x 1 image"]["ratios"]["population / plain"]
    memory = forward["memory"]["bytes_per_further_member"]["forward"]
    aot = "aot_sm90_triton-3.9.json"
    rows = [
        (
            f"nano, demo: reward gained, {prompts} captions",
            ", ".join(_gain(g, 3) for g in gains),
            "cpu_demo.json",
        ),
        (
            f"nano: gap from one step to two closed, {headline['prompts']} captions",
            ", ".join(_closed(headline, "combined")),
            "nano_headline.json",
        ),
        (
            f"nano: the same adapters, {fresh['prompts']} other captions",
            ", ".join(_closed(fresh, "combined")),
            "nano_fresh.json",
        ),
        ("tiny: population forward over plain forward, 64 members", _ratio(ratio), "cpu_forward.json"),
        ("tiny: memory of each further member in a forward", f"{memory:.0f} bytes", "cpu_forward.json"),
        ("kernels compiled for sm_90 without spills, no GPU", _clean(_read(aot)), aot),
    ]
    return [f"| {what} | {figure} | `{file}` |" for what, figure, file in rows]


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


def write(page: Path = PAGE) -> None:
    """Put the generated part into the page. Raises ValueError for a page without the two markers."""
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page}: expected the lines {BEGIN} and {END}")
    page.write_text("\n".join([before + BEGIN, "", *generated(), "", END + after]), encoding="utf-8")


def _demo() -> Section:
    file = "cpu_demo.json"
    record = _read(file)
    runs = record["runs"]
    overall = [run["groups"][0]["rows"] for run in runs.values()]
    rows = []
    for judge in runs["0"]["scores"]:
        bases = ", ".join(f"{base['mean'][judge]:.3f}" for base, _ in overall)
        rows.append([_judge(judge), bases, *(_gain(adapter["against_first"][judge]) for _, adapter in overall)])
    rows.append(["seconds of the run", "", *(f"{run['seconds']:.0f}" for run in runs.values())])
    what = [
        f"The demo, `esengine train` without flags, on {len(runs)} seeds.",
        f"Judged on {runs['0']['prompts']} validation captions, which were never trained on.",
        f"`combined` is the optimised reward, `{record['config']['reward']}`.",
        "Each seed draws its own latents, so each has its own base.",
    ]
    head = ["score", "base of seed 0, 1, 2", *(f"seed {seed}" for seed in runs)]
    command = f"python bench/nano demo --json bench/results/{file}"
    return Section("The demo on a CPU", what, record["device"], [file], command, [_table(head, rows)])


def _drop_in() -> Section:
    files = ["cpu_drop_in.json", "cpu_update.json"]
    record, update = map(_read, files)
    rows = []
    for case, each in record["table"].items():
        theirs = each.get("shardes")
        peer = "" if theirs is None else f"{each['here'] / theirs:.2f}"
        rows.append([case, f"{1e3 * each['here']:.1f}", f"{each['ratio']['median']:.2f}", peer])
    ((tensors, all_of_them),) = update["table"].items()
    head = ["form, N", "forward and update, ms of CPU time", "of the older version", "of shardes"]
    what = [
        "The layer on an MLP 256-1024-1024-10, one row a member, one thread.",
        f"The older version is commit {record['against'][:7]}. All ran in turns.",
        f"Its ratio is the median of {len(record['rounds'])} rounds, that to shardes is of medians.",
        f"shardes {record['shardes']['shardes']} is a JAX library for the same work.",
        "The time in which it compiles is not counted. It gives all members the same row.",
        f"The update alone of {tensors} of the 1.6B model at N 64 takes {all_of_them['here']:.2f} s, "
        f"{all_of_them['ratio']['median']:.2f} of the older version's.",
    ]
    command = "python bench/drop_in.py --against PYTHON --shardes PYTHON --json bench/results/cpu_drop_in.json"
    return Section("The drop-in layer on a CPU", what, record["device"], files, command, [_table(head, rows)])


def _peer_ratio() -> Section:
    file = "cpu_peer_ratio.json"
    record = _read(file)
    named = {"ours": "ours", "published": "the published loop, reimplemented", "published code": "the published code"}
    itself = record["published_code"]
    ratios = {"ours": "", "published": _ratio(record["ratio"])}
    ratios["published code"] = _ratio(itself["ratio"]) if itself else ""
    rows = [[named[name], f"{taken['median']:.2f}", ratios[name]] for name, taken in record["seconds"].items()]
    what = [
        "A step of the published run on sana-sprint-nano, noise, images, scores and update.",
        f"{record['members']} members, {record['prompts']} prompts with {record['repeats']} images each, "
        f"{record['environment']['threads']} thread, turn about.",
        f"The published code itself takes {record['expected']:.2f} times our step"
        + (" in this run." if itself else ", as was once found."),
        "The suite's figure against this loop counts if the loop is within a fifth of that: "
        + ("it is." if record["matches"] else "it is not."),
    ]
    if itself:
        what.append(
            f"On this machine the loop takes {itself['peer_over_it']['of_medians']:.2f} of the time of the published "
            f"code (commit {(itself['commit'] or 'unknown')[:7]})."
        )
    command = f"python bench/peer_ratio.py --checkout HyperscaleES_T2I --json bench/results/{file}"
    device = record["environment"]["device"]
    table = _table(["step", "seconds", "over ours"], rows)
    return Section("The published loop on a CPU", what, device, [file], command, [table])


def _headline() -> Section:
    file = "nano_headline.json"
    record = _read(file)
    report = record["report"]
    groups = {group["name"]: group["rows"] for group in report["groups"]}
    rows = [_above(_judge(judge), judge, groups["all"]) for judge in report["scores"]]
    for name in (name for name in groups if "object" in name):
        rows.append(_above(f"`checker`, {name} ({groups[name][0]['count']})", "checker", groups[name]))
    rows.append(["seconds of training", "", *(f"{seconds:.0f}" for seconds in record["seconds"].values()), ""])
    what = [
        f"A longer run of the same model: {record['config']['steps']} steps, three seeds.",
        f"Judged on {report['prompts']} test captions, one image each, all from the same latents.",
        f"`combined` is the optimised reward, `{record['config']['reward']}`.",
        '"base" is the base in one step. The other columns say by how much they are above it.',
        "The last rows are of the captions with two objects and with one; their number is in brackets.",
    ]
    command = f"python bench/nano headline run --json bench/results/{file} --pictures bench/results"
    tables = [_table(_ENTRIES, rows), *_gap(report, ("combined", "checker", "pickscore")), *_pictures(record)]
    return Section("The nano headline", what, record["device"], [file], command, tables)


def _pictures(record: dict[str, Any]) -> list[list[str]]:
    """The two pictures of the headline with the texts around them."""
    config, scores = record["config"], _read("nano_base.json")["scores"]
    images = config["steps"] * config["population"] * config["es"]["prompts_per_step"] * config["es"]["repeats"]
    up, down = (scores[judge]["1 step, w = 8"]["above_first"]["mean"] for judge in ("checker", "pickscore"))
    return [
        [
            "The first test captions, a column each.",
            "Rows from the top: the base in one step, the three seeds in one step, the base in two steps.",
        ],
        ["![base in one step, three ES-LoRA seeds in one step, base in two steps](results/nano_headline.png)"],
        [
            "What the three runs measured during training.",
            f"Each point is the mean of {config['heldout_prompts']} validation captions, one image each.",
            "The bars are standard errors.",
        ],
        ["![gains of every judge over the steps of three runs](results/nano_curves.png)"],
        [
            f"Each seed drew {images} images for training, with `--update.lr-scale {config['update']['lr_scale']}`.",
            "Every judge gains on every seed. This holds for the judges that were not optimised too.",
            "The gain is more than a stronger guidance would give.",
            f"At guidance scale 8 instead of 4.5 the base changes by {up:+.3f} in `checker` and by {down:+.2f} in",
            "`pickscore` (`bench/results/nano_base.json`).",
        ],
    ]


def _fresh() -> Section:
    file = "nano_fresh.json"
    record = _read(file)
    report, judges = record["report"], ("combined", "checker", "pickscore")
    (rows,) = (group["rows"] for group in report["groups"] if group["by"] == "overall")
    what = [
        f"The headline's adapters on {report['prompts']} other test captions, with other latents.",
        "No setting was chosen by these captions.",
    ]
    command = f"python bench/nano headline fresh --json bench/results/{file}"
    tables = [_table(_ENTRIES, [_above(_judge(judge), judge, rows) for judge in judges]), *_gap(report, judges)]
    return Section("The headline's adapters on fresh captions", what, record["device"], [file], command, tables)


def _base() -> Section:
    file = "nano_base.json"
    record = _read(file)
    settings, scores = record["settings"], record["scores"]
    drawn = {
        "one step": "1 step",
        "two steps": "2 steps",
        "four steps": "4 steps",
        "decoded": "decoded",
        "drawn": "drawn",
    }
    scales = [f"{scale:g}" for scale in settings["scales"]]

    def mean(found: dict[str, float]) -> str:
        return f"{found['mean']:.3f} ± {found['standard_error']:.3f}"

    rows = [[_judge(judge), *(mean(found[name]) for name in drawn.values())] for judge, found in scores.items()]
    guided = []
    for judge, found in scores.items():
        above = (found[f"1 step, w = {scale}"]["above_first"] for scale in scales)
        guided.append([_judge(judge), *(f"{a['mean']:+.4f} ± {a['standard_error']:.4f}" for a in above)])
    what = [
        f"The packaged model without an adapter, on {settings['count']} {settings['split']} captions.",
        '"drawn" is the world\'s own picture of the caption. "decoded" is that picture through the autoencoder.',
    ]
    note = ["One step at another guidance scale w, compared with one step at the default of 4.5:"]
    command = f"python bench/nano base --count {settings['count']} --json bench/results/{file}"
    tables = [_table(["score", *drawn], rows), note, _table(["score", *(f"w = {s}" for s in scales)], guided)]
    return Section("sana-sprint-nano, the base model", what, record["device"], [file], command, tables)


def _checker() -> Section:
    file = "nano_checker.json"
    what = ["How often the rule-based judge `checker` is right, on pictures of the nano world with their captions."]
    return _judged("The judge `checker`", what, file, f"python bench/nano checker --json bench/results/{file}")


def _clip() -> Section:
    file = "nano_clip.json"
    what = ["The same pictures judged by `pickscore` of clip-nano. Its scale is not that of `checker`."]
    command = f'python bench/nano checker --reward "pickscore(model=nano)" --json bench/results/{file}'
    return _judged("The judge clip-nano", what, file, command)


def _judged(title: str, what: list[str], file: str, command: str) -> Section:
    record = _read(file)
    settings, conditions = record["settings"], record["conditions"]
    means = [[name, f"{c['mean']:.4f} ± {c['standard_error']:.4f}"] for name, c in conditions.items()]
    kinds = conditions["as drawn"]["wrong"]
    wrong = [
        [kind, str(found["pairs"]), *(f"{c['wrong'][kind]['right_is_higher']:.4f}" for c in conditions.values())]
        for kind, found in kinds.items()
    ]
    what = [*what, f"{settings['count']} {settings['split']} captions, each with its own picture, clean and damaged."]
    note = [
        "How often the right caption scores higher than one that is wrong in a single fact.",
        '"binding" exchanges the colours of the two objects.',
    ]
    tables = [_table(["pictures", "mean score"], means), note, _table(["wrong in", "pairs", *conditions], wrong)]
    return Section(title, what, record["device"], [file], command, tables)


def _forward() -> Section:
    file = "cpu_forward.json"
    record = _read(file)
    memory, pairs = record["memory"], {
        "population / plain": "population / plain",
        "adapter / plain": "plain LoRA / plain",
        "loop / population": "loop / population",
    }  # fmt: skip
    rows = [[name, *(_ratio(layout["ratios"][pair]) for pair in pairs)] for name, layout in record["layouts"].items()]
    peaks = memory["peak_bytes"]
    peak_rows = [[part, *(f"{peak[part] / 1e6:.1f} MB" for peak in peaks.values())] for part in ("forward", "update")]
    further = memory["bytes_per_further_member"]
    what = [
        "Time of one batched forward where every row is its own member, on the tiny model in float32.",
        '"plain" is the same batch through the model without an adapter, "plain LoRA" through PEFT\'s.',
        '"loop" sets the weights of one member after the other. A ratio of 1 means equal time.',
        "A cell has the ratio of the medians, then the 20th and 80th percentile of the paired ratios.",
    ]
    note = [
        f"Peak memory of a step at a fixed chunk of {memory['chunk']} rows, for N members.",
        f"Each further member from N {list(peaks)[-2]} to {list(peaks)[-1]}: "
        f"{further['forward']:.0f} bytes in the forward, {further['update']:.0f} bytes in the update.",
    ]
    command = f"python bench/forward.py --json bench/results/{file}"
    tables = [_table(["batch", *pairs.values()], rows), note, _table(["part", *(f"N {n}" for n in peaks)], peak_rows)]
    return Section("The population forward on a CPU", what, record["environment"]["device"], [file], command, tables)


def _generic() -> Section:
    file = "cpu_generic.json"
    record = _read(file)
    rows = []
    for name, layout in record["layouts"].items():
        medians = [f"{1e3 * layout['seconds'][way]['median']:.0f} ms" for way in ("generic", "own")]
        rows.append([name.removesuffix(" steps"), *medians, _ratio(layout["ratios"]["generic / own"])])
    what = [
        "64 members draw an image each with sana-sprint-nano in float32, one thread, CPU time.",
        "`DiffusersPipeline` calls the pipeline itself, `SanaSprint` is written by hand. 1 means equal time.",
    ]
    command = f"python bench/generic.py --json bench/results/{file}"
    tables = [_table(["denoising steps", "`DiffusersPipeline`", "`SanaSprint`", "ratio"], rows)]
    return Section("Any pipeline on a CPU", what, record["environment"]["device"], [file], command, tables)


def _kernels() -> Section:
    file = "cpu_kernels.json"
    benchmarks = _read(file)["benchmarks"]
    found: dict[str, dict[str, dict[str, str]]] = {"population_linear": {}, "es_update": {}, "normals": {}, "plan": {}}
    for each in benchmarks:
        info = each["extra_info"]
        if info["op"] == "population_linear":
            case = f"{info['n_in']} to {info['n_out']}, {info['rows']} rows a member, {info['members']} members"
        elif info["op"] == "es_update":
            case = f"{info['shape'][0]} x {info['shape'][1]}, {info['members']} members"
        elif info["op"] == "normals":
            case = f"{info['count']} normals for {info['pairs']} pairs"
        else:
            case = f"{info['factors']} factors for {info['pairs']} pairs, as for the whole tiny model"
        peer = info.get("peer", "ms")
        found[info["op"]].setdefault(case, {})[peer] = f"{each['stats']['median'] * 1e3:.3f}"

    def table(op: str, head: str, *peers: str) -> list[str]:
        return _table([head, *peers], [[case, *(times[peer] for peer in peers)] for case, times in found[op].items()])

    what = [
        "Each op by itself, on a CPU and through torch. These are not the Triton kernels.",
        'Medians in milliseconds. "plain" is the linear without noise. "loop" goes through the members one by one.',
    ]
    note = ['The update of one tensor. "rebuilt" makes the noise again from its key. "stored" reads it from memory.']
    tables = [table("population_linear", "linear", "plain", "population", "loop")]
    tables += [note, table("es_update", "tensor", "rebuilt", "stored"), ["The noise:"]]
    found["normals"] |= found["plan"]
    tables.append(table("normals", "noise", "ms"))
    command = f"pytest bench --benchmark-enable --benchmark-json=bench/results/{file}"
    return Section("Single ops on a CPU", what, benchmarks[0]["extra_info"]["device"], [file], command, tables)


def _scaling() -> Section:
    file = "cpu_scaling.json"
    record = _read(file)
    runs = [
        [count, f"{run['images_per_second']:.1f}", f"{run['efficiency']:.2f}"] for count, run in record["runs"].items()
    ]
    modelled = record["modelled_efficiency"]
    what = [
        "Training steps of the tiny model with several processes, one thread each.",
        '"efficiency" is images per second over those of one process times the number of processes.',
    ]
    note = ["The efficiency that follows from one process's step, for more processes than were measured:"]
    tables = [
        _table(["processes", "images/s", "efficiency"], runs),
        note,
        _table([f"{count} processes" if count != "1" else "1 process" for count in modelled],
               [[f"{share:.2f}" for share in modelled.values()]]),
    ]  # fmt: skip
    command = f"python bench/scaling.py --json bench/results/{file}"
    return Section("Several processes on a CPU", what, record["device"], [file], command, tables)


def _aot() -> Section:
    rows, files = [], sorted(file.name for file in RESULTS.glob("aot_sm*_triton-*.json"))
    for file in sorted(files, key=lambda file: (file.rpartition("-")[2], int(file.split("_")[1][2:])), reverse=True):
        record = _read(file)
        version = file.rpartition("-")[2].removesuffix(".json")
        rows.append([f"sm_{record['arch']}", version, _clean(record), f"`bench/results/{file}`"])
    what = [
        "What the compiler makes of every Triton kernel, at the shapes of SANA-Sprint.",
        "No GPU is used and nothing is timed.",
        '"clean" kernels have no register spills and no serialised main loop.',
        "sm_90 (H100, H200) is compiled for all shapes, the others for those of the published run.",
    ]
    command = "python bench/aot.py --arch 90 80 100 --json bench/results --also .venv/triton-oldest"
    table = _table(["architecture", "Triton", "clean", "file"], rows)
    return Section("Kernels compiled without a GPU", what, "none", ["aot_sm*_triton-*.json"], command, [table])


def _suite() -> list[Section]:
    records: dict[tuple[str, str], list[list[str]]] = {}
    for what, figure, device, file in suite_rows(RESULTS):
        records.setdefault((device, file), []).append([what, figure])
    says = [
        "Every speed figure of the engine at full size, with random weights. A bar is the goal that was set for it."
    ]
    return [
        Section("The GPU suite", says, device, [file], "make gpu-suite", [_table(["figure", "value"], rows)])
        for (device, file), rows in records.items()
    ]


_ENTRIES = ["score", "base", "seed 0", "seed 1", "seed 2", "two steps"]


def _above(label: str, judge: str, rows: list[dict[str, Any]]) -> list[str]:
    """The base's score, then by how much the others are above it."""
    return [label, f"{rows[0]['mean'][judge]:.4f}", *(_gain(row["against_first"][judge]) for row in rows[1:])]


def _gap(report: dict[str, Any], judges: Iterable[str]) -> list[list[str]]:
    rows = [[_judge(judge), *_closed(report, judge)] for judge in judges]
    note = ["The share of the gap between one step and two steps of the base that each adapter closes in one step:"]
    return [note, _table(["score", "seed 0", "seed 1", "seed 2"], rows)]


def _closed(report: dict[str, Any], judge: str) -> list[str]:
    """Of each entry between base and two steps, the share of the gap that it closes, with its standard error."""
    closed = report["gap_closed"][judge]
    return [f"{share:.0%} ± {closed['standard_error'][name]:.0%}" for name, share in closed["share"].items()]


def _judge(name: str) -> str:
    return f"`{name}`"


def _gain(paired: dict[str, float], digits: int = 4) -> str:
    return f"{paired['difference']:+.{digits}f} ± {paired['standard_error']:.{digits}f}"


def _ratio(ratio: dict[str, float]) -> str:
    return f"{ratio['of_medians']:.2f} (p20 {ratio['paired_p20']:.2f}, p80 {ratio['paired_p80']:.2f})"


def _clean(record: dict[str, Any]) -> str:
    rows = record["rows"]
    return f"{sum('error' not in row and 'fault' not in row for row in rows)} of {len(rows)}"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of Markdown."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _read(file: str) -> dict[str, Any]:
    return json.loads((RESULTS / file).read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="into bench/README.md, between its two markers")
    if parser.parse_args().write:
        write()
    else:
        print("\n".join(generated()))


if __name__ == "__main__":
    main()
