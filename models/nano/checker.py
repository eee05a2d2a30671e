"""Scores whether a picture of the nano world shows what its caption names, by rules on pixels, without a model.

The score is the mean of the degrees, each in [0, 1], of the facts that the caption names:

    object_i    density * area * colour
    shape_i     object_i * best * fit
    size_i      object_i * ramp(log radius)                          if its size is named
    place       object_1 * ramp(offset from the middle)              if named
    relation    object_1 * object_2 * ramp(distance along its axis - distance across it)
    background  ramp(share of the pixels outside the objects that have its colour)       if named
    alone       mean object_i * (1 - ramp(pixels outside the objects that have another colour than most))

    ramp(x)     from 0 to 1 between two bounds; pictures of the world are above the upper one
    object      the connected patch around the spot where the named colour is densest. A pixel's colour is the palette
                colour with the nearest tint in RGB
    density     ramp of the share of the colour in the 5 x 5 pixels of that spot; a blurred rim is too sparse for it
    area        0 for specks and for patches larger than any object of the world
    colour      ramp of the distance from the patch's mean colour to the nearest tint, in RGB
    outline     where pixels are half way from the patch's mean colour to that of the background around it. Blur hardly
                moves it. Area, centre and radius are measured within it
    fit         ramp of the intersection over union of the patch and the wanted shape, at equal area and centroid, for
                the best of several rotations
    best        1 / (1 + exp(-(fit of the wanted shape - best fit of another) / 0.02)): 1/2 where two shapes tie

Source: the facts are those of GenEval (Ghosh et al., arXiv 2310.11513), here with rules in place of detectors.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from esengine.base.errors import ConfigError, RewardError
from esengine.models.nano import world
from esengine.models.nano.world import COLOURS, SHAPES, SIDE, Spec, Wanted

VERSION = 1
"""Increases with every change that affects a score."""

_AREAS = np.array(
    [
        math.pi,
        4 * world.HALF_SQUARE**2,
        0.75 * math.sqrt(3) * world.TRIANGLE**2,
        8 * world.ARM * world.HALF_ARM - 4 * world.HALF_ARM**2,
    ]
)
"""Area of each of SHAPES, at radius 1."""
_BELOW_MIDDLE = np.array([0, 0, world.TRIANGLE / 4, 0])
"""How far the centroid of each of SHAPES is below the middle of its box, at radius 1."""
_BETWEEN_SIZES = math.log(math.sqrt(world.SIZES["small"][1] * world.SIZES["large"][0]))
_ANGLES = (-8.0, 0.0, 8.0)
_CELLS = 24
_REACH = (np.arange(_CELLS, dtype=np.float32) + 0.5) * (2 / _CELLS) - 1
"""Positions where a patch's shape is sampled: offsets from its centroid, in units of the square root of its area."""
_SOFT = 0.1
"""Width of a template's edge, in the same unit."""
_AXIS = np.arange(SIDE, dtype=np.float32) + 0.5
_COLOURS = tuple(COLOURS)
_CHUNK = 16


class Patch(NamedTuple):
    """The patch of a wanted object: degrees of object and shape; centre and radius in pixels; mask, bool [64, 64]."""

    present: float
    shape: float
    x: float
    y: float
    radius: float
    near: np.ndarray


