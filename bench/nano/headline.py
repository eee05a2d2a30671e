"""The headline on sana-sprint-nano: base in one step, ES-LoRA in one step from three seeds, base in two steps.

    python bench/nano headline run   --json bench/results/nano_headline.json --pictures bench/results
    python bench/nano headline fresh --json bench/results/nano_fresh.json     # its adapters on other test captions
    python bench/nano headline picture    # the picture of the README, from the stored nano_headline.png

The runs are `esengine train` with the settings of `HEADLINE`. The table is that of `esengine eval --benchmark nano`.
Stopped runs are resumed. The pictures are nano_headline.png and nano_curves.png.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import record
import torch
from PIL import Image

from esengine.base.progress import Progress
from esengine.base.settings_file import from_dict
from esengine.cli.eval import evaluate
from esengine.cli.settings import EvalConfig
from esengine.evaluation.benchmarks import read_benchmark
from esengine.models.defaults import defaults
from esengine.models.nano import world
from esengine.rewards.roles import judges
from esengine.rewards.spec import read
from esengine.run import journal
from esengine.run.curves import held_of
from esengine.run.pictures import draw_strip
from esengine.run.settings import TrainConfig, differences, load, load_run, to_dict
from esengine.run.train import train
from nano.es import merged

RESULTS = Path(__file__).parents[1] / "results"

HEADLINE: dict[str, Any] = {
    "steps": 1280,
    "heldout_every": 128,
    "heldout_prompts": 512,
    "update": {"lr_scale": 0.25},
}
"""What the headline's runs change of `esengine train` without flags: more steps of a lower rate, because what is
learned grows with rate x steps, and what the random walk of the noise costs with rate^2 x steps; smoother curves."""


def headline(options: argparse.Namespace) -> None:
    """Train on several seeds, then one evaluation of all of them on the test captions."""
    settings = merged(to_dict(load("nano")), HEADLINE | ({"steps": options.steps} if options.steps else {}))
    environment = record.environment()
    folders = {f"seed{seed}": options.work / f"seed{seed}" for seed in options.seeds}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, mp_context=spawn) as pool:
        made = [pool.submit(_seed, seed, folders[f"seed{seed}"], settings) for seed in options.seeds]
        seconds = {name: each.result() for name, each in zip(folders, made, strict=True)}
    found = evaluate(EvalConfig(benchmark="nano", out=options.work / "evaluation", **_compared(options)), Progress())
    print(found.report.table())
    print(f"report  {found.folder / 'report.html'}")
    if options.pictures:
        gallery(found.folder / "images", found.report.entries, options.pictures / "nano_headline.png")
        curves(folders, options.pictures / "nano_curves.png")
    if options.json:
        what = {"what": "bench/nano headline run", "config": settings}
        what |= {"seconds": seconds, "report": json.loads(found.report.to_json()), "scores": scores(found.folder)}
        record.write(options.json, {**what, **environment})


def fresh(options: argparse.Namespace) -> None:
    """The headline's adapters on test captions and noise that nothing was measured with while settings were chosen."""
    environment = record.environment()
    known = {*read_benchmark("nano").prompts, *world.captions("test", *MEASURED)}
    named = {world.parse(caption).combination() for caption in known}
    drawn = world.captions("test", 5000, 2)
    captions = [caption for caption in drawn if world.parse(caption).combination() not in named][:2000]
    with tempfile.TemporaryDirectory() as folder:
        (file := Path(folder) / "fresh test captions.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
        config = EvalConfig(model="nano", prompts=file, repeats=1, seed=FRESH, **_compared(options))
        report = evaluate(config, Progress()).report
    print(report.table())
    if options.json:
        what = {"what": "bench/nano headline fresh", "report": json.loads(report.to_json())}
        record.write(options.json, {**what, **environment})


FRESH = 1 << 20
"""A seed that no run has: its noise is nobody's."""
MEASURED = 2600, 1
"""Count and seed of test captions that earlier adapters were measured with."""


def _compared(options: argparse.Namespace) -> dict[str, Any]:
    """Entries, and the rewards: what was optimised, and every judge."""
    optimised = load("nano").reward
    runs = (f"seed{seed}={options.work / f'seed{seed}'}@1" for seed in options.seeds)
    others = [f"{term.text()}=0" for term in judges(defaults("nano"), read(optimised), own_prompts=False)]
    return {"entries": ("base@1", *runs, "base@2"), "reward": ",".join([optimised, *others])}


def scores(evaluation: Path) -> dict[str, dict[str, list[float]]]:
    """Of each entry and judge, the scores of all captions in their order, to six digits."""
    lines = [json.loads(line) for line in (evaluation / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    found: dict[str, dict[str, list[float]]] = {}
    for line in sorted(lines, key=lambda line: line["index"]):
        for judge, score in line["scores"].items():
            found.setdefault(line["entry"], {}).setdefault(judge, []).append(float(f"{score:.6g}"))
    return found


def curves(runs: dict[str, Path], path: Path) -> None:
    """Held-out scores of the runs over their steps: how far each is above the base, and its standard error."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    measures = {name: held_of(journal.read(run / journal.NAME)) for name, run in runs.items()}
    judges = list(next(iter(measures.values()))[0].change)
    figure, axes = plt.subplots(1, len(judges), figsize=(3 * len(judges), 2.6), layout="constrained")
    for axis, judge in zip(axes, judges, strict=True):
        for name, found in measures.items():
            steps = [each.step for each in found]
            change, error = zip(*(each.change[judge] for each in found), strict=True)
            axis.errorbar(steps, change, error, label=name, capsize=2)
        axis.axhline(0, color="grey", linewidth=0.5)
        axis.set(title=judge, xlabel="step")
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def gallery(images: Path, entries: list[str], path: Path, columns: int = 24) -> None:
    """The first captions' images, a column each, a row an entry."""
    drawn = [sorted((images / entry).iterdir())[:columns] for entry in entries]
    side, gap = world.SIDE, 2
    sheet = Image.new("RGB", (columns * (side + gap), len(entries) * (side + gap)), "white")
    for row, files in enumerate(drawn):
        for column, file in enumerate(files):
            with Image.open(file) as image:
                sheet.paste(image, (column * (side + gap), row * (side + gap)))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)


def picture(sheet: Path, path: Path, columns: int = 6) -> None:
    """The first captions of a `gallery`, labelled: the base in one step above the first seed's adapter."""
    captions, place = read_benchmark("nano").prompts[:columns], world.SIDE + 2
    with Image.open(sheet) as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    rows = {}
    for row, label in enumerate(("base", "ES-LoRA")):
        top = row * place
        tiles = [pixels[:, top : top + world.SIDE, i * place : i * place + world.SIDE] for i in range(columns)]
        rows[label] = torch.stack(tiles).repeat_interleave(3, 2).repeat_interleave(3, 3)
    draw_strip(rows, captions, margin=6).save(path, optimize=True)


RESOLVED = ("run_dir", "resume", "device", "dtype", "heldout_reward", "image.chunk")
"""Settings that a run folder has chosen where the headline leaves them open."""


def _seed(seed: int, folder: Path, settings: dict[str, Any]) -> float | None:
    """Seconds of a run of this seed, gone on with where it was stopped; None where it had been finished before."""
    torch.set_num_threads(1)
    config = from_dict(TrainConfig(), settings | {"seed": seed, "run_dir": str(folder)}, "headline")
    if (folder / "eval.json").is_file():
        if other := differences(to_dict(load_run(folder)), to_dict(config), RESOLVED):
            raise SystemExit(f"{folder}: a finished run of other settings ({', '.join(other)}); give another --work")
        return None
    start = time.perf_counter()
    train(replace(config, resume=(folder / "checkpoints").is_dir()))
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "fresh", "picture"))
    parser.add_argument("--json", type=Path, help="store the record there")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run for each")
    parser.add_argument("--steps", type=int, help=f"by default {HEADLINE['steps']}")
    parser.add_argument("--work", type=Path, default=Path("runs/nano-headline"), help="folder of the runs")
    parser.add_argument("--pictures", type=Path, help="folder for the gallery and the curves")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="runs at a time")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if options.command == "picture":  # of what is stored; nothing is drawn anew
        return picture(RESULTS / "nano_headline.png", RESULTS / "readme.png")
    (headline if options.command == "run" else fresh)(options)
