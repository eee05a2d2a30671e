"""From names in a configuration to things that compute: device, dtype, model, image settings, chunk size."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from esengine.base.errors import ConfigError
from esengine.base.files import cache_root
from esengine.base.progress import Progress
from esengine.models import NAMED, RenderSettings, SanaSprint, TextEmbeddings
from esengine.sampling.settings import ImageSettings

CPU_CHUNK = 64


def pick_device(name: str) -> torch.device:
    """`auto` takes a GPU when there is one; under torchrun a GPU without a number is that of this process."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or not (index.isdecimal() or name == kind):
        raise ConfigError(f"device: expected auto, cpu, cuda or cuda:N, got '{name}'")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device: '{name}' is not there; torch {torch.__version__} sees {torch.cuda.device_count()} GPUs"
        )
    return torch.device(name)


def take_device(name: str) -> torch.device:
    """As `pick_device`; a GPU with a number becomes the one that kernels are launched on."""
    device = pick_device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return getattr(torch, name)


def load_model(
    model: str, revision: str | None, device: torch.device, dtype: torch.dtype, vae: str | None = None
) -> SanaSprint:
    """A pipeline folder, a hub id, `nano` or `tiny`; with another decoder, if asked for (`ImageSettings.vae`)."""
    allow_tf32(device, dtype)
    return SanaSprint.from_pretrained(model, revision=revision, device=device, dtype=dtype, vae=vae)


def allow_tf32(device: torch.device, dtype: torch.dtype) -> None:
    """Chosen here for the process: what a model of half precision computes in fp32 on a GPU, as DC-AE's attention, may
    be in tf32."""
    if device.type == "cuda" and dtype != torch.float32:
        torch.set_float32_matmul_precision("high")


def is_folder(model: str) -> bool:
    """Whether a model, as `--model` names it, is a folder."""
    return model not in NAMED and Path(model).is_dir()


def render_settings(image: ImageSettings) -> RenderSettings:
    """The part of them that a model renders by."""
    return RenderSettings(**{each.name: getattr(image, each.name) for each in dataclasses.fields(RenderSettings)})


def settled(image: ImageSettings, model: SanaSprint) -> ImageSettings:
    """The settings as a run keeps them: with its chunk, and with a decoder's folder by its full name."""
    vae = str(Path(image.vae).resolve()) if image.vae and Path(image.vae).is_dir() else image.vae
    return dataclasses.replace(image, chunk=pick_chunk(image, model), vae=vae)


def pick_chunk(image: ImageSettings, model: SanaSprint) -> int:
    """Images in one transformer forward: as given, else 64 on a CPU, else what half the free GPU memory should hold.

    The estimate for a GPU counts the widest tensors of a block: 16 of its MLP's width, in the model's dtype.
    """
    if image.chunk is not None:
        return image.chunk
    if model.device.type != "cuda":
        return CPU_CHUNK
    config = model.transformer.config
    scale = model.image_size // config.sample_size
    tokens = (image.height or model.image_size) * (image.width or model.image_size) // (scale * config.patch_size) ** 2
    width = config.num_attention_heads * config.attention_head_dim
    per_image = tokens * int(width * config.mlp_ratio) * model.dtype.itemsize * 16
    free, _ = torch.cuda.mem_get_info(model.device)
    return max(1, min(256, free // 2 // per_image))


def encode(
    model: SanaSprint, lists: Sequence[list[str]], image: ImageSettings, progress: Progress
) -> list[TextEmbeddings]:
    """Text embeddings of several lists of prompts, with the text encoder loaded at most once, by way of the cache."""
    settings = dict(cache_dir=cache_root() / "text", instruction=image.instruction)
    everything = list(dict.fromkeys(prompt for prompts in lists for prompt in prompts))
    texts = model.encode(everything, **settings, progress=lambda done, total: progress.count("prompts", done, total))
    place = {prompt: index for index, prompt in enumerate(everything)}
    return [TextEmbeddings(prompts, [texts[place[prompt]] for prompt in prompts]) for prompts in lists]
