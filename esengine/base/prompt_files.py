"""Reads files of prompts, for every flag that takes one: text, tables and JSON.

    .txt, and any other name    a prompt on each line; blank lines and lines that begin with # are skipped
    .tsv, .csv                  a table whose first line has the column names Prompt and optionally Category, Challenge
    .jsonl, .ndjson             a JSON object on each line, with the same names as keys; or a JSON string
    .json                       a list of such objects or strings

All columns but the prompt become the prompt's metadata, a dict under the names that the file gives them, in their
case. In a table the values are texts, and an empty or missing cell is None. A column without a name is left out. In
JSON a value is of any type, and a key that an object does not have is not in its dict. Text files have no columns.

A .txt file, or a file of any other name, that begins like a table or JSON is read as one, because no prompt looks like
that. Lines that begin with # may precede its column names.

PartiPrompts.tsv does not quote its cells: a quote is part of a prompt, and one prompt begins with one. So a table with
tabs is split at its tabs. A cell is unquoted only if all of it is quoted, as spreadsheets save it. A table with commas
is ordinary CSV. Other separators are rejected.
"""

import codecs
import contextlib
import csv
import hashlib
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from esengine.base.errors import ConfigError
from esengine.base.files import read_regular
from esengine.base.records import parse_json

COLUMNS = {"prompt": ("prompt", "prompts"), "category": ("category",), "challenge": ("challenge",)}
"""Names of each column, in any case. Only the prompt is required, unless a caller requires more."""

METADATA = "metadata"
"""Name of the dicts of columns in `Columns`."""
MAX_DEPTH = 64
"""Lists and objects inside one another in a JSON value."""

