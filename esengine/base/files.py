"""Atomic and synced file writes, safe reads, and the cache folder."""

import errno
import logging
import os
import stat
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from esengine.base.errors import RunError

DATA = Path(__file__).parents[1] / "data"
"""Packaged prompts and settings. `--config reference` finds reference.yaml, the settings of the published run."""

_log = logging.getLogger(__name__)
warned = threading.Event()
"""Set when `warn_no_cache` has logged. A command clears it at its start."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add `path` to an OSError that names no file, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def read_regular(path: str | Path, most: int | None = None) -> bytes:
    """The bytes of a file of at most `most` bytes. Raises OSError, also for a pipe or device, which may never end."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode):
            raise OSError(errno.EINVAL, "expected a regular file", str(path))
        if most is not None and facts.st_size > most:
            raise OSError(errno.EFBIG, f"expected at most {most} bytes, got {facts.st_size}", str(path))
        data = file.read(-1 if most is None else most + 1) or b""  # None: of a file of the kernel that has nothing yet
        if most is not None and len(data) > most:
            raise OSError(errno.EFBIG, f"expected at most {most} bytes, got more", str(path))
        return data


def require_inside(folder: Path, path: Path) -> Path:
    """The path, if following its links does not lead out of the folder. Raises RunError otherwise."""
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # links in a circle, or a NUL
        inside = False
    if not inside:
        raise RunError(f"{path}: expected a file in {folder}, it leads out of the folder", path=path)
    return path


@contextmanager
def utf8_name(path: Path) -> Iterator[Path]:
    """A name of a file for a library that takes no name but UTF-8: the path, or that of the open file if it is not."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        with open(path, "rb") as file:
            yield Path(f"/proc/self/fd/{file.fileno()}")
    else:
        yield path


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a temporary name in the same folder, sync the file and rename it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".tmp-{path.name}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        with naming(path):
            write(temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
            sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def replace_file(path: Path, data: bytes) -> None:
    """Replace a file's contents. A crash leaves either the old contents or the new ones."""
    write_atomic(path, lambda temporary: temporary.write_bytes(data))


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with naming(path), open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until a folder's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_root() -> Path | None:
    """This user's cache: `$ESENGINE_CACHE`, else `$XDG_CACHE_HOME/esengine`, else `~/.cache/esengine`.

    None if none of them is set and this user has no home folder. That is logged once.
    """
    if given := os.environ.get("ESENGINE_CACHE"):
        return Path(os.path.expanduser(given))
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "esengine"
    try:
        return Path.home() / ".cache" / "esengine"
    except RuntimeError:  # a user without an entry in the system's list, and HOME is not set
        warn_no_cache("this user has no home folder")
        return None


def warn_no_cache(why: str) -> None:
    """Log once in a command that the work goes on without the cache."""
    if warned.is_set():
        return
    warned.set()
    _log.warning("warning: no cache: %s; the work goes on without it. ESENGINE_CACHE sets another folder", why)


def refuse_links(where: str, paths: Iterable[Path]) -> None:
    """Raises RunError if a path is a symbolic link, pipe, device or socket. The message begins with `where`."""
    for path in paths:
        if path.is_symlink():
            raise RunError(f"{where}: {path} is a symbolic link, a run writes to none: remove it")
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise RunError(f"{where}: {path} is a pipe, device or socket, expected a file or a folder: remove it")
