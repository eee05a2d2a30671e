"""Turns images into a CLIP's pixel values, with the same numbers on every machine and device.

Hugging Face's image processors change path with the installed packages, and torch resizes bytes on a CPU only. This
module computes Pillow's bicubic resize in Pillow's integers. Along one axis, with in/out = s and the filter w of
support 2 max(s, 1):

    c_oi = round(2^22 w((i + 1/2 - (o + 1/2) s) / max(s, 1)) / sum_i w)
    y_o  = clip(floor(sum_i c_oi x_i / 2^22 + 1/2), 0, 255)

The width is resized first, then the height. Every product and sum is an integer below 2^53, so a float64 matrix product
is exact in any order of summation. Levels equal those of Pillow 11 and 12 bit for bit. Pillow 13 resizes the height
first if it shrinks much more, or if the image is more than twice as tall as wide. Here the order is fixed.

Source: Pillow's documentation of `Image.resize`, filter BICUBIC with a = -1/2, and its 8-bit fixed point.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from esengine.base.errors import ConfigError
from esengine.models.model_files import read_mapping

_BITS = 22
_BICUBIC = 3
_VALUES_AT_ONCE = 1 << 25
"""Most image values held in float64 at one time: 256 MiB."""


@dataclass(frozen=True)
class Preprocess:
    """Resize, centre crop, rescale, normalise: the steps of a preprocessor_config.json.

    Args:
        size: the length of the shorter edge, or (height, width).
        crop: (height, width) of the centre to keep, or None to keep everything.
        mean, std: for each channel, of pixels after `scale`.
        scale: factor for levels of 0 to 255.
    """

    size: int | tuple[int, int]
    crop: tuple[int, int] | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    scale: float = 1 / 255

    @classmethod
    def read(cls, path: str | Path) -> "Preprocess":
        """Read a preprocessor_config.json, or the image_processor of a processor_config.json.

        Raises:
            ConfigError: the file is not one of these, or asks for other steps than bicubic resize, crop, normalisation.
        """
        try:
            settings = read_mapping(Path(path))
            return cls._from_settings(settings.get("image_processor", settings))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
            raise ConfigError(f"model: cannot use {Path(path).name} ({type(e).__name__}: {e})") from e

    @classmethod
    def _from_settings(cls, settings: dict[str, Any]) -> "Preprocess":
        for step in ("do_resize", "do_rescale", "do_normalize"):
            if settings.get(step, True) is not True:
                raise ValueError(f"{step}: expected true")
        if settings.get("resample", _BICUBIC) != _BICUBIC:
            raise ValueError(f"resample: expected {_BICUBIC} (bicubic), got {settings['resample']}")
        size, crop = settings["size"], settings.get("crop_size")
        if isinstance(size, dict):
            size = size["shortest_edge"] if "shortest_edge" in size else (size["height"], size["width"])
        if isinstance(crop, dict):
            crop = (crop["height"], crop["width"])
        elif crop is not None:
            crop = (crop, crop)
        if not settings.get("do_center_crop", True):
            crop = None
        edges = size if isinstance(size, tuple) else (size, size)
        for what, lengths in (("size", edges), ("crop_size", crop or ())):
            if not all(type(length) is int and length > 0 for length in lengths):
                raise ValueError(f"{what}: expected lengths of at least 1, got {settings[what]}")
        if crop and (crop[0] > edges[0] or crop[1] > edges[1]):
            raise ValueError(f"crop_size: expected at most the size {settings['size']}, got {settings['crop_size']}")
        mean, std = (tuple(float(value) for value in settings[key]) for key in ("image_mean", "image_std"))
        if len(mean) != 3 or len(std) != 3 or 0.0 in std:
            raise ValueError("image_mean, image_std: expected three values each, none of std 0")
        return cls(size, crop, mean, std, float(settings.get("rescale_factor", 1 / 255)))

    @property
    def shape(self) -> tuple[int, int] | None:
        """(height, width) of the pixel values, or None when it depends on the image."""
        return self.crop or (self.size if isinstance(self.size, tuple) else None)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Pixel values of images, uint8 [B, 3, H, W] on any device. Returns float32 [B, 3, h, w] there.

        They equal those of transformers' CLIP processor on Pillow images bit for bit, except for Pillow 13, see above.
        """
        height, width = self._resized(*images.shape[2:])
        crop = self.crop or (height, width)
        top, left = (height - crop[0]) // 2, (width - crop[1]) // 2
        at_once = max(1, _VALUES_AT_ONCE // max(1, images[:1].numel(), 3 * max(images.shape[2], height) * crop[1]))
        window = slice(top, top + crop[0]), slice(left, left + crop[1])
        parts = [resize(part, height, width, window) for part in images.split(at_once)]
        levels = torch.cat(parts) if len(images) else images.new_empty(0, 3, *crop)
        mean, std = (_of_channels(values, images.device) for values in (self.mean, self.std))
        return ((levels.double() * self.scale).float() - mean) / std

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if isinstance(self.size, tuple):
            return self.size
        short = min(height, width)
        return int(self.size * height / short), int(self.size * width / short)


def resize(
    images: torch.Tensor, height: int, width: int, window: tuple[slice, slice] = (slice(None), slice(None))
) -> torch.Tensor:
    """Pillow's bicubic resize, restricted to a window.

    Args:
        images: uint8 [B, C, H, W] on any device, H and W at least 1.
        window: rows and columns of the resized images. Only these are computed.

    Returns:
        uint8 [B, C, h, w]; height x width without a window.
    """
    rows, columns = (range(length)[shown] for length, shown in zip((height, width), window, strict=True))
    if images.shape[3] == width:
        images = images[..., columns.start : columns.stop]
    else:
        images = _round(images.double() @ _coefficients(images.shape[3], width, columns, images.device).T)
    if images.shape[2] == height:
        return images[..., rows.start : rows.stop, :]
    return _round(_coefficients(images.shape[2], height, rows, images.device) @ images.double())


def resize_ref(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """`resize` without a window, computed by Pillow, one image at a time."""
    from PIL import Image

    resized = [
        np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
        for image in images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    ]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).to(images.device)


def _round(sums: torch.Tensor) -> torch.Tensor:
    return sums.add_(1 << (_BITS - 1)).div_(1 << _BITS).floor_().clamp_(0, 255).to(torch.uint8)


# both are cached on their device: a copy for each batch would make the host wait for it


@functools.lru_cache(maxsize=32)
def _of_channels(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, device=device).view(3, 1, 1)


@functools.lru_cache(maxsize=32)
def _coefficients(length: int, size: int, shown: range, device: torch.device) -> torch.Tensor:
    """Integers c_oi of the outputs in `shown`, float64 [len(shown), length]."""
    step = length / size
    reach = max(step, 1.0)
    centre = (np.array(shown)[:, None] + 0.5) * step
    first = np.maximum((centre - 2.0 * reach + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + 2.0 * reach + 0.5).astype(np.int64), length)
    i = np.arange(length)[None, :]
    x = np.abs((i - centre + 0.5) * (1.0 / reach))
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    weights = np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0)) * ((i >= first) & (i < last))
    weights /= weights.cumsum(axis=1)[:, -1:]  # summed in Pillow's order
    return torch.from_numpy(np.trunc(weights * (1 << _BITS) + np.copysign(0.5, weights))).to(device)
