"""The folder of a run, locked by one process at a time, and the names of the files that a run writes into it.

This module does not import torch. A second process is refused before it loads anything.
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
from esengine.run import journal

TEMPORARY = ".tmp-"
LOCK = ".lock"
_CHECKPOINT = re.compile(r"step_(\d{8,})")
INIT_ADAPTER = "init_adapter"
_FOLDERS = ("checkpoints", "adapter", INIT_ADAPTER, "tensorboard", "strips", "heldout", "wandb")
_FILES = (journal.NAME, "config.yaml", "eval.json", "comparison.png", "trackers.json", "report.html")


def checkpoint_folders(root: Path) -> list[Path]:
    """The checkpoints under root, newest first, unverified."""
    if not root.is_dir():
        return []
    return sorted((p for p in root.iterdir() if _CHECKPOINT.fullmatch(p.name) and p.is_dir()), key=path_step)[::-1]


def path_step(path: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(path.name.removeprefix("step_"))


class RunFolder:
    """A run's folder, locked by one process at a time. The lock ends with the process.

    Use `RunFolder.open` in a `with` statement, or call `close`.
    """

    def __init__(self, path: Path, lock: int | None, created: tuple[Path, ...] = ()):
        """`lock`: descriptor of the locked file. `created`: the file and folders that were made, innermost first."""
        self.path = path
        self._lock = lock
        self._created = created
        own = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: own() and own().close())  # a child would hold the lock too

    @classmethod
    def open(cls, path: str | Path, resume: bool = False) -> "RunFolder":
        """Make or reopen a run folder and lock it.

        Args:
            path: the folder. Without resume it may be missing, but it must not hold a run that has made a step.
            resume: if true, the folder must hold a checkpoint.

        Raises:
            RunError: another process holds the folder, it cannot be made or locked, or a file that a run writes is a
                symbolic link. Without resume: it holds a run that has made a step. With resume: it holds no
                checkpoint.
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
        """Raise RunError if another process holds the folder now. The folder is not changed or locked."""
        try:
            file = os.open(Path(path) / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:  # there is no lock file, or `open` reports the error
            return
        try:
            _take(file, Path(path), shared=True)
        finally:
            os.close(file)

    @classmethod
    def require_new(cls, path: str | Path) -> None:
        """Raise RunError if a new run could not begin in the folder. The folder is not made, changed or locked."""
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise RunError(f"run folder {path}: expected a folder, there is a file")
        cls.require_free(path)
        cls(path, None)._require(resume=False)

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def journal(self) -> Path:
        return self.path / journal.NAME

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def init_adapter(self) -> Path:
        """A copy of the adapter that the run started from, if it was given one."""
        return self.path / INIT_ADAPTER

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
        """Release the lock. The `.lock` file stays: if it were removed, two processes could each lock their own."""
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
        """Remove what `open` made, if the run has written no journal and no checkpoint."""
        if self._lock is None or not self._created or self.journal.exists() or checkpoint_folders(self.checkpoints):
            return
        for made in self._created:
            with contextlib.suppress(OSError):  # a folder with other files in it stays
                made.unlink() if made.name == LOCK else made.rmdir()

    def _refuse_links(self) -> None:
        """Raise RunError for a symbolic link among the files that a run writes, prunes or appends to."""
        written = [self.path / name for name in (*_FILES, *_FOLDERS)]
        places = (self.checkpoints, self.adapter, self.init_adapter, self.tensorboard, self.strips, self.held_out)
        for folder in places:
            if folder.is_dir() and not folder.is_symlink():
                written += folder.iterdir()
        refuse_links(f"run folder {self.path}", written)

    def _remove_torn_files(self) -> None:
        """Remove the partly written files of a killed process."""
        for place in (self.path, self.adapter, self.init_adapter, self.strips, self.held_out):
            for torn in place.glob(f"{TEMPORARY}*"):
                with contextlib.suppress(IsADirectoryError):  # a run makes no such folder here
                    torn.unlink()

    def _require(self, resume: bool) -> None:
        found = checkpoint_folders(self.checkpoints)
        if resume and not found:
            raise RunError(f"run folder {self.path}: nothing to resume, it holds no checkpoint")
        logged = journal.has_steps(self.journal)
        if not resume and found and (path_step(found[0]) > 0 or logged):
            raise RunError(f"run folder {self.path} already holds a run: add --resume, or choose another --run-dir")
        if not resume and logged:
            raise RunError(
                f"run folder {self.path} already holds a run, {journal.NAME} without a checkpoint; choose another "
                "--run-dir"
            )


def _locked(path: Path) -> int:
    """Make a run folder and its lock file if missing, lock the file and write this process's id and host into it.

    Returns:
        The descriptor of the lock file.
    """
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
            if os.fstat(file).st_nlink:  # else its last holder removed it: try again
                with naming(path / LOCK):
                    os.ftruncate(file, 0)
                    os.pwrite(file, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _take(file: int, path: Path, *, shared: bool = False) -> None:
    """Lock the file. Raises RunError if another process holds it."""
    try:
        free = lock(file, shared=shared)
    except OSError as e:
        raise RunError(f"run folder {path}: cannot be locked: {e.strerror or e}") from e
    if not free:
        owner = os.pread(file, 300, 0).decode(errors="replace").split()
        who = f"process {owner[0]} on {owner[1]}" if len(owner) == 2 else "another process"
        raise RunError(f"run folder {path} is in use by {who}")
