"""The steps of a run: render, score, update and record; then a checkpoint and held-out scores when they are due."""

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from esengine.base.errors import OutOfMemory, RewardError, RunError, Stopped, UpdateError
from esengine.base.files import replace_file
from esengine.base.group import Group
from esengine.base.progress import Progress
from esengine.es.engine import Engine, Task
from esengine.es.population import Population
from esengine.models import write_diffusers_lora
from esengine.rewards import COMBINED, Weighted
from esengine.rewards.fault_tolerant import MAX_BAD, FaultTolerant, too_many
from esengine.run import checkpoint
from esengine.run import state as run_state
from esengine.run.folder import RunFolder
from esengine.run.held_out import HeldOut
from esengine.run.log import RunLog
from esengine.run.settings import TrainConfig, to_yaml
from esengine.run.stop import Stop
from esengine.sampling.rollout import Renderer, render_all, score_task

STRIP_PROMPTS = 8


@dataclass(frozen=True)
class Record:
    """The outputs of the leading process.

    Attributes:
        folder: the run folder, locked by this process.
        meta: the meta of every checkpoint.
        log: metrics, fitness, pictures.
        guard: measures held-out rewards; None if the run has none.
    """

    folder: RunFolder
    meta: dict
    log: RunLog
    guard: HeldOut | None


@dataclass(frozen=True)
class Run:
    """The parts of a run that are the same in every step. `record` is None except in the leading process."""

    config: TrainConfig
    reward: Weighted
    render: Renderer
    progress: Progress
    group: Group
    record: Record | None


def take_steps(run: Run, engine: Engine, stop: Stop, *, resumed: bool) -> None:
    """Take all steps up to the last. On a signal the current chunk is finished and a checkpoint is written.

    Raises:
        Stopped: a signal came.
        RewardError, RenderError, UpdateError: a step failed. The adapter is as before that step, and a checkpoint of
            it is written.
        RunError: the adapters of the processes differ, or a process has ended.
    """
    checkpoints = Checkpoints(run, engine, resumed=resumed)
    with checkpoints, _progress(run, engine), stop.gently():
        _measure_held_out(run, engine, stop)
        for task in engine.tasks(until=run.config.steps):
            scores, seconds = _score(run, engine, task, stop)
            _draw_strip(run, engine, task, scores, stop)
            with checkpoints.all_or_nothing(UpdateError, OutOfMemory):
                metrics = _update(run, engine, task, scores, seconds)
            run.progress.step(engine.step, run.config.steps, metrics)
            checkpoints.after_step()
            _measure_held_out(run, engine, stop)


