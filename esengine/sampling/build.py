"""Builds what a configuration names: device, dtype, model, image settings, chunk size."""

import dataclasses
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

import torch

from esengine.base.errors import ConfigError
from esengine.base.files import cache_root
from esengine.base.progress import Progress
from esengine.models import NAMED, Conditioning, Family, Generator, RenderSettings, TextEmbeddings, load
from esengine.models.loading import image_size, locate
from esengine.models.reward_vae import TINY
from esengine.models.text_limits import cut_of
from esengine.sampling.settings import ImageSettings

CPU_CHUNK = 64


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


def size_before_loading(image: ImageSettings, model: str, revision: str | None, family: Family) -> tuple[int, int]:
    """Height and width of the images in pixels, before the model is loaded.

    Raises:
        ConfigError: there is no such model.
    """
    own = None
    if image.height is None or image.width is None:
        own = image_size(locate(model, revision, local_files_only=True)[0], family)
    return image.height or own, image.width or own


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


def text_cache() -> Path | None:
    """The folder of the text cache; None if this user has no cache."""
    root = cache_root()
    return None if root is None else root / "text"


def encode(
    model: Generator, lists: Sequence[list[str]], image: ImageSettings, progress: Progress, *names: str
) -> list[TextEmbeddings] | list[Conditioning]:
    """Text embeddings of several lists of prompts, through the cache. The text encoder is loaded at most once.

    `names` of the lists, by default `prompts`, are for the notes that say how many prompts the text encoder cuts.
    """
    settings = dict(cache_dir=text_cache(), instruction=image.instruction)
    everything = list(dict.fromkeys(prompt for prompts in lists for prompt in prompts))
    texts = model.encode(everything, **settings, progress=lambda done, total: progress.count("prompts", done, total))
    found = [texts.select(prompts) for prompts in lists]
    for each, name in zip_longest(found, names, fillvalue="prompts"):
        note_cut(each, progress, name)
    return found


def note_cut(texts: TextEmbeddings | Conditioning, progress: Progress, name: str = "prompts") -> None:
    """Say how many prompts of a list the text encoder cuts."""
    for cut in cut_of(texts.limits):
        progress.note(f"warning: {cut.text(name)}")
