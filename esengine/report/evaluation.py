"""The page of an evaluation: main table, tables by category and challenge, histograms, images side by side."""

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from esengine.base.errors import RunError
from esengine.base.records import as_written, number, read_json, read_lines, text, texts
from esengine.evaluation.blind import verdicts
from esengine.report.charts import Chart, histogram, intervals
from esengine.report.curves import kept_charts
from esengine.report.page import facts, require_few, write
from esengine.report.thumbnails import Picture, thumbnail

MAX_PICTURES = 72
MAX_EXAMPLES = 8
THUMBNAIL_SIDE, THUMBNAIL_BYTES = 384, 40_000
PICK_SEED = 0
MAX_CELLS = 100_000
"""Largest number of groups, entries and scores, multiplied."""


@dataclass(frozen=True)
class Shot:
    """One line of scores.jsonl: an image and its scores by name. A missing score is NaN."""

    entry: str
    key: tuple[int, int]
    prompt: str
    labels: list[str]
    image: str
    scores: dict[str, float]


@dataclass(frozen=True)
class Cell:
    """An entry's mean score over a group. All entries but the first also have the paired difference to the first."""

    mean: float
    difference: float | None = None
    standard_error: float | None = None
    win_rate: float | None = None

    @property
    def verdict(self) -> str:
        """`up` or `down` if the difference is beyond two standard errors, else empty."""
        sure = self.difference is not None and abs(self.difference) > 2 * self.standard_error  # false for NaN
        return ("up" if self.difference > 0 else "down") if sure else ""


@dataclass(frozen=True)
class Group:
    """A group of prompts, which is one row of a table. `cells` is score -> entry -> cell."""

    by: str
    name: str
    count: int
    cells: dict[str, dict[str, Cell]]


@dataclass(frozen=True)
class Example:
    """The images of one prompt, one for each entry, with the scores shown below them."""

    prompt: str
    labels: list[str]
    gain: float | None
    tiles: list[tuple[str, Picture, list[tuple[str, float]]]]


