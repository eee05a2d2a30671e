"""Reads settings from flags, and rewrites errors about settings so that they name the flag that the user typed.

This module does not import torch, so `--help` is fast.
"""

import contextlib
import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

import tyro

from esengine.base.errors import ConfigError, RunError
from esengine.base.files import DATA
from esengine.base.prompt_files import read_prompt_file
from esengine.base.settings_file import from_dict
from esengine.cli.settings import EvalConfig, RenderConfig
from esengine.models.defaults import DEMO, defaults
from esengine.run import journal
from esengine.run.settings import TrainConfig, config_file, load, load_run, read_settings
from esengine.sampling.settings import ImageSettings


def parse_train(args: list[str]) -> TrainConfig:
    """The settings of `esengine train`. Flags override the YAML file, and the YAML file overrides the defaults.

    The YAML file is that of --config. With --resume it is the run's journal. A model may have packaged defaults.

    Raises:
        ConfigError: a file cannot be read, or a setting is unknown, of the wrong type or out of range.
    """
    source, run = _below(args)
    data = {} if source is None else _data(source, run)
    if not run and data.get("config") is not None:
        raise ConfigError(f"config {source}: config: expected no other file below this one, got {data['config']!r:.60}")
    default = TrainConfig()
    packaged = source is not None and source.parent == DATA
    of_model = defaults(_peek(args, "model") or str(data.get("model", DEMO)))
    if not run and not packaged and of_model.settings is not None:
        default = load(of_model.settings)
        if isinstance(lora := data.get("lora"), dict) and "alpha" in lora:  # it applies to all layers, as the flag does
            data = data | {"lora": {"alpha_pattern": {}} | lora}
    if source is not None:
        default = from_dict(default, data, str(source))
    if _peek(args, "lora.alpha") and not any(arg.startswith(("--lora.alpha-p", "--lora.alpha_p")) for arg in args):
        default = dataclasses.replace(default, lora=dataclasses.replace(default.lora, alpha_pattern={}))
    config = tyro.cli(TrainConfig, args=args, default=default, prog="esengine train")
    chosen = _peek(args, "es.prompts-per-step") or (data.get("es") or {}).get("prompts_per_step")
    if config.prompts is not None and (chosen is None or (source is not None and source == of_model.settings)):
        with contextlib.suppress(ConfigError):  # the run reports the error in the file
            count = len(read_prompt_file(config.prompts)["prompt"])
            per_step = min(count, config.es.prompts_per_step)
            config = dataclasses.replace(config, es=dataclasses.replace(config.es, prompts_per_step=per_step))
    return config


def _below(args: list[str]) -> tuple[Path | None, bool]:
    """The YAML file that the flags override, and whether it is a run's. With --help no file is read: (None, False)."""
    if _asks_for_help(args):
        return None, False
    config, run_dir = _peek(args, "config"), _peek(args, "run-dir")
    if config is not None:
        return config_file(config), False
    saved = Path(run_dir or ".") / journal.NAME
    return (saved, True) if run_dir and _switched_on(args, "resume") and saved.is_file() else (None, False)


def _data(source: Path, run: bool) -> dict[str, Any]:
    """The settings of a YAML file, or those that a run last started with."""
    return journal.read(source).start.settings if run else read_settings(source)


def parse(cls: type, args: list[str], prog: str) -> Any:
    """A dataclass from its flags. The defaults of image settings are those of the run in --run-dir."""
    default = cls()
    if hasattr(default, "image"):
        run_dir = None if _asks_for_help(args) else _peek(args, "run-dir")
        default = dataclasses.replace(default, image=load_run(Path(run_dir)).image if run_dir else ImageSettings())
    return tyro.cli(cls, args=args, default=default, prog=prog)


def _asks_for_help(args: list[str]) -> bool:
    return "-h" in args or "--help" in args


def _peek(args: list[str], flag: str) -> str | None:
    """The value of a flag, spelled with - or _. If it is given twice, the last one counts, as in the parser."""
    found = None
    for i, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if name.replace("_", "-") == f"--{flag}":
            found = value if equals else args[i + 1] if i + 1 < len(args) else None
    return found


def _switched_on(args: list[str], flag: str) -> bool:
    """Whether a flag without a value is on: `--flag` or `--no-flag`, whichever comes last."""
    given = [arg for arg in (each.replace("_", "-") for each in args) if arg in (f"--{flag}", f"--no-{flag}")]
    return given[-1:] == [f"--{flag}"]


def as_typed(message: str, args: list[str]) -> str:
    """Replace the setting's name at the start of an error message by what the user typed.

    That is the flag as it was typed. If it was not typed, the message names the YAML file that has the setting. If no
    file has it, the message has the flag as `--help` spells it. Other messages are returned unchanged.
    """
    head, colon, rest = message.partition(":")
    flags = {flag.removeprefix("--").replace("-", "_"): flag for flag in _flags()}
    names = head.split(" times ")
    found = [_one(name, flags) for name in names]
    if not colon or None in found:
        return message
    typed = {arg.partition("=")[0].replace("_", "-"): arg.partition("=")[0] for arg in args if arg.startswith("--")}
    conflicting = [typed[flag] for name, flag in flags.items() if "." in name and name in rest and flag in typed]
    if conflicting and not any(flags[name] in typed for name in found):  # the setting conflicts with a typed one
        return f"{conflicting[0]}: {message}"
    if not any(flags[name] in typed for name in found) and (file := _holder(found[0], args)):
        return f"{file}: {message}"
    some = any(flags[name] in typed for name in found)
    spelt = [typed.get(flags[name], name if some else flags[name]) for name in found]
    return f"{' times '.join(sorted(spelt, key=lambda each: not each.startswith('--')))}:{rest}"


def _one(name: str, flags: Collection[str]) -> str | None:
    """The setting of that name, or the only one whose last part is that name. None if there is no such one."""
    found = [each for each in flags if each == name] or [each for each in flags if each.endswith(f".{name}")]
    return found[0] if len(found) == 1 else None


def _holder(name: str, args: list[str]) -> str | None:
    """The YAML file that has a setting, as the start of an error message; None if no file has it."""
    source, run = _below(args)
    run_dir = _peek(args, "run-dir")
    if source is None and run_dir and args[:1] != ["train"]:
        source, run = Path(run_dir) / journal.NAME, True
    data = None
    with contextlib.suppress(ConfigError, RunError):
        data = source and _data(source, run)
    section, _, key = name.rpartition(".")
    data = (data or {}).get(section) if section else data
    if not isinstance(data, dict) or data.get(key) is None:
        return None
    return f"run folder {run_dir}" if run else f"config {source}"


def _flags() -> list[str]:
    """Every flag of every command, as `--help` spells it."""
    found: dict[str, None] = {}
    for config in (TrainConfig(), EvalConfig(), RenderConfig()):
        for each in dataclasses.fields(config):
            value = getattr(config, each.name)
            below = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
            names = [f"{each.name}.{inner.name}" for inner in below] or [each.name]
            found |= dict.fromkeys(f"--{name.replace('_', '-')}" for name in names)
    return list(found)
