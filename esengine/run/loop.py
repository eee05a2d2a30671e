"""The steps of a run: render, score, update, log, and checkpoints between them."""

import hashlib
import time
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
from esengine.rewards.fault_tolerant import MOST_BAD, Bearing, too_many
from esengine.run import checkpoint
from esengine.run import state as run_state
from esengine.run.folder import RunFolder
from esengine.run.held_out import Guard
from esengine.run.log import RunLog
from esengine.run.settings import TrainConfig, to_yaml
from esengine.run.stop import Stop
from esengine.sampling.rollout import Renderer, render_all, score_task

STRIP_PROMPTS = 8


@dataclass(frozen=True)
class Record:
    """What the leading process writes to.

    Attributes:
        folder: of the run, held.
        meta: of every checkpoint.
        log: metrics, fitness, pictures.
        guard: measures held-out rewards; None for none.
    """

    folder: RunFolder
    meta: dict
    log: RunLog
    guard: Guard | None


@dataclass(frozen=True)
class Run:
    """The parts of a run that do not change from step to step; `record` is None in processes that do not lead."""

    config: TrainConfig
    reward: Weighted
    render: Renderer
    progress: Progress
    group: Group
    record: Record | None


def take_steps(run: Run, engine: Engine, stop: Stop, *, resumed: bool) -> None:
    """Go on to the last step. On SIGTERM or SIGINT the chunk is finished and a checkpoint written.

    Raises:
        Stopped: after such a signal.
        RewardError, RenderError, UpdateError: a step failed; the adapter is as before it, and a checkpoint of that is
            written.
        RunError: the processes of the group have come to differ, or one has ended.
    """
    config, record = run.config, run.record
    if resumed and record:
        save_adapter(engine.population, record.folder.adapter)
    if record:  # before the first checkpoint: a run that has one can be resumed
        replace_file(record.folder.config, (to_yaml(config) + run_state.signature(record.meta)).encode())
    _compare(run, engine)
    kept = engine.step if resumed else _save(run, engine)
    per_step = engine.ask().images
    run.progress.start(config.steps * per_step, engine.step * per_step)
    settled = True  # the adapter, the step's number and its metrics agree, and so do the processes
    try:
        with stop.gently():
            while True:
                if record and record.guard and record.guard.due(engine.step, config.steps):
                    record.guard.measure(engine.step, lambda: stop.requested)
                if engine.step == config.steps:
                    break
                task = engine.ask()
                scores, seconds = _score(run, engine, task, stop)
                fitness = engine.fitness(task, scores[COMBINED])
                shown = config.strip_every and (task.step % config.strip_every == 0 or task.step == config.steps - 1)
                if shown:
                    strip = _strip(run, engine.population, task, fitness, stop) if record else {}
                    if run.group.any(stop.requested):  # before anything is written: a resumed run makes the step anew
                        raise Stopped(f"stopped in step {task.step}")
                    if record:
                        record.log.strip(task.step, strip, run.render.words(task.prompts[:STRIP_PROMPTS]))
                        for name, score in scores.items():
                            means = score.mean(dim=(1, 2))
                            record.log.histogram(task.step, f"members/{name}", means[means.isfinite()])
                start, settled = time.perf_counter(), False
                try:
                    norms = engine.tell(task, scores[COMBINED])
                except (UpdateError, OutOfMemory):
                    settled = True  # nothing has changed
                    raise
                seconds["seconds_update"] = time.perf_counter() - start
                seconds["seconds"] += seconds["seconds_update"]
                metrics = _metrics(run, task, scores) | norms
                metrics |= {"images_per_second": task.images / seconds["seconds"], **seconds}
                if record:
                    record.log.log(task.step, metrics, fitness)
                settled = True
                run.progress.step(engine.step, config.steps, metrics)
                if engine.step % config.checkpoint_every == 0 or engine.step == config.steps:
                    settled = False
                    _compare(run, engine)
                    settled = True
                    kept = _save(run, engine)
    except Stopped:  # in every process, after the same step
        if engine.step > kept:
            settled = False
            _compare(run, engine)
            settled = True
        raise
    finally:
        run.progress.stop()
        if settled and engine.step > kept:
            _save(run, engine)
    if record:  # where no step was left to take, nothing was saved
        checkpoint.remove_temporaries(record.folder.checkpoints)


def save_adapter(population: Population, path: Path) -> None:
    """Write the adapter for PEFT and, in the same folder, for `SanaSprintPipeline.load_lora_weights`."""
    population.save_pretrained(path)
    scaling = {name: layer.scale for name, layer in population.layers.items()}
    write_diffusers_lora(path, population.lora(), scaling)


def adapter_sha256(population: Population) -> str:
    """Of the adapter's bytes, in the order of its names."""
    found = hashlib.sha256()
    for name, parameter in sorted(population.parameters().items()):
        found.update(name.encode())
        found.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _compare(run: Run, engine: Engine) -> None:
    """Raises RunError unless every process has come to the same adapter."""
    own = torch.frombuffer(bytearray.fromhex(adapter_sha256(engine.population)), dtype=torch.uint8)
    hashes = [bytes(each.tolist()).hex() for each in run.group.gather(own)]
    for rank, each in enumerate(hashes):
        if each != hashes[0]:
            raise RunError(f"process {rank}: its adapter differs from that of process 0 after step {engine.step}")


def _save(run: Run, engine: Engine) -> int:
    """Write a checkpoint, in the process that does. Returns the step."""
    if record := run.record:
        limits = {"limit": run.render.limit, "scoring_limit": run.reward.limit}
        meta = record.meta | limits | {"adapter_sha256": adapter_sha256(engine.population)}
        record.log.sync()  # a checkpoint is never ahead of its logs
        checkpoint.save(record.folder.checkpoints, engine.step, run_state.tensors(engine), meta)
        save_adapter(engine.population, record.folder.adapter)
    return engine.step


def _share_limits(run: Run) -> None:
    """Where memory ran out in one process, all go on in parts as small, as they do where the run is resumed."""
    for part, what in ((run.render, "in one forward"), (run.reward, "scored together")):
        limits = [int(each) for each in run.group.gather(torch.tensor([part.limit or 0]))]
        least = min(filter(None, limits), default=None)
        if least != part.limit:
            process = limits.index(least)
            run.progress.note(f"warning: memory ran out in process {process}: from here on {least} {what} at most")
            part.limit = least


def _score(run: Run, engine: Engine, task: Task, stop: Stop) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The step's scores by name; NaN where a reward failed, if such pairs may be dropped."""
    reward = Bearing(run.reward, task.images) if engine.drop_pairs else run.reward
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
        if count > MOST_BAD * task.images:  # of all processes together
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
    """Means over the images that have a score, and the spread of the members whose images all have one."""
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
    """The best, median and worst member of this step, rendered again: images are never kept. Less if stopped."""
    order = fitness.argsort(descending=True).tolist()
    prompts = task.prompts[:STRIP_PROMPTS]
    images = {}
    for label, member in (("best", order[0]), ("median", order[len(order) // 2]), ("worst", order[-1])):
        rows = render_all(run.render, task.step, prompts, member, population, stopped=lambda: stop.requested)
        if parts := [drawn for drawn, _ in rows]:
            images[label] = torch.cat(parts)
    return images
