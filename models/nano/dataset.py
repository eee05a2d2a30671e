"""Scaled latents of a fixed set of drawn images with their captions: training data of the transformer, made once."""

from pathlib import Path

import torch
from diffusers import AutoencoderDC
from safetensors.torch import load_file, save_file

from esengine.models.nano import world
from esengine.models.nano.autoencoder import encode
from esengine.models.nano.loop import Report

_CHUNK = 2048


def latent_dataset(
    folder: Path, vae: AutoencoderDC, *, count: int, seed: int, report: Report | None = None
) -> tuple[torch.Tensor, list[str]]:
    """Reads `latents.safetensors` and `captions.txt` of the folder, or draws, encodes and writes them.

    Returns:
        float16 [N, C, h, w], standard deviation about 1, and N captions of the training split.
    """
    path, texts = folder / "latents.safetensors", folder / "captions.txt"
    if not path.is_file():
        latents, captions = [], []
        for start in range(0, count, _CHUNK):
            drawn, images = world.batch("train", min(_CHUNK, count - start), (seed + 1) * 1_000_003 + start)
            captions += drawn
            latents.append((encode(vae, images) * vae.config.scaling_factor).half())
            if report is not None:
                report("latents", len(captions), count, {})
        texts.write_text("\n".join(captions))
        part = path.with_suffix(".part")
        save_file({"latents": torch.cat(latents)}, part)
        part.replace(path)
    return load_file(path)["latents"], texts.read_text().split("\n")
