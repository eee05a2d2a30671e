"""A person judges the images of a run. The answers are in the journal, so that the run resumes and replays.

The members 2i and 2i + 1 of an antithetic pair differ by the sign of their noise. Their images of the same prompt and
latent are shown side by side, in random order and without labels. The chosen one scores 1, the other 0. Without a
difference both score 0.5.
"""

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from esengine.base.errors import Stopped
from esengine.es.engine import Task
from esengine.judging import FIRST, SAME, Asker, Question
from esengine.run.journal import Judged, Writer


class Place(NamedTuple):
    """Which images are compared: those of a pair for a prompt and a repeat."""

    pair: int
    prompt: int
    repeat: int


class Person:
    """Asks the person.

    Args:
        asker: the page.
        journal: the run's journal. It receives each answer, and has those of before.
        steps: number of steps of the run.
    """

    def __init__(self, asker: Asker, journal: Writer, steps: int):
        self.asker, self.journal, self.steps = asker, journal, steps

    def scores(
        self, task: Task, images: torch.Tensor, prompts: list[str], *, stopped: Callable[[], bool] = lambda: False
    ) -> torch.Tensor:
        """Ask about every pair of images of a step that has no answer yet.

        Args:
            task: the step's task.
            images: uint8 [N P R, 3, H, W], in the order of `Task.rows`.
            prompts: N P R texts.
            stopped: called several times a second. True ends the step.

        Returns:
            float32 [N P R].

        Raises:
            Stopped: `stopped` returned True. The answers so far are in the journal.
            OSError: an answer cannot be written.
        """
        pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
        rows = task.rows()
        keys = zip(rows.members.tolist(), rows.prompts.tolist(), rows.repeats.tolist(), strict=True)
        at = {key: index for index, key in enumerate(keys)}
        pairs = {
            Place(member // 2, prompt, repeat): (index, at[member + 1, prompt, repeat])
            for (member, prompt, repeat), index in at.items()
            if member % 2 == 0
        }
        found = self._known(task.step, {place: _hash(pixels, both) for place, both in pairs.items()})
        asked = [place for place in pairs if place not in found]

        def keep(index: int, answer: str) -> None:
            place = asked[index]
            better = None if answer == SAME else 2 * place.pair + (answer != FIRST)
            self.journal.append(Judged(task.step, *place, better, _hash(pixels, pairs[place])))
            self.journal.sync()
            found[place] = better

        questions = [
            Question(prompts[pairs[place][0]], lambda both=pairs[place]: tuple(pixels[list(both)])) for place in asked
        ]
        title = f"step {task.step + 1} of {self.steps}"
        if not self.asker.ask(questions, keep, title=title, done=len(found), stopped=stopped):
            raise Stopped(f"stopped in step {task.step}")
        scores = torch.full((len(images),), 0.5)
        for place, (first, second) in pairs.items():
            if found[place] is not None:
                better, worse = (first, second) if found[place] % 2 == 0 else (second, first)
                scores[better], scores[worse] = 1.0, 0.0
        return scores

    def _known(self, step: int, images: dict[Place, str]) -> dict[Place, int | None]:
        """The answers of before about these images."""
        known = {}
        for each in self.journal.contents.of(Judged):
            place = Place(each.pair, each.prompt, each.repeat)
            if each.step == step and images.get(place) == each.images:
                known[place] = each.better
        return known


def _hash(pixels: np.ndarray, both: tuple[int, int]) -> str:
    return hashlib.sha256(pixels[both[0]].tobytes() + pixels[both[1]].tobytes()).hexdigest()[:16]
