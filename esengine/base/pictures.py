"""Reads PNG files of a folder that may be another's."""

import io
import struct
from pathlib import Path

from PIL import Image

from esengine.base.files import read_regular, require_inside

MAX_BYTES, MAX_PIXELS = 1 << 27, 1 << 26


def read_png(path: Path, within: Path) -> Image.Image:
    """The loaded image of a PNG file of at most `MAX_BYTES` bytes and `MAX_PIXELS` pixels.

    Raises:
        FileNotFoundError: there is no such file.
        RunError: it leads out of the folder `within`.
        ValueError: it is no regular file, too large, damaged, or no PNG.
    """
    require_inside(within, path)
    try:
        data = read_regular(path, MAX_BYTES)
        width, height = struct.unpack(">II", data[16:24])  # of its header
        if width * height > MAX_PIXELS:
            raise ValueError(f"expected at most {MAX_PIXELS} pixels, got {width} x {height}")
        image = Image.open(io.BytesIO(data), formats=["PNG"])
        image.load()
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:  # Pillow's readers raise anything for a damaged file
        raise ValueError(f"{path}: {error}") from error
    return image
