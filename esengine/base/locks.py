"""File locks between processes, and folders that are held open. A lock ends with the process that holds it."""

import fcntl
import os
import re
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path

from esengine.base.errors import RunError

_BY_NUMBER = "/proc/self/fd"
"""Where Linux shows a process's open files. A folder's number leads to that folder, whatever its name is now."""


def lock(file: int, *, shared: bool = False, wait: bool = False) -> bool:
    """Lock an open file.

    Args:
        file: its descriptor.
        shared: other processes may hold the lock too if they also share it.
        wait: wait until no other process holds the lock.

    Returns:
        False if another process holds the lock.

    Raises:
        OSError: this file system has no locks.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


class Held:
    """An open folder. What is written below `path` goes into this folder, even if another one takes its name.

    Args:
        name: the folder.

    Attributes:
        name: the folder, as given.
        file: its descriptor; None after `close`.

    Raises:
        OSError: there is no such folder.
    """

    def __init__(self, name: Path):
        self.name, self._absolute, self._last = name, os.path.abspath(name), name
        self.file: int | None = os.open(name, os.O_RDONLY | os.O_DIRECTORY)

    def alone(self) -> bool:
        """Lock the folder itself. False if another process holds it. Some network file systems lock no folders."""
        try:
            flock(self.file, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # the caller's lock file is locked in any case
            pass
        return True

    @property
    def path(self) -> Path:
        """The folder by its descriptor. Valid in this process only.

        Raises:
            RunError: there is no /proc, and the folder's name leads to another folder now.
        """
        if self.file is None:
            return self._last
        if os.path.isdir(path := f"{_BY_NUMBER}/{self.file}"):
            return Path(path)
        if self.moved:
            raise RunError(
                f"folder {self.name}: it was moved, removed or replaced by another; nothing was written there"
            )
        return self.name

    @property
    def moved(self) -> bool:
        """Whether the folder's name leads to another folder now, or to none."""
        try:
            return self.file is not None and not os.path.samestat(os.stat(self._absolute), os.fstat(self.file))
        except OSError:
            return True

    def where(self) -> Path:
        """The folder by its name: the given one, or the one that it has now."""
        if not self.moved or not os.path.isdir(path := f"{_BY_NUMBER}/{self.file}"):
            return self._last
        return Path(os.readlink(path))

    def named(self, text: str) -> str:
        """A text with the folder's name in place of its descriptor."""
        if self.file is None or _BY_NUMBER not in text:
            return text
        return re.sub(rf"{_BY_NUMBER}/{self.file}(?!\d)", lambda _: str(self.where()), text)

    def name_in(self, error: Exception) -> None:
        """Replace the folder's descriptor in an error's texts by its name."""
        error.args = tuple(self.named(each) if isinstance(each, str) else each for each in error.args)
        for place in ("filename", "filename2", "problem", "setting", "source"):
            if isinstance(text := getattr(error, place, None), str):
                setattr(error, place, self.named(text))

    def close(self) -> None:
        if self.file is not None:
            self._last = self.where()
            os.close(self.file)
            self.file = None
