"""Reads the LoRA that ES starts from: a PEFT folder, or a file that diffusers' pipelines load.

    W_adapted = W + s B A        s = alpha / r, or alpha / sqrt(r) with rsLoRA

The scale s is the one that PEFT or diffusers would apply. What s, A and B of each target do not fully describe is
refused. Files are read as safetensors and JSON, never as pickles.

If a folder has the files of both, those of PEFT are read everywhere. They must describe the same change s B A.
"""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open

from esengine.base.files import read_regular, utf8_name
from esengine.base.printable import plain
from esengine.base.records import parse_json
from esengine.es.layers import HONOURED

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
DIFFUSERS_METADATA = "lora_adapter_metadata"
PEFT_PREFIX = "base_model.model."

LARGEST = torch.finfo(torch.float32).max
MAX_CONFIG, MAX_PATTERNS = 1 << 22, 10_000
"""Limits of a PEFT configuration: bytes, and patterns of one kind."""

_KEY = re.compile(r"(.+)\.(?:(lora_A|lora\.down|lora_down)|lora_B|lora\.up|lora_up)\.weight")
_NO_EFFECT = ("lora_dropout", "fan_in_fan_out", "eva_config")
_INITS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the model's own weights as they are."""
_PATTERN = re.compile(r"(?:[\w.\-\[\]|()^$*+,]|\\[\w.\-])+")


Targets = Mapping[str, tuple[torch.Size, torch.Size]]
"""The population's A and B of each target, as shapes, by the target's name relative to the module."""


