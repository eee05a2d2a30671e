"""The folder of an evaluation. Finished images survive a killed process, and several processes can share the folder.

    evaluation.json                    what is evaluated and how; a folder holds one evaluation
    curves.json                        curves of the runs that the adapters come from, if there are any
    images/<entry>/00012_ab12cd34.png  the prompt's index, and the first 8 hex digits of the SHA-256 of the pixels
    scores.jsonl                       one line an image
    scores.0-of-4.jsonl                the same from one of several processes, until all have finished
    report.json .md .csv .html

A line is appended after its image is in place, and chunks are fixed. So whatever is missing or damaged is rendered
again to the same bytes: a truncated line, a line with a wrong checksum, a missing image, an image with other pixels.
"""

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from esengine.base.errors import EsengineError, RunError
from esengine.base.files import naming, read_regular, refuse_links, replace_file
from esengine.base.locks import Held, lock
from esengine.base.pictures import read_png
from esengine.base.progress import Progress
from esengine.base.records import parse_json, read_json, text
from esengine.evaluation.benchmarks import Benchmark
from esengine.evaluation.draw import Batch, Places, Plan, batch_records
from esengine.evaluation.entries import Entry
from esengine.evaluation.statistics import Report, flatten

WRITERS = min(8, os.cpu_count() or 1)
_TEMPORARY = ".tmp-"

Key = tuple[str, int, int]
"""(entry label, prompt index, repeat) of an image."""


