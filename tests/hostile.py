"""What tests of hostile files share."""

import contextlib
import signal
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def no_hang(seconds: int = 60) -> Iterator[None]:
    """Fail the test if the block has not ended after so many seconds."""

    def late(*_):
        raise AssertionError(f"still busy after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def png_bomb(path: Path, side: int) -> None:
    """A small PNG file of side x side black pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress((b"\0" * (side + 1)) * side, 9)
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
