"""Whether rendered images are finite: looked at image by image, or once for many, as the device is waited for."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from esengine.base.errors import RenderError

Describe = Callable[[int], str]
"""Which image a row is, for a message."""


class FiniteChecks:
    """Raises RenderError for images that are not finite, at once or, inside `deferred`, at its end."""

    def __init__(self):
        self._waiting: list[tuple[torch.Tensor, Describe]] | None = None

    def __call__(self, good: torch.Tensor, describe: Describe) -> None:
        """Takes bool [B], which of B images are finite, on any device."""
        if self._waiting is not None:
            self._waiting.append((good, describe))
        else:
            _raise_first([(good, describe)])

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, nothing is raised; the end raises for the first image, unless something else was raised before."""
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
    bad = (~torch.cat([good for good, _ in checks])).nonzero()  # the one wait
    if not len(bad):
        return
    row = int(bad[0])
    for good, describe in checks:
        if row < len(good):
            raise RenderError(f"{describe(row)}: the image is not finite; lower the noise or the rate")
        row -= len(good)
