"""A small world of captioned images: one or two coloured shapes on a coloured background.

    caption    = object (place | relation object | nothing) ["on a" colour "background"]
    object     = "a" [size] colour shape
    place      = "on the left" | "on the right" | "at the top" | "at the bottom" | "in the centre"
    relation   = "left of" | "right of" | "above" | "below"

The two objects and the background differ in colour. What a caption leaves out varies freely, and so do the exact
position, radius, rotation and shade. Each caption belongs to one split, by a hash of the combination that it names:
"a red circle left of a blue square" and "a blue square right of a red circle" name the same one.

Everything follows from uniform numbers of `numpy.random.Generator.random` and from arithmetic that IEEE 754 defines
to the last bit, so that a seed means the same captions and pixels everywhere.

Lengths are pixels of a 64 px image, x to the right and y down, from its top left corner.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

SIDE = 64
COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (37, 88, 214),
    "yellow": (245, 214, 45),
    "purple": (140, 58, 176),
    "orange": (245, 133, 31),
    "white": (240, 240, 240),
    "black": (26, 26, 28),
}
"""sRGB of shade 0."""
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": (6.0, 7.5), "large": (11.0, 13.5)}
"""Least and largest radius."""
PLACES = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "centre": "in the centre",
}
RELATIONS = ("left of", "right of", "above", "below")
SPLITS = ("train", "validation", "test")

TINT = 0.15
"""Shade 1 is this far on the way to white, -1 to black."""
ANGLE = 10.0
"""Largest rotation in degrees."""
HALF_SQUARE, TRIANGLE, ARM, HALF_ARM = 0.88, 1.12, 1.02, 0.36
"""In radii: half the square's side; the triangle's circumradius; the cross's arms, their length and half width."""
EXTENT = 1.1
"""In radii: no shape reaches further from its centre along x or y, however it is rotated."""
MARGIN, GAP = 0.5, 2.0
"""Least pixels between an object and the edge, and between two objects along their relation's axis."""

_ONE = 0.45  # share of captions with one object
_NAMED = {"size": 0.65, "place": 0.6, "background": 0.7}  # how often a caption names each
_OPPOSITE = {"right of": "left of", "below": "above"}
_CHUNK = 32


@dataclass(frozen=True)
class Thing:
    """One object as it is drawn: centre of its upright box, radius, rotation in degrees, shade from -1 to 1."""

    size: str
    colour: str
    shape: str
    x: float
    y: float
    radius: float
    angle: float = 0.0
    shade: float = 0.0


@dataclass(frozen=True)
class Scene:
    """One picture. The background's shade is `shade` in the middle and changes by `gradient` (x, y) up to an edge."""

    objects: tuple[Thing, ...]
    background: str
    shade: float = 0.0
    gradient: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Wanted:
    """One object as a caption names it; a size of None is left open."""

    colour: str
    shape: str
    size: str | None = None


@dataclass(frozen=True)
class Spec:
    """What a caption says must be there: one object, perhaps with a place, or two with a relation, first to second."""

    objects: tuple[Wanted, ...]
    place: str | None = None
    relation: str | None = None
    background: str | None = None
    split: str = field(init=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "split", _split(self.combination()))

    def combination(self) -> str:
        """The same text for all captions that name the same things."""
        objects, relation = self.objects, self.relation
        if relation in _OPPOSITE:
            objects, relation = objects[::-1], _OPPOSITE[relation]
        named = [f"{each.size} {each.colour} {each.shape}" for each in objects]
        return "|".join([*named, str(self.place or relation), str(self.background)])

    def caption(self) -> str:
        """In the words of the grammar."""
        first, *second = (_a(" ".join(filter(None, (each.size, each.colour, each.shape)))) for each in self.objects)
        words = [first, PLACES.get(self.place, ""), *((self.relation, *second) if second else ())]
        words.append(f"on {_a(self.background)} background" if self.background else "")
        return " ".join(filter(None, words))


WORDS = tuple(
    sorted(
        {"a", "an", "background", *COLOURS, *SHAPES, *SIZES}
        | {word for phrase in (*PLACES.values(), *RELATIONS) for word in phrase.split()}
    )
)
"""Every word that a caption can contain."""


def parse(caption: str) -> Spec:
    """Read a caption. Upper case, a full stop at the end and more spaces than one are let pass.

    Raises:
        ValueError: it is not of the grammar; the message names the word and what was expected there.
    """
    if not isinstance(caption, str):
        raise ValueError(f"caption: expected text, got {type(caption).__name__}")
    return _Reader(caption).spec()


