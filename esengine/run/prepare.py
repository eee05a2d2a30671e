"""Prepares a run for its first step: reads and checks the inputs, loads the model, restores the last checkpoint."""

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig

from esengine.base.errors import ConfigError, RunError, of_setting
from esengine.base.files import read_regular
from esengine.base.group import Group
from esengine.base.progress import Progress
from esengine.base.prompt_files import Metadata, metadata_sha256, read_with_metadata
from esengine.es.base_layers import kind_of
from esengine.es.direct import Direct
from esengine.es.engine import Engine
from esengine.es.population import Noise, Population, attach
from esengine.es.prompts import PromptSampler
from esengine.kernels import CONTRACT
from esengine.models import Generator, RenderSettings, TextEmbeddings, require_pipeline
from esengine.models.defaults import defaults
from esengine.rewards.roles import AUTO, NONE, Rewards, load_rewards, read_terms
from esengine.rewards.spec import OPTIMISED, Term
from esengine.rewards.trial import Trial
from esengine.run import journal
from esengine.run import state as run_state
from esengine.run.checkpoint import Checkpoint, set_aside
from esengine.run.folder import RunFolder
from esengine.run.journal import Journal, Saved, Start
from esengine.run.kept import Kept
from esengine.run.settings import (
    MAY_CHANGE,
    TrainConfig,
    differences,
    load,
    require_settings,
    started,
    to_dict,
    to_yaml,
)
from esengine.run.trackers import require_installed
from esengine.sampling.build import (
    encode,
    is_folder,
    load_model,
    pick_dtype,
    render_settings,
    resolved,
    settled,
    size_before_loading,
)
from esengine.sampling.device import pick_device, take_device
from esengine.sampling.environment import describe
from esengine.sampling.rollout import Renderer

RUNS = Path("runs")
"""The folder of runs without a `run_dir`."""

OF_A_PROCESS = tuple(name for name in MAY_CHANGE if name not in ("steps", "checkpoint_every", "on_bad_reward"))
"""Settings that may differ between the processes of a run: names, and settings that only the leading process uses."""


LISTS = {"prompts": "prompts", "held-out prompts": "eval_prompts"}
"""The lists of prompts of a run in messages, and their names in `Inputs`."""


@dataclass(frozen=True)
class Inputs:
    """Inputs that are read and checked before the run folder is made.

    Attributes:
        config: the settings, with the optimised reward filled in. On resume, settings left open are those of the run.
        terms: the rewards, not loaded. `heldout_reward auto` is resolved.
        prompts: prompts to train on.
        eval_prompts: prompts that are never trained on.
        metadata, eval_metadata: the columns of each of them.
        size: height and width of an image.
        sampler: draws the prompts of a step.
        run_dir: the run's folder; None: a new one below `RUNS`.
    """

    config: TrainConfig
    terms: list[Term]
    prompts: list[str]
    eval_prompts: list[str]
    sampler: PromptSampler
    run_dir: Path | None
    metadata: tuple[Metadata, ...]
    eval_metadata: tuple[Metadata, ...]
    size: tuple[int, int]


@dataclass(frozen=True)
class Prepared:
    """A run that is ready for its next step.

    Attributes:
        config: the settings, with a value for each of them.
        model, engine, rewards: loaded. The engine is at the step from which the run continues.
        kept: copies of the adapter that the run keeps, those of the checkpoint it resumes from.
        settings: how an image is rendered.
        start: the next start in the run's journal.
        before: the journal up to the checkpoint from which the run resumes; None for a new run.
        limits: images in one forward, and images scored together, that fit into memory. None: no limit.
        texts, held_out: embeddings of the prompts to train on and of the held-out prompts.
        metadata, held_out_metadata: the columns of each of them.
    """

    config: TrainConfig
    model: Generator
    engine: Engine
    rewards: Rewards
    kept: Kept
    settings: RenderSettings
    start: Start
    before: Journal | None
    limits: tuple[int | None, int | None]
    texts: TextEmbeddings
    held_out: TextEmbeddings
    metadata: tuple[Metadata, ...]
    held_out_metadata: tuple[Metadata, ...]

    def renderer(self, texts: TextEmbeddings, progress: Progress) -> Renderer:
        """A renderer of `texts` or `held_out` with this run's settings and the batch limit of its last checkpoint."""
        keys = dict(seed=self.config.seed, chunk=self.config.image.chunk, limit=self.limits[0], note=progress.note)
        metadata = self.held_out_metadata if texts is self.held_out else self.metadata
        keys |= dict(metadata=metadata if any(metadata) else None, reward_vae=self.config.image.reward_vae is not None)
        return Renderer(self.model, texts, self.settings, **keys)


