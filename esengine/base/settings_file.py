"""Reads settings from a YAML file. Only plain values are allowed, so that a file cannot expand into more than it holds.

These are rejected with their line: tags, aliases, keys given twice, deep nesting, numbers such as 1:30, and text that
no file name or prompt could hold. Numbers such as 1e-2, which YAML 1.1 reads as text, are read as numbers.
"""

import dataclasses
import reprlib
import types
import typing
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import yaml

from esengine.base.errors import ConfigError
from esengine.base.files import read_regular

MAX_BYTES = 1 << 20
_DEEPEST = 8
_DIGITS = 40

MAX_COUNT = 1 << 20
"""Upper bound of a count that takes memory, far above practical values."""
MAX_STEPS = 1 << 31


def check_counts(config: Any, section: str, **ranges: tuple[int, int]) -> None:
    """Raises ConfigError for a setting outside its range; None is allowed."""
    for name, (least, most) in ranges.items():
        value = getattr(config, name)
        if value is not None and not least <= value <= most:
            bound = f"at least {least}" if value < least else f"at most {most}"
            raise ConfigError(f"{section}{name}: expected {bound}, got {value}")


def read_yaml(path: Path) -> Any:
    """The values of a YAML file.

    Raises:
        ConfigError: the file cannot be read, or holds what this module rejects. The message has the line.
    """
    try:
        data = read_regular(path, MAX_BYTES)
        _require_plain(text := data.decode("utf-8"))
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path}: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"config {path}{where}: {getattr(error, 'problem', None) or 'not YAML'}") from error


def from_dict(base: Any, data: Any, where: str) -> Any:
    """A copy of the dataclass `base` with the settings of nested mappings.

    Raises:
        ConfigError: an unknown name, or a value of another type or out of range. It begins with `config` and `where`.
    """
    return _from_dict(base, data, where, where)


def _from_dict(base: Any, data: Any, where: str, file: str) -> Any:
    if not isinstance(data, dict):
        raise ConfigError(f"config {where}: expected a mapping of settings, got {type(data).__name__}")
    hints = typing.get_type_hints(type(base))
    names = [f.name for f in dataclasses.fields(base)]
    for name in data:
        if name not in names:
            raise ConfigError(f"config {where}: unknown setting '{name}'; known: {', '.join(names)}")
    values = {}
    for name, value in data.items():
        below, current = f"{where}: {name}", getattr(base, name)
        section = dataclasses.is_dataclass(current)
        values[name] = _from_dict(current, value, below, file) if section else _convert(hints[name], value, below)
    try:
        return dataclasses.replace(base, **values)
    except ConfigError as error:
        raise ConfigError(f"config {file}: {error}") from error


class _Loader(yaml.SafeLoader):
    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            if isinstance(node, yaml.MappingNode):
                times = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
                if twice := [key for key, count in times.items() if count > 1]:
                    raise ValueError(f"'{twice[0]}' is given twice")
            number = node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
            if number and (":" in node.value or len(node.value) > _DIGITS):
                raise ValueError(f"expected a plain number of at most {_DIGITS} digits")
            value = super().construct_object(node, deep)
            if isinstance(value, str) and ("\0" in value or any("\ud800" <= each <= "\udfff" for each in value)):
                raise ValueError("expected text without NUL or surrogates")
        except ValueError as error:
            raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from error
        return value


def _require_plain(text: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        opens = isinstance(event, yaml.CollectionStartEvent)
        depth += opens - isinstance(event, yaml.CollectionEndEvent)
        why = None
        if isinstance(event, yaml.AliasEvent):
            why = "expected values as they are, got an alias"
        elif (opens or isinstance(event, yaml.ScalarEvent)) and event.tag is not None:
            why = f"expected values without tags, got {event.tag}"
        elif depth > _DEEPEST:
            why = f"expected at most {_DEEPEST} levels"
        if why:
            raise yaml.constructor.ConstructorError(None, None, why, event.start_mark)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in options:
            return None
        (hint,) = [option for option in options if option is not type(None)]
        return _convert(hint, value, where)
    if origin is Literal:
        if value not in options:
            expected = ", ".join(map(str, options))
            raise ConfigError(f"config {where}: expected one of {expected}, got {reprlib.repr(value)}")
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(options[0], item, where) for item in value)
    if origin is dict and isinstance(value, dict):
        return {
            _convert(options[0], key, where): _convert(options[1], item, f"{where}: {key}")
            for key, item in value.items()
        }
    if hint is float and type(value) is int:
        return float(value)
    if hint is Path and isinstance(value, str) and value:
        return Path(value)
    if type(value) is not hint:
        # YAML 1.1 reads 1e-2 as text
        if hint is float and isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                pass
        expected = getattr(hint, "__name__", str(hint))
        raise ConfigError(f"config {where}: expected {expected}, got {reprlib.repr(value)}")
    return value