class Checkpoints:
    """Saves the engine every `checkpoint_every` steps, after the last step, and when the run ends early.

    Use it in a `with` statement around the steps. It does not save while the adapter, the step number and the log may
    be inconsistent, or while the processes may differ.
    """

    def __init__(self, run: Run, engine: Engine, *, resumed: bool):
        self.run, self.engine, self._agree = run, engine, True
        record = run.record
        if resumed and record:
            save_adapter(engine.population, record.folder.adapter, run.render.model.denoiser)
        if record:  # before the first checkpoint, because a run with a checkpoint can be resumed
            replace_file(record.folder.config, (to_yaml(run.config) + run_state.signature(record.meta)).encode())
        self._compare()
        self.saved_step = engine.step
        if not resumed:
            self._save()

    def after_step(self) -> None:
        """Save if a checkpoint is due."""
        config = self.run.config
        if self.engine.step % config.checkpoint_every == 0 or self.engine.step == config.steps:
            self._compare()
            self._save()

    @contextmanager
    def all_or_nothing(self, *harmless: type[Exception]) -> Iterator[None]:
        """After an error inside, the state is never saved, unless the error is `harmless`: it changes nothing."""
        self._agree = False
        try:
            yield
        except harmless:
            self._agree = True
            raise
        self._agree = True

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> None:
        unsaved = self.engine.step > self.saved_step
        try:
            if unsaved and isinstance(error, Stopped):  # in every process, after the same step
                self._compare()
        finally:
            if unsaved and self._agree:
                self._save()
        if error is None and self.run.record:  # `save` removes them too, but not if there was no step to take
            checkpoint.remove_temporaries(self.run.record.folder.checkpoints)

    def _compare(self) -> None:
        """Raise RunError unless every process has the same adapter."""
        with self.all_or_nothing():
            own = torch.frombuffer(bytearray.fromhex(adapter_sha256(self.engine.population)), dtype=torch.uint8)
            hashes = [bytes(each.tolist()).hex() for each in self.run.group.gather(own)]
            for rank, each in enumerate(hashes):
                if each != hashes[0]:
                    step = self.engine.step
                    raise RunError(f"process {rank}: its adapter differs from that of process 0 after step {step}")

    def _save(self) -> None:
        """Write a checkpoint, in the leading process only."""
        run, engine = self.run, self.engine
        if record := run.record:
            limits = {"limit": run.render.limit, "scoring_limit": run.reward.limit}
            meta = record.meta | limits | {"adapter_sha256": adapter_sha256(engine.population)}
            record.log.sync()  # a checkpoint is never ahead of its logs
            checkpoint.save(record.folder.checkpoints, engine.step, run_state.tensors(engine), meta)
            save_adapter(engine.population, record.folder.adapter, run.render.model.denoiser)
        self.saved_step = engine.step


@contextmanager
def _progress(run: Run, engine: Engine) -> Iterator[None]:
    """Show a progress bar of the run's images inside the block."""
    per_step = engine.ask().images
    run.progress.start(run.config.steps * per_step, engine.step * per_step)
    try:
        yield
    finally:
        run.progress.stop()


def _measure_held_out(run: Run, engine: Engine, stop: Stop) -> None:
    """Score the held-out prompts if a measurement is due."""
    guard = run.record and run.record.guard
    if guard and guard.due(engine.step, run.config.steps):
        guard.measure(engine.step, lambda: stop.requested)


def _update(
    run: Run, engine: Engine, task: Task, scores: dict[str, torch.Tensor], seconds: dict[str, float]
) -> dict[str, float]:
    """Update the adapter and record the step. Returns the metrics of the step."""
    start = time.perf_counter()
    result = engine.tell(task, scores[COMBINED])
    update = time.perf_counter() - start
    seconds = seconds | {"seconds_update": update, "seconds": seconds["seconds"] + update}
    fitness = result.pop("fitness")
    metrics = _metrics(run, task, scores) | result
    metrics |= {"images_per_second": task.images / seconds["seconds"], **seconds}
    if run.record:
        run.record.log.log(task.step, metrics, fitness)
    return metrics


def _draw_strip(run: Run, engine: Engine, task: Task, scores: dict[str, torch.Tensor], stop: Stop) -> None:
    """Write a strip of the best, median and worst member of this step if one is due, before the adapter is updated.

    Raises:
        Stopped: a signal came. Nothing is written, and a resumed run repeats the step.
    """
    every = run.config.strip_every
    if not every or (task.step % every and task.step != run.config.steps - 1):
        return
    strip = {}
    if run.record:
        strip = _strip(run, engine.population, task, engine.fitness(task, scores[COMBINED]), stop)
    if run.group.any(stop.requested):
        raise Stopped(f"stopped in step {task.step}")
    if run.record:
        run.record.log.strip(task.step, strip, run.render.words(task.prompts[:STRIP_PROMPTS]))
        for name, score in scores.items():
            means = score.mean(dim=(1, 2))
            run.record.log.histogram(task.step, f"members/{name}", means[means.isfinite()])


def save_adapter(population: Population, path: Path, denoiser: str = "transformer") -> None:
    """Write the adapter into one folder, once for PEFT and once for the pipeline's `load_lora_weights`.

    Args:
        population: the population.
        path: the folder.
        denoiser: the pipeline's name of the population's module.
    """
    population.save_pretrained(path)
    scaling = {name: layer.scale for name, layer in population.layers.items()}
    write_diffusers_lora(path, population.lora(), scaling, denoiser)


