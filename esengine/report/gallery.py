"""A gallery of base and adapter images side by side, as one image file and one page."""

import textwrap
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from esengine.base.files import write_atomic
from esengine.evaluation.statistics import flatten
from esengine.report.page import write
from esengine.report.thumbnails import embed

TILE, GAP, CAPTION, MARGIN = 512, 8, 86, 32
PAGE_SIDE, PAGE_BYTES = 1024, 300_000


def write_gallery(
    folder: Path, prompts: list[str], rows: dict[str, torch.Tensor], settings: dict[str, Any]
) -> tuple[Path, Path]:
    """Write FOLDER/gallery.png and FOLDER/gallery.html, which show each prompt's images side by side.

    Args:
        folder: made if missing.
        prompts: P texts.
        rows: label -> uint8 [P, 3, H, W] on a CPU, such as base and adapter.
        settings: settings of the images, for the end of the page.

    Returns:
        Both paths.
    """
    pictures = {label: [Image.fromarray(p) for p in row.permute(0, 2, 3, 1).numpy()] for label, row in rows.items()}
    sheet = folder / "gallery.png"
    write_atomic(sheet, lambda path: _draw(prompts, pictures).save(path, "PNG"))
    shown = [
        (prompt, [(label, embed(row[i], side=PAGE_SIDE, most=PAGE_BYTES)) for label, row in pictures.items()])
        for i, prompt in enumerate(prompts)
    ]
    page = write(folder / "gallery.html", "gallery.html", title="Gallery", prompts=shown, settings=flatten(settings))
    return sheet, page


def _draw(prompts: list[str], pictures: dict[str, list[Image.Image]]) -> Image.Image:
    """A sheet with two prompts a row. The prompt and the labels are above the images."""
    labels = list(pictures)
    size = pictures[labels[0]][0].size
    scale = TILE / max(size)
    width, height = (max(1, round(edge * scale)) for edge in size)
    resample = Image.Resampling.NEAREST if scale > 2 else Image.Resampling.LANCZOS
    across = len(labels) * width + (len(labels) - 1) * GAP
    columns = min(2, len(prompts))
    picture = Image.new(
        "RGB",
        (MARGIN + columns * (across + MARGIN), MARGIN + -(-len(prompts) // columns) * (CAPTION + height + MARGIN)),
        "white",
    )
    draw = ImageDraw.Draw(picture)
    large, small = ImageFont.load_default(22), ImageFont.load_default(16)
    for i, prompt in enumerate(prompts):
        left = MARGIN + i % columns * (across + MARGIN)
        top = MARGIN + i // columns * (CAPTION + height + MARGIN)
        lines = textwrap.wrap(prompt, width=max(10, across // 10), max_lines=2, placeholder="…")
        draw.multiline_text((left, top), "\n".join(lines), fill="black", font=large, spacing=4)
        for j, label in enumerate(labels):
            x = left + j * (width + GAP)
            draw.text((x, top + CAPTION - 8), label, fill="#555555", font=small, anchor="ls")
            picture.paste(pictures[label][i].resize((width, height), resample), (x, top + CAPTION))
    return picture
