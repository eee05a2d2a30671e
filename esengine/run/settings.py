"""What a run is: dataclasses, the YAML file below the flags, and the resolved copy that is saved with the run.

Everything here is plain Python, so that `--help` answers before torch is imported.
"""

import dataclasses
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
import yaml
from pydantic import AfterValidator, Field

from esengine.base.errors import ConfigError, RunError
from esengine.base.files import DATA
from esengine.base.settings import (
    MAX_COUNT,
    Count,
    Decay,
    File,
    Int,
    Interval,
    Positive,
    Rank,
    Seed,
    Steps,
    Switch,
    settings,
)
from esengine.base.settings_file import from_dict, read_yaml
from esengine.es.rule import UpdateRule
from esengine.models.defaults import DEMO, SETTINGS
from esengine.run import journal
from esengine.sampling.settings import ImageSettings

MAX_RATE = 1e6
"""Largest learning rate. Above it float32 overflows within a step or two."""

_LAYER = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
"""A layer's name: no regular expression, apart from its dots."""


def _layer(name: str) -> str:
    if not _LAYER.fullmatch(name):
        raise ValueError("the end of a layer's name")
    return name


def _one_alpha(pattern: dict[str, float]) -> dict[str, float]:
    for name in pattern:
        if both := [other for other in pattern if other.endswith(f".{name}")]:
            raise ValueError(f"one alpha a layer, not one for {name} and one for {both[0]}")
    return pattern


def _even(count: int) -> int:
    if count < 2 or count % 2:
        raise ValueError("an even number of at least 2")
    return count


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise ValueError("each tracker once")
    return names


Alpha = Annotated[Positive, Field(le=MAX_COUNT)]


def _pairs(words: list[str]) -> dict[str, float]:
    """Names and alphas in turn, as on the command line."""
    if len(words) % 2 or len(set(words[::2])) < len(words) // 2:
        raise ValueError("expected NAME ALPHA pairs, each name once")
    return {name: float(alpha) for name, alpha in zip(words[::2], words[1::2], strict=True)}


# by itself tyro would make one flag of each name in the default, and accept no other name
_PAIRS = tyro.constructors.PrimitiveConstructorSpec(
    nargs="*",
    metavar="[NAME ALPHA ...]",
    instance_from_str=_pairs,
    is_instance=lambda value: isinstance(value, dict),
    str_from_instance=lambda value: [word for pair in value.items() for word in map(str, pair)],
)


@settings("lora")
class LoraSettings:
    """The adapter. Targets are chosen as PEFT does: by the end of a layer's name."""

    rank: Annotated[Int, Field(ge=0, le=1 << 14)] = 2
    """LoRA rank r. With 0 there is no LoRA: noise and updates go to the weights themselves."""
    alpha: Alpha = 8.0
    """LoRA alpha: the adapter is scaled by alpha / r. Ignored if the rank is 0. Given as a flag without alpha_pattern,
    it holds for all layers."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Linear layers of the denoiser. By default those of the model's family."""
    alpha_pattern: Annotated[
        dict[Annotated[str, AfterValidator(_layer)], Alpha], _PAIRS, AfterValidator(_one_alpha)
    ] = field(default_factory=dict)
    """Another alpha for some layers, by the end of a layer's name: `linear_2 16 proj_out 2`. Ignored if the rank is 0.
    Blocks cannot run fused if to_q, to_k and to_v have different alphas."""


@settings("es")
class ESSettings:
    """How members are drawn, and how their scores become fitness."""

    sigma: Positive = 1e-2
    """Standard deviation of the noise on each element of the adapter, or of the weights if lora.rank is 0."""
    noise_rank: Rank = 1
    """Rank k of each member's noise."""
    shaping: Literal["zscore", "centered_rank", "none"] = "zscore"
    """How scores become fitness. Each prompt's mean is removed first. Then: z-score, centred ranks, or no change."""
    prompt_std: Literal["global", "own"] = "global"
    """The standard deviation that divides a prompt's scores. global: that of all scores, as in the reference run. own:
    that of this prompt, so that no prompt outweighs the others."""
    prompts_per_step: Count = 4
    """Prompts drawn each step. No prompt is drawn again before all have been. The default adapts to a shorter list."""
    repeats: Count = 4
    """Images of each prompt for each member. Each comes from another latent."""


