"""File locks between processes. A lock ends with the process that holds it."""

import fcntl


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
