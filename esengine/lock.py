"""The lock of a run folder. Without torch, so that a second process is told before anything large is loaded."""

import fcntl
import os
from pathlib import Path

from esengine.errors import RunError


def hold(descriptor: int, folder: Path, how: int = fcntl.LOCK_EX) -> None:
    """Lock an open lock file until it is closed.

    Raises:
        RunError: another process holds it, who is named; or it cannot be locked.
    """
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.pread(descriptor, 300, 0).decode(errors="replace").split()
        who = f"process {owner[0]} on {owner[1]}" if len(owner) == 2 else "another process"
        raise RunError(f"run folder {folder} is in use by {who}") from error
    except OSError as error:
        raise RunError(f"run folder {folder}: cannot be locked: {error.strerror or error}") from error


def refuse_if_held(folder: Path) -> None:
    """Look whether a run folder is free, and leave it as it is; whoever wants it still has to hold it.

    Raises:
        RunError: another process holds it.
    """
    try:
        descriptor = os.open(folder / ".lock", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # no lock, no run; what else may be wrong is for `RunFolder.open` to say
        return
    try:
        hold(descriptor, folder, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)