def read_inputs(config: TrainConfig, group: Group) -> Inputs:
    """Read the prompts, and check the other settings.

    Raises:
        ConfigError: a setting or file cannot be used.
    """
    of_model = defaults(config.model)
    with of_setting("prompts"):
        prompts, metadata = read_with_metadata(config.prompts or of_model.train)
    with of_setting("eval_prompts"):
        eval_prompts, eval_metadata = read_with_metadata(config.eval_prompts or of_model.heldout)
    config = dataclasses.replace(config, reward=config.reward or of_model.reward)
    sampler = _sampler(config, len(prompts), config.prompts or of_model.train)
    render_settings(config.image)
    if config.init_adapter is not None and not config.resume and not config.init_adapter.exists():
        raise ConfigError(f"expected a folder, {config.init_adapter} does not exist", setting="init_adapter")
    if config.resume and config.run_dir is not None and (config.run_dir / journal.NAME).is_file():
        config = _as_before(config, started(journal.read(config.run_dir / journal.NAME, needed=0)))
    own_prompts = bool(config.prompts or config.eval_prompts)
    terms = read_terms(config.reward, config.heldout_reward, of_model, own_prompts=own_prompts)
    if not (config.heldout_every or of_model.watches):
        terms = [term for term in terms if term.role == OPTIMISED]
    pick_device(config.device)
    with group.first():
        decoders = dict(vae=config.image.vae, reward_vae=config.image.reward_vae)
        family = require_pipeline(config.model, config.revision, **decoders)
    lora = dataclasses.replace(config.lora, targets=config.lora.targets or family.targets)
    config = dataclasses.replace(config, image=resolved(config.image, family), lora=lora)
    size = size_before_loading(config.image, config.model, config.revision, family)
    require_installed(config.trackers)
    if config.resume and config.dry_run:
        raise ConfigError("dry_run: expected a new run, got --resume: a resumed run needs no estimate")
    if config.resume and config.run_dir is None:
        raise ConfigError("expected --run-dir with it, the folder of the run to resume", setting="resume")
    return Inputs(config, terms, prompts, eval_prompts, sampler, config.run_dir, metadata, eval_metadata, size)


def _sampler(config: TrainConfig, count: int, file: Path) -> PromptSampler:
    try:
        return PromptSampler(count, config.es.prompts_per_step, config.seed)
    except ConfigError as error:
        raise ConfigError(f"{error.problem}; the prompts are those of {file}", setting=error.setting) from error


def prepare(inputs: Inputs, folder: RunFolder, progress: Progress, group: Group) -> Prepared:
    """Load the model, the rewards and the text embeddings; with `resume` also the last checkpoint.

    Raises:
        ConfigError: a model, reward or layer cannot be used.
        RunError: the folder has nothing to resume, or holds a different run.
    """
    config = inputs.config
    saved, before = _saved(folder) if config.resume else (None, None)
    if before is not None:
        with contextlib.suppress(OSError, ValueError):
            if group.is_main and read_regular(folder.config).decode("utf-8") != to_yaml(started(before)):
                progress.note(f"warning: {folder.config} is a copy, changes in it have no effect: use flags")
    device = take_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    rewards, config = _rewards(inputs, config, str(device), progress, group)
    progress.note(f"model {config.model} on {device} in {str(dtype).removeprefix('torch.')}")
    with group.first():
        image = config.image
        model = load_model(config.model, config.revision, device, dtype, image.vae, image.reward_vae)
    config = dataclasses.replace(config, image=resolved(config.image, model))
    allowed, config = config.allow_change, _resolved(config, model)
    settings = render_settings(config.image)
    start = Start(
        saved.step if saved else 0,
        to_dict(config),
        {
            "prompts_sha256": hashlib.sha256("\n".join(inputs.prompts).encode()).hexdigest(),
            "metadata_sha256": metadata_sha256(inputs.prompts, inputs.metadata),
            "model": _identity(model, config),
            "rewards": rewards.identity(rewards.optimised),
            "contract": CONTRACT,
            "environment": describe(),
        },
    )
    _require_alike(group, start)
    if before is not None and group.is_main:
        _check_same_run(folder, before.start, start, allowed, progress)
    population = start_population(model, config) if saved is None else attach_population(model, config)
    engine = _engine(inputs.sampler, population, model, config, settings, progress, group)
    limits = (None, None)
    if saved is not None:
        _go_on(engine, saved, config, folder, progress)
        if changed := differences(before.start.identity["environment"], describe()):
            progress.note(f"warning: bits may differ from before, {'; '.join(changed)}")
        limits = tuple(saved.meta.get(name) for name in run_state.LIMITS)
        rewards.optimised.limit = limits[1]
        if group.is_main:
            set_aside(folder.held.checkpoints / path.name for path, _ in saved.skipped)
    texts, held_out = _encoded(inputs, model, config, progress, group)
    before = before and before.cut(saved.step)
    kept = Kept(population, decay=config.ema, saved=saved, by=_keep_by(config, rewards))
    of_prompts = texts, held_out, inputs.metadata, inputs.eval_metadata
    return Prepared(config, model, engine, rewards, kept, settings, start, before, limits, *of_prompts)


