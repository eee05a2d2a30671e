"""Flags of the commands other than `train`, whose settings are `esengine.run.settings.TrainConfig`.

Everything here is plain Python, so that `--help` answers before torch is imported.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from esengine.base.errors import ConfigError
from esengine.base.settings_file import MAX_COUNT, MAX_STEPS, check_counts
from esengine.sampling.settings import ImageSettings


@dataclass(frozen=True)
class EvalConfig:
    """Compare models on the same prompts and latents: means, paired differences to the first, and who wins.

    `esengine eval --run-dir RUN` compares base and adapter on the run's held-out prompts and prints a table.

    `esengine eval --run-dir RUN --benchmark partiprompts` is the full evaluation: base at one step, the adapter, base
    at two steps; an image of each prompt; PickScore, CLIP, aesthetic and no-artifacts scores. It leaves a folder of
    images, scores.jsonl, and a report as HTML, Markdown, CSV and JSON. Killed at any point, the same command goes on
    and ends with the same table. Several processes share the work under torchrun, or with --shard.

    A file of prompts is text with a prompt on each line; or a table, .tsv or .csv, with a column Prompt and perhaps
    Category and Challenge; or .jsonl with these as keys.
    """

    run_dir: Path | None = None
    """A run's folder: its adapter, and its settings for what the other flags leave open."""
    adapter: Path | None = None
    """An adapter's folder, instead of the run's."""
    benchmark: str | None = None
    """`partiprompts` or `drawbench`, from the hub or the file of --prompts; `nano`; or a file of prompts."""
    entries: tuple[str, ...] = ()
    """Model @ denoising steps: base@1, adapter@1 (the run's), FOLDER@1, NAME=FOLDER@1; the first is what to beat."""
    model: str | None = None
    """A SanaSprintPipeline folder, a hub id, `nano` or `tiny`."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    prompts: Path | None = None
    """File of prompts, such as a PartiPrompts.tsv for --benchmark. By default the run's held-out prompts."""
    limit: int | None = None
    """So many prompts, the first ones."""
    reward: str | None = None
    """Rewards: `a=1.0,my_module:score=0`. By default the run's; for the benchmark `nano` all judges of that model, of a
    run_dir of it beside the run's; for any other benchmark pickscore and its three companions."""
    seed: int | None = None
    """Keys the latents, with a prompt's place in its file. By default the run's."""
    repeats: int | None = None
    """Images of each prompt. By default the run's; for a benchmark 1."""
    out: Path | None = None
    """Folder of images and reports; for a benchmark, by default, evaluations/NAME in the run's folder or here."""
    shard: str | None = None
    """K/N: part K (from 0) of N; the process that finishes last makes the report. By default torchrun's place."""
    json: Path | None = None
    """Also write report.json there."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU when there is one, under torchrun the process's own."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: the run's; without a run, bfloat16 on a GPU and float32 on a CPU."""
    image: tyro.conf.AvoidSubcommands[ImageSettings | None] = None

    def __post_init__(self):
        _check_common(self)
        check_counts(self, "", repeats=(1, MAX_COUNT), limit=(1, MAX_STEPS))
        if self.shard is not None:
            k, slash, n = self.shard.partition("/")
            if not (k.isdecimal() and n.isdecimal() and slash and int(k) < int(n)):
                raise ConfigError(f"shard: expected K/N with 0 <= K < N, such as 0/4, got {self.shard}")


@dataclass(frozen=True)
class RenderConfig:
    """Draw prompts with the base model and the adapter, from the same latents, side by side."""

    prompts: tyro.conf.Positional[tuple[str, ...]] = ()
    """What to draw. Without any, the first of --prompts-file."""
    prompts_file: Path | None = None
    """File of prompts: text with one on each line, .tsv, .csv or .jsonl. By default the packaged held-out list."""
    limit: int = 8
    """So many prompts of the file."""
    gallery: bool = False
    """The eight prompts of the published run, as gallery.png and gallery.html instead of single images."""
    run_dir: Path | None = None
    """A run's folder: its adapter, and its settings for what the other flags leave open."""
    adapter: Path | None = None
    """An adapter's folder, instead of the run's."""
    model: str | None = None
    """A SanaSprintPipeline folder, a hub id, `nano` or `tiny`."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    out: Path | None = None
    """Folder for the images. By default renders in the run's folder; without a run, here. Images of an earlier call
    are moved to `earlier` in it."""
    seed: int | None = None
    """Keys the latents. By default the run's."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU when there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: the run's; without a run, bfloat16 on a GPU and float32 on a CPU."""
    image: tyro.conf.AvoidSubcommands[ImageSettings | None] = None

    def __post_init__(self):
        _check_common(self)
        check_counts(self, "", limit=(1, MAX_STEPS))
        if self.gallery and (self.prompts or self.prompts_file):
            raise ConfigError("gallery: expected no prompts beside it, it has its own")
        if self.prompts and self.prompts_file:
            raise ConfigError(
                f"prompts_file: expected no prompts beside it, got {self.prompts[0]!r:.60}; give one of them"
            )


def _check_common(config: EvalConfig | RenderConfig) -> None:
    if config.seed is not None and not 0 <= config.seed < 1 << 64:
        raise ConfigError(f"seed: expected an integer in [0, 2^64), got {config.seed}")


@dataclass(frozen=True)
class ReportConfig:
    """Write report.html, a page that needs no network, into the folder of a finished evaluation or of any run."""

    folder: tyro.conf.Positional[Path] = Path(".")
    """Of a run or an evaluation."""


@dataclass(frozen=True)
class EnvConfig:
    """Versions, devices, and which kernels are in use and why."""

    json: bool = False
    """As JSON."""
