"""Flags of the commands other than `train`, whose settings are `esengine.run.settings.TrainConfig`.

Everything here is plain Python, so that `--help` answers before torch is imported.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import AfterValidator, Field

from esengine.base.errors import ConfigError
from esengine.base.settings import Count, File, Int, Seed, Steps, Switch, settings
from esengine.sampling.settings import ImageSettings


def _place(shard: str) -> str:
    k, slash, n = shard.partition("/")
    if not (k.isdecimal() and n.isdecimal() and slash and int(k) < int(n)):
        raise ValueError("K/N with 0 <= K < N, such as 0/4")
    return shard


@settings()
class EvalConfig:
    """Compare models on the same prompts and latents: mean scores, paired differences, win rates.

    `esengine eval --run-dir RUN` compares base and adapter on the run's held-out prompts and prints a table.

    `esengine eval --run-dir RUN --benchmark partiprompts` is the full evaluation. It compares the base at one step,
    the adapter, and the base at two steps, with one image of each prompt, by PickScore, CLIP, aesthetic and
    no-artifacts scores. It writes a folder with the images, scores.jsonl, and a report as HTML, Markdown, CSV and JSON.
    If it is killed, the same command continues and ends with the same table. Several processes can share the work:
    under torchrun, or with --shard.

    A file of prompts is text with one prompt a line; or a .tsv or .csv table with a column Prompt, and optionally
    Category and Challenge; or .jsonl with these keys.
    """

    run_dir: File | None = None
    """A run's folder. Its adapter is used, and its settings are the defaults of the other flags."""
    adapter: File | None = None
    """An adapter's folder, to use instead of the run's."""
    benchmark: str | None = None
    """`partiprompts` or `drawbench`, read from the hub or from --prompts. Or `nano`. Or a file of prompts."""
    entries: tuple[str, ...] = ()
    """What to compare: base@1, adapter@1, FOLDER@1 or NAME=FOLDER@1. The number is that of denoising steps; `adapter`
    is the run's. The others are compared with the first."""
    model: str | None = None
    """A pipeline's folder, a hub id, `nano` or `tiny:FAMILY`."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    prompts: File | None = None
    """File of prompts, such as a PartiPrompts.tsv for --benchmark. By default the run's held-out prompts."""
    limit: Steps | None = None
    """Use only so many prompts, from the first."""
    reward: str | None = None
    """Rewards: `a=1.0,my_module:score=0`. By default the run's. For the benchmark `nano`: all judges of that model, and
    the rewards of --run-dir. For any other benchmark: pickscore, clip_text, aesthetic and no_artifacts."""
    seed: Seed | None = None
    """Seed of the latents. By default the run's."""
    repeats: Count | None = None
    """Images of each prompt. By default the run's number, and 1 for a benchmark."""
    out: File | None = None
    """Folder for images and reports. For a benchmark it is evaluations/NAME by default, in the run's folder or here."""
    shard: Annotated[str, AfterValidator(_place)] | None = None
    """K/N: draw part K of N, counted from 0. The last process writes the report. By default torchrun's rank."""
    json: File | None = None
    """Also write report.json to this path."""
    device: str = "auto"
    """cpu, cuda, cuda:1 and so on. auto: a GPU if there is one; under torchrun, the GPU of this process."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the model. auto: the run's; without a run, bfloat16 on a GPU and float32 on a CPU."""
    image: tyro.conf.AvoidSubcommands[ImageSettings | None] = None


@settings()
class RenderConfig:
    """Draw prompts with the base model and the adapter, from the same latents, side by side."""

    prompts: tyro.conf.Positional[tuple[str, ...]] = ()
    """Prompts to draw. By default the first of --prompts-file."""
    prompts_file: File | None = None
    """File of prompts: text with one prompt a line, .tsv, .csv, .jsonl or .json. By default the packaged held-out
    list."""
    limit: Steps = 8
    """Number of prompts to draw from the file."""
    gallery: Switch = False
    """Draw the eight prompts of the published run, as one page. The files are gallery.png and
    gallery.html, instead of single images."""
    run_dir: File | None = None
    """A run's folder. Its adapter is used, and its settings are the defaults of the other flags."""
    adapter: File | None = None
    """An adapter's folder, to use instead of the run's."""
    model: str | None = None
    """A pipeline's folder, a hub id, `nano` or `tiny:FAMILY`."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    out: File | None = None
    """Folder for the images. By default `renders` in the run's folder, or here without a run. Images of an earlier call
    are moved to its subfolder `earlier`."""
    seed: Seed | None = None
    """Seed of the latents. By default the run's."""
    device: str = "auto"
    """cpu, cuda, cuda:1 and so on. auto: a GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the model. auto: the run's; without a run, bfloat16 on a GPU and float32 on a CPU."""
    image: tyro.conf.AvoidSubcommands[ImageSettings | None] = None

    def __post_init__(self):
        if self.gallery and (self.prompts or self.prompts_file):
            raise ConfigError("gallery: expected no prompts beside it, it has its own")
        if self.prompts and self.prompts_file:
            raise ConfigError(
                f"prompts_file: expected no prompts beside it, got {self.prompts[0]!r:.60}; give one of them"
            )


@settings()
class JudgeConfig:
    """Compare two models blindly: a page on this machine shows two images side by side, and you choose the better one.

    The images are those of an evaluation (`esengine eval --out`). For a run's folder they are drawn from its held-out
    prompts first, by the base model and the adapter. The answers are kept at once in judged.jsonl, in the evaluation's
    folder, so you may stop with Ctrl-C and go on later. At the end the win rate and its 95 % interval are printed.

    To train on your own eye, see `esengine train --reward human`.
    """

    folder: tyro.conf.Positional[File] = Path(".")
    """The folder of an evaluation or a run."""
    entries: tuple[str, ...] = ()
    """The two entries to compare, such as base@1 adapter@1. By default the first two of the evaluation."""
    limit: Steps | None = None
    """Compare at most so many pairs."""
    host: str = "127.0.0.1"
    """Address to serve the page on. With 0.0.0.0 a phone in the same network can open it."""
    port: Annotated[Int, Field(ge=0, lt=1 << 16)] = 0
    """Port of the page. 0: any free one."""


@dataclass(frozen=True)
class ReportConfig:
    """Write report.html into the folder of a run or of a finished evaluation. The page needs no network."""

    folder: tyro.conf.Positional[Path] = Path(".")
    """The folder of a run or an evaluation."""


@dataclass(frozen=True)
class EnvConfig:
    """Show versions, devices, and which kernels are used and why."""

    json: bool = False
    """Print JSON."""
