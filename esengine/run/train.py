"""A training run: prompts -> render -> score -> fitness -> update -> checkpoint, in a folder that can be resumed."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn.functional import interpolate

from esengine.base.errors import EsengineError, Stopped, of_setting
from esengine.base.files import replace_file, write_atomic
from esengine.base.group import Group
from esengine.base.progress import Progress
from esengine.base.prompt_files import metadata_sha256
from esengine.evaluation.benchmarks import Benchmark
from esengine.evaluation.draw import Batch, Plan, compare_entries, provenance
from esengine.evaluation.entries import ADAPTER, BASE, Entry, default_entries
from esengine.evaluation.statistics import Report
from esengine.judging import Asker
from esengine.run.dry_run import check_members
from esengine.run.folder import KEPT, RunFolder, RunPaths, checkpoint_folders, path_step
from esengine.run.guard import Guard
from esengine.run.held_out import HeldOut
from esengine.run.hooks import Call, FollowFolder, Outputs, ShowProgress, Strips, Track
from esengine.run.journal import Copied, Writer, read
from esengine.run.kept import BEST, Average
from esengine.run.loop import Run, take_steps
from esengine.run.person import Person
from esengine.run.pictures import draw_strip
from esengine.run.prepare import RUNS, Inputs, Prepared, prepare, read_inputs
from esengine.run.saving import Checkpoints, adapter_sha256
from esengine.run.settings import TrainConfig, differences, started, to_yaml
from esengine.run.state import changes
from esengine.run.stop import Stop
from esengine.run.trackers import Trackers, open_trackers
from esengine.sampling.rollout import Renderer

COMPARISON = "eval.json"
SHOWN_PROMPTS = 8
"""Number of held-out prompts in comparison.png."""


@dataclass(frozen=True)
class Result:
    """The result of a finished run.

    Attributes:
        folder: the run folder, by the name that it had at the end.
        comparison: base against adapter on held-out prompts.
        parted: the step at which each held-out reward diverged from the optimised one. Others have no entry.
        kept: steps of the other adapters that the run has kept, by kind, see `esengine.run.folder.KEPT`.
    """

    folder: Path
    comparison: Report
    parted: dict[str, int]
    kept: dict[str, int]


def train(
    config: TrainConfig,
    progress: Progress | None = None,
    stop: Stop | None = None,
    on_step: Callable[[Path], None] | None = None,
    finish: Callable[[Path], object] | None = None,
) -> Result | None:
    """Run or resume a training run to its last step, then compare base and adapter on held-out prompts.

    A finished run that is resumed is left as it is, and a note says so.

    Under torchrun the processes share the work of each step. The leading process does everything else and returns the
    result; the others return None. Without a `Stop` this function installs no signal handlers. Pass `Stop()` to end a
    run gracefully on SIGTERM or SIGINT.

    Args:
        config: the settings.
        progress: shows progress and receives notes.
        stop: see above.
        on_step: called with the run's folder after each step that is recorded and saved, in the leading process. If it
            raises, the run logs a warning and goes on.
        finish: called with the finished run's folder, while it is still locked.

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
            return _train(config, progress, group, Stop(), on_step, finish)
        with stop:  # after the processes have met, for which a signal would not be seen
            return _train(config, progress, group, stop, on_step, finish)
    except Stopped:
        if group.is_main:
            raise
        return None  # only the leading process reports it
    finally:
        group.leave()


