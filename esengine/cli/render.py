"""`esengine render`: render prompts with an adapter and with the base model."""

import re
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from esengine.base.errors import ConfigError, of_setting
from esengine.base.files import DATA, refuse_links, write_atomic
from esengine.base.progress import Progress
from esengine.base.prompt_files import read_prompts
from esengine.cli.settings import RenderConfig
from esengine.evaluation.draw import EVAL_STEP
from esengine.evaluation.entries import adapter_of
from esengine.models import Generator
from esengine.models.defaults import defaults
from esengine.report import write_gallery
from esengine.run.pictures import draw_strip
from esengine.run.settings import TrainConfig, load_run
from esengine.sampling.build import (
    encode,
    load_model,
    pick_chunk,
    pick_dtype,
    refuse_reward_vae,
    render_settings,
    resolved,
)
from esengine.sampling.device import take_device
from esengine.sampling.environment import describe
from esengine.sampling.rollout import Renderer, render_all

GALLERY = DATA / "prompts_gallery.txt"
EARLIER = "earlier"
"""Name of the subfolder for images of an earlier call."""
_OURS = re.compile(r"\d{4,}_[a-z0-9-]+_(base|adapter)\.png")


@dataclass(frozen=True)
class Drawn:
    """The output of `render`.

    Attributes:
        folder: folder of the files.
        sheet: one picture with all images.
        images: number of single images; 0 for a gallery.
        page: HTML page of a gallery.
    """

    folder: Path
    sheet: Path
    images: int
    page: Path | None = None


def render(config: RenderConfig, progress: Progress) -> Drawn:
    """Render each prompt with the base model and the adapter, from the same latents, into a folder of PNG files.

    PNG files of an earlier call with other names are moved to the subfolder `earlier`. With `gallery` the output is
    gallery.png and gallery.html instead.
    """
    run = load_run(config.run_dir) if config.run_dir else TrainConfig()
    if config.gallery:
        prompts = read_prompts(GALLERY)
    elif config.prompts:
        prompts = list(config.prompts)
    else:
        with of_setting("prompts_file"):
            prompts = read_prompts(config.prompts_file or defaults(config.model or run.model).heldout)[: config.limit]
    seed = run.seed if config.seed is None else config.seed
    out = config.out or (config.run_dir or Path()) / "renders"
    if config.run_dir is not None and config.out is None:
        refuse_links(f"run folder {config.run_dir}", [out, out / EARLIER])
    image = config.image or run.image
    refuse_reward_vae(image, run.image)
    model = _model_with_adapter(config, run, image.vae, progress)
    image = resolved(image, model)
    (texts,) = encode(model, [prompts], image, progress)
    settings = render_settings(image)
    draw = Renderer(model, texts, settings, seed, pick_chunk(image, model), note=progress.note)
    rows = {}
    for label, enabled in (("base", False), ("adapter", True)):
        model.adapter_enabled(enabled)
        parts = []
        for images, _ in render_all(draw, EVAL_STEP, torch.arange(len(texts))):
            parts.append(images.cpu())
            progress.count("images", sum(map(len, parts)), len(texts))
        rows[label] = torch.cat(parts)
    if config.gallery:
        made = {"weights": model.identity(), "adapter": str(config.adapter or config.run_dir), "seed": seed}
        made |= {"device": str(model.device), "dtype": str(model.dtype).removeprefix("torch.")}
        made |= {"image": asdict(settings), "versions": describe()}
        sheet, page = write_gallery(out, prompts, rows, made)
        return Drawn(out, sheet, 0, page)
    files = {
        out / f"{index:04d}_{_slug(prompts[index])}_{label}.png": Image.fromarray(pixels)
        for label, images in rows.items()
        for index, pixels in enumerate(images.permute(0, 2, 3, 1).numpy())
    }
    sheet = out / "base_and_adapter.png"
    for file, picture in (files | {sheet: draw_strip(rows, prompts)}).items():
        write_atomic(file, partial(picture.save, format="PNG"))
    others = [each for each in out.iterdir() if _OURS.fullmatch(each.name) and each not in files]
    if others:
        (out / EARLIER).mkdir(exist_ok=True)
        for each in others:
            each.replace(out / EARLIER / each.name)
        progress.note(f"{len(others)} images of an earlier call are in {out / EARLIER} now")
    return Drawn(out, sheet, len(files))


def _model_with_adapter(config: RenderConfig, run: TrainConfig, vae: str | None, progress: Progress) -> Generator:
    adapter = config.adapter or (adapter_of(config.run_dir) if config.run_dir else None)
    if adapter is None:
        raise ConfigError("adapter: expected --run-dir or --adapter, got neither")
    device = take_device(config.device)
    dtype = pick_dtype(run.dtype if config.dtype == "auto" else config.dtype, device)
    name, revision = config.model or run.model, config.revision or (None if config.model else run.revision)
    progress.note(f"model {name} on {device} in {str(dtype).removeprefix('torch.')}, adapter {adapter}")
    model = load_model(name, revision, device, dtype, vae)
    model.load_adapter(adapter)
    return model


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40] or "prompt"
