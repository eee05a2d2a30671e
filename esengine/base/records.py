"""Reads a folder's JSON files, which may be another's. An error names the file and the line.

A file is read only if it is a regular file of limited size, and does not lead out of its folder. A value has a limited
size, number of levels and number of lists and mappings. An integer has a limited number of digits.
"""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from esengine.base.errors import RunError
from esengine.base.files import read_regular, require_inside

LARGEST = 3.5e38
"""Limit of a number that is read. It is above every float32; sums and differences of such numbers are finite."""

MAX_OBJECT, MAX_LINES = 1 << 25, 1 << 28
"""Limits in bytes of one JSON value, and of a file of lines."""
DEEPEST, CONTAINERS, DIGITS = 64, 1 << 20, 1000
"""Limits of a JSON value: its levels, its lists and mappings, the digits of an integer."""


def parse_json(data: bytes | str, *, strict: bool = False) -> Any:
    """A JSON value.

    Args:
        data: the text.
        strict: refuse NaN, infinities and keys that are given twice.

    Raises:
        ValueError: it is not JSON, or beyond one of the limits.
    """
    hooks = dict(object_pairs_hook=_once, parse_constant=_no_number) if strict else {}
    if len(data) > MAX_OBJECT:
        raise ValueError(f"expected at most {MAX_OBJECT} bytes, got {len(data)}")
    try:
        found = json.loads(data, parse_int=_integer, **hooks)
    except RecursionError as error:
        raise ValueError(f"expected at most {DEEPEST} levels") from error
    _require_flat(found)
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a key that is there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("expected each key once")
    return found


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


def read_json(path: Path, folder: Path | None = None) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        path: the file.
        folder: the folder that its links may not lead out of. None: that of the file.
    """
    try:
        found = parse_json(_text(path, MAX_OBJECT, folder))
    except json.JSONDecodeError as error:
        raise RunError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from error
    except ValueError as error:
        raise RunError(f"{path}: not as esengine writes it: {str(error)[:80]}") from error
    return _object(found, str(path))


def read_lines(path: Path, parse: Callable[[dict[str, Any]], Any]) -> list[Any]:
    """Apply `parse` to each line's JSON object. A last line without a newline is still being written and is skipped.

    Args:
        path: the file.
        parse: takes a line's object. Its KeyError, TypeError or ValueError becomes a RunError that names the line.
    """
    *lines, _unfinished = _text(path, MAX_LINES).split("\n")
    found = []
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        try:
            record = parse_json(line)
        except ValueError as error:
            raise RunError(f"{where}: not JSON: {getattr(error, 'msg', None) or str(error)[:80]}") from error
        with as_written(where):
            found.append(parse(_object(record, where)))
    return found


@contextmanager
def as_written(where: str | Path) -> Iterator[None]:
    """Turn an error about a missing or wrongly typed value in a file into a RunError that names the file."""
    try:
        yield
    except KeyError as error:
        raise RunError(f"{where}: expected {error.args[0]!r:.80} in it, there is none") from error
    except (AttributeError, IndexError, OverflowError, RecursionError, TypeError, ValueError) as error:
        raise RunError(f"{where}: not as esengine writes it: {str(error)[:200]}") from error


def number(value: Any) -> float:
    """The value as a float; NaN for null and for numbers beyond float32. Raises ValueError if it is no number."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"expected a number, got {value!r:.40}")
    return float(value) if -LARGEST <= value <= LARGEST else math.nan


def whole(value: Any) -> int:
    """The value if it is an integer of at most 2^53. Raises ValueError otherwise."""
    if type(value) is not int or abs(value) > 1 << 53:
        raise ValueError(f"expected a whole number, got {value!r:.40}")
    return value


def text(value: Any) -> str:
    """The value if it is a string. Raises ValueError otherwise."""
    if not isinstance(value, str):
        raise ValueError(f"expected a text, got {value!r:.40}")
    return value


def texts(value: Any) -> list[str]:
    """The value if it is a list of strings. Raises ValueError otherwise."""
    if not isinstance(value, list):
        raise ValueError(f"expected a list of texts, got {value!r:.40}")
    return [text(item) for item in value]


def _integer(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"Exceeds the limit of {DIGITS} digits of an integer, got {len(digits)}")
    return int(digits)


def _require_flat(value: Any) -> None:
    """Raise ValueError for a value with too many levels, or too many lists and mappings. It does not recurse."""
    level, count = [value], 0
    for _ in range(DEEPEST + 1):
        level = [
            item
            for each in level
            if isinstance(each, (dict, list))
            for item in (each.values() if isinstance(each, dict) else each)
            if isinstance(item, (dict, list))
        ]
        count += len(level)
        if count > CONTAINERS:
            raise ValueError(f"expected at most {CONTAINERS} lists and mappings")
        if not level:
            return
    raise ValueError(f"expected at most {DEEPEST} levels")


def _text(path: Path, most: int, folder: Path | None = None) -> str:
    try:
        return read_regular(require_inside(folder or path.parent, path), most).decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise RunError(f"{path}, line {line}: expected UTF-8, got {error.reason}") from error
    except OSError as error:
        raise RunError(f"{path}: {error.strerror or error}") from error


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RunError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value
