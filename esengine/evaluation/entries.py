"""The entries of an evaluation: the base model or an adapter, at a number of denoising steps."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from esengine.base.errors import ConfigError
from esengine.es.lora_folder import lora_files
from esengine.models.lora_file import WEIGHT_NAME

BASE, ADAPTER = "base", "adapter"
ACCEPTED = (
    "accepted are base@N, adapter@N with --run-dir or --adapter, FOLDER@N for an adapter's or a run's folder, and "
    "NAME=FOLDER@N, where N is a number of denoising steps"
)
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,63}")


@dataclass(frozen=True)
class Entry:
    """A model to evaluate.

    Attributes:
        name: `base`, or the name of an adapter.
        steps: denoising steps.
        adapter: folder of a diffusers or a PEFT adapter; None: the base model.
    """

    name: str
    steps: int
    adapter: Path | None = None

    @property
    def label(self) -> str:
        """`name@steps`: the entry's name in every table and the name of its image folder."""
        return f"{self.name}@{self.steps}"


def default_entries(steps: int, adapter: Path | None, two_steps: bool) -> tuple[Entry, ...]:
    """Base and adapter at `steps`. With `two_steps` also the base at twice as many.

    With `two_steps` and at most two steps: base at one step, adapter at `steps`, base at two steps.
    """
    adapted = [] if adapter is None else [Entry(ADAPTER, steps, _holder(adapter, "adapter"))]
    if two_steps:
        fewer = 1 if steps <= 2 else steps
        return Entry(BASE, fewer), *adapted, Entry(BASE, 2 * fewer)
    return Entry(BASE, steps), *adapted


def parse_entries(specs: Sequence[str], adapter: Path | None = None) -> tuple[Entry, ...]:
    """Parse entries from the command line.

    Args:
        specs: each is `base@1`, `adapter@1`, `FOLDER@1` or `NAME=FOLDER@1`. A folder's entry has the folder's name or,
            if that is `adapter`, its parent's.
        adapter: the folder that the word `adapter` stands for.

    Raises:
        ConfigError: another form, a folder without an adapter, or two entries with the same label.
    """
    entries: dict[str, tuple[Entry, str]] = {}
    for spec in specs:
        entry = _parse(spec, adapter)
        if entry.label in entries:
            first = entries[entry.label][1]
            hint = "" if entry.adapter is None else f"; give one a name, as other={spec}"
            raise ConfigError(f"entries: '{first}' and '{spec}' would both be called {entry.label}{hint}")
        entries[entry.label] = entry, spec
    return tuple(entry for entry, _ in entries.values())


def _parse(spec: str, adapter: Path | None) -> Entry:
    what, at, steps = spec.rpartition("@")
    if not at or not what or not re.fullmatch(r"[1-9][0-9]{0,3}", steps):
        raise ConfigError(f"entries: expected NAME@STEPS, got '{spec}'; {ACCEPTED}")
    if what == BASE:
        return Entry(BASE, int(steps))
    if what == ADAPTER and adapter is not None:
        return Entry(ADAPTER, int(steps), _holder(adapter, "adapter"))
    name, equals, folder = what.partition("=")
    if not equals or not _NAME.fullmatch(name):
        name, folder = "", what
    holder = _holder(Path(os.path.expanduser(folder)), f"entries: '{spec}'")
    if not name:
        own = holder.resolve()
        own = own.parent if own.name == ADAPTER else own
        name = re.sub(r"[^A-Za-z0-9._+-]+", "-", own.name).strip("-.") or ADAPTER
    if name == BASE:
        raise ConfigError(f"entries: '{spec}' would be called base; give it a name, as mine={folder}@{steps}")
    return Entry(name[:64], int(steps), holder)


def adapter_of(run_dir: Path) -> Path:
    """The folder of a run's adapter. Raises ConfigError if the run has none."""
    folder = run_dir / ADAPTER
    if not lora_files(folder):
        raise ConfigError(
            f"run folder {run_dir}: it has no adapter: {folder / WEIGHT_NAME} does not exist; a run writes one with "
            "its first checkpoint"
        )
    return folder


def _holder(folder: Path, where: str) -> Path:
    """The folder that holds the weights: the given one, or `adapter/` of a run."""
    for place in (folder, folder / ADAPTER):
        if lora_files(place):
            return place
    raise ConfigError(f"{where}: {folder / WEIGHT_NAME} does not exist; {ACCEPTED}")
