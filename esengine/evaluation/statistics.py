"""Statistics of several models' scores on the same prompts: means, paired differences, and the share of a gap closed.

Symbols: x_p and y_p are the scores of the first entry and of another entry on prompt p, averaged over repeats.
d_p = y_p - x_p.
"""

import csv
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from esengine.base.printable import plain, shown
from esengine.evaluation.benchmarks import Benchmark

_FORMULAS = ("=", "+", "-", "@", "\N{FULLWIDTH EQUALS SIGN}", "\N{FULLWIDTH PLUS SIGN}", "\N{FULLWIDTH COMMERCIAL AT}")
"""How a cell begins that a spreadsheet computes."""
_MARKUP = re.compile(r"[\\`*\[\]<>&|~$]|(?<!\w)_|_(?!\w)|://")
"""What has a meaning within a line of Markdown."""
_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;", "://": "&#58;//"}
GAP = "base@1", "base@2"
"""The two entries that define the gap in which a one-step adapter is placed."""


@dataclass(frozen=True)
class Report:
    """The statistics of an evaluation, as report.json holds them.

    Attributes:
        benchmark: name of the benchmark.
        prompts: number of prompts, P.
        repeats: images of each prompt.
        entries: labels. The others are compared with the first.
        scores: names of the scores.
        settings: how the images were made and scored.
        groups: {"by": "overall", "category" or "challenge", "name", "rows"}, where a row of an entry is {"entry",
            "count": prompts of the group, "mean": {score: mean}, "against_first": None for the first entry, else
            {score: {"difference": mean of d_p, "standard_error": std(d_p) / sqrt(count), None for one prompt,
            "win_rate": share of d_p > 0, where 0 counts half}}}.
        gap_closed: {score: {"from": "base@1", "to": "base@2", "gap": mean(base@2) - mean(base@1), "share": {label of
            each one-step adapter: (mean - mean(base@1)) / gap, None where two steps are no better than one},
            "standard_error": {label: that of the share, a ratio of means over the same prompts, by the delta method}}}.
            Empty unless base@1 and base@2 are among the entries.
    """

    benchmark: str
    prompts: int
    repeats: int
    entries: list[str]
    scores: list[str]
    settings: dict[str, Any]
    groups: list[dict[str, Any]]
    gap_closed: dict[str, dict[str, Any]]

    @property
    def overall(self) -> list[dict[str, Any]]:
        """The rows of all prompts together, in the order of the entries."""
        (rows,) = (group["rows"] for group in self.groups if group["by"] == "overall")
        return rows

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, allow_nan=False, ensure_ascii=False) + "\n"

    def to_csv(self) -> str:
        """One line for each group, entry and score. A text that a spreadsheet would compute has a ' before it."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        against = ("difference", "standard_error", "win_rate")
        writer.writerow(("by", "group", "entry", "score", "count", "mean", *against))
        for group in self.groups:
            for row in group["rows"]:
                for score in self.scores:
                    paired = (row["against_first"] or {}).get(score, {})
                    cells = row["entry"], score, row["count"], row["mean"][score], *map(paired.get, against)
                    writer.writerow(map(_inert, (group["by"], group["name"], *cells)))
        return text.getvalue()

    def to_markdown(self) -> str:
        """Tables of entries by scores, overall and by group."""
        each = "1 image" if self.repeats == 1 else f"{self.repeats} images"
        entries, scores = [_escape(entry) for entry in self.entries], [_escape(score) for score in self.scores]
        parts = [f"# {_escape(self.benchmark)}: {self.prompts} prompts, {each} each"]
        if len(self.entries) > 1:
            parts.append(
                f"In brackets: the mean difference to {entries[0]} on the same prompts and latents, its standard "
                "error over prompts, and the share of prompts won, where a tie counts half."
            )
        for by in dict.fromkeys(group["by"] for group in self.groups):
            rows = [
                [*([_escape(group["name"])] if by != "overall" else []), _escape(row["entry"]), str(row["count"])]
                + [_cell(row, score) for score in self.scores]
                for group in self.groups
                if group["by"] == by
                for row in group["rows"]
            ]
            head = [*([by] if by != "overall" else []), "entry", "prompts", *scores]
            parts += [f"## {by.capitalize()}" if by == "overall" else f"## By {by}", _markdown_table(head, rows)]
            if by == "overall" and self.gap_closed:
                closed = self.gap_closed.items()
                gaps = [
                    [_escape(score), f"{g['gap']:+.4f}", *(_share(g, adapter) for adapter in g["share"])]
                    for score, g in closed
                ]
                adapters = map(_escape, self.gap_closed[self.scores[0]]["share"])
                parts += [
                    f"## Share of the gap from {GAP[0]} to {GAP[1]} that is closed",
                    _markdown_table(["score", "gap", *adapters], gaps),
                ]
        settings = [[_escape(name), _escape(str(value))] for name, value in flatten(self.settings).items()]
        parts += ["## Settings", _markdown_table(["setting", "value"], settings)]
        return "\n\n".join(parts) + "\n"

    def table(self) -> str:
        """The overall group as aligned text, with one line for each score and entry."""
        columns = ["score", "entry", "mean", "difference", "std. error", "prompts won"]
        lines = [columns + ["gap closed"] * bool(self.gap_closed)]
        for score in self.scores:
            for row in self.overall:
                line = [score, row["entry"], f"{row['mean'][score]:.4f}"]
                if row["against_first"] is None:
                    line += ["", "", ""]
                else:
                    paired = row["against_first"][score]
                    error = paired["standard_error"]
                    line += [f"{paired['difference']:+.4f}", "-" if error is None else f"{error:.4f}"]
                    line += [f"{paired['win_rate']:.0%}"]
                if self.gap_closed:
                    closed = self.gap_closed[score]
                    line.append(_share(closed, row["entry"]) if row["entry"] in closed["share"] else "")
                lines.append(line)
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines = [[f"{c:{side}{n}}" for c, side, n in zip(line, "<<>>>>>", widths, strict=False)] for line in lines]
        return "\n".join("  ".join(line).rstrip() for line in lines)


def summarise(
    benchmark: Benchmark, entries: Sequence[str], scores: Sequence[str], records: Sequence[dict], settings: dict
) -> Report:
    """Statistics of a complete evaluation.

    Args:
        benchmark: the prompts and their groups.
        entries: labels. The others are compared with the first.
        scores: names of the scores.
        records: {"entry", "index", "repeat", "scores"} of every image, in any order.
        settings: for the report.

    Raises:
        ValueError: an image of an entry, prompt and repeat is missing.
    """
    repeats = max((record["repeat"] for record in records), default=0) + 1
    values = np.full((len(entries), len(scores), len(benchmark), repeats), np.nan)  # [E, S, P, R]
    place = {label: at for at, label in enumerate(entries)}
    for record in records:
        found = [record["scores"][name] for name in scores]
        values[place[record["entry"]], :, record["index"], record["repeat"]] = found
    if np.isnan(values).any():
        raise ValueError("records: expected a score for each entry, prompt and repeat, some are missing")
    means = values.mean(axis=3)  # [E, S, P]
    everyone = np.arange(len(benchmark))
    groups = [{"by": "overall", "name": "all", "rows": _rows(means, everyone, entries, scores)}]
    for by, labels in (("category", benchmark.categories), ("challenge", benchmark.challenges)):
        for name in dict.fromkeys(label for label in labels if label is not None):
            members = np.array([index for index, label in enumerate(labels) if label == name])
            groups.append({"by": by, "name": name, "rows": _rows(means, members, entries, scores)})
    gap = _gap_closed(means, entries, scores)
    return Report(benchmark.name, len(benchmark), repeats, list(entries), list(scores), settings, groups, gap)


def flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one flat mapping, with names joined by dots."""
    flat: dict[str, Any] = {}
    for name, value in data.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _rows(means: np.ndarray, members: np.ndarray, entries: Sequence[str], scores: Sequence[str]) -> list[dict]:
    group = means[:, :, members]  # [E, S, G]
    rows = []
    for at, label in enumerate(entries):
        mean = dict(zip(scores, group[at].mean(axis=1).tolist(), strict=True))
        paired = {name: _paired(d) for name, d in zip(scores, group[at] - group[0], strict=True)} if at else None
        rows.append({"entry": label, "count": len(members), "mean": mean, "against_first": paired})
    return rows


