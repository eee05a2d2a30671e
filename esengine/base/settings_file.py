"""Reads settings from a YAML file. Only plain values are allowed, so that a file cannot expand into more than it holds.

These are rejected with their line: tags, aliases, keys given twice, deep nesting, thousands of values, numbers such as
1:30, and text that no file name or prompt could hold. Numbers such as 1e-2, which YAML 1.1 reads as text, are read as
numbers.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from esengine.base.errors import ConfigError
from esengine.base.files import read_regular
from esengine.base.settings import check, merged

MAX_BYTES = 1 << 20
_DEEPEST = 8
_DIGITS = 40
_SURROGATE = re.compile("[\ud800-\udc7f\udd00-\udfff]")
"""Half a character. The others, U+DC80 to U+DCFF, are bytes of a file name that is not UTF-8."""
_MOST = 10_000
"""Values in a file. YAML is read slowly."""


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
        problem = getattr(error, "strerror", None) or str(error)
        raise ConfigError(problem, setting="", source=f"config {path}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise ConfigError(problem, setting="", source=f"config {path}{where}") from error


def from_dict(base: Any, data: Any, where: str) -> Any:
    """A copy of the dataclass `base` with the settings of nested mappings.

    Raises:
        ConfigError: an unknown name, or a value of another type or out of range. Its `source` is `config` and `where`.
    """
    source = f"config {where}"
    return check(type(base), merged(base, data) if isinstance(data, dict) else data, source)


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
            if isinstance(value, str) and ("\0" in value or _SURROGATE.search(value)):
                raise ValueError("expected text without NUL or surrogates")
        except ValueError as error:
            raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from error
        return value


def _require_plain(text: str) -> None:
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        opens = isinstance(event, yaml.CollectionStartEvent)
        depth += opens - isinstance(event, yaml.CollectionEndEvent)
        why = None
        if isinstance(event, yaml.AliasEvent):
            why = "expected values as they are, got an alias"
        elif (opens or isinstance(event, yaml.ScalarEvent)) and event.tag is not None:
            why = f"expected values without tags, got {event.tag}"
        elif depth > _DEEPEST:
            why = f"expected at most {_DEEPEST} levels"
        elif count > _MOST:
            why = f"expected at most {_MOST} values"
        if why:
            raise yaml.constructor.ConstructorError(None, None, why, event.start_mark)
