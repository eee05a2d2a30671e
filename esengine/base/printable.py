"""Text of others made safe to show: without control codes, and without the secrets of a URL."""

import re
import unicodedata

_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories that are not shown: control and format codes (C0, C1, bidi), surrogates, separators of lines."""
_JOINERS = "\u200c\u200d"
"""Format codes that scripts and emoji need."""
_USER = re.compile(r"([A-Za-z][\w+.-]*://)[^\s/?#'\"]*@")
_QUERY = re.compile(r"([A-Za-z][\w+.-]*://[^\s?#'\"]*[?#])[^\s'\"]+")


def printable(text: str, keep: str = "\n\t") -> str:
    """The text with U+FFFD in place of each control code, bidi control and surrogate. Those in `keep` stay."""
    if text.isprintable():
        return text
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) in _HIDDEN and c not in keep + _JOINERS else c
        for c in text
    )


def plain(what: object) -> str:
    """The text of anything on one line, without control codes."""
    return printable(" ".join(str(what).split()), keep="")


def without_secrets(text: str) -> str:
    """The text with "..." in place of the user and password of each URL, and of its query and fragment."""
    return _QUERY.sub(r"\1...", _USER.sub(r"\1...@", text)) if "://" in text else text


def shown(what: object) -> str:
    """`plain`, without the secrets of URLs: for a line of output."""
    return plain(without_secrets(str(what)))
