"""Evolution Strategies on sana-sprint-nano: trials of settings.

    python bench/nano es search    --json bench/results/nano_search.json      # one setting at a time
    python bench/nano es refine    --json bench/results/nano_refine.json      # longer trials, several settings at once
    python bench/nano es settle    --json bench/results/nano_settle.json      # around the result, as long as a demo
    python bench/nano es reach     --json bench/results/nano_reach.json       # |A x|^2 for the inputs of the layers
    python bench/nano es compare   --json bench/results/nano_compare.json     # rival settings at equal images

Every trial is `esengine train` on the packaged training captions, judged on the packaged validation captions. If the
file exists, the trials in it are not run again. Two trials run at a time, with one thread each.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import record
import torch

from esengine.base.settings_file import from_dict
from esengine.models import SanaSprint
from esengine.models.defaults import defaults
from esengine.models.families import REFERENCE_TARGETS
from esengine.rewards import parse
from esengine.run import journal
from esengine.run.prepare import attach_population
from esengine.run.settings import TrainConfig, load, to_dict
from esengine.run.train import train
from esengine.sampling.build import render_settings

QUIET = {"heldout_every": 1 << 20, "checkpoint_every": 1 << 20, "strip_every": 0}
"""Of every trial: judges measure before and after, nothing else is drawn beside the population."""

FOUR = (
    "guidance_embedder.linear_1",
    "time_embed.linear",
    "caption_projection.linear_1",
    "caption_projection.linear_2",
)
CENTRE: dict[str, Any] = to_dict(
    from_dict(
        TrainConfig(),
        {
            "steps": 160,
            "reward": "checker=1,pickscore(model=nano)=0.02",
            "checkpoint_every": 10,
            "strip_every": 32,
            "heldout_every": 32,
            "heldout_prompts": 64,
            "lora": {"rank": 2, "alpha": 80.0, "targets": list(FOUR)},
            "es": {"sigma": 0.004, "prompts_per_step": 8, "repeats": 1},
            "update": {"lr_scale": 0.4},
            "image": {"num_steps": 1, "guidance_scale": 4.5},
        },
        "centre",
    )
)
"""Where the search began: trials change a setting or two of it. What came of it is `models/nano/data/nano.yaml`."""

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


def length(change: dict[str, Any], images: int) -> tuple[int, int]:
    """Steps of a trial of about so many images, and how many it draws."""
    settings = merged(CENTRE, change)
    per_step = settings["population"] * settings["es"]["prompts_per_step"] * settings["es"]["repeats"]
    steps = max(1, round(images / per_step))
    return steps, steps * per_step


def trial(change: dict[str, Any], images: int, seed: int) -> dict[str, Any]:
    """Train with a change of the centre, for so many images; the gain of every judge on validation captions."""
    torch.set_num_threads(1)
    settings = merged(merged(CENTRE, QUIET), change)
    steps, images = length(change, images)
    with tempfile.TemporaryDirectory() as folder:
        settings |= {"steps": steps, "seed": seed, "run_dir": str(Path(folder) / "run")}
        start = time.perf_counter()
        report = train(from_dict(TrainConfig(), settings, "trial")).comparison
        seconds = time.perf_counter() - start
        last = journal.read(Path(folder) / "run" / journal.NAME).of(journal.Step)[-1]
    base, adapter = report.overall
    return {
        "change": change,
        "seed": seed,
        "steps": steps,
        "images": images,
        "seconds": seconds,
        "adapter_norm": last.metrics["adapter_norm"],
        "base": base["mean"],
        "gain": adapter["against_first"],
    }


def search_plan(options: argparse.Namespace) -> list[tuple[str, dict[str, Any], int]]:
    """(name, change, seed): the centre, and around it one setting at a time."""
    plan = [("centre", {}), ("reference run", REFERENCE)]
    plan += [(f"targets: {name}", setting("lora.targets", targets)) for name, targets in TARGETS.items()]
    plan += [(f"{path} {value}", setting(path, value)) for path, values in AROUND.items() for value in values]
    plan += list(TOGETHER.items())
    return [(name, change, seed) for seed in options.seeds or [0] for name, change in plan]


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


def refine_plan(options: argparse.Namespace) -> list[tuple[str, dict[str, Any], int]]:
    """(name, change, seed): longer trials of what the search liked, together."""
    return [
        (f"{name}, rate {rate:g}", at_rate(change, rate), seed)
        for seed in options.seeds or [0]
        for name, change, rate in REFINED
    ]


def settle_plan(options: argparse.Namespace) -> list[tuple[str, dict[str, Any], int]]:
    """(name, change, seed): today's `nano.yaml`, and one thing changed in it."""
    return [(name, merged(TODAY, change), seed) for name, change, seeds in SETTLED for seed in (options.seeds or seeds)]


def at_rate(change: dict[str, Any], rate: float) -> dict[str, Any]:
    return merged(change, setting("update.lr_scale", rate))


