"""Hooks of a run. A step is in the journal before `after_step` is called."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from esengine.base.files import write_atomic
from esengine.base.progress import Progress
from esengine.es.engine import Engine, Task
from esengine.rewards import COMBINED
from esengine.rewards.base import reason
from esengine.run.folder import RunFolder
from esengine.run.journal import Step, Writer
from esengine.run.pictures import draw_strip
from esengine.run.trackers import Trackers
from esengine.sampling.rollout import Renderer, render_all

STRIP_PROMPTS = 8


@dataclass(frozen=True)
class Outputs:
    """Where the leading process writes.

    Attributes:
        folder: the run folder, locked by this process.
        journal: the run's journal.
        trackers: the run's trackers.
        note: receives warnings, one line each.
    """

    folder: RunFolder
    journal: Writer
    trackers: Trackers
    note: Callable[[str], None]


class Hook:
    """The base class does nothing."""

    def start(self, done: int) -> None:
        """Before the first step of this process; `done` steps are done."""

    def before_update(self, task: Task, scores: dict[str, torch.Tensor]) -> None:
        """The task is scored, [N, P, R] by name, and the adapter is not updated yet. Must not raise."""

    def after_step(self, step: Step) -> None:
        """The step is recorded, and the adapter is updated."""


class ShowProgress(Hook):
    """Shows each step. `steps` is the number of steps of the run."""

    def __init__(self, progress: Progress, steps: int):
        self.progress, self.steps = progress, steps

    def after_step(self, step: Step) -> None:
        self.progress.step(step.step + 1, self.steps, step.numbers)


class FollowFolder(Hook):
    """Says once if the run folder was moved. The run goes on in the folder that it has locked."""

    def __init__(self, out: Outputs):
        self.out, self.said = out, False

    def after_step(self, step: Step) -> None:
        if not self.said and self.out.folder.moved:
            self.said = True
            folder = self.out.folder
            self.out.note(
                f"warning: run folder {folder.path} was moved or replaced: the run goes on in {folder.where()}"
            )


class Track(Hook):
    """Sends the numbers of each step to the trackers."""

    def __init__(self, trackers: Trackers):
        self.trackers = trackers

    def after_step(self, step: Step) -> None:
        self.trackers.log(step.step, step.numbers)


class Call(Hook):
    """Calls a function with the run's folder after each step. If it raises, a warning is logged."""

    def __init__(self, function: Callable[[Path], None], out: Outputs):
        self.function, self.out = function, out

    def after_step(self, step: Step) -> None:
        try:
            self.function(self.out.folder.where())
        except Exception as error:
            self.out.note(f"warning: step {step.step}: {reason(error)}")


class Strips(Hook):
    """Writes strips/step_00000010.png: images of the best, median and worst member of every `every`th step.

    It also sends the picture and histograms of the members' scores to the trackers. If drawing
    or writing one fails, a warning is logged.

    Args:
        out: the outputs of the run.
        engine: the run's engine.
        render: renders the prompts to train on.
        every: steps between pictures.
        last: the run's last step also has a picture.
    """

    def __init__(self, out: Outputs, engine: Engine, render: Renderer, *, every: int, last: int):
        self.out, self.engine, self.render, self.every, self.last = out, engine, render, every, last

    def before_update(self, task: Task, scores: dict[str, torch.Tensor]) -> None:
        if task.step % self.every and task.step != self.last:
            return
        try:
            prompts = task.prompts[:STRIP_PROMPTS]
            fitness = self.engine.fitness(task, scores[COMBINED])
            self.draw(task.step, self._images(task.step, prompts, fitness), self.render.words(prompts))
        except Exception as error:  # the scores of the step are worth more than its picture
            self.out.note(f"warning: no strip of step {task.step}: {reason(error)}")
        for name, score in scores.items():
            means = score.double().mean(dim=(1, 2))
            self.out.trackers.histogram(task.step, f"members/{name}", means[means.isfinite()].cpu().numpy())

    def draw(self, step: int, images: dict[str, torch.Tensor], captions: Sequence[str] = ()) -> Path:
        """Write a picture with one row of images for each label, uint8 [K, 3, H, W], and captions above the columns.

        Raises:
            ValueError: see `draw_strip`.
            OSError: the file cannot be written.
        """
        picture, path = draw_strip(images, captions), self.out.folder.held.strips / f"step_{step:08d}.png"
        write_atomic(path, picture.save)
        self.out.trackers.image(step, "strips", picture)
        return path

    def _images(self, step: int, prompts: torch.Tensor, fitness: torch.Tensor) -> dict[str, torch.Tensor]:
        """Render the best, median and worst member of this step again, since images are not kept."""
        order = fitness.argsort(descending=True).tolist()
        members = {"best": order[0], "median": order[len(order) // 2], "worst": order[-1]}
        return {
            label: torch.cat([drawn for drawn, _ in render_all(self.render, step, prompts, m, self.engine.population)])
            for label, m in members.items()
        }
