"""Launch settings are data: one JSON file for each device. Every result names its file and the order of sums.

    {"made": {"command": .., "device": .., "arch": .., ..}, "ops": {op: [{"when": {..}, "launch": {..}}, ..]}}

An entry may also have `measured`, a record of a measurement.

A launch takes the first entry of its op whose `when` is true. `when` maps a name to a value, or to [least, most],
where null is no bound. The last entry has an empty `when`. No condition depends on the batch: settings set the order in
which a row is summed, and that order must not depend on the other rows of the batch.

A file may also choose between paths to the same result, {"paths": {op: [{"when": {..}, "path": name}, ..]}}. Again the
first true entry counts. Without one the default path is taken.

The environment variable ESENGINE_KERNEL_CONFIGS can name the file. Otherwise it is `configs/<device>.json`, which
`bench/tune.py` writes, or that of the device's architecture, such as `configs/sm_90.json`, or `configs/default.json`.
"""

import functools
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

FOLDER = Path(__file__).with_name("configs")
DEFAULT = FOLDER / "default.json"
OVERRIDE = "ESENGINE_KERNEL_CONFIGS"

_log = logging.getLogger(__name__)


class Op(NamedTuple):
    """The names that a file may use for one kernel.

    Attributes:
        conditions: names that `when` may use. The launcher gives a value for each.
        settings: names that `launch` must have, all of them and no others.
        order: the settings that can change the order of a sum, and so the last bits of a result.
    """

    conditions: tuple[str, ...]
    settings: tuple[str, ...]
    order: tuple[str, ...]


OPS = {
    "fused_linear": Op(
        ("dtype", "t", "k", "n", "columns", "residual", "gated"),
        ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M", "num_warps", "num_stages"),
        ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps"),
    ),
    "shrink": Op(
        ("dtype", "t", "k", "columns", "modulated"),
        ("BLOCK_T", "BLOCK_K", "num_warps", "num_stages"),
        ("BLOCK_T", "BLOCK_K", "num_warps"),
    ),
    "low_rank_part": Op(
        ("dtype", "t", "k", "columns"),
        ("BLOCK_T", "BLOCK_K", "BLOCK_N", "num_warps", "num_stages"),
        ("BLOCK_T", "BLOCK_K", "num_warps"),
    ),
    "mix": Op(("t", "columns"), ("BLOCK_T", "num_warps", "num_stages"), ("BLOCK_T", "num_warps")),
    "linear_attention": Op(("dtype", "t", "d"), ("BLOCK_T", "num_warps", "num_stages"), ("BLOCK_T", "num_warps")),
    "linear_attention_low": Op(
        ("dtype", "t", "d", "columns"), ("BLOCK_T", "num_warps", "num_stages"), ("BLOCK_T", "num_warps")
    ),
    "linear_attention_rstd": Op(
        ("dtype", "c"), ("BLOCK_M", "BLOCK_C", "num_warps", "num_stages"), ("BLOCK_M", "BLOCK_C", "num_warps")
    ),
    "residual_norm": Op(
        ("dtype", "t", "n", "columns", "next_columns"),
        ("BLOCK_T", "BLOCK_N", "num_warps", "num_stages"),
        ("BLOCK_T", "BLOCK_N", "num_warps"),
    ),
    "rms_norm": Op(
        ("dtype", "t", "n", "columns"),
        ("BLOCK_T", "BLOCK_N", "num_warps", "num_stages"),
        ("BLOCK_T", "BLOCK_N", "num_warps"),
    ),
    "depthwise_gate": Op(
        ("dtype", "height", "width", "channels"),
        ("STRIP", "UNROLL", "BLOCK_W", "BLOCK_C", "num_warps", "num_stages"),
        (),
    ),
    "es_update": Op(("rows", "cols"), ("BLOCK_L", "BLOCK_S", "num_warps", "num_stages"), ()),
}
"""The kernels, by the names that launchers use."""


class Paths(NamedTuple):
    """The paths of an op, the default first, and the names that `when` may use for it."""

    conditions: tuple[str, ...]
    names: tuple[str, ...]


PATHS = {
    "population_linear": Paths(("dtype", "t", "k", "n"), ("epilogue", "addmm")),
    "sana_block": Paths(("dtype", "t"), ("epilogue", "consumer")),
}
"""The paths of each op. They differ in where the low-rank part is added: in the epilogue of our GEMM (`epilogue`), by
torch's GEMM (`addmm`), or by the op that reads torch's plain product (`consumer`)."""


def settings(op: str, device: torch.device, **conditions: str | int | bool) -> dict[str, int]:
    """The launch settings of one launch of `op`, from the file of the device.

    Args:
        op: a name of `OPS`.
        device: device of the launch.
        conditions: a value for each of the op's conditions.

    Raises:
        ValueError: The file is not valid. The message names the file and the entry.
    """
    return dict(_match(config_file(device), op, tuple(conditions.items())))


def path(op: str, device: torch.device, **conditions: str | int | bool) -> str:
    """The path that `op`, a name of `PATHS`, takes at one shape. Arguments and errors as in `settings`."""
    return _path(config_file(device), op, tuple(conditions.items()))


