"""Progress of a run: the interface, and a terminal's display with notes as lines and work as tqdm bars on stderr."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from esengine.base.printable import shown


class Progress:
    """Receives the progress of a run. The base class does nothing; the command line uses `Bar`."""

    def note(self, text: str) -> None:
        """Show one line about the current work."""

    def count(self, what: str, done: int, total: int) -> None:
        """`done` of `total` are done, for work outside the steps."""

    def start(self, total: int, done: int) -> None:
        """Begin with the images of the whole run and those of the steps already done."""

    def images(self, count: int) -> None:
        """`count` more images are rendered and scored."""

    def step(self, step: int, steps: int, metrics: dict[str, float]) -> None:
        """A step is done."""

    def stop(self) -> None:
        """The last step is done, or the run has failed."""


class Bar(Progress):
    """A bar that counts images and shows images/s, the time left, and the step with its time and reward.

    If stderr cannot be written, such as a pipe whose reader has ended, the rest is not shown. The run continues.
    """

    def __init__(self):
        self._bar: tqdm | None = None
        self._counter: tqdm | None = None

    def note(self, text: str) -> None:
        with self._unless_lost():
            tqdm.write(shown(text), file=sys.stderr)

    def count(self, what: str, done: int, total: int) -> None:
        with self._unless_lost():
            if self._counter is None:
                self._counter = tqdm(total=total, unit=f" {what}", leave=False, **_terminal(), disable=None)
            self._counter.update(done - self._counter.n)
            if done >= total:
                self._counter.close()
                self._counter = None

    def start(self, total: int, done: int) -> None:
        with self._unless_lost():
            self._bar = tqdm(total=total, initial=done, unit=" img", smoothing=0.1, **_terminal())

    def images(self, count: int) -> None:
        with self._unless_lost():
            if self._bar is not None:
                self._bar.update(count)

    def step(self, step: int, steps: int, metrics: dict[str, float]) -> None:
        with self._unless_lost():
            if self._bar is not None:
                reward, seconds = metrics["reward"], metrics["seconds"]
                self._bar.set_description(f"step {step}/{steps}", refresh=False)
                self._bar.set_postfix_str(f"reward {reward:.4f}, {seconds:.2f} s/step", refresh=False)

    def stop(self) -> None:
        with self._unless_lost():
            if self._bar is not None:
                bar, self._bar = self._bar, None
                bar.close()

    @contextmanager
    def _unless_lost(self) -> Iterator[None]:
        """Suppress the errors of a stream that cannot be written, and disable the bars from then on."""
        try:
            yield
        except (OSError, ValueError):  # ValueError: the stream is closed, or cannot encode the text
            for bar in filter(None, (self._bar, self._counter)):
                bar.disable = True  # its destructor would write too
            self._bar = self._counter = None


def _terminal() -> dict:
    """Options of tqdm: a moving bar on a terminal, a line every 10 s in a file."""
    return dict(dynamic_ncols=True, mininterval=0.1 if sys.stderr.isatty() else 10.0)
