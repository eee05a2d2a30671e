"""A training run: prompts -> render -> score -> fitness -> update -> checkpoint, in a folder that can be resumed."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch
from peft import LoraConfig
from PIL import Image
from torch.nn.functional import interpolate

from esengine.base.errors import ConfigError, RunError, Stopped, of_setting
from esengine.base.files import replace_file, write_atomic
from esengine.base.group import Group
from esengine.base.progress import Progress
from esengine.base.prompt_files import read_prompts
from esengine.es.direct import Direct
from esengine.es.engine import Engine
from esengine.es.population import Noise, Population, attach
from esengine.es.prompts import PromptSampler
from esengine.evaluation.draw import Batch, Plan, compare_entries
from esengine.evaluation.entries import default_entries
from esengine.evaluation.statistics import Report
from esengine.kernels import CONTRACT
from esengine.models import SanaSprint, require_pipeline
from esengine.models.defaults import defaults
from esengine.rewards.roles import load_rewards, reward_names
from esengine.rewards.spec import read
from esengine.run import state as run_state
from esengine.run.checkpoint import Checkpoint, set_aside
from esengine.run.folder import RunFolder, checkpoint_folders, path_step
from esengine.run.held_out import Guard
from esengine.run.log import RunLog, require_steps
from esengine.run.loop import Record, Run, take_steps
from esengine.run.pictures import draw_strip
from esengine.run.settings import MAY_CHANGE, TrainConfig, differences, load, to_dict
from esengine.run.stop import Stop
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
"""Settings that with the fitness make the adapter: fitness.jsonl says them at the step from which they hold."""

OF_A_PROCESS = tuple(name for name in MAY_CHANGE if name not in ("steps", "checkpoint_every", "on_bad_reward"))
"""Settings in which the processes of a run may differ: names, and what the leading one alone goes by."""

SHOWN_PROMPTS = 8
"""Held-out prompts of which comparison.png shows the base's image and the adapter's."""


@dataclass(frozen=True)
class Result:
    """What a finished run leaves.

    Attributes:
        folder: of the run.
        comparison: base against adapter on prompts it did not train on.
        parted: the step at which each held-out reward, if it did, parted ways with the optimised one.
    """

    folder: Path
    comparison: Report
    parted: dict[str, int]


def train(config: TrainConfig, progress: Progress | None = None, stop: Stop | None = None) -> Result | None:
    """Run or resume a training run to its last step, then compare base and adapter on held-out prompts.

    Under torchrun the processes share the steps. The leading one does the rest and returns the result, others None.
    Signals are left alone: to end a run gently by SIGTERM or SIGINT, pass a `Stop` inside its `with` statement.

    Raises:
        ConfigError: a setting, file or reward that cannot be used; the run folder is untouched.
        RunError: the run folder is in use, holds another run, or has nothing to resume.
        RewardError, RenderError: a step failed; the adapter is as before it, and a checkpoint of that is written.
        Stopped: by a signal that `stop` was entered for, with a line on how to go on; between the steps, with a
            checkpoint.
    """
    group = Group.join()
    try:
        return _train(config, progress if progress and group.leads else Progress(), group, stop or Stop())
    except Stopped:
        if group.leads:
            raise
        return None  # one of them tells
    finally:
        group.leave()


def _train(config: TrainConfig, progress: Progress, group: Group, stop: Stop) -> Result | None:
    silent = defaults(config.model)
    with of_setting("prompts"):
        prompts = read_prompts(config.prompts or silent.train)
    with of_setting("eval_prompts"):
        eval_prompts = read_prompts(config.eval_prompts or silent.heldout)
    config = dataclasses.replace(config, reward=config.reward or silent.reward)
    sampler = PromptSampler(len(prompts), config.es.prompts_per_step, config.seed)
    render_settings(config.image)
    # before a folder is made
    with of_setting("reward"):
        read(config.reward)
    if config.heldout_reward not in ("auto", "none"):
        with of_setting("heldout_reward"):
            read(config.heldout_reward)
    pick_device(config.device)
    with group.first():
        require_pipeline(config.model, config.revision, config.image.vae)
    require_installed(config.trackers)
    if config.resume and config.run_dir is None:
        raise ConfigError("resume: which run? give its folder with --run-dir")
    run_dir = config.run_dir or Path("runs") / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")

    with _told(run_dir, config.steps, stop), _folder(run_dir, config.resume, group) as folder:
        saved = run_state.latest(folder.checkpoints) if config.resume else None
        if saved is not None and folder.config.is_file():
            config = _as_before(config, load(folder.config))
        if saved is not None and group.leads:
            require_steps(folder, saved.step)
        device = take_device(config.device)
        dtype = pick_dtype(config.dtype, device)
        watched = config.heldout_reward if config.heldout_every or silent.watches else "none"
        if watched == "auto":
            watched = silent.watched(reward_names(config.reward), bool(config.prompts or config.eval_prompts))
        auto = config.heldout_reward == "auto"
        rewards = load_rewards(config.reward, watched, device=str(device), note=progress.note, auto=auto)
        with of_setting("prompts"):
            rewards.everything.check_prompts(prompts)
        with of_setting("eval_prompts"):
            rewards.everything.check_prompts(eval_prompts)
        progress.note(f"model {config.model} on {device} in {str(dtype).removeprefix('torch.')}")
        with group.first():
            model = load_model(config.model, config.revision, device, dtype, config.image.vae)
        if config.heldout_every and config.heldout_reward == "auto":
            chosen = ",".join(rewards.watched) or "none" if watched == "auto" else watched
            config = dataclasses.replace(config, heldout_reward=chosen)
        allowed, config = config.allow_change, _resolved(config, model)
        settings = render_settings(config.image)
        meta = {
            "config": to_dict(config),
            "prompts_sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
            "model": model.identity(),
            "rewards": rewards.identity(rewards.optimised),
            "contract": CONTRACT,
            "environment": describe(),
        }
        _require_alike(group, meta)
        if saved is not None and group.leads:
            _check_same_run(folder, saved.meta, meta, allowed, progress)
        population = attach_population(model, config)
        for name in config.lora.alpha_pattern:
            if not any(f".{layer}".endswith(f".{name}") for layer in population.layers):
                progress.note(f"lora.alpha_pattern: {name} is none of the targets, its alpha has no part")
        plan = model.plan(population, settings)
        together = f", {group.size} processes" if group.size > 1 else ""
        progress.note(f"population of {config.population}, kernels: {population.backend}, {plan}{together}")
        engine = Engine(
            population,
            sampler,
            size=config.population,
            repeats=config.es.repeats,
            shaping=config.es.shaping,
            prompt_std=config.es.prompt_std,
            drop_pairs=config.on_bad_reward == "drop-pair",
        )
        if saved is not None:
            _go_on(engine, saved, config, folder, progress)
            if group.leads:
                set_aside(path for path, _ in saved.skipped)

        per_step = config.es.prompts_per_step
        progress.note(
            f"encoding {len(prompts)} prompts to train on, {per_step} a step, and {len(eval_prompts)} held out"
        )
        if shared := set(prompts) & set(eval_prompts):
            progress.note(f"warning: {len(shared)} of the held-out prompts are trained on too")
        with group.first():
            texts, held_out = encode(model, (prompts, eval_prompts), config.image, progress)
        limit, rewards.optimised.limit = (saved.meta.get(name) if saved else None for name in run_state.LIMITS)
        drawn = dict(settings=settings, seed=config.seed, chunk=config.image.chunk, limit=limit, note=progress.note)
        run = Run(config, rewards.optimised, Renderer(model, texts, **drawn), progress, group, None)
        if not group.leads:
            take_steps(run, engine, stop, resumed=saved is not None)
            return None
        said = {name: meta["config"][name] for name in IN_THE_UPDATE}
        known = engine.step > 0 and said == {name: saved.meta["config"][name] for name in IN_THE_UPDATE}
        with RunLog(
            folder,
            engine.step if saved is not None else None,
            trackers=config.trackers,
            settings={**meta["config"], "identity": {key: each for key, each in meta.items() if key != "config"}},
            opening=None if known else {"settings": said},
            note=progress.note,
        ) as log:
            guard = None
            if config.heldout_every:
                watching = dict(prompts=config.heldout_prompts, every=config.heldout_every, log=log, note=progress.note)
                guard = Guard(rewards, Renderer(model, held_out, **drawn), **watching, bear=engine.drop_pairs)
            run = dataclasses.replace(run, record=Record(folder, meta, log, guard))
            take_steps(run, engine, stop, resumed=saved is not None)
        population.detach()

        progress.note(f"comparing base and adapter on {len(eval_prompts)} held-out prompts")
        images: dict[str, list[torch.Tensor]] = {}
        comparison = compare_entries(
            model,
            held_out,
            rewards.everything,
            Plan(
                entries=default_entries(settings.num_steps, folder.adapter, two_steps=False),
                prompts=len(eval_prompts),
                repeats=config.es.repeats,
                seed=config.seed,
                settings=settings,
                chunk=run.render.limit or config.image.chunk,
            ),
            progress=lambda done, total: progress.count("images", done, total),
            watch=lambda batch: _keep_images(images, batch),
            bear=engine.drop_pairs,
        )
        if left_out := comparison.settings.get("prompts_left_out"):
            progress.note(f"warning: {left_out} prompts have an image without a score and are not compared")
        replace_file(Path(folder.path) / "eval.json", comparison.to_json().encode())
        if images:
            _draw_comparison(Path(folder.path) / "comparison.png", images, eval_prompts)
        parted = guard.parted() if guard else {}
        for name in parted:
            progress.note(f"warning: {guard.warning(name)}")
        return Result(Path(folder.path), comparison, parted)


@contextmanager
def _told(run_dir: Path, steps: int, stop: Stop) -> Iterator[None]:
    """What a signal ends in here ends with a line that says how to go on."""
    try:
        yield
    except (KeyboardInterrupt, Stopped) as error:
        if isinstance(error, KeyboardInterrupt) and not stop.requested:
            raise
        kept = checkpoint_folders(run_dir / "checkpoints")
        if not kept:
            raise Stopped("stopped before the first step: there is nothing to go on with") from error
        again = f"it goes on with: esengine train --run-dir {run_dir} --resume"
        raise Stopped(f"stopped after step {path_step(kept[0])} of {steps}; {again}") from error


def attach_population(model: SanaSprint, config: TrainConfig) -> Population:
    """The population of a run on its model's transformer."""
    lora, form = config.lora, Direct(config.lora.targets)
    if lora.rank:
        linear = [f".{name}" for name, each in model.transformer.named_modules() if isinstance(each, torch.nn.Linear)]
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
        return attach(model.transformer, form, noise, rule=config.update)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"lora.targets: {str(error).splitlines()[0].removeprefix('target_modules: ')}") from error


