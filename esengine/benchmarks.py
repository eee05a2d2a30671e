"""The prompts of an evaluation: PartiPrompts, DrawBench, the test captions of the nano world, or one's own file.

PartiPrompts.tsv is written without quoting: a quote is part of a prompt, and one prompt begins with one. So a table
with tabs is split at its tabs, and only a cell that is quoted as a whole, as spreadsheets do when they save it anew, is
unquoted. A table with commas is ordinary CSV.
"""

import codecs
import csv
import dataclasses
import hashlib
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from esengine.defaults import DATA
from esengine.errors import ConfigError
from esengine.files import read_regular
from esengine.prompts import read_prompts

COLUMNS = {"prompt": ("prompt", "prompts"), "category": ("category",), "challenge": ("challenge",)}
"""A column's names, in any case. Only the prompt is needed in a table of one's own."""

_QUOTED = re.compile(r'"((?:[^"]|"")*)"')


@dataclass(frozen=True)
class _Published:
    dataset: str
    file: str
    columns: tuple[str, ...]


PUBLISHED = {
    "partiprompts": _Published("nateraw/parti-prompts", "PartiPrompts.tsv", ("prompt", "category", "challenge")),
    "drawbench": _Published("sayakpaul/drawbench", "DrawBench Prompts - Sheet1.csv", ("prompt", "category")),
}
"""Benchmarks by name: the dataset on the hub, its one file, and the columns that the file must have."""

PACKAGED = {"nano": DATA / "nano_test.tsv"}
"""Benchmarks of this package, by name."""


@dataclass(frozen=True)
class Benchmark:
    """P prompts, with their categories and challenges where the file has them. A prompt's place keys its latents."""

    name: str
    prompts: tuple[str, ...]
    categories: tuple[str | None, ...]
    challenges: tuple[str | None, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def first(self, count: int | None) -> "Benchmark":
        """The first so many prompts; None: all."""
        cut = {name: getattr(self, name)[:count] for name in ("prompts", "categories", "challenges")}
        return dataclasses.replace(self, **cut)

    def sha256(self) -> str:
        """Of everything but the name."""
        content = [self.prompts, self.categories, self.challenges]
        return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()


def read_benchmark(name: str | None, path: Path | None = None) -> Benchmark:
    """Prompts of a published benchmark, or of a file.

    Args:
        name: a key of `PUBLISHED` or `PACKAGED`, a file, or None for `path` alone. A .tsv or .csv file is a table with
            a column Prompt or Prompts and perhaps Category and Challenge, their names in any case and order, among
            others; any other file is text with a prompt on each line.
        path: the file of a published benchmark. None: the hub's.

    Raises:
        ConfigError: no such benchmark or file, the hub cannot be reached, or the file lacks a column, is not UTF-8, is
            torn, or holds no prompt; with the line number where there is one.
    """
    if name in PUBLISHED:
        published = PUBLISHED[name]
        return _read_table(name, path or _download(name, published), published.columns)
    if name is not None and name not in PACKAGED and not Path(name).is_file():
        raise ConfigError(f"benchmark: expected {', '.join([*PUBLISHED, *PACKAGED])} or a file, got '{name}'")
    if name is not None and path is not None:
        raise ConfigError(f"prompts: expected with {' or '.join(PUBLISHED)} only, got {path} beside benchmark {name}")
    if name in PACKAGED:
        return _read_table(name, PACKAGED[name], ("prompt", "category", "challenge"))
    file = Path(name) if path is None else path
    if file.suffix.lower() in (".tsv", ".csv"):
        return _read_table(file.stem, file, ("prompt",))
    prompts = tuple(read_prompts(file))
    nothing = (None,) * len(prompts)
    return Benchmark(file.stem, prompts, nothing, nothing)


def _download(name: str, published: _Published) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(published.dataset, published.file, repo_type="dataset"))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ConfigError(
            f"benchmark {name}: '{published.file}' of the hub's dataset {published.dataset} is neither cached nor can "
            f"it be fetched ({type(error).__name__}); fetch it elsewhere and give it with --prompts FILE"
        ) from error


def _read_table(name: str, path: Path, needed: tuple[str, ...]) -> Benchmark:
    where = f"prompts file {path}"
    rows = _cells(_read_text(path, where), where)
    _, header = next(rows, (0, []))
    names = [cell.lower() for cell in header]
    place = {column: names.index(a) for column, aliases in COLUMNS.items() for a in aliases if a in names}
    if missing := [column for column in needed if column not in place]:
        found = ", ".join(header)[:200] or "none"
        expected = ", ".join("Prompt or Prompts" if column == "prompt" else column.title() for column in missing)
        raise ConfigError(f"{where}: expected a first line with the columns {expected}, got the columns {found}")
    for column in place:
        if sum(names.count(a) for a in COLUMNS[column]) > 1:
            raise ConfigError(f"{where}: expected one column {column.title()}, got several")
    found: dict[str, list[str | None]] = {column: [] for column in COLUMNS}
    for number, cells in rows:
        if not any(cells):
            continue
        if any(cells[len(header) :]):
            raise ConfigError(f"{where}, line {number}: expected {len(header)} cells, got {len(cells)}")
        for column, values in found.items():
            at = place.get(column, len(cells))
            values.append(cells[at] or None if at < len(cells) else None)
        if found["prompt"][-1] is None:
            raise ConfigError(f"{where}, line {number}: expected a prompt, got an empty cell")
    if not found["prompt"]:
        raise ConfigError(f"{where}: expected at least one prompt, got none")
    return Benchmark(name, *(tuple(values) for values in found.values()))


def _read_text(path: Path, where: str) -> str:
    try:
        data = read_regular(path).removeprefix(codecs.BOM_UTF8)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}: {getattr(error, 'strerror', None) or error}") from error
    if b"\0" in data:
        line = data[: data.index(b"\0")].count(b"\n") + 1
        raise ConfigError(f"{where}, line {line}: expected text in UTF-8, got a NUL byte")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(f"{where}, line {line}: expected text in UTF-8, got {error.reason}") from error


def _cells(text: str, where: str) -> Iterator[tuple[int, list[str]]]:
    """The number of each row's last line, and its cells without the spaces around them."""
    tabs = "\t" in text.partition("\n")[0]
    dialect = dict(delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else dict(strict=True)
    reader = csv.reader(io.StringIO(text, newline=""), **dialect)
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            yield reader.line_num, [_unquoted(cell) for cell in cells] if tabs else cells
    except csv.Error as error:
        raise ConfigError(f"{where}, line {reader.line_num}: expected a table, got {error}") from error


def _unquoted(cell: str) -> str:
    whole = _QUOTED.fullmatch(cell)
    return whole[1].replace('""', '"').strip() if whole else cell
