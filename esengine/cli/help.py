"""Help in two levels: --help is one screen of a command, --help-all is every flag with its default.

tyro reads the flags. Here they are only described, and argparse lays the text out by the width of the terminal. This
module does not import torch, so that help is fast.
"""

import argparse
import ast
import dataclasses
import functools
import inspect
import itertools
import json
import re
import shutil
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from esengine.base.errors import ConfigError
from esengine.base.settings import fields_of
from esengine.cli.help_pages import PAGES, Page
from esengine.models.defaults import DEMO, defaults
from esengine.models.families import FAMILIES, TINY, Family, family_of
from esengine.run.settings import TrainConfig
from esengine.sampling.settings import ImageSettings

Level = Literal["short", "all"]


def asked(args: list[str]) -> Level | None:
    """Which help the arguments ask for, if any. What stands after `--` is no flag."""
    flags = {arg.replace("_", "-") for arg in args[: args.index("--") if "--" in args else None]}
    if "--help-all" in flags:
        return "all"
    return "short" if flags & {"-h", "--help"} else None


@dataclass(frozen=True)
class Shown:
    """The settings whose values help shows as defaults.

    Attributes:
        cls: the class of the command's settings.
        settings: the settings without the flags of this call; None for a command that has no such defaults.
        model: the model whose defaults they are; None for a command without models.
        revision: branch, tag or commit of a hub id.
        notes: what could not be read, one line each.
    """

    cls: type
    settings: Any = None
    model: str | None = None
    revision: str | None = None
    notes: tuple[str, ...] = ()