def _identity(model: Generator, config: TrainConfig) -> str:
    """What identifies the weights that affect the adapter: the model's, and those of the reward's decoder."""
    own = model.identity()
    return own if config.image.reward_vae is None else f"{own} reward vae {model.reward_vae_identity}"


def _saved(folder: RunFolder) -> tuple[Checkpoint, Journal]:
    """The checkpoint that a run resumes from, and its journal.

    Raises:
        RunError: there is no checkpoint, the journal is damaged or lacks a step, or the two are of different runs.
    """
    saved = run_state.latest(folder.checkpoints)
    found = journal.read(folder.journal, needed=saved.step)
    cut = found.cut(saved.step)
    for number, start in enumerate(cut.of(Start), start=1):  # replay needs each of them
        require_settings(start.settings, f"{found.path}: settings of start {number}")
    expected = {each.adapter_sha256 for each in cut.of(Saved) if each.step == saved.step}
    same = cut.digest == saved.meta["steps_sha256"] and expected <= {saved.meta["adapter_sha256"]}
    made_with = saved.meta.get("made_with_sha256")  # checkpoints of earlier versions have none
    if not same or (made_with is not None and cut.made_with(saved.step) != made_with):
        raise RunError(
            f"checkpoint {saved.path}: expected one of this run, it does not match the settings or steps in "
            f"{found.path}: restore the file or the folder, or choose another --run-dir"
        )
    return saved, found


def _rewards(
    inputs: Inputs, config: TrainConfig, device: str, progress: Progress, group: Group
) -> tuple[Rewards, TrainConfig]:
    """The run's rewards, and its settings with `heldout_reward auto` replaced by the rewards that it selected."""
    tolerant = config.on_bad_reward == "drop-pair"
    lists = [(inputs.prompts, inputs.metadata, "prompts"), (inputs.eval_prompts, inputs.eval_metadata, "eval_prompts")]
    trials = [
        Trial(inputs.size, prompts, columns, tolerant=tolerant, note=progress.note, setting=name)
        for prompts, columns, name in lists
        if name == "prompts" or any(inputs.metadata) or any(columns)
    ]
    rewards = load_rewards(
        inputs.terms, device=device, note=progress.note, trial=lambda term: [trial(term) for trial in trials]
    )
    if rewards.person and group.size > 1:
        raise ConfigError(f"human needs one process, got {group.size}", setting="reward")
    with of_setting("prompts"):
        rewards.everything.check_prompts(inputs.prompts, inputs.metadata)
    with of_setting("eval_prompts"):
        rewards.everything.check_prompts(inputs.eval_prompts, inputs.eval_metadata)
    for name, prompts in LISTS.items():
        for cut in rewards.everything.cut_prompts(getattr(inputs, prompts)):
            progress.note(f"warning: {cut.text(name)}")
    if config.heldout_every and config.heldout_reward == AUTO:
        watched = ",".join(term.text() for term in rewards.watched) or NONE
        config = dataclasses.replace(config, heldout_reward=watched)
    _keep_by(config, rewards)  # before the model is loaded
    return rewards, config


