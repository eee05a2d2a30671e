"""Reads the settings of a command from its flags and files. An error names the flag as typed, or the file.

This module does not import torch, so `--help` is fast.
"""

import contextlib
import dataclasses
import io
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tyro
from pydantic.dataclasses import is_pydantic_dataclass
from typing_extensions import TypedDict

from esengine.base.errors import ConfigError, RunError
from esengine.base.files import DATA
from esengine.base.prompt_files import read_prompt_file
from esengine.base.settings import check, fields_of, merged
from esengine.cli.help import Shown
from esengine.cli.settings import EnvConfig, EvalConfig, JudgeConfig, RenderConfig, ReportConfig
from esengine.models.defaults import DEMO, defaults
from esengine.run import journal
from esengine.run.settings import ReplayConfig, TrainConfig, config_file, load, load_run, read_settings, to_dict
from esengine.sampling.settings import ImageSettings

COMMANDS = {
    "train": TrainConfig,
    "eval": EvalConfig,
    "render": RenderConfig,
    "judge": JudgeConfig,
    "report": ReportConfig,
    "replay": ReplayConfig,
    "env": EnvConfig,
}


_REGISTRY = tyro.constructors.ConstructorRegistry()


@_REGISTRY.primitive_rule
def _one_value(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """Reads text, a path or a number that may be None. An error then shows no annotations, and no value is empty."""
    union = typing.get_args(info.type) if typing.get_origin(info.type) in (typing.Union, types.UnionType) else ()
    kinds = [each.__origin__ if typing.get_origin(each) is typing.Annotated else each for each in union or (info.type,)]
    (kind, *more) = [each for each in kinds if each is not types.NoneType] or [None]
    if kind not in (str, Path, int, float) or more:
        return None

    def read(words: list[str]) -> Any:
        if not words[0]:
            raise ValueError("expected a value, got an empty one")
        return None if union and words[0] == "None" else kind(words[0])

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{'{None}|' if union else ''}{kind.__name__.upper()}",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, kind) or (bool(union) and value is None),
        str_from_instance=lambda value: [str(value)],
    )


def settings_of(command: str, args: list[str]) -> contextlib.AbstractContextManager[Any]:
    """The settings of a command by its name: see `train_settings` and `command_settings`."""
    prog = f"esengine {command}"
    return train_settings(args) if command == "train" else command_settings(COMMANDS[command], args, prog)


@contextlib.contextmanager
def train_settings(args: list[str]) -> Iterator[TrainConfig]:
    """The settings of `esengine train`. Flags override the YAML file, and the YAML file overrides the defaults.

    The YAML file is that of --config. With --resume it is the run's journal. A model may have packaged defaults.

    Raises:
        ConfigError: a file cannot be read, or a setting is unknown, of the wrong type or out of range. This one and
            those raised inside the `with` block name the flag as typed, or the file that has the setting.
    """
    given, files = _given(TrainConfig, args, "esengine train"), []
    with _naming(TrainConfig, args, given, files):
        source, run = _file(given)
        if source is not None:
            files.append((f"run folder {given['run_dir']}" if run else f"config {source}", _data(source, run)))
        data = files[0][1] if files else {}
        if not run and data.get("config") is not None:
            problem = f"expected no other file below this one, got {data['config']!r:.60}"
            raise ConfigError(problem, setting="config", source=files[0][0])
        packaged = defaults(str(given.get("model", data.get("model", DEMO)))).settings
        below = run or packaged is None or (source is not None and source.parent == DATA)
        layers = [{} if below else read_settings(packaged), data, given]
        config = check(TrainConfig, merged(TrainConfig(), *map(_of_all_layers, layers)))
        chosen = [given] if source is not None and source == packaged else [data, given]
        yield config if any(_holds(each, "es.prompts_per_step") for each in chosen) else _fitted(config)


@contextlib.contextmanager
def command_settings(cls: type, args: list[str], prog: str) -> Iterator[Any]:
    """The settings of another command. The defaults of image settings are those of the run in --run-dir.

    Raises:
        ConfigError: as `train_settings`.
    """
    if not is_pydantic_dataclass(cls):  # few flags, whose types say all
        yield tyro.cli(cls, args=args, registry=_REGISTRY, prog=prog)
        return
    given, files = _given(cls, args, prog), []
    with _naming(cls, args, given, files):
        run = TrainConfig()
        if given.get("run_dir") is not None:
            run = load_run(given["run_dir"])
            files.append((f"run folder {given['run_dir']}", to_dict(run)))
        yield check(cls, merged(cls(**_image_of(cls, run)), given))


def parse_train(args: list[str]) -> TrainConfig:
    """As `train_settings`, without a `with` block."""
    with train_settings(args) as config:
        return config


def shown(command: str, args: list[str]) -> Shown:
    """The values that help shows as defaults: those of the model and the files that the arguments name.

    Help answers whatever the arguments are. A file that cannot be used is left out, and a note says why.
    """
    cls = COMMANDS[command]
    names = [name for name in ("model", "revision", "config", "run_dir", "resume") if name in fields_of(cls)]
    if "image" not in fields_of(cls):
        return Shown(cls)
    given: dict[str, Any] = {}
    for name in names:  # one by one, so that a wrong flag does not hide the others
        named = TypedDict("Named", {name: fields_of(cls)[name][0]}, total=False)
        with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
            given |= tyro.cli(named, args=args, registry=_REGISTRY, add_help=False, return_unknown_args=True)[0]
    notes = []
    for known in (names, ["model"], []):
        flags = [f"--{name.replace('_', '-')}={given[name]}" for name in known if given.get(name) and name != "resume"]
        flags += ["--resume"] if given.get("resume") and "resume" in known else []
        try:
            if cls is TrainConfig:
                settings = parse_train(flags)
                return Shown(cls, settings, settings.model, settings.revision, tuple(notes))
            run = load_run(given["run_dir"]) if given.get("run_dir") and "run_dir" in known else TrainConfig()
            return Shown(
                cls, cls(image=run.image), given.get("model") or run.model, given.get("revision"), tuple(notes)
            )
        except (ConfigError, RunError) as error:
            notes.append(str(error))
    raise AssertionError("the packaged defaults are settings")


