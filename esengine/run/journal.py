"""The journal of a run: one file of JSON lines, which only grows.

    {"kind": "start", "step": 0, "settings": {...}, "identity": {...}}   the run starts or resumes with these settings
    {"kind": "step", "step": 0, "fitness": [...], "metrics": {...}}      one step, made with the settings above it
    {"kind": "held_out", "step": 1, "scores": {...}, ...}                held-out scores after `step` steps
    {"kind": "saved", "step": 5, "adapter_sha256": "..."}                the checkpoint of `step` steps is complete
    {"kind": "copied", "step": 1, "to": "best", "by": ..., "mean": ...}  the adapter of `step` steps is kept as the best
    {"kind": "judged", "step": 9, "pair": 0, "better": 1, ...}           a person has compared two images of a step
    {"kind": "ended", "step": 9, "parted": [...], "adapter_step": 5}     the held-out guard has ended the run

The journal defines the run. Its updates give the adapter. A checkpoint stores the result of the first steps.
A resumed run cuts the journal at the checkpoint that it continues from, and adds a new start.

This module does not import torch.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from esengine.base.errors import RunError
from esengine.base.files import naming, read_regular, replace_file
from esengine.base.records import as_written, number, parse_json, text, texts

NAME = "journal.jsonl"

MAX_STEP = 1 << 53
"""Steps are below this, so that a float64 holds each exactly."""

IDENTITY = {"prompts_sha256": str, "model": str, "rewards": dict, "contract": int, "environment": dict}
"""What the names in the settings stand for: hashes of the prompts and the model, rewards with their models and
revisions, the noise contract, versions of libraries and device."""

IN_THE_UPDATE = ("seed", "dtype", "population", "init_adapter", "lora", "es", "update")
"""Settings that determine the adapter together with the fitness."""

NEWER = {"prompt_std": "global", "alpha_pattern": {}}
"""Settings in sections of `IN_THE_UPDATE` that runs of earlier versions lack, and the values that those runs had."""

MAX_FLOAT32 = 3.4028235e38

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """The run starts, or resumes after `step` steps.

    Attributes:
        settings: every setting, as in config.yaml.
        identity: what the names in the settings stand for, see `IDENTITY`.
    """

    step: int
    settings: dict[str, Any]
    identity: dict[str, Any]

    def __post_init__(self):
        _require(type(self.settings.get("population")) is int, "settings: expected a population")
        for name, kind in IDENTITY.items():
            _require(type(self.identity.get(name)) is kind, f"identity: {name}: expected a {kind.__name__}")


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        step: the step of the noise contract.
        fitness: N numbers, each a float32 with every digit, so that replay is exact.
        metrics: a number or text by name. A number that is not finite is None.
    """

    step: int
    fitness: list[float]
    metrics: dict[str, Any]

    def __post_init__(self):
        finite = all(type(each) in (int, float) and abs(each) <= MAX_FLOAT32 for each in self.fitness)
        _require(isinstance(self.fitness, list) and finite, "fitness: expected a list of finite float32 numbers")
        _require(isinstance(self.metrics, dict), "metrics: expected a mapping")
        for value in self.metrics.values():
            if not isinstance(value, str):
                number(value)

    @property
    def numbers(self) -> dict[str, float]:
        """The metrics that are numbers. One that was not finite is NaN."""
        return {name: number(value) for name, value in self.metrics.items() if not isinstance(value, str)}


@dataclass(frozen=True)
class Measured:
    """The scores of the held-out prompts after `step` steps.

    Attributes:
        scores: {name: {"mean", "change", "standard_error", "each"}}, see `esengine.run.held_out`.
        optimised: the name of the score that the run maximises.
        parted: names of the scores that diverge from it.
        of: prompts and rewards, in the first record of a series. Later records are compared with that record.
    """

    step: int
    scores: dict[str, dict[str, Any]]
    optimised: str
    parted: list[str]
    of: dict[str, Any] | None = None

    def __post_init__(self):
        text(self.optimised)
        texts(self.parted)
        count = None
        if self.of is not None:
            names = set(self.of) - {"metadata_sha256"} if isinstance(self.of, dict) else None
            _require(names == {"prompts", "rewards"}, "of: expected prompts and rewards")
            _require(isinstance(self.of["rewards"], dict), "of: rewards: expected a mapping")
            count = len(texts(self.of["prompts"]))
        for name, score in self.scores.items():
            each = score.get("each", [])
            _require(isinstance(each, list), "each: expected a list")
            for value in (score["mean"], score["change"], score["standard_error"], *each):
                number(value)
            count = len(each) if count is None and "each" in score else count
            _require("each" not in score or len(each) == count, f"{name}: expected {count} numbers, got {len(each)}")


@dataclass(frozen=True)
class Saved:
    """The checkpoint of `step` steps is complete. `adapter_sha256` is the hash of its adapter."""

    step: int
    adapter_sha256: str

    def __post_init__(self):
        text(self.adapter_sha256)


