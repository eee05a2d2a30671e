"""Checkpoints that a crash cannot tear and a flipped bit cannot fool, and the run folder that holds them.

A checkpoint is a folder `step_00000012/` of two files, never a pickle:

    state.safetensors   the tensors
    meta.json           format, step, the caller's meta, and a SHA-256 of each of the two contents

It is written under a temporary name, synced and renamed, so it is there whole or not at all. The same step, tensors
and meta give the same bytes.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

from esengine.errors import RunError
from esengine.files import sync_folder, write_synced
from esengine.lock import hold

FORMAT = 1
_STATE, _META = "state.safetensors", "meta.json"
_TEMPORARY = ".tmp-"
_NAME = re.compile(r"step_(\d{8,})")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that passed its checksums.

    Attributes:
        step: the step it was saved at.
        path: its folder.
        tensors: name -> tensor on the CPU.
        meta: the caller's JSON values.
        skipped: newer checkpoints that did not pass, newest first, as (path, why). Only `load_latest` fills it.
    """

    step: int
    path: Path
    tensors: dict[str, torch.Tensor]
    meta: dict
    skipped: tuple[tuple[Path, str], ...] = ()


def save(root: str | Path, step: int, tensors: dict[str, torch.Tensor], meta: dict, keep: int = 2) -> Path:
    """Write a checkpoint under root, then remove all but the newest `keep` up to this step.

    Checkpoints of later steps are removed too: the run went back before them, because they could not be read. A
    step that is saved again is left alone if its bytes are the same, and replaced if not. Left-over temporary
    folders are removed, so only the owner of the run folder may call this.

    Args:
        root: the folder of checkpoints, made if missing.
        step: 0 or more.
        tensors: any dtype, device and layout.
        meta: JSON values with finite numbers; it comes back as JSON gives it (tuples as lists, keys as text).
        keep: 1 or more.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: a step, keep or meta that is not as above (TypeError for a value JSON does not know).
        OSError: the disk is full, or the folder cannot be written.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"expected step >= 0 and keep >= 1, got step {step} and keep {keep}")
    root = Path(root)
    target = root / f"step_{step:08d}"
    state = safetensors.torch.save(
        {name: tensors[name].detach().cpu().clone(memory_format=torch.contiguous_format) for name in sorted(tensors)}
    )
    record = {"format": FORMAT, "step": step, "meta": json.loads(_json(meta))}
    record |= {"meta_sha256": _sha256(_json(record)), "sha256": _sha256(state)}
    files = {_STATE: state, _META: _json(record) + b"\n"}

    root.mkdir(parents=True, exist_ok=True)
    _remove_temporaries(root)
    if not all((target / name).is_file() and (target / name).read_bytes() == data for name, data in files.items()):
        temporary = root / f"{_TEMPORARY}{target.name}"
        temporary.mkdir()
        for name, data in files.items():
            write_synced(temporary / name, data)
        sync_folder(temporary)
        if target.exists():
            target.rename(root / f"{_TEMPORARY}replaced-{target.name}")
        temporary.rename(target)
        sync_folder(root)
        _remove_temporaries(root)
    kept = [path for path in _folders(root) if path_step(path) <= step][:keep]
    for path in _folders(root):
        if path not in kept:
            shutil.rmtree(path)
    return target


def latest(root: str | Path) -> Path | None:
    """The newest checkpoint's folder, unverified, or None."""
    return next(iter(_folders(Path(root))), None)


def load(path: str | Path) -> Checkpoint:
    """Read one checkpoint and verify it.

    Raises:
        RunError: a file is missing, unreadable, of another format, or does not match its checksum.
    """
    path = Path(path)
    try:
        raw, state = (path / _META).read_bytes(), (path / _STATE).read_bytes()
    except OSError as e:
        raise RunError(f"checkpoint {e.filename or path}: {e.strerror or e}") from e
    try:
        record = json.loads(raw)
        version = record["format"]
        signed = _json({key: record[key] for key in ("format", "step", "meta")})
        sums = record["meta_sha256"], record["sha256"]
        if _json(record) + b"\n" != raw:
            raise ValueError("other spaces")
    except (ValueError, TypeError, KeyError, RecursionError) as e:
        raise RunError(f"checkpoint {path / _META}: corrupt, not the JSON that was written") from e
    if version != FORMAT:
        raise RunError(f"checkpoint {path / _META}: expected format {FORMAT}, got {version!r}")
    for name, data, expected in ((_META, signed, sums[0]), (_STATE, state, sums[1])):
        if _sha256(data) != expected:
            raise RunError(f"checkpoint {path / name}: corrupt, its SHA-256 is not the one recorded")
    try:
        tensors = safetensors.torch.load(state)
    except SafetensorError as e:
        raise RunError(f"checkpoint {path / _STATE}: {e}") from e
    return Checkpoint(record["step"], path, tensors, record["meta"])


