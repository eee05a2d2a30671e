"""LoRA files that diffusers' pipelines load with the correct scale."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import save

from esengine.base.files import replace_file
from esengine.base.records import parse_json
from esengine.es.layers import HONOURED
from esengine.es.lora_folder import require_finite

WEIGHT_NAME = "pytorch_lora_weights.safetensors"

NAME = re.compile(r"\^?(\w|[.-]|\\[.-])+\$?")
"""A metadata pattern that only spells a layer's name. Other regular expressions in a file are refused, never run."""


def write_diffusers_lora(
    path: str | Path,
    state: Mapping[str, torch.Tensor],
    scaling: Mapping[str, float],
    denoiser: str = "transformer",
) -> Path:
    """Write a denoiser's LoRA as `pytorch_lora_weights.safetensors` in a folder.

    The scaling s = alpha / r is multiplied into B, and the metadata has alpha = r for every module. So loaders that
    read the metadata and loaders that assume alpha = r both apply s exactly once. Patterns in the metadata are anchored
    full names, because PEFT itself would match any suffix.

    Args:
        path: Folder, created if missing.
        state: `<module>.lora_A.weight` float32 [r, in] and `<module>.lora_B.weight` float32 [out, r] for each module,
            with two more dimensions of 1 for a convolution. Names are relative to the denoiser. The rank may differ by
            module.
        scaling: s by module.
        denoiser: The pipeline's name of the module: `transformer` or `unet`. Keys begin with it.

    Returns:
        Path of the written file.

    Raises:
        ValueError: `state` has other keys, a lone A or B, ranks that disagree, or no scaling for a module.
    """
    modules = sorted({key.rsplit(".lora_", 1)[0] for key in state})
    expected = {f"{module}.lora_{side}.weight" for module in modules for side in "AB"}
    if not modules or set(state) != expected:
        wrong = sorted(set(state) ^ expected)[:3]
        raise ValueError(f"state: expected <module>.lora_A.weight and <module>.lora_B.weight pairs, check {wrong}")
    if missing := [module for module in modules if module not in scaling]:
        raise ValueError(f"scaling: expected a value for each module of state, got none for {missing[:3]}")

    weights, ranks = {}, {}
    for module in modules:
        a, b = state[f"{module}.lora_A.weight"], state[f"{module}.lora_B.weight"]
        if a.ndim not in (2, 4) or a.ndim != b.ndim or a.shape[0] != b.shape[1]:
            raise ValueError(f"state: {module} expected A [r, in] and B [out, r], got {[*a.shape]} and {[*b.shape]}")
        ranks[module] = a.shape[0]
        weights[f"{module}.lora_A.weight"] = a.detach().cpu().contiguous()
        weights[f"{module}.lora_B.weight"] = (b.detach() * scaling[module]).cpu().contiguous()

    common = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {f"^{re.escape(module)}": rank for module, rank in ranks.items() if rank != common}
    metadata = {
        "r": common,
        "lora_alpha": common,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": modules,
    }

    # one metadata entry, so that equal adapters give equal bytes: safetensors writes several in random order
    packed = json.dumps({f"{denoiser}.{name}": value for name, value in metadata.items()}, sort_keys=True)
    tensors = {f"{denoiser}.{name}": tensor for name, tensor in weights.items()}
    file = Path(path) / WEIGHT_NAME
    replace_file(file, save(tensors, metadata={LORA_ADAPTER_METADATA_KEY: packed}))
    return file


def check_diffusers_lora(file: Path, shapes: Mapping[str, torch.Size], denoiser: str = "transformer") -> set[str]:
    """Check that a file holds a finite A and B of the right shapes for each of its layers, and nothing else.

    A loader leaves weights that the file lacks uninitialised, and ignores tensors that it does not know.

    Args:
        file: A `pytorch_lora_weights.safetensors` from any source.
        shapes: Name -> shape of the weight, for all layers of the denoiser that may have a LoRA.
        denoiser: The pipeline's name of the module. Keys begin with it.

    Returns:
        The names of the file's layers.

    Raises:
        ValueError: The check fails, or the metadata sets more than rank and scale.
        OSError, SafetensorError: The file cannot be read.
    """
    with safe_open(file, framework="pt") as opened:
        keys = set(opened.keys())
        key = re.compile(rf"{re.escape(denoiser)}\.(.+)\.lora_[AB]\.weight")
        layers = {match[1] for match in map(key.fullmatch, keys) if match}
        prefix = denoiser
        expected = {f"{prefix}.{layer}.lora_{side}.weight" for layer in layers for side in "AB"}
        if not layers or keys != expected:
            wrong = min(keys ^ expected, default="no tensor at all")
            what = "is missing" if wrong in expected else "is in it"
            raise ValueError(f"expected pairs {prefix}.<layer>.lora_A.weight and lora_B.weight, but {wrong} {what}")
        most = 0
        for layer in sorted(layers):
            if layer not in shapes:
                raise ValueError(f"the model has no layer {layer}")
            a, b = (opened.get_tensor(f"{prefix}.{layer}.lora_{side}.weight") for side in "AB")
            out, *inner = shapes[layer]
            if not len(a) or a.shape[1:] != (*inner,) or b.shape != (out, len(a), *[1] * (len(inner) - 1)):
                got = f"A {[*a.shape]} and B {[*b.shape]}"
                raise ValueError(f"{layer}: expected A and B of a weight {[*shapes[layer]]}, got {got}")
            for side, tensor in (("A", a), ("B", b)):
                require_finite(layer, f"{prefix}.{layer}.lora_{side}.weight", tensor)
            most = max(most, len(a))
        _check_metadata((opened.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY), most, denoiser)
    return layers


def _check_metadata(packed: str | None, most: int, denoiser: str) -> None:
    """Raise ValueError for metadata that does more than set each layer's scale and its rank, at most `most`."""
    if packed is None:
        return
    found, default = parse_json(packed), LoraConfig()
    if not isinstance(found, dict):
        raise ValueError(f"metadata: expected a mapping, got {type(found).__name__}")
    prefix = f"{denoiser}."
    found = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
    for name, value in found.items():
        if value and name not in (*HONOURED, "lora_dropout") and value != getattr(default, name, None):
            raise ValueError(f"metadata: {name} is set, which plain A and B do not have")
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        names = found.get(name) or []
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list) or not all(isinstance(each, str) and NAME.fullmatch(each) for each in names):
            raise ValueError(f"metadata: {name}: expected names of layers")
    if found.get("init_lora_weights") not in (None, True, False, "gaussian"):
        raise ValueError("metadata: init_lora_weights: expected one that leaves the model's weights as they are")

    def rank(value: object) -> bool:
        return type(value) is int and 1 <= value <= most

    def alpha(value: object) -> bool:
        return type(value) in (int, float) and abs(value) <= torch.finfo(torch.float32).max

    for one, pattern, fits in (("r", "rank_pattern", rank), ("lora_alpha", "alpha_pattern", alpha)):
        given = found.get(pattern) or {}
        if not fits(found.get(one)):
            raise ValueError(f"metadata: {one}: expected a rank up to {most} and a finite alpha")
        if not isinstance(given, dict) or not all(NAME.fullmatch(k) and fits(v) for k, v in given.items()):
            raise ValueError(f"metadata: {pattern}: expected numbers by the names of layers")
