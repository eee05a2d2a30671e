"""Parses the text form of rewards: "pickscore(model=weights/pickscore,dtype=bfloat16)=1.0,clip_text=0".

    rewards = reward {"," reward}
    reward  = name ["(" [option {"," option}] ")"] ["=" weight]
    option  = key "=" value

A value is a number, true or false, or text. Text with a comma, a bracket or outer spaces needs quotes.

"combined(a=1,b=0.5,device=cpu)=2" means "a=2,b=1". Each reward that takes a device gets cpu.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from esengine.base.errors import ConfigError
from esengine.base.printable import without_secrets

ADVICE = (
    "a token comes from the environment: set a variable, and give remote its name as token_env=NAME, or read the "
    "variable in your own reward"
)
"""What to do with a secret in a reward's options."""

COMBINED = "combined"
"""Name of the weighted sum of all rewards. In a spec it names a group of rewards."""

_NAME = re.compile(r"[^\s(),='\"]+")
_VALUE = re.compile(r"'[^']*'|\"[^\"]*\"|[^,()'\"]+")
_PLAIN = re.compile(r"[^,()'\"\s](?:[^,()'\"]*[^,()'\"\s])?")
_INT = re.compile(r"[+-]?\d+")
_FLOAT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


OPTIMISED, WATCHED = "optimised", "watched"


@dataclass(frozen=True)
class Term:
    """One reward of a run or an evaluation.

    Attributes:
        name: a built-in reward, or the user's own as module:attr.
        options: keyword arguments of the reward.
        weight: its weight in the sum. With 0 it is only measured.
        device: device of the group it was written in. Used if the reward takes a device and `options` has none.
        role: `optimised` if it scores the population, `watched` if it scores held-out prompts only.
        optional: whether it is left out if it cannot be loaded, or if an optimised reward is the same.
        reward: the loaded reward; None before it is loaded.
    """

    name: str
    options: dict[str, int | float | bool | str] = field(default_factory=dict)
    weight: float = 1.0
    device: str | None = None
    role: Literal["optimised", "watched"] = OPTIMISED
    optional: bool = False
    reward: Callable[..., Any] | None = None

    def text(self) -> str:
        """The name and the options in the grammar above, without weight and group."""
        options = ",".join(f"{key}={_quoted(value)}" for key, value in self.options.items())
        return f"{self.name}({options})" if options else self.name


def read(spec: str) -> list[Term]:
    """Parse a text of the grammar above without loading anything. A group is replaced by its rewards.

    Raises:
        ConfigError: the text does not fit the grammar (the message gives the position, from 1, and what was expected);
            or a group has no reward, or a weight that is not a number.
    """
    found = []
    for term in _Reader(spec).terms():
        found += group(term.options, term.weight) if term.name == COMBINED else [term]
    return found


def group(options: Mapping[str, Any], weight: float = 1.0) -> list[Term]:
    """The rewards of a group. `options` maps each reward's name to its weight, and may have a `device` for them.

    Raises:
        ConfigError: no reward, a weight that is not a number, or a device that is not text.
    """
    device = options.get("device")
    if device is not None and not isinstance(device, str):
        raise ConfigError(f"reward {COMBINED}: expected text as the device, such as cpu or cuda:1, got {device!r}")
    weights = {name: each for name, each in options.items() if name != "device"}
    if not weights:
        raise ConfigError(
            f"reward {COMBINED}: expected at least one reward and its weight, as {COMBINED}(a=1,b=0.5), got none"
        )
    for name, each in weights.items():
        if isinstance(each, bool) or not isinstance(each, int | float):
            raise ConfigError(f"reward {COMBINED}: expected a number as the weight of {name}, got {each!r}")
    return [Term(name, {}, weight * each, device) for name, each in weights.items()]


def require_no_secrets(terms: Sequence[Term]) -> None:
    """Check options that are to be written into files.

    Raises:
        ConfigError: a URL among them has a user, password, query or fragment, which may be a secret.
    """
    for term in terms:
        for key, value in term.options.items():
            if isinstance(value, str) and without_secrets(value) != value:
                problem = f"expected a URL without user, password, query or fragment as {key}, because a run writes it"
                raise ConfigError(f"reward {term.name}: {problem} into its files, got {value!r}; {ADVICE}")


class _Reader:
    def __init__(self, spec: str):
        self.spec, self.at = spec, 0
        self._skip_spaces()

    def terms(self) -> list[Term]:
        terms = [self._term()]
        while self._take(","):
            terms.append(self._term())
        if self.at < len(self.spec):
            raise self._expected("a comma between rewards" if self.spec[self.at - 1] == ")" else "a comma")
        return terms

    def _term(self) -> Term:
        name = self._match(_NAME, "a reward's name between commas")
        options = self._options(name) if self._take("(") else {}
        weight = self._weight(name) if self._take("=") else 1.0
        return Term(name, options, weight)

    def _options(self, name: str) -> dict[str, int | float | bool | str]:
        options: dict[str, int | float | bool | str] = {}
        if self._take(")"):
            return options
        while True:
            start = self.at
            key = self._match(_NAME, f"an option of {name}, as key=value")
            if key in options:
                raise self._error(f"option {key} of {name} is given twice", start)
            if not self._take("="):
                raise self._expected(f"= after option {key} of {name}")
            options[key] = _value(self._match(_VALUE, f"a value for option {key} of {name}").strip())
            if self._take(")"):
                return options
            if not self._take(","):
                raise self._expected(f"a comma or ) after option {key} of {name}")

    def _weight(self, name: str) -> float:
        start = self.at
        text = self.spec[start : self.spec.find(",", start) if "," in self.spec[start:] else None].rstrip()
        try:
            weight = float("" if "_" in text else text)
        except ValueError:
            raise self._error(f"expected a number for its weight, got {text!r}", start, name) from None
        self.at = start + len(text)
        self._skip_spaces()
        return weight

    def _match(self, pattern: re.Pattern, what: str) -> str:
        found = pattern.match(self.spec, self.at)
        if not found or not found[0].strip():
            raise self._expected(what)
        self.at = found.end()
        self._skip_spaces()
        return found[0]

    def _take(self, sign: str) -> bool:
        if not self.spec.startswith(sign, self.at):
            return False
        self.at += 1
        self._skip_spaces()
        return True

    def _skip_spaces(self) -> None:
        while self.at < len(self.spec) and self.spec[self.at].isspace():
            self.at += 1

    def _expected(self, what: str) -> ConfigError:
        got = repr(self.spec[self.at]) if self.at < len(self.spec) else "the end"
        return self._error(f"expected {what}, got {got}", self.at)

    def _error(self, what: str, at: int, name: str = "") -> ConfigError:
        spec = re.sub(r"[^\s'\"()=,]+@", "...@", self.spec)  # what may be a user and a password
        return ConfigError(f"{f'reward {name}' if name else 'rewards'}: {what} at position {at + 1} of {spec!r}")


def _value(text: str) -> int | float | bool | str:
    if text[0] in "'\"":
        return text[1:-1]
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if _INT.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def _quoted(value: int | float | bool | str) -> str:
    """The text that `_value` reads as this value."""
    if isinstance(value, str) and (_value(value or "''") != value or not _PLAIN.fullmatch(value)):
        return f'"{value}"' if "'" in value else f"'{value}'"
    return str(value)