def targets(*names: str) -> dict[str, Any]:
    """The change that adapts these layers."""
    return setting("lora.targets", list(names))


GUIDANCE, TIME, CAPTION = (
    "guidance_embedder.linear_1",
    "time_embed.linear",
    ("caption_projection.linear_1", "caption_projection.linear_2"),
)
REFINED: tuple[tuple[str, dict[str, Any], float], ...] = (
    ("centre", {}, 0.4),
    ("centre", {}, 1.6),
    ("centre", {}, 3.2),
    ("proj_out too", targets(*FOUR, "proj_out"), 0.8),
    ("proj_out too", targets(*FOUR, "proj_out"), 1.6),
    ("proj_out too", targets(*FOUR, "proj_out"), 3.2),
    ("sigma 0.008, proj_out too", merged(targets(*FOUR, "proj_out"), setting("es.sigma", 0.008)), 0.8),
    ("all of the published run", targets(*REFERENCE_TARGETS), 1.6),
    ("guidance alone", targets(GUIDANCE), 0.8),
    ("sigma 0.016", setting("es.sigma", 0.016), 0.2),
    ("guidance and caption", targets(GUIDANCE, *CAPTION), 0.8),
    ("proj_out alone", targets("proj_out"), 0.1),
    ("guidance and proj_out", targets(GUIDANCE, "proj_out"), 0.4),
    ("guidance alone", targets(GUIDANCE), 1.6),
)
"""Name, change, learning rate in units of sigma."""


TODAY = {name: to_dict(load("nano"))[name] for name in ("lora", "es", "update", "population", "reward")}
"""The centre's settings that may differ from `nano.yaml`."""


def rescaled(rank: int) -> dict[str, Any]:
    """The change of today's rank that keeps every layer's alpha / r."""
    lora = TODAY["lora"]
    share = rank / lora["rank"]
    pattern = {name: alpha * share for name, alpha in lora["alpha_pattern"].items()}
    return {"lora": {"rank": rank, "alpha": lora["alpha"] * share, "alpha_pattern": pattern}}


SETTLED: tuple[tuple[str, dict[str, Any], tuple[int, ...]], ...] = (
    ("nano.yaml", {}, (0, 1)),
    ("es.prompt_std global", setting("es.prompt_std", "global"), (0, 1)),
    ("reward pickscore(model=nano)", setting("reward", "pickscore(model=nano)"), (0, 1)),
    ("reward checker", setting("reward", "checker"), (0,)),
    ("without proj_out", setting("lora.targets", [GUIDANCE, TIME]), (0,)),
    ("without time_embed.linear", setting("lora.targets", [GUIDANCE, "proj_out"]), (0,)),
    ("caption_projection too", setting("lora.targets", [GUIDANCE, TIME, "proj_out", *CAPTION]), (0, 1)),
    ("update.lr_scale 0.8", setting("update.lr_scale", 0.8), (0,)),
    ("lora.rank 4 at the same scales", rescaled(4), (0,)),
    ("es.sigma 0.008", setting("es.sigma", 0.008), (0,)),
    ("es.sigma 0.002", setting("es.sigma", 0.002), (0,)),
    ("population 8", setting("population", 8), (0,)),
    ("population 128", setting("population", 128), (0,)),
    ("es.prompts_per_step 2", setting("es.prompts_per_step", 2), (0,)),
    ("es.prompts_per_step 32", setting("es.prompts_per_step", 32), (0,)),
    ("update.lr_scale 0.2", setting("update.lr_scale", 0.2), (0,)),
    ("es.shaping centered_rank", at_rate(setting("es.shaping", "centered_rank"), 0.4 * USUAL["centred"]), (0,)),
    ("update.optimizer adam", at_rate(setting("update.optimizer", "adam"), 0.4 * USUAL["adam"]), (0,)),
)
"""Name, change of `nano.yaml`, seeds."""


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
    for seed, (name, (change, usual)), rate in itertools.product(options.seeds or [0], rivals.items(), RATES):
        plan.append((f"{name}, rate {rate:g}", merged(change, setting("update.lr_scale", rate * usual)), seed))
    return plan


def trials(plan: list[tuple[str, dict[str, Any], int]], options: argparse.Namespace) -> None:
    """Run what the file lacks of a plan, two at a time, writing the file after each."""
    found, of, environment = {}, made_of(), record.environment()
    if options.json and options.json.is_file():
        stored = json.loads(options.json.read_text(encoding="utf-8"))
        if {name: made_from(stored).get(name) for name in of} != of:
            raise SystemExit(f"{options.json}: expected trials of this model, judges and centre, got others; remove it")
        found = stored["trials"]
    todo = [(f"{name}, seed {seed}", change, seed) for name, change, seed in plan]
    for name, change, _ in todo:
        asked = {"change": json.loads(json.dumps(change)), "images": length(change, options.images)[1]}
        if name in found and (stored := {key: found[name][key] for key in asked}) != asked:
            raise SystemExit(f"{options.json}: trial '{name}': expected {asked}, got {stored}; remove it there")
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
                what = {"what": f"bench/nano es {options.command}", "images": options.images, **of}
                record.write(options.json, {**what, "trials": found, **environment})
    print("\n".join(table(found)))


