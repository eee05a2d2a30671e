"""Held-out rewards: they show when a run optimises its reward at the cost of other rewards.

Symbols: s_t[p] is a score of held-out prompt p after t steps, from the unperturbed adapter. The P prompts and their
latents are the same at every measurement.

    d_t[p] = s_t[p] - s_0[p]      change = mean_p d_t      standard error = std_p d_t / sqrt(P)

The rewards diverge at the first t where the optimised one has change > 2 standard errors
while a held-out one has change < -2 standard errors.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from esengine.base.files import write_atomic
from esengine.base.prompt_files import metadata_sha256
from esengine.base.records import as_written
from esengine.evaluation.draw import EVAL_STEP
from esengine.rewards.fault_tolerant import FaultTolerant
from esengine.rewards.roles import Rewards
from esengine.run.hooks import Hook, Outputs
from esengine.run.journal import Measured, Start, Step
from esengine.run.pictures import draw_grid
from esengine.sampling.rollout import Renderer, render_all

CERTAIN = 2.0
"""A change counts as significant beyond this many standard errors."""


class HeldOut(Hook):
    """Measures a run's rewards on held-out prompts, records them, and warns when they diverge.

    The prompts are spread evenly over the list. The measurements do not affect the adapter.

    Args:
        out: the outputs of the run. The measurements in its journal are continued if their prompts and rewards are the
            same. Otherwise a new series begins. Each held-out reward that diverges is one warning.
        rewards: see `load_rewards`.
        render: renders the held-out list.
        prompts: maximum number of prompts to measure on.
        every: steps between measurements.
        last: number of steps of the run, after which it measures too.
        stopped: called before each chunk. If it returns true, nothing is written; a resumed run measures again.
        drop_bad: if true, leave out images that a reward fails on and log a warning; the limit is one image or a tenth,
            whichever is more. If false, such an image is an error.
        measured: called with each measurement, once it is recorded.

    Raises:
        RunError: an earlier record was not written by esengine.
    """

    at_ends = False
    """Whether it measures also where the run ended before it was given more steps."""

    def __init__(
        self,
        out: Outputs,
        rewards: Rewards,
        render: Renderer,
        *,
        prompts: int,
        every: int,
        last: int,
        stopped: Callable[[], bool] = lambda: False,
        drop_bad: bool = False,
        measured: Callable[[Measured], None] = lambda record: None,
    ):
        self.out, self.rewards, self.render, self.every, self.last = out, rewards, render, every, last
        self.stopped, self.drop_bad, self.measured = stopped, drop_bad, measured
        total = len(render.texts)
        count = min(prompts, total)
        self.prompts = torch.arange(count) * total // count
        self.of = {"prompts": render.words(self.prompts), "rewards": rewards.identity(rewards.everything)}
        for columns in render.columns(self.prompts).values():
            self.of["metadata_sha256"] = metadata_sha256(self.of["prompts"], columns)
        written = out.journal.contents
        self.series = written.held_out
        if self.series and self.series[0].of != self.of:
            self.series = []
            out.note(f"held-out prompts or rewards have changed: from now on, changes are against step {written.done}")
        for record in self.series:
            with as_written(f"{written.path}: held-out scores after step {record.step}"):
                self._require_written(record)

    def start(self, done: int) -> None:
        starts = self.out.journal.contents.of(Start) if self.at_ends else ()
        if not self.series or done % self.every == 0 or done in (self.last, *(s.settings.get("steps") for s in starts)):
            self.measure(done)

    def after_step(self, step: Step) -> None:
        self.start(step.step + 1)

    def measure(self, step: int) -> None:
        """Render and score the held-out prompts with the adapter after `step` steps.

        Raises:
            RewardError, RenderError: see `Weighted.score` and `Generator.render_chunks`.
        """
        images, parts, reward = [], [], self.rewards.everything
        if self.drop_bad:
            reward = FaultTolerant(reward, len(self.prompts), least=1)
        columns = self.render.columns(self.prompts)
        for drawn, words in render_all(self.render, EVAL_STEP, self.prompts, stopped=self.stopped):
            done = sum(map(len, images))
            given = {name: each[done : done + len(words)] for name, each in columns.items()}
            parts.append(reward.score(drawn, words, **given, step=step))
            images.append(drawn)
        if sum(map(len, images)) < len(self.prompts):
            return
        if self.drop_bad and reward.bad:
            self.out.note(f"warning: held out, {reward.bad} of {reward.images} images are left out: {reward.first}")
        scores = {name: torch.cat([part[name] for part in parts]).tolist() for name in self._names}
        first = self.series[0].scores if self.series else None
        changes = {name: _against(each, first[name]["each"] if first else each) for name, each in scores.items()}
        parted = part_ways(changes, self.rewards.objective, self.rewards.held_out)
        before = self.parted()
        record = Measured(step, changes, self.rewards.objective, parted, None if first else self.of)
        self._draw(step, torch.cat(images))
        self.out.journal.append(record)
        self.series.append(record)
        for kind, key in (("heldout", "mean"), ("heldout_change", "change")):
            there = {f"{kind}/{name}": score[key] for name, score in changes.items() if score[key] is not None}
            self.out.trackers.log(step, there)
        for name in parted:
            if name not in before:
                self.out.note(f"warning: {self.warning(name)}")
        self.measured(record)

    def _draw(self, step: int, images: torch.Tensor) -> None:
        """Write heldout/step_00000010.png, a grid of images uint8 [K, 3, H, W] with their prompts."""
        picture = draw_grid(images, self.of["prompts"])
        write_atomic(self.out.folder.held.held_out / f"step_{step:08d}.png", picture.save)
        self.out.trackers.image(step, "heldout", picture)

    @property
    def _names(self) -> list[str]:
        return list(dict.fromkeys([self.rewards.objective, *self.rewards.everything.names]))

    def _require_written(self, record: Measured) -> None:
        """Raise KeyError, TypeError or ValueError for a record that `measure` cannot have written."""
        for name in self._names:
            score = record.scores[name]
            numbers = [score["mean"], score["change"], score["standard_error"], *score["each"]]
            if len(score["each"]) != len(self.prompts) or {type(each) for each in numbers} - {float, type(None)}:
                raise ValueError(f"{name}: expected numbers, and one for each of {len(self.prompts)} prompts")
        objective = self.rewards.objective
        parted = part_ways(record.scores, objective, self.rewards.held_out)
        if (record.optimised, record.parted) != (objective, parted):
            raise ValueError(f"expected {objective} as optimised and {parted} as parted, as the scores say")

    def parted(self) -> dict[str, int]:
        """The step at which each held-out reward diverged from the optimised one. Others have no entry."""
        found: dict[str, int] = {}
        for record in self.series:
            for name in record.parted:
                found.setdefault(name, record.step)
        return found

    def warning(self, name: str) -> str:
        """One line about a held-out reward that diverged."""
        step = self.parted()[name]
        record = next(each for each in self.series if each.step == step)
        up, down = (record.scores[each] for each in (record.optimised, name))
        return (
            f"the rewards diverge at step {step}: {record.optimised} {_amount(up)}, held-out {name} "
            f"{_amount(down)} on {len(self.prompts)} prompts; look at heldout/step_{step:08d}.png"
        )


def part_ways(changes: dict[str, dict[str, Any]], objective: str, held_out: Sequence[str]) -> list[str]:
    """Held-out rewards that fell significantly while the optimised one rose significantly.

    A change without a standard error is not significant.
    """

    def sure(name: str, sign: int) -> bool:
        change, error = changes[name]["change"], changes[name]["standard_error"]
        return error is not None and sign * change > CERTAIN * error

    return [name for name in held_out if sure(name, -1)] if sure(objective, 1) else []


def _against(now: list[float], first: list[float | None]) -> dict[str, Any]:
    """Mean score and its change, paired by prompt. With one prompt the standard error is None.

    A missing score is NaN in `now`. It is None in the returned record, and so also in `first`.
    """
    each = [score if math.isfinite(score) else None for score in now]
    there = [score for score in each if score is not None]
    pairs = [(a, b) for a, b in zip(each, first, strict=True) if None not in (a, b) and math.isfinite(b)]
    d = torch.tensor([a - b for a, b in pairs], dtype=torch.float64)
    return {
        "mean": sum(there) / len(there) if there else None,
        "change": float(d.mean()) if pairs else None,
        "standard_error": float(d.std()) / math.sqrt(len(d)) if len(pairs) > 1 else None,
        "each": each,
    }


def _amount(score: dict[str, Any]) -> str:
    return f"{score['change']:+.4g} ± {score['standard_error']:.2g}"
