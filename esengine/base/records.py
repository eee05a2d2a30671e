"""Reads a folder's JSON and YAML files. An error names the file and the line."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from esengine.base.errors import RunError

LARGEST = 3.5e38
"""Limit of a number that is read. It is above every float32; sums and differences of such numbers are finite."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object."""
    try:
        found = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise RunError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or too deep nesting
        raise RunError(f"{path}: not as esengine writes it: {str(error)[:80]}") from error
    return _object(found, str(path))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a file that holds one YAML mapping."""
    try:
        found = yaml.safe_load(_text(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise RunError(f"{path}{where}: {getattr(error, 'problem', None) or 'not YAML'}") from error
    if not isinstance(found, dict):
        raise RunError(f"{path}: expected a mapping of settings, got {type(found).__name__}")
    return found


def read_lines(path: Path, parse: Callable[[dict[str, Any]], Any]) -> list[Any]:
    """Apply `parse` to each line's JSON object. A last line without a newline is still being written and is skipped.

    Args:
        path: the file.
        parse: takes a line's object. Its KeyError, TypeError or ValueError becomes a RunError that names the line.
    """
    *lines, _unfinished = _text(path).split("\n")
    found = []
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
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
        raise RunError(f"{where}: expected {error.args[0]!r} in it, there is none") from error
    except (AttributeError, IndexError, OverflowError, TypeError, ValueError) as error:
        raise RunError(f"{where}: not as esengine writes it: {error}") from error


def number(value: Any) -> float:
    """The value as a float; NaN for null and for numbers beyond float32. Raises ValueError if it is no number."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"expected a number, got {value!r:.40}")
    return float(value) if -LARGEST <= value <= LARGEST else math.nan


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


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise RunError(f"{path}, line {line}: expected UTF-8, got {error.reason}") from error
    except OSError as error:
        raise RunError(f"{path}: {error.strerror or error}") from error


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RunError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value
