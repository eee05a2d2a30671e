"""Loads a saved LoRA into a diffusers pipeline, by the pipeline's own loader where it has one."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open

from esengine.base.errors import ConfigError
from esengine.es.lora_folder import PEFT_PREFIX, PEFT_WEIGHTS, lora_files, read_lora, require_finite
from esengine.models.loading import READ_ERRORS, first_line
from esengine.models.lora_file import WEIGHT_NAME, check_diffusers_lora, write_diffusers_lora

_SELECTED = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
"""Metadata of a LoRA file that sets ranks and scales."""


def load_adapter(pipe: DiffusionPipeline, denoiser: str, path: str | Path) -> None:
    """Load a LoRA folder into a pipeline. It replaces an adapter loaded before.

    Args:
        pipe: the pipeline.
        denoiser: its attribute that the LoRA is for.
        path: folder that PEFT saved, or with `pytorch_lora_weights.safetensors`. If it has the files of both, they must
            be the same LoRA, and PEFT's is loaded.

    Raises:
        ConfigError: the file is missing, unreadable or incomplete, or the loader loaded only some of its layers.
    """
    path = Path(path)
    files = lora_files(path)
    if not files:
        raise ConfigError(f"adapter: {path / WEIGHT_NAME} does not exist")
    unload_adapter(pipe, denoiser)
    if path / PEFT_WEIGHTS in files:
        with tempfile.TemporaryDirectory() as folder:
            _convert(path, Path(folder), getattr(pipe, denoiser), denoiser)
            load_adapter(pipe, denoiser, folder)
        return
    file = path / WEIGHT_NAME
    module, kinds = getattr(pipe, denoiser), (torch.nn.Linear, torch.nn.Conv2d)
    shapes = {name: m.weight.shape for name, m in module.named_modules() if isinstance(m, kinds)}
    try:
        layers = check_diffusers_lora(file, shapes, denoiser)
        if hasattr(pipe, "load_lora_weights"):
            pipe.load_lora_weights(str(path), weight_name=WEIGHT_NAME, use_safetensors=True)
        else:
            _inject(module, file, denoiser, layers)
    except READ_ERRORS as error:
        raise ConfigError(f"adapter: cannot load {file}: {first_line(error)}") from error
    taken = {name for name, each in module.named_modules() if len(getattr(each, "lora_A", ()))}
    if taken != layers:
        unload_adapter(pipe, denoiser)
        raise ConfigError(f"adapter: {file}: the pipeline took {len(taken)} of its {len(layers)} LoRA layers")
    try:
        for name, tensor in module.named_parameters():
            if ".lora_" in name:
                require_finite(name.partition(".lora_")[0], name, tensor)
    except ValueError as error:  # in the model's dtype
        unload_adapter(pipe, denoiser)
        raise ConfigError(f"adapter: cannot load {file} in {str(module.dtype)[6:]}: {error}") from error
    module.eval().requires_grad_(False)  # PEFT adds its layers in training mode, with dropout on


def _convert(path: Path, folder: Path, module: torch.nn.Module, denoiser: str) -> None:
    """Write a PEFT folder's LoRA as the file that diffusers' pipelines load, at the same strength."""
    try:
        with safe_open(path / PEFT_WEIGHTS, framework="pt") as opened:
            keys = list(opened.keys())
        names = {key.removeprefix(PEFT_PREFIX).rsplit(".lora_", 1)[0] for key in keys}
        weights = {name: m.weight.shape for name, m in module.named_modules() if name in names and hasattr(m, "weight")}
        targets = {name: ((1, *shape[1:]), (shape[0], 1, *shape[2:])) for name, shape in weights.items()}
        found = read_lora(path, targets)
    except READ_ERRORS as error:
        raise ConfigError(f"adapter: cannot load {path}: {first_line(error)}") from error
    state = {f"{name}.lora_A.weight": each.a.float() for name, each in found.items()}
    state |= {f"{name}.lora_B.weight": each.b.float() for name, each in found.items()}
    write_diffusers_lora(folder, state, {name: each.scale for name, each in found.items()}, denoiser)


def unload_adapter(pipe: DiffusionPipeline, denoiser: str) -> None:
    """Remove the loaded adapter, which leaves the base model."""
    if hasattr(pipe, "unload_lora_weights"):
        pipe.unload_lora_weights()
        return
    module = getattr(pipe, denoiser)
    for name, layer in list(module.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, layer.get_base_layer())
    if hasattr(module, "peft_config"):
        del module.peft_config


def enable_adapter(pipe: DiffusionPipeline, denoiser: str, enabled: bool) -> None:
    """Switch the loaded adapter on or off. Raises ValueError if none is loaded."""
    module = getattr(pipe, denoiser)
    if not getattr(module, "peft_config", None):
        raise ValueError("adapter_enabled: expected an adapter loaded by load_adapter, got none")
    for layer in module.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.enable_adapters(enabled)


def _inject(module: torch.nn.Module, file: Path, denoiser: str, layers: set[str]) -> None:
    """Load a checked file by PEFT, for a pipeline without a loader."""
    prefix = f"{denoiser}."
    with safe_open(file, framework="pt") as opened:
        state = {key.removeprefix(prefix): opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        packed = (opened.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY)
    found: dict[str, Any] = {} if packed is None else json.loads(packed)
    found = {name.removeprefix(prefix): value for name, value in found.items()}
    settings = {name: found[name] for name in _SELECTED if found.get(name) is not None}
    if packed is None:  # alpha = r, as loaders assume that read no metadata
        ranks = {f"^{name}$": len(state[f"{name}.lora_A.weight"]) for name in layers}
        settings = dict(r=1, lora_alpha=1, rank_pattern=ranks, alpha_pattern=ranks)
    config = LoraConfig(**settings, target_modules=sorted(layers))
    inject_adapter_in_model(config, module)
    set_peft_model_state_dict(module, state)
    module.peft_config = {"default": config}