def sample_caption(rng: np.random.Generator, split: str) -> str:
    """A random caption of a split: "train" (80 % of all combinations), "validation" or "test" (10 % each).

    Raises:
        ValueError: an unknown split.
    """
    return _sample_spec(rng, split).caption()


def sample_scene(caption: str, rng: np.random.Generator) -> Scene:
    """A random scene that satisfies a caption.

    Raises:
        ValueError: as `parse`.
    """
    return _fill(parse(caption), rng)


def draw(scene: Scene) -> np.ndarray:
    """The picture, antialiased. Returns uint8 [64, 64, 3]."""
    return draw_all([scene])[0]


def draw_all(scenes: Sequence[Scene]) -> np.ndarray:
    """Pictures, each the same to the last bit as from `draw`. Returns uint8 [B, 64, 64, 3]."""
    images = np.empty((len(scenes), SIDE, SIDE, 3), np.uint8)
    for start in range(0, len(scenes), _CHUNK):
        images[start : start + _CHUNK] = _paint(scenes[start : start + _CHUNK])
    return images


def distance(shape: str, u: np.ndarray, v: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Pixels from the outline, negative inside, near enough to it for antialiasing. u, v: [N, 64, 64] in its axes."""
    if shape == "circle":
        return np.sqrt(u * u + v * v) - radius
    u, v = np.abs(u), v if shape == "triangle" else np.abs(v)
    if shape == "square":
        return np.maximum(u, v) - np.float32(HALF_SQUARE) * radius
    if shape == "cross":
        arm, half = np.float32(ARM) * radius, np.float32(HALF_ARM) * radius
        return np.maximum(np.maximum(u, v) - arm, np.minimum(u, v) - half)
    circumradius = np.float32(TRIANGLE) * radius
    v = v - circumradius / 4  # from the middle of the box to the centroid
    return np.maximum(v, np.float32(math.sqrt(0.75)) * u - v / 2) - circumradius / 2


def shaded(colour: np.ndarray, shade: np.ndarray) -> np.ndarray:
    """An sRGB colour, 0 to 255, at a shade. The arguments broadcast."""
    return colour + np.float32(TINT) * (np.maximum(shade, 0) * (255 - colour) + np.minimum(shade, 0) * colour)


def captions(split: str, count: int, seed: int = 0) -> list[str]:
    """Captions of a split that all name different combinations, the same list for ever.

    Raises:
        ValueError: an unknown split, or more captions than it can give.
    """
    rng, found, misses = np.random.default_rng(seed), {}, 0
    while len(found) < count:
        spec = _sample_spec(rng, split)
        misses = misses + 1 if spec.combination() in found else 0
        if misses == 10_000:
            raise ValueError(f"count: expected at most about {len(found)} captions of split {split}, got {count}")
        found.setdefault(spec.combination(), spec.caption())
    return list(found.values())


def wrong_captions(caption: str, scene: Scene, rng: np.random.Generator) -> dict[str, str]:
    """For each kind of fact that a caption of the scene names, a caption that is wrong in one such fact.

    Kinds are colour, shape, size, place, relation, background, and "binding": two objects' colours exchanged. A wrong
    caption may be of any split.
    """
    spec, used = parse(caption), {scene.background, *(thing.colour for thing in scene.objects)}
    unused = [colour for colour in COLOURS if colour not in used]

    def other(options, than=None):
        return str(rng.choice([each for each in options if each != than]))

    def changed(at: int, **fields) -> Spec:
        return replace(spec, objects=tuple(replace(o, **fields) if i == at else o for i, o in enumerate(spec.objects)))

    at = int(rng.integers(len(spec.objects)))
    sized = [i for i, each in enumerate(spec.objects) if each.size]
    found = {
        "colour": changed(at, colour=other(unused)),
        "shape": changed(at, shape=other(SHAPES, spec.objects[at].shape)),
    }
    if sized:
        at = int(rng.choice(sized))
        found["size"] = changed(at, size=other(SIZES, spec.objects[at].size))
    if spec.place:
        found["place"] = replace(spec, place=other(PLACES, spec.place))
    if spec.background:
        found["background"] = replace(spec, background=other(unused))
    if spec.relation:
        found["relation"] = replace(spec, relation=other(RELATIONS, spec.relation))
        first, second = spec.objects
        exchanged = replace(first, colour=second.colour), replace(second, colour=first.colour)
        found["binding"] = replace(spec, objects=exchanged)
    return {kind: wrong.caption() for kind, wrong in found.items()}


def batch(split: str, count: int, seed: int) -> tuple[list[str], np.ndarray]:
    """Random captions of a split, each with a picture of it; a caption may come twice.

    Returns:
        Captions [B] and uint8 [B, 64, 64, 3].

    Raises:
        ValueError: an unknown split.
    """
    rng = np.random.default_rng(seed)
    specs = [_sample_spec(rng, split) for _ in range(count)]
    return [spec.caption() for spec in specs], draw_all([_fill(spec, rng) for spec in specs])


def _split(combination: str) -> str:
    bucket = int.from_bytes(hashlib.blake2b(combination.encode(), digest_size=8).digest(), "big") % 10
    return {8: "validation", 9: "test"}.get(bucket, "train")


def _a(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _pick(options: Iterable[str], u: float) -> str:
    options = tuple(options)
    return options[int(u * len(options))]


def _maybe(options: Iterable[str], u: float, share: float) -> str | None:
    """None, or with probability `share` one of the options."""
    return _pick(options, u / share) if u < share else None


def _sample_spec(rng: np.random.Generator, split: str) -> Spec:
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    while True:
        u = rng.random(10).tolist()
        colours, objects = list(COLOURS), []
        for i in range(1 if u[0] < _ONE else 2):
            colour = _pick(colours, u[1 + 3 * i])
            colours.remove(colour)
            size = _maybe(SIZES, u[3 + 3 * i], _NAMED["size"])
            objects.append(Wanted(colour, _pick(SHAPES, u[2 + 3 * i]), size))
        one = len(objects) == 1
        spec = Spec(
            tuple(objects),
            place=_maybe(PLACES, u[7], _NAMED["place"]) if one else None,
            relation=None if one else _pick(RELATIONS, u[7]),
            background=_maybe(colours, u[8], _NAMED["background"]),
        )
        if spec.split == split:
            return spec


def _fill(spec: Spec, rng: np.random.Generator) -> Scene:
    u = iter(rng.random(16).tolist())

    def between(low: float, high: float) -> float:
        return low + (high - low) * next(u)

    radii, sizes = [], []
    for wanted in spec.objects:
        sizes.append(wanted.size or _pick(SIZES, next(u)))
        radii.append(between(*SIZES[sizes[-1]]))
    reach = [MARGIN + EXTENT * radius for radius in radii]
    if spec.relation:
        centres = _pair(spec.relation, radii, reach, between)
    else:
        centres = [_place(spec.place, reach[0], between)]
    things = tuple(
        Thing(size, wanted.colour, wanted.shape, x, y, radius, between(-ANGLE, ANGLE), between(-1, 1))
        for wanted, size, radius, (x, y) in zip(spec.objects, sizes, radii, centres, strict=True)
    )
    others = [colour for colour in COLOURS if all(colour != wanted.colour for wanted in spec.objects)]
    background = spec.background or _pick(others, next(u))
    return Scene(things, background, between(-1, 1), (between(-0.35, 0.35), between(-0.35, 0.35)))


def _place(place: str | None, reach: float, between) -> tuple[float, float]:
    if place is None:
        return between(reach, SIDE - reach), between(reach, SIDE - reach)
    if place == "centre":
        return between(27, 37), between(27, 37)
    outer, inner = between(reach, 20.5), between(25, 39)
    outer = outer if place in ("left", "top") else SIDE - outer
    return (outer, inner) if place in ("left", "right") else (inner, outer)


def _pair(relation: str, radii: list[float], reach: list[float], between) -> list[tuple[float, float]]:
    """Two centres that are apart along the relation's axis and at most 6 px across it."""
    swap = relation in _OPPOSITE
    near, far = reach[::-1] if swap else reach
    slack = SIDE - 2 * (near + far) + 2 * MARGIN - GAP
    low, high = sorted((between(0, slack), between(0, slack)))
    along = [near + low, SIDE - far - (slack - high)]
    along = along[::-1] if swap else along
    across = between(max(20.0, reach[0]), min(44.0, SIDE - reach[0]))
    second = min(max(across + between(-6, 6), reach[1]), SIDE - reach[1])
    pairs = list(zip(along, (across, second), strict=True))
    return pairs if relation in ("left of", "right of") else [(x, y) for y, x in pairs]


def _column(values: Iterable) -> np.ndarray:
    return np.array(list(values), np.float32).reshape(-1, 1, 1)


def _paint(scenes: Sequence[Scene]) -> np.ndarray:
    """uint8 [B, 64, 64, 3]."""
    axis = np.arange(SIDE, dtype=np.float32) + np.float32(0.5)
    x, y = axis[None, None, :], axis[None, :, None]
    half = np.float32(SIDE / 2)
    shade = _column(scene.shade for scene in scenes) + (
        _column(scene.gradient[0] for scene in scenes) * ((x - half) / half)
        + _column(scene.gradient[1] for scene in scenes) * ((y - half) / half)
    )  # [B, 64, 64]
    colour = np.array([COLOURS[scene.background] for scene in scenes], np.float32)[:, :, None, None]
    images = shaded(colour, shade[:, None])  # [B, 3, 64, 64]
    for slot in range(max((len(scene.objects) for scene in scenes), default=0)):
        for shape in SHAPES:
            rows = [
                i for i, scene in enumerate(scenes) if len(scene.objects) > slot and scene.objects[slot].shape == shape
            ]
            if rows:
                _add(images, rows, [scenes[i].objects[slot] for i in rows], x, y)
    return np.floor(images + np.float32(0.5)).astype(np.uint8).transpose(0, 2, 3, 1)


def _add(images: np.ndarray, rows: list[int], things: list[Thing], x: np.ndarray, y: np.ndarray) -> None:
    """Draws things of one shape over the images of these rows, float32 [B, 3, 64, 64]."""
    # six decimals, so that another libm's last bit cannot show
    cos = _column(round(math.cos(math.radians(thing.angle)), 6) for thing in things)
    sin = _column(round(math.sin(math.radians(thing.angle)), 6) for thing in things)
    right, down = x - _column(thing.x for thing in things), y - _column(thing.y for thing in things)
    outside = distance(
        things[0].shape, cos * right + sin * down, cos * down - sin * right, _column(thing.radius for thing in things)
    )
    cover = np.clip(np.float32(0.5) - outside, 0, 1)[:, None]
    colour = np.array([COLOURS[thing.colour] for thing in things], np.float32)[:, :, None, None]
    colour = shaded(colour, _column(thing.shade for thing in things)[..., None])
    images[rows] += cover * (colour - images[rows])


class _Reader:
    def __init__(self, caption: str):
        self.text, self.at = caption, 0
        self.words = caption.strip().removesuffix(".").lower().split()

    def spec(self) -> Spec:
        objects, places = [self._object()], {phrase: name for name, phrase in PLACES.items()}
        place = relation = background = None
        if phrase := self._phrase(places):
            place = places[phrase]
        elif relation := self._phrase(RELATIONS):
            objects.append(self._object())
            if objects[0].colour == objects[1].colour:
                raise self._expected("another colour than the first object's", self.at - 2)
        if self._phrase(("on a", "on an")):
            background = self._one(COLOURS, "a colour")
            if any(background == each.colour for each in objects):
                raise self._expected("a background of another colour than its objects", self.at - 1)
            self._one(("background",), "background")
        if self.at < len(self.words):
            rest = "a background" if place or relation else "a place, a relation or a background"
            raise self._expected("the end" if background else rest)
        return Spec(tuple(objects), place, relation, background)

    def _object(self) -> Wanted:
        self._one(("a", "an"), "a or an")
        size = self._phrase(SIZES)
        colour = self._one(COLOURS, "a colour" if size else "a size or a colour")
        return Wanted(colour, self._one(SHAPES, "a shape"), size)

    def _phrase(self, phrases: Iterable[str]) -> str | None:
        for phrase in phrases:
            words = phrase.split()
            if self.words[self.at : self.at + len(words)] == words:
                self.at += len(words)
                return phrase
        return None

    def _one(self, words: Iterable[str], what: str) -> str:
        found = self._phrase(words)
        if found is None:
            listed = "" if len(tuple(words)) < 3 else f" ({', '.join(words)})"
            raise self._expected(what + listed)
        return found

    def _expected(self, what: str, at: int | None = None) -> ValueError:
        at = self.at if at is None else at
        got = repr(self.words[at][:40]) if at < len(self.words) else "the end"
        text = self.text if len(self.text) <= 100 else self.text[:100] + "..."
        return ValueError(f"caption: expected {what}, got {got} as word {at + 1} of {text!r}")
