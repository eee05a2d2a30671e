"""What tests read from the journal of a run, and how they change it."""

import json
from pathlib import Path

from esengine.run import journal


def steps(run: Path) -> list[dict]:
    """The metrics of each step, with its number."""
    return [{"step": each.step, **each.metrics} for each in journal.read(run / journal.NAME).of(journal.Step)]


def fitness(run: Path) -> list[list[float]]:
    return [each.fitness for each in journal.read(run / journal.NAME).of(journal.Step)]


def measured(run: Path) -> list[dict]:
    """All measurements on held-out prompts."""
    return [vars(each) for each in journal.read(run / journal.NAME).of(journal.Measured)]


def rewrite(run: Path, change) -> None:
    """Replace the journal's records, as dicts, by those that `change` returns."""
    path = run / journal.NAME
    records = [json.loads(line) for line in path.read_bytes().splitlines()]
    path.write_text("".join(json.dumps(record) + "\n" for record in change(records)))


def begin(run: Path, **settings) -> Path:
    """A run folder whose journal has a start with these settings, and the folder."""
    run.mkdir(parents=True, exist_ok=True)
    identity = {name: kind() for name, kind in journal.IDENTITY.items()}
    record = {"kind": "start", "step": 0, "settings": {"population": 32} | settings, "identity": identity}
    (run / journal.NAME).write_text(json.dumps(record) + "\n")
    return run
