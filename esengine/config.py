"""What a run is: dataclasses, a YAML file below the flags, and the resolved copy that is saved with the run.

Everything here is plain Python, so that `--help` answers before torch is imported.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
import yaml

from esengine.errors import ConfigError
from esengine.prompt_files import read_prompt_file
from esengine.settings_file import from_dict, read_yaml

PACKAGED = Path(__file__).parent / "data"
"""YAML files that `--config NAME` finds by name: `reference` holds the settings of the published run, `nano` those of
the model of that name."""

MOST_RATE = 1e6
"""Learning rate above which float32 is left in a step or two."""

REFERENCE_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "linear_1", "linear_2", "proj_out", "linear")


MOST = 1 << 20
"""Of a count that takes memory; far beyond any use."""
MOST_STEPS = 1 << 31


def _check_counts(config: Any, section: str, **ranges: tuple[int, int]) -> None:
    for name, (least, most) in ranges.items():
        value = getattr(config, name)
        if value is not None and not least <= value <= most:
            bound = f"at least {least}" if value < least else f"at most {most}"
            raise ConfigError(f"{section}{name}: expected {bound}, got {value}")


@dataclass(frozen=True)
class UpdateRule:
    """How the adapter theta moves along g = mean_i(f_i E_i).

    With `sgd`, theta + lr_scale * sigma * g, as in the reference run. Momentum and Adam are torch.optim's, with
    learning rate lr_scale * sigma. Afterwards the step, then the adapter, are scaled down to their norm caps.
    """

    optimizer: Literal["sgd", "momentum", "adam"] = "sgd"
    """sgd is the reference update; momentum and adam are torch.optim's."""
    lr_scale: float = 0.1
    """Learning rate in units of sigma."""
    momentum: float = 0.9
    """Of momentum, and beta1 of adam."""
    beta2: float = 0.999
    """Of adam."""
    max_step_norm: float | None = None
    """Cap on the L2 norm of one step."""
    max_norm: float | None = 40.0
    """Cap on the L2 norm of the adapter."""

    def __post_init__(self):
        if self.optimizer not in ("sgd", "momentum", "adam"):
            raise ConfigError(f"optimizer: expected sgd, momentum or adam, got {self.optimizer}")
        for name in ("lr_scale", "max_step_norm", "max_norm"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name}: expected a positive number, got {value}")
        for name in ("momentum", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected a number in [0, 1), got {getattr(self, name)}")


_LAYER = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
"""A name that is no regular expression, but for its dots."""


def _pairs(words: list[str]) -> dict[str, float]:
    """Layers' names and alphas as they are given on the command line, in turn."""
    if len(words) % 2 or len(set(words[::2])) < len(words) // 2:
        raise ValueError("expected names, each once, and behind each its alpha")
    return {name: float(alpha) for name, alpha in zip(words[::2], words[1::2], strict=True)}


# left to itself tyro makes a flag of each name that is there already, and of no other
_PAIRS = tyro.constructors.PrimitiveConstructorSpec(
    nargs="*",
    metavar="[NAME ALPHA ...]",
    instance_from_str=_pairs,
    is_instance=lambda value: isinstance(value, dict),
    str_from_instance=lambda value: [word for pair in value.items() for word in map(str, pair)],
)


@dataclass(frozen=True)
class LoraSettings:
    """The adapter. Targets are chosen as PEFT does: by the end of a layer's name."""

    rank: int = 2
    """LoRA rank r. 0: none, the weights themselves are perturbed and moved."""
    alpha: float = 8.0
    """The adapter counts alpha / r. Where r is 0 it has no part. Given as a flag without alpha_pattern, it is that of
    all layers."""
    targets: tuple[str, ...] = REFERENCE_TARGETS
    """Linear layers of the transformer."""
    alpha_pattern: Annotated[dict[str, float], _PAIRS] = field(default_factory=dict)
    """Another alpha for some of them, by the end of a layer's name: `linear_2 16 proj_out 2`. No part where r is 0.
    Where to_q, to_k and to_v have unlike ones, blocks do not run fused."""

    def __post_init__(self):
        _check_counts(self, "lora.", rank=(0, 1 << 14))
        alphas = {"alpha": self.alpha} | {f"alpha_pattern: {name}": alpha for name, alpha in self.alpha_pattern.items()}
        for name, alpha in alphas.items():
            if not 0 < alpha <= MOST:
                raise ConfigError(f"lora.{name}: expected a positive number of at most {MOST}, got {alpha}")
        for name in self.alpha_pattern:
            if not _LAYER.fullmatch(name):
                raise ConfigError(f"lora.alpha_pattern: expected the end of a layer's name, got {name!r:.100}")
            if both := [other for other in self.alpha_pattern if other.endswith(f".{name}")]:
                raise ConfigError(
                    f"lora.alpha_pattern: expected one alpha a layer, got one for {name} and for {both[0]}"
                )
        if not self.targets:
            raise ConfigError("lora.targets: expected at least one layer name, got none")


@dataclass(frozen=True)
class ESSettings:
    """The search: how members are drawn and how their scores become fitness."""

    sigma: float = 1e-2
    """Standard deviation of the noise on every element of the adapter, or of the weights where lora.rank is 0."""
    noise_rank: int = 1
    """Rank k of each member's noise."""
    shaping: Literal["zscore", "centered_rank", "none"] = "zscore"
    """After each prompt's mean is removed: z-score, centred ranks, or as it is."""
    prompt_std: Literal["global", "own"] = "global"
    """What a prompt's scores are divided by: the standard deviation of all, as in the reference run, or its own, so
    that no prompt outweighs the others."""
    prompts_per_step: int = 4
    """Prompts drawn each step, without replacement until all have come. Left out, it adapts to a shorter list."""
    repeats: int = 4
    """Images of each prompt for each member, from different latents."""

    def __post_init__(self):
        if not (math.isfinite(self.sigma) and self.sigma > 0):
            raise ConfigError(f"es.sigma: expected a positive number, got {self.sigma}")
        _check_counts(self, "es.", noise_rank=(1, 1 << 14), prompts_per_step=(1, MOST), repeats=(1, MOST))
        if self.shaping not in ("zscore", "centered_rank", "none"):
            raise ConfigError(f"es.shaping: expected zscore, centered_rank or none, got {self.shaping}")
        if self.prompt_std not in ("global", "own"):
            raise ConfigError(f"es.prompt_std: expected global or own, got {self.prompt_std}")


@dataclass(frozen=True)
class ImageSettings:
    """How an image is sampled."""

    height: int | None = None
    """Pixels; the model's own size by default."""
    width: int | None = None
    """Pixels; the model's own size by default."""
    num_steps: int = 1
    """Denoising steps."""
    guidance_scale: float = 4.5
    """Embedded guidance."""
    x0_angle: float | None = None
    """One step only: the trigflow angle at which x0 is taken. The reference run used 1.3; the scheduler's is pi / 2."""
    chunk: int | None = None
    """Images in one transformer forward; chosen by the device's memory by default."""
    decode_chunk: int = 16
    """Images in one decoder call."""
    vae: str | None = None
    """Another decoder of the same latents, such as DC-AE-Lite: a folder or a hub id, perhaps with @revision behind."""
    graphs: Literal["auto", "always", "never"] = "auto"
    """Replay a population's forward from CUDA graphs. auto: on a GPU where the model's blocks run fused."""
    decode: Literal["eager", "compiled", "graphed"] = "eager"
    """The decoder as it stands, through torch.compile, or from a CUDA graph."""
    overlap: bool = False
    """On a GPU, decode a chunk while the next is denoised, for which there must be memory."""
    instruction: bool = True
    """Encode prompts behind the pipeline's own instruction to the text encoder."""

    def __post_init__(self):
        pixels, count = (1, 1 << 14), (1, MOST)
        _check_counts(self, "image.", height=pixels, width=pixels, num_steps=count, chunk=count, decode_chunk=count)
        for name, known in (("graphs", ("auto", "always", "never")), ("decode", ("eager", "compiled", "graphed"))):
            if getattr(self, name) not in known:
                raise ConfigError(f"image.{name}: expected one of {', '.join(known)}, got {getattr(self, name)}")


@dataclass(frozen=True)
class TrainConfig:
    """Post-train a frozen text-to-image model from black-box rewards by Evolution Strategies on a LoRA adapter.

    Without flags this is the demo: sana-sprint-nano, a small trained model that draws coloured shapes, learns to draw
    what captions say, with the settings of the packaged `nano.yaml`.
    """

    run_dir: Path | None = None
    """Folder of the run: config, metrics, checkpoints, adapter, strips. By default runs/<date and time>."""
    model: str = "nano"
    """A SanaSprintPipeline folder; a hub id; `nano`, the small trained model of this package; or `tiny`, an untrained
    one."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    prompts: Path | None = None
    """File of prompts: text with one on each line, .tsv, .csv or .jsonl. By default a packaged list; of `nano`,
    captions of its world."""
    eval_prompts: Path | None = None
    """File of prompts never trained on, to compare base and adapter at the end. By default a packaged list."""
    reward: str | None = None
    """A reward, or several with weights: `a=1.0,my_module:score=0.5`. By default pickscore; for `tiny`
    jpeg_compressibility, for `nano` checker with some pickscore."""
    steps: int = 40
    """ES steps."""
    population: int = 32
    """Members N, an even number: they come in antithetic pairs."""
    seed: int = 0
    """Keys the noise, the latents, the prompts drawn and the adapter's start."""
    resume: bool = False
    """Continue the run in --run-dir from its last checkpoint."""
    allow_change: bool = False
    """With --resume, go on although settings, model or prompts differ from the run's; what differs is told."""
    config: str | None = None
    """YAML file below the flags, or the name of a packaged one: `reference`, the published run's settings; or `nano`.
    For the model `nano` the latter's settings stand below a YAML file of your own too."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU when there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the frozen model. auto: bfloat16 on a GPU, float32 on a CPU. The adapter is float32 always."""
    on_bad_reward: Literal["fail", "drop-pair"] = "fail"
    """Where a reward raises or gives no finite number: stop, or leave the member and its antithetic half out of the
    update. A step with more than a tenth of its images bad stops the run in any case."""
    deterministic: bool = False
    """Draw and score one image at a time: slower, and no bit depends on the size of a chunk."""
    checkpoint_every: int = 5
    """Steps between checkpoints."""
    strip_every: int = 10
    """Steps between strips of the best, median and worst member's images. 0: none."""
    heldout_reward: str = "auto"
    """Rewards that are watched on held-out prompts, besides the optimised one: `pickscore,my_module:score`, or none.
    auto: where pickscore, clip_text, aesthetic, no_artifacts or hpsv2 is optimised, the rest of the first four; on
    `nano` always, with clip-nano, and checker beside them."""
    heldout_every: int = 10
    """Steps between measures of the optimised and the held-out rewards on held-out prompts. 0: none."""
    heldout_prompts: int = 16
    """So many of the --eval-prompts are drawn at each measure, always the same."""
    trackers: tuple[Literal["wandb", "trackio"], ...] = ()
    """Besides TensorBoard; each needs the extra of its name. WANDB_MODE=offline needs no account."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    es: ESSettings = field(default_factory=ESSettings)
    update: UpdateRule = field(default_factory=lambda: UpdateRule(lr_scale=1.0))
    image: ImageSettings = field(default_factory=ImageSettings)

    def __post_init__(self):
        if self.population < 2 or self.population % 2:
            raise ConfigError(f"population: expected an even number of at least 2, got {self.population}")
        some, any_ = (1, MOST_STEPS), (0, MOST_STEPS)
        _check_counts(self, "", steps=some, checkpoint_every=some, strip_every=any_, heldout_every=any_)
        _check_counts(self, "", population=(2, MOST), heldout_prompts=(1, MOST))
        if (images := self.population * self.es.prompts_per_step * self.es.repeats) > 1 << 24:
            raise ConfigError(
                f"population: expected at most 2^24 images a step, got {images} with es.prompts_per_step "
                f"{self.es.prompts_per_step} and es.repeats {self.es.repeats}"
            )
        for name in self.trackers:
            if name not in ("wandb", "trackio") or self.trackers.count(name) > 1:
                raise ConfigError(f"trackers: expected wandb, trackio or both, got {' '.join(self.trackers)}")
        if (rate := self.update.lr_scale * self.es.sigma) > MOST_RATE:
            raise ConfigError(f"update.lr_scale times es.sigma: expected at most {MOST_RATE:g}, got {rate:g}")
        if not 0 <= self.seed < 1 << 64:
            raise ConfigError(f"seed: expected an integer in [0, 2^64), got {self.seed}")


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
        _check_counts(self, "", repeats=(1, MOST), limit=(1, MOST_STEPS))
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
        _check_counts(self, "", limit=(1, MOST_STEPS))
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
class ReplayConfig:
    """Make a run's adapter again from its config.yaml and fitness.jsonl alone, and say whether it is the run's.

    Nothing is rendered or scored. On the same kind of device with the same versions every bit is the same.
    """

    run_dir: tyro.conf.Positional[Path]
    """A run's folder."""
    out: Path | None = None
    """Folder to write the adapter to."""
    model: str | None = None
    """A SanaSprintPipeline folder, a hub id, `nano` or `tiny`, where the run's is not there any more."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: the run's."""


@dataclass(frozen=True)
class EnvConfig:
    """Versions, devices, and which kernels are in use and why."""

    json: bool = False
    """As JSON."""


MAY_CHANGE = (
    *("run_dir", "resume", "allow_change", "config", "steps", "on_bad_reward"),
    *("checkpoint_every", "strip_every", "trackers", "heldout_reward", "heldout_every", "heldout_prompts"),
    *("model", "revision", "prompts", "eval_prompts"),  # names; what `model` and `prompts` hold is compared by hash
)
"""Settings that a resumed run may be given anew: none of them has a say in the adapter of a given step."""


def parse_train(args: list[str]) -> TrainConfig:
    """Defaults, for the model `nano` its packaged ones; then the YAML of --config (with --resume, the run's own); then
    the flags.

    Raises:
        ConfigError: a file that cannot be read, an unknown or ill-typed setting, or a value out of range.
    """
    source, run = _below(args)
    data = {} if source is None else _settings(source)
    if not run and data.get("config") is not None:
        raise ConfigError(f"config {source}: config: expected no other file below this one, got {data['config']!r:.60}")
    default = TrainConfig()
    packaged = source is not None and source.parent == PACKAGED
    if not run and not packaged and (_peek(args, "model") or data.get("model", "nano")) == "nano":
        default = load("nano")
        if isinstance(lora := data.get("lora"), dict) and "alpha" in lora:  # that of all layers, as the flag is
            data = data | {"lora": {"alpha_pattern": {}} | lora}
    if source is not None:
        default = _over(default, data, source)
    if _peek(args, "lora.alpha") and not any(arg.startswith(("--lora.alpha-p", "--lora.alpha_p")) for arg in args):
        default = dataclasses.replace(default, lora=dataclasses.replace(default.lora, alpha_pattern={}))
    config = tyro.cli(TrainConfig, args=args, default=default, prog="esengine train")
    chosen = _peek(args, "es.prompts-per-step") or (data.get("es") or {}).get("prompts_per_step")
    if config.prompts is not None and (chosen is None or source == PACKAGED / "nano.yaml"):
        with contextlib.suppress(ConfigError):  # the run itself tells what is wrong with the file
            count = len(read_prompt_file(config.prompts)["prompt"])
            per_step = min(count, config.es.prompts_per_step)
            config = dataclasses.replace(config, es=dataclasses.replace(config.es, prompts_per_step=per_step))
    return config


def _below(args: list[str]) -> tuple[Path | None, bool]:
    """The YAML file that lies below the flags, and whether it is that of a run."""
    config, run_dir = _peek(args, "config"), _peek(args, "run-dir")
    if config is not None:
        return _file(config), False
    saved = Path(run_dir or ".") / "config.yaml"
    return (saved, True) if run_dir and _switched_on(args, "resume") and saved.is_file() else (None, False)


def parse(cls: type, args: list[str], prog: str) -> Any:
    """A dataclass from its flags; image settings start from those of the run in --run-dir."""
    default = cls()
    if hasattr(default, "image"):
        run_dir = _peek(args, "run-dir")
        default = dataclasses.replace(default, image=load_run(Path(run_dir)).image if run_dir else ImageSettings())
    return tyro.cli(cls, args=args, default=default, prog=prog)


def load_run(run_dir: Path) -> TrainConfig:
    """The resolved settings that a run folder was made with."""
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(f"run folder {run_dir}: expected a run's config.yaml in it, there is none")
    return load(run_dir / "config.yaml")


def load(source: str | Path) -> TrainConfig:
    """Read a run's settings from a YAML file, or from a packaged one by its bare name."""
    path = _file(source)
    return _over(TrainConfig(), _settings(path), path)


def _file(source: str | Path) -> Path:
    path, packaged = Path(source), PACKAGED / f"{source}.yaml"
    return packaged if not path.is_file() and packaged.is_file() else path


def _settings(path: Path) -> dict[str, Any]:
    data = read_yaml(path)
    if data is not None and not isinstance(data, dict):
        raise ConfigError(f"config {path}: expected a mapping of settings, got {type(data).__name__}")
    return data or {}


def _over(base: TrainConfig, data: dict[str, Any], path: Path) -> TrainConfig:
    try:
        return from_dict(base, data, str(path))
    except ConfigError as error:
        if str(error).startswith("config "):
            raise
        raise ConfigError(f"config {path}: {error}") from error


def to_dict(config: Any) -> dict[str, Any]:
    """The dataclass as plain YAML values."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))


def to_yaml(config: Any) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def differences(saved: dict[str, Any], now: dict[str, Any], free: Collection[str] = MAY_CHANGE) -> list[str]:
    """Settings that differ between two resolved configurations, as `es.sigma: 0.01 -> 0.02`; those in `free` may."""

    def flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        out = {}
        for name, value in data.items():
            out |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
        return out

    old, new = flat(saved), flat(now)
    return [
        f"{name}: {old.get(name)} -> {new.get(name)}"
        for name in dict.fromkeys([*old, *new])
        if name not in free and old.get(name) != new.get(name)
    ]


def _peek(args: list[str], flag: str) -> str | None:
    """The value of a flag, in either spelling. Given twice, the last one counts, as in the parser itself."""
    found = None
    for i, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if name.replace("_", "-") == f"--{flag}":
            found = value if equals else args[i + 1] if i + 1 < len(args) else None
    return found


def _switched_on(args: list[str], flag: str) -> bool:
    """Whether a flag without a value is on: `--flag` or `--no-flag`, whichever comes last."""
    given = [arg for arg in (each.replace("_", "-") for each in args) if arg in (f"--{flag}", f"--no-{flag}")]
    return given[-1:] == [f"--{flag}"]


def as_typed(message: str, args: list[str]) -> str:
    """An error that begins with a setting's name, with what the user typed in its place.

    That is the flag as it was typed; else the file below the flags that has the setting; else the flag as `--help`
    spells it. Other messages stay as they are.
    """
    head, colon, rest = message.partition(":")
    flags = {flag.removeprefix("--").replace("-", "_"): flag for flag in _flags()}
    names = head.split(" times ")
    found = [_one(name, flags) for name in names]
    if not colon or None in found:
        return message
    typed = {arg.partition("=")[0].replace("_", "-"): arg.partition("=")[0] for arg in args if arg.startswith("--")}
    said = [typed[flag] for name, flag in flags.items() if "." in name and name in rest and flag in typed]
    if said and not any(flags[name] in typed for name in found):  # the setting is at odds with one that was typed
        return f"{said[0]}: {message}"
    if not any(flags[name] in typed for name in found) and (file := _holder(found[0], args)):
        return f"{file}: {message}"
    some = any(flags[name] in typed for name in found)
    spelt = [typed.get(flags[name], name if some else flags[name]) for name in found]
    return f"{' times '.join(sorted(spelt, key=lambda each: not each.startswith('--')))}:{rest}"


def _one(name: str, flags: Collection[str]) -> str | None:
    """The setting of that name, or the only one whose name ends with it."""
    found = [each for each in flags if each == name] or [each for each in flags if each.endswith(f".{name}")]
    return found[0] if len(found) == 1 else None


def _holder(name: str, args: list[str]) -> str | None:
    """The file below the flags that has a setting, as an error begins with it."""
    source, run = _below(args)
    run_dir = _peek(args, "run-dir")
    if source is None and run_dir and args[:1] != ["train"]:
        source, run = Path(run_dir) / "config.yaml", True
    data = None
    with contextlib.suppress(ConfigError):
        data = source and _settings(source)
    section, _, key = name.rpartition(".")
    data = (data or {}).get(section) if section else data
    if not isinstance(data, dict) or data.get(key) is None:
        return None
    return f"run folder {run_dir}" if run else f"config {source}"


def _flags() -> list[str]:
    """Every flag of every command, as `--help` spells it."""
    found: dict[str, None] = {}
    for config in (TrainConfig(), EvalConfig(), RenderConfig()):
        for each in dataclasses.fields(config):
            value = getattr(config, each.name)
            below = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
            names = [f"{each.name}.{inner.name}" for inner in below] or [each.name]
            found |= dict.fromkeys(f"--{name.replace('_', '-')}" for name in names)
    return list(found)