class EvaluationFolder:
    """An evaluation's folder, locked by this process. Use `EvaluationFolder.open` in a `with` statement.

    Attributes:
        path: the folder as the user named it, for messages.
        at: the folder to write to. It is the locked one, even if it was renamed since.
        shard: (k, n): this process renders chunks k, k + n, ... of each entry.
        scores: the file that this process appends to.
    """

    def __init__(self, path: Path, shard: tuple[int, int]):
        self.path, self.shard, self._held = path, shard, None
        self._name = f"{shard[0]}-of-{shard[1]}"

    @property
    def at(self) -> Path:
        return self.path if self._held is None else self._held.path

    @property
    def scores(self) -> Path:
        return self.at / ("scores.jsonl" if self.shard[1] == 1 else f"scores.{self._name}.jsonl")

    def where(self) -> Path:
        """The folder's name: `path`, or the one that it has now."""
        return self.path if self._held is None else self._held.where()

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path, shard: tuple[int, int] = (0, 1)) -> Iterator["EvaluationFolder"]:
        """Create or reopen a folder, and lock this shard of it.

        Raises:
            RunError: the folder cannot be created, holds something else or a symbolic link, or another process renders
                this shard.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
            others = [p.name for p in path.iterdir() if not p.name.startswith((".lock", _TEMPORARY))]
        except (FileExistsError, NotADirectoryError) as error:
            raise RunError(f"out {path}: expected a folder, there is a file") from error
        except OSError as error:
            raise RunError(f"out {path}: {error.strerror or error}") from error
        if others and "evaluation.json" not in others:
            raise RunError(f"out {path}: expected a new folder or one of an evaluation, it holds {sorted(others)[0]}")
        refuse_links(f"out {path}", [*path.iterdir(), *path.glob("images/*")])
        folder = cls(path, shard)
        in_use = f"out {path}: another process draws it" + (f", shard {shard[0]}/{shard[1]}" if shard[1] > 1 else "")
        with _lock(path / f".lock.{folder._name}", in_use):
            folder._held = Held(path)
            try:
                if not (folder.at / f".lock.{folder._name}").exists():  # it was renamed since it was locked
                    raise RunError(f"out {path}: another process has renamed it")
                folder._remove_temporaries(f"{_TEMPORARY}{folder._name}-*")
                yield folder
            except (EsengineError, OSError) as error:
                folder._held.name_in(error)
                raise
            finally:
                folder._held.close()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Run the block while no other process is inside `alone` for this folder."""
        with _lock(self.at / ".lock"):
            yield

    def begin(self, record: dict, keep: Sequence[str] = ()) -> dict:
        """Write evaluation.json, or check that it describes this evaluation.

        Args:
            record: what is evaluated and how, JSON values, with a mapping under "settings".
            keep: names of settings that were chosen automatically. They keep the values that the file has, whole
                numbers above 0.

        Returns:
            The record, as it is in the file.

        Raises:
            RunError: the file is not readable, or describes another evaluation. The message names the differences.
        """
        file = self.at / "evaluation.json"
        if not file.exists():
            replace_file(file, (json.dumps(record, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode())
            return record
        try:
            saved = read_json(file)
            kept = {name: saved["settings"][name] for name in keep}
            if any(type(value) is not int or value < 1 for value in kept.values()):
                raise ValueError(f"expected whole numbers above 0, got {kept}")
            record["settings"] |= kept
            old, new = flatten(saved), flatten(json.loads(json.dumps(record)))
        except (RunError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise RunError(f"out {self.path}: evaluation.json is damaged, choose another --out") from error
        names = [name for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)]
        if names:
            changed = "; ".join(f"{name}: {old.get(name)} -> {new.get(name)}" for name in names)
            raise RunError(f"out {self.path} holds an evaluation with other settings ({changed}): choose another --out")
        return record

    def keep_curves(self, read: Callable[[], dict[str, Any]]) -> None:
        """Write what `read` returns into curves.json, unless the file exists or there are no curves."""
        file = self.at / "curves.json"
        if not file.exists() and (kept := read()):
            replace_file(file, json.dumps(kept, allow_nan=False).encode())

    def missing(self, plan: Plan, progress: Progress) -> list[tuple[Entry, Places]]:
        """Chunks of this shard that are still to be rendered. Checks every image of the finished chunks.

        A chunk is rendered again as a whole, so that its images keep the same batch mates.
        """
        with self.alone():  # no other process merges the files meanwhile
            found = self._read(plan, progress)
        mine = [(entry, rows) for entry in plan.entries for rows in plan.chunks()[self.shard[0] :: self.shard[1]]]
        known = [k for entry, rows in mine if all(k in found for k in _keys(entry, rows)) for k in _keys(entry, rows)]
        good = set()
        with ThreadPoolExecutor(WRITERS) as pool:
            checks = zip(known, pool.map(self._problem, (found[key] for key in known)), strict=True)
            for done, (key, problem) in enumerate(checks, start=1):
                if problem:
                    progress.note(f"{self.path / found[key]['image']}: {problem}, its chunk is drawn again")
                else:
                    good.add(key)
                progress.count("images checked", done, len(known))
        work = [(entry, rows) for entry, rows in mine if not good.issuperset(_keys(entry, rows))]
        if self.scores.exists():
            again = {key for entry, rows in work for key in _keys(entry, rows)}
            own = self._lines(self.scores, plan)[0]
            replace_file(self.scores, b"".join(_line(record) for key, record in own.items() if key not in again))
        return work

    def store(self, batches: Iterable[Batch], benchmark: Benchmark) -> Iterator[int]:
        """Write batches as they come; one's images are written while the next is rendered. Yields each batch's size."""
        with ThreadPoolExecutor(WRITERS) as pool, open(self.scores, "ab") as lines:
            waiting: list[tuple[dict, object]] = []
            for batch in batches:
                pixels = batch.images.permute(0, 2, 3, 1).contiguous().cpu().numpy()  # [B, H, W, 3]
                self._append(lines, waiting)
                waiting = []
                for record, image in zip(batch_records(batch), pixels, strict=True):
                    index = record["index"]
                    record |= {
                        "prompt": benchmark.prompts[index],
                        "category": benchmark.categories[index],
                        "challenge": benchmark.challenges[index],
                    }
                    waiting.append((record, pool.submit(self._save, record, image)))
                yield len(batch.rows)
            self._append(lines, waiting)

    def merge(self, plan: Plan, progress: Progress) -> list[dict] | None:
        """Records of every image in the plan's order, also written to scores.jsonl. None while shards are incomplete.

        Call it inside `alone`.
        """
        found = self._read(plan, progress)
        order = [key for entry in plan.entries for rows in plan.chunks() for key in _keys(entry, rows)]
        if any(key not in found for key in order):
            return None
        records = [found[key] for key in order]
        replace_file(self.at / "scores.jsonl", b"".join(map(_line, records)))
        for part in self.at.glob("scores.*-of-*.jsonl"):
            part.unlink()
        self._remove_temporaries(f"{_TEMPORARY}*")
        return records

    def publish(self, report: Report) -> None:
        """Write report.json, report.md and report.csv, each atomically."""
        for suffix, made in (("json", report.to_json()), ("md", report.to_markdown()), ("csv", report.to_csv())):
            replace_file(self.at / f"report.{suffix}", made.encode())

    def _read(self, plan: Plan, progress: Progress) -> dict[Key, dict]:
        """Records of all shards, by key. A shard's records replace those of an earlier merge."""
        found: dict[Key, dict] = {}
        parts = sorted(self.at.glob("scores.*-of-*.jsonl"))
        for file in [self.at / "scores.jsonl", *parts]:
            if file.exists():
                records, bad = self._lines(file, plan)
                found |= records
                if bad and file == self.scores:
                    where = f"{self.path / file.name}: line {bad[0]}"
                    progress.note(f"{where} is damaged, {len(bad)} in all; those images are drawn again")
        return found

    def _lines(self, file: Path, plan: Plan) -> tuple[dict[Key, dict], list[int]]:
        """The records of a file by key, and the numbers of its damaged lines."""
        known = {key for entry in plan.entries for rows in plan.chunks() for key in _keys(entry, rows)}
        records, bad = {}, []
        for number, line in enumerate(read_regular(file).split(b"\n"), start=1):
            key, record = _record(line)
            if key in known:
                records[key] = record
            elif line:
                bad.append(number)
        return records, bad

    def _append(self, lines, waiting: list[tuple[dict, object]]) -> None:
        for _, saved in waiting:
            saved.result()
        if waiting:
            with naming(self.scores):
                lines.write(b"".join(_line(record) for record, _ in waiting))
                lines.flush()

    def _save(self, record: dict, pixels: np.ndarray) -> None:
        """Write an image, and add its name to its record."""
        name = f"{record['index']:05d}_{_sha8(pixels)}.png"
        folder = self.at / "images" / record["entry"]
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{_TEMPORARY}{self._name}-{record['repeat']}-{name}"
        with naming(folder / name):
            Image.fromarray(pixels).save(temporary, format="PNG")
        os.replace(temporary, folder / name)
        record["image"] = f"images/{record['entry']}/{name}"

    def _problem(self, record: dict) -> str | None:
        """What is wrong with a record's image; None if nothing is."""
        path = self.at / record["image"]
        try:
            pixels = np.asarray(read_png(path, self.at))
        except FileNotFoundError:
            return "the image is gone"
        except (RunError, ValueError):
            return "the image cannot be read"
        return None if path.stem.endswith(f"_{_sha8(pixels)}") else "the image's pixels are not those of its name"

    def _remove_temporaries(self, pattern: str) -> None:
        for folder in (self.at, *self.at.glob("images/*")):
            for path in folder.glob(pattern):
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def _lock(path: Path, in_use: str | None = None) -> Iterator[None]:
    """Hold a lock that ends with the process. Wait for it, or raise RunError(in_use) if `in_use` is given."""
    with open(path, "a", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK)) as file:
        if not lock(file.fileno(), wait=in_use is None):
            raise RunError(in_use)
        yield


def _keys(entry: Entry, rows: Places) -> list[Key]:
    return [(entry.label, index, repeat) for index, repeat in rows]


def _line(record: dict) -> bytes:
    """A record as a line of JSON that ends with a checksum of the other fields."""
    return json.dumps({**record, "crc32": _crc32(record)}, allow_nan=False, ensure_ascii=False).encode() + b"\n"


def _record(line: bytes) -> tuple[Key | None, dict]:
    """The key and record of a line that `_line` wrote. The key is None if the line is damaged."""
    try:
        record = parse_json(line)
        whole = record.pop("crc32") == _crc32(record)
        text(record["image"])
        key = text(record["entry"]), record["index"], record["repeat"]
        return key if whole and {type(each) for each in key[1:]} == {int} else None, record
    except (ValueError, TypeError, KeyError, AttributeError):
        return None, {}


def _crc32(record: dict) -> str:
    return f"{zlib.crc32(json.dumps(record, sort_keys=True).encode()):08x}"


def _sha8(pixels: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()[:8]