def help_text(command: str, level: Level, shown: Shown) -> str:
    """The help of a command.

    Args:
        command: one of `PAGES`.
        level: `short` for one screen of 24 lines of 100 characters, `all` for every flag.
        shown: the values to show as defaults.

    Returns:
        Lines as wide as the terminal, or as COLUMNS says; 100 if neither is known.
    """
    page, width, everything = PAGES[command], max(40, shutil.get_terminal_size((100, 24)).columns), level == "all"
    values, notes = _values(shown)
    positional = next((name for name, (hint, _) in fields_of(shown.cls).items() if _is_positional(hint)), None)
    parser = argparse.ArgumentParser(
        usage=" ".join(["esengine", command, *([_usage_of(positional, shown.cls)] if positional else []), "[flags]"]),
        formatter_class=lambda prog: _Layout(prog, max_help_position=min(30, width // 3), width=width),
        add_help=False,
    )
    about = inspect.cleandoc(shown.cls.__doc__)
    parser.description = _wrapped(about if everything else about.partition("\n\n")[0], width)
    rest = _defaults_of(shown, notes) if everything else [f"All flags: esengine {command} --help-all"]
    sources = "\n".join(_wrapped(each, width) for each in (page.sources, *rest))
    parser.epilog = f"{_examples(page.examples, width)}\n\n{sources}"
    shorts = [("arguments" if positional else "flags", None, page.flags)]
    for title, about, names in _groups(page, shown.cls) if everything else shorts:
        group = parser.add_argument_group(title, about and _wrapped(about, width - 2))
        for name in names:
            _describe(group, name, shown.cls, values.get(name), None if everything else width)
    return "".join(f"{line.rstrip()}\n" for line in parser.format_help().splitlines())


class _Layout(argparse.RawDescriptionHelpFormatter):
    """As argparse lays text out, but no word is broken at its hyphen, because flags and names have some."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return _wrapped(" ".join(text.split()), width).splitlines()


def _defaults_of(shown: Shown, notes: Iterable[str]) -> list[str]:
    """On which model's defaults a page shows, and what could not be read."""
    of_model = [] if shown.model is None else [f"The defaults above are those of the model {shown.model}."]
    return of_model + [f"Note: {note}" for note in notes]


def _examples(examples: Iterable[tuple[str, str]], width: int) -> str:
    """Commands in a column and what they do in another; what does not fit is on a line of its own."""
    column = max(len(command) for command, _ in examples)
    lines = ["examples:"]
    for command, what in examples:
        line = f"  {command:{column}}  {what}"
        if len(line) <= width:
            lines.append(line)
        else:
            words = textwrap.wrap(command, width - 6, break_long_words=False, break_on_hyphens=False)
            lines += [f"  # {what}", "  " + " \\\n      ".join(words)]
    return "\n".join(lines)


def _groups(page: Page, cls: type) -> Iterator[tuple[str, str | None, list[str]]]:
    """Titles, descriptions and dotted names of all settings: first the page's groups, then the sections."""
    known = {each for names in page.groups.values() for each in names}
    plain = [name for name, (_, section) in fields_of(cls).items() if section is None]
    for title, names in page.groups.items():
        yield title, None, [name for name in names if name in plain]
    if others := [name for name in plain if name not in known]:
        yield ("others" if known else "arguments"), None, others
    for name, (_, section) in fields_of(cls).items():
        if section is not None:
            yield name, inspect.cleandoc(section.__doc__), [f"{name}.{each}" for each in fields_of(section)]


def _describe(group: Any, name: str, cls: type, value: Any, one_line: int | None = None) -> None:
    """Add a setting to a group: its flag, what its docstring says, and its default.

    With `one_line`, which is the width of the page, only the first sentence, and the default if it fits beside that.
    """
    *sections, last = name.split(".")
    for section in sections:
        cls = fields_of(cls)[section][1]
    about = field_docs(cls).get(last, "")
    hint = fields_of(cls)[last][0]
    default = _text(value)
    default = f" (default: {default})" if default else ""
    if one_line:
        about = re.match(r".*?[.](?=\s|$)|.*", about)[0]
        default = default if 28 + len(about) + len(default) <= one_line else ""
    about = (about + default).replace("%", "%%")
    flag = f"--{name}".replace("_", "-")
    if _is_positional(hint):
        group.add_argument(last, metavar=_metavar(last, cls), help=about, nargs="?")
    elif _kind(hint) is bool:
        off = f"--{'.'.join([*sections, 'no-' + last])}".replace("_", "-")
        group.add_argument(*((flag,) if one_line else (flag, off)), action="store_true", help=about)
    else:
        group.add_argument(flag, metavar=_metavar(last, cls), help=about)


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """The docstring below each field of a dataclass and of the classes that it extends, on one line, by field."""
    found = {}
    for each in reversed(cls.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(each))).body[0].body
        for line, below in itertools.pairwise(body):
            if isinstance(line, ast.AnnAssign) and isinstance(below, ast.Expr):
                found[line.target.id] = " ".join(ast.literal_eval(below.value).split())
    return found


def _is_positional(hint: Any) -> bool:
    return tyro.conf.Positional in getattr(hint, "__metadata__", ())


def _kind(hint: Any) -> Any:
    """A type without its annotations and without None."""
    while typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return _kind(next(each for each in typing.get_args(hint) if each is not types.NoneType))
    return hint


def _metavar(name: str, cls: type) -> str:
    """What stands for a setting's value, such as PATH or {a,b}."""
    hint = fields_of(cls)[name][0]
    for each in getattr(hint, "__metadata__", ()):
        if isinstance(each, tyro.constructors.PrimitiveConstructorSpec):
            return each.metavar
    if _is_positional(hint):
        several = typing.get_origin(_kind(hint)) is tuple
        return name.upper().rstrip("S") + (" ..." if several else "")
    return _value_name(_kind(hint))


def _usage_of(name: str, cls: type) -> str:
    """A positional argument of the usage line, in brackets if it has a default."""
    each = next(each for each in dataclasses.fields(cls) if each.name == name)
    needed = each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
    return _metavar(name, cls) if needed else f"[{_metavar(name, cls)}]"


def _value_name(kind: Any) -> str:
    parts = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return "{" + ",".join(map(str, parts)) + "}"
    if typing.get_origin(kind) is tuple:
        return f"[{_value_name(_kind(parts[0]))} ...]"
    return {str: "TEXT", Path: "PATH"}.get(kind, kind.__name__.upper())


def _text(value: Any) -> str:
    """A default as one would type it; empty for none and for a switch that is off."""
    if isinstance(value, dict):
        return " ".join(f"{name} {each:g}" for name, each in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    if isinstance(value, bool):
        return "on" if value else ""
    return "" if value is None else str(value)


def _values(shown: Shown) -> tuple[dict[str, Any], list[str]]:
    """The defaults by dotted name, with those of the model's family and packaged files in place of None; and notes."""
    values, notes = dict(_flat(shown.settings or shown.cls)), list(shown.notes)
    for name in ("run_dir", "config", "resume", "revision"):  # of this call
        values.pop(name, None)
    if shown.model is None:
        return values, notes
    of_model = defaults(shown.model)
    heldout = f"{of_model.heldout.name} of this package"
    more: dict[str, Any] = {"prompts_file": heldout}
    if shown.cls is TrainConfig:
        more |= {
            "prompts": f"{of_model.train.name} of this package",
            "eval_prompts": heldout,
            "reward": of_model.reward,
        }
    try:
        family = family_of_name(shown.model, shown.revision)
    except ConfigError as error:
        family = None
        notes.append(str(error))
    if family is not None:
        image = family.resolve(ImageSettings())
        more |= {"image.num_steps": image.num_steps, "image.guidance_scale": image.guidance_scale}
        more["lora.targets"] = family.targets
    return values | {name: each for name, each in more.items() if name in values and values[name] is None}, notes


def _flat(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of settings by dotted name. Of a class, its fields' defaults."""
    for each in dataclasses.fields(settings):
        value = getattr(settings, each.name, None)
        if dataclasses.is_dataclass(value):
            yield from _flat(value, f"{prefix}{each.name}.")
        else:
            yield f"{prefix}{each.name}", value


def family_of_name(model: str, revision: str | None = None) -> Family | None:
    """The family of a model named as for --model, as far as it is known without downloading anything.

    Returns:
        The family; None for a hub id that is not in the cache.

    Raises:
        ConfigError: there is no such tiny model, or the folder is of no family.
    """
    if model in (DEMO, "tiny"):
        return FAMILIES["sana-sprint"]
    if model.startswith("tiny:"):
        if (name := model.removeprefix("tiny:")) not in TINY:
            raise ConfigError(f"model: expected tiny:FAMILY with one of {', '.join(TINY)}, got '{model:.100}'")
        return FAMILIES[name]
    index = Path(model).expanduser() / "model_index.json"
    try:
        if not index.parent.is_dir():
            from huggingface_hub import try_to_load_from_cache

            cached = try_to_load_from_cache(model, index.name, revision=revision)
            if not isinstance(cached, str):
                return None
            index = Path(cached)
        return family_of(json.loads(index.read_text(encoding="utf-8")))
    except (OSError, ValueError, ConfigError) as error:
        raise ConfigError(f"model: cannot use {model:.200}: {error}") from error


def _wrapped(text: str, width: int) -> str:
    """Paragraphs of lines that are at most `width` long."""
    parts = [textwrap.wrap(each, width, break_long_words=False, break_on_hyphens=False) for each in text.split("\n\n")]
    return "\n\n".join("\n".join(lines) for lines in parts)
