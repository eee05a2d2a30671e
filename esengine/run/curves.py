"""Curves of a run, from its journal. An evaluation keeps a copy of them for its page."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from esengine.base.records import number, text, texts
from esengine.evaluation.entries import ADAPTER, Entry
from esengine.run import folder, journal
from esengine.run.journal import Journal

REWARDS = ("reward", "reward_best", "reward_worst")
KEPT = (*REWARDS, "reward_std")
NAMES = (ADAPTER, *folder.KEPT.values())
"""Folders of adapters in a run's folder."""


@dataclass(frozen=True)
class Held:
    """One measurement of held-out prompts.

    `change` maps a score to (change since the first, its standard error), NaN for a missing value. `prompts` is
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
        RunError: a run's journal is damaged.
    """
    kept = {}
    for entry in entries:
        run = entry.adapter.resolve().parent if entry.adapter and entry.adapter.resolve().name in NAMES else None
        if run is None or not (run / journal.NAME).is_file():
            continue
        found = journal.read(run / journal.NAME)
        metrics = [
            {"step": step} | {name: _json(record[name]) for name in KEPT if name in record}
            for step, record in metrics_of(found).items()
        ]
        held = [
            {
                "step": each.step,
                "scores": {
                    name: {"change": _json(change), "standard_error": _json(error)}
                    for name, (change, error) in each.change.items()
                },
                "optimised": each.optimised,
                "parted": each.parted,
            }
            for each in held_of(found)
        ]
        kept[entry.label] = {"run": run.name, "metrics": metrics, "heldout": held}
    return kept


def _json(value: float) -> float | None:
    return value if math.isfinite(value) else None


def metrics_of(run: Journal) -> dict[int, dict[str, float]]:
    """Numbers by name for each step."""
    return {step.step: step.numbers for step in run.of(journal.Step)}


def held_of(run: Journal) -> list[Held]:
    """The last series of measurements of held-out prompts."""
    return [as_measure(vars(each)) for each in run.held_out]


def as_metric(record: dict[str, Any]) -> tuple[int, dict[str, float]]:
    numbers = {name: value for name, value in record.items() if not isinstance(value, (str, list, dict))}
    return journal.step_of(record["step"]), {name: number(value) for name, value in numbers.items() if name != "step"}


def as_measure(record: dict[str, Any]) -> Held:
    change = {
        text(name): (number(score["change"]), number(score["standard_error"]))
        for name, score in record["scores"].items()
    }
    optimised = text(record["optimised"])
    each = record["scores"].get(optimised, {}).get("each", [])
    prompts = sum(score is not None for score in each)
    return Held(journal.step_of(record["step"]), change, optimised, texts(record.get("parted", [])), prompts)
