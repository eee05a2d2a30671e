"""Estimates a run's time, memory and files: loads everything and renders a few images."""

import time
from dataclasses import dataclass
from pathlib import Path

from esengine.base.group import Group
from esengine.base.progress import Progress
from esengine.run import journal
from esengine.run import state as run_state
from esengine.run.folder import INIT_ADAPTER, KEPT, RunFolder, dated
from esengine.run.hooks import STRIP_PROMPTS
from esengine.run.kept import expected
from esengine.run.prepare import RUNS, Prepared, prepare, read_inputs
from esengine.run.settings import TrainConfig
from esengine.sampling.preflight import Preflight, preflight

LONGEST = 20.0
"""A whole chunk is timed if it takes less than this many seconds."""


@dataclass(frozen=True)
class Estimate:
    """What a run would take.

    Attributes:
        run_dir: its folder.
        images_per_step: images of one step.
        images: all images: of the steps, strips, held-out measurements, checks of image.reward_vae, and of the
            comparison at the end.
        seconds_render, seconds_score: time of one image in a chunk, without the time to warm up.
        chunk: images in one forward.
        weight_bytes: memory of the denoiser's weights.
        chunk_bytes: estimated memory of one forward.
        checkpoint_bytes: size of a checkpoint.
        layers: see `Preflight`.
        files: what would be written into the folder.
    """

    run_dir: Path
    images_per_step: int
    images: int
    seconds_render: float
    seconds_score: float
    chunk: int
    weight_bytes: int
    chunk_bytes: int
    checkpoint_bytes: int
    layers: dict[str, float]
    files: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Time of all images."""
        return self.images * (self.seconds_render + self.seconds_score)


def dry_run(config: TrainConfig, progress: Progress | None = None) -> Estimate:
    """Load everything that `train` would, check it, and write nothing but the text cache.

    Raises:
        ConfigError: a setting, file, reward or layer cannot be used.
        RewardError, RenderError: an image cannot be rendered or scored.
    """
    group, progress = Group.join(), progress or Progress()
    try:
        inputs = read_inputs(config, group)
        run_dir = inputs.run_dir or RUNS / dated()
        RunFolder.require_new(run_dir)
        ready = prepare(inputs, RunFolder(run_dir, None), progress, group)
        found = check_members(ready)
        return _estimate(ready, run_dir, len(inputs.eval_prompts), found, *_times(ready, found))
    finally:
        group.leave()


def check_members(ready: Prepared) -> Preflight:
    """Render members together and alone. Raises ConfigError if they differ, see `preflight`."""
    most = min(ready.config.image.chunk, ready.limits[0] or ready.config.image.chunk)
    keys = dict(seed=ready.config.seed, most=most)
    return preflight(ready.model, ready.texts, ready.settings, ready.engine.population, **keys)


def _times(ready: Prepared, found: Preflight) -> tuple[float, float]:
    """Seconds to render and to score an image, on average over a chunk, or over a few images if a chunk takes long."""
    chunk = ready.config.image.chunk
    rows, *_ = ready.engine.ask().rows().split(chunk if chunk * found.seconds < LONGEST else len(found.prompts))
    start = time.perf_counter()
    render = ready.renderer(ready.texts, Progress())
    length = ready.texts.trimmed_length(rows.prompts)
    with render.decoding():
        (images,) = render.chunks(0, [rows], ready.engine.population, length=length)
    images = images.cpu().to(ready.model.device)  # waits for them
    rendered = time.perf_counter()
    columns = render.columns(rows.prompts)
    ready.rewards.everything.score(images, render.words(rows.prompts), **columns, step=0)
    return (rendered - start) / len(images), (time.perf_counter() - rendered) / len(images)


def _estimate(
    ready: Prepared,
    run_dir: Path,
    eval_prompts: int,
    found: Preflight,
    seconds_render: float,
    seconds_score: float,
) -> Estimate:
    config, per_step = ready.config, ready.engine.ask().images
    every, held = config.heldout_every, min(config.heldout_prompts, eval_prompts)
    measurements = len({0, config.steps, *range(0, config.steps, every)}) if every else 0
    strips = len({config.steps - 1, *range(0, config.steps, config.strip_every)}) if config.strip_every else 0
    copies = expected(config)
    kept = [KEPT[kind] for kind in copies if kind in KEPT]
    checking = config.image.reward_vae_check if config.image.reward_vae is not None else 0
    checks = len(range(0, config.steps, checking)) if checking else 0
    files = [
        ", ".join((journal.NAME, "config.yaml", "tensorboard", "adapter", *kept)),
        f"checkpoints: every {config.checkpoint_every} steps, the last two are kept",
        *([f"{INIT_ADAPTER}: a copy of the adapter that the run starts from"] if config.init_adapter else []),
        *([f"strips: {strips} pictures"] if strips else []),
        *([f"heldout: {measurements} pictures of {held} images"] if measurements else []),
        "eval.json, comparison.png, report.html",
    ]
    tensors = run_state.tensors(ready.engine, ready.kept).values()
    theta = sum(each.nbytes for each in ready.engine.population.parameters().values())
    return Estimate(
        run_dir=run_dir,
        images_per_step=per_step,
        images=per_step * (config.steps + checks)
        + 3 * strips * min(STRIP_PROMPTS, config.es.prompts_per_step)
        + measurements * held
        + (2 + len(kept)) * eval_prompts * config.es.repeats,
        seconds_render=seconds_render,
        seconds_score=seconds_score,
        chunk=config.image.chunk,
        weight_bytes=sum(each.nbytes for each in ready.model.module.parameters()),
        chunk_bytes=config.image.chunk * ready.model.image_bytes(ready.settings),
        checkpoint_bytes=sum(each.nbytes for each in tensors) + len(copies) * theta,
        layers=found.layers,
        files=tuple(files),
    )
