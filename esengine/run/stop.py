"""Stopping on request: a first SIGTERM or SIGINT ends a run where it can go on from, a second at once."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from esengine.base.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """Inside a `with` statement, a signal raises KeyboardInterrupt, as Ctrl-C does; inside `gently` it only asks.

    Outside a `with` statement no signal is taken over, and `requested` stays False.

    A second signal ends the process by its default action. In other threads nothing of this happens.

    Attributes:
        requested: a signal has come.
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
    def gently(self) -> Iterator[None]:
        """Inside, look at `requested` where it suits.

        Raises:
            Stopped: at the end, if nobody did.
        """
        self._gentle = True
        try:
            yield
        finally:
            self._gentle = False
        if self.requested:
            raise Stopped("stopped")

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.requested = True
        if not self._gentle:
            raise KeyboardInterrupt
