"""Builds what a configuration names: device, dtype, model, image settings, chunk size."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from esengine.base.errors import ConfigError
from esengine.base.files import cache_root
from esengine.base.progress import Progress
from esengine.models import NAMED, Conditioning, Family, Generator, RenderSettings, TextEmbeddings, load
from esengine.models.reward_vae import TINY
from esengine.sampling.settings import ImageSettings

CPU_CHUNK = 64


def pick_device(name: str) -> torch.device:
    """`auto` selects a GPU if there is one. Under torchrun, `cuda` without a number selects this process's GPU."""
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
    """As `pick_device`. A GPU with a number also becomes torch's current device, which launches the kernels."""
    device = pick_device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return getattr(torch, name)


def load_model(
    model: str,
    revision: str | None,
    device: torch.device,
    dtype: torch.dtype,
    vae: str | None = None,
    reward_vae: str | None = None,
) -> Generator:
    """Load a pipeline folder, a hub id, `nano` or `tiny:FAMILY`. The decoders are those of `ImageSettings`."""
    allow_tf32(device, dtype)
    return load(model, device=device, dtype=dtype, revision=revision, vae=vae, reward_vae=reward_vae)


def allow_tf32(device: torch.device, dtype: torch.dtype) -> None:
    """Allow tf32 in this process for the fp32 parts of a half-precision model on a GPU, such as DC-AE's attention."""
    if device.type == "cuda" and dtype != torch.float32:
        torch.set_float32_matmul_precision("high")


def is_folder(model: str) -> bool:
    """Whether a value of `--model` is a folder."""
    return model not in NAMED and not model.startswith("tiny:") and Path(model).is_dir()


def render_settings(image: ImageSettings) -> RenderSettings:
    """The settings that a model renders with.

    Raises:
        ConfigError: they do not fit together, or no model can render by them.
    """
    values = {each.name: getattr(image, each.name) for each in dataclasses.fields(RenderSettings)}
    try:
        return RenderSettings(**values)
    except ConfigError as error:
        raise ConfigError(f"image.{error}") from error


def resolved(image: ImageSettings, by: Family | Generator) -> ImageSettings:
    """The settings with the defaults of a family or a loaded model for open choices.

    Raises:
        ConfigError: a setting does not apply to it.
    """
    try:
        return by.resolve(image)
    except ConfigError as error:
        raise ConfigError(f"image.{error}") from error


def refuse_reward_vae(image: ImageSettings, of_run: ImageSettings) -> None:
    """Raise ConfigError for a `reward_vae` that is not the run's: an evaluation has no use for it."""
    if image.reward_vae not in (None, of_run.reward_vae):
        problem = f"expected it in train only, got {image.reward_vae}: here the model's own decoder is used"
        raise ConfigError(problem, setting="image.reward_vae")


def settled(image: ImageSettings, model: Generator) -> ImageSettings:
    """The settings as a run records them: with the chosen chunk, and the absolute paths of decoders' folders."""

    def absolute(vae: str | None) -> str | None:
        return str(Path(vae).resolve()) if vae and vae != TINY and Path(vae).is_dir() else vae

    decoders = dict(vae=absolute(image.vae), reward_vae=absolute(image.reward_vae))
    return dataclasses.replace(image, chunk=pick_chunk(image, model), **decoders)


def pick_chunk(image: ImageSettings, model: Generator) -> int:
    """Images in one forward: the given chunk, else 64 on a CPU, else what fits into half the free GPU memory."""
    if image.chunk is not None:
        return image.chunk
    if model.device.type != "cuda":
        return CPU_CHUNK
    free, _ = torch.cuda.mem_get_info(model.device)
    return max(1, min(256, free // 2 // model.image_bytes(image)))


def encode(
    model: Generator, lists: Sequence[list[str]], image: ImageSettings, progress: Progress
) -> list[TextEmbeddings] | list[Conditioning]:
    """Text embeddings of several lists of prompts, through the cache. The text encoder is loaded at most once."""
    settings = dict(cache_dir=cache_root() / "text", instruction=image.instruction)
    everything = list(dict.fromkeys(prompt for prompts in lists for prompt in prompts))
    texts = model.encode(everything, **settings, progress=lambda done, total: progress.count("prompts", done, total))
    return [texts.select(prompts) for prompts in lists]
