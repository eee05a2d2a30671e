"""The page of a training run: curves, images over time, norms, throughput, settings. The run may still be going."""

import contextlib
import json
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from esengine.base.errors import ConfigError, RunError
from esengine.base.files import read_regular, require_inside
from esengine.base.records import as_written, number, read_json, text, texts, whole
from esengine.evaluation.entries import ADAPTER
from esengine.evaluation.statistics import flatten
from esengine.report.charts import Chart, Series, lines
from esengine.report.curves import all_names, column, held_charts, names_like, partings, reward_charts, steps_of
from esengine.report.evaluation import Group, overall
from esengine.report.page import facts, require_few, write
from esengine.report.thumbnails import Picture, thumbnail
from esengine.report.words import TIMES, count, duration, figure, short, signed
from esengine.rewards import spec
from esengine.rewards.roles import HUMAN
from esengine.run import journal
from esengine.run.curves import Held, held_of, metrics_of
from esengine.run.settings import TrainConfig, to_dict

MAX_STRIPS = 16
STRIP_SIDE, STRIP_BYTES = 1280, 130_000
COMPARISON_BYTES = 400_000
MAX_JOURNAL = 1 << 30
"""Bytes of the largest journal that a page is made of."""


@dataclass(frozen=True)
class Setting:
    """A setting of the run, its default, and whether the two differ."""

    name: str
    value: Any
    default: Any = None
    changed: bool = False


def write_training_page(run_dir: Path, *, going: bool = False) -> Path:
    """Write RUN/report.html from what the run has written so far, and return its path.

    Args:
        run_dir: the run's folder.
        going: the run goes on, so the page loads itself again every 15 seconds.

    The page depends only on the folder's files. Only the journal is required.

    Raises:
        RunError: a file is damaged. The message names the file and, for a file of lines, the line.
    """
    run = _journal(run_dir)
    with as_written(f"{run.path}: settings"):
        config = facts(run.start.settings)  # not as a TrainConfig: other versions have other settings
        steps, model, reward = whole(config["steps"]), text(config["model"]), text(config["reward"])
        size = _size(config)
        identity = facts(run.start.identity)
    with as_written(run.path):
        metrics, held = metrics_of(run), held_of(run)
        require_few(all_names(metrics, held), "names of metrics")
    comparison, made = _comparison(run_dir / "eval.json")
    beside = run_dir / "comparison.png"
    by_person = reward.partition("(")[0] == HUMAN  # who scores no held-out image
    gain = _compared(comparison, reward) if comparison and not by_person else _measured(held)
    return write(
        run_dir / "report.html",
        "training.html",
        title=f"Training run {run_dir.resolve().name}",
        steps=steps,
        model=model,
        reward=reward,
        done=max(metrics) + 1 if metrics else 0,
        comparison=comparison,
        cards=[*([gain] if gain else []), size, *_outcome(metrics)],
        measured=gain is not None,
        beside=thumbnail(beside, within=run_dir, side=STRIP_SIDE, most=COMPARISON_BYTES) if beside.exists() else None,
        reward_charts=reward_charts(metrics),
        held_charts=held_charts(held),
        warnings=_warnings(held),
        ended=run.ended,
        going=going,
        kept=_kept(run),
        loading=_loading(run_dir),
        norm_charts=_single_charts(metrics, r".*_norm"),
        speed_charts=_speed_charts(metrics),
        other_charts=_single_charts(metrics, r"(?!reward|seconds|images_per_second|.*_norm$).*"),
        timelines=[
            timeline
            for timeline in (
                _timeline(run_dir, "strips", "Strips", "The best, median and worst member of the step, drawn again."),
                _timeline(run_dir, "heldout", "Held-out prompts", "The same prompts and latents each time."),
            )
            if timeline["pictures"]
        ],
        settings=_settings(config),
        versions=identity | made,
    )


def _journal(run_dir: Path) -> journal.Journal:
    path = require_inside(run_dir, run_dir / journal.NAME)
    if path.stat().st_size > MAX_JOURNAL:
        raise RunError(f"{path}: expected at most {MAX_JOURNAL} bytes, got {path.stat().st_size}", path=path)
    return journal.read(path)


@dataclass(frozen=True)
class Comparison:
    """Base against adapter, with `repeats` images of each prompt."""

    entries: list[str]
    scores: list[str]
    repeats: int
    overall: Group


def _comparison(path: Path) -> tuple[Comparison | None, dict[str, Any]]:
    """The comparison in eval.json, and the settings of its images. (None, {}) if there is no such file."""
    if not path.is_file():
        return None, {}
    report = read_json(path)
    with as_written(path):
        entries, scores = texts(report["entries"]), texts(report["scores"])
        found = Comparison(entries, scores, int(number(report["repeats"])), overall(report, entries, scores))
        require_few(entries, "entries"), require_few(scores, "scores")
        return found, facts(report["settings"])


def _size(config: dict[str, Any]) -> tuple[str, str, str]:
    """The card (what, figure, aside) of the number of images in a step."""
    population, prompts, repeats = (whole(config[name]) for name in ("population", "es.prompts_per_step", "es.repeats"))
    aside = f"{count(population, 'member')} {TIMES} {count(prompts, 'prompt')} {TIMES} {count(repeats, 'repeat')}"
    return "images a step", f"{population * prompts * repeats}", aside


