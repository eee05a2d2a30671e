"""Locks of files between processes. They end with the process that holds them."""

import fcntl


def lock(file: int, *, shared: bool = False, wait: bool = False) -> bool:
    """Lock an open file.

    Args:
        file: its descriptor.
        shared: others may hold it too, if they share it.
        wait: until no other process holds it.

    Returns:
        False if another process holds it.

    Raises:
        OSError: this file system has no locks.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True