class Checker:
    """The degree to which a picture shows what its caption names. See the module docstring for the formula.

    A picture of another size is first resized to 64 x 64. Batch mates do not affect a score.
    """

    reads_only = True

    def __init__(self):
        tints = np.array([-1.5, -0.75, 0, 0.75, 1.5], np.float32)[:, None]
        shades = [world.shaded(np.array(rgb, np.float32), tints) for rgb in COLOURS.values()]
        self.tints = np.rint(shades)  # [8, 5, 3]
        self.templates = _templates()  # [12, 24, 24]

    def __call__(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Score images, uint8 [B, 3, H, W] on any device. Returns float32 [B] on the CPU, each in [0, 1].

        Raises:
            RewardError: a prompt is not a caption of the world. The message names the word.
        """
        scores = [sum(facts.values()) / len(facts) for facts in self.facts(images, prompts)]
        return torch.tensor(scores, dtype=torch.float32)

    def facts(self, images: torch.Tensor, prompts: list[str]) -> list[dict[str, float]]:
        """The degree of each fact, by name, for each image: "object_1", "shape_1", "place" and so on.

        Arguments and errors as in `__call__`.
        """
        specs, found = [_read(prompt) for prompt in prompts], []
        for start in range(0, len(specs), _CHUNK):
            found += self._facts(_pixels(images[start : start + _CHUNK]), specs[start : start + _CHUNK])
        return found

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises ConfigError for a prompt that is not a caption of the world."""
        for prompt in prompts:
            try:
                world.parse(prompt)
            except ValueError as error:
                raise ConfigError(
                    f"expected captions of the nano world, as reward checker reads them, got {prompt!r:.80}: {error}; "
                    "other prompts need another --reward"
                ) from error

    def settings(self) -> dict[str, int]:
        return {"version": VERSION}

    def _facts(self, pixels: np.ndarray, specs: list[Spec]) -> list[dict[str, float]]:
        """`facts` from pixels, float32 [B, 64, 64, 3]."""
        tints = self.tints.reshape(-1, 3)
        nearness = pixels.reshape(-1, 3) @ (2 * tints.T) - (tints**2).sum(1)
        colours = (nearness.argmax(1) // self.tints.shape[1]).reshape(pixels.shape[:3])  # indices into COLOURS
        wanted = [(row, each) for row, spec in enumerate(specs) for each in spec.objects]
        rows = [row for row, _ in wanted]
        patches = self._patches(pixels[rows], colours[rows], [each for _, each in wanted])
        return [
            _judge(spec, [patch for patch, of in zip(patches, rows, strict=True) if of == row], colours[row])
            for row, spec in enumerate(specs)
        ]

    def _patches(self, pixels: np.ndarray, colours: np.ndarray, wanted: list[Wanted]) -> list[Patch]:
        """The patch of each of K wanted objects. Pixels [K, 64, 64, 3] and colours [K, 64, 64] repeat its picture."""
        colour = np.array([_COLOURS.index(each.colour) for each in wanted])
        mask = colours == colour[:, None, None]
        counts = _box(mask) * mask
        seed = counts == counts.max((1, 2), keepdims=True)
        seed &= seed.reshape(len(seed), -1).cumsum(1).reshape(seed.shape) == 1  # the first of equal maxima
        bits = _flood(_pack(seed & mask), _pack(mask))
        core = ~_grow(~bits)
        core = np.where(core.any(1)[:, None], core, bits)
        near, ring = _unpack(_grow(bits, 2)), _unpack(_grow(bits, 5) & ~_grow(bits, 2))
        mean = _mean(pixels, _unpack(core))  # [K, 3]
        most = np.array([np.bincount(each[~of], minlength=1).argmax() for each, of in zip(colours, near, strict=True)])
        around = ring & (colours == most[:, None, None])
        around = np.where(around.any((1, 2), keepdims=True), around, ~near)
        cover = _cover(pixels, mean, _mean(pixels, around)) * near  # [K, 64, 64]

        area = cover.sum((1, 2)) + 1e-6
        x, y = ((cover.sum(axis) * _AXIS).sum(1) / area for axis in (1, 2))
        away = np.linalg.norm(self.tints[colour] - mean[:, None], axis=-1).min(1)
        present = ramp(counts.max((1, 2)), 13, 21) * ramp(area, 15, 35) * (1 - ramp(area, 800, 1200))
        present *= 1 - ramp(away, 25, 60)
        shape, best = self._shape(cover, x, y, area, [SHAPES.index(each.shape) for each in wanted])
        radius = np.sqrt(area / _AREAS[best])
        y = y - _BELOW_MIDDLE[best] * radius
        near &= (present > 0)[:, None, None]
        return [Patch(*each) for each in zip(present, shape, x, y, radius, near, strict=True)]

    def _shape(self, cover, x, y, area, wanted: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """The degree of each wanted shape, and the index in SHAPES of the shape that fits best, both [K]."""
        step = np.sqrt(area)[:, None] * _REACH
        sampled = _sample(cover, x[:, None] + step, y[:, None] + step)[:, None]  # [K, 1, 24, 24]
        both = np.minimum(sampled, self.templates).sum((2, 3))
        fits = both / (sampled.sum((2, 3)) + self.templates.sum((1, 2)) - both)
        fits = fits.reshape(len(area), len(SHAPES), -1).max(2)  # [K, 4]
        rows = np.arange(len(area))
        others = np.where(np.arange(len(SHAPES)) == np.array(wanted)[:, None], -np.inf, fits).max(1)
        fit = fits[rows, wanted]
        degree = ramp(fit, 0.5, 0.75) / (1 + np.exp((others - fit) / 0.02))
        return degree, fits.argmax(1)


def ramp(x: np.ndarray | float, low: float, high: float) -> np.ndarray:
    """0 up to `low`, 1 from `high`, linear between."""
    return np.clip((np.asarray(x, np.float64) - low) / (high - low), 0, 1)


def _judge(spec: Spec, patches: list[Patch], colours: np.ndarray) -> dict[str, float]:
    facts = {}
    for number, (wanted, patch) in enumerate(zip(spec.objects, patches, strict=True), 1):
        facts[f"object_{number}"] = patch.present
        facts[f"shape_{number}"] = patch.present * patch.shape
        if wanted.size:
            facts[f"size_{number}"] = patch.present * _size(wanted.size, patch.radius)
    if spec.place:
        facts["place"] = patches[0].present * _place(spec.place, patches[0].x - SIDE / 2, patches[0].y - SIDE / 2)
    if spec.relation:
        facts["relation"] = patches[0].present * patches[1].present * _relation(spec.relation, *patches)
    outside = ~np.any([_unpack(_grow(_pack(patch.near[None])))[0] for patch in patches], axis=0)
    counts = np.bincount(colours[outside], minlength=len(COLOURS))
    total = max(counts.sum(), 1)
    if spec.background:
        facts["background"] = ramp(counts[_COLOURS.index(spec.background)] / total, 0.5, 0.95)
    stray = outside & (colours != counts.argmax())
    lumps = (_box(stray[None], 1)[0][stray] >= 6).sum()  # ignores rims and single pixels
    facts["alone"] = np.mean([patch.present for patch in patches]) * (1 - ramp(lumps, 8, 40))
    return {name: float(degree) for name, degree in facts.items()}


def _size(size: str, radius: float) -> float:
    large = ramp(math.log(radius + 1e-6), _BETWEEN_SIZES - 0.12, _BETWEEN_SIZES + 0.12)
    return large * (1 - ramp(radius, 16, 20)) if size == "large" else (1 - large) * ramp(radius, 3, 5)


def _place(place: str, right: float, down: float) -> float:
    if place == "centre":
        return 1 - ramp(max(abs(right), abs(down)), 6, 11)
    along, across = (right, down) if place in ("left", "right") else (down, right)
    along = -along if place in ("left", "top") else along
    return ramp(along, 5, 10) * (1 - ramp(abs(across), 9, 18))


def _relation(relation: str, first: Patch, second: Patch) -> float:
    right, down = second.x - first.x, second.y - first.y
    along, across = (right, down) if relation in ("left of", "right of") else (down, right)
    along = -along if relation in ("right of", "below") else along
    return ramp(along - abs(across), 0, 8)


def _read(prompt: str) -> Spec:
    try:
        return world.parse(prompt)
    except ValueError as e:
        raise RewardError(f"expected a caption of the nano world: {e}; other prompts need another reward") from None


def _pixels(images: torch.Tensor) -> np.ndarray:
    """float32 [B, 64, 64, 3] from uint8 [B, 3, H, W]."""
    images = images.cpu().float()
    if images.shape[2:] != (SIDE, SIDE):
        images = F.interpolate(images, (SIDE, SIDE), mode="bilinear", antialias=True)
    return images.permute(0, 2, 3, 1).contiguous().numpy()


def _templates() -> np.ndarray:
    """Each shape in each rotation, with area 1 around its centroid: [12, 24, 24], grouped by shape."""
    drawn = []
    for shape, area, below in zip(SHAPES, _AREAS, _BELOW_MIDDLE, strict=True):
        for angle in _ANGLES:
            cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            radius = np.float32(1 / math.sqrt(area))
            u, v = cos * _REACH + sin * _REACH[:, None], cos * _REACH[:, None] - sin * _REACH
            drawn.append(np.clip(0.5 - world.distance(shape, u, v + below * radius, radius) / _SOFT, 0, 1))
    return np.array(drawn, np.float32)


def _cover(pixels: np.ndarray, inside: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """[K, 64, 64]: 0 where a pixel has the outside's colour, 1 for the inside's, steeper than linear between."""
    line = inside - outside
    line /= np.maximum((line**2).sum(1, keepdims=True), 1)  # [K, 3]
    share = ((pixels - outside[:, None, None]) @ line[:, None, :, None])[..., 0]
    return np.clip(2 * share - 0.5, 0, 1)


def _mean(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Mean colours [K, 3] of [K, 64, 64, 3] under masks, bool [K, 64, 64]; 0 where a mask is empty."""
    weights = mask.reshape(len(mask), 1, -1).astype(np.float32)
    total = (weights @ pixels.reshape(len(mask), -1, 3))[:, 0]
    return total / np.maximum(weights.sum(2), 1)


def _sample(cover: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Bilinear values [K, n, n] of [K, 64, 64] at pixel positions x, y [K, n]; 0 outside."""
    padded = np.pad(cover, ((0, 0), (1, 1), (1, 1)))
    x, y = (np.clip(each + 0.5, 0, SIDE + 0.999) for each in (x, y))  # pixel i of cover is at i + 1.5
    left, top = x.astype(int), y.astype(int)
    right, low = (x - left)[:, None, :], (y - top)[:, :, None]
    k, row, column = np.arange(len(cover))[:, None, None], top[:, :, None], left[:, None, :]
    upper = padded[k, row, column] * (1 - right) + padded[k, row, column + 1] * right
    lower = padded[k, row + 1, column] * (1 - right) + padded[k, row + 1, column + 1] * right
    return upper * (1 - low) + lower * low


def _box(mask: np.ndarray, reach: int = 2) -> np.ndarray:
    """For each pixel, the number of set pixels at most `reach` away in x and y."""
    width = 2 * reach + 1
    padded = np.pad(mask, ((0, 0), (reach, reach), (reach, reach))).astype(np.uint8)
    lines = sum(padded[:, i : i + SIDE] for i in range(width))
    return sum(lines[:, :, i : i + SIDE] for i in range(width))


def _pack(mask: np.ndarray) -> np.ndarray:
    """Pack each row of 64 pixels into the bits of one number: uint64 [K, 64] from bool [K, 64, 64]."""
    return np.packbits(mask, axis=-1, bitorder="little").view("<u8")[..., 0]


def _unpack(bits: np.ndarray) -> np.ndarray:
    return np.unpackbits(bits[..., None].view(np.uint8), axis=-1, bitorder="little").view(bool)


def _grow(bits: np.ndarray, times: int = 1) -> np.ndarray:
    """Set the eight neighbours of every set pixel."""
    for _ in range(times):
        lines = bits | bits << np.uint64(1) | bits >> np.uint64(1)
        bits = lines.copy()
        bits[:, 1:] |= lines[:, :-1]
        bits[:, :-1] |= lines[:, 1:]
    return bits


def _flood(bits: np.ndarray, within: np.ndarray) -> np.ndarray:
    """All pixels of `within` that are connected to `bits`."""
    while True:
        grown = _grow(bits) & within
        if np.array_equal(grown, bits):
            return bits
        bits = grown
