"""Prepares a run for its first step: reads and checks the inputs, loads the model, restores the last checkpoint."""

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from esengine.base.errors import ConfigError, RunError, of_setting
from esengine.base.group import Group
from esengine.base.progress import Progress
from esengine.base.prompt_files import read_prompts
from esengine.es.direct import Direct
from esengine.es.engine import Engine
from esengine.es.population import Noise, Population, attach
from esengine.es.prompts import PromptSampler
from esengine.kernels import CONTRACT
from esengine.models import Generator, RenderSettings, TextEmbeddings, require_pipeline
from esengine.models.defaults import defaults
from esengine.rewards.roles import AUTO, NONE, Rewards, load_rewards, read_terms
from esengine.rewards.spec import OPTIMISED, Term
from esengine.run import state as run_state
from esengine.run.checkpoint import Checkpoint, set_aside
from esengine.run.folder import RunFolder
from esengine.run.log import require_steps
from esengine.run.settings import MAY_CHANGE, TrainConfig, differences, load, to_dict
from esengine.run.trackers import require_installed
from esengine.sampling.build import (
    encode,
    is_folder,
    load_model,
    pick_device,
    pick_dtype,
    render_settings,
    settled,
    take_device,
)
from esengine.sampling.environment import describe
from esengine.sampling.rollout import Renderer

IN_THE_UPDATE = ("seed", "dtype", "population", "lora", "es", "update")
"""Settings that determine the adapter together with the fitness. fitness.jsonl has them in the step they start at."""

OF_A_PROCESS = tuple(name for name in MAY_CHANGE if name not in ("steps", "checkpoint_every", "on_bad_reward"))
"""Settings that may differ between the processes of a run: names, and settings that only the leading process uses."""


@dataclass(frozen=True)
class Inputs:
    """Inputs that are read and checked before the run folder is made.

    Attributes:
        config: the settings, with the optimised reward filled in. On resume, settings left open are those of the run.
        terms: the rewards, not loaded. `heldout_reward auto` is resolved.
        prompts: prompts to train on.
        eval_prompts: prompts that are never trained on.
        sampler: draws the prompts of a step.
        run_dir: the run's folder.
    """

    config: TrainConfig
    terms: list[Term]
    prompts: list[str]
    eval_prompts: list[str]
    sampler: PromptSampler
    run_dir: Path


@dataclass(frozen=True)
class Prepared:
    """A run that is ready for its next step.

    Attributes:
        config: the settings, with a value for each of them.
        model, engine, rewards: loaded. The engine is at the step from which the run continues.
        settings: how an image is rendered.
        meta: the run's part of a checkpoint's meta.
        saved: the checkpoint from which the run resumes; None for a new run.
        texts, held_out: embeddings of the prompts to train on and of the held-out prompts.
    """

    config: TrainConfig
    model: Generator
    engine: Engine
    rewards: Rewards
    settings: RenderSettings
    meta: dict[str, Any]
    saved: Checkpoint | None
    texts: TextEmbeddings
    held_out: TextEmbeddings

    def renderer(self, texts: TextEmbeddings, progress: Progress) -> Renderer:
        """A renderer of a list of prompts with this run's settings and the batch limit of its last checkpoint."""
        limit = self.saved.meta.get(run_state.LIMITS[0]) if self.saved else None
        keys = dict(seed=self.config.seed, chunk=self.config.image.chunk, limit=limit, note=progress.note)
        return Renderer(self.model, texts, self.settings, **keys)

    @property
    def opening(self) -> dict[str, Any] | None:
        """Settings to write into the next line of fitness.jsonl; None if an earlier line has the same."""
        now = {name: self.meta["config"][name] for name in IN_THE_UPDATE}
        if self.engine.step > 0 and now == {name: self.saved.meta["config"][name] for name in IN_THE_UPDATE}:
            return None
        return {"settings": now}


