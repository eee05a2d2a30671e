"""The adapters that a run keeps besides its last one.

    best           the one with the highest mean of a score on the held-out prompts       adapter-best/
    undiverged     that of the last measurement before the rewards diverged               --heldout-action rollback
    ema            the exponential moving average of the adapter over the steps           adapter-ema/

Symbols: theta_t is the adapter after t steps, d the decay. Averaging begins after step b.

    ema_t = sum_{i=b+1..t} d^(t-i) theta_i / sum_{i=b+1..t} d^(t-i)

That is the moving average of Adam (arXiv 1412.6980, section 3), with its bias correction. A and B are averaged one by
one. The copies are part of every checkpoint.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from esengine.base.errors import RunError
from esengine.es.population import Population
from esengine.run.checkpoint import Checkpoint
from esengine.run.hooks import Hook
from esengine.run.journal import Step
from esengine.run.settings import TrainConfig

BEST, UNDIVERGED, EMA = "best", "undiverged", "ema"
PART = "kept"
"""What a checkpoint calls these copies: tensors `kept/<kind>/<tensor>`, and facts in its meta."""


@dataclass(frozen=True)
class Copy:
    """A copy of the adapter.

    Attributes:
        tensors: fp32, by name.
        facts: JSON values. `step`: the steps done when it was made. best: also `by`, the name of the score, and `mean`.
            ema: also `decay` and `begun`, the steps done before the first adapter in the average.
    """

    tensors: dict[str, torch.Tensor]
    facts: dict[str, Any]


class Kept:
    """The copies of one run, by kind.

    Args:
        population: the population whose adapter is copied.
        decay: the decay d of the moving average; 0: no average.
        by: the score whose highest mean makes an adapter the best. None: no best adapter is kept.
        saved: the checkpoint that the run resumes from. An average with another decay, and the best by
            another score, begin again.

    Raises:
        RunError: the checkpoint's copies are not as a run writes them.
    """

    def __init__(
        self, population: Population, *, decay: float = 0.0, saved: Checkpoint | None = None, by: str | None = None
    ):
        self.population, self.decay, self.by = population, decay, by
        self.copies = {} if saved is None else _read(saved, population)
        for kind, name, wanted in ((EMA, "decay", decay), (BEST, "by", by)):
            if kind in self.copies and self.copies[kind].facts[name] != wanted:
                del self.copies[kind]

    def __contains__(self, kind: str) -> bool:
        return kind in self.copies

    def facts(self, kind: str) -> dict[str, Any]:
        return self.copies[kind].facts

    def take(self, kind: str, step: int, **facts: Any) -> None:
        """Copy the adapter as it is after `step` steps."""
        tensors = {name: each.detach().clone() for name, each in self.population.parameters().items()}
        self.copies[kind] = Copy(tensors, {"step": step, **facts})

    def drop(self, kind: str) -> None:
        self.copies.pop(kind, None)

    @torch.no_grad()
    def average(self, step: int) -> None:
        """Take the adapter after `step` steps into the moving average. Call it once after every step."""
        if EMA not in self.copies:
            self.take(EMA, step, decay=self.decay, begun=step - 1)
            return
        tensors, begun = self.copies[EMA].tensors, self.facts(EMA)["begun"]
        weight = (1 - self.decay) / (1 - self.decay ** (step - begun))
        theta = self.population.parameters()
        torch._foreach_lerp_(list(tensors.values()), [theta[name] for name in tensors], weight)
        self.copies[EMA].facts["step"] = step

    @contextmanager
    def in_place(self, kind: str) -> Iterator[Population]:
        """A block in which the population's adapter is a copy. After it the adapter is as before, bit for bit.

        The layers do not compute with the copy. It is only to be saved or compared.
        """
        theta = {name: each.data for name, each in self.population.parameters().items()}
        try:
            for name, parameter in self.population.parameters().items():
                parameter.data = self.copies[kind].tensors[name]
            yield self.population
        finally:
            for name, parameter in self.population.parameters().items():
                parameter.data = theta[name]

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint stores: `kept/<kind>/<tensor>`."""
        return {f"{PART}/{kind}/{name}": t for kind, copy in self.copies.items() for name, t in copy.tensors.items()}

    def meta(self) -> dict[str, dict[str, Any]]:
        """The facts of each copy, for a checkpoint's meta."""
        return {kind: dict(copy.facts) for kind, copy in self.copies.items()}


def expected(config: TrainConfig) -> list[str]:
    """The kinds of copies that a run with these settings keeps."""
    wanted = {BEST: config.keep == "best", UNDIVERGED: config.heldout_action == "rollback", EMA: config.ema > 0}
    return [kind for kind, needed in wanted.items() if needed]


class Average(Hook):
    """Keeps the moving average of the adapter."""

    def __init__(self, kept: Kept):
        self.kept = kept

    def after_step(self, step: Step) -> None:
        self.kept.average(step.step + 1)


def _read(saved: Checkpoint, population: Population) -> dict[str, Copy]:
    theta = population.parameters()
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in saved.tensors.items():
        part, _, rest = key.partition("/")
        if part == PART:
            kind, _, name = rest.partition("/")
            found.setdefault(kind, {})[name] = tensor.to(population.device)
    facts = saved.meta.get(PART, {})
    if not isinstance(facts, Mapping) or facts.keys() != found.keys():
        raise RunError(f"checkpoint {saved.path}: {PART}: expected facts of {sorted(found)}, got {facts!r:.80}")
    for kind, tensors in found.items():
        _check(saved, kind, facts[kind])
        shapes = {name: each.shape for name, each in tensors.items()}
        if shapes != {name: each.shape for name, each in theta.items()}:
            raise RunError(f"checkpoint {saved.path}: {PART}/{kind}: expected the tensors of the adapter, got others")
    return {kind: Copy({name: tensors[name] for name in theta}, dict(facts[kind])) for kind, tensors in found.items()}


def _check(saved: Checkpoint, kind: str, facts: Any) -> None:
    expected = {
        BEST: {"step": int, "by": str, "mean": float},
        UNDIVERGED: {"step": int},
        EMA: {"step": int, "decay": float, "begun": int},
    }.get(kind, {})
    if not isinstance(facts, Mapping) or {name: type(value) for name, value in facts.items()} != expected:
        names = ", ".join(expected) or f"one of {BEST}, {UNDIVERGED}, {EMA}"
        raise RunError(f"checkpoint {saved.path}: {PART}/{kind}: expected {names}, got {facts!r:.80}")
