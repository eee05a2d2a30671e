"""Charts: every point within the frame, gaps kept, ticks round."""

import math
import re

import numpy as np
import pytest

from esengine.report.charts import WIDTH, Series, histogram, intervals, lines
from esengine.report.words import NONE


def points(chart) -> np.ndarray:
    found = re.findall(r"(-?[\d.]+(?:e-?\d+)?) (-?[\d.]+)", " ".join(path for _, path in chart.shapes))
    return np.array(found, dtype=float)


def inside(chart) -> bool:
    at = points(chart)
    return bool(
        np.isfinite(at).all()
        and (at[:, 0] >= chart.left - 0.1).all()
        and (at[:, 0] <= chart.right + 0.1).all()
        and (at[:, 1] >= chart.top - 0.1).all()
        and (at[:, 1] <= chart.bottom + 0.1).all()
    )


@pytest.mark.parametrize(
    "y",
    [
        [1.0],
        [3.0, 3.0, 3.0],
        [0.0, 0.0],
        [-1e-12, 1e-12],
        [1e12, -1e12, 0.0],
        [22.30001, 22.30002, 22.30003],
        [1.0, math.nan, 2.0, math.nan],
        [math.nan, math.nan],
    ],
)
@pytest.mark.parametrize("options", [{}, {"zero": True}, {"stacked": True}])
def test_any_values_are_drawn_within_the_frame(y, options):
    y = np.array(y)
    chart = lines("t", np.arange(len(y)).astype(float), [Series("a", y, (y - abs(y), y + abs(y)))], **options)
    if np.isfinite(y).any():
        assert inside(chart)
        assert 2 <= len(chart.y_ticks) <= 8
    assert len(chart.hits) == len(y)
    assert len({label for _, label in chart.y_ticks}) == len(chart.y_ticks)


def test_a_gap_is_not_bridged():
    y = np.array([1.0, 2.0, math.nan, 4.0, 5.0])
    chart = lines("t", np.arange(5.0), [Series("a", y, (y - 1, y + 1))])
    (line,) = (path for kind, path in chart.shapes if kind.startswith("line"))
    (band,) = (path for kind, path in chart.shapes if kind.startswith("band"))
    assert (line.count("M"), line.count("L")) == (2, 2)
    assert band.count("Z") == 2
    assert chart.hits[2][-1] == f"step 2 · a {NONE}"


def test_values_are_where_the_ticks_say():
    chart = lines("t", np.array([0.0, 10.0]), [Series("a", np.array([0.0, 100.0]))])
    ticks = {label: at for at, label in chart.y_ticks}
    (line,) = (path for kind, path in chart.shapes if kind.startswith("line"))
    first, last = re.findall(r"[\d.]+ ([\d.]+)", line)
    assert float(first) == pytest.approx(ticks["0"], abs=0.06)
    assert float(last) == pytest.approx(ticks["100"], abs=0.06)
    assert [label for _, label in chart.x_ticks] == ["0", "2", "4", "6", "8", "10"]


def test_stacked_parts_add_up():
    parts = [Series("a", np.array([1.0, 2.0])), Series("b", np.array([3.0, 2.0]))]
    chart = lines("t", np.arange(2.0), parts, stacked=True)
    heights = {label: at for at, label in chart.y_ticks}
    assert f" {heights['4']:.1f}" in chart.shapes[1][1]
    assert chart.hits[0][-1] == "step 0 · a 1 · b 3"


def test_many_points_become_means():
    y = np.arange(1000.0)
    chart = lines("t", y, [Series("a", y)])
    assert len(chart.hits) == 250
    assert chart.hits[0][-1] == "step 2 · a 1.5"
    assert "mean of 4 steps" in chart.note


@pytest.mark.parametrize("values", [[0.5], [2.0, 2.0], [0.0, 0.0], [-3.0, 9.0, 1e6], list(range(500))])
@pytest.mark.parametrize("zero", [False, True])
def test_a_histogram_counts_everything_once(values, zero):
    values = np.array(values, dtype=float)
    chart = histogram("t", [("a", values)], zero=zero)
    assert sum(int(text.rsplit(" ", 1)[1]) for *_, text in chart.hits) == len(values)
    assert all(0 <= x <= WIDTH for x, *_ in chart.hits)
    assert any(kind == "zero" for kind, _ in chart.shapes) == zero


def test_intervals_leave_out_what_is_not_known():
    rows = [
        ("one", [(0.5, 0.1), (math.nan, math.nan)]),
        ("a name that is longer than its place", [(-1.0, math.nan)] * 2),
    ]
    chart = intervals("t", rows, ["a", "b"])
    assert sum(kind.startswith("dots") for kind, _ in chart.shapes) == 3
    assert chart.hits[0][-1] == "one · a +0.5000 ± 0.1000"
    assert chart.y_ticks[1][1].endswith("…")
