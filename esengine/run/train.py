"""A training run: prompts -> render -> score -> fitness -> update -> checkpoint, in a folder that can be resumed."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch.nn.functional import interpolate

from esengine.base.errors import Stopped
from esengine.base.files import replace_file, write_atomic
from esengine.base.group import Group
from esengine.base.progress import Progress
from esengine.evaluation.benchmarks import Benchmark
from esengine.evaluation.draw import Batch, Plan, compare_entries
from esengine.evaluation.entries import default_entries
from esengine.evaluation.statistics import Report
from esengine.run.dry_run import check_members
from esengine.run.folder import RunFolder, checkpoint_folders, path_step
from esengine.run.held_out import HeldOut
from esengine.run.hooks import Outputs, ShowProgress, Strips, Track
from esengine.run.journal import Writer
from esengine.run.loop import Run, take_steps
from esengine.run.pictures import draw_strip
from esengine.run.prepare import Inputs, Prepared, prepare, read_inputs
from esengine.run.saving import Checkpoints
from esengine.run.settings import TrainConfig, to_yaml
from esengine.run.state import changes
from esengine.run.stop import Stop
from esengine.run.trackers import Trackers, open_trackers

SHOWN_PROMPTS = 8
"""Number of held-out prompts in comparison.png."""


@dataclass(frozen=True)
class Result:
    """The result of a finished run.

    Attributes:
        folder: the run folder.
        comparison: base against adapter on held-out prompts.
        parted: the step at which each held-out reward diverged from the optimised one. Others have no entry.
    """

    folder: Path
    comparison: Report
    parted: dict[str, int]


def train(config: TrainConfig, progress: Progress | None = None, stop: Stop | None = None) -> Result | None:
    """Run or resume a training run to its last step, then compare base and adapter on held-out prompts.

    Under torchrun the processes share the work of each step. The leading process does everything else and returns the
    result; the others return None. Without a `Stop` this function installs no signal handlers. Pass `Stop()` to end a
    run gracefully on SIGTERM or SIGINT.

    Raises:
        ConfigError: a setting, file or reward cannot be used. No step is made.
        RunError: the run folder is in use, holds another run, or has nothing to resume.
        RewardError, RenderError: a step failed. The adapter is as before that step, and a checkpoint of it is written.
        Stopped: a signal came, and `stop` was given. The message says how to resume. A signal during the steps leaves a
            checkpoint.
    """
    group = Group.join()
    try:
        progress = progress if progress and group.is_main else Progress()
        if stop is None:
            return _train(config, progress, group, Stop())
        with stop:  # after the processes have met, for which a signal would not be seen
            return _train(config, progress, group, stop)
    except Stopped:
        if group.is_main:
            raise
        return None  # only the leading process reports it
    finally:
        group.leave()


def _train(config: TrainConfig, progress: Progress, group: Group, stop: Stop) -> Result | None:
    inputs = read_inputs(config, group)
    config = inputs.config
    with _resumable(inputs.run_dir, config.steps, stop), _folder(inputs.run_dir, config.resume, group) as folder:
        ready = prepare(inputs, folder, progress, group)
        if ready.before is None or changes(ready.before.start, ready.start):
            check_members(ready)
        render = ready.renderer(ready.texts, progress)
        run = Run(ready.config, ready.rewards.optimised, render, progress, group)
        if not group.is_main:
            checkpoints = _checkpoints(run, ready, None)
            take_steps(run, ready.engine, stop, checkpoints, [checkpoints])
            return None
        with (
            Writer(folder.journal, ready.start, ready.before) as journal,
            _trackers(ready, folder, progress) as trackers,
        ):
            replace_file(folder.config, to_yaml(ready.config).encode())
            run = dataclasses.replace(run, journal=journal)
            out = Outputs(folder, journal, trackers, progress.note)
            held_out = _held_out(ready, out, progress, stop)
            checkpoints = _checkpoints(run, ready, out)
            hooks = [ShowProgress(progress, config.steps), Track(trackers), *_strips(run, ready, out)]
            take_steps(run, ready.engine, stop, checkpoints, [*hooks, checkpoints, *held_out])
        ready.engine.population.detach()
        comparison = _compare(ready, folder, render.limit, inputs, progress)
        parted = held_out[0].parted() if held_out else {}
        for name in parted:
            progress.note(f"warning: {held_out[0].warning(name)}")
        return Result(Path(folder.path), comparison, parted)


def _checkpoints(run: Run, ready: Prepared, to: Outputs | None) -> Checkpoints:
    schedule = dict(every=run.config.checkpoint_every, last=run.config.steps, resumed=ready.before is not None)
    return Checkpoints(ready.engine, group=run.group, render=run.render, reward=run.reward, to=to, **schedule)


@contextmanager
def _trackers(ready: Prepared, folder: RunFolder, progress: Progress) -> Iterator[Trackers]:
    """The run's trackers, started with its settings at its next step."""
    resumed_at = ready.engine.step if ready.before else None
    trackers = open_trackers(folder.path, folder.tensorboard, ready.config.trackers, resumed_at, progress.note)
    trackers.start({**ready.start.settings, "identity": ready.start.identity})
    try:
        yield trackers
    finally:
        trackers.finish()


