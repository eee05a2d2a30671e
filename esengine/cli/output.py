"""Standard output and error that survive a closed pipe, so that `| head` is no error and a run continues.

What is written loses control codes and the secrets of URLs, wherever it comes from. See `esengine.base.printable`.
"""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from esengine.base.printable import printable, without_secrets


class Output:
    """A stream that discards what cannot be written.

    Attributes:
        error: why the first text could not be written; None if all was, or if the reader of the pipe or the terminal
            has gone.
    """

    def __init__(self, stream: TextIO):
        self._stream, self._open = stream, True
        self._terminal = not stream.closed and stream.isatty()
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        start = "\r" if text.startswith("\r") else ""  # of a progress bar
        inert = start + printable(without_secrets(text[len(start) :]))
        return self._attempt(self._stream.write, self._writable(inert)) or len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _writable(self, text: str) -> str:
        """The text with what the stream cannot encode, such as bytes of a file name, as escapes."""
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        try:
            text.encode(encoding)
        except UnicodeEncodeError:
            return text.encode(encoding, "backslashreplace").decode(encoding)
        return text

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _attempt(self, function, *args):
        if not self._open:
            return None
        try:
            return function(*args)
        except (OSError, ValueError) as error:  # ValueError: somebody has closed the stream
            self._open = False
            hung_up = isinstance(error, OSError) and error.errno == errno.EIO and self._terminal
            gone = isinstance(error, BrokenPipeError | ValueError) or hung_up
            self.error = None if gone else error
            # the interpreter flushes the stream once more when it ends
            with suppress(OSError, ValueError):
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
