"""Standard output and error that survive a closed pipe, so that `| head` is no error and a run continues.

What is written loses control codes and the secrets of URLs, wherever it comes from. See `esengine.base.printable`.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from esengine.base.printable import printable, without_secrets


class Output:
    """A stream that discards what cannot be written.

    Attributes:
        error: why the first text could not be written; None if all was, or if the reader has closed the pipe.
    """

    def __init__(self, stream: TextIO):
        self._stream, self._open = stream, True
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        start = "\r" if text.startswith("\r") else ""  # of a progress bar
        return self._attempt(self._stream.write, start + printable(without_secrets(text[len(start) :]))) or len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _attempt(self, function, *args):
        if not self._open:
            return None
        try:
            return function(*args)
        except OSError as error:
            self._open = False
            self.error = None if isinstance(error, BrokenPipeError) else error
            # the interpreter flushes the stream once more when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            return None


@contextmanager
def lasting_output() -> Iterator[Output | None]:
    """Inside, `sys.stdout` and `sys.stderr` are such streams. Gives the first; None if the process has no output."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (stream and Output(stream) for stream in before)
    try:
        yield sys.stdout
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = before
