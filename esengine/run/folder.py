"""The folder of a run, locked by one process at a time, and the names of the files that a run writes into it.

A run writes through the open folder, so what it writes stays in the folder that it has locked. If that folder is
renamed and another run begins under its name, neither writes into the other's.

This module does not import torch. A second process is refused before it loads anything.
"""

import contextlib
import itertools
import os
import re
import socket
import stat
import weakref
from datetime import datetime
from pathlib import Path

from esengine.base.errors import RunError
from esengine.base.files import naming, refuse_links
from esengine.base.locks import Held, lock
from esengine.run import journal

TEMPORARY = ".tmp-"
LOCK = ".lock"
_CHECKPOINT = re.compile(r"step_(\d{8,})")
KEPT = {"best": "adapter-best", "ema": "adapter-ema"}
"""Folders of the adapters that a run keeps besides its last one, by kind."""
INIT_ADAPTER = "init_adapter"
_FOLDERS = ("checkpoints", "adapter", *KEPT.values(), INIT_ADAPTER, "tensorboard", "strips", "heldout", "wandb")
_FILES = (journal.NAME, "config.yaml", "eval.json", "comparison.png", "trackers.json", "report.html")


def checkpoint_folders(root: Path) -> list[Path]:
    """The checkpoints under root, newest first, unverified."""
    if not root.is_dir():
        return []
    return sorted((p for p in root.iterdir() if _CHECKPOINT.fullmatch(p.name) and p.is_dir()), key=path_step)[::-1]


def path_step(path: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(path.name.removeprefix("step_"))


class RunPaths:
    """The names of a run's files below the folder `path`."""

    def __init__(self, path: Path):
        self.path = path

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

    def kept(self, kind: str) -> Path:
        """The folder of a kept adapter, see `KEPT`."""
        return self.path / KEPT[kind]

    @property
    def adapters(self) -> list[Path]:
        """The folders that may hold an adapter."""
        return [self.adapter, self.init_adapter, *map(self.kept, KEPT)]

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def strips(self) -> Path:
        return self.path / "strips"

    @property
    def held_out(self) -> Path:
        return self.path / "heldout"


class RunFolder(RunPaths):
    """A run's folder, locked by one process at a time. The lock ends with the process.

    Use `RunFolder.open` in a `with` statement, or call `close`.

    Attributes:
        path: the folder as the user named it, for messages and to read. Write below `held`.
    """

    def __init__(self, path: Path, lock: int | None, created: tuple[Path, ...] = (), opened: Held | None = None):
        """`lock`: descriptor of the locked file. `created`: the file and folders that were made, innermost first."""
        super().__init__(path)
        self._lock, self._created, self._opened = lock, created, opened
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
        return cls._open(path, resume, tuple(p for p in (path / LOCK, path, *path.parents) if not p.exists()))

    @classmethod
    def open_dated(cls, parent: str | Path) -> "RunFolder":
        """Make a new run folder below `parent`, named by date and time, and lock it.

        Runs that start in the same second get different folders: the later ones have a number behind the time.

        Raises:
            RunError: it cannot be made or locked.
        """
        parent, base = Path(parent), dated()
        above = [p for p in (parent, *parent.parents) if not p.exists()]
        for number in itertools.count(1):
            path = parent / (base if number == 1 else f"{base}_{number}")
            try:
                parent.mkdir(parents=True, exist_ok=True)
                path.mkdir()
            except FileExistsError as error:
                if not parent.is_dir():
                    raise RunError(f"run folder {path}: expected a folder, {parent} is a file") from error
            except OSError as error:
                raise RunError(f"run folder {path}: {error.strerror or error}") from error
            else:
                return cls._open(path, False, (path / LOCK, path, *above))

    @classmethod
    def _open(cls, path: Path, resume: bool, created: tuple[Path, ...]) -> "RunFolder":
        file, opened = _locked(path)
        folder = cls(path, file, created, opened)
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
    def held(self) -> RunPaths:
        """The names to write to. They lead into the locked folder, even if it has another name by now.

        Raises:
            RunError: see `Held.path`.
        """
        return self if self._opened is None else RunPaths(self._opened.path)

    @property
    def moved(self) -> bool:
        """Whether `path` leads to another folder than the locked one, or to none."""
        return self._opened is not None and self._opened.moved

    def where(self) -> Path:
        """The folder's name: `path`, or the one that it has now. After `close`: the one that it had then."""
        return self.path if self._opened is None else self._opened.where()

    def named(self, text: str) -> str:
        """A text in which the folder of `held` has its name, for messages."""
        return text if self._opened is None else self._opened.named(text)

    def close(self) -> None:
        """Release the lock. The `.lock` file stays: if it were removed, two processes could each lock their own."""
        if self._lock is not None:
            os.close(self._lock)
            self._opened.close()
            self._lock = None

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *exception) -> None:
        if self._opened is not None and isinstance(exception[1], Exception):
            self._opened.name_in(exception[1])
        if exception[0] is not None:
            self._leave_nothing()
        self.close()

    def _leave_nothing(self) -> None:
        """Remove what `open` made, if the run has written no journal and no checkpoint."""
        if self._lock is None or not self._created or self.moved:
            return
        if self.held.journal.exists() or checkpoint_folders(self.held.checkpoints):
            return
        for made in self._created:
            with contextlib.suppress(OSError):  # a folder with other files in it stays
                (self.held.path / LOCK).unlink() if made.name == LOCK else made.rmdir()

    def _refuse_links(self) -> None:
        """Raise RunError for a symbolic link among the files that a run writes, prunes or appends to."""
        written = [self.path / name for name in (*_FILES, *_FOLDERS)]
        for folder in (self.checkpoints, *self.adapters, self.tensorboard, self.strips, self.held_out):
            if folder.is_dir() and not folder.is_symlink():
                written += folder.iterdir()
        refuse_links(f"run folder {self.path}", written)

    def _remove_torn_files(self) -> None:
        """Remove the partly written files of a killed process."""
        held = self.held
        for place in (held.path, *held.adapters, held.strips, held.held_out):
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


def dated() -> str:
    """A name for a run folder: the date and time."""
    return datetime.now().strftime("%Y-%m-%d_%H-%M-%S")


def _locked(path: Path) -> tuple[int, Held]:
    """Make a run folder and its lock file if missing, lock both and write this process's id and host into the file.

    The folder is locked too, so that the lock holds when somebody removes the file.

    Returns:
        The descriptor of the lock file, and the folder.
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
            if (opened := _folder_of(file, path)) is not None:
                with naming(path / LOCK):
                    os.ftruncate(file, 0)
                    os.pwrite(file, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
                return file, opened
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _folder_of(file: int, path: Path) -> Held | None:
    """The folder that has this lock file, locked. None if there is none: the file was removed, or the folder renamed.

    Raises:
        RunError: another process holds the folder.
    """
    try:
        opened = Held(path)
    except OSError:
        return None
    try:
        if not os.path.samestat(os.stat(LOCK, dir_fd=opened.file, follow_symlinks=False), os.fstat(file)):
            opened.close()
            return None
        if not opened.alone():
            raise RunError(f"run folder {path} is in use by another process, and its {LOCK} was removed")
    except FileNotFoundError:
        opened.close()
        return None
    except BaseException:
        opened.close()
        raise
    return opened


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
