"""Trackers show a run's numbers and pictures: TensorBoard, Weights & Biases, Trackio. Their errors never stop a run."""

import contextlib
import json
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import yaml
from PIL import Image

from esengine.base.errors import ConfigError, RunError
from esengine.base.files import read_regular, replace_file
from esengine.rewards.base import reason

PROJECT = "esengine"


class Tracker(Protocol):
    """One tracker. Any method may raise, see `Trackers`."""

    def start(self, settings: dict[str, Any]) -> None:
        """Start or resume the run with these settings."""

    def log(self, step: int, scalars: dict[str, float]) -> None: ...

    def image(self, step: int, name: str, picture: Image.Image) -> None: ...

    def histogram(self, step: int, name: str, values: np.ndarray) -> None: ...

    def finish(self) -> None: ...


class TensorBoard:
    """Event files below the run's folder. On resume, events of the resumed step and later are purged."""

    def __init__(self, folder: Path, resume_step: int | None):
        self.folder, self.resume_step = folder, resume_step

    def start(self, settings: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self.writer = SummaryWriter(str(self.folder), purge_step=self.resume_step, flush_secs=10)
        if settings:
            text = yaml.safe_dump(settings, sort_keys=False)
            self.writer.add_text("settings", f"```yaml\n{text}```", self.resume_step or 0)

    def log(self, step: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, picture: Image.Image) -> None:
        self.writer.add_image(name, np.asarray(picture), step, dataformats="HWC")

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        if not len(values):
            return
        low, high = float(values.min()), float(values.max())
        largest = max(-low, high)
        bins = "tensorflow"
        if largest > 1e20:  # its bins end there
            bins = np.linspace(low - 1e-3 * largest, high + 1e-3 * largest, 65)
        self.writer.add_histogram(name, values.astype(np.float64), step, bins=bins)

    def finish(self) -> None:
        self.writer.close()


class Wandb:
    """Weights & Biases, with its files below the run's folder. WANDB_MODE=offline needs no account."""

    def __init__(self, folder: Path, identity: str):
        self.folder, self.identity = folder, identity

    def start(self, settings: dict[str, Any]) -> None:
        import wandb

        self.wandb = wandb
        # without a network this takes a few minutes at most; `wandb sync` can upload the rest later
        limits = wandb.Settings(init_timeout=60, login_timeout=30, finish_timeout=120, console="off")
        name = self.folder.resolve().name
        self.run = wandb.init(
            project=PROJECT,
            id=self.identity,
            name=name,
            dir=self.folder,
            config=settings,
            resume="allow",
            settings=limits,
        )
        self.run.define_metric("*", step_metric="step")  # wandb's own counter cannot go back, as a resumed run does

    def log(self, step: int, scalars: dict[str, float]) -> None:
        self.run.log({"step": step, **scalars})

    def image(self, step: int, name: str, picture: Image.Image) -> None:
        self.run.log({"step": step, name: self.wandb.Image(picture)})

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        self.run.log({"step": step, name: self.wandb.Histogram(values)})

    def finish(self) -> None:
        self.run.finish()


class Trackio:
    """Trackio: a local database, shown by `trackio show`, or the Space that TRACKIO_SPACE_ID names."""

    def __init__(self, folder: Path, identity: str):
        self.name = f"{folder.resolve().name}-{identity}"

    def start(self, settings: dict[str, Any]) -> None:
        import trackio

        self.trackio = trackio
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
            self.run = trackio.init(project=PROJECT, name=self.name, config=settings, resume="allow", embed=False)

    def log(self, step: int, scalars: dict[str, float]) -> None:
        self.run.log(dict(scalars), step=step)

    def image(self, step: int, name: str, picture: Image.Image) -> None:
        self.run.log({name: self.trackio.Image(picture)}, step=step)

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        self.run.log({name: self.trackio.Histogram(values)}, step=step)

    def finish(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self.trackio.finish()


EXTRAS: dict[str, Callable[[Path, str], Tracker]] = {"wandb": Wandb, "trackio": Trackio}
"""Optional trackers. Each is installed by the pip extra of the same name."""


def require_installed(names: Sequence[str]) -> None:
    """Raise ConfigError for a tracker that is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise ConfigError(f"trackers: {name} is not installed; in esengine's folder: pip install -e '.[{name}]'")


class Trackers:
    """Several trackers used as one.

    A tracker that raises is dropped, with one warning and an entry in the run folder's trackers.json. The run
    continues without it.

    Args:
        makers: name -> a function that makes the tracker.
        record: trackers.json of the run folder.
        note: receives a warning for each tracker that is dropped.
        moved: whether the run folder's name leads elsewhere by now. The trackers of `EXTRAS`, which write by that name,
            are dropped then.
    """

    def __init__(
        self,
        makers: dict[str, Callable[[], Tracker]],
        record: "Record",
        note: Callable[[str], None],
        moved: Callable[[], bool] = lambda: False,
    ):
        self._makers, self._record, self._note, self._moved = makers, record, note, moved
        self._trackers: dict[str, Tracker] = {}

    def start(self, settings: dict[str, Any]) -> None:
        for name, make in self._makers.items():
            with self._dropped_if_it_fails(name, "start"):
                tracker = make()
                tracker.start(settings)
                self._trackers[name] = tracker

    def log(self, step: int, scalars: dict[str, float]) -> None:
        self._each("log", step, scalars)

    def image(self, step: int, name: str, picture: Image.Image) -> None:
        self._each("image", step, name, picture)

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        self._each("histogram", step, name, values)

    def finish(self) -> None:
        self._each("finish")

    def _each(self, method: str, *args) -> None:
        for name in list(self._trackers):
            with self._dropped_if_it_fails(name, method):
                if name in EXTRAS and self._moved():
                    raise RunError("the run folder was moved or replaced by another")
                getattr(self._trackers[name], method)(*args)

    @contextlib.contextmanager
    def _dropped_if_it_fails(self, name: str, method: str) -> Iterator[None]:
        try:
            yield
        except (Exception, SystemExit) as error:
            self._trackers.pop(name, None)
            self._record.failed(name, f"{method}: {reason(error)}")
            self._note(f"warning: {name} is dropped, the run continues without it: {method} raised {reason(error)}")


class Record:
    """trackers.json of a run folder: {"identity": "1f0c...", "failed": {tracker: why}}.

    The identity is the run's id in the trackers. With it a resumed run continues the same entry.
    """

    def __init__(self, path: Path, resume: bool):
        self.path = path
        self._data: dict[str, Any] = {"identity": uuid.uuid4().hex[:12], "failed": {}}
        if resume:
            # missing or damaged: keep the new identity
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
                self._data["identity"] = str(json.loads(read_regular(path, 1 << 20))["identity"])

    @property
    def identity(self) -> str:
        return self._data["identity"]

    def save(self) -> None:
        replace_file(self.path, (json.dumps(self._data, indent=1) + "\n").encode())

    def failed(self, name: str, why: str) -> None:
        self._data["failed"][name] = why
        self.save()


def open_trackers(
    folder: Path,
    tensorboard: Path,
    names: Sequence[str],
    resume_step: int | None,
    note: Callable[[str], None],
    *,
    record: Path | None = None,
    moved: Callable[[], bool] = lambda: False,
) -> Trackers:
    """Return TensorBoard and the named extras. They are not started yet.

    Args:
        folder: the run folder, for extras, whose other processes write there by its name.
        tensorboard: folder for TensorBoard's event files.
        names: keys of `EXTRAS`.
        resume_step: the step at which the run resumes; None for a new run.
        note, moved: see `Trackers`.
        record: trackers.json. None: the one in `folder`.
    """
    kept = Record(record or folder / "trackers.json", resume=resume_step is not None)
    if names:
        kept.save()  # before a tracker starts, so that a run killed in its start keeps its identity
    makers: dict[str, Callable[[], Tracker]] = {"tensorboard": partial(TensorBoard, tensorboard, resume_step)}
    makers |= {name: partial(EXTRAS[name], folder, kept.identity) for name in names}
    return Trackers(makers, kept, note, moved)
