"""Charts as shapes in SVG coordinates. `templates/parts.html` draws them.

Every chart is 360 units wide, so that text of 11 units is legible on a phone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from esengine.report.words import figure, short, signed, tick

WIDTH, HEIGHT = 360, 190
TOP, RIGHT, BOTTOM = 10, 10, 24
MAX_POINTS = 300
MAX_DOTS = 40
MAX_BINS = 32
MIN_SMOOTHED = 20
"""A curve with fewer points is drawn as it is."""
TINY = 1e-300
"""A smaller range of values counts as zero, because dividing by it overflows."""


@dataclass(frozen=True)
class Chart:
    """The content of a chart, in viewBox units.

    Attributes:
        title: the heading.
        reading: a summary, for screen readers and for the line below the chart while nothing is hovered.
        legend: (colour 0..7, label).
        note: a caption.
        x_ticks, y_ticks: (position, label).
        shapes: (CSS classes, path).
        marks: (x, label) of vertical lines.
        hits: (x, y, width, height, text): an area that shows the text when it is hovered or tapped.
        left: the plot's left edge.
        height: height of the viewBox.
    """

    title: str
    reading: str
    legend: list[tuple[int, str]] = field(default_factory=list)
    note: str = ""
    x_ticks: list[tuple[float, str]] = field(default_factory=list)
    y_ticks: list[tuple[float, str]] = field(default_factory=list)
    shapes: list[tuple[str, str]] = field(default_factory=list)
    marks: list[tuple[float, str]] = field(default_factory=list)
    hits: list[tuple[float, float, float, float, str]] = field(default_factory=list)
    left: float = 40
    height: float = HEIGHT
    width: float = WIDTH
    right: float = WIDTH - RIGHT
    top: float = TOP
    bottom: float = HEIGHT - BOTTOM


@dataclass(frozen=True)
class Series:
    """One curve: y float [n], NaN for a missing value, and an optional band (low, high) around it."""

    label: str
    y: np.ndarray
    band: tuple[np.ndarray, np.ndarray] | None = None


def lines(
    title: str,
    x: np.ndarray,
    series: Sequence[Series],
    *,
    marks: Sequence[tuple[float, str]] = (),
    stacked: bool = False,
    zero: bool = False,
    note: str = "",
) -> Chart:
    """Curves over steps.

    Args:
        title: the chart's heading.
        x: float [n], increasing.
        series: the curves. Above 300 points, each point drawn is the mean of several. From 20 points on, the line is
            `smoothed`, with the points' own line behind it. The note says so.
        marks: (x, label) of vertical lines.
        stacked: draw areas on top of one another, for series that are parts of a sum.
        zero: include 0 in the vertical axis and draw a line at 0.
        note: a caption.
    """
    each = math.ceil(len(x) / MAX_POINTS)
    if each > 1:
        x = _thin(x, each)
        series = [Series(s.label, _thin(s.y, each), s.band and tuple(_thin(b, each) for b in s.band)) for s in series]
        note = f"{note} Each point is the mean of {each} steps.".strip()
    window = len(x) // 10
    smooth = not stacked and len(x) >= MIN_SMOOTHED
    if smooth:
        note = f"{note} Thick: averaged over {window} points on each side, as far as there are as many.".strip()
    tops = np.cumsum([np.nan_to_num(s.y) for s in series], axis=0) if stacked else [s.y for s in series]
    values = [*tops, *(edge for s in series if s.band for edge in s.band), *([np.zeros(1)] if zero or stacked else [])]
    y_axis = _Axis(np.concatenate(values), HEIGHT - BOTTOM, TOP)
    left = 14 + 6 * max(len(label) for _, label in y_axis.ticks)
    x_axis = _Axis(x, left, WIDTH - RIGHT, whole=True, pad=0)
    shapes = []
    for colour, (one, top) in enumerate(zip(series, tops, strict=True)):
        below = tops[colour - 1] if stacked and colour else np.zeros(len(x))
        band = (below, top) if stacked else one.band
        if band:
            shapes.append((f"{'area' if stacked else 'band'} c{colour % 8}", _band(x_axis(x), *map(y_axis, band))))
    if zero:
        shapes.append(("zero", f"M{left:g} {y_axis(0):.1f}H{WIDTH - RIGHT}"))
    for colour, one in enumerate(() if stacked else series):
        shapes += _curve(x_axis(x), y_axis, one.y, colour % 8, window if smooth else 0)
    hints = [" · ".join([f"step {at:.0f}", *(f"{s.label} {short(s.y[i])}" for s in series)]) for i, at in enumerate(x)]
    return Chart(
        title,
        hints[-1],
        legend=[(colour % 8, s.label) for colour, s in enumerate(series)] if len(series) > 1 else [],
        note=note,
        x_ticks=x_axis.ticks,
        y_ticks=y_axis.ticks,
        shapes=[shape for shape in shapes if shape[1]],
        marks=[(x_axis(at), label) for at, label in marks],
        hits=_columns(x_axis(x), left, hints),
        left=left,
    )


def histogram(
    title: str, groups: Sequence[tuple[str, np.ndarray]], *, zero: bool = False, colour: int = 0, note: str = ""
) -> Chart:
    """The distribution of values: bars for one group, outlines on shared bins for several.

    Args:
        title: the chart's heading.
        groups: (label, finite values float [n]) with at least one value in all.
        zero: include 0 in the horizontal axis and draw a line at 0.
        colour: colour of the first group.
        note: a caption.
    """
    everything = np.concatenate([values for _, values in groups])
    low, high = everything.min(), everything.max()
    if high - low <= 1e-9 * max(abs(low), abs(high)) + TINY:
        low, high = low - max(abs(low) * 0.05, 1e-3), high + max(abs(high) * 0.05, 1e-3)
    edges = np.linspace(low, high, max(6, min(MAX_BINS, math.isqrt(2 * max(len(v) for _, v in groups)))) + 1)
    counts = [np.histogram(values, edges)[0] for _, values in groups]
    y_axis = _Axis(np.concatenate([*counts, np.zeros(1)]), HEIGHT - BOTTOM, TOP, whole=True, pad=0)
    left = 14 + 6 * max(len(label) for _, label in y_axis.ticks)
    x_axis = _Axis(np.append(edges, 0.0) if zero else edges, left, WIDTH - RIGHT, pad=0)
    at, base = x_axis(edges), HEIGHT - BOTTOM
    shapes, means = [], []
    for place, ((label, values), heights) in enumerate(zip(groups, counts, strict=True), start=colour):
        tops = y_axis(heights.astype(float))
        steps = "".join(f"V{top:.1f}H{end:.1f}" for top, end in zip(tops, at[1:], strict=True))
        kind = "area" if len(groups) == 1 else "band outline"
        shapes.append((f"{kind} c{place % 8}", f"M{at[0]:.1f} {base}{steps}V{base}Z"))
        if len(values):
            shapes.append((f"mean c{place % 8}", f"M{x_axis(values.mean()):.1f} {base}V{TOP}"))
            means.append(f"{label} mean {short(values.mean())}")
    if zero:
        shapes.append(("zero", f"M{x_axis(0):.1f} {base}V{TOP}"))
    hints = []
    for i in range(len(edges) - 1):
        each = [f"{label} {heights[i]}" for (label, _), heights in zip(groups, counts, strict=True)]
        hints.append(" · ".join([f"{short(edges[i])} to {short(edges[i + 1])}", *each]))
    return Chart(
        title,
        " · ".join(means),
        legend=[(place % 8, label) for place, (label, _) in enumerate(groups, start=colour)] if len(groups) > 1 else [],
        note=note,
        x_ticks=x_axis.ticks,
        y_ticks=y_axis.ticks,
        shapes=shapes,
        hits=[(at[i], TOP, at[i + 1] - at[i], HEIGHT - BOTTOM - TOP, text) for i, text in enumerate(hints)],
        left=left,
    )


def intervals(
    title: str, rows: Sequence[tuple[str, Sequence[tuple[float, float]]]], labels: Sequence[str], *, note: str = ""
) -> Chart:
    """Differences with their uncertainty: each row has, for each label, a dot and a bar of ± 2 standard errors.

    Args:
        title: the chart's heading.
        rows: (name, one (difference, standard error) for each label); NaN for a missing value.
        labels: names of the dots of a row.
        note: a caption.
    """
    pairs = np.array([pair for _, row in rows for pair in row], dtype=float).reshape(-1, 2)
    spread = 2 * np.nan_to_num(pairs[:, 1])
    names = [name if len(name) <= 22 else f"{name[:21]}…" for name, _ in rows]
    left = 14 + 6 * max(map(len, names))
    axis = _Axis(np.concatenate([pairs[:, 0] - spread, pairs[:, 0] + spread, np.zeros(1)]), left, WIDTH - RIGHT)
    tall = max(18, 8 * len(labels) + 6)
    height = TOP + tall * len(rows) + BOTTOM
    shapes = [("zero", f"M{axis(0):.1f} {TOP}V{height - BOTTOM}")]
    hits = []
    for i, (name, row) in enumerate(rows):
        hints = [name]
        for j, (label, (value, error)) in enumerate(zip(labels, row, strict=True)):
            if not math.isfinite(value):
                continue
            y, wide = TOP + tall * (i + 0.5) + 8 * (j - (len(labels) - 1) / 2), 2 * np.nan_to_num(error)
            shapes.append((f"line c{(j + 1) % 8}", f"M{axis(value - wide):.1f} {y:.1f}H{axis(value + wide):.1f}"))
            shapes.append((f"dots c{(j + 1) % 8}", f"M{axis(value):.1f} {y:.1f}h0"))
            hints.append(f"{label} {signed(value)} ± {figure(error)}")
        hits.append((0, TOP + tall * i, WIDTH, tall, " · ".join(hints)))
    return Chart(
        title,
        "Point at a row for its figures; the table has all of them.",
        note=note,
        legend=[((j + 1) % 8, label) for j, label in enumerate(labels)],
        x_ticks=axis.ticks,
        y_ticks=[(TOP + tall * (i + 0.5), name) for i, name in enumerate(names)],
        shapes=shapes,
        hits=hits,
        left=left,
        height=height,
        bottom=height - BOTTOM,
    )


class _Axis:
    """A linear map from values to viewBox units, and its ticks.

    Args:
        values: values that the axis must contain; NaN is ignored.
        start, end: where the axis begins and ends, in viewBox units.
        whole: put ticks on whole numbers only.
        pad: margin on each side, as a fraction of the range.
    """

    def __init__(self, values: np.ndarray, start: float, end: float, *, whole: bool = False, pad: float = 0.05):
        finite = values[np.isfinite(values)]
        low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
        if high - low <= 1e-9 * max(abs(low), abs(high)) + TINY:
            room = 0.5 if whole else abs(high) * 0.05 or 0.5
            low, high = low - room, high + room
        low, high = low - pad * (high - low), high + pad * (high - low)
        self.low, self.start, self.scale = low, start, (end - start) / (high - low)
        step = _tick_step((high - low) / 5, whole)
        decimals = max(0, -math.floor(math.log10(step) + 1e-9))
        places = np.arange(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1) * step
        self.ticks = [(float(self(at)), tick(float(at), decimals)) for at in places]

    def __call__(self, value):
        return self.start + (value - self.low) * self.scale


def _tick_step(rough: float, whole: bool) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    return max(1.0, step) if whole else step


def _thin(values: np.ndarray, each: int) -> np.ndarray:
    pieces = [values[i : i + each] for i in range(0, len(values), each)]
    return np.array([p[np.isfinite(p)].mean() if np.isfinite(p).any() else math.nan for p in pieces])


def _curve(x: np.ndarray, y_axis: "_Axis", y: np.ndarray, colour: int, window: int) -> list[tuple[str, str]]:
    """The shapes of a curve: its line and points; or with a `window` the smoothed line, with its own behind it."""
    shapes = [(f"line c{colour}", _path(x, y_axis(smoothed(y, window) if window else y)))]
    if window:
        shapes.insert(0, (f"raw c{colour}", _path(x, y_axis(y))))
    if len(x) <= MAX_DOTS:
        shapes.append((f"dots c{colour}", _dots(x, y_axis(y))))
    return shapes


def smoothed(y: np.ndarray, window: int) -> np.ndarray:
    """The mean of each value and its neighbours, the same number on both sides: `window`, or fewer near the ends.

    Missing values are left out of the means and stay missing.
    """
    found = np.full(len(y), math.nan)
    for at in np.flatnonzero(np.isfinite(y)):
        reach = min(window, at, len(y) - 1 - at)
        near = y[at - reach : at + reach + 1]
        found[at] = near[np.isfinite(near)].mean()
    return found


def _path(x: np.ndarray, y: np.ndarray) -> str:
    parts, pen = [], "M"
    for at, value in zip(x, y, strict=True):
        if math.isfinite(value):
            parts.append(f"{pen}{at:.1f} {value:.1f}")
        pen = "L" if math.isfinite(value) else "M"
    return "".join(parts)


def _dots(x: np.ndarray, y: np.ndarray) -> str:
    return "".join(f"M{at:.1f} {value:.1f}h0" for at, value in zip(x, y, strict=True) if math.isfinite(value))


def _band(x: np.ndarray, low: np.ndarray, high: np.ndarray) -> str:
    """One closed path for each stretch where both edges are finite."""
    known = np.isfinite(low) & np.isfinite(high)
    stretches = np.split(np.arange(len(x)), np.flatnonzero(np.diff(known)) + 1)
    parts = []
    for stretch in stretches:
        if len(stretch) and known[stretch[0]]:
            there = [f"{x[i]:.1f} {high[i]:.1f}" for i in stretch]
            back = [f"{x[i]:.1f} {low[i]:.1f}" for i in stretch[::-1]]
            parts.append(f"M{'L'.join(there + back)}Z")
    return "".join(parts)


def _columns(x: np.ndarray, left: float, hints: list[str]) -> list[tuple[float, float, float, float, str]]:
    borders = np.concatenate([[left], (x[1:] + x[:-1]) / 2, [WIDTH - RIGHT]])
    return [(borders[i], TOP, borders[i + 1] - borders[i], HEIGHT - BOTTOM - TOP, text) for i, text in enumerate(hints)]
