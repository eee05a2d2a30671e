"""One helper makes text of others safe to show; all output and all errors of ours go through it."""

import io
import pickle
import sys

import pytest

from esengine.base import errors
from esengine.base.printable import plain, printable, shown, without_secrets
from esengine.base.progress import Bar
from esengine.cli.output import lasting_output

CODES = [
    *map(chr, (*range(9), 11, 12, *range(14, 32), *range(127, 160))),
    *"\u200e\u200f\u202a\u202e\u2066\u2069\u061c",
]


@pytest.mark.parametrize("code", [*CODES, "\u2028", "\ufeff", "\ud800", "\U000e0041"])
def test_control_codes_go(code):
    assert code not in printable(f"a{code}b")
    assert code not in str(errors.RunError(f"a{code}b"))
    error = errors.ConfigError(f"x{code}: a{code}b", source=f"config {code}")
    assert code not in str(error) + error.setting + error.problem + error.source


@pytest.mark.parametrize(
    "text", ["größe 图 é", "\U0001f469\u200d\U0001f680", "\u0645\u06cc\u200c\u062e", "1\u202f631\u00a0x", "a\n\tb"]
)
def test_text_stays(text):
    assert printable(text) == text
    assert str(errors.ConfigError(f"a: {text}")) == f"a: {text}"


def test_one_line():
    assert plain(" a\r\nb\t\x1b[31mc ") == "a b \N{REPLACEMENT CHARACTER}[31mc"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("see http://h/p?token=abc&x=1 now", "see http://h/p?... now"),
        ("'https://me:pw@h:1/p'", "'https://...@h:1/p'"),
        ("https://me:p@ss@h/p#frag", "https://...@h/p#..."),
        ("remote(url='http://h?k=v')=1", "remote(url='http://h?...')=1"),
        ("http://h/p, https://g", "http://h/p, https://g"),
        ("base@1 a?b me@here", "base@1 a?b me@here"),
    ],
)
def test_secrets_of_urls_go(text, expected):
    assert without_secrets(text) == expected
    assert shown(text) == expected
    assert str(errors.RewardError(text)) == expected


def test_errors_can_be_sent_to_another_process():
    assert str(pickle.loads(pickle.dumps(errors.RunError("a b")))) == "a b"


@pytest.mark.parametrize("code", CODES)
def test_nothing_of_the_command_line_writes_them(monkeypatch, code):
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with lasting_output():
        print(f"a{code}b http://h/?token=HUNTER2")  # noqa: T201
        Bar().note(f"a{code}b\rc http://h/?token=HUNTER2")
        sys.stderr.write(f"\ra{code}b\rc")
    assert code not in out.getvalue() + err.getvalue()
    assert "HUNTER2" not in out.getvalue() + err.getvalue()
    assert err.getvalue().endswith("\ra\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}c")  # a bar's own stays


@pytest.mark.parametrize("command", ["report", "replay", "eval", "render"])
def test_a_path_with_codes_reaches_no_terminal(esengine, command):
    name = "no\x1b]0;x\x07\u202e\x9bfolder"
    code, out, err = esengine(command, *([name] if command in ("report", "replay") else ["--run-dir", name]))
    assert code == 1
    assert "error" in err
    assert not set(out + err) & set(CODES)