def _keep_by(config: TrainConfig, rewards: Rewards) -> str | None:
    """The score that chooses the best adapter; None if it is not kept.

    Raises:
        ConfigError: the run has no such score, or `heldout_action` has no held-out reward to act on.
    """
    if config.heldout_action != "warn" and rewards.person:
        problem = f"{config.heldout_action} cannot act on a person, whose choices give no held-out score"
        raise ConfigError(problem, setting="heldout_action", others=("reward",))
    if config.heldout_action != "warn" and not rewards.held_out:
        problem = f"{config.heldout_action} needs a held-out reward, the run has none: set heldout_reward"
        raise ConfigError(problem, setting="heldout_action", others=("heldout_reward",))
    if config.keep != "best":
        return None
    held_out = rewards.held_out or ([rewards.objective] if rewards.person else [])
    if config.keep_by is None and not held_out:
        problem = "best needs a held-out reward, the run has none: set heldout_reward, or name a score with keep_by"
        raise ConfigError(problem, setting="keep", others=("heldout_reward", "keep_by"))
    known, by = [*held_out, rewards.objective, *rewards.everything.names], config.keep_by
    if by is not None and by not in known:
        raise ConfigError(f"expected one of {', '.join(dict.fromkeys(known))}, got {by}", setting="keep_by")
    return by or known[0]


def _engine(
    sampler: PromptSampler,
    population: Population,
    model: Generator,
    config: TrainConfig,
    settings: RenderSettings,
    progress: Progress,
    group: Group,
) -> Engine:
    for name in config.lora.alpha_pattern:
        if not any(f".{layer}".endswith(f".{name}") for layer in population.layers):
            progress.note(f"lora.alpha_pattern: {name} matches no target; ignored")
    plan = model.plan(population, settings)
    together = f", {group.size} processes" if group.size > 1 else ""
    progress.note(f"population of {config.population}, kernels: {population.backend}, {plan}{together}")
    return Engine(
        population,
        sampler,
        size=config.population,
        repeats=config.es.repeats,
        shaping=config.es.shaping,
        prompt_std=config.es.prompt_std,
        drop_pairs=config.on_bad_reward == "drop-pair",
    )


def _encoded(
    inputs: Inputs, model: Generator, config: TrainConfig, progress: Progress, group: Group
) -> list[TextEmbeddings]:
    """Embeddings of the prompts to train on and of the held-out prompts."""
    per_step = config.es.prompts_per_step
    packaged = defaults(config.model).settings
    usual = (load(packaged) if packaged else TrainConfig()).es.prompts_per_step
    adapted = f" (all of them; the default of es.prompts_per_step is {usual})" if per_step < usual else ""
    adapted = adapted if per_step == len(inputs.prompts) else ""
    progress.note(
        f"encoding {len(inputs.prompts)} prompts to train on, {per_step} a step{adapted}, and "
        f"{len(inputs.eval_prompts)} held out"
    )
    if shared := set(inputs.prompts) & set(inputs.eval_prompts):
        progress.note(f"warning: {len(shared)} of the held-out prompts are trained on too")
    with group.first():
        return encode(model, (inputs.prompts, inputs.eval_prompts), config.image, progress, *LISTS)


def start_population(model: Generator, config: TrainConfig) -> Population:
    """Attach the run's population to the model, with the adapter that its first step starts from.

    Raises:
        ConfigError: as `attach_population`; or `init_adapter` cannot be continued exactly.
    """
    population = attach_population(model, config)
    if config.init_adapter is not None:
        try:
            population.load_lora(config.init_adapter)
        except ValueError as error:
            raise ConfigError(str(error), setting="init_adapter") from error
    return population


def attach_population(model: Generator, config: TrainConfig) -> Population:
    """Attach the run's population to the model's denoiser.

    Raises:
        ConfigError: `lora.targets` or `lora.alpha_pattern` does not match the model.
    """
    lora, targets = config.lora, config.lora.targets or model.targets
    containers = _containers(model.module, targets)
    form = Direct(targets, containers or None)
    if lora.rank:
        linear = [f".{name}" for name, each in model.module.named_modules() if kind_of(each) is not None]
        pattern = {}
        for name, alpha in lora.alpha_pattern.items():
            named = [layer for layer in linear if layer.endswith(f".{name}")]
            if not named:
                what = f"expected the end of a layer's name, the model has no '{name}'"
                raise ConfigError(f"lora.alpha_pattern: {what}")
            if any(layer.endswith(f".{target}") for layer in named for target in targets):
                pattern[re.escape(name)] = alpha
        settings = dict(r=lora.rank, lora_alpha=lora.alpha, alpha_pattern=pattern)
        form = LoraConfig(**settings, target_modules=list(targets), exclude_modules=list(containers) or None)
    noise = Noise(sigma=config.es.sigma, rank=config.es.noise_rank, seed=config.seed)
    try:
        return attach(model.module, form, noise, rule=config.update)
    except (ValueError, TypeError) as error:
        problem = str(error).splitlines()[0].removeprefix("target_modules: ")
        raise ConfigError(problem.replace(" by exclude_modules", ""), setting="lora.targets") from error


