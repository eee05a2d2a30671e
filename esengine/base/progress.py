"""What a run says while it works, and a terminal's way to show it: notes as lines, work as tqdm bars on stderr."""

import sys

from tqdm import tqdm


class Progress:
    """What a run says while it works. The base class is silent; the command line draws a bar."""

    def note(self, text: str) -> None:
        """One line about what is being done."""

    def count(self, what: str, done: int, total: int) -> None:
        """So many of a total are done, for work besides the steps."""

    def start(self, total: int, done: int) -> None:
        """Images of the whole run, and of the steps that are already behind."""

    def images(self, count: int) -> None:
        """So many more images are rendered and scored."""

    def step(self, step: int, steps: int, metrics: dict[str, float]) -> None:
        """A step is done."""

    def stop(self) -> None:
        """The last step is done, or the run has failed."""


class Bar(Progress):
    """One bar counts images, so that it shows images/s and the time left; beside it the step, its time and reward."""

    def __init__(self):
        self._bar: tqdm | None = None
        self._counter: tqdm | None = None

    def note(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr)

    def count(self, what: str, done: int, total: int) -> None:
        if self._counter is None:
            self._counter = tqdm(total=total, unit=f" {what}", leave=False, **_terminal(), disable=None)
        self._counter.update(done - self._counter.n)
        if done >= total:
            self._counter.close()
            self._counter = None

    def start(self, total: int, done: int) -> None:
        self._bar = tqdm(total=total, initial=done, unit=" img", smoothing=0.1, **_terminal())

    def images(self, count: int) -> None:
        if self._bar is not None:
            self._bar.update(count)

    def step(self, step: int, steps: int, metrics: dict[str, float]) -> None:
        if self._bar is not None:
            self._bar.set_description(f"step {step}/{steps}", refresh=False)
            self._bar.set_postfix_str(f"reward {metrics['reward']:.4f}, {metrics['seconds']:.2f} s/step", refresh=False)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _terminal() -> dict:
    """A file gets a line now and then, a terminal a bar that moves."""
    return dict(dynamic_ncols=True, mininterval=0.1 if sys.stderr.isatty() else 10.0)