def read_inputs(config: TrainConfig, group: Group) -> Inputs:
    """Read the prompts, and check the other settings.

    Raises:
        ConfigError: a setting or file cannot be used.
    """
    of_model = defaults(config.model)
    with of_setting("prompts"):
        prompts = read_prompts(config.prompts or of_model.train)
    with of_setting("eval_prompts"):
        eval_prompts = read_prompts(config.eval_prompts or of_model.heldout)
    config = dataclasses.replace(config, reward=config.reward or of_model.reward)
    sampler = PromptSampler(len(prompts), config.es.prompts_per_step, config.seed)
    render_settings(config.image)
    if config.resume and config.run_dir is not None and (config.run_dir / "config.yaml").is_file():
        config = _as_before(config, load(config.run_dir / "config.yaml"))
    own_prompts = bool(config.prompts or config.eval_prompts)
    terms = read_terms(config.reward, config.heldout_reward, of_model, own_prompts=own_prompts)
    if not (config.heldout_every or of_model.watches):
        terms = [term for term in terms if term.role == OPTIMISED]
    pick_device(config.device)
    with group.first():
        require_pipeline(config.model, config.revision, config.image.vae)
    require_installed(config.trackers)
    if config.resume and config.run_dir is None:
        raise ConfigError("expected --run-dir with it, the folder of the run to resume", setting="resume")
    run_dir = config.run_dir or Path("runs") / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    return Inputs(config, terms, prompts, eval_prompts, sampler, run_dir)


def prepare(inputs: Inputs, folder: RunFolder, progress: Progress, group: Group) -> Prepared:
    """Load the model, the rewards and the text embeddings; with `resume` also the last checkpoint.

    Raises:
        ConfigError: a model, reward or layer cannot be used.
        RunError: the folder has nothing to resume, or holds a different run.
    """
    config = inputs.config
    saved = run_state.latest(folder.checkpoints) if config.resume else None
    if saved is not None and group.is_main:
        require_steps(folder, saved.step)
    device = take_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    rewards, config = _rewards(inputs, config, str(device), progress)
    progress.note(f"model {config.model} on {device} in {str(dtype).removeprefix('torch.')}")
    with group.first():
        model = load_model(config.model, config.revision, device, dtype, config.image.vae)
    allowed, config = config.allow_change, _resolved(config, model)
    settings = render_settings(config.image)
    meta = {
        "config": to_dict(config),
        "prompts_sha256": hashlib.sha256("\n".join(inputs.prompts).encode()).hexdigest(),
        "model": model.identity(),
        "rewards": rewards.identity(rewards.optimised),
        "contract": CONTRACT,
        "environment": describe(),
    }
    _require_alike(group, meta)
    if saved is not None and group.is_main:
        _check_same_run(folder, saved.meta, meta, allowed, progress)
    engine = _engine(inputs.sampler, model, config, settings, progress, group)
    if saved is not None:
        _go_on(engine, saved, config, folder, progress)
        rewards.optimised.limit = saved.meta.get(run_state.LIMITS[1])
        if group.is_main:
            set_aside(path for path, _ in saved.skipped)
    texts, held_out = _encoded(inputs, model, config, progress, group)
    return Prepared(config, model, engine, rewards, settings, meta, saved, texts, held_out)


def _rewards(inputs: Inputs, config: TrainConfig, device: str, progress: Progress) -> tuple[Rewards, TrainConfig]:
    """The run's rewards, and its settings with `heldout_reward auto` replaced by the rewards that it selected."""
    rewards = load_rewards(inputs.terms, device=device, note=progress.note)
    with of_setting("prompts"):
        rewards.everything.check_prompts(inputs.prompts)
    with of_setting("eval_prompts"):
        rewards.everything.check_prompts(inputs.eval_prompts)
    if config.heldout_every and config.heldout_reward == AUTO:
        watched = ",".join(term.text() for term in rewards.watched) or NONE
        config = dataclasses.replace(config, heldout_reward=watched)
    return rewards, config


def _engine(
    sampler: PromptSampler,
    model: Generator,
    config: TrainConfig,
    settings: RenderSettings,
    progress: Progress,
    group: Group,
) -> Engine:
    population = attach_population(model, config)
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
    progress.note(
        f"encoding {len(inputs.prompts)} prompts to train on, {per_step} a step, and "
        f"{len(inputs.eval_prompts)} held out"
    )
    if shared := set(inputs.prompts) & set(inputs.eval_prompts):
        progress.note(f"warning: {len(shared)} of the held-out prompts are trained on too")
    with group.first():
        return encode(model, (inputs.prompts, inputs.eval_prompts), config.image, progress)


