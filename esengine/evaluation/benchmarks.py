"""The prompts of an evaluation: PartiPrompts, DrawBench, a model's own test captions, or the user's file."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from esengine.base.errors import ConfigError
from esengine.base.prompt_files import COLUMNS, METADATA, Metadata, metadata_sha256, read_prompt_file
from esengine.models.defaults import BENCHMARKS


@dataclass(frozen=True)
class _Published:
    dataset: str
    file: str
    columns: tuple[str, ...]


PUBLISHED = {
    "partiprompts": _Published("nateraw/parti-prompts", "PartiPrompts.tsv", ("prompt", "category", "challenge")),
    "drawbench": _Published("sayakpaul/drawbench", "DrawBench Prompts - Sheet1.csv", ("prompt", "category")),
}
"""Benchmarks by name: the dataset on the hub, its file, and the columns that the file must have."""


@dataclass(frozen=True)
class Benchmark:
    """P prompts, with categories and challenges if the file has them. A prompt's latents depend on its index."""

    name: str
    prompts: tuple[str, ...]
    categories: tuple[str | None, ...]
    challenges: tuple[str | None, ...]
    metadata: tuple[Metadata, ...] | None = field(default=None, compare=False)
    """The columns of each prompt, for rewards. None: the prompts have none."""

    def __len__(self) -> int:
        return len(self.prompts)

    def first(self, count: int | None) -> "Benchmark":
        """The first `count` prompts; None: all."""
        cut = {name: getattr(self, name)[:count] for name in ("prompts", "categories", "challenges")}
        cut["metadata"] = self.metadata and self.metadata[:count]
        return dataclasses.replace(self, **cut)

    def sha256(self) -> str:
        """Hash of everything except the name. With no columns but the groups it is that of older versions."""
        content = [self.prompts, self.categories, self.challenges]
        if any(name.lower() not in COLUMNS for columns in self.metadata or () for name in columns):
            content.append(metadata_sha256(self.prompts, self.metadata))
        return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()


def read_benchmark(name: str | None, path: Path | None = None) -> Benchmark:
    """Prompts of a published benchmark, or of a file.

    Args:
        name: a key of `PUBLISHED` or `BENCHMARKS`, a file, or None to read `path`. See `esengine.base.prompt_files` for
            the file formats.
        path: the file of a published benchmark. None: the hub's file.

    Raises:
        ConfigError: no such benchmark or file, the hub cannot be reached, or the file lacks a column, is not UTF-8, is
            damaged, or holds no prompt. The message has the line number if there is one.
    """
    if name in PUBLISHED:
        published = PUBLISHED[name]
        return _read(name, path or _download(name, published), published.columns)
    if name is not None and name not in BENCHMARKS and not Path(name).is_file():
        raise ConfigError(f"benchmark: expected {', '.join([*PUBLISHED, *BENCHMARKS])} or a file, got '{name}'")
    if name is not None and path is not None:
        raise ConfigError(f"prompts: expected with {' or '.join(PUBLISHED)} only, got {path} beside benchmark {name}")
    if name in BENCHMARKS:
        return _read(name, BENCHMARKS[name], ("prompt", "category", "challenge"))
    file = Path(name) if path is None else path
    return _read(file.stem, file)


def _read(name: str, path: Path, needed: Sequence[str] = ("prompt",)) -> Benchmark:
    columns = read_prompt_file(path, needed)
    return Benchmark(name, columns["prompt"], columns["category"], columns["challenge"], columns[METADATA])


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
