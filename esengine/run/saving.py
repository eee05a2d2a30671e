"""Saves a run: a checkpoint every few steps and when the run ends, and the adapter beside it."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from esengine.base.errors import RunError, Stopped
from esengine.base.group import Group
from esengine.es.engine import Engine
from esengine.es.model_card import write_card
from esengine.es.population import Population
from esengine.kernels import CONTRACT
from esengine.models import Generator, write_diffusers_lora
from esengine.rewards import Weighted
from esengine.run import checkpoint
from esengine.run import state as run_state
from esengine.run.card import run_card
from esengine.run.hooks import Hook, Outputs
from esengine.run.journal import Journal, Saved, Step
from esengine.run.kept import BEST, EMA, PART, Kept
from esengine.sampling.rollout import Renderer


class Checkpoints(Hook):
    """Saves the engine every `every` steps, after the last step, and when the run ends early.

    Use it in a `with` statement around the steps. It does not save while the adapter, the step number and the journal
    may be inconsistent, or while the processes may differ.

    Args:
        engine: the engine. If it resumes from a checkpoint, `resumed` is true.
        every: steps between checkpoints.
        last: number of steps of the run.
        group: the processes. Before each checkpoint their adapters are compared.
        render, reward: a checkpoint stores their batch limits.
        kept: a checkpoint stores its copies.
        to: the outputs of the run; None except in the leading process.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        every: int,
        last: int,
        group: Group,
        render: Renderer,
        reward: Weighted,
        kept: Kept,
        to: Outputs | None,
        resumed: bool,
    ):
        self.engine, self.every, self.last, self.group = engine, every, last, group
        self.render, self.reward, self.kept, self.to, self._agree = render, reward, kept, to, True
        if resumed and to:
            self._save_adapter()
            self.save_kept(BEST)
        self._compare()
        self.saved_step = engine.step
        if not resumed:
            self._keep_first()
            self._save()

    def after_step(self, step: Step) -> None:
        if self.engine.step % self.every == 0 or self.engine.step == self.last:
            self._compare()
            self._save()

    @contextmanager
    def all_or_nothing(self, *harmless: type[Exception]) -> Iterator[None]:
        """After an error inside, the state is not saved, except after `harmless` errors, which leave it unchanged."""
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
        if error is None and self.to:
            held = self.to.folder.held
            checkpoint.remove_temporaries(held.checkpoints)  # `save` does too, if there was a step to take
            card = card_of(self.to.journal.contents, self.render.model)["card"]  # with the last held-out scores
            write_card(held.adapter, card)

    def _compare(self) -> None:
        """Raise RunError unless every process has the same adapter."""
        with self.all_or_nothing():
            own = torch.frombuffer(bytearray.fromhex(adapter_sha256(self.engine.population)), dtype=torch.uint8)
            hashes = [bytes(each.tolist()).hex() for each in self.group.gather(own)]
            for rank, each in enumerate(hashes):
                if each != hashes[0]:
                    step = self.engine.step
                    raise RunError(f"process {rank}: its adapter differs from that of process 0 after step {step}")

    def _save(self) -> None:
        """Write a checkpoint, in the leading process only."""
        engine, step = self.engine, self.engine.step
        if self.to:
            sha256 = adapter_sha256(engine.population)
            steps = self.to.journal.contents.digest
            meta = {"contract": CONTRACT, "adapter_sha256": sha256, "steps_sha256": steps}
            meta |= {"made_with_sha256": self.to.journal.contents.made_with(step)}
            meta |= {"limit": self.render.limit, "scoring_limit": self.reward.limit, PART: self.kept.meta()}
            self.to.journal.sync()  # a checkpoint is never ahead of the journal
            held = self.to.folder.held
            checkpoint.save(held.checkpoints, step, run_state.tensors(engine, self.kept), meta)
            self.to.journal.append(Saved(step, sha256))
            self._save_adapter()
            self.save_kept(EMA)
        self.saved_step = step

    def save_kept(self, kind: str) -> None:
        """Write a kept adapter to its folder, if there is one. In the leading process only."""
        if kind in self.kept:
            run, path, model = self.to.journal.contents, self.to.folder.held.kept(kind), self.render.model
            about = card_of(run.until(self.kept.facts(kind)["step"]), model, measured=kind != EMA)
            with self.kept.in_place(kind) as population:
                save_adapter(population, path, model.denoiser, **about)

    def _keep_first(self) -> None:
        """Keep the adapter that the run starts from, if it was given one: replay needs it, and the original may go."""
        settings = self.to.journal.contents.start.settings if self.to else {}
        if settings.get("init_adapter") is not None:
            path = self.to.folder.held.init_adapter
            self.engine.population.save_pretrained(path, base_model=settings["model"])

    def _save_adapter(self) -> None:
        run, path, model = self.to.journal.contents, self.to.folder.held.adapter, self.render.model
        save_adapter(self.engine.population, path, model.denoiser, **card_of(run, model))


def save_adapter(
    population: Population,
    path: Path,
    denoiser: str = "transformer",
    *,
    base_model: str | None = None,
    card: str | None = None,
) -> None:
    """Write the adapter into one folder, once for PEFT and once for the pipeline's `load_lora_weights`.

    Args:
        population: the population.
        path: the folder.
        denoiser: the pipeline's name of the population's module.
        base_model, card: see `Population.save_pretrained`.
    """
    population.save_pretrained(path, base_model=base_model, card=card)
    scaling = {name: layer.scale for name, layer in population.layers.items()}
    write_diffusers_lora(path, population.lora(), scaling, denoiser)


def card_of(run: Journal, model: Generator, *, measured: bool = True) -> dict[str, str]:
    """Base model and model card of a run's adapter, for `save_adapter`. `measured`: see `run_card`."""
    card = run_card(run, getattr(model, "family", None), measured=measured)
    return {"base_model": run.start.settings["model"], "card": card}


def adapter_sha256(population: Population) -> str:
    """SHA-256 of the adapter: names and bytes of its tensors, in the order of the names."""
    found = hashlib.sha256()
    for name, parameter in sorted(population.parameters().items()):
        found.update(name.encode())
        found.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()
