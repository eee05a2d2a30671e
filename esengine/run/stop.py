"""Stops a run on SIGTERM or SIGINT. The first signal stops it where it can be resumed; the second kills it at once."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from esengine.base.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """Handles SIGTERM and SIGINT inside a `with` statement, in the main thread only.

    A signal sets `requested` and raises KeyboardInterrupt, as Ctrl-C does. Inside `gently` it only sets `requested`. A
    second signal ends the process by the signal's default action.

    Attributes:
        requested: whether a signal has come; always False outside a `with` statement.
    """

    def __init__(self):
        self.requested, self._gentle = False, False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @contextmanager
    def gently(self, *, quiet: bool = False) -> Iterator[None]:
        """A block in which a signal only sets `requested`. The code inside checks it and may stop early.

        Raises:
            Stopped: at the end of the block, if a signal has come. Not with `quiet`.
        """
        self._gentle = True
        try:
            yield
        finally:
            self._gentle = False
        if self.requested and not quiet:
            raise Stopped("stopped")

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.requested = True
        if not self._gentle:
            raise KeyboardInterrupt
