"""Numbers and settings formatted for people."""

import json
import math
import re
from typing import Any

from markupsafe import Markup

from esengine.base.printable import without_secrets

MINUS, NONE, TIMES = "\N{MINUS SIGN}", "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"


def figure(value: float | None) -> str:
    """A score: four decimals, a typographic minus sign, a dash if it is None or not finite."""
    return _number(value, ".4f")


def signed(value: float | None) -> str:
    """A difference: four decimals, always with a sign."""
    return _number(value, "+.4f")


def short(value: float | None) -> str:
    """Four significant digits."""
    return _number(value, ".4g")


def percent(value: float | None) -> str:
    """A fraction in whole percent."""
    return _number(value, ".0%")


def count(number: int, noun: str) -> str:
    """`1 prompt`, `1 631 prompts`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def duration(seconds: float) -> str:
    """`2 h 05 min`, `3 min 20 s`, `4.2 s`."""
    if seconds < 59.5:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def size(count: float) -> str:
    """Bytes as `512 B`, `3.4 MiB`, `1.2 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def plain(value: Any) -> str:
    """A setting's value as text."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value)) or NONE
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)


def breakable(name: str) -> Markup:
    """A name in which a line may break after _ . and /."""
    return Markup("<wbr>").join(re.findall(r"[^_./]*[_./]|[^_./]+", without_secrets(name)))


def tick(value: float, decimals: int) -> str:
    """A label of an axis tick."""
    if value == 0:
        return "0"
    return _number(value, ".1e" if decimals > 5 else ".3g" if abs(value) >= 1e6 else f".{decimals}f")


def _number(value: float | None, form: str) -> str:
    return NONE if value is None or not math.isfinite(value) else f"{value:{form}}".replace("-", MINUS)
