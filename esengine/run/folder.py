"""The folder of a run, held by one process at a time, and the names of what a run writes into it.

Nothing here imports torch, so that a second process is sent away before it has loaded anything.
"""

import contextlib
import os
import re
import socket
import stat
import weakref
from pathlib import Path

from esengine.base.errors import RunError
from esengine.base.files import naming, refuse_links
from esengine.base.locks import lock

TEMPORARY = ".tmp-"
LOCK = ".lock"
_CHECKPOINT = re.compile(r"step_(\d{8,})")
_FOLDERS = ("checkpoints", "adapter", "tensorboard", "strips", "heldout", "wandb")
_FILES = (
    *("config.yaml", "metrics.jsonl", "fitness.jsonl", "heldout.jsonl"),
    *("eval.json", "comparison.png", "trackers.json", "report.html"),
)


def checkpoint_folders(root: Path) -> list[Path]:
    """The checkpoints under root, newest first, unverified."""
    if not root.is_dir():
        return []
    return sorted((p for p in root.iterdir() if _CHECKPOINT.fullmatch(p.name) and p.is_dir()), key=path_step)[::-1]


def path_step(path: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(path.name.removeprefix("step_"))


class RunFolder:
    """A run's folder, held by one process at a time through a lock that ends with the process.

    Use `RunFolder.open` in a `with` statement, or call `close`.
    """

    def __init__(self, path: Path, lock: int | None, created: tuple[Path, ...] = ()):
        """`lock`: descriptor of the locked file. `created`: that file and the folders made for it, innermost first."""
        self.path = path
        self._lock = lock
        self._created = created
        own = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: own() and own().close())  # a child would hold the lock too

    @classmethod
    def open(cls, path: str | Path, resume: bool = False) -> "RunFolder":
        """Make or reopen a run folder and lock it.

        Args:
            path: the folder; without resume it may be missing, or hold anything but a run that has made a step.
            resume: the folder must hold a checkpoint.

        Raises:
            RunError: another process holds it, it cannot be made or locked, what a run writes is a symbolic link, it
                holds a run with a step behind it and resume is false, or no checkpoint and resume is true.
        """
        path = Path(path)
        if resume and not path.is_dir():
            raise RunError(f"run folder {path}: nothing to resume, there is no such folder")
        created = tuple(p for p in (path / LOCK, path, *path.parents) if not p.exists())
        folder = cls(path, _locked(path), created)
        try:
            folder._refuse_links()
            folder._require(resume)
            folder._remove_torn_files()
        except BaseException:
            folder._leave_nothing()
            folder.close()
            raise
        return folder

    @staticmethod
    def require_free(path: str | Path) -> None:
        """Raises RunError if another process holds the folder now. Makes, changes and keeps nothing."""
        try:
            file = os.open(Path(path) / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:  # none, or one for `open` to complain of
            return
        try:
            _take(file, Path(path), shared=True)
        finally:
            os.close(file)

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

    @property
    def held_out(self) -> Path:
        return self.path / "heldout"

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

    def _leave_nothing(self) -> None:
        """Where nothing was begun, take away what `open` made."""
        if self._lock is None or not self._created or self.config.exists() or checkpoint_folders(self.checkpoints):
            return
        for made in self._created:
            with contextlib.suppress(OSError):  # not empty: it holds something else
                made.unlink() if made.name == LOCK else made.rmdir()

    def _refuse_links(self) -> None:
        """What a run writes, prunes or appends to must lie in its own folder."""
        written = [self.path / name for name in (*_FILES, *_FOLDERS)]
        for folder in (self.checkpoints, self.adapter, self.tensorboard, self.strips, self.held_out):
            if folder.is_dir() and not folder.is_symlink():
                written += folder.iterdir()
        refuse_links(f"run folder {self.path}", written)

    def _remove_torn_files(self) -> None:
        """What a killed process left half written."""
        for place in (self.path, self.adapter, self.strips, self.held_out):
            for torn in place.glob(f"{TEMPORARY}*"):
                with contextlib.suppress(IsADirectoryError):  # none of ours
                    torn.unlink()

    def _require(self, resume: bool) -> None:
        found = checkpoint_folders(self.checkpoints)
        if resume and not found:
            raise RunError(f"run folder {self.path}: nothing to resume, it holds no checkpoint")
        logged = [log for log in (self.metrics, self.fitness) if log.exists() and log.stat().st_size]
        if not resume and found and (path_step(found[0]) > 0 or logged):
            raise RunError(f"run folder {self.path} already holds a run: add --resume, or choose another --run-dir")
        if not resume and logged:
            raise RunError(
                f"run folder {self.path} already holds a run, {logged[0].name} of it and no checkpoint: choose another "
                "--run-dir"
            )


def _locked(path: Path) -> int:
    """Descriptor of the lock file of a run folder, both made if missing, held by this process and saying so."""
    while True:
        try:
            path.mkdir(parents=True, exist_ok=True)
            file = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        except (FileExistsError, NotADirectoryError) as e:
            raise RunError(f"run folder {path}: expected a folder, there is a file") from e
        except OSError as e:
            link = (path / LOCK).is_symlink()
            raise RunError(f"run folder {path}: {f'{LOCK} is a symbolic link' if link else e.strerror or e}") from e
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode) or os.fstat(file).st_nlink > 1:
                raise RunError(f"run folder {path}: expected {LOCK} to be a file with one name")
            _take(file, path)
            if os.fstat(file).st_nlink:  # else its last holder left nothing, and took it away
                with naming(path / LOCK):
                    os.ftruncate(file, 0)
                    os.pwrite(file, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _take(file: int, path: Path, *, shared: bool = False) -> None:
    """Raises RunError if another process holds the lock file."""
    try:
        free = lock(file, shared=shared)
    except OSError as e:
        raise RunError(f"run folder {path}: cannot be locked: {e.strerror or e}") from e
    if not free:
        owner = os.pread(file, 300, 0).decode(errors="replace").split()
        who = f"process {owner[0]} on {owner[1]}" if len(owner) == 2 else "another process"
        raise RunError(f"run folder {path} is in use by {who}")