class LayerLora(NamedTuple):
    """A [r, in], B [out, r], as in the file, of a convolution with two more dimensions of 1; and their scale s."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float


def lora_files(folder: Path) -> list[Path]:
    """The files of a LoRA that are read in a folder: the two of PEFT, else that of diffusers. Empty if it has none."""
    names = (PEFT_CONFIG, PEFT_WEIGHTS) if (folder / PEFT_WEIGHTS).is_file() else (DIFFUSERS_WEIGHTS,)
    return [folder / name for name in names if (folder / name).is_file()]


def read_lora(path: str | os.PathLike, targets: Targets) -> dict[str, LayerLora]:
    """Read a LoRA on exactly these targets.

    Args:
        path: a PEFT folder (adapter_config.json and adapter_model.safetensors), a folder with
            pytorch_lora_weights.safetensors, or such a file itself. If a folder has both, PEFT's is read, and the other
            must describe the same LoRA.
        targets: the population's.

    Returns:
        The LoRA of each target, by name.

    Raises:
        ValueError: there is no such file, it is damaged, its layers are others, or it holds more than a plain LoRA. The
            message has the path and the reason.
    """
    path = Path(path)
    try:
        if path / PEFT_WEIGHTS not in lora_files(path):
            return _read_diffusers(path if path.suffix == ".safetensors" else path / DIFFUSERS_WEIGHTS, targets)
        found = _read_peft(path, targets)
        if (path / DIFFUSERS_WEIGHTS).is_file():
            try:
                _check_equal(found, _read_diffusers(path / DIFFUSERS_WEIGHTS, targets))
            except (SafetensorError, ValueError) as error:
                raise ValueError(f"{DIFFUSERS_WEIGHTS}, beside {PEFT_WEIGHTS}: {error}") from error
        return found
    except FileNotFoundError as error:
        raise ValueError(f"{path}: {_what_is_missing(path, Path(error.filename or path).name)}") from error
    except (OSError, SafetensorError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        raise ValueError(f"{path}: {plain(error)}") from error


def _read_peft(folder: Path, targets: Targets) -> dict[str, LayerLora]:
    settings = _mapping(read_regular(folder / PEFT_CONFIG, MAX_CONFIG), PEFT_CONFIG)
    tensors, _ = _tensors(folder / PEFT_WEIGHTS)
    odd = [key for key in tensors if not key.startswith(PEFT_PREFIX)]
    if odd:
        raise ValueError(f"expected tensors {PEFT_PREFIX}<layer>, got {odd[0]}")
    return parse_lora({key.removeprefix(PEFT_PREFIX): t for key, t in tensors.items()}, settings, targets)


def _read_diffusers(file: Path, targets: Targets) -> dict[str, LayerLora]:
    tensors, metadata = _tensors(file)
    return _of_diffusers(tensors, metadata.get(DIFFUSERS_METADATA), targets)


def _check_equal(of_peft: dict[str, LayerLora], of_diffusers: dict[str, LayerLora]) -> None:
    """Raises ValueError unless both have the same s B A in every layer, up to the rounding of their dtypes.

    D = s B A - s' B' A' = [s B | -s' B'] [A; A']        |D|^2 = trace([..]^T [..] [A; A'] [A; A']^T)
    """
    for name, one in of_peft.items():
        other = of_diffusers[name]
        b = torch.cat([one.scale * one.b.double().flatten(1), -other.scale * other.b.double().flatten(1)], 1)
        a = torch.cat([one.a.double().flatten(1), other.a.double().flatten(1)])
        parts, r = (b.mT @ b) * (a @ a.mT), len(one.a)
        limit = 8 * max(torch.finfo(each.dtype).eps for each in (one.a, one.b, other.a, other.b))
        if parts.sum().clamp(min=0).sqrt() > limit * max(parts[:r, :r].sum(), parts[r:, r:].sum()).clamp(min=0).sqrt():
            what = "unless a run writes them at this moment, move one of them away"
            raise ValueError(f"'{name}': expected the same LoRA in both files, got two; {what}")


def parse_lora(
    tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any] | None, targets: Targets
) -> dict[str, LayerLora]:
    """The LoRA of each target from tensors and a LoraConfig as a mapping.

    Args:
        tensors: `<layer>.lora_A.weight` and `<layer>.lora_B.weight`, diffusers' older `lora.down` and `lora.up`, and
            `<layer>.alpha`. Layers are named relative to the module.
        settings: fields of a LoraConfig; None: alpha is `<layer>.alpha`, or r without it.
        targets: the population's.

    Raises:
        ValueError: as `read_lora`, without the path.
    """
    _check_settings(settings or {})
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    alphas: dict[str, float] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if key.endswith(".alpha"):
            alphas[key.removesuffix(".alpha")] = _number(key, tensor.item() if tensor.numel() == 1 else None)
        elif match is None:
            raise ValueError(f"{key}: {_why_not_plain(key)}")
        else:
            pairs.setdefault(match[1], {})["A" if match[2] else "B"] = tensor
    _check_layers({_plain_name(name) for name in pairs}, targets)
    if alphas and (settings is not None or set(alphas) != set(pairs)):
        raise ValueError("alpha: expected one for each layer, or metadata, got both or not all")
    found = {}
    for name, pair in pairs.items():
        a, b = _checked_pair(name, pair, targets[_plain_name(name)])
        scale = _scale(name, len(a), settings) if settings is not None else alphas.get(name, len(a)) / len(a)
        require_finite(f"'{name}'", "lora_B.weight", b, scale)
        found[_plain_name(name)] = LayerLora(a, b, scale)
    if len(found) < len(pairs):
        raise ValueError("expected each layer once, got one twice: as compiled and as plain")
    return found


def _of_diffusers(tensors: dict[str, torch.Tensor], packed: str | None, targets: Targets) -> dict:
    """`parse_lora` of a file whose names begin with the component's, such as `transformer.`, or with none."""
    settings = None if packed is None else _mapping(packed, "metadata")
    layers = {_plain_name(match[1]) for match in map(_KEY.fullmatch, tensors) if match}
    if not layers & set(targets):
        components = sorted({key.partition(".")[0] for key in tensors})
        if len(components) > 1:
            raise ValueError(f"expected weights of one component, got those of {' and '.join(components)}")
        prefix = f"{components[0]}." if components else ""
        tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
        if settings is not None:
            settings = {k.removeprefix(prefix): value for k, value in settings.items() if k.startswith(prefix)} or None
    return parse_lora(tensors, settings, targets)


def _tensors(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors of a safetensors file, and its metadata."""
    if file.exists() and not file.is_file():
        raise ValueError(f"{file.name}: expected a regular file")
    with utf8_name(file) as name, safe_open(name, framework="pt") as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata() or {}  # noqa: SIM118


def _mapping(text: str | bytes, what: str) -> dict[str, Any]:
    try:
        found = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{what}: expected JSON, got {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{what}: expected a mapping, got {type(found).__name__}")
    return found


def _what_is_missing(path: Path, name: str) -> str:
    expected = f"expected {PEFT_CONFIG} and {PEFT_WEIGHTS}, or {DIFFUSERS_WEIGHTS}"
    pickles = sorted(each.name for each in path.glob("*.bin")) if path.is_dir() else []
    if path.suffix == ".bin" or pickles:
        return f"{expected}, got {(pickles or [path.name])[0]}, a pickle, which is never read; save it as safetensors"
    return f"{expected}, but {name if path.is_dir() else 'the folder'} does not exist"


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Raises ValueError for settings that do more than select and scale layers."""
    default = LoraConfig()
    for name, value in settings.items():
        if name in HONOURED or name in _NO_EFFECT or not value or value == getattr(default, name, None):
            continue
        raise ValueError(f"{name}: expected a plain LoRA, which A, B and a scale describe, got {value!r:.100}")
    if settings.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"peft_type: expected LORA, got {settings['peft_type']!r:.100}")
    if settings.get("init_lora_weights") not in _INITS:
        raise ValueError(
            f"init_lora_weights: {settings['init_lora_weights']!r:.100} changes the weights of the model too; convert "
            "it to a plain LoRA first"
        )


