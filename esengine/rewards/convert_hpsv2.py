"""From the published weights of HPS v2 or v2.1 to a folder that `hpsv2(model=FOLDER)` reads.

    python -m esengine.rewards.convert_hpsv2 HPS_v2.1_compressed.pt FOLDER

The authors publish an open_clip ViT-H-14 as a pickle. Only this command opens such a file, because the user names it.
It reads only tensors from it: torch rejects anything else in the file (`weights_only=True`).
"""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from esengine.base.errors import ConfigError, EsengineError
from esengine.base.printable import shown
from esengine.rewards.base import reason
from esengine.rewards.clip import CLIP_H
from esengine.rewards.loading import load_model, processor_files

HEAD_WIDTH = {"vision_config": 80, "text_config": 64}
"""Widths of an attention head of ViT-H-14. A state dict does not hold them."""

_NAMES = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
}
_TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)")
_LAYERS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_STACKED = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")


def convert(source: str | Path, folder: str | Path, *, processor: str = CLIP_H) -> Path:
    """Write a CLIPModel with safetensors weights, and its tokenizer and preprocessor config.

    Args:
        source: the published file.
        folder: a new or an empty folder.
        processor: folder or hub id of the tokenizer and preprocessor config, which are copied.

    Returns:
        The folder.

    Raises:
        ConfigError: the file is not such a state dict, the folder is not empty, or there is no such processor.
    """
    from safetensors.torch import save_file
    from transformers import CLIPConfig

    folder = Path(folder).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"folder: expected a new or an empty one, got {folder}")
    copied = processor_files(processor)
    theirs = _read(Path(source).expanduser())
    try:
        ours, settings = rename(theirs), layout(theirs)
    except (KeyError, IndexError, ValueError) as error:
        raise ConfigError(f"{source}: expected the state dict of an open_clip ViT-H-14 ({reason(error)})") from error
    folder.mkdir(parents=True, exist_ok=True)
    for path in copied:
        shutil.copyfile(path, folder / path.name)
    (folder / "config.json").write_text(json.dumps(CLIPConfig(**settings).to_dict(), indent=1), encoding="utf-8")
    save_file(ours, folder / "model.safetensors", {"format": "pt"})
    load_model(str(folder), None)
    return folder


def rename(theirs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An open_clip CLIP's weights under transformers' names, with the dtype unchanged.

    Raises:
        ValueError: a weight has no counterpart in transformers.
    """
    ours = {}
    for name, value in theirs.items():
        stem, _, kind = name.rpartition(".")
        if name in _NAMES:
            ours[_NAMES[name]] = value.contiguous()
        elif stem in _NAMES:
            ours[f"{_NAMES[stem]}.{kind}"] = value.contiguous()
        elif name in _TRANSPOSED:
            ours[_TRANSPOSED[name]] = value.T.contiguous()
        elif found := _STACKED.fullmatch(name):
            for part, each in zip("qkv", value.chunk(3), strict=True):
                ours[f"{_layer(found)}.self_attn.{part}_proj.{found[3]}"] = each.clone()
        elif (found := _BLOCK.fullmatch(name)) and found[3] in _LAYERS:
            ours[f"{_layer(found)}.{_LAYERS[found[3]]}.{found[4]}"] = value.contiguous()
        elif name != "attn_mask":  # a constant that older versions keep
            raise ValueError(f"no place for {name:.80}")
    return ours


def layout(theirs: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The settings of transformers' CLIPConfig that fit an open_clip CLIP's weights.

    Raises:
        KeyError: a weight is missing.
    """

    def tower(kind: str, prefix: str, width: int) -> dict[str, int | str]:
        layers = {int(found[2]) for name in theirs if (found := _STACKED.fullmatch(name)) and found[1] == prefix}
        return {
            "hidden_size": width,
            "intermediate_size": len(theirs[f"{prefix or ''}transformer.resblocks.0.mlp.c_fc.bias"]),
            "num_hidden_layers": len(layers),
            "num_attention_heads": width // HEAD_WIDTH[kind],
            "hidden_act": "gelu",
        }

    vocabulary, text_width = theirs["token_embedding.weight"].shape
    width, _, patch, _ = theirs["visual.conv1.weight"].shape
    edge = round((len(theirs["visual.positional_embedding"]) - 1) ** 0.5) * patch
    return {
        "projection_dim": theirs["text_projection"].shape[1],
        "text_config": {
            **tower("text_config", None, text_width),
            "projection_dim": theirs["text_projection"].shape[1],
            "vocab_size": vocabulary,
            "max_position_embeddings": len(theirs["positional_embedding"]),
            "bos_token_id": vocabulary - 2,
            "eos_token_id": vocabulary - 1,
        },
        "vision_config": {
            **tower("vision_config", "visual.", width),
            "projection_dim": theirs["visual.proj"].shape[1],
            "image_size": edge,
            "patch_size": patch,
        },
    }


def _layer(found: re.Match) -> str:
    return f"{'vision' if found[1] else 'text'}_model.encoder.layers.{found[2]}"


def _read(source: Path) -> Mapping[str, torch.Tensor]:
    try:
        found = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # the unpickler's errors are not documented
        raise ConfigError(f"{source}: cannot be read as weights alone ({reason(error)[:120]})") from error
    found = found.get("state_dict", found) if isinstance(found, Mapping) else found
    if not isinstance(found, Mapping) or not all(isinstance(each, torch.Tensor) for each in found.values()):
        raise ConfigError(f"{source}: expected a state dict, got {type(found).__name__}")
    return found


def main(args: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser("python -m esengine.rewards.convert_hpsv2", description=__doc__.splitlines()[0])
    parser.add_argument("source", help="HPS_v2.1_compressed.pt or HPS_v2_compressed.pt")
    parser.add_argument("folder", help="what is written: a new folder")
    parser.add_argument("--processor", default=CLIP_H, help="folder or hub id of the tokenizer (default: %(default)s)")
    given = parser.parse_args(args)
    try:
        folder = convert(given.source, given.folder, processor=given.processor)
    except EsengineError as error:
        sys.stderr.write(f"error: {shown(error)}\n")
        return 2
    sys.stdout.write(f"{folder}: for --reward 'hpsv2(model={folder})'\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