def _train(
    config: TrainConfig,
    progress: Progress,
    group: Group,
    stop: Stop,
    on_step: Callable[[Path], None] | None,
    finish: Callable[[Path], object] | None,
) -> Result | None:
    inputs = read_inputs(config, group)
    with _opened(inputs, group, stop) as folder:
        ready = prepare(inputs, folder, progress, group)
        if ready.before is None or changes(ready.before.start, ready.start):
            check_members(ready)
        render = ready.renderer(ready.texts, progress)
        result = _finished(ready, folder, inputs) if group.is_main else None
        if group.any(result is not None):
            if result is not None:
                replace_file(folder.held.config, to_yaml(started(ready.before)).encode())
                whole = ready.engine.step >= ready.config.steps
                what = "is finished: all" if whole else "has ended, because the rewards diverge: "
                more = "give more --steps" if whole else "--heldout-action warn"
                progress.note(
                    f"run folder {folder.path} {what} {ready.engine.step} steps are taken and compared; "
                    f"{more} to train on, or esengine eval --run-dir {folder.path} to compare again"
                )
        else:
            if ready.engine.step >= ready.config.steps:
                progress.note(f"all {ready.config.steps} steps are taken; the comparison is left")
            result = _steps_and_comparison(ready, folder, render, inputs, progress, group, stop, on_step)
        if result is not None and finish is not None:
            finish(result.folder)
        return result


def _steps_and_comparison(
    ready: Prepared,
    folder: RunFolder,
    render: Renderer,
    inputs: Inputs,
    progress: Progress,
    group: Group,
    stop: Stop,
    on_step: Callable[[Path], None] | None,
) -> Result | None:
    """Take the steps that are left, then compare. None in the processes that do not lead."""
    config, run = ready.config, Run(ready.config, ready.rewards.optimised, render, progress, group)
    if not group.is_main:
        checkpoints = _checkpoints(run, ready, None)
        take_steps(run, ready.engine, stop, checkpoints, [checkpoints])
        return None

    def note(text: str) -> None:
        progress.note(folder.named(text))

    with (
        Writer(folder.held.journal, ready.start, ready.before) as journal,
        _trackers(ready, folder, note) as trackers,
        _person(ready, progress) as asker,
    ):
        replace_file(folder.held.config, to_yaml(config).encode())
        out = Outputs(folder, journal, trackers, note)
        run = dataclasses.replace(run, journal=journal)
        checkpoints = _checkpoints(run, ready, out)
        guard = _guard(ready, out, checkpoints)
        held_out = _held_out(ready, out, progress, stop, guard)
        run = dataclasses.replace(
            run, ended=lambda: guard.diverged is not None, person=asker and Person(asker, journal, config.steps)
        )
        before = [ShowProgress(progress, config.steps), FollowFolder(out), Track(trackers), *_strips(run, ready, out)]
        after = [*held_out, *([Call(on_step, out)] if on_step else [])]
        average = [Average(ready.kept)] if config.ema else []
        try:
            take_steps(run, ready.engine, stop, checkpoints, [*before, *average, checkpoints, *after])
        except Stopped:
            if stop.requested or not run.ended():
                raise
        compared = guard.finish(ready.model) or adapter_sha256(ready.engine.population)
    for kind in KEPT:
        if kind not in ready.kept and folder.held.kept(kind).is_dir():
            progress.note(f"{folder.path / KEPT[kind]} is of earlier steps: the run no longer keeps such an adapter")
    comparison = _compare(ready, folder, render.limit, inputs, compared, progress)
    parted = held_out[0].parted() if held_out else {}
    for name in parted:
        progress.note(f"warning: {held_out[0].warning(name)}")
    kept = {kind: ready.kept.facts(kind)["step"] for kind in KEPT if kind in ready.kept}
    return Result(folder.where(), comparison, parted, kept)