def _compared(comparison: Comparison, reward: str) -> tuple[str, str, str] | None:
    """The card (what, figure, aside) of the optimised score's held-out gain; None if the comparison lacks it."""
    score = _optimised(comparison.scores, reward)
    adapter = next((each for each in comparison.entries if each.startswith(f"{ADAPTER}@")), comparison.entries[-1])
    cell = comparison.overall.cells.get(score, {}).get(adapter)
    if cell is None or cell.difference is None:
        return None
    prompts = count(comparison.overall.count, "held-out prompt")
    return _gain(cell.difference, cell.standard_error, f"{score}, adapter over base, on {prompts}")


def _optimised(scores: list[str], reward: str) -> str | None:
    """The score that the run optimised: the weighted sum, or the only reward with a weight. None if unclear."""
    if spec.COMBINED in scores:
        return spec.COMBINED
    try:
        weighted = [term.name for term in spec.read(reward) if term.weight]
    except ConfigError:  # written by another version
        return None
    return weighted[0] if len(weighted) == 1 else None


def _measured(held: list[Held]) -> tuple[str, str, str] | None:
    """The same card from the last held-out record, for a run without a comparison. None before the second record."""
    if len(held) < 2 or held[-1].optimised not in held[-1].change:
        return None
    last = held[-1]
    on = f" on {count(last.prompts, 'held-out prompt')}" if last.prompts else ""
    return _gain(*last.change[last.optimised], f"{last.optimised},{on} from step {held[0].step} to step {last.step}")


def _gain(difference: float, error: float, aside: str) -> tuple[str, str, str]:
    within = f" ± {figure(error)}" if np.isfinite(error) else ""
    return "held-out gain", f"{signed(difference)}{within}", aside


def _outcome(metrics: dict[int, dict[str, float]]) -> list[tuple[str, str, str]]:
    """The cards (what, figure, aside) of the last reward, the speed and the total time."""
    cards = []
    if names_like(metrics, "reward"):
        reward = column(metrics, "reward")
        reward = reward[np.isfinite(reward)]
        cards.append(("reward, last step", figure(reward[-1]), "on the step's training prompts"))
    if names_like(metrics, "images_per_second"):
        rates = column(metrics, "images_per_second")
        cards.append(("images a second", short(statistics.median(rates[np.isfinite(rates)])), "median over steps"))
    if names_like(metrics, "seconds"):
        cards.append(("time in steps", duration(float(np.nansum(column(metrics, "seconds")))), "all of them together"))
    return cards


def _warnings(held: list[Held]) -> list[str]:
    return [
        f"The rewards diverge at step {step}: on held-out prompts {held[0].optimised} is up and {', '.join(parted)} "
        "down by more than two standard errors. The search may be exploiting the reward from there on."
        for step, parted in partings(held)
    ]


def _kept(run: journal.Journal) -> list[str]:
    """A line for each adapter that the run keeps besides the last one."""
    found = [
        f"adapter-{each.to}/ is that of step {each.step}: its {each.by}, {figure(each.mean)} on the held-out "
        "prompts, is the highest."
        for each in run.of(journal.Copied)[-1:]
    ]
    if ema := run.start.settings.get("ema"):
        found.append(f"adapter-ema/ is the moving average over the steps, with a decay of {figure(ema)}.")
    return found


def _loading(run_dir: Path) -> str | None:
    """Python that loads the run's adapter: the first example of its model card. None if there is no such card."""
    card = run_dir / ADAPTER / "README.md"
    with contextlib.suppress(OSError, ValueError, RunError):
        require_inside(run_dir, card)
        found = re.search(r"^```python\n(.*?)^```$", read_regular(card, 1 << 20).decode(), re.DOTALL | re.MULTILINE)
        return found and found[1].replace('"FOLDER"', json.dumps(f"{run_dir}/{ADAPTER}")).strip()
    return None


def _single_charts(metrics: dict[int, dict[str, float]], pattern: str) -> list[Chart]:
    return [
        lines(name.replace("_", " "), steps_of(metrics), [Series(name.replace("_", " "), column(metrics, name))])
        for name in names_like(metrics, pattern)
    ]


def _speed_charts(metrics: dict[int, dict[str, float]]) -> list[Chart]:
    charts = _single_charts(metrics, "images_per_second")
    parts = names_like(metrics, "seconds_.+") or names_like(metrics, "seconds")
    if parts:
        series = [Series(name.removeprefix("seconds_"), column(metrics, name)) for name in parts]
        charts.append(lines("Seconds a step, by part", steps_of(metrics), series, stacked=True))
    return charts


def _timeline(run_dir: Path, name: str, title: str, about: str) -> dict[str, Any]:
    """The images of a run's subfolder, by step. Above `MAX_STRIPS` images, an evenly spaced selection."""
    folder = run_dir / name
    steps = ((re.fullmatch(r"step_(\d+)", path.stem), path) for path in folder.glob("*.png"))
    files = sorted((int(match[1]), path) for match, path in steps if match)
    shown = files
    if len(files) > MAX_STRIPS:
        places = np.linspace(0, len(files) - 1, MAX_STRIPS).round().astype(int)
        shown = [files[place] for place in places]
        about = f"{about} {len(shown)} of {len(files)}, evenly; all are in {folder.name}/."
    pictures: list[tuple[int, Picture]] = [
        (step, thumbnail(path, within=run_dir, side=STRIP_SIDE, most=STRIP_BYTES)) for step, path in shown
    ]
    return {"id": folder.name, "title": title, "about": about, "pictures": pictures}


def _settings(config: dict[str, Any]) -> list[Setting]:
    """Every setting, with its default."""
    default = flatten(to_dict(TrainConfig()))
    return [Setting(name, value, default.get(name), value != default.get(name)) for name, value in config.items()]