def adapter_sha256(population: Population) -> str:
    """SHA-256 of the adapter: names and bytes of its tensors, in the order of the names."""
    found = hashlib.sha256()
    for name, parameter in sorted(population.parameters().items()):
        found.update(name.encode())
        found.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _share_limits(run: Run) -> None:
    """After out-of-memory in one process, set the smaller batch limit in all processes. A resumed run uses it too."""
    for part, what in ((run.render, "in one forward"), (run.reward, "scored together")):
        limits = [int(each) for each in run.group.gather(torch.tensor([part.limit or 0]))]
        least = min(filter(None, limits), default=None)
        if least != part.limit:
            process = limits.index(least)
            run.progress.note(f"warning: memory ran out in process {process}: from here on {least} {what} at most")
            part.limit = least


def _score(run: Run, engine: Engine, task: Task, stop: Stop) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The step's scores by name, and its times. With `drop_pairs` a score is NaN where a reward failed."""
    reward = FaultTolerant(run.reward, task.images) if engine.drop_pairs else run.reward
    scores, seconds = score_task(
        run.render,
        reward,
        engine.population,
        task,
        run.progress.images,
        stopped=lambda: stop.requested,
        group=run.group,
    )
    _share_limits(run)
    bad = ~scores[COMBINED].isfinite()
    if bad.any():
        first = reward.first if engine.drop_pairs else None
        if first:
            run.progress.note(f"warning: {first}")
        count, members = int(bad.sum()), bad.any(2).any(1)
        if count > MAX_BAD * task.images:  # count and images of all processes together
            raise RewardError(f"step {task.step}: {too_many(count, task.images)}") from first
        if members.view(-1, 2).any(1).all():
            raise RewardError(f"step {task.step}: every antithetic pair has an image without a score") from first
        which = _some(members.nonzero().flatten().tolist())
        run.progress.note(
            f"warning: step {task.step}: {count} of {task.images} images have no score (members {which}); "
            "they and their antithetic halves have no part in the update"
        )
    return scores, seconds


def _some(members: list[int]) -> str:
    return ", ".join(map(str, members[:8])) + (f", ... {len(members)} in all" if len(members) > 8 else "")


def _metrics(run: Run, task: Task, scores: dict[str, torch.Tensor]) -> dict[str, float]:
    """Mean scores over the images with a score, and the spread of the members whose images all have a score."""
    whole = scores[COMBINED].mean(dim=(1, 2))
    members = whole[whole.isfinite()]
    found = {
        "reward": _mean(scores[COMBINED]),
        "reward_best": float(members.max()),
        "reward_worst": float(members.min()),
        "reward_std": float(members.std(unbiased=False)),
        **{f"reward/{name}": _mean(scores[name]) for name in run.reward.names},
    }
    if run.config.on_bad_reward == "drop-pair":
        pairs = scores[COMBINED].isfinite().all(2).all(1).view(-1, 2).all(1)
        found["dropped_pairs"] = int((~pairs).sum())
    return found


def _mean(scores: torch.Tensor) -> float:
    return float(scores[scores.isfinite()].mean())


def _strip(run: Run, population: Population, task: Task, fitness: torch.Tensor, stop: Stop) -> dict[str, torch.Tensor]:
    """Render the best, median and worst member of this step again, since images are not kept. Fewer if stopped."""
    order = fitness.argsort(descending=True).tolist()
    prompts = task.prompts[:STRIP_PROMPTS]
    images = {}
    for label, member in (("best", order[0]), ("median", order[len(order) // 2]), ("worst", order[-1])):
        rows = render_all(run.render, task.step, prompts, member, population, stopped=lambda: stop.requested)
        if parts := [drawn for drawn, _ in rows]:
            images[label] = torch.cat(parts)
    return images