def _why_not_plain(key: str) -> str:
    if "lora_magnitude_vector" in key or "dora_scale" in key:
        return "a DoRA has magnitudes too, which A and B do not describe"
    if key.endswith(".bias"):
        return "a LoRA with a bias is not A and B alone"
    return "is no A or B of a plain LoRA; modules_to_save and other adapters cannot be continued"


def _check_layers(found: set[str], targets: Targets) -> None:
    if more := sorted(found - set(targets)):
        raise ValueError(
            f"its layer '{more[0]}' is not a target of the population; attach with the same target_modules"
        )
    if missing := sorted(set(targets) - found):
        raise ValueError(f"it has no layer '{missing[0]}', a target of the population; attach with its target_modules")


def _checked_pair(
    name: str, pair: Mapping[str, torch.Tensor], shapes: tuple[torch.Size, torch.Size]
) -> tuple[torch.Tensor, torch.Tensor]:
    if len(pair) < 2:
        raise ValueError(f"'{name}': expected A and B, got {next(iter(pair))} alone")
    a, b = pair["A"], pair["B"]
    r = len(a) if a.dim() else 0
    expected = (r, *shapes[0][1:]), (shapes[1][0], r, *shapes[1][2:])
    if not r or (a.shape, b.shape) != expected:
        raise ValueError(f"'{name}': expected A and B of {expected}, r at least 1, got {(*a.shape,)} and {(*b.shape,)}")
    for side, tensor in (("A", a), ("B", b)):
        require_finite(f"'{name}'", f"lora_{side}.weight", tensor)
    return a, b


def require_finite(where: str, name: str, tensor: torch.Tensor, scale: float = 1.0) -> None:
    """Raise ValueError unless a layer's tensor has floating-point numbers that are finite in float32, times a scale."""
    expected = f"{where}: expected finite floating-point numbers in float32, {name} has"
    if not tensor.is_floating_point():
        raise ValueError(f"{expected} {str(tensor.dtype).removeprefix('torch.')}")
    if not (tensor.to(torch.float32) * scale).isfinite().all():
        scaled = "" if scale == 1 else f", times the scale {scale:g}"
        raise ValueError(f"{expected} {tensor.to(torch.float64).abs().max():g}{scaled}")


def _scale(name: str, rank: int, settings: Mapping[str, Any]) -> float:
    """s of a layer, as PEFT computes it. Its LoraConfig's defaults stand for what is left out."""
    default = LoraConfig()
    r = _by_pattern(name, settings.get("rank_pattern"), settings.get("r", default.r), "rank_pattern")
    if r != rank:
        raise ValueError(f"'{name}': expected A of {r} rows, as r and rank_pattern say, got {rank}")
    alpha = settings.get("lora_alpha", default.lora_alpha)
    alpha = _number("lora_alpha", _by_pattern(name, settings.get("alpha_pattern"), alpha, "alpha_pattern"))
    return alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank


def _by_pattern(name: str, patterns: Any, otherwise: Any, what: str) -> Any:
    """The value of the first pattern that matches a layer's name, as PEFT finds it."""
    if not isinstance(patterns or {}, dict):
        raise ValueError(f"{what}: expected a mapping, got {type(patterns).__name__}")
    if len(patterns or {}) > MAX_PATTERNS:
        raise ValueError(f"{what}: expected at most {MAX_PATTERNS} patterns, got {len(patterns)}")
    for pattern in patterns or {}:
        quantified = len(re.findall(r"(?<!\\)[*+]", pattern))
        simple = _PATTERN.fullmatch(pattern) and quantified <= 3 and not re.search(r"\)[*+]|\(\?", pattern)
        if not simple:  # a file must not say how long its reader is busy
            raise ValueError(f"{what}: expected names of layers or simple patterns, got {pattern!r}")
    try:
        return (patterns or {}).get(get_pattern_key(patterns or {}, name), otherwise)
    except re.error as error:
        raise ValueError(f"{what}: expected regular expressions, got one with {error}") from error


def _number(what: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LARGEST:  # nor NaN
        raise ValueError(f"{what}: expected a finite number, got {value!r:.80}")
    return float(value)


def _plain_name(name: str) -> str:
    """The name in the plain module, of one that torch.compile wrapped when the adapter was saved."""
    return name.replace("_orig_mod.", "")
