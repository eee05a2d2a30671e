"""Curves of training runs. They are read from a run's folder and kept in an evaluation's folder for its page."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esengine.base.records import number, read_lines, text, texts
from esengine.evaluation.entries import ADAPTER, Entry

REWARDS = ("reward", "reward_best", "reward_worst")
KEPT = ("step", *REWARDS, "reward_std")
LAST_STEP = 1 << 53
"""Steps are below this, so that a float64 holds each exactly."""


@dataclass(frozen=True)
class Held:
    """One line of heldout.jsonl.

    `change` maps a score to (change since the first line, its standard error), NaN for a missing value. `prompts` is
    the number of prompts with a score, 0 if that is not recorded.
    """

    step: int
    change: dict[str, tuple[float, float]]
    optimised: str
    parted: list[str]
    prompts: int = 0


def kept_curves(entries: Sequence[Entry]) -> dict[str, Any]:
    """The curves that an evaluation keeps of its adapters' runs, by label: {"run", "metrics", "heldout"}, JSON values.

    An entry whose adapter is not in a run's folder is left out.

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


def _json(value: float) -> float | None:
    return value if math.isfinite(value) else None


def read_metrics(path: Path) -> dict[int, dict[str, float]]:
    """Numbers by name for each step, in the order of steps. If a step was logged twice, the last line counts."""
    return dict(sorted(dict(read_lines(path, as_metric)).items())) if path.is_file() else {}


def read_held(path: Path) -> list[Held]:
    """The measurements of a heldout.jsonl, in the order of steps. If a step was logged twice, the last line counts."""
    found = {line.step: line for line in read_lines(path, as_measure)} if path.is_file() else {}
    return [found[step] for step in sorted(found)]


def as_metric(record: dict[str, Any]) -> tuple[int, dict[str, float]]:
    numbers = {name: value for name, value in record.items() if not isinstance(value, (str, list, dict))}
    return _step(record["step"]), {name: number(value) for name, value in numbers.items() if name != "step"}


def as_measure(record: dict[str, Any]) -> Held:
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