def attach_population(model: Generator, config: TrainConfig) -> Population:
    """Attach the run's population to the model's transformer.

    Raises:
        ConfigError: `lora.targets` or `lora.alpha_pattern` does not match the model.
    """
    lora, form = config.lora, Direct(config.lora.targets)
    if lora.rank:
        linear = [f".{name}" for name, each in model.module.named_modules() if isinstance(each, torch.nn.Linear)]
        pattern = {}
        for name, alpha in lora.alpha_pattern.items():
            named = [layer for layer in linear if layer.endswith(f".{name}")]
            if not named:
                what = f"expected the end of a linear layer's name, the model has no '{name}'"
                raise ConfigError(f"lora.alpha_pattern: {what}")
            if any(layer.endswith(f".{target}") for layer in named for target in lora.targets):
                pattern[re.escape(name)] = alpha
        form = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets), alpha_pattern=pattern)
    noise = Noise(sigma=config.es.sigma, rank=config.es.noise_rank, seed=config.seed)
    try:
        return attach(model.module, form, noise, rule=config.update)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"lora.targets: {str(error).splitlines()[0].removeprefix('target_modules: ')}") from error


def _resolved(config: TrainConfig, model: Generator) -> TrainConfig:
    """The settings with every open choice filled in, and with the settings of a single call reset."""
    image = settled(config.image, model)
    return dataclasses.replace(
        config,
        run_dir=None,
        resume=False,
        allow_change=False,
        config=None,
        model=str(Path(config.model).resolve()) if is_folder(config.model) else config.model,
        prompts=config.prompts and config.prompts.resolve(),
        eval_prompts=config.eval_prompts and config.eval_prompts.resolve(),
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
        stays = "lora.rank, lora.targets and an optimizer with moments stay what they were, --allow-change or not"
        raise RunError(f"run folder {folder.path} cannot be gone on with: {error}; {stays}") from error
    if changed := differences(saved.meta["environment"], describe()):
        progress.note(f"warning: bits may differ from before, {'; '.join(changed)}")
    for path, why in saved.skipped:
        progress.note(f"skipped {path}: {why}")
    if engine.step > config.steps:
        raise RunError(
            f"run folder {folder.path}: {engine.step} steps are done, --steps {config.steps} lies behind them"
        )
    progress.note(f"resuming {folder.path} after step {engine.step} of {config.steps}")


def _as_before(config: TrainConfig, was: TrainConfig) -> TrainConfig:
    """Fill settings that the flags leave at `auto` or None from the run's config.yaml, not from a checkpoint."""
    chunk = was.image.chunk if config.image.chunk is None else config.image.chunk
    watched = was.heldout_reward if config.reward == was.reward else AUTO
    return dataclasses.replace(
        config,
        heldout_reward=watched if config.heldout_reward == AUTO else config.heldout_reward,
        device=was.device if config.device == "auto" else config.device,
        dtype=was.dtype if config.dtype == "auto" else config.dtype,
        image=dataclasses.replace(config.image, chunk=chunk),
    )


def _require_alike(group: Group, meta: dict) -> None:
    """Raise RunError unless every process has the same run. Each process reads its files itself."""
    facts = {name: value for name, value in meta.items() if name != "environment"}
    own = torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)
    found = [json.loads(bytes(each.tolist())) for each in group.gather(own)]
    for rank, each in enumerate(found):
        if changed := run_state.changes(found[0], each, OF_A_PROCESS):
            raise RunError(f"process {rank}: it was given another run than process 0 ({'; '.join(changed)})")


def _check_same_run(folder: RunFolder, saved: dict, now: dict, allowed: bool, progress: Progress) -> None:
    if saved["contract"] != now["contract"]:
        raise RunError(f"run folder {folder.path}: noise contract: {saved['contract']} -> {now['contract']}")
    changed = run_state.changes(saved, now)
    # config.yaml has the changed settings already if the run was killed before its next checkpoint, or if that
    # checkpoint is damaged
    before = folder.config.is_file() and run_state.signature(now) in folder.config.read_text(encoding="utf-8")
    if changed and (allowed or before):
        progress.note(f"warning: goes on with other settings ({'; '.join(changed)})")
    elif changed:
        again = "resume without these flags" if folder.config.is_file() else "its config.yaml is gone, give them again"
        raise RunError(
            f"run folder {folder.path} was trained with other settings ({'; '.join(changed)}): "
            f"{again}, choose another --run-dir, or add --allow-change"
        )