def _strips(run: Run, ready: Prepared, out: Outputs) -> list[Strips]:
    """The hook that draws strips. Empty if `strip_every` is 0."""
    config = run.config
    if not config.strip_every:
        return []
    return [Strips(out, ready.engine, run.render, every=config.strip_every, last=config.steps - 1)]


def _held_out(ready: Prepared, out: Outputs, progress: Progress, stop: Stop) -> list[HeldOut]:
    """The hook that measures held-out rewards. Empty if `heldout_every` is 0."""
    config = ready.config
    if not config.heldout_every:
        return []
    schedule = dict(prompts=config.heldout_prompts, every=config.heldout_every, last=config.steps)
    stopping = dict(stopped=lambda: stop.requested, drop_bad=ready.engine.drop_pairs)
    return [HeldOut(out, ready.rewards, ready.renderer(ready.held_out, progress), **schedule, **stopping)]


def _compare(ready: Prepared, folder: RunFolder, limit: int | None, inputs: Inputs, progress: Progress) -> Report:
    """Compare base and adapter on the held-out prompts, and write eval.json and comparison.png."""
    prompts, nothing = inputs.eval_prompts, (None,) * len(inputs.eval_prompts)
    progress.note(f"comparing base and adapter on {len(prompts)} held-out prompts")
    config, images = ready.config, {}
    comparison = compare_entries(
        ready.model,
        ready.held_out,
        ready.rewards.everything,
        Plan(
            entries=default_entries(ready.settings.num_steps, folder.adapter, two_steps=False),
            prompts=len(prompts),
            repeats=config.es.repeats,
            seed=config.seed,
            settings=ready.settings,
            chunk=limit or config.image.chunk,
        ),
        benchmark=Benchmark("prompts", tuple(prompts), nothing, nothing, inputs.eval_metadata),
        progress=lambda done, total: progress.count("images", done, total),
        watch=lambda batch: _keep_images(images, batch),
        drop_bad=ready.engine.drop_pairs,
    )
    if left_out := comparison.settings.get("prompts_left_out"):
        progress.note(f"warning: {left_out} prompts have an image without a score and are not compared")
    replace_file(Path(folder.path) / "eval.json", comparison.to_json().encode())
    if images:
        _draw_comparison(Path(folder.path) / "comparison.png", images, prompts)
    return comparison


@contextmanager
def _resumable(run_dir: Path, steps: int, stop: Stop) -> Iterator[None]:
    """Replace an exception that a signal caused by a `Stopped` whose message says how to resume."""
    try:
        yield
    except (KeyboardInterrupt, Stopped) as error:
        if isinstance(error, KeyboardInterrupt) and not stop.requested:
            raise
        kept = checkpoint_folders(run_dir / "checkpoints")
        if not kept:
            raise Stopped("stopped before the first step: there is nothing to resume") from error
        again = f"to continue: esengine train --run-dir {run_dir} --resume"
        raise Stopped(f"stopped after step {path_step(kept[0])} of {steps}; {again}") from error


def _keep_images(images: dict[str, list[torch.Tensor]], batch: Batch) -> None:
    """Keep the first image of each of the first `SHOWN_PROMPTS` prompts, at most 256 pixels wide, by entry."""
    for image, (prompt, repeat) in zip(batch.images, batch.rows, strict=True):
        if prompt < SHOWN_PROMPTS and repeat == 0:
            height, width = image.shape[1:]
            size = (max(1, round(height * 256 / width)), 256) if width > 256 else (height, width)
            small = interpolate(image[None].float().cpu(), size, mode="bilinear", antialias=True)
            images.setdefault(batch.entry.label, []).append(small[0].round().byte())


def _draw_comparison(path: Path, images: dict[str, list[torch.Tensor]], prompts: Sequence[str]) -> None:
    """Write the base's images above the adapter's, four prompts in a row."""
    rows = {label: torch.stack(each) for label, each in zip(("base", "ES-LoRA"), images.values(), strict=True)}
    strips = [
        draw_strip({label: row[at : at + 4] for label, row in rows.items()}, prompts[at : at + 4])
        for at in range(0, len(rows["base"]), 4)
    ]
    picture = Image.new("RGB", (strips[0].width, sum(strip.height for strip in strips)), color="white")
    for index, strip in enumerate(strips):
        picture.paste(strip, (0, index * strips[0].height))
    write_atomic(path, picture.save)


@contextmanager
def _folder(path: Path, resume: bool, group: Group) -> Iterator[RunFolder]:
    """The run folder. The leading process locks it; the others wait for the lock and then read the folder."""
    if not group.is_main:
        group.wait()
        yield RunFolder(path, None)
        return
    with RunFolder.open(path, resume=resume) as folder:
        group.wait()
        yield folder