@dataclass(frozen=True)
class Copied:
    """The adapter of `step` steps is kept.

    Attributes:
        to: what it is kept as, see `esengine.run.kept`.
        by: the name of the score that chose it.
        mean: that score's mean.
    """

    step: int
    to: str
    by: str
    mean: float

    def __post_init__(self):
        text(self.to)
        text(self.by)
        _require(math.isfinite(number(self.mean)), "mean: expected a finite number")


@dataclass(frozen=True)
class Ended:
    """The held-out guard has ended the run after `step` steps.

    Attributes:
        parted: names of the scores that diverged from the optimised one.
        adapter_step: the run's adapter is that of so many steps.
    """

    step: int
    parted: list[str]
    adapter_step: int

    def __post_init__(self):
        texts(self.parted)
        _require(step_of(self.adapter_step) <= self.step, f"adapter_step: expected at most {self.step}")


@dataclass(frozen=True)
class Judged:
    """A person has compared the two images of an antithetic pair. A later record of the same images replaces it.

    Attributes:
        step: the step of the images, which need not be the next one: answers stay when a run goes back to a checkpoint.
        pair: members 2 pair and 2 pair + 1.
        prompt, repeat: index of the prompt, and the repeat.
        better: the member whose image was chosen. None: no difference.
        images: the first 16 hex digits of the SHA-256 of both images' pixels.
    """

    step: int
    pair: int
    prompt: int
    repeat: int
    better: int | None
    images: str

    def __post_init__(self):
        text(self.images)
        for value in (self.pair, self.prompt, self.repeat):
            step_of(value)
        known = (None, 2 * self.pair, 2 * self.pair + 1)
        _require(self.better in known and self.better is not True, f"better: expected one of {known}")


Record = Start | Step | Measured | Saved | Copied | Judged | Ended
_KINDS: dict[str, type] = {
    "start": Start,
    "step": Step,
    "held_out": Measured,
    "saved": Saved,
    "copied": Copied,
    "judged": Judged,
    "ended": Ended,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}
R = TypeVar("R", Start, Step, Measured, Saved, Copied, Judged, Ended)


class Journal:
    """The records of a journal, oldest first.

    Attributes:
        path: its file.
        records: all records.
        lines: the bytes of each record, with its line break.
        start: the last start.
        done: number of steps.
    """

    def __init__(self, path: Path, lines: Iterable[bytes] = ()):
        self.path, self.lines, self.done = path, [], 0
        self.records: list[Record] = []
        self.start: Start
        self._made_of = None  # a running SHA-256, since every checkpoint needs it
        for line in lines:
            self.add(line)

    def add(self, line: bytes) -> None:
        """Append a line. Raises an error that `as_written` explains if it cannot follow the others."""
        record = _record(line)
        self.check(record)
        if isinstance(record, Start):
            facts = [record.settings.get("seed"), record.identity["model"], record.identity["prompts_sha256"]]
            self._made_of = self._made_of or hashlib.sha256(json.dumps(facts).encode())
            self.start = record
        elif isinstance(record, Step):
            self._made_of.update(json.dumps(record.fitness).encode())
            self.done += 1
        self.records.append(record)
        self.lines.append(line)

    def check(self, record: Record) -> None:
        """Raise ValueError if the record cannot follow the others."""
        _require(self.records or isinstance(record, Start), "expected the start of a run in the first line")
        at = record.step == self.done or (isinstance(record, Judged) and record.step > self.done)
        _require(at, f"expected step {self.done}, got {record.step}")
        _require(self.ended is None, "expected no line after the end of the run")
        if isinstance(record, Step):
            size, got = self.start.settings["population"], len(record.fitness)
            _require(got == size, f"expected a fitness of {size} numbers, got {got}")

    def of(self, kind: type[R]) -> list[R]:
        """The records of one kind."""
        return [each for each in self.records if isinstance(each, kind)]

    @property
    def ended(self) -> Ended | None:
        """How the held-out guard ended the run, or None."""
        return self.records[-1] if self.records and isinstance(self.records[-1], Ended) else None

    @property
    def held_out(self) -> list[Measured]:
        """The last series of held-out scores: the last record with `of`, and those after it."""
        found = self.of(Measured)
        return found[max((i for i, each in enumerate(found) if each.of is not None), default=0) :]

    @property
    def digest(self) -> str:
        """SHA-256 of the first start's seed, model and prompts, and of the fitness of every step."""
        return self._made_of.hexdigest()

    def made_with(self, step: int) -> str:
        """SHA-256 of what the first `step` steps were made with, apart from their fitness.

        It covers the settings in `IN_THE_UPDATE` of every start, and the adapters' hashes of the checkpoints before.
        """
        facts: list[Any] = []
        for each in self.records:
            if isinstance(each, Start):
                facts.append([each.step, {name: _without_newer(each.settings.get(name)) for name in IN_THE_UPDATE}])
            elif isinstance(each, Saved) and each.step < step:
                facts.append([each.step, each.adapter_sha256])
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def until(self, step: int) -> "Journal":
        """The journal of the first `step` steps, with the held-out scores after them."""
        kept = (
            line
            for line, each in zip(self.lines, self.records, strict=True)
            if each.step < step or (each.step == step and not isinstance(each, (Step, Ended)))
        )
        return Journal(self.path, kept)

    def cut(self, step: int) -> "Journal":
        """The journal as it was when the checkpoint of `step` steps was complete.

        It has no held-out scores after `step` steps, because a resumed run measures them again and acts on them. A
        person's answers about later steps stay.

        Raises:
            RunError: the journal has fewer steps.
        """
        if self.done < step:
            raise RunError(
                f"{self.path}: expected {step} steps, got {self.done}: without the others the run, now at step {step}, "
                "could not be replayed; restore the file, or choose another --run-dir"
            )
        wanted = (Saved, step), (Step, step - 1), (Start, 0)
        found = [[i for i, each in enumerate(self.records) if (type(each), each.step) == what] for what in wanted]
        end = next(places[0] for places in found if places) + 1
        kept = zip(self.lines[:end], self.records[:end], strict=True)
        again = (Measured, step), (Copied, step)
        lines = [line for line, each in kept if (type(each), each.step) not in again]
        behind = zip(self.lines[end:], self.records[end:], strict=True)
        return Journal(self.path, lines + [line for line, each in behind if isinstance(each, Judged)])


