"""Pictures with several images side by side, labelled with their prompts."""

import math
import textwrap
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

HEADER = 3 * 13 + 4
"""Pixels for three lines of text above an image."""


def draw_strip(images: dict[str, torch.Tensor], captions: Sequence[str] = (), margin: int = 4) -> Image.Image:
    """Draw one row of images for each label, with the label on the left and captions above the columns.

    Images are drawn 128 to 512 pixels wide. Smaller ones are enlarged by a whole factor, larger ones are resampled.

    Args:
        images: label -> uint8 [K, 3, H, W]; rows may differ in K.
        captions: texts above the columns, wrapped to four lines.
        margin: pixels between images.

    Raises:
        ValueError: there is no image, or a row is not uint8 [K, 3, H, W].
    """
    for label, row in images.items():
        if row.dtype != torch.uint8 or row.ndim != 4 or row.shape[1] != 3:
            raise ValueError(f"images[{label!r}]: expected uint8 [K, 3, H, W], got {row.dtype} {list(row.shape)}")
    rows = {label: [_fit(image) for image in row.permute(0, 2, 3, 1).cpu().numpy()] for label, row in images.items()}
    tiles = [tile for row in rows.values() for tile in row]
    if not tiles:
        raise ValueError("images: expected at least one image, got none")
    columns = max(len(row) for row in rows.values())
    width, height = max(tile.width for tile in tiles), max(tile.height for tile in tiles)

    font = ImageFont.load_default(15)
    gutter = math.ceil(max(font.getbbox(label)[2] for label in rows)) + 2 * margin
    header = _height(font, 4) if captions else 0
    picture = Image.new(
        "RGB", (gutter + columns * (width + margin), header + len(rows) * (height + margin)), color="white"
    )
    for column, caption in enumerate(captions[:columns]):
        picture.paste(_caption(caption, width, font, 4), (gutter + column * (width + margin), 0))
    draw = ImageDraw.Draw(picture)
    for index, (label, row) in enumerate(rows.items()):
        top = header + index * (height + margin)
        draw.text((margin, top + height // 2), label, fill="black", font=font, anchor="lm")
        for column, tile in enumerate(row):
            picture.paste(tile, (gutter + column * (width + margin), top))
    return picture


def draw_grid(images: torch.Tensor, captions: Sequence[str], margin: int = 4) -> Image.Image:
    """Draw images in a nearly square grid, 128 to 256 pixels wide, each below its caption.

    Args:
        images: uint8 [K, 3, H, W], K at least 1.
        captions: K texts, wrapped to three lines.
        margin: pixels between images.

    Raises:
        ValueError: images have another dtype or shape, or the number of captions is not K.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise ValueError(f"images: expected uint8 [K, 3, H, W], got {images.dtype} {list(images.shape)}")
    if len(captions) != len(images):
        raise ValueError(f"captions: expected {len(images)}, one for each image, got {len(captions)}")
    tiles = [_fit(image, widest=256) for image in images.permute(0, 2, 3, 1).cpu().numpy()]
    columns = math.ceil(math.sqrt(len(tiles)))
    width, height = tiles[0].width + margin, HEADER + tiles[0].height + margin
    picture = Image.new("RGB", (columns * width + margin, math.ceil(len(tiles) / columns) * height), color="white")
    for place, (tile, caption) in enumerate(zip(tiles, captions, strict=True)):
        left, top = place % columns * width + margin, place // columns * height
        picture.paste(_caption(caption, tile.width, ImageFont.load_default(), 3), (left, top + margin))
        picture.paste(tile, (left, top + HEADER))
    return picture


def _height(font: ImageFont.FreeTypeFont, count: int) -> int:
    """Height in pixels of `count` lines of text."""
    return count * math.ceil(1.3 * font.size) + 4


def _caption(text: str, width: int, font: ImageFont.FreeTypeFont, most: int) -> Image.Image:
    """A cell with the text in at most `most` lines. Text that is too wide is cut off."""
    cell = Image.new("RGB", (width, _height(font, most)), color="white")
    letters = max(1, int(width / (0.5 * font.size)))
    lines = textwrap.wrap(text[: most * width], width=letters, max_lines=most, placeholder="...")
    ImageDraw.Draw(cell).multiline_text((0, 0), "\n".join(lines), fill="black", font=font, spacing=0.1 * font.size)
    return cell


def _fit(pixels: np.ndarray, widest: int = 512) -> Image.Image:
    tile = Image.fromarray(np.ascontiguousarray(pixels))  # [H, W, 3]
    if tile.width < 128:
        scale = math.ceil(128 / tile.width)
        return tile.resize((tile.width * scale, tile.height * scale), Image.Resampling.NEAREST)
    if tile.width > widest:
        return tile.resize((widest, max(1, round(tile.height * widest / tile.width))), Image.Resampling.LANCZOS)
    return tile
