"""Charts of a training run's curves, for the page of the run and for an evaluation that stores a copy of the curves."""

import math
import re
from pathlib import Path

import numpy as np

from esengine.base.records import as_written, read_json, text
from esengine.report.charts import Chart, Series, lines
from esengine.report.page import MAX_NAMES, require_few
from esengine.run.curves import Held, as_measure, as_metric

SPREAD = {"reward": "mean", "reward_best": "best", "reward_worst": "worst"}


def kept_charts(path: Path) -> list[tuple[str, str, list[Chart]]]:
    """(label, run, charts) of the curves that `kept_curves` stored in a file. Empty if there is no file.

    Raises:
        RunError: the file is damaged.
    """
    found = []
    for label, kept in read_json(path).items() if path.is_file() else ():
        with as_written(path):
            require_few(found, "entries", MAX_NAMES - 1)
            metrics = dict(sorted(map(as_metric, kept["metrics"])))
            held = [as_measure(record) for record in kept["heldout"]]
            require_few(all_names(metrics, held), "names of metrics")
            charts = [*reward_charts(metrics)[:1], *held_charts(held)]
            found.append((label, text(kept["run"]), charts))
    return found


def all_names(metrics: dict[int, dict[str, float]], held: list[Held]) -> set[str]:
    """The names of all metrics and held-out scores."""
    return {name for record in (*metrics.values(), *(line.change for line in held)) for name in record}


def column(metrics: dict[int, dict[str, float]], name: str) -> np.ndarray:
    """A metric over the logged steps, float [n]. It is NaN at steps that did not log it."""
    return np.array([record.get(name, math.nan) for record in metrics.values()])


def names_like(metrics: dict[int, dict[str, float]], pattern: str) -> list[str]:
    """Names of the metrics that fully match a pattern and have at least one finite value."""
    names = dict.fromkeys(name for record in metrics.values() for name in record)
    return [name for name in names if re.fullmatch(pattern, name) and np.isfinite(column(metrics, name)).any()]


def steps_of(metrics: dict[int, dict[str, float]]) -> np.ndarray:
    """The logged steps, float [n]."""
    return np.array(list(metrics), dtype=float)


def reward_charts(metrics: dict[int, dict[str, float]]) -> list[Chart]:
    """The reward over the steps, the spread of the population and, if there are several rewards, each of them."""
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
    for name in each if len(each) > 1 else []:  # a single reward is the first chart already
        charts.append(lines(name.removeprefix("reward/"), x, [Series("mean", column(metrics, name))]))
    return charts


def held_charts(held: list[Held]) -> list[Chart]:
    """The change of each reward on held-out prompts, with a band of ± 2 standard errors."""
    x = np.array([line.step for line in held], dtype=float)
    charts = []
    for name in dict.fromkeys(name for line in held for name in line.change):
        pairs = np.array([line.change.get(name, (math.nan, math.nan)) for line in held])
        change, error = pairs[:, 0], pairs[:, 1]
        if not np.isfinite(change).any():
            continue
        title = f"{name} (optimised)" if name == held[0].optimised else name
        series = [Series("change", change, (change - 2 * error, change + 2 * error))]
        marks = [(step, "diverges") for step, parted in partings(held) if name in parted]
        note = f"Change since step {held[0].step}, ± 2 standard errors."
        charts.append(lines(title, x, series, zero=True, marks=marks, note=note))
    return charts


def partings(held: list[Held]) -> list[tuple[int, list[str]]]:
    """(step, the rewards that diverge from the optimised one for the first time at this step)."""
    seen: set[str] = set()
    found = []
    for line in held:
        fresh = [name for name in line.parted if name not in seen]
        seen.update(fresh)
        if fresh:
            found.append((line.step, fresh))
    return found