def load_latest(root: str | Path) -> Checkpoint:
    """The newest checkpoint that verifies. Newer ones that do not are logged and listed in its `skipped`.

    Raises:
        RunError: there is none, or none verifies.
    """
    skipped: list[tuple[Path, str]] = []
    for path in _folders(Path(root)):
        try:
            found = load(path)
        except RunError as e:
            _log.warning("skipped: %s", e)
            skipped.append((path, str(e)))
        else:
            return Checkpoint(found.step, found.path, found.tensors, found.meta, tuple(skipped))
    if skipped:
        raise RunError(f"no checkpoint under {root} can be read; the newest: {skipped[0][1]}")
    raise RunError(f"no checkpoint under {root}")


def path_step(path: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(path.name.removeprefix("step_"))


class RunFolder:
    """A run's folder, held by one process at a time through a lock that ends with the process.

    Use `RunFolder.open` in a `with` statement, or call `close`.
    """

    def __init__(self, path: Path, lock: int, created: tuple[Path, ...] = ()):
        """`created`: the lock file and the folders that this process made, innermost first."""
        self.path = path
        self._lock: int | None = lock
        self._created = created

    @classmethod
    def open(cls, path: str | Path, resume: bool = False) -> "RunFolder":
        """Make or reopen a run folder and lock it.

        Args:
            path: the folder; without resume it may be missing, or hold anything but a run that has made a step.
            resume: the folder must hold a checkpoint.

        Raises:
            RunError: another process holds it, it cannot be made or locked, it holds a run with a step behind it and
                resume is false, or no checkpoint and resume is true.
        """
        path = Path(path)
        if resume and not path.is_dir():
            raise RunError(f"run folder {path}: nothing to resume, there is no such folder")
        created = tuple(p for p in (path / ".lock", path, *path.parents) if not p.exists())
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except (FileExistsError, NotADirectoryError) as e:
            raise RunError(f"run folder {path}: expected a folder, there is a file") from e
        except OSError as e:
            raise RunError(f"run folder {path}: {e.strerror or e}") from e
        folder = cls(path, lock, created)
        try:
            folder._acquire()
        except BaseException:
            folder.close()
            raise
        try:
            folder._require(resume)
            folder._remove_torn_files()
        except BaseException:
            folder._leave_nothing()
            folder.close()
            raise
        return folder

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def fitness(self) -> Path:
        return self.path / "fitness.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def strips(self) -> Path:
        return self.path / "strips"

    def close(self) -> None:
        """Release the lock; the `.lock` file stays, for removing it could split the lock in two."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *exception) -> None:
        if exception[0] is not None:
            self._leave_nothing()
        self.close()

    def _acquire(self) -> None:
        hold(self._lock, self.path)
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)

    def _leave_nothing(self) -> None:
        """Where nothing was begun, take away what `open` made."""
        if not self._created or self.config.exists() or latest(self.checkpoints):
            return
        for made in self._created:
            with contextlib.suppress(OSError):  # not empty: it holds something else
                made.unlink() if made.name == ".lock" else made.rmdir()

    def _remove_torn_files(self) -> None:
        """What a killed process left half written."""
        for place in (self.path, self.adapter):
            for torn in place.glob(f"{_TEMPORARY}*"):
                torn.unlink()

    def _require(self, resume: bool) -> None:
        checkpoint = latest(self.checkpoints)
        if resume and checkpoint is None:
            raise RunError(f"run folder {self.path}: nothing to resume, it holds no checkpoint")
        if not resume and checkpoint and path_step(checkpoint) > 0:
            raise RunError(f"run folder {self.path} already holds a run: add --resume, or choose another --run-dir")


def _folders(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return sorted((p for p in root.iterdir() if _NAME.fullmatch(p.name) and p.is_dir()), key=path_step, reverse=True)


def _remove_temporaries(root: Path) -> None:
    for path in root.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path)


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, allow_nan=False, indent=1).encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