def read(path: Path, needed: int | None = None) -> Journal:
    """Read and check a journal. A last line without a line break is still being written and is skipped.

    Args:
        path: a journal.
        needed: steps of the checkpoint that a run resumes from. Damaged lines behind these steps are dropped with a
            warning. None: every line is needed.

    Raises:
        RunError: the file cannot be read, or a line is not as esengine writes it; the message names the line.
    """
    found = Journal(path)
    try:
        *lines, _unfinished = read_regular(path).split(b"\n")
    except OSError as error:
        raise RunError(f"{path}: {error.strerror or error}") from error
    for number_, line in enumerate(lines, start=1):
        try:
            with as_written(f"{path}, line {number_}"):
                found.add(line + b"\n")
        except RunError as error:
            if needed is None or not found.lines or found.done < needed:
                raise
            _log.warning("%s; dropped, with the lines behind it", error)
            break
    if not found.lines:
        raise RunError(f"{path}: expected the start of a run, the file has no whole line")
    return found


def has_steps(path: Path) -> bool:
    """Whether a journal has a step, or something that is no journal."""
    try:
        return read(path).done > 0
    except RunError:
        return path.exists() and path.stat().st_size > 0


class Writer:
    """Appends to a journal. Use it in a `with` statement.

    Args:
        path: the file. It is replaced by `before` and `start` in one move.
        start: what the run starts or resumes with.
        before: the journal up to the checkpoint that the run resumes from. None for a new run.

    Attributes:
        contents: all records.
    """

    def __init__(self, path: Path, start: Start, before: Journal | None = None):
        self.contents = before or Journal(path)
        self.contents.add(_line(start))
        replace_file(path, b"".join(self.contents.lines))
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (held until close)

    def append(self, record: Record) -> None:
        """Write a record whole, or not at all if the disk is full.

        Raises:
            ValueError: the record cannot follow the others.
            OSError: it cannot be written. The error names the file.
        """
        line, size = _line(record), os.fstat(self._file.fileno()).st_size
        self.contents.check(record)
        with naming(self.contents.path):
            try:
                rest = memoryview(line)
                while rest:
                    rest = rest[self._file.write(rest) :]
            except OSError:
                with contextlib.suppress(OSError):
                    self._file.truncate(size)
                raise
        self.contents.add(line)

    def sync(self) -> None:
        """Wait until the records are on the disk."""
        with naming(self.contents.path):
            os.fsync(self._file.fileno())

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *exception) -> None:
        self._file.close()


def plain(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics as JSON values: a number that is not finite becomes None."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in metrics.items()
    }


def step_of(value: Any) -> int:
    """The value if it is the number of a step. Raises ValueError otherwise."""
    _require(type(value) is int and 0 <= value < MAX_STEP, f"step: expected a whole number, got {value!s:.40}")
    return value


def _line(record: Record) -> bytes:
    values = {name: value for name, value in asdict(record).items() if not (name == "of" and value is None)}
    return json.dumps({"kind": _NAMES[type(record)], **values}, allow_nan=False).encode() + b"\n"


def _record(line: bytes) -> Record:
    try:
        values = parse_json(line, strict=True)
    except ValueError as error:
        raise ValueError(f"not JSON: {str(error)[:80]}") from error
    _require(isinstance(values, dict), "expected a JSON object")
    kind = values.pop("kind", None)
    _require(kind in _KINDS, f"expected a kind of {', '.join(_KINDS)}, got {kind!r:.40}")
    step_of(values["step"])
    return _KINDS[kind](**values)


def _without_newer(value: Any) -> Any:
    """A section of settings without those of `NEWER` that have their default."""
    if not isinstance(value, dict):
        return value
    return {name: each for name, each in value.items() if name not in NEWER or each != NEWER[name]}


def _require(good: bool, problem: str) -> None:
    if not good:
        raise ValueError(problem)
