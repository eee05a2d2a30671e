"""Settings as frozen dataclasses whose values pydantic checks. An error names the setting by its dotted name.

Nothing here imports torch, so that `--help` is fast.
"""

import dataclasses
import math
import reprlib
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, Strict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from esengine.base.errors import ConfigError

MAX_COUNT = 1 << 20
"""Upper bound of a count that takes memory, far above practical values."""
MAX_STEPS = 1 << 31


def _number(value: Any) -> Any:
    """Text that is a number, such as 1e-2 in YAML 1.1, as that number."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _positive(value: float) -> float:
    if not 0 < value < math.inf:
        raise ValueError("a positive number")
    return value


def _decay(value: float) -> float:
    if not 0 <= value < 1:
        raise ValueError("a number in [0, 1)")
    return value


def _not_empty(value: Any) -> Any:
    if value == "":
        raise ValueError("a path")  # Path("") is the current folder
    return value


Int = Annotated[int, Strict()]
Switch = Annotated[bool, Strict()]
Number = Annotated[float, Strict(), BeforeValidator(_number)]
Positive = Annotated[Number, AfterValidator(_positive)]
Decay = Annotated[Number, AfterValidator(_decay)]
Count = Annotated[Int, Field(ge=1, le=MAX_COUNT)]
Rank = Annotated[Int, Field(ge=1, le=1 << 14)]
Steps = Annotated[Int, Field(ge=1, le=MAX_STEPS)]
Interval = Annotated[Int, Field(ge=0, le=MAX_STEPS)]
"""Steps from one action to the next. 0: never."""
Seed = Annotated[Int, Field(ge=0, lt=1 << 64)]
File = Annotated[Path, BeforeValidator(_not_empty)]

_EXPECTED = {
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "dataclass_type": "a mapping of settings",
    "finite_number": "a finite number",
    "greater_than_equal": "at least {ge}",
    "less_than_equal": "at most {le}",
    "greater_than": "a number above {gt}",
    "less_than": "a number below {lt}",
    "too_short": "at least {min_length}",
    "literal_error": "one of {expected}",
    "value_error": "{error}",
}


def settings(section: str = "") -> Callable[[type], type]:
    """Make a class a frozen dataclass whose fields are checked by their types, such as `Count`.

    A value that does not fit raises ConfigError. Its `setting` is the field's name, with `section` before it.
    """

    def decorate(cls: type) -> type:
        cls = dataclass(frozen=True, config={"extra": "forbid"})(cls)
        checked = cls.__init__

        def init(self, *args, **values):
            """The fields in their order, or by name."""
            try:
                checked(self, *args, **values)
            except ValidationError as error:
                raise _config_error(error, cls, section and f"{section}.") from None

        cls.__init__ = init
        return cls

    return decorate


def check(cls: type, values: Any, source: str | None = None) -> Any:
    """The settings `cls` from a nested mapping.

    Raises:
        ConfigError: a name that is unknown, or a value that does not fit. `source` is the file that they come from.
    """
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        raise _config_error(error, cls, source=source) from None
    except ConfigError as error:  # of settings that do not fit together
        raise ConfigError(error.problem, setting=error.setting, others=error.others, source=source) from None


def merged(base: Any, *layers: dict[str, Any]) -> dict[str, Any]:
    """The settings `base` as a nested mapping, replaced by those of each layer. A later layer replaces an earlier one.

    A section, which is a dataclass in `base`, is replaced setting by setting.
    """
    values = {each.name: getattr(base, each.name) for each in dataclasses.fields(base)}
    for name in dict.fromkeys(name for layer in layers for name in layer):
        given = [layer[name] for layer in layers if name in layer]
        wrong = [each for each in given if not isinstance(each, dict)]
        if dataclasses.is_dataclass(values.get(name)):  # `check` names a section that is no mapping
            values[name] = wrong[0] if wrong else merged(values[name], *given)
        else:
            values[name] = given[-1]
    return values


def fields_of(cls: type) -> dict[str, tuple[Any, type | None]]:
    """Each setting's type as annotated, and the settings class in that type if the setting is a section."""
    return {each.name: (each.type, next(_classes(each.type), None)) for each in dataclasses.fields(cls)}


def _classes(hint: Any) -> Iterator[type]:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        yield hint
    for part in typing.get_args(hint):
        yield from _classes(part)


def _config_error(error: ValidationError, cls: type, section: str = "", source: str | None = None) -> ConfigError:
    """The first problem that pydantic found in the settings `cls`."""
    found = error.errors(include_url=False)[0]
    place = found["loc"][:-2] if found["loc"][-1:] == ("[key]",) else found["loc"]
    names = [part for part in place if isinstance(part, str)]  # without places in a list
    got, kind, facts = reprlib.repr(found["input"]), found["type"], found.get("ctx", {})
    if kind in ("unexpected_keyword_argument", "invalid_key"):
        for name in place[:-1]:
            cls = fields_of(cls)[name][1]
        known = ", ".join(each.name for each in dataclasses.fields(cls))
        problem, names = f"unknown setting; known: {known}", [str(part)[:80] for part in place]
    elif kind == "dataclass_type":
        problem = f"expected {_EXPECTED[kind]}, got {type(found['input']).__name__}"
    elif kind in _EXPECTED:
        facts = {
            name: f"{fact:g}" if isinstance(fact, float) else str(fact).replace("'", "") for name, fact in facts.items()
        }
        problem = f"expected {_EXPECTED[kind].format(**facts)}, got {got}"
    else:
        problem = f"{found['msg']}, got {got}"
    return ConfigError(problem, setting=section + ".".join(names), source=source)