def _containers(module: torch.nn.Module, targets: Collection[str]) -> tuple[str, ...]:
    """Names of lists of modules that a target matches, for targets that match layers elsewhere.

    FLUX.2's `to_out` is a list in some of its blocks and a layer in the others.
    """
    found: list[str] = []
    for target in targets:
        named = {name: each for name, each in module.named_modules() if f".{name}".endswith(f".{target}")}
        lists = [n for n, each in named.items() if isinstance(each, (torch.nn.ModuleList, torch.nn.Sequential))]
        found += lists if len(lists) < len(named) else ()
    return tuple(found)


def _resolved(config: TrainConfig, model: Generator) -> TrainConfig:
    """The settings with every open choice filled in, and with the settings of a single call reset."""
    image = settled(config.image, model)
    return dataclasses.replace(
        config,
        run_dir=None,
        resume=False,
        allow_change=False,
        dry_run=False,
        config=None,
        model=str(Path(config.model).resolve()) if is_folder(config.model) else config.model,
        prompts=config.prompts and config.prompts.resolve(),
        eval_prompts=config.eval_prompts and config.eval_prompts.resolve(),
        init_adapter=config.init_adapter and config.init_adapter.resolve(),
        device=model.device.type,  # without its number, which may change on resume
        dtype=str(model.dtype).removeprefix("torch."),
        image=dataclasses.replace(image, chunk=1, decode_chunk=1) if config.deterministic else image,
    )


def _go_on(engine: Engine, saved: Checkpoint, config: TrainConfig, folder: RunFolder, progress: Progress) -> None:
    """Load the checkpoint into the engine.

    Raises:
        RunError: the checkpoint does not fit the settings, or it is past the last step.
    """
    try:
        engine.load_state_dict(run_state.engine_state(saved, config))
    except ValueError as error:
        stays = "lora.rank, lora.targets and an optimizer with moments cannot change, even with --allow-change"
        raise RunError(f"run folder {folder.path} cannot be resumed: {error}; {stays}") from error
    for path, why in saved.skipped:
        progress.note(f"skipped {path}: {why}")
    if engine.step > config.steps:
        raise RunError(f"run folder {folder.path}: {engine.step} steps are done, --steps {config.steps} is less")
    progress.note(f"resuming {folder.path} after step {engine.step} of {config.steps}")


def _as_before(config: TrainConfig, was: TrainConfig) -> TrainConfig:
    """Fill settings that the flags leave at `auto` or None from the run's last start."""
    chunk = was.image.chunk if config.image.chunk is None else config.image.chunk
    watched = was.heldout_reward if config.reward == was.reward else AUTO
    return dataclasses.replace(
        config,
        heldout_reward=watched if config.heldout_reward == AUTO else config.heldout_reward,
        device=was.device if config.device == "auto" else config.device,
        dtype=was.dtype if config.dtype == "auto" else config.dtype,
        image=dataclasses.replace(config.image, chunk=chunk),
    )


def _require_alike(group: Group, start: Start) -> None:
    """Raise RunError unless every process has the same run. Each process reads its files itself."""
    own = torch.frombuffer(bytearray(json.dumps(dataclasses.asdict(start)).encode()), dtype=torch.uint8)
    found = [Start(**json.loads(bytes(each.tolist()))) for each in group.gather(own)]
    for rank, each in enumerate(found):
        if changed := run_state.changes(found[0], each, OF_A_PROCESS):
            raise RunError(f"process {rank}: its run differs from that of process 0 ({'; '.join(changed)})")


def _check_same_run(folder: RunFolder, before: Start, now: Start, allowed: bool, progress: Progress) -> None:
    old, new = before.identity["contract"], now.identity["contract"]
    if old != new:
        raise RunError(f"run folder {folder.path}: noise contract: {old} -> {new}")
    old, new = before.settings.get("init_adapter"), now.settings["init_adapter"]
    if old != new:  # the run has started from it already
        raise RunError(f"run folder {folder.path}: init_adapter: {old} -> {new}: it cannot change")
    changed = run_state.changes(before, now)
    if changed and allowed:
        progress.note(f"warning: the run continues with other settings ({'; '.join(changed)})")
    elif changed:
        raise RunError(
            f"run folder {folder.path} was trained with other settings ({'; '.join(changed)}): "
            "resume without these flags, choose another --run-dir, or add --allow-change"
        )
