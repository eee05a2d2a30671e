"""Acts on the held-out scores of a run: keeps the best adapter, and ends a run whose rewards diverge."""

from collections.abc import Callable
from contextlib import nullcontext

from esengine.models import Generator
from esengine.run.hooks import Outputs
from esengine.run.journal import Copied, Ended, Measured
from esengine.run.kept import BEST, UNDIVERGED, Kept
from esengine.run.saving import adapter_sha256, card_of, save_adapter

WARN, STOP, ROLLBACK = ACTIONS = ("warn", "stop", "rollback")


class Guard:
    """Receives each measurement of a run.

    Args:
        out: the outputs of the run.
        kept: the copies of the adapter.
        save: writes a kept adapter to its folder.
        action: one of `ACTIONS`. stop and rollback end the run at the first measurement at which rewards diverge.

    Attributes:
        diverged: the measurement that ends the run, or None.
    """

    def __init__(self, out: Outputs, kept: Kept, save: Callable[[str], None], *, action: str = WARN):
        self.out, self.kept, self.save, self.action, self.by = out, kept, save, action, kept.by
        self.diverged: Measured | None = None

    def measured(self, record: Measured) -> None:
        """The adapter has the scores of `record`, which is in the journal."""
        if record.of is not None:  # scores of other prompts or rewards do not compare
            self.kept.drop(BEST)
        if self.by is not None and self._is_best(mean := record.scores[self.by]["mean"]):
            self.kept.take(BEST, record.step, by=self.by, mean=mean)
            self.save(BEST)
            self.out.journal.append(Copied(record.step, BEST, self.by, mean))
        if self.action == ROLLBACK and not record.parted:
            self.kept.take(UNDIVERGED, record.step)
        if self.action != WARN and record.parted:
            self.diverged = self.diverged or record

    def _is_best(self, mean: float | None) -> bool:
        if mean is None or BEST not in self.kept:
            return mean is not None
        facts = self.kept.facts(BEST)
        return facts["by"] != self.by or mean > facts["mean"]

    def finish(self, model: Generator) -> str | None:
        """End the run: with `rollback` the run's adapter becomes that of the last measurement without divergence.

        Nothing happens if no measurement has ended the run.

        Args:
            model: the run's model.

        Returns:
            The SHA-256 of the run's adapter, or None if nothing has ended the run.
        """
        if self.diverged is None:
            return None
        step, parted = self.diverged.step, self.diverged.parted
        at = self.kept.facts(UNDIVERGED)["step"] if UNDIVERGED in self.kept and self.action == ROLLBACK else step
        about = card_of(self.out.journal.contents.until(at), model)
        with self.kept.in_place(UNDIVERGED) if at != step else nullcontext(self.kept.population) as population:
            save_adapter(population, self.out.folder.held.adapter, model.denoiser, **about)
            sha256 = adapter_sha256(population)
        if at == step and self.action == ROLLBACK:
            self.out.note("warning: no earlier adapter is kept: --heldout-action rollback was set after they diverged")
        self.out.journal.append(Ended(step, parted, at))
        self.out.note(
            f"the run ends after step {step}, because the rewards diverge (--heldout-action {self.action}); "
            f"its adapter is that of step {at}; to go on from step {step}: --resume --heldout-action warn"
        )
        return sha256
