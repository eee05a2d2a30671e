"""The log of a run: metrics, fitness and held-out scores as JSON lines, trackers, image strips and grids."""

import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from esengine.base.errors import RunError
from esengine.base.files import naming, replace_file, write_atomic
from esengine.run.folder import RunFolder
from esengine.run.pictures import draw_grid, draw_strip
from esengine.run.trackers import open_trackers

_log = logging.getLogger(__name__)


def require_steps(folder: RunFolder, count: int) -> None:
    """Check that a run can resume at step `count`: line i of metrics and fitness must be step i, for each i < count.

    Raises:
        RunError: a step is missing, in the wrong place or unreadable; the message names the line.
    """
    for path in (folder.metrics, folder.fitness):
        lines = path.read_bytes().splitlines() if count and path.exists() else []
        for step in range(count):
            record = _record(lines[step]) if step < len(lines) else {"step": "the file's end"}
            got = "no record of a step" if record is None else record["step"]
            if got == step and path == folder.fitness and not _finite(record.get("fitness")):
                got = "it without a fitness of finite numbers"
            if got != step:
                raise RunError(
                    f"{path}, line {step + 1}: expected step {step}, got {got}: without it the run, now at step "
                    f"{count}, could not be replayed; restore the file, or choose another --run-dir"
                )


class RunLog:
    """Appends to a run folder's logs and sends them to the trackers. Use it in a `with` statement.

    Args:
        folder: the run folder, locked by this process.
        resume_step: the step at which the run resumes. Records of this step and later are dropped: atomically from
            the files, and by its purge from TensorBoard. None for a new run.
        trackers: trackers besides TensorBoard, see `esengine.run.trackers`.
        settings: settings of the run, for the trackers.
        opening: keys to add to the first line of fitness.jsonl that this process writes.
        note: receives a warning for each tracker that is dropped.

    Attributes:
        resume_step: 0 for a new run.
        held_out: records of heldout.jsonl, oldest first.
    """

    def __init__(
        self,
        folder: RunFolder,
        resume_step: int | None = None,
        *,
        trackers: Sequence[str] = (),
        settings: dict[str, Any] | None = None,
        opening: dict[str, Any] | None = None,
        note: Callable[[str], None] = _log.warning,
    ):
        self.resume_step = resume_step or 0
        self._folder = folder
        self._opening = opening or {}
        self._metrics = _Lines(folder.metrics, self.resume_step, keep=False)
        self._fitness = _Lines(folder.fitness, self.resume_step, keep=False)
        self._measures = _Lines(folder.path / "heldout.jsonl", self.resume_step)
        self._trackers = open_trackers(folder.path, folder.tensorboard, trackers, resume_step, note)
        self._trackers.start(settings or {})

    @property
    def held_out(self) -> list[dict[str, Any]]:
        return self._measures.records

    @property
    def held_out_file(self) -> Path:
        return self._measures.path

    def log(self, step: int, metrics: dict[str, float | int | str], fitness: torch.Tensor | None = None) -> None:
        """Append one line {"step": step, **metrics}, flush it, and send the numbers to the trackers.

        A number that is not finite is written as null, because JSON has no NaN. Trackers get the number itself.

        Args:
            step: the step of the metrics and the fitness.
            metrics: value by name.
            fitness: float32 [N], for fitness.jsonl. It is written with every digit, so that replay is exact.
        """
        if fitness is not None:
            self._fitness.append({"step": step, **self._opening, "fitness": fitness.tolist()})
            self._opening = {}
        self._metrics.append({"step": step, **{name: _plain(value) for name, value in metrics.items()}})
        self._trackers.log(step, {name: value for name, value in metrics.items() if not isinstance(value, str)})

    def histogram(self, step: int, name: str, values: torch.Tensor) -> None:
        """Send a histogram of values [K] to the trackers."""
        self._trackers.histogram(step, name, values.cpu().numpy())

    def strip(self, step: int, images: dict[str, torch.Tensor], captions: Sequence[str] = ()) -> Path:
        """Write strips/step_00000010.png, with one row of images for each label, and send it to the trackers.

        Args:
            step: the step in the file's name.
            images: label -> uint8 [K, 3, H, W] on any device.
            captions: texts above the columns, such as their prompts.

        Returns:
            The file's path.

        Raises:
            ValueError: see `draw_strip`.
        """
        return self._picture("strips", step, draw_strip(images, captions))

    def measured(self, record: dict[str, Any], images: torch.Tensor, captions: Sequence[str]) -> Path:
        """Append a record to heldout.jsonl, write heldout/step_00000010.png, and send both to the trackers.

        Args:
            record: has the keys step and scores; scores is {name: {"mean", "change", ...}}. Trackers get no None.
            images: uint8 [K, 3, H, W] on any device.
            captions: K texts.

        Returns:
            The picture's path.
        """
        step, scores = record["step"], record["scores"].items()
        path = self._picture("heldout", step, draw_grid(images, captions))
        self._measures.append(record)
        for kind, key in (("heldout", "mean"), ("heldout_change", "change")):
            there = {f"{kind}/{name}": score[key] for name, score in scores if score[key] is not None}
            self._trackers.log(step, there)
        return path

    def set_held_out_aside(self) -> Path:
        """Rename heldout.jsonl to heldout.<resume step>.jsonl and start an empty one. Returns the renamed file."""
        return self._measures.set_aside(f"heldout.{self.resume_step}.jsonl")

    def sync(self) -> None:
        """Wait until the logged steps are on the disk."""
        self._metrics.sync()
        self._fitness.sync()

    def close(self) -> None:
        self._metrics.close()
        self._fitness.close()
        self._measures.close()
        self._trackers.finish()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _picture(self, kind: str, step: int, picture: Image.Image) -> Path:
        path = self._folder.path / kind / f"step_{step:08d}.png"
        write_atomic(path, picture.save)
        self._trackers.image(step, kind, picture)
        return path


class _Lines:
    """A file with one JSON record a line, each with its step. Opening it drops the records of step `before` and later.

    With `keep` the records also stay in memory, in `records`.
    """

    def __init__(self, path: Path, before: int, *, keep: bool = True):
        self.path, self.records, self._keep = path, _keep_steps_before(path, before), keep
        if not keep:
            self.records.clear()
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (held until close)

    def append(self, record: dict[str, Any]) -> None:
        with naming(self.path):
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
        if self._keep:
            self.records.append(record)

    def sync(self) -> None:
        with naming(self.path):
            os.fsync(self._file.fileno())

    def set_aside(self, name: str) -> Path:
        self._file.close()
        kept = self.path.rename(self.path.with_name(name))
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (held until close)
        self.records.clear()
        return kept

    def close(self) -> None:
        with naming(self.path):
            self._file.close()


def _keep_steps_before(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop the records of `step` and later from the file, and return the others."""
    if not path.exists():
        return []
    data = path.read_bytes()
    read = [(_record(line), line) for line in data.splitlines()]
    if torn := sum(record is None for record, _ in read):
        _log.warning("%s: dropped %d line(s) that are not a record, as a killed process leaves", path, torn)
    kept = [(record, line) for record, line in read if record is not None and record["step"] < step]
    if (whole := b"".join(line + b"\n" for _, line in kept)) != data:
        replace_file(path, whole)
    return [record for record, _ in kept]


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None


def _finite(fitness: Any) -> bool:
    return isinstance(fitness, list) and all(type(each) in (int, float) and math.isfinite(each) for each in fitness)


def _plain(value: float | int | str) -> float | int | str | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value
