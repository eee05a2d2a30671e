"""Checks of a model's files before a library reads them. A model may be another's.

Every file of a model is a regular file in its folder, so that the fingerprint of the folder covers it. Links may lead
out of the folder only within the Hugging Face cache. Nothing in a configuration names code.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from esengine.base.errors import EsengineError
from esengine.base.files import read_regular
from esengine.base.records import MAX_OBJECT, parse_json

ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
"""Attention implementations that a configuration may name. transformers takes other names for code on the hub."""
_ATTENTION_KEYS = ("attn_implementation", "_attn_implementation")
_NEEDS_PACKAGES = ("quantization_config", *_ATTENTION_KEYS, "experts_implementation")
"""Keys of a configuration that may need other packages."""


def read_mapping(path: Path) -> dict[str, Any]:
    """A file's JSON object. Raises OSError if it is no readable regular file, and ValueError if it is no object."""
    try:
        found = parse_json(read_regular(path, MAX_OBJECT))
    except ValueError as error:
        raise ValueError(f"{path.parent.name}/{path.name}: {str(error)[:200]}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path.parent.name}/{path.name}: expected a mapping, got {type(found).__name__}")
    return found


def require_own_files(root: Path, parts: Iterable[str] = ("",)) -> None:
    """Check the files of a model's subfolders.

    Args:
        root: the model's folder.
        parts: the subfolders that are loaded. A missing one is left to its reader.

    Raises:
        ValueError: a file is no regular file or leads out of the model's folder, an index names a file elsewhere, or a
            configuration names an attention implementation that is not one of `ATTENTION`.
        OSError: a file cannot be read.
    """
    for part in parts:
        folder = root / part
        for file in sorted(folder.iterdir()) if folder.is_dir() else ():
            where = f"{part}/{file.name}" if part else file.name
            if not _is_own(file, root):
                raise ValueError(f"{where}: expected a file in the model's folder, it leads out of it; copy it there")
            if not (file.is_file() or file.is_dir()):
                raise ValueError(f"{where}: expected a regular file")
            if file.name.endswith(".index.json"):
                require_plain_names(read_mapping(file).get("weight_map"), where)
            elif file.name == "config.json":
                _require_no_code(read_mapping(file), where)


def require_plain_names(weight_map: Any, where: str) -> None:
    """Raise ValueError unless an index maps weights to names of files beside it."""
    names = weight_map.values() if isinstance(weight_map, dict) else [weight_map]
    for name in names:
        if not isinstance(name, str) or name in ("", ".", "..") or any(sign in name for sign in "/\\\0"):
            raise ValueError(f"{where}: weight_map: expected names of files beside it, got {name!r:.100}")


@contextmanager
def naming_keys(folder: Path) -> Iterator[None]:
    """Add to a library's error the folder, and the keys of its config.json that may be the cause."""
    try:
        yield
    except (EsengineError, MemoryError):
        raise
    except Exception as error:
        if "memory" in str(error).lower():
            raise
        where, file, keys = folder.name, folder / "config.json", {}
        if file.is_file():
            keys = dict.fromkeys(key for key, _ in _entries(read_mapping(file)) if key in _NEEDS_PACKAGES)
        if keys:
            where = f"{folder.name}/config.json, which has {', '.join(keys)}"
        kind = "" if isinstance(error, (OSError, ValueError, ImportError)) else f"{type(error).__name__}: "
        raise ValueError(f"{where}: {kind}{error}") from error


def _is_own(file: Path, root: Path) -> bool:
    """Whether a file, with its links followed, lies in the model's folder, or is the hub cache's file of the model."""
    try:
        real, own = file.resolve(), root.resolve()
    except (OSError, RuntimeError):
        return False
    cached = own.parent.name == "snapshots" and real.is_relative_to(own.parents[1] / "blobs")
    return real.is_relative_to(own) or cached


def _require_no_code(config: dict[str, Any], where: str) -> None:
    for key, value in _entries(config):
        for name in value.values() if isinstance(value, dict) else [value]:
            if key in _ATTENTION_KEYS and name is not None and name not in ATTENTION:
                raise ValueError(f"{where}: {key}: expected one of {', '.join(ATTENTION)}, got {name!r:.100}")


def _entries(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every key and value of nested mappings. Their depth is limited by `parse_json`."""
    for key, value in config.items():
        yield key, value
        if isinstance(value, dict):
            yield from _entries(value)