def made_of() -> dict[str, Any]:
    """What every trial has in common: the model's and the judges' identities, and the centre."""
    return {
        "model": SanaSprint.from_pretrained("nano").identity(),
        "rewards": parse(defaults("nano").benchmark("nano")).settings(),
        "centre": CENTRE,
    }


def made_from(stored: dict[str, Any]) -> dict[str, Any]:
    """A record whose centre has the settings that are newer than it, at their defaults; without a centre, as it is."""
    if "centre" not in stored:
        return stored
    return stored | {"centre": completed(stored["centre"])}


def completed(stored: dict[str, Any]) -> dict[str, Any]:
    """Stored settings, with those that are newer than they at their defaults."""
    return to_dict(from_dict(TrainConfig(), stored, "stored settings"))


def table(trials: dict[str, Any]) -> list[str]:
    """Markdown of a record's trials: their images, and gains on validation captions, paired, with standard errors."""
    judges = ("combined", "checker", "pickscore", "aesthetic")
    images = sorted({found["images"] for found in trials.values()})
    lines = [f"Images a trial: {', '.join(map(str, images))}.", ""]
    lines += [f"| {' | '.join(['trial', 'seed', *judges])} |", "|---" * (2 + len(judges)) + "|"]
    for name, found in trials.items():
        trial, _, seed = name.rpartition(", seed ")
        judged = (found["gain"].get(judge) for judge in judges)  # of a single reward nothing is combined
        gains = [f"{gain['difference']:+.4f} ± {gain['standard_error']:.4f}" if gain else "" for gain in judged]
        lines.append(f"| {' | '.join([trial, seed, *gains])} |")
    return lines


def reach(options: argparse.Namespace) -> None:
    """Of some layers, |A x|^2 at the start, by rank and seed, averaged over the rows of its input.

    A step of B moves the layer's output by |A x|^2: where x is the same for every image, by the luck of one draw.
    """
    model, inputs, found = SanaSprint.from_pretrained("nano"), {}, {}
    seeds, adapted = options.seeds or [0, 1, 2], (*FOUR, "proj_out")
    layers = {name: each for name, each in model.transformer.named_modules() if name.endswith(adapted)}
    for name, each in layers.items():
        each.register_forward_pre_hook(lambda _, given, name=name: inputs.update({name: given[0].flatten(0, -2)}))
    key = dict.fromkeys(("prompts", "repeats"), torch.zeros(1, dtype=torch.int64))
    settings = render_settings(load("nano").image)
    model.render(model.encode(["a small red circle"]), seed=0, step=0, **key, settings=settings)
    for rank, seed in itertools.product((1, 2, 4, 8, 16, 32), seeds):
        config = from_dict(
            TrainConfig(), merged(CENTRE, {"seed": seed, "lora": {"rank": rank, "targets": list(adapted)}}), "reach"
        )
        population = attach_population(model, config)
        for name, layer in population.layers.items():
            length = (inputs[name] @ layer.a.T).square().sum(-1).mean()
            found.setdefault(name, {}).setdefault(str(rank), []).append(float(length))
        population.detach()
    print("\n".join(reach_table(found)))
    if options.json:
        what = {"what": "bench/nano es reach", "seeds": seeds, "squared_length": found}
        record.write(options.json, {**what, **record.environment()})


def reach_table(found: dict[str, dict[str, list[float]]]) -> list[str]:
    """Markdown rows of `reach`: one for each layer and seed, a column for each rank."""
    ranks = list(next(iter(found.values())))
    rows = [f"| layer | seed | {' | '.join(f'rank {rank}' for rank in ranks)} |", "|---" * (2 + len(ranks)) + "|"]
    for name, lengths in found.items():
        for seed, each in enumerate(zip(*(lengths[rank] for rank in ranks), strict=True)):
            rows.append(f"| {name} | {seed} | {' | '.join(f'{length:.2g}' for length in each)} |")
    return rows


TRIALS = {
    "search": (search_plan, 8192),
    "refine": (refine_plan, 32768),
    "settle": (settle_plan, 40960),
    "compare": (compare_plan, 8192),
}
"""Of each command that runs trials: its plan and a trial's images."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=(*TRIALS, "reach"))
    parser.add_argument("--json", type=Path, help="store the record there; trials that it holds are not run again")
    parser.add_argument("--images", type=int, help="of a trial's training; 8192, of refine 32768, of settle 40960")
    parser.add_argument("--seeds", type=int, nargs="+", help="by default 0, of settle its own, of reach 0 1 2")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="trials at a time")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if options.command == "reach":
        reach(options)
    else:
        plan, images = TRIALS[options.command]
        options.images = options.images or images
        trials(plan(options), options)
