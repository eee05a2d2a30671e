"""What a run writes down for people: metrics.jsonl, TensorBoard, image strips."""

import json
import logging
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from esengine.checkpoint import RunFolder
from esengine.files import replace_file

_log = logging.getLogger(__name__)


class RunLog:
    """Appends to a run folder's metrics, TensorBoard and strips. Use it in a `with` statement, or call `close`.

    Args:
        folder: the run folder, held.
        resume_step: the step the run goes on from: what an earlier process logged at this step and later is dropped,
            from the file atomically and from TensorBoard by its purge. None starts afresh.
    """

    def __init__(self, folder: RunFolder, resume_step: int | None = None):
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self._strips = folder.strips
        _keep_steps_before(folder.metrics, resume_step or 0)
        self._metrics = open(folder.metrics, "a", encoding="utf-8")  # noqa: SIM115 (held until close)
        self._tensorboard = SummaryWriter(str(folder.tensorboard), purge_step=resume_step, flush_secs=10)

    def log(self, step: int, metrics: dict[str, float | int | str]) -> None:
        """Append one line {"step": step, **metrics}, flushed, and the numbers to TensorBoard.

        A number that is not finite is written as null, for JSON has no NaN; TensorBoard gets it as it is.
        """
        record = {"step": step}
        for name, value in metrics.items():
            record[name] = None if isinstance(value, float) and not math.isfinite(value) else value
            if not isinstance(value, str):
                self._tensorboard.add_scalar(name, value, step)
        self._metrics.write(json.dumps(record, allow_nan=False) + "\n")
        self._metrics.flush()

    def strip(self, step: int, images: dict[str, torch.Tensor], captions: Sequence[str] = ()) -> Path:
        """Write strips/step_00000010.png, one labelled row of images each, and the same to TensorBoard.

        Args:
            step: for the name.
            images: label -> uint8 [K, 3, H, W] on any device.
            captions: texts above the columns, such as their prompts.

        Returns:
            The file's path.

        Raises:
            ValueError: see `draw_strip`.
        """
        picture = draw_strip(images, captions)
        path = self._strips / f"step_{step:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
        self._tensorboard.add_image("strips", np.asarray(picture), step, dataformats="HWC")
        return path

    def close(self) -> None:
        self._metrics.close()
        self._tensorboard.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def draw_strip(images: dict[str, torch.Tensor], captions: Sequence[str] = (), margin: int = 4) -> Image.Image:
    """Draw one row of images for each label, the label on its left and captions above the columns.

    Images are shown 128 to 512 pixels wide: smaller ones by whole pixels, larger ones resampled.

    Args:
        images: label -> uint8 [K, 3, H, W]; rows may differ in K.
        captions: texts above the columns, wrapped to three lines.
        margin: pixels between images.

    Raises:
        ValueError: no image, or one that is not uint8 [K, 3, H, W].
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

    font = ImageFont.load_default()
    gutter = math.ceil(max(font.getbbox(label)[2] for label in rows)) + 2 * margin
    header = 3 * 13 + margin if captions else 0
    picture = Image.new(
        "RGB", (gutter + columns * (width + margin), header + len(rows) * (height + margin)), color="white"
    )
    for column, caption in enumerate(captions[:columns]):
        cell = Image.new("RGB", (width, header), color="white")  # clips a text that is too wide
        lines = textwrap.wrap(caption, width=width // 5, max_lines=3, placeholder="...")
        ImageDraw.Draw(cell).multiline_text((0, 0), "\n".join(lines), fill="black", font=font, spacing=1)
        picture.paste(cell, (gutter + column * (width + margin), 0))
    draw = ImageDraw.Draw(picture)
    for index, (label, row) in enumerate(rows.items()):
        top = header + index * (height + margin)
        draw.text((margin, top + height // 2), label, fill="black", font=font, anchor="lm")
        for column, tile in enumerate(row):
            picture.paste(tile, (gutter + column * (width + margin), top))
    return picture


def _fit(pixels: np.ndarray) -> Image.Image:
    tile = Image.fromarray(np.ascontiguousarray(pixels))  # [H, W, 3]
    if tile.width < 128:
        scale = math.ceil(128 / tile.width)
        return tile.resize((tile.width * scale, tile.height * scale), Image.Resampling.NEAREST)
    if tile.width > 512:
        return tile.resize((512, max(1, round(tile.height * 512 / tile.width))), Image.Resampling.LANCZOS)
    return tile


def _keep_steps_before(metrics: Path, step: int) -> None:
    if not metrics.exists():
        return
    data = metrics.read_bytes()
    lines = data.splitlines()
    records = [(_step(line), line) for line in lines]
    torn = sum(found is None for found, _ in records)
    if torn:
        _log.warning("%s: dropped %d line(s) that are not a record, as a killed process leaves", metrics, torn)
    kept = b"".join(line + b"\n" for found, line in records if found is not None and found < step)
    if kept != data:
        replace_file(metrics, kept)


def _step(line: bytes) -> int | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return step if isinstance(step, int) else None