def _data(source: Path, run: bool) -> dict[str, Any]:
    """The settings of a YAML file, or those that a run last started with."""
    return journal.read(source, needed=0).start.settings if run else read_settings(source)


def parse(cls: type, args: list[str], prog: str) -> Any:
    """As `command_settings`, without a `with` block."""
    with command_settings(cls, args, prog) as config:
        return config


def _given(cls: type, args: list[str], prog: str) -> dict[str, Any]:
    """The settings that flags give, as a nested mapping. Ends the process after a wrong flag."""
    given: dict[str, Any] = {}
    with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):  # the parser below says why
        given, _ = tyro.cli(_partial(cls), args=args, registry=_REGISTRY, add_help=False, return_unknown_args=True)
    with contextlib.suppress(ConfigError):  # files may complete these settings, so they are checked together later
        tyro.cli(cls, args=args, registry=_REGISTRY, default=_usual(cls, given), prog=prog)
    return given


def _usual(cls: type, given: dict[str, Any]) -> Any:
    """The defaults that an error shows beside a flag. Those of `train` depend on the model."""
    packaged = defaults(given.get("model", DEMO)).settings if cls is TrainConfig else None
    return load(packaged) if packaged else cls(**_image_of(cls, TrainConfig()))


def _image_of(cls: type, run: TrainConfig) -> dict[str, ImageSettings]:
    """The run's image settings, if the command has such settings."""
    return {"image": run.image} if "image" in fields_of(cls) else {}


def _partial(cls: type) -> type:
    """The settings of a dataclass as a mapping type. tyro leaves out what no flag gives."""
    hints = {name: _partial(section) if section else hint for name, (hint, section) in fields_of(cls).items()}
    return TypedDict(cls.__name__, hints, total=False)


def _file(given: dict[str, Any]) -> tuple[Path | None, bool]:
    """The file that the flags override, and whether it is a run's journal."""
    if given.get("config") is not None:
        return config_file(given["config"]), False
    if given.get("resume") and given.get("run_dir") is not None:
        saved = given["run_dir"] / journal.NAME
        return (saved, True) if saved.is_file() else (None, False)
    return None, False


def _of_all_layers(data: dict[str, Any]) -> dict[str, Any]:
    """An alpha without an alpha_pattern beside it is that of all layers."""
    lora = data.get("lora")
    if not isinstance(lora, dict) or "alpha" not in lora:
        return data
    return data | {"lora": {"alpha_pattern": {}} | lora}


def _fitted(config: TrainConfig) -> TrainConfig:
    """The settings with at most as many prompts per step as there are prompts in the user's file."""
    if config.prompts is None:
        return config
    with contextlib.suppress(ConfigError):  # the run reports the error in the file
        count = len(read_prompt_file(config.prompts)["prompt"])
        per_step = min(count, config.es.prompts_per_step)
        return dataclasses.replace(config, es=dataclasses.replace(config.es, prompts_per_step=per_step))
    return config


@contextlib.contextmanager
def _naming(cls: type, args: list[str], given: dict[str, Any], files: list[tuple[str, dict]]) -> Iterator[None]:
    """Replace the setting's name in a ConfigError by the flag as typed, or add the file that has the setting.

    If neither a flag nor a file gives the setting, the error names its flag as --help spells it. `files` are names for
    messages and nested mappings.
    """
    try:
        yield
    except ConfigError as error:
        if error.source is not None:
            raise
        flags = _settings(cls)
        names = [_known(name, flags) or name for name in (error.setting, *error.others)]
        typed = [name for name in names if _holds(given, name)]
        held = [(source, name) for source, data in files for name in names if _holds(data, name)]
        if held and not typed:
            raise ConfigError(error.problem, setting=held[0][1], source=held[0][0]) from error
        if not typed and names[0] not in flags:
            raise
        raise ConfigError(error.problem, setting=_spelt([*typed, *names][0], args)) from error


def _settings(cls: type) -> list[str]:
    """The dotted names of all settings of a command."""
    sections = [(name, _settings(below) if below else [""]) for name, (_, below) in fields_of(cls).items()]
    return [f"{name}.{each}" if each else name for name, inner in sections for each in inner]


def _known(name: str, known: Sequence[str]) -> str | None:
    """The setting of that name, or that the name is a part of; or the only one that ends in the name."""
    found = [each for each in known if f"{name}.".startswith(f"{each}.")]
    found = found or [each for each in known if each.endswith(f".{name}")]
    return found[0] if len(found) == 1 else None


def _holds(data: dict[str, Any], name: str) -> bool:
    """Whether a nested mapping has a setting."""
    head, _, rest = name.partition(".")
    if head not in data:
        return False
    if not rest:
        return data[head] != {}  # a section without a flag
    return not isinstance(data[head], dict) or _holds(data[head], rest)


def _spelt(name: str, args: list[str]) -> str:
    """The flag of a setting as it was typed last; if it was not typed, as --help has it."""
    flag = f"--{name.replace('_', '-')}"
    for arg in reversed(args):
        typed = arg.partition("=")[0]
        if typed.replace("_", "-").replace("--no-", "--").replace(".no-", ".") == flag:
            return typed
    return flag