def describe(device: torch.device) -> dict[str, str]:
    """For a record: the file's name, 12 digits of its SHA-256, and 12 digits of a hash of the order of sums.

    Two results of one device can be bit-identical only if `order` is equal. Errors as in `settings`.
    """
    file = config_file(device)
    document = load(file)
    paths = {op: [[e["when"], e["path"]] for e in entries] for op, entries in document.get("paths", {}).items()}
    ordered = paths | {
        name: [[entry["when"], {s: entry["launch"][s] for s in OPS[name].order}] for entry in entries]
        for name, entries in document["ops"].items()
        if OPS[name].order
    }
    return {
        "file": file.name if file.parent == FOLDER else str(file),
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest()[:12],
        "order": hashlib.sha256(json.dumps(ordered, sort_keys=True).encode()).hexdigest()[:12],
    }


def config_file(device: torch.device) -> Path:
    """The file of the launch settings for `device`."""
    override = os.environ.get(OVERRIDE)
    return Path(override) if override else _device_file(torch.device(device))


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype's name without `torch.`, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def slug(name: str) -> str:
    """The file name for a device: `NVIDIA H100 80GB HBM3` becomes nvidia_h100_80gb_hbm3."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


@functools.cache
def load(path: Path) -> dict[str, Any]:
    """The file's contents, checked and cached. Raise ValueError, with the path and the entry, if it is not valid."""
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected a JSON file of launch settings, got {error}") from None
    try:
        _check(document)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return document


@functools.cache
def _device_file(device: torch.device) -> Path:
    if device.type != "cuda":
        return DEFAULT
    name = torch.cuda.get_device_name(device)
    if (path := FOLDER / f"{slug(name)}.json").exists():
        return path
    major, minor = torch.cuda.get_device_capability(device)
    path = FOLDER / f"sm_{major}{minor}.json"
    path = path if path.exists() else DEFAULT
    _log.info("no launch settings for %s, using %s; bench/tune.py can make a file for it", name, path.name)
    return path


@functools.cache
def _match(path: Path, op: str, conditions: tuple[tuple[str, str | int | bool], ...]) -> dict[str, int]:
    values = dict(conditions)
    assert set(values) == set(OPS[op].conditions)
    return next(_matching(load(path)["ops"][op], values))["launch"]


@functools.cache
def _path(file: Path, op: str, conditions: tuple[tuple[str, str | int | bool], ...]) -> str:
    values = dict(conditions)
    assert set(values) == set(PATHS[op].conditions)
    entries = load(file).get("paths", {}).get(op, [])
    return next(_matching(entries, values), {"path": PATHS[op].names[0]})["path"]


def _matching(entries: list[dict], values: dict[str, str | int | bool]) -> Iterator[dict]:
    return (e for e in entries if all(_matches(rule, values[name]) for name, rule in e["when"].items()))


def _matches(rule: Any, value: str | int | bool) -> bool:
    if not isinstance(rule, list):
        return rule == value
    minimum, maximum = rule
    return (minimum is None or minimum <= value) and (maximum is None or value <= maximum)


def _check(document: Any) -> None:
    """Raise ValueError, with the entry, for a missing or unknown name or a value of the wrong type."""
    _names("file", document, ("made", "ops"), ("paths",))
    _names("ops", document["ops"], OPS)
    _names("paths", document.get("paths", {}), (), PATHS)
    for op, entries in (document["ops"] | document.get("paths", {})).items():
        if not isinstance(entries, list):
            raise ValueError(f"{op}: expected a list of entries, got {entries!r}")
    for op, entries in document["ops"].items():
        for i, entry in enumerate(entries):
            _names(f"{op}[{i}]", entry, ("when", "launch"), ("measured",))
            _names(f"{op}[{i}].when", entry["when"], (), OPS[op].conditions)
            _names(f"{op}[{i}].launch", entry["launch"], OPS[op].settings)
            _check_rules(f"{op}[{i}].when", entry["when"])
            for name, value in entry["launch"].items():
                if type(value) is not int or value < 1:
                    raise ValueError(f"{op}[{i}].launch.{name}: expected a positive integer, got {value!r}")
        if not entries or entries[-1]["when"]:
            raise ValueError(f"{op}: expected a last entry for every launch, with an empty 'when'")
    for op, entries in document.get("paths", {}).items():
        for i, entry in enumerate(entries):
            _names(f"paths.{op}[{i}]", entry, ("when", "path"), ("measured",))
            _names(f"paths.{op}[{i}].when", entry["when"], (), PATHS[op].conditions)
            _check_rules(f"paths.{op}[{i}].when", entry["when"])
            if entry["path"] not in PATHS[op].names:
                names = ", ".join(PATHS[op].names)
                raise ValueError(f"paths.{op}[{i}].path: expected one of {names}, got {entry['path']!r}")


def _check_rules(place: str, when: dict) -> None:
    for name, rule in when.items():
        bounds = isinstance(rule, list) and len(rule) == 2 and all(x is None or type(x) is int for x in rule)
        if not (bounds or isinstance(rule, (str, int))):
            raise ValueError(f"{place}.{name}: expected a value or [least, most], got {rule!r}")


def _names(place: str, got: Any, needed: Iterable[str], possible: Iterable[str] = ()) -> None:
    if not isinstance(got, dict):
        raise ValueError(f"{place}: expected an object, got {got!r}")
    needed, allowed = set(needed), {*needed, *possible}
    if got.keys() - allowed or needed - got.keys():
        names = ", ".join(sorted(allowed)) or "nothing"
        raise ValueError(f"{place}: expected {names}, got {', '.join(sorted(got)) or 'nothing'}")
