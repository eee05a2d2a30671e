"""LoRA files that diffusers' own pipelines read, at the right strength."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import SanaSprintPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors.torch import save

from esengine.files import replace_file

WEIGHT_NAME = "pytorch_lora_weights.safetensors"


def write_diffusers_lora(path: str | Path, state: Mapping[str, torch.Tensor], scaling: Mapping[str, float]) -> Path:
    """Writes a transformer's LoRA as `pytorch_lora_weights.safetensors` in a folder.

    The scaling s = alpha / r is multiplied into B, and the metadata says alpha = r for every module: loaders that read
    the metadata and loaders that assume alpha = r both apply s (A, B) exactly once. Patterns in the metadata are
    anchored full names, since PEFT's own matching takes any suffix.

    Args:
        path: Folder, created when missing.
        state: `<module>.lora_A.weight` float32 [r, in] and `<module>.lora_B.weight` float32 [out, r] for each module,
            named relative to the transformer. The rank may differ by module.
        scaling: s of each module.

    Returns:
        The written file.

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
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
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

    # one entry of metadata: safetensors writes several in random order, and equal adapters are to be equal bytes
    prefix = SanaSprintPipeline.transformer_name
    packed = json.dumps({f"{prefix}.{name}": value for name, value in metadata.items()}, sort_keys=True)
    tensors = {f"{prefix}.{name}": tensor for name, tensor in weights.items()}
    file = Path(path) / WEIGHT_NAME
    replace_file(file, save(tensors, metadata={LORA_ADAPTER_METADATA_KEY: packed}))
    return file