def _finished(ready: Prepared, folder: RunFolder, inputs: Inputs) -> Result | None:
    """The result of a run that has taken its last step, or that the guard has ended, and that has compared this adapter
    in this way; else None.
    """
    if ready.before is None or (ready.kept.by and BEST not in ready.kept):
        return None
    free = ("run_dir", "resume", "allow_change")
    try:
        run = read(folder.journal)  # `ready.before` ends with the checkpoint, the last measurement is behind it
        if run.ended and differences(run.start.settings, ready.start.settings, free):
            return None
        if not run.ended and ready.engine.step < ready.config.steps:
            return None
        plan = _plan(ready, folder, ready.limits[0], inputs.eval_prompts)
        made = json.loads((folder.path / COMPARISON).read_bytes())
        adapter = run.ended and run.ended.adapter_step < run.ended.step and made["settings"]["adapter_sha256"]
        adapter = adapter or adapter_sha256(ready.engine.population)
        now = json.loads(json.dumps(_made(ready, plan, adapter, inputs)))
        if {**made["settings"], "prompts_left_out": None} != {**now, "prompts_left_out": None}:
            return None
        comparison = Report(**made)
        comparison.table()
        kept = {kind: ready.kept.facts(kind)["step"] for kind in KEPT if kind in ready.kept}
        if BEST in kept:
            kept[BEST] = run.of(Copied)[-1].step
    except (EsengineError, OSError, ValueError, TypeError, AttributeError, RecursionError, LookupError):
        return None
    parted: dict[str, int] = {}
    for record in run.held_out:
        for name in record.parted:
            parted.setdefault(name, record.step)
    return Result(folder.where(), comparison, parted, kept)


def _plan(ready: Prepared, folder: RunPaths, limit: int | None, prompts: Sequence[str]) -> Plan:
    """The comparison of the base with the adapter, and with the other adapters that the run keeps."""
    steps = ready.settings.num_steps
    kept = [Entry(KEPT[kind], steps, folder.kept(kind)) for kind in KEPT if kind in ready.kept]
    return Plan(
        entries=(*default_entries(steps, folder.adapter, two_steps=False), *kept),
        prompts=len(prompts),
        repeats=ready.config.es.repeats,
        seed=ready.config.seed,
        settings=ready.settings,
        chunk=limit or ready.config.image.chunk,
    )


def _made(ready: Prepared, plan: Plan, adapter: str, inputs: Inputs) -> dict[str, Any]:
    """How a comparison is made: two with the same values have the same result."""
    made = provenance(ready.model, plan, ready.rewards.everything)
    prompts = hashlib.sha256("\n".join(inputs.eval_prompts).encode()).hexdigest()
    columns = metadata_sha256(inputs.eval_prompts, inputs.eval_metadata)
    return {**made, "adapter_sha256": adapter, "prompts_sha256": prompts, "metadata_sha256": columns}


def _checkpoints(run: Run, ready: Prepared, to: Outputs | None) -> Checkpoints:
    schedule = dict(every=run.config.checkpoint_every, last=run.config.steps, resumed=ready.before is not None)
    of = dict(group=run.group, render=run.render, reward=run.reward, kept=ready.kept)
    return Checkpoints(ready.engine, to=to, **of, **schedule)


def _guard(ready: Prepared, out: Outputs, checkpoints: Checkpoints) -> Guard:
    return Guard(out, ready.kept, checkpoints.save_kept, action=ready.config.heldout_action)


@contextmanager
def _trackers(ready: Prepared, folder: RunFolder, note: Callable[[str], None]) -> Iterator[Trackers]:
    """The run's trackers, started with its settings at its next step."""
    resumed_at, held = ready.engine.step if ready.before else None, folder.held
    keys = dict(record=held.path / "trackers.json", moved=lambda: folder.moved)
    trackers = open_trackers(folder.path, held.tensorboard, ready.config.trackers, resumed_at, note, **keys)
    trackers.start({**ready.start.settings, "identity": ready.start.identity})
    try:
        yield trackers
    finally:
        trackers.finish()


@contextmanager
def _person(ready: Prepared, progress: Progress) -> Iterator[Asker | None]:
    """The page on which a person judges, if a person is the reward."""
    person = ready.rewards.person
    if person is None:
        yield None
        return
    with of_setting("reward"):
        asker = Asker(person.host, person.port)
    with asker:
        progress.note(f"judge the images at {asker.url}")
        yield asker