@settings()
class TrainConfig:
    """Post-train a frozen text-to-image model from black-box rewards by Evolution Strategies on a LoRA.

    Without flags this is the demo: sana-sprint-nano, a small trained model that draws coloured shapes, learns to draw
    what captions say, with the settings of the packaged `nano.yaml`.
    """

    run_dir: File | None = None
    """Folder of the run: journal, checkpoints, adapter, pictures. By default `runs/DATE_TIME`."""
    model: str = DEMO
    """A pipeline's folder, a hub id, or `nano`. Families are in models/README.md. `nano` is the small trained model of
    this package. `tiny:FAMILY` is an untrained model for tests; `tiny` is a SANA-Sprint."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    prompts: File | None = None
    """File of prompts to train on. It is text with one prompt a line, or .tsv, .csv, .jsonl or .json. By default a
    packaged list; for `nano`, a list of captions."""
    eval_prompts: File | None = None
    """File of prompts that are never trained on. Base and adapter are compared on them. By default a packaged list."""
    reward: str | None = None
    """A reward, or several with weights: `a=1.0,my_module:score=0.5`. By default pickscore. For `tiny`
    jpeg_compressibility; for `nano` checker and, with a small weight, pickscore."""
    steps: Steps = 40
    """ES steps."""
    population: Annotated[Int, AfterValidator(_even), Field(le=MAX_COUNT)] = 32
    """Number of members N. It is even, because members come in antithetic pairs."""
    init_adapter: File | None = None
    """Start from this LoRA: a folder that PEFT or a diffusers pipeline saved. Its layers must be --lora.targets.
    Its rank must be at most --lora.rank. By default the run starts from a LoRA that changes nothing."""
    seed: Seed = 0
    """Seed of noise, latents, the order of prompts and initial weights."""
    resume: Switch = False
    """Continue the run in --run-dir from its last checkpoint."""
    allow_change: Switch = False
    """With --resume, continue even if settings, model or prompts differ from the run's. The differences are printed."""
    dry_run: Switch = False
    """Print what the run would take and write, and stop. To estimate time and memory, everything is loaded, and a few
    images are rendered and scored. Only the text cache is written."""
    config: str | None = None
    """YAML file of settings, or `reference` or `nano`. Flags override it. `reference` is the published run, `nano` the
    demo. For the model `nano`, your own YAML file overrides the packaged one."""
    device: str = "auto"
    """cpu, cuda, cuda:1 and so on. auto: a GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the frozen model. auto: bfloat16 on a GPU, float32 on a CPU. The adapter is always float32."""
    on_bad_reward: Literal["fail", "drop-pair"] = "fail"
    """What to do if a reward raises or returns no finite number. fail: stop. drop-pair: leave the member and its
    antithetic partner out of the update. The run stops anyway if more than a tenth of a step's images are bad."""
    deterministic: Switch = False
    """Draw and score one image at a time. This is slower. The result then does not depend on the chunk size."""
    checkpoint_every: Steps = 5
    """Steps between checkpoints."""
    strip_every: Interval = 10
    """Steps between pictures of the best, median and worst member's images. 0: none."""
    heldout_reward: str = "auto"
    """Rewards to measure on held-out prompts, besides the optimised ones. Such as `pickscore,my_module:score`; or none.
    auto: if you optimise pickscore, clip_text, aesthetic, no_artifacts or hpsv2, those of the first four that you do
    not optimise. For `nano`: always, with clip-nano, and checker."""
    heldout_every: Interval = 10
    """Steps between measurements on held-out prompts. 0: none."""
    heldout_prompts: Count = 16
    """Number of --eval-prompts in each measurement. They are always the same ones."""
    heldout_action: Literal["warn", "stop", "rollback"] = "warn"
    """What to do at the first measurement at which the rewards diverge. warn: go on. stop: end the run. rollback: end
    it, with the adapter of the last measurement at which they did not."""
    keep: Literal["last", "best"] = "last"
    """best: also keep the adapter with the highest mean of a score on the held-out prompts, in adapter-best/."""
    keep_by: str | None = None
    """The score that chooses the best adapter. By default the first held-out reward."""
    ema: Decay = 0.0
    """Decay of an exponential moving average of the adapter over the steps, such as 0.9. It is written to adapter-ema/.
    0: none."""
    trackers: Annotated[tuple[Literal["wandb", "trackio"], ...], AfterValidator(_distinct)] = ()
    """Trackers besides TensorBoard. Each needs its pip extra: pip install 'eggroll-esengine[wandb]'.
    WANDB_MODE=offline needs no account."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    es: ESSettings = field(default_factory=ESSettings)
    update: UpdateRule = field(default_factory=lambda: UpdateRule(lr_scale=1.0))
    image: ImageSettings = field(default_factory=ImageSettings)

    def __post_init__(self):
        for name, default in (("heldout_action", "warn"), ("keep", "last")):
            if getattr(self, name) != default and not self.heldout_every:
                problem = f"{name}: {getattr(self, name)} needs held-out scores, but heldout_every is 0"
                raise ConfigError(problem, setting=name, others=("heldout_every",))
        if self.keep_by is not None and self.keep != "best":
            problem = f"expected it only with keep best, got {self.keep_by} with keep {self.keep}"
            raise ConfigError(problem, setting="keep_by", others=("keep",))
        prompts, repeats = self.es.prompts_per_step, self.es.repeats
        if (images := self.population * prompts * repeats) > 1 << 24:
            raise ConfigError(
                f"expected at most 2^24 images a step, got {images} from a population of {self.population}, "
                f"es.prompts_per_step {prompts} and es.repeats {repeats}",
                setting="population",
                others=("es.prompts_per_step", "es.repeats"),
            )
        if (rate := self.update.lr_scale * self.es.sigma) > MAX_RATE:
            raise ConfigError(
                f"expected a learning rate (update.lr_scale times es.sigma) of at most {MAX_RATE:g}, got {rate:g}",
                setting="update.lr_scale",
                others=("es.sigma",),
            )


@dataclass(frozen=True)
class ReplayConfig:
    """Rebuild a run's adapter from its journal, and compare it with the saved one.

    No image is rendered or scored. On the same kind of device, with the same versions, the result is bit-identical.
    """

    run_dir: tyro.conf.Positional[Path]
    """A run's folder."""
    out: Path | None = None
    """Folder to write the adapter to."""
    model: str | None = None
    """The model, if it is not where the run had it. A pipeline's folder, a hub id, `nano` or `tiny:FAMILY`."""
    device: str = "auto"
    """cpu, cuda, cuda:1 and so on. auto: the run's."""


