"""JPEG compressibility: a real black-box reward that needs no weights."""

import io

import numpy as np
import torch
from PIL import Image

from esengine.base.errors import ConfigError


class JpegCompressibility:
    """Minus the size of each image as a JPEG, in kB of 1000 bytes.

    libjpeg writes the bytes. So scores repeat exactly on one Pillow build and may differ by some bytes on another.

    Args:
        quality: Pillow's JPEG quality, 1 to 100. DDPO uses 95.

    Raises:
        ConfigError: quality is not an int in that range.

    Source: Black et al., "Training Diffusion Models with Reinforcement Learning", arXiv 2305.13301.
    """

    sign = -1.0
    reads_only = True

    def __init__(self, quality: int = 95):
        if type(quality) is not int or not 1 <= quality <= 100:
            raise ConfigError(f"quality: expected an int from 1 to 100, got {quality!r}")
        self.quality = quality

    def __call__(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Score images, uint8 [B, 3, H, W] on any device. Returns float32 [B] on the CPU."""
        pixels = images.permute(0, 2, 3, 1).contiguous().cpu().numpy()  # [B, H, W, 3]
        sizes = [self._bytes(image) for image in pixels]  # threads gain nothing: Pillow keeps the GIL while it encodes
        return torch.tensor(sizes, dtype=torch.float32) * (self.sign / 1000)

    def settings(self) -> dict[str, int]:
        """The options, for the record of a run."""
        return {"quality": self.quality}

    def _bytes(self, pixels: np.ndarray) -> int:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="JPEG", quality=self.quality)
        return buffer.tell()


class JpegIncompressibility(JpegCompressibility):
    """The size of each image as a JPEG, in kB of 1000 bytes: the opposite of `JpegCompressibility`."""

    sign = 1.0
