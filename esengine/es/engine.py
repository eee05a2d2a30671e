"""Ask and tell: `ask` returns a step's task, `tell` takes its scores and updates the adapter.

    task = engine.ask()                        which members, prompts and repeats to render
    scores = ...                               float32 [N, P, R], by any means
    engine.tell(task, scores)                  fitness, update, next step

The state is explicit: the population's state and the number of the next step. So a run can be stopped, moved and
resumed between any two calls. The engine does not depend on how images are rendered and scored.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from esengine.base.errors import ConfigError
from esengine.es.fitness import METHODS, PROMPT_STDS, as_float32, shape
from esengine.es.population import Population
from esengine.es.prompts import PromptSampler
from esengine.es.rows import Rows


@dataclass(frozen=True)
class Task:
    """One step's work: each of N members renders P prompts R times.

    Attributes:
        step: the step of the noise contract.
        prompts: int64 [P], indices into the prompt list.
        size: N.
        repeats: R.
    """

    step: int
    prompts: torch.Tensor
    size: int
    repeats: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(N, P, R), the shape of the scores."""
        return self.size, len(self.prompts), self.repeats

    @property
    def images(self) -> int:
        return self.size * len(self.prompts) * self.repeats

    def rows(self) -> Rows:
        """Member, prompt and repeat of every image, each int64 [N P R], in the order of the flattened scores."""
        members, prompts, repeats = torch.arange(self.size), self.prompts, torch.arange(self.repeats)
        grid = torch.meshgrid(members, prompts, repeats, indexing="ij")
        return Rows(*(axis.reshape(-1) for axis in grid))


class Engine:
    """Evolution Strategies over explicit state.

    Args:
        population: from `esengine.attach`.
        sampler: draws the prompts of each step.
        size: population size N, even.
        repeats: images of each prompt for each member.
        shaping: one of `esengine.es.fitness.METHODS`.
        prompt_std: one of `esengine.es.fitness.PROMPT_STDS`.
        drop_pairs: If True, a member with a score that is not finite and its antithetic partner get fitness 0. They do
            not affect the fitness of other members. If False, such a score is an error.

    Attributes:
        step: number of the next step.
    """

    def __init__(
        self,
        population: Population,
        sampler: PromptSampler,
        *,
        size: int,
        repeats: int = 1,
        shaping: str = "zscore",
        prompt_std: str = "global",
        drop_pairs: bool = False,
    ):
        if size < 2 or size % 2:
            raise ConfigError(f"population: expected an even number of at least 2, got {size}")
        if repeats < 1:
            raise ConfigError(f"repeats: expected at least 1, got {repeats}")
        if shaping not in METHODS:
            raise ConfigError(f"shaping: expected one of {', '.join(METHODS)}, got {shaping}")
        if prompt_std not in PROMPT_STDS:
            raise ConfigError(f"prompt_std: expected one of {', '.join(PROMPT_STDS)}, got {prompt_std}")
        self.population, self.sampler = population, sampler
        self.size, self.repeats, self.step = size, repeats, 0
        self.shaping, self.prompt_std = shaping, prompt_std
        self.drop_pairs = drop_pairs

    def ask(self) -> Task:
        """The next step's task. Repeated calls return the same task until `tell`."""
        return Task(self.step, self.sampler.draw(self.step), self.size, self.repeats)

    def tasks(self, until: int) -> Iterator[Task]:
        """Yields the task of each step until `until` steps are done. Call `tell` before taking the next task."""
        while self.step < until:
            yield self.ask()

    def fitness(self, task: Task, scores: torch.Tensor) -> torch.Tensor:
        """float32 [N] from scores float32 [N, P, R] (or flat in the order of `Task.rows`), as `tell` takes them."""
        scores = as_float32(scores, "scores")
        if scores.shape not in (task.shape, (task.images,)):
            raise ValueError(f"scores: expected float32 {list(task.shape)}, got {list(scores.shape)}")
        scores = scores.reshape(task.shape)
        whole = scores.isfinite().all(2).all(1).view(-1, 2).all(1).repeat_interleave(2)  # [N], per pair
        if whole.all() or not self.drop_pairs:
            return shape(scores, self.shaping, self.prompt_std)
        fitness = scores.new_zeros(len(scores))
        if whole.any():
            fitness[whole] = shape(scores[whole], self.shaping, self.prompt_std)
        return fitness

    def tell(self, task: Task, scores: torch.Tensor) -> dict[str, Any]:
        """Update the adapter and advance to the next step.

        Args:
            task: the task that `ask` returned.
            scores: [N, P, R], or flat in the order of `Task.rows`. Higher is better; finite unless `drop_pairs`. A
                float32 tensor on any device; or numbers in lists or a numpy array, which are rounded to float32.

        Returns:
            `fitness`, the float32 [N] that the update used, and the L2 norms gradient_norm, step_norm, adapter_norm.

        Raises:
            TypeError: scores are no numbers. Nothing has changed then, or after a ValueError.
            ValueError: the task is another step's, or scores have another shape or dtype or are not finite.
        """
        if task.step != self.step:
            raise ValueError(f"task: expected one of step {self.step}, got one of step {task.step}")
        fitness = self.fitness(task, scores)
        stats = self.population.update(step=task.step, fitness=fitness)
        self.step += 1
        return {"fitness": fitness, **asdict(stats)}

    def state_dict(self) -> dict[str, Any]:
        """The step, and the state of the population: see `Population.state_dict`."""
        return {"step": self.step, "population": self.population.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of `state_dict`. Raises ValueError as `Population.load_state_dict`."""
        self.population.load_state_dict(state["population"])
        self.step = int(state["step"])
