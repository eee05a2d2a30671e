"""A blind comparison: a person sees the images of two entries side by side, and chooses without knowing which is which.

    judged.jsonl    {"index": prompt, "repeat": r, "entries": [a, b], "better": a, b or null}

Symbols: of the D pairs with a choice, the second entry was chosen in k. Win rate w = k / D. Its interval is Wilson's,
with z = 1.96 for 95 %:

    (w + z^2 / 2D +- z sqrt(w (1 - w) / D + z^2 / 4D^2)) / (1 + z^2 / D)

Source: E. B. Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 22 (1927).
"""

import json
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from esengine.base.errors import ConfigError
from esengine.base.files import naming, refuse_links, require_inside
from esengine.base.pictures import read_png
from esengine.base.records import as_written, read_json, read_lines, text, texts
from esengine.judging import SAME, SECOND, Asker, Question

NAME = "judged.jsonl"
Z = 1.959964
"""The standard normal's 97.5 % point."""

Key = tuple[int, int]
"""(index of the prompt, repeat)."""


@dataclass(frozen=True)
class Pair:
    """The images of two entries for one prompt and latent.

    Attributes:
        key: index of the prompt, and repeat.
        text: the prompt.
        images: paths of the first and the second entry's image.
        folder: the evaluation's folder. The images lie in it.
    """

    key: Key
    text: str
    images: tuple[Path, Path]
    folder: Path


@dataclass(frozen=True)
class Verdict:
    """What a person chose.

    Attributes:
        entries: labels of the two entries.
        wins: number of pairs in which the second entry was chosen.
        losses: number of pairs in which the first was chosen.
        same: number of pairs without a difference.
    """

    entries: tuple[str, str]
    wins: int
    losses: int
    same: int

    @property
    def rate(self) -> float:
        """The win rate of the second entry; NaN without a choice."""
        return self.wins / (self.wins + self.losses) if self.wins + self.losses else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the rate; (0, 1) without a choice."""
        n = self.wins + self.losses
        if not n:
            return 0.0, 1.0
        w, square = self.rate, Z * Z / n
        half = Z * math.sqrt(w * (1 - w) / n + square / (4 * n))
        low, high = ((w + square / 2 + sign * half) / (1 + square) for sign in (-1, 1))
        return max(0.0, low), min(1.0, high)

    def __str__(self) -> str:
        first, second = self.entries
        low, high = self.interval
        rate = f"{self.rate:.0%} (95 % interval {low:.0%} to {high:.0%})" if self.wins + self.losses else "not known"
        return (
            f"{second} was preferred to {first} in {self.wins} of {self.wins + self.losses} pairs, {self.same} showed "
            f"no difference: win rate {rate}"
        )


def pairs_of(folder: Path, entries: Sequence[str] = ()) -> tuple[tuple[str, str], list[Pair]]:
    """Two entries of an evaluation's folder, and their pairs of images, by prompt.

    Args:
        folder: a folder that `esengine eval` wrote.
        entries: labels of two entries. By default the first two.

    Raises:
        ConfigError: the folder holds no evaluation, or an entry is not in it.
        RunError: a file is damaged.
    """
    if not (folder / "evaluation.json").is_file():
        raise ConfigError(f"{folder}: expected the folder of an evaluation or a run, it has no evaluation.json")
    evaluation = read_json(folder / "evaluation.json")
    with as_written(folder / "evaluation.json"):
        known = texts(evaluation["entries"])
    chosen = tuple(entries) or tuple(known[:2])
    if len(chosen) != 2 or chosen[0] == chosen[1]:
        raise ConfigError(f"entries: expected two, got {', '.join(chosen) or 'none'}; {folder} has {', '.join(known)}")
    for entry in chosen:
        if entry not in known:
            raise ConfigError(f"entries: {folder} has {', '.join(known)}, got {entry}")
    found: dict[str, dict[Key, tuple[str, Path]]] = {entry: {} for entry in chosen}
    for entry, key, prompt, image in read_lines(folder / "scores.jsonl", _image):
        if entry in found:
            require_inside(folder, folder / image)
            found[entry][key] = prompt, folder / image
    first, second = (found[entry] for entry in chosen)
    keys = sorted(first.keys() & second.keys())
    if not keys:
        raise ConfigError(f"{folder}: no prompt has an image of both entries; finish the evaluation first")
    return chosen, [Pair(key, first[key][0], (first[key][1], second[key][1]), folder) for key in keys]


def judge(
    folder: Path,
    asker: Asker,
    entries: Sequence[str] = (),
    *,
    limit: int | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Verdict:
    """Ask a person about every pair that has no answer yet, in an order that does not depend on the prompts' order.

    Args:
        folder: see `pairs_of`.
        asker: the page.
        entries: see `pairs_of`.
        limit: ask about so many pairs at most.
        stopped: called several times a second. True ends the round; the answers so far are kept.

    Raises:
        ConfigError, RunError: see `pairs_of`.
        OSError: an answer cannot be written.
    """
    chosen, pairs = pairs_of(folder, entries)
    random.Random(0).shuffle(pairs)
    pairs = pairs[:limit]
    refuse_links(f"{folder}", [folder / NAME])
    known = answers(folder, chosen)
    asked = [pair for pair in pairs if pair.key not in known]

    with naming(folder / NAME), open(folder / NAME, "ab+", buffering=0) as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)  # a line that a killed process began

        def keep(index: int, answer: str) -> None:
            better = None if answer == SAME else chosen[answer == SECOND]
            prompt, repeat = asked[index].key
            record = {"index": prompt, "repeat": repeat, "entries": chosen, "better": better}
            file.write(json.dumps(record).encode() + b"\n")
            os.fsync(file.fileno())

        questions = [Question(pair.text, lambda pair=pair: _pixels(pair)) for pair in asked]
        asker.ask(questions, keep, title="which is better?", done=len(pairs) - len(asked), stopped=stopped)
    return verdict(chosen, answers(folder, chosen))


def answers(folder: Path, entries: tuple[str, str]) -> dict[Key, str | None]:
    """The answers in a folder's judged.jsonl about two entries, the last one for each pair."""
    path = folder / NAME
    if not path.is_file():
        return {}
    found = {}
    for key, both, better in read_lines(path, _answer):
        if set(both) == set(entries):
            found[key] = better
    return found


def verdict(entries: tuple[str, str], found: dict[Key, str | None]) -> Verdict:
    """Count the answers about two entries."""
    given = list(found.values())
    return Verdict(entries, given.count(entries[1]), given.count(entries[0]), given.count(None))


def verdicts(folder: Path) -> Iterator[Verdict]:
    """The verdicts in a folder's judged.jsonl, one for each two entries that were compared."""
    path = folder / NAME
    compared = {frozenset(both): both for _, both, _ in read_lines(path, _answer)} if path.is_file() else {}
    for both in compared.values():
        yield verdict(both, answers(folder, both))


def _answer(record: dict[str, Any]) -> tuple[Key, tuple[str, str], str | None]:
    first, second = texts(record["entries"])
    better = record["better"]
    if better not in (None, first, second):
        raise ValueError(f"better: expected one of the entries, got {better!r:.40}")
    return (int(record["index"]), int(record["repeat"])), (first, second), better


def _image(record: dict[str, Any]) -> tuple[str, Key, str, str]:
    key = int(record["index"]), int(record["repeat"])
    return text(record["entry"]), key, text(record["prompt"]), text(record["image"])


def _pixels(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    first, second = (np.asarray(read_png(path, pair.folder).convert("RGB")) for path in pair.images)
    return first, second
