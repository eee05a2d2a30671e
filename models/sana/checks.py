"""Checks that rendered images are finite, for each batch or once for many batches. Each check waits for the device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from esengine.base.errors import RenderError

Describe = Callable[[int], str]
"""Row -> a text that names its image, for a message."""


class FiniteChecks:
    """Raises RenderError for images that are not finite: at once, or at the end of `deferred`."""

    def __init__(self):
        self._waiting: list[tuple[torch.Tensor, Describe]] | None = None

    def __call__(self, good: torch.Tensor, describe: Describe) -> None:
        """Check a batch. `good`: bool [B] on any device, which of its B images are finite."""
        if self._waiting is not None:
            self._waiting.append((good, describe))
        else:
            _raise_first([(good, describe)])

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Collect checks inside the block. Its end raises for the first bad image, unless the block itself raised."""
        if self._waiting is not None:
            raise RuntimeError("deferred: already inside one; contexts do not nest")
        self._waiting = []
        try:
            yield
            _raise_first(self._waiting)
        finally:
            self._waiting = None


def _raise_first(checks: list[tuple[torch.Tensor, Describe]]) -> None:
    if not checks:
        return
    bad = (~torch.cat([good for good, _ in checks])).nonzero()  # waits for the device
    if not len(bad):
        return
    row = int(bad[0])
    for good, describe in checks:
        if row < len(good):
            raise RenderError(f"{describe(row)}: the image is not finite; lower the noise or the rate")
        row -= len(good)