def _keep_images(images: dict[str, list[torch.Tensor]], batch: Batch) -> None:
    """Keep the first image of each of the first `SHOWN_PROMPTS` prompts, at most 256 pixels wide, by entry."""
    for image, (prompt, repeat) in zip(batch.images, batch.rows, strict=True):
        if prompt < SHOWN_PROMPTS and repeat == 0:
            height, width = image.shape[1:]
            size = (max(1, round(height * 256 / width)), 256) if width > 256 else (height, width)
            small = interpolate(image[None].float().cpu(), size, mode="bilinear", antialias=True)
            images.setdefault(batch.entry.label, []).append(small[0].round().byte())


def _draw_comparison(path: Path, images: dict[str, list[torch.Tensor]], prompts: Sequence[str]) -> None:
    """Write the base's images above the adapter's, four prompts in a row."""
    rows = {label: torch.stack(each) for label, each in zip(("base", "ES-LoRA"), images.values(), strict=True)}
    strips = [
        draw_strip({label: row[at : at + 4] for label, row in rows.items()}, prompts[at : at + 4])
        for at in range(0, len(rows["base"]), 4)
    ]
    picture = Image.new("RGB", (strips[0].width, sum(strip.height for strip in strips)), color="white")
    for index, strip in enumerate(strips):
        picture.paste(strip, (0, index * strips[0].height))
    write_atomic(path, picture.save)


