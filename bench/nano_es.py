"""Evolution Strategies on sana-sprint-nano: which settings, what is better than what, and the headline table.

    python bench/nano_es.py search    --json bench/results/nano_search.json      # one setting at a time
    python bench/nano_es.py compare   --json bench/results/nano_compare.json     # rivals at equal images
    python bench/nano_es.py headline  --json bench/results/nano_headline.json --pictures bench/results

Every trial is `esengine train` on packaged training captions; `search` and `compare` judge by the packaged validation
captions, `headline` by `esengine eval --benchmark nano`, test captions (bench/NANO.md says what was known of them). A
file that is there is gone on with: trials that it holds are not run again. Two trials run at a time, a thread each. The
headline is of three seeds and writes two pictures, nano_headline.png and nano_curves.png.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import record
import torch
from PIL import Image

from esengine.config import REFERENCE_TARGETS, EvalConfig, TrainConfig, from_dict, load, to_dict
from esengine.defaults import defaults
from esengine.evaluate import evaluate
from esengine.guard import reward_names
from esengine.models import SanaSprint
from esengine.models.nano import world
from esengine.progress import Progress
from esengine.report.curves import read_held
from esengine.rewards import parse
from esengine.train import train

QUIET = {"heldout_every": 1 << 20, "checkpoint_every": 1 << 20, "strip_every": 0}
"""Of every trial: judges measure before and after, nothing else is drawn beside the population."""

CENTRE: dict[str, Any] = to_dict(load("nano"))
"""Trials change a setting or two of `esengine train` without flags."""

RATES = (0.2, 0.8)
"""Learning rates, in units of sigma, that each rival is tried at; of what is scaled otherwise, times its `USUAL`."""

USUAL = {"none": 2.8, "centred": 3.5, "adam": 0.2, "momentum": 0.1, "direct": 2.0}
"""How much larger the learning rate is, in units of sigma, for steps of the centre's length. On paper: without shaping
members differ by 1 / sqrt(P R), ranks by 1 / sqrt(12); a step of adam is 1, of sgd 1 / sqrt(N) of it; a momentum of 0.9
adds up to 10. That of direct mode was found by trying."""


def setting(path: str, value: Any) -> dict[str, Any]:
    """{"es": {"sigma": 0.1}} from "es.sigma"."""
    *above, name = path.split(".")
    nested = {name: value}
    for part in reversed(above):
        nested = {part: nested}
    return nested


def merged(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`base` with the nested values of `change` in their places."""
    return base | {
        name: merged(base.get(name, {}), value) if isinstance(value, dict) else value for name, value in change.items()
    }


def trial(change: dict[str, Any], images: int, seed: int) -> dict[str, Any]:
    """Train with a change of the centre, for so many images; the gain of every judge on validation captions."""
    torch.set_num_threads(1)
    settings = merged(merged(CENTRE, QUIET), change)
    es = settings["es"]
    per_step = settings["population"] * es["prompts_per_step"] * es["repeats"]
    steps = max(1, round(images / per_step))
    with tempfile.TemporaryDirectory() as folder:
        settings |= {"steps": steps, "seed": seed, "run_dir": str(Path(folder) / "run")}
        start = time.perf_counter()
        report = train(from_dict(TrainConfig(), settings, "trial")).comparison
        seconds = time.perf_counter() - start
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    base, adapter = report.overall
    return {
        "change": change,
        "seed": seed,
        "steps": steps,
        "images": steps * per_step,
        "seconds": seconds,
        "adapter_norm": json.loads(lines[-1])["adapter_norm"],
        "base": base["mean"],
        "gain": adapter["against_first"],
    }


def search_plan(options: argparse.Namespace) -> list[tuple[str, dict[str, Any], int]]:
    """(name, change, seed): the centre, and around it one setting at a time."""
    plan = [("centre", {}), ("reference run", REFERENCE)]
    plan += [(f"targets: {name}", setting("lora.targets", targets)) for name, targets in TARGETS.items()]
    plan += [(f"{path} {value}", setting(path, value)) for path, values in AROUND.items() for value in values]
    plan += list(TOGETHER.items())
    return [(name, change, seed) for seed in options.seeds for name, change in plan]