def _strips(run: Run, ready: Prepared, out: Outputs) -> list[Strips]:
    """The hook that draws strips. Empty if `strip_every` is 0."""
    config = run.config
    if not config.strip_every:
        return []
    return [Strips(out, ready.engine, run.render, every=config.strip_every, last=config.steps - 1)]


def _held_out(ready: Prepared, out: Outputs, progress: Progress, stop: Stop, guard: Guard) -> list[HeldOut]:
    """The hook that measures held-out rewards. Empty if `heldout_every` is 0."""
    config = ready.config
    if not config.heldout_every:
        return []
    schedule = dict(prompts=config.heldout_prompts, every=config.heldout_every, last=config.steps)
    acting = dict(stopped=lambda: stop.requested, drop_bad=ready.engine.drop_pairs, measured=guard.measured)
    hook = HeldOut(out, ready.rewards, ready.renderer(ready.held_out, progress), **schedule, **acting)
    hook.at_ends = guard.by is not None
    return [hook]


def _compare(
    ready: Prepared, folder: RunFolder, limit: int | None, inputs: Inputs, adapter: str, progress: Progress
) -> Report:
    """Compare base and adapter on the held-out prompts, and write eval.json and comparison.png.

    `adapter` is the adapter's hash.
    """
    prompts, nothing = inputs.eval_prompts, (None,) * len(inputs.eval_prompts)
    progress.note(f"comparing base and adapter on {len(prompts)} held-out prompts")
    images, plan = {}, _plan(ready, folder.held, limit, prompts)
    ready.engine.population.detach()
    comparison = compare_entries(
        ready.model,
        ready.held_out,
        ready.rewards.everything,
        plan,
        benchmark=Benchmark("prompts", tuple(prompts), nothing, nothing, inputs.eval_metadata),
        settings=_made(ready, plan, adapter, inputs),
        progress=lambda done, total: progress.count("images", done, total),
        watch=lambda batch: _keep_images(images, batch),
        drop_bad=ready.engine.drop_pairs,
    )
    if left_out := comparison.settings.get("prompts_left_out"):
        progress.note(f"warning: {left_out} prompts have an image without a score and are not compared")
    replace_file(folder.held.path / COMPARISON, comparison.to_json().encode())
    if images:
        _draw_comparison(folder.held.path / "comparison.png", images, prompts)
    return comparison


@contextmanager
def _opened(inputs: Inputs, group: Group, stop: Stop) -> Iterator[RunFolder]:
    """The run folder. The leading process locks it; the others wait for the lock and then read the folder.

    An exception that a signal caused becomes a `Stopped` whose message says how to resume.
    """
    folder = RunFolder(inputs.run_dir or RUNS, None)
    try:
        if not group.is_main:
            group.wait()
            yield folder
            return
        if inputs.run_dir is None:
            folder = RunFolder.open_dated(RUNS)
        else:
            folder = RunFolder.open(inputs.run_dir, resume=inputs.config.resume)
        with folder:
            group.wait()
            yield folder
    except (KeyboardInterrupt, Stopped) as error:
        if isinstance(error, KeyboardInterrupt) and not stop.requested:
            raise
        kept = checkpoint_folders(folder.where() / "checkpoints")
        if not kept:
            raise Stopped("stopped before the first step: there is nothing to resume") from error
        again = f"to continue: esengine train --run-dir {folder.where()} --resume"
        raise Stopped(f"stopped after step {path_step(kept[0])} of {inputs.config.steps}; {again}") from error


def _keep_images(images: dict[str, list[torch.Tensor]], batch: Batch) -> None:
    """Keep the first image of each of the first `SHOWN_PROMPTS` prompts, at most 256 pixels wide, by entry."""
    for image, (prompt, repeat) in zip(batch.images, batch.rows, strict=True):
        if prompt < SHOWN_PROMPTS and repeat == 0 and batch.entry.name in (BASE, ADAPTER):
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