@contextmanager
def _folder(path: Path, resume: bool, group: Group) -> Iterator[RunFolder]:
    """The run folder, held by the leading process; the others may look into it once it is."""
    if not group.leads:
        group.wait()
        yield RunFolder(path, None)
        return
    with RunFolder.open(path, resume=resume) as folder:
        group.wait()
        yield folder


def _resolved(config: TrainConfig, model: SanaSprint) -> TrainConfig:
    """With everything chosen that was left open, and nothing that is of this call alone."""
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
        device=model.device.type,  # its number is of this call
        dtype=str(model.dtype).removeprefix("torch."),
        image=dataclasses.replace(image, chunk=1, decode_chunk=1) if config.deterministic else image,
    )


def _go_on(engine: Engine, saved: Checkpoint, config: TrainConfig, folder: RunFolder, progress: Progress) -> None:
    """Bring the engine to where the checkpoint is."""
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
    """What the flags leave to be chosen stays as the run's own config.yaml has it: no setting is a checkpoint's."""
    chunk = was.image.chunk if config.image.chunk is None else config.image.chunk
    watched = was.heldout_reward if config.reward == was.reward else "auto"
    return dataclasses.replace(
        config,
        heldout_reward=watched if config.heldout_reward == "auto" else config.heldout_reward,
        device=was.device if config.device == "auto" else config.device,
        dtype=was.dtype if config.dtype == "auto" else config.dtype,
        image=dataclasses.replace(config.image, chunk=chunk),
    )


def _require_alike(group: Group, meta: dict) -> None:
    """Raises RunError unless every process was given the same run: each reads files of its own."""
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
    # and then it was killed before a checkpoint said so, or the checkpoint that does is damaged
    before = folder.config.is_file() and run_state.signature(now) in folder.config.read_text(encoding="utf-8")
    if changed and (allowed or before):
        progress.note(f"warning: goes on with other settings ({'; '.join(changed)})")
    elif changed:
        again = "resume without these flags" if folder.config.is_file() else "its config.yaml is gone, give them again"
        raise RunError(
            f"run folder {folder.path} was trained with other settings ({'; '.join(changed)}): "
            f"{again}, choose another --run-dir, or add --allow-change"
        )
