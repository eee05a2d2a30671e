"""Looking at an adapter that exists: compare it with the base model, or draw with both."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from esengine.config import EvalConfig, RenderConfig, TrainConfig, load_run
from esengine.errors import ConfigError
from esengine.evaluate import EVAL_STEP, Comparison, compare
from esengine.models import SanaSprint
from esengine.prompts import HELDOUT, read_prompts
from esengine.rewards import parse
from esengine.runlog import draw_strip
from esengine.setup import load_model, pick_chunk, pick_device, pick_dtype, render_settings
from esengine.train import Progress, encode


@dataclass(frozen=True)
class Drawn:
    """What `render` wrote: so many single images and one sheet of all, in a folder."""

    folder: Path
    sheet: Path
    images: int


def evaluate(config: EvalConfig, progress: Progress) -> Comparison:
    """Compare base and adapter on prompts; what the flags leave open comes from the run folder.

    Raises:
        ConfigError: no adapter, model, prompts or reward that can be used.
    """
    run = load_run(config.run_dir) if config.run_dir else TrainConfig()
    prompts = read_prompts(config.prompts or run.eval_prompts or HELDOUT)
    reward = parse(config.reward or run.reward)
    image = config.image or run.image
    model = _model_with_adapter(config, run, progress)
    (texts,) = encode(model, [prompts], image, progress)
    return compare(
        model,
        texts,
        reward,
        seed=run.seed if config.seed is None else config.seed,
        repeats=run.es.repeats if config.repeats is None else config.repeats,
        settings=render_settings(image),
        chunk=pick_chunk(image, model),
        progress=lambda done, total: progress.count("images", done, total),
    )


def render(config: RenderConfig, progress: Progress) -> Drawn:
    """Draw each prompt with the base model and the adapter, from shared latents, into a folder of PNG files."""
    run = load_run(config.run_dir) if config.run_dir else TrainConfig()
    prompts = list(config.prompts) or read_prompts(config.prompts_file or HELDOUT)[: config.limit]
    image = config.image or run.image
    model = _model_with_adapter(config, run, progress)
    (texts,) = encode(model, [prompts], image, progress)
    chunk, settings = pick_chunk(image, model), render_settings(image)
    everyone = torch.arange(len(texts))
    rows = {}
    for label, enabled in (("base", False), ("adapter", True)):
        model.adapter_enabled(enabled)
        parts = []
        for indices in everyone.split(chunk):
            parts.append(
                model.render(
                    texts,
                    seed=run.seed if config.seed is None else config.seed,
                    step=EVAL_STEP,
                    prompts=indices,
                    repeats=torch.zeros_like(indices),
                    settings=settings,
                    text_length=texts.trimmed_length(everyone),
                )
            )
            progress.count("images", sum(map(len, parts)), len(everyone))
        rows[label] = torch.cat(parts).cpu()
    config.out.mkdir(parents=True, exist_ok=True)
    for label, images in rows.items():
        for index, pixels in enumerate(images.permute(0, 2, 3, 1).numpy()):
            Image.fromarray(pixels).save(config.out / f"{index:04d}_{_slug(prompts[index])}_{label}.png")
    sheet = config.out / "base_and_adapter.png"
    draw_strip(rows, prompts).save(sheet)
    return Drawn(config.out, sheet, sum(map(len, rows.values())))


def _model_with_adapter(config: EvalConfig | RenderConfig, run: TrainConfig, progress: Progress) -> SanaSprint:
    adapter = config.adapter or (config.run_dir / "adapter" if config.run_dir else None)
    if adapter is None:
        raise ConfigError("adapter: expected --run-dir or --adapter, got neither")
    device = pick_device(config.device)
    dtype = pick_dtype(run.dtype if config.dtype == "auto" else config.dtype, device)
    name = config.model or run.model
    progress.note(f"model {name} on {device} in {str(dtype).removeprefix('torch.')}, adapter {adapter}")
    model = load_model(name, config.revision or run.revision, device, dtype)
    model.load_adapter(adapter)
    return model


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40] or "prompt"