def write_evaluation_page(folder: Path) -> Path:
    """Write FOLDER/report.html from evaluation.json, report.json, scores.jsonl and images/, and return its path.

    The page depends only on these files and on curves.json, if there is one. A missing image is shown as a placeholder
    and listed.

    Raises:
        RunError: one of the first three files is missing, or a file is damaged. The message names the file and, for a
            file of lines, the line.
    """
    evaluation = read_json(folder / "evaluation.json")
    if not (folder / "report.json").is_file():
        raise RunError(f"{folder}: the evaluation is not finished; the same esengine eval command continues it")
    report = read_json(folder / "report.json")
    with as_written(folder / "evaluation.json"):
        entries, scores = texts(evaluation["entries"]), texts(evaluation["scores"])
        benchmark, settings = text(evaluation["benchmark"]), facts(evaluation["settings"])
        require_few(entries, "entries"), require_few(scores, "scores")
        if not entries or not scores:
            raise ValueError("expected at least one entry and one score")
    with as_written(folder / "report.json"):
        require_few(report["groups"], "groups", MAX_CELLS // (len(entries) * len(scores)))
        groups = [_group(group, entries, scores) for group in report["groups"]]
        everything = overall(report, entries, scores)
        closed = [_closed(score, found) for score, found in (report.get("gap_closed") or {}).items()]
        prompts, repeats = int(number(report["prompts"])), int(number(report["repeats"]))
    shots: dict[str, dict[tuple[int, int], Shot]] = {entry: {} for entry in entries}
    for shot in read_lines(folder / "scores.jsonl", _shot):
        if shot.entry in shots:
            shots[shot.entry][shot.key] = shot
    examples, missing = _examples(folder, entries, scores[0], shots)
    return write(
        folder / "report.html",
        "evaluation.html",
        title=f"{benchmark}: {' · '.join(entries)}",
        benchmark=benchmark,
        entries=entries,
        scores=scores,
        prompts=prompts,
        repeats=repeats,
        overall=everything,
        closed=[line for lines in closed for line in lines],
        sections=_sections(groups, entries, scores),
        charts=_charts(entries, scores, shots),
        curves=kept_charts(folder / "curves.json"),
        examples=examples,
        missing=missing,
        verdicts=[str(each) for each in verdicts(folder)],
        settings={"prompts_sha256": evaluation.get("prompts_sha256"), **settings},
    )


def overall(report: dict[str, Any], entries: list[str], scores: list[str]) -> Group:
    """The group of all prompts. Call it inside `as_written`."""
    (found,) = (group for group in report["groups"] if group["by"] == "overall")
    return _group(found, entries, scores)


def _shot(record: dict[str, Any]) -> Shot:
    labels = [text(record[name]) for name in ("category", "challenge") if record.get(name) is not None]
    scores = {text(name): number(value) for name, value in record["scores"].items()}
    key = int(record["index"]), int(record["repeat"])
    return Shot(text(record["entry"]), key, text(record["prompt"]), labels, text(record["image"]), scores)


def _group(group: dict[str, Any], entries: list[str], scores: list[str]) -> Group:
    rows = {text(row["entry"]): row for row in group["rows"]}
    cells = {
        score: {entry: _cell(rows[entry], score) for entry in entries if entry in rows and score in rows[entry]["mean"]}
        for score in scores
    }
    count = max((int(number(row["count"])) for row in rows.values()), default=0)
    return Group(text(group["by"]), text(group["name"]), count, cells)


def _cell(row: dict[str, Any], score: str) -> Cell:
    against = (row.get("against_first") or {}).get(score)
    mean = number(row["mean"][score])
    if against is None:
        return Cell(mean)
    return Cell(mean, *(number(against.get(name)) for name in ("difference", "standard_error", "win_rate")))


def _closed(score: str, found: dict[str, Any]) -> list[str]:
    """Sentences about the share of the gap that each adapter closes."""
    first, last, gap = text(found["from"]), text(found["to"]), number(found["gap"])
    if not gap > 0:
        return [f"{score}: {last} is not above {first}, so there is no gap to close."]
    between = f"the gap between {first} and {last} in {score}, which is {gap:.4f}"
    lines = []
    for entry, value in found["share"].items():
        share, error = number(value), number((found.get("standard_error") or {}).get(entry))
        if not math.isfinite(share):
            continue
        within = f" (± {error:.0%})" if math.isfinite(error) else ""
        if share < 0:
            lines.append(f"{entry} closes none of {between}: it lies {-share:.0%}{within} of it below {first}.")
        elif share > 1:
            lines.append(f"{entry} closes all of {between}, and goes beyond {last} by {share - 1:.0%}{within} of it.")
        else:
            lines.append(f"{entry} closes {share:.0%}{within} of {between}.")
    return lines


def _sections(groups: list[Group], entries: list[str], scores: list[str]) -> list[dict[str, Any]]:
    """For category and for challenge: the groups, and for each score a chart of the differences."""
    sections = []
    for by in ("category", "challenge"):
        mine = [group for group in groups if group.by == by]
        if not mine:
            continue
        charts = {}
        for score in scores if len(entries) > 1 else []:
            cells = [[group.cells[score].get(entry, Cell(math.nan)) for entry in entries[1:]] for group in mine]
            rows = [
                (group.name, [(_nan(cell.difference), _nan(cell.standard_error)) for cell in row])
                for group, row in zip(mine, cells, strict=True)
            ]
            note = f"Difference to {entries[0]}; the bar is ± 2 standard errors."
            charts[score] = intervals(f"{score} by {by}", rows, entries[1:], note=note)
        sections.append({"by": by, "groups": mine, "charts": charts})
    return sections


def _nan(value: float | None) -> float:
    return math.nan if value is None else value


def _charts(entries: list[str], scores: list[str], shots: dict[str, dict[tuple[int, int], Shot]]) -> list[Chart]:
    """For each score: histograms of the scores and of each entry's paired differences to the first entry."""
    charts = []
    for score in scores:
        by_prompt = {entry: _by_prompt(shots[entry], score) for entry in entries}
        groups = [(entry, np.array([*by_prompt[entry].values()])) for entry in entries]
        if any(len(values) for _, values in groups):
            charts.append(histogram(f"{score}: scores", groups, note="Prompts by score."))
        first = by_prompt[entries[0]]
        for colour, entry in enumerate(entries[1:], start=1):
            paired = [value - first[index] for index, value in by_prompt[entry].items() if index in first]
            if paired:
                title = f"{score}: {entry} minus {entries[0]}"
                note = "Prompts by paired difference; right of the line is better."
                charts.append(histogram(title, [("difference", np.array(paired))], zero=True, colour=colour, note=note))
    return charts


def _by_prompt(shots: dict[tuple[int, int], Shot], score: str) -> dict[int, float]:
    """Each prompt's mean score over its repeats."""
    found: dict[int, list[float]] = {}
    for (index, _), shot in sorted(shots.items()):
        value = shot.scores.get(score, math.nan)
        if math.isfinite(value):
            found.setdefault(index, []).append(value)
    return {index: sum(values) / len(values) for index, values in found.items()}


def _examples(
    folder: Path, entries: list[str], score: str, shots: dict[str, dict[tuple[int, int], Shot]]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Example prompts: the best gains and worst losses of each adapter, and a random draw independent of the scores.

    Returns:
        Sections of examples, and a line for each image that could not be shown.
    """
    first = entries[0]
    # without an adapter among the entries, take the second entry
    chosen = [entry for entry in entries[1:] if not entry.startswith("base@")] or entries[1:2]
    each = max(1, min(MAX_EXAMPLES, MAX_PICTURES // (len(entries) * (2 * max(1, len(chosen)) + 1))))
    sections = []
    for entry in chosen:
        gains = {
            key: shot.scores.get(score, math.nan) - shots[first][key].scores.get(score, math.nan)
            for key, shot in shots[entry].items()
            if key in shots[first]
        }
        order = sorted((key for key in gains if math.isfinite(gains[key])), key=lambda key: (-gains[key], key))
        best = [key for key in order[:each] if gains[key] > 0]
        worst = [key for key in order[::-1][:each] if gains[key] < 0]
        sections.append((f"Best gains of {entry}", f"Where it beats {first} most in {score}.", best, gains))
        sections.append(
            (f"Worst losses of {entry}", f"Where it falls furthest below {first} in {score}.", worst, gains)
        )
    if not chosen:
        values = {key: shot.scores.get(score, math.nan) for key, shot in shots[first].items()}
        order = sorted((key for key in values if math.isfinite(values[key])), key=lambda key: (-values[key], key))
        sections.append((f"Highest {score}", "", order[:each], {}))
        sections.append((f"Lowest {score}", "", order[::-1][:each], {}))
    everything = sorted({key for found in shots.values() for key in found})
    drawn = sorted(random.Random(PICK_SEED).sample(everything, min(each, len(everything))))
    sections.append(("Random prompts", "Drawn without regard to any score, always the same ones.", drawn, {}))

    missing: list[str] = []
    views = []
    for title, about, keys, gains in sections:
        found = [_example(folder, entries, key, shots, gains.get(key), missing) for key in keys]
        views.append({"title": title, "about": about, "examples": found})
    return views, list(dict.fromkeys(missing))


def _example(
    folder: Path,
    entries: list[str],
    key: tuple[int, int],
    shots: dict[str, dict[tuple[int, int], Shot]],
    gain: float | None,
    missing: list[str],
) -> Example:
    tiles, known = [], None
    for entry in entries:
        shot = shots[entry].get(key)
        known = known or shot
        if shot is None:
            picture, scores = Picture(None, 1, 1, "not scored"), []
        else:
            picture = thumbnail(folder / shot.image, within=folder, side=THUMBNAIL_SIDE, most=THUMBNAIL_BYTES)
            scores = list(shot.scores.items())
        if picture.missing:
            missing.append(f"{shot.image if shot else f'{entry}, prompt {key[0]}'}: {picture.missing}")
        tiles.append((entry, picture, scores))
    return Example(known.prompt, known.labels, gain, tiles)
