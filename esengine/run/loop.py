"""The steps of a run: render, score, update and record; then checkpoints, held-out scores and trackers."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from esengine.base.errors import OutOfMemory, RewardError, UpdateError
from esengine.base.group import Group
from esengine.base.progress import Progress
from esengine.es.engine import Engine, Task
from esengine.rewards import COMBINED, Weighted
from esengine.rewards.fault_tolerant import MAX_BAD, FaultTolerant, too_many
from esengine.run.hooks import Hook
from esengine.run.journal import Step, Writer, plain
from esengine.run.person import Person
from esengine.run.saving import Checkpoints
from esengine.run.settings import TrainConfig
from esengine.run.stop import Stop
from esengine.sampling import reward_decoder
from esengine.sampling.rollout import Renderer, judge_task, score_task


@dataclass(frozen=True)
class Run:
    """The parts of a run that are the same in every step.

    In the leading process alone there is a journal, and `ended` may say that no step is to follow. `person` judges the
    images if a person is the reward.
    """

    config: TrainConfig
    reward: Weighted
    render: Renderer
    progress: Progress
    group: Group
    journal: Writer | None = None
    ended: Callable[[], bool] = lambda: False
    person: Person | None = None


def take_steps(run: Run, engine: Engine, stop: Stop, checkpoints: Checkpoints, hooks: Sequence[Hook]) -> None:
    """Take all steps up to the last. On a signal the current chunk is finished and a checkpoint is written.

    Raises:
        Stopped: a signal came, or the run has ended.
        RewardError, RenderError, UpdateError: a step failed. The adapter is as before that step, and a checkpoint of
            it is written.
        RunError: the adapters of the processes differ, or a process has ended.
    """
    with checkpoints, _progress(run, engine), stop.gently():
        flat = False
        for hook in hooks:
            hook.start(engine.step)
        for task in engine.tasks(until=run.config.steps):
            scores, seconds = _score(run, engine, task, stop)
            checked = _check_decoder(run, engine, task, scores, stop)
            for hook in hooks:
                hook.before_update(task, scores)
            metrics = _metrics(run, task, scores) | checked  # before the update, so that an error here changes nothing
            with checkpoints.all_or_nothing(UpdateError, OutOfMemory):
                step = _update(run, engine, task, scores[COMBINED], metrics, seconds)
            if not flat and not any(step.fitness):
                flat = True
                run.progress.note(
                    f"warning: step {task.step} changes nothing: all members have the same score on each prompt; "
                    "this is said once"
                )
            for hook in hooks:
                hook.after_step(step)


@contextmanager
def _progress(run: Run, engine: Engine) -> Iterator[None]:
    """Show a progress bar of the run's images inside the block."""
    per_step = engine.ask().images
    run.progress.start(run.config.steps * per_step, engine.step * per_step)
    try:
        yield
    finally:
        run.progress.stop()


def _update(
    run: Run,
    engine: Engine,
    task: Task,
    scores: torch.Tensor,
    metrics: dict[str, float],
    seconds: dict[str, float],
) -> Step:
    """Update the adapter with the combined scores, and record the step with what was measured before."""
    start = time.perf_counter()
    result = engine.tell(task, scores)
    update = time.perf_counter() - start
    seconds = seconds | {"seconds_update": update, "seconds": seconds["seconds"] + update}
    fitness = result.pop("fitness").tolist()
    metrics = metrics | result
    metrics |= {"images_per_second": task.images / seconds["seconds"], **seconds}
    step = Step(task.step, fitness, plain(metrics))
    if run.journal:
        run.journal.append(step)
    return step


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
    if run.person:
        of = dict(names=run.reward.names, stopped=lambda: stop.requested or run.ended())
        judge = partial(run.person.scores, task, stopped=of["stopped"])
        return judge_task(run.render, judge, engine.population, task, run.progress.images, **of)
    reward = FaultTolerant(run.reward, task.images) if engine.drop_pairs else run.reward
    scores, seconds = score_task(
        run.render,
        reward,
        engine.population,
        task,
        run.progress.images,
        stopped=lambda: stop.requested or run.ended(),
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
            "they and their antithetic halves are left out of the update"
        )
    return scores, seconds


def _check_decoder(
    run: Run, engine: Engine, task: Task, scores: dict[str, torch.Tensor], stop: Stop
) -> dict[str, float]:
    """Every so many steps, metrics that compare the reward's decoder with the model's own. See `reward_decoder`."""
    image = run.config.image
    if run.person or image.reward_vae is None or not image.reward_vae_check or task.step % image.reward_vae_check:
        return {}
    reward = FaultTolerant(run.reward, task.images) if engine.drop_pairs else run.reward
    stopping = dict(stopped=lambda: stop.requested, group=run.group)
    full, _ = score_task(run.render, reward, engine.population, task, lambda images: None, **stopping, full=True)
    _share_limits(run)
    found = reward_decoder.compare(engine, task, scores, full)
    if text := reward_decoder.warning(found):
        run.progress.note(f"warning: step {task.step}: {text}")
    return found


def _some(members: list[int]) -> str:
    return ", ".join(map(str, members[:8])) + (f", ... {len(members)} in all" if len(members) > 8 else "")


def _metrics(run: Run, task: Task, scores: dict[str, torch.Tensor]) -> dict[str, float]:
    """Mean scores over the images with a score, and the spread of the members whose images all have a score.

    They are computed in float64, because sums of large float32 scores are not finite.
    """
    whole = scores[COMBINED].double().mean(dim=(1, 2))
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
    return float(scores[scores.isfinite()].double().mean())