REFERENCE = {
    "population": 128,
    "lora": {"rank": 2, "alpha": 8.0, "targets": list(REFERENCE_TARGETS)},
    "es": {"sigma": 1e-2, "noise_rank": 1, "shaping": "zscore", "prompts_per_step": 4, "repeats": 4},
    "update": {"optimizer": "sgd", "lr_scale": 0.1, "max_norm": 40.0},
}
"""The published run's, but for its sampler's angle."""

TARGETS = {
    "all of the published run": list(REFERENCE_TARGETS),
    "attention": ["to_q", "to_k", "to_v", "to_out.0"],
    "guidance_embedder.linear_1": ["guidance_embedder.linear_1"],
    "time_embed.linear": ["time_embed.linear"],
    "caption_projection": ["caption_projection.linear_1", "caption_projection.linear_2"],
    "timestep_embedder.linear_1": ["timestep_embedder.linear_1"],
    "proj_out": ["proj_out"],
}
AROUND: dict[str, tuple] = {
    "es.sigma": (0.002, 0.008),
    "update.lr_scale": (0.2, 0.8),
    "population": (8, 128),
    "es.prompts_per_step": (2, 32),
    "es.noise_rank": (4,),
    "reward": ("pickscore(model=nano)", "checker"),
}
TOGETHER: dict[str, dict[str, Any]] = {
    "lora.alpha 8, es.sigma 0.04": {"lora": {"alpha": 8.0}, "es": {"sigma": 0.04}},
    **{f"lora.rank {rank}, alpha {40 * rank}": {"lora": {"rank": rank, "alpha": 40.0 * rank}} for rank in (1, 4)},
    **{
        f"update.optimizer {name}": {"update": {"optimizer": name, "lr_scale": 0.4 * USUAL[name]}}
        for name in ("momentum", "adam")
    },
}
"""Settings that only make sense together."""


def compare_plan(options: argparse.Namespace) -> list[tuple[str, dict[str, Any], int]]:
    """(name, change, seed): every rival at every rate."""
    rivals = {
        "LoRA, k = 1": ({}, 1.0),
        "LoRA, k = 4": (setting("es.noise_rank", 4), 1.0),
        "direct, k = 1": ({"lora": {"rank": 0}, "es": {"sigma": 0.005}}, USUAL["direct"]),
        "centred ranks": (setting("es.shaping", "centered_rank"), USUAL["centred"]),
        "no shaping": (setting("es.shaping", "none"), USUAL["none"]),
        "population 8": (setting("population", 8), 0.5),
        "population 128": (setting("population", 128), 2.0),
    }
    plan = []
    for seed, (name, (change, usual)), rate in itertools.product(options.seeds, rivals.items(), RATES):
        plan.append((f"{name}, rate {rate:g}", merged(change, setting("update.lr_scale", rate * usual)), seed))
    return plan


def trials(plan: list[tuple[str, dict[str, Any], int]], options: argparse.Namespace) -> None:
    """Run what the file lacks of a plan, two at a time, writing the file after each."""
    found, of = {}, made_of()
    if options.json and options.json.is_file():
        stored = json.loads(options.json.read_text(encoding="utf-8"))
        if {name: stored.get(name) for name in of} != of:
            raise SystemExit(f"{options.json}: expected trials of this model, judges and centre, got others; remove it")
        found = stored["trials"]
    todo = [(f"{name}, seed {seed}", change, seed) for name, change, seed in plan]
    todo = [each for each in todo if each[0] not in found]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, mp_context=spawn) as pool:
        waiting = {pool.submit(trial, change, options.images, seed): name for name, change, seed in todo}
        for done in as_completed(waiting):
            name = waiting[done]
            found[name] = done.result()
            gains = ", ".join(
                f"{score} {gain['difference']:+.4f} ± {gain['standard_error']:.4f}"
                for score, gain in found[name]["gain"].items()
            )
            print(f"{len(found)}/{len(plan)}  {name}: {found[name]['seconds']:.0f} s, {gains}", flush=True)
            if options.json:
                what = {"what": f"bench/nano_es.py {options.command}", "images": options.images, **of}
                record.write(options.json, {**what, "trials": found, **record.environment()})
    print("\n".join(table(found)))