def _paired(d: np.ndarray) -> dict[str, float | None]:
    error = float(d.std(ddof=1)) / math.sqrt(len(d)) if len(d) > 1 else None
    won = float((d > 0).mean() + (d == 0).mean() / 2)
    return {"difference": float(d.mean()), "standard_error": error, "win_rate": won}


def _gap_closed(means: np.ndarray, entries: Sequence[str], scores: Sequence[str]) -> dict[str, dict]:
    """`Report.gap_closed`, from mean scores by prompt [E, S, P]."""
    if not set(GAP) <= set(entries):
        return {}
    of = dict(zip(entries, means, strict=True))
    adapters = [label for label in entries if label.endswith("@1") and label not in GAP]
    closed = {}
    for at, name in enumerate(scores):
        one, two = (of[label][at] for label in GAP)
        gap = float((two - one).mean())
        share, error = dict.fromkeys(adapters), dict.fromkeys(adapters)
        for label in adapters if gap > 0 else []:
            gained = of[label][at] - one
            share[label] = float(gained.mean()) / gap
            error[label] = _paired(gained - share[label] * (two - one))["standard_error"]
            if error[label] is not None:
                error[label] /= gap
        closed[name] = {"from": GAP[0], "to": GAP[1], "gap": gap, "share": share, "standard_error": error}
    return closed


def _share(closed: dict[str, Any], label: str) -> str:
    share, error = closed["share"][label], closed["standard_error"][label]
    return "-" if share is None else f"{share:.0%}" if error is None else f"{share:.0%} ± {error:.0%}"


def _cell(row: dict, score: str) -> str:
    mean = f"{row['mean'][score]:.4f}"
    if row["against_first"] is None:
        return mean
    paired = row["against_first"][score]
    error = "" if paired["standard_error"] is None else f" ± {paired['standard_error']:.4f}"
    return f"{mean} ({paired['difference']:+.4f}{error}, {paired['win_rate']:.0%})"


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _escape(text: str) -> str:
    """A text on one line, without meaning in HTML and Markdown."""
    return _MARKUP.sub(lambda sign: _ENTITIES.get(sign[0]) or f"\\{sign[0]}", shown(text))


def _inert(cell: Any) -> Any:
    """A cell of a CSV file that no spreadsheet takes for a formula. A text is on one line. Numbers stay numbers."""
    if not isinstance(cell, str):
        return cell
    text = plain(cell)
    return f"'{text}" if text.startswith(_FORMULAS) else text