MAY_CHANGE = (
    *("run_dir", "resume", "allow_change", "dry_run", "config", "steps", "on_bad_reward"),
    *("checkpoint_every", "strip_every", "trackers", "heldout_reward", "heldout_every", "heldout_prompts"),
    *("heldout_action", "keep", "keep_by"),
    *("model", "revision", "prompts", "eval_prompts"),  # names; what `model` and `prompts` hold is compared by hash
)
"""Settings that may change on resume. None affects the adapter of a given step."""

MAY_CHANGE_BELOW = ("image.reward_vae_check",)
"""Settings of a section that may change on resume too."""


def load_run(run_dir: Path) -> TrainConfig:
    """The resolved settings that a run last started with.

    Raises:
        ConfigError: the folder holds no run.
        RunError: its journal is damaged.
    """
    path = run_dir / journal.NAME
    if not path.is_file():
        raise ConfigError(f"run folder {run_dir}: expected a run's {journal.NAME} in it, there is none")
    return started(journal.read(path))


def started(run: journal.Journal) -> TrainConfig:
    """The settings of a journal's last start."""
    return from_dict(TrainConfig(), run.start.settings, f"{run.path}: settings")


def require_settings(settings: dict[str, Any], where: str) -> None:
    """Raise RunError if a run's recorded settings lack one that determines the adapter, or have one that is not usable.

    The message begins with `where`.
    """
    default = to_dict(TrainConfig())
    for name in journal.IN_THE_UPDATE:
        section = default[name] if isinstance(default[name], dict) else {}
        inner = [each for each in section if each not in journal.NEWER]
        value = settings.get(name)
        given = name in settings or name == "init_adapter"  # runs of earlier versions have none
        missing = [name] if not given else [each for each in inner if each not in (value or {})]
        if missing:
            what = f"{name}.{missing[0]}" if inner and missing[0] != name else name
            raise RunError(f"{where}: expected a value of {what}, there is none")
    try:
        from_dict(TrainConfig(), settings, where)
    except ConfigError as error:
        raise RunError(str(error)) from error


def load(source: str | Path) -> TrainConfig:
    """Read a run's settings from a YAML file, or from a packaged one by its bare name."""
    path = config_file(source)
    return from_dict(TrainConfig(), read_settings(path), str(path))


def config_file(source: str | Path) -> Path:
    path, packaged = Path(source), SETTINGS.get(str(source), DATA / f"{source}.yaml")
    return packaged if not path.is_file() and packaged.is_file() else path


def read_settings(path: Path) -> dict[str, Any]:
    data = read_yaml(path)
    if data is not None and not isinstance(data, dict):
        problem = f"expected a mapping of settings, got {type(data).__name__}"
        raise ConfigError(problem, setting="", source=f"config {path}")
    return data or {}


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
