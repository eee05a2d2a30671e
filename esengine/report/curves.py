"""Curves of a training run: for its own page and, kept in an evaluation's folder, for the page of that."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from esengine.entries import ADAPTER, Entry
from esengine.report.charts import Chart, Series, lines
from esengine.report.records import as_written, number, read_json, read_lines, text, texts

SPREAD = {"reward": "mean", "reward_best": "best", "reward_worst": "worst"}
KEPT = ("step", *SPREAD, "reward_std")
LAST_STEP = 1 << 53
"""Steps are below, so that a float holds each."""


@dataclass(frozen=True)
class Held:
    """One line of heldout.jsonl: score -> (change since the first line, its standard error), NaN for none.

    `prompts` is how many have a score; 0 where that is not recorded.
    """

    step: int
    change: dict[str, tuple[float, float]]
    optimised: str
    parted: list[str]
    prompts: int = 0


def kept_curves(entries: Sequence[Entry]) -> dict[str, Any]:
    """What an evaluation keeps of the runs its adapters are of, by label: {"run", "metrics", "heldout"}, JSON values.

    An entry whose adapter does not lie in a run's folder has none.

    Raises:
        RunError: a run's metrics.jsonl or heldout.jsonl is damaged.
    """
    kept = {}
    for entry in entries:
        run = entry.adapter.resolve().parent if entry.adapter and entry.adapter.resolve().name == ADAPTER else None
        if run is None or not (run / "metrics.jsonl").is_file():
            continue
        metrics = [
            {"step": step} | {name: _json(record[name]) for name in KEPT[1:] if name in record}
            for step, record in read_metrics(run / "metrics.jsonl").items()
        ]
        held = [
            {
                "step": line.step,
                "scores": {
                    name: {"change": _json(change), "standard_error": _json(error)}
                    for name, (change, error) in line.change.items()
                },
                "optimised": line.optimised,
                "parted": line.parted,
            }
            for line in read_held(run / "heldout.jsonl")
        ]
        kept[entry.label] = {"run": run.name, "metrics": metrics, "heldout": held}
    return kept


def kept_charts(path: Path) -> list[tuple[str, str, list[Chart]]]:
    """(label, run, its curves) of what `kept_curves` gave, from a file; nothing where there is none.

    Raises:
        RunError: the file is damaged.
    """
    found = []
    for label, kept in read_json(path).items() if path.is_file() else ():
        with as_written(path):
            metrics = dict(sorted(map(_metric, kept["metrics"])))
            held = [_measure(record) for record in kept["heldout"]]
            charts = [*reward_charts(metrics)[:1], *held_charts(held)]
            found.append((label, text(kept["run"]), charts))
    return found


def _json(value: float) -> float | None:
    return value if math.isfinite(value) else None


def read_metrics(path: Path) -> dict[int, dict[str, float]]:
    """Step -> numbers by name, in the order of steps; what a run logged twice counts as logged last."""
    return dict(sorted(dict(read_lines(path, _metric)).items())) if path.is_file() else {}


def read_held(path: Path) -> list[Held]:
    """The measures of a heldout.jsonl, in the order of steps; as `read_metrics`."""
    found = {line.step: line for line in read_lines(path, _measure)} if path.is_file() else {}
    return [found[step] for step in sorted(found)]


def _metric(record: dict[str, Any]) -> tuple[int, dict[str, float]]:
    numbers = {name: value for name, value in record.items() if not isinstance(value, (str, list, dict))}
    return _step(record["step"]), {name: number(value) for name, value in numbers.items() if name != "step"}


def _measure(record: dict[str, Any]) -> Held:
    change = {
        text(name): (number(score["change"]), number(score["standard_error"]))
        for name, score in record["scores"].items()
    }
    optimised = text(record["optimised"])
    each = record["scores"].get(optimised, {}).get("each", [])
    prompts = sum(score is not None for score in each)
    return Held(_step(record["step"]), change, optimised, texts(record.get("parted", [])), prompts)


def _step(value: Any) -> int:
    if type(value) is not int or not 0 <= value < LAST_STEP:
        raise ValueError(f"step: expected a whole number, got {value!s:.40}")
    return value


def column(metrics: dict[int, dict[str, float]], name: str) -> np.ndarray:
    """A metric over the logged steps, float [n], NaN where it is not logged."""
    return np.array([record.get(name, math.nan) for record in metrics.values()])


def names_like(metrics: dict[int, dict[str, float]], pattern: str) -> list[str]:
    """Names of metrics that match a pattern as a whole and have a finite number."""
    names = dict.fromkeys(name for record in metrics.values() for name in record)
    return [name for name in names if re.fullmatch(pattern, name) and np.isfinite(column(metrics, name)).any()]


def steps_of(metrics: dict[int, dict[str, float]]) -> np.ndarray:
    """The logged steps, float [n]."""
    return np.array(list(metrics), dtype=float)


def reward_charts(metrics: dict[int, dict[str, float]]) -> list[Chart]:
    """The reward over the steps, then the population's spread and each reward of several."""
    x, charts = steps_of(metrics), []
    spread = names_like(metrics, "|".join(SPREAD))
    if spread:
        mean, std = column(metrics, "reward"), column(metrics, "reward_std")
        series = [
            Series(SPREAD[name], column(metrics, name), (mean - std, mean + std) if name == "reward" else None)
            for name in SPREAD
            if name in spread
        ]
        charts.append(lines("Reward", x, series, note="Mean over the population, ± its standard deviation."))
    if names_like(metrics, "reward_std"):
        note = "Standard deviation of the members' rewards."
        charts.append(lines("Spread of the population", x, [Series("std", column(metrics, "reward_std"))], note=note))
    each = names_like(metrics, "reward/.+")
    for name in each if len(each) > 1 else []:  # a single one is the curve above
        charts.append(lines(name.removeprefix("reward/"), x, [Series("mean", column(metrics, name))]))
    return charts


def held_charts(held: list[Held]) -> list[Chart]:
    """Each reward's change on held-out prompts with a band of two standard errors."""
    x = np.array([line.step for line in held], dtype=float)
    charts = []
    for name in dict.fromkeys(name for line in held for name in line.change):
        pairs = np.array([line.change.get(name, (math.nan, math.nan)) for line in held])
        change, error = pairs[:, 0], pairs[:, 1]
        if not np.isfinite(change).any():
            continue
        title = f"{name} (optimised)" if name == held[0].optimised else name
        series = [Series("change", change, (change - 2 * error, change + 2 * error))]
        marks = [(step, "parts ways") for step, parted in partings(held) if name in parted]
        note = f"Change since step {held[0].step}, ± 2 standard errors."
        charts.append(lines(title, x, series, zero=True, marks=marks, note=note))
    return charts


def partings(held: list[Held]) -> list[tuple[int, list[str]]]:
    """(step, the rewards that part ways there for the first time)."""
    seen: set[str] = set()
    found = []
    for line in held:
        fresh = [name for name in line.parted if name not in seen]
        seen.update(fresh)
        if fresh:
            found.append((line.step, fresh))
    return found