def made_of() -> dict[str, Any]:
    """What every trial has in common: the model's and the judges' identities, and the centre."""
    return {
        "model": SanaSprint.from_pretrained("nano").identity(),
        "rewards": parse(defaults("nano").benchmark("nano")).settings(),
        "centre": CENTRE,
    }


def table(trials: dict[str, Any]) -> list[str]:
    """Markdown rows of a record's trials: gains on validation captions, paired, with standard errors."""
    judges = ("combined", "checker", "pickscore", "aesthetic")
    rows = [f"| {' | '.join(['trial', 'images', *judges])} |", "|---" * (2 + len(judges)) + "|"]
    for name, found in trials.items():
        judged = (found["gain"].get(judge) for judge in judges)  # of a single reward nothing is combined
        gains = [f"{gain['difference']:+.4f} ± {gain['standard_error']:.4f}" if gain else "" for gain in judged]
        rows.append(f"| {' | '.join([name, str(found['images']), *gains])} |")
    return rows


def headline(options: argparse.Namespace) -> None:
    """Train on several seeds, then one evaluation of all of them on the test captions."""
    folders = {f"seed{seed}": options.work / f"seed{seed}" for seed in options.seeds}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, mp_context=spawn) as pool:
        made = [pool.submit(_seed, seed, folders[f"seed{seed}"], options.steps) for seed in options.seeds]
        seconds = {name: each.result() for name, each in zip(folders, made, strict=True)}
    entries = ("base@1", *(f"{name}={folder}@1" for name, folder in folders.items()), "base@2")
    optimised = CENTRE["reward"]
    reward = defaults("nano").scored(optimised, reward_names(optimised), False)
    config = EvalConfig(benchmark="nano", reward=reward, entries=entries, out=options.work / "evaluation")
    found = evaluate(config, Progress())
    print(found.report.table())
    print(f"report  {found.folder / 'report.html'}")
    if options.pictures:
        gallery(found.folder / "images", found.report.entries, options.pictures / "nano_headline.png")
        curves(folders, options.pictures / "nano_curves.png")
    if options.json:
        what = {"what": "bench/nano_es.py headline", "config": merged(CENTRE, {"steps": options.steps})}
        what |= {"seconds": seconds, "report": json.loads(found.report.to_json()), "scores": scores(found.folder)}
        record.write(options.json, {**what, **record.environment()})


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

    measures = {name: read_held(run / "heldout.jsonl") for name, run in runs.items()}
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


def _seed(seed: int, folder: Path, steps: int) -> float | None:
    """Seconds of a run of this seed, gone on with where it was stopped; None where it had been finished before."""
    torch.set_num_threads(1)
    if (folder / "eval.json").is_file():
        return None
    start = time.perf_counter()
    config = replace(load("nano"), seed=seed, steps=steps, run_dir=folder)
    train(replace(config, resume=(folder / "checkpoints").is_dir()))
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("search", "compare", "headline"))
    parser.add_argument("--json", type=Path, help="store the record there; trials that it holds are not run again")
    parser.add_argument("--images", type=int, default=8192, help="of a trial's training")
    parser.add_argument("--seeds", type=int, nargs="+", help="of trials 0, of the headline 0 1 2")
    parser.add_argument("--steps", type=int, default=480, help="of a headline run")
    parser.add_argument("--work", type=Path, default=Path("runs/nano-headline"), help="folder of the headline's runs")
    parser.add_argument("--pictures", type=Path, help="folder for the headline's gallery and curves")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="trials at a time")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if options.command == "headline":
        options.seeds = options.seeds or [0, 1, 2]
        headline(options)
    else:
        options.seeds = options.seeds or [0]
        trials((search_plan if options.command == "search" else compare_plan)(options), options)


if __name__ == "__main__":
    main()
