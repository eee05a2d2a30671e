"""Small images as data URIs, to embed in a page."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from esengine.base.errors import RunError
from esengine.base.pictures import read_png

QUALITIES = ((1.0, 82), (1.0, 60), (0.7, 50))
"""(fraction of the size, WebP quality), tried in this order until the image is small enough in bytes."""


@dataclass(frozen=True)
class Picture:
    """An image of a page: its data URI and size in pixels, or the reason why it is missing."""

    uri: str | None
    width: int
    height: int
    missing: str = ""


def thumbnail(path: Path, *, within: Path, side: int, most: int) -> Picture:
    """A PNG file as WebP, at most `side` pixels on its longer side.

    It has at most `most` bytes, unless the last of `QUALITIES` still gives more. If the file is missing, damaged, too
    large or outside the folder `within`, the picture's `missing` gives the reason.
    """
    try:
        return embed(read_png(path, within).convert("RGB"), side=side, most=most)
    except FileNotFoundError:
        return Picture(None, 1, 1, "image missing")
    except RunError:
        return Picture(None, 1, 1, "image outside the folder")
    except (OSError, ValueError):
        return Picture(None, 1, 1, "image damaged")


def embed(image: Image.Image, *, side: int, most: int) -> Picture:
    """An RGB image as WebP; see `thumbnail`."""
    data = b""
    for share, quality in QUALITIES:
        longest = round(side * share)
        shown = image.copy()
        shown.thumbnail((longest, longest), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        shown.save(buffer, "WEBP", quality=quality, method=4)
        data = buffer.getvalue()
        if len(data) <= most:
            break
    return Picture(f"data:image/webp;base64,{base64.b64encode(data).decode()}", *shown.size)