MAX_BYTES = 1 << 28
ACCEPTED = ".txt (a prompt on each line), .tsv, .csv, .jsonl or .json"
_TABLES, _JSON_LINES, _JSON = (".tsv", ".csv"), (".jsonl", ".ndjson"), ".json"
_OTHER = frozenset((
    *(".yaml", ".yml", ".toml", ".xml", ".html", ".parquet", ".arrow", ".feather", ".xls", ".xlsx", ".ods", ".docx"),
    *(".pdf", ".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".pkl", ".pickle", ".pt", ".npy", ".npz", ".safetensors"),
))  # fmt: skip
"""Suffixes of other formats that may hold prompts. They are rejected: they would be read as lines of text."""

_OTHER_NAMES = ("caption", "captions", "text", "description")
"""Other common names of the prompt column. Such a table is rejected, and the error lists its columns."""
_BESIDE = frozenset((
    *("id", "index", "category", "challenge", "note", "notes", "label", "split", "source", "seed", "url", "image"),
    *("key", "file", "filename", "path", "lang", "language", "score", "negative", "style", "model", "width", "height"),
))  # fmt: skip
"""Words in the names of other columns."""
_JSON_BEGUN = re.compile(r"""\{\s*["'][^"']*["']\s*:|\[\s*\{\s*["']|\[\s*("[^"]*"|'[^']*')\s*(,|$|\]\s*$)""")
_YAML = re.compile(r"---$|(prompts|captions)\s*:|-\s+(prompt|caption|text)\s*:")
_MARKUP = re.compile(r"<(\?xml|!doctype|html)", re.IGNORECASE)

_COMMENTS = re.compile(rb"(?m)^[ \t]*#[^\r\n]*")
_QUOTED = re.compile(r'"((?:[^"]|"")*)"')

Metadata = dict[str, Any]
"""The columns of one prompt besides the prompt itself, by name."""

Columns = dict[str, tuple[Any, ...]]
"""The values of each of `COLUMNS`, one for each prompt, and the prompts' `Metadata` under `METADATA`. A value is None
where the file has none. A prompt is never None."""

_Row = tuple[str, dict[str, Any], Metadata]
"""Where a prompt stands in its file, its `COLUMNS`, and its metadata."""


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a file. See the module docstring for the formats.

    Returns:
        At least one prompt, in the file's order.

    Raises:
        ConfigError: the file cannot be read or holds no prompt. The message has the line number if there is one.
    """
    return list(read_prompt_file(path)["prompt"])


def read_with_metadata(path: str | Path) -> tuple[list[str], tuple[Metadata, ...]]:
    """As `read_prompts`, with the metadata of each prompt."""
    columns = read_prompt_file(path)
    return list(columns["prompt"]), columns[METADATA]


def read_prompt_file(path: str | Path, needed: Sequence[str] = ("prompt",)) -> Columns:
    """Read a file of prompts in one of the formats above.

    Duplicates are kept. Spaces around a prompt are removed. A byte order mark and any line ending are accepted.

    Args:
        path: the file. Its suffix selects the format.
        needed: required columns. If that is more than the prompt, the file must be a table or JSON.

    Returns:
        The columns in the file's order, with at least one prompt.

    Raises:
        ConfigError: the file cannot be read, has another format, lacks a column, holds no prompt, or is not UTF-8. The
            message has the line if there is one.
    """
    path = Path(path)
    where, form = f"prompts file {path}", path.suffix.lower()
    data = _bytes(path, where)
    if form in _OTHER:
        raise ConfigError(f"{where}: expected {ACCEPTED}, got {form}")
    if form not in (*_TABLES, *_JSON_LINES, _JSON):
        form = _looks_like(data) or (".tsv" if len(needed) > 1 else ".txt")
        if form in _OTHER:
            raise ConfigError(f"{where}: expected {ACCEPTED}, got what looks like {form}")
        data = _COMMENTS.sub(b"", data) if form == ".tsv" else data
    if form == ".txt":
        rows: Iterable[_Row] = _text(data, where)
    elif form in _TABLES:
        rows = _table(_decoded(data, where), where, form, needed)
    elif form in _JSON_LINES:
        rows = _json_lines(data, where)
    else:
        rows = _json(_decoded(data, where), where)
    return _columns(rows, where, needed)


def _bytes(path: Path, where: str) -> bytes:
    try:
        return read_regular(path, MAX_BYTES).removeprefix(codecs.BOM_UTF8)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}: {getattr(error, 'strerror', None) or error}") from error


def _looks_like(data: bytes) -> str | None:
    """The format of a text that looks like a table, JSON or another format. None: a list of prompts."""
    lines = [line.decode("utf-8", "replace") for line in data.splitlines()]
    lines = [line for line in lines if line.strip() and (_names(line) or not line.lstrip().startswith("#"))]
    if not lines:
        return None
    first = lines[0].strip()
    if first[0] in "[{":
        return _json_like(data, first, lines)
    if _YAML.match(first.lower()) or any(line.strip().lower() == "prompts:" for line in lines[1:5]):
        return ".yaml"
    if _MARKUP.match(first) or re.match(r"prompts?\s*=\s*[\[\"']", first.lower()):
        return ".xml" if first.startswith("<") else ".toml"
    titled = any("\t" in line and _names(line) for line in lines[1:5])  # a title or a comment is above the names
    table = titled or _names(first, alone=len(lines) > 1) or (len(lines) > 1 and all("\t" in line for line in lines))
    return ".tsv" if table else None


def _json_like(data: bytes, first: str, lines: list[str]) -> str | None:
    with contextlib.suppress(ValueError):
        if isinstance(parse_json(first), dict):
            return ".jsonl"
    with contextlib.suppress(ValueError):
        items = parse_json(data)
        if isinstance(items, dict) or any(isinstance(item, (str, dict, list)) for item in items):
            return _JSON
    over_lines = len(lines) > 1 and (first, lines[-1].strip()) in (("[", "]"), ("{", "}"))
    return _JSON if over_lines or _JSON_BEGUN.match(first) else None  # the JSON reader reports what is wrong


def _names(line: str, alone: bool = False) -> bool:
    """Whether a line holds the column names of a table. With `alone`, one name is enough.

    "a city, prompt, 4k" is a prompt. "Prompt, Category" and "id,prompt" are column names.
    """
    cells = [cell.strip() for cell in re.split(r"[\t,;|]", line)]
    cells = cells[1:-1] if line.strip().startswith("|") else cells  # a Markdown table
    quoted = all(_QUOTED.fullmatch(cell) for cell in cells)
    cells = [cell.strip('"') for cell in cells]
    exact = any(cell.lower() in COLUMNS["prompt"] for cell in cells)
    if len(cells) == 1:
        return alone and (exact or cells[0].lower() in _OTHER_NAMES[:2])
    words = [re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cell).lower()) for cell in cells]
    short = [set(each) for each in words if len(each) <= 2]  # names are short
    ours, others = (any(each & set(names) for each in short) for names in (COLUMNS["prompt"], _OTHER_NAMES))
    if "\t" in line:
        return exact or ours or others
    if any(len(each) > 4 or (each and each[0] in ("a", "an", "the")) for each in words):
        return exact and not re.search(r"[,;|] ", line)
    beside = any(each & _BESIDE for each in short)
    spaced = re.search(r"[,;|] ", line) is not None
    return (exact and (beside or quoted)) or (not spaced and (ours or (others and beside)))


def metadata_sha256(prompts: Sequence[str], metadata: Sequence[Metadata]) -> str:
    """A hash of prompts with their metadata, in their order. The order of a dict's keys does not matter."""
    pairs = [[prompt, columns] for prompt, columns in zip(prompts, metadata, strict=True)]
    return hashlib.sha256(json.dumps(pairs, sort_keys=True).encode()).hexdigest()


def _columns(rows: Iterable[_Row], where: str, needed: Sequence[str]) -> Columns:
    found: dict[str, list[str | None]] = {column: [] for column in COLUMNS}
    metadata: list[Metadata] = []
    for place, row, columns in rows:
        _require_storable(columns, f"{where}, {place}")
        metadata.append(columns)
        for column, values in found.items():
            value = row.get(column)
            if column in needed and value is None:
                raise ConfigError(f"{where}, {place}: expected a {column}, got none")
            if value is not None and not isinstance(value, str):
                raise ConfigError(f"{where}, {place}: expected text as its {column}, got {value!r:.60}")
            if value is not None and not _is_text(value):
                raise ConfigError(f"{where}, {place}: expected text without NUL or surrogates as its {column}")
            value = value.strip() if value else None
            if column == "prompt" and not value:
                raise ConfigError(f"{where}, {place}: expected a prompt, got an empty one")
            values.append(value or None)
    if not found["prompt"]:
        raise ConfigError(f"{where}: expected at least one prompt, got none")
    return {column: tuple(values) for column, values in found.items()} | {METADATA: tuple(metadata)}


def _is_text(value: str) -> bool:
    return "\0" not in value and not any("\ud800" <= each <= "\udfff" for each in value)


def _require_storable(columns: Metadata, where: str) -> None:
    """Raise ConfigError for a value that cannot be sent as JSON, or written to a file."""
    for name, value in columns.items():
        if not _is_text(name):
            raise ConfigError(f"{where}: expected a column's name without NUL or surrogates, got {name!r:.60}")
        parts = [(value, 0)]
        while parts:
            part, depth = parts.pop()
            if isinstance(part, str) and not _is_text(part):
                raise ConfigError(f"{where}: expected text without NUL or surrogates as its {name}")
            if isinstance(part, float) and not math.isfinite(part):
                raise ConfigError(f"{where}: expected a finite number or null as its {name}, got {part}")
            if depth > MAX_DEPTH:
                raise ConfigError(f"{where}: expected at most {MAX_DEPTH} levels of lists and objects as its {name}")
            inner = [*part, *part.values()] if isinstance(part, dict) else part if isinstance(part, list) else ()
            parts += [(each, depth + 1) for each in inner]


def _lines(data: bytes, where: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(data.splitlines(), start=1):
        yield f"line {number}", _decode(line, f"{where}, line {number}").strip()


def _decode(data: bytes, where: str) -> str:
    if b"\0" in data:
        raise ConfigError(f"{where}: expected text, got a NUL byte")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: expected UTF-8, got {error.reason}") from error


def _decoded(data: bytes, where: str) -> str:
    """A file's whole text. An error names the line."""
    for number, line in enumerate(data.split(b"\n"), start=1):
        _decode(line, f"{where}, line {number}")
    return data.decode("utf-8")


def _text(data: bytes, where: str) -> Iterator[_Row]:
    for place, line in _lines(data, where):
        if line and not line.startswith("#"):
            yield place, {"prompt": line}, {}


def _json_lines(data: bytes, where: str) -> Iterator[_Row]:
    for place, line in _lines(data, where):
        if line:
            yield place, *_row(_loads(line, f"{where}, {place}"), f"{where}, {place}")


def _json(text: str, where: str) -> Iterator[_Row]:
    items = _loads(text, where)
    if not isinstance(items, list):
        raise ConfigError(f"{where}: expected a JSON list of prompts or of objects, got {type(items).__name__}")
    for number, item in enumerate(items, start=1):
        yield f"item {number}", *_row(item, f"{where}, item {number}")


def _loads(text: str, where: str) -> Any:
    try:
        return parse_json(text, strict=True)
    except ValueError as error:
        raise ConfigError(f"{where}: expected JSON, got {getattr(error, 'msg', None) or str(error)[:80]}") from error


def _row(item: Any, where: str) -> tuple[dict[str, Any], Metadata]:
    """One prompt's columns and metadata from a JSON object or string."""
    if isinstance(item, str):
        return {"prompt": item}, {}
    if not isinstance(item, dict):
        raise ConfigError(f"{where}: expected an object with the key prompt, or a string, got {item!r:.60}")
    names = {name: name.strip().lower() for name in item}
    row = {}
    for column, aliases in COLUMNS.items():
        keys = [name for name, plain in names.items() if plain in aliases]
        if len(keys) > 1:
            raise ConfigError(f"{where}: expected one key {column}, got {' and '.join(keys)}")
        row.update((column, item[name]) for name in keys)
    if "prompt" not in row:
        raise ConfigError(f"{where}: expected a key prompt, got the keys {', '.join(item)[:200] or 'none'}")
    return row, {name: value for name, value in item.items() if names[name] not in COLUMNS["prompt"]}


def _table(text: str, where: str, form: str, needed: Sequence[str]) -> Iterator[_Row]:
    lines = text.split("\n")
    for number, line in enumerate(lines):
        first = line.lstrip()
        if first and (not first.startswith("#") or _names(first)):
            break
        lines[number] = ""  # a comment above the column names
    text, first = "\n".join(lines), first.partition("\r")[0]
    rows = _cells(text, where, "\t" in first or (form == ".tsv" and "," not in first))
    _, header = next(((number, row) for number, row in rows if any(row)), (0, []))
    names = [cell.lower() for cell in header]
    place = {column: names.index(a) for column, aliases in COLUMNS.items() for a in aliases if a in names}
    if missing := [column for column in needed if column not in place]:
        found = ", ".join(header)[:200] or "none"
        expected = ", ".join("Prompt or Prompts" if column == "prompt" else column.title() for column in missing)
        raise ConfigError(
            f"{where}: expected a first line with the columns {expected}, got the columns {found}; columns stand "
            "between tabs or commas"
        )
    for column in place:
        if sum(names.count(a) for a in COLUMNS[column]) > 1:
            raise ConfigError(f"{where}: expected one column {column.title()}, got several")
    others = [(at, name) for at, name in enumerate(header) if name and at != place["prompt"]]
    if twice := [name for _, name in others if header.count(name) > 1]:
        raise ConfigError(f"{where}: expected one column {twice[0]}, got several")
    for number, cells in rows:
        if not any(cells):
            continue
        if any(cells[len(header) :]):
            raise ConfigError(f"{where}, line {number}: expected {len(header)} cells, got {len(cells)}")
        cells += [""] * (len(header) - len(cells))
        row = {column: cells[at] for column, at in place.items()}
        yield f"line {number}", row, {name: cells[at] or None for at, name in others}


def _cells(text: str, where: str, tabs: bool) -> Iterator[tuple[int, list[str]]]:
    """Yields the number of each row's last line, and its cells without surrounding spaces."""
    dialect = dict(delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else dict(strict=True)
    reader = csv.reader(io.StringIO(text, newline=""), **dialect)
    opened = 0  # line of a last cell with an unclosed quote
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            if tabs and opened and cells and cells[0].endswith('"') and cells[0].count('"') % 2:
                raise ConfigError(
                    f"{where}, line {opened}: expected each prompt on one line, got a quoted cell that goes on to line "
                    f"{reader.line_num}"
                )
            if len(cells) > 1:
                opened = 0
            if cells and cells[-1].startswith('"') and cells[-1].count('"') % 2:
                opened = reader.line_num
            yield reader.line_num, [_unquoted(cell) for cell in cells] if tabs else cells
    except csv.Error as error:
        raise ConfigError(f"{where}, line {reader.line_num}: expected a table, got {error}") from error


def _unquoted(cell: str) -> str:
    whole = _QUOTED.fullmatch(cell)
    return whole[1].replace('""', '"').strip() if whole else cell
