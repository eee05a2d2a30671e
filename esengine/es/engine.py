"""Ask and tell: a step asks for scores of every member on some prompts, and is told them.

    task = engine.ask()                        which members, prompts and repeats to render
    scores = ...                               float32 [N, P, R], by any means
    engine.tell(task, scores)                  fitness, update, on to the next step

The state is explicit (the population's, and the number of the next step), so a run can be stopped, moved and resumed
between any two calls. How images are rendered and scored is not known here.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from esengine.base.errors import ConfigError
from esengine.es.fitness import METHODS, PROMPT_STDS, shape
from esengine.es.population import Population
from esengine.es.prompts import PromptSampler


@dataclass(frozen=True)
class Task:
    """One step's work: N members each render P prompts R times.

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

    def rows(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Member, prompt and repeat of every image, each int64 [N P R], in the order of the flattened scores."""
        members, prompts, repeats = torch.arange(self.size), self.prompts, torch.arange(self.repeats)
        grid = torch.meshgrid(members, prompts, repeats, indexing="ij")
        return tuple(axis.reshape(-1) for axis in grid)


class Engine:
    """Evolution Strategies over explicit state.

    Args:
        population: from `esengine.attach`.
        sampler: which prompts a step draws.
        size: population size N, even.
        repeats: images of each prompt for each member.
        shaping: one of `esengine.es.fitness.METHODS`.
        prompt_std: one of `esengine.es.fitness.PROMPT_STDS`.
        drop_pairs: Members with a score that is not finite, and their antithetic halves, get fitness 0 and no part in
            that of the others. Otherwise such a score is an error.

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
        """The next step's work. Asking again gives the same task until it is told."""
        return Task(self.step, self.sampler.draw(self.step), self.size, self.repeats)

    def fitness(self, task: Task, scores: torch.Tensor) -> torch.Tensor:
        """float32 [N] from scores float32 [N, P, R] (or flat in the order of `Task.rows`)."""
        if scores.shape not in (task.shape, (task.images,)):
            raise ValueError(f"scores: expected float32 {list(task.shape)}, got {list(scores.shape)}")
        scores = scores.reshape(task.shape)
        whole = scores.isfinite().all(2).all(1).view(-1, 2).all(1).repeat_interleave(2)  # of each member, both halves
        if whole.all() or not self.drop_pairs:
            return shape(scores, self.shaping, self.prompt_std)
        fitness = scores.new_zeros(len(scores))
        if whole.any():
            fitness[whole] = shape(scores[whole], self.shaping, self.prompt_std)
        return fitness

    def tell(self, task: Task, scores: torch.Tensor) -> dict[str, float]:
        """Update the adapter and go on to the next step.

        Args:
            task: what `ask` gave.
            scores: float32 [N, P, R], higher is better; finite, unless pairs may be dropped.

        Returns:
            L2 norms by name: gradient_norm, step_norm, adapter_norm.

        Raises:
            ValueError: another step's task, or scores of another shape or dtype or not finite; nothing has changed.
        """
        if task.step != self.step:
            raise ValueError(f"task: expected one of step {self.step}, got one of step {task.step}")
        stats = self.population.update(step=task.step, fitness=self.fitness(task, scores))
        self.step += 1
        return asdict(stats)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "population": self.population.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.population.load_state_dict(state["population"])
        self.step = int(state["step"])
