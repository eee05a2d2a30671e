"""A training run: prompts -> render -> score -> fitness -> update -> checkpoint, in a folder that can be resumed."""

import dataclasses
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch
from peft import LoraConfig

from esengine import checkpoint
from esengine.config import ImageSettings, TrainConfig, differences, to_dict, to_yaml
from esengine.engine import Engine, Task
from esengine.entries import default_entries
from esengine.env import describe
from esengine.errors import ConfigError, RunError
from esengine.files import cache_root, replace_file
from esengine.guard import Guard, load_rewards
from esengine.kernels import CONTRACT
from esengine.models import SanaSprint, TextEmbeddings, write_diffusers_lora
from esengine.population import Noise, Population, attach
from esengine.prompts import HELDOUT, TRAIN, PromptSampler, read_prompts
from esengine.rewards import Weighted
from esengine.rewards.base import reason
from esengine.rewards.spec import read as read_rewards
from esengine.rollout import Renderer, render_all, score_task
from esengine.runlog import RunLog
from esengine.scoring import Plan, compare_entries
from esengine.setup import load_model, pick_device, pick_dtype, render_settings, settled
from esengine.summary import Report
from esengine.trackers import require_installed

STRIP_PROMPTS = 8


class Progress:
    """What a run says while it works. The base class is silent; the command line draws a bar."""

    def note(self, text: str) -> None:
        """One line about what is being done."""

    def count(self, what: str, done: int, total: int) -> None:
        """So many of a total are done, for work besides the steps."""

    def start(self, total: int, done: int) -> None:
        """Images of the whole run, and of the steps that are already behind."""

    def images(self, count: int) -> None:
        """So many more images are rendered and scored."""

    def step(self, step: int, steps: int, metrics: dict[str, float]) -> None:
        """A step is done."""

    def stop(self) -> None:
        """The last step is done, or the run has failed."""


@dataclass(frozen=True)
class Result:
    """What a finished run leaves.

    Attributes:
        folder: of the run.
        comparison: base against adapter on prompts it did not train on.
        parted: the step at which each held-out reward, if it did, parted ways with the optimised one.
        page: the run as a page to look at; None if it could not be drawn.
    """

    folder: Path
    comparison: Report
    parted: dict[str, int]
    page: Path | None


@dataclass(frozen=True)
class Run:
    """The parts of a run that do not change from step to step."""

    config: TrainConfig
    reward: Weighted
    render: Renderer
    progress: Progress
    folder: checkpoint.RunFolder
    meta: dict
    log: RunLog
    guard: Guard | None


def train(config: TrainConfig, progress: Progress | None = None) -> Result:
    """Run or resume a training run to its last step, then compare base and adapter on held-out prompts.

    Raises:
        ConfigError: a setting, file or reward that cannot be used; the run folder is untouched.
        RunError: the run folder is in use, holds another run, or has nothing to resume.
        RewardError, RenderError: a step failed; the adapter is as before it, and a checkpoint of that is written.
    """
    progress = progress or Progress()
    prompts = read_prompts(config.prompts or TRAIN)
    eval_prompts = read_prompts(config.eval_prompts or HELDOUT)
    sampler = PromptSampler(len(prompts), config.es.prompts_per_step, config.seed)
    settings = render_settings(config.image)
    # before a folder is made
    read_rewards(config.reward)
    pick_device(config.device)
    require_installed(config.trackers)
    if config.resume and config.run_dir is None:
        raise ConfigError("resume: which run? give its folder with --run-dir")
    run_dir = config.run_dir or Path("runs") / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")

    with checkpoint.RunFolder.open(run_dir, resume=config.resume) as folder:
        saved = checkpoint.load_latest(folder.checkpoints) if config.resume else None
        if saved is not None:
            config = _as_before(config, saved.meta["config"])
        device = pick_device(config.device)
        dtype = pick_dtype(config.dtype, device)
        watched = config.heldout_reward if config.heldout_every else "none"
        rewards = load_rewards(config.reward, watched, device=str(device), note=progress.note)
        progress.note(f"model {config.model} on {device} in {str(dtype).removeprefix('torch.')}")
        model = load_model(config.model, config.revision, device, dtype, config.image.vae)
        config = dataclasses.replace(
            config,
            run_dir=None,
            resume=False,
            config=None,
            model=str(Path(config.model).resolve()) if Path(config.model).is_dir() else config.model,
            prompts=config.prompts and config.prompts.resolve(),
            eval_prompts=config.eval_prompts and config.eval_prompts.resolve(),
            device=str(device),
            dtype=str(dtype).removeprefix("torch."),
            image=settled(config.image, model),
        )
        meta = {
            "config": to_dict(config),
            "prompts_sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
            "model": model.identity(),
            "rewards": rewards.identity(rewards.optimised),
            "contract": CONTRACT,
            "environment": describe(),
        }
        if saved is not None:
            _check_same_run(folder, saved.meta, meta)
        population = attach_population(model, config)
        plan = model.plan(population, settings)
        progress.note(f"population of {config.population}, kernels: {population.backend}, {plan}")
        engine = Engine(
            population, sampler, size=config.population, repeats=config.es.repeats, shaping=config.es.shaping
        )
        if saved is not None:
            engine.load_state_dict(_unflatten(saved))
            if changed := differences(saved.meta.get("environment", {}), meta["environment"]):
                progress.note(f"warning: bits may differ from before, {'; '.join(changed)}")
            for path, why in saved.skipped:
                progress.note(f"skipped {path}: {why}")
            if engine.step > config.steps:
                raise RunError(
                    f"run folder {folder.path}: {engine.step} steps are done, --steps {config.steps} lies behind them"
                )
            progress.note(f"resuming {folder.path} after step {engine.step} of {config.steps}")

        progress.note(f"encoding {len(prompts)} prompts to train on and {len(eval_prompts)} held out")
        if shared := set(prompts) & set(eval_prompts):
            progress.note(f"warning: {len(shared)} of the held-out prompts are trained on too")
        texts, held_out = encode(model, (prompts, eval_prompts), config.image, progress)
        drawn = dict(settings=settings, seed=config.seed, chunk=config.image.chunk)
        with RunLog(
            folder,
            engine.step if saved is not None else None,
            trackers=config.trackers,
            settings={**meta["config"], "identity": {key: each for key, each in meta.items() if key != "config"}},
            note=progress.note,
        ) as log:
            guard = None
            if config.heldout_every:
                watching = dict(prompts=config.heldout_prompts, every=config.heldout_every, log=log, note=progress.note)
                guard = Guard(rewards, Renderer(model, held_out, **drawn), **watching)
            render = Renderer(model, texts, **drawn)
            run = Run(config, rewards.optimised, render, progress, folder, meta, log, guard)
            _loop(run, engine, resumed=saved is not None)
        population.detach()

        progress.note(f"comparing base and adapter on {len(eval_prompts)} held-out prompts")
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
                chunk=config.image.chunk,
            ),
            progress=lambda done, total: progress.count("images", done, total),
        )
        replace_file(Path(folder.path) / "eval.json", comparison.to_json().encode())
        parted = guard.parted() if guard else {}
        for name in parted:
            progress.note(f"warning: {guard.warning(name)}")
        return Result(Path(folder.path), comparison, parted, _page(folder.path, progress))


def attach_population(model: SanaSprint, config: TrainConfig) -> Population:
    """The population of a run on its model's transformer."""
    lora = LoraConfig(r=config.lora.rank, lora_alpha=config.lora.alpha, target_modules=list(config.lora.targets))
    noise = Noise(sigma=config.es.sigma, rank=config.es.noise_rank, seed=config.seed)
    try:
        return attach(model.transformer, lora, noise, rule=config.update)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"lora: {str(error).splitlines()[0]}") from error


def encode(
    model: SanaSprint, lists: Sequence[list[str]], image: ImageSettings, progress: Progress
) -> list[TextEmbeddings]:
    """Text embeddings of several lists of prompts, with the text encoder loaded at most once, by way of the cache."""
    settings = dict(cache_dir=cache_root() / "text", instruction=image.instruction)
    everything = list(dict.fromkeys(prompt for prompts in lists for prompt in prompts))
    texts = model.encode(everything, **settings, progress=lambda done, total: progress.count("prompts", done, total))
    place = {prompt: index for index, prompt in enumerate(everything)}
    return [TextEmbeddings(prompts, [texts[place[prompt]] for prompt in prompts]) for prompts in lists]


def save_adapter(population: Population, path: Path) -> None:
    """Write the adapter for PEFT and, in the same folder, for `SanaSprintPipeline.load_lora_weights`."""
    population.save_pretrained(path)
    scaling = {name: layer.scale for name, layer in population.layers.items()}
    write_diffusers_lora(path, population.parameters(), scaling)


def _loop(run: Run, engine: Engine, *, resumed: bool) -> None:
    config, population, folder = run.config, engine.population, run.folder

    def keep() -> int:
        checkpoint.save(folder.checkpoints, engine.step, _flatten(engine), run.meta)
        save_adapter(population, folder.adapter)
        return engine.step

    if resumed:
        kept = engine.step
        save_adapter(population, folder.adapter)
    else:
        kept = keep()  # before the config: a run that has one can be resumed
    replace_file(folder.config, to_yaml(config).encode())
    per_step = engine.ask().images
    run.progress.start(config.steps * per_step, engine.step * per_step)
    settled = True  # the adapter, the step's number and its metrics agree
    try:
        while True:
            if run.guard and run.guard.due(engine.step, config.steps):
                run.guard.measure(engine.step)
            if engine.step == config.steps:
                break
            task = engine.ask()
            scores, seconds = score_task(run.render, run.reward, population, task, run.progress.images)
            total = scores["combined"]
            if config.strip_every and (task.step % config.strip_every == 0 or task.step == config.steps - 1):
                _strip(run, engine, task, total)
                for name, score in scores.items():
                    run.log.histogram(task.step, f"members/{name}", score.mean(dim=(1, 2)))
            start, settled = time.perf_counter(), False
            norms = engine.tell(task, total)
            seconds["seconds_update"] = time.perf_counter() - start
            seconds["seconds"] += seconds["seconds_update"]
            members = total.mean(dim=(1, 2))
            metrics = {
                "reward": float(total.mean()),
                "reward_best": float(members.max()),
                "reward_worst": float(members.min()),
                "reward_std": float(members.std(unbiased=False)),
                **{f"reward/{name}": float(scores[name].mean()) for name in run.reward.names},
                **norms,
                "images_per_second": task.images / seconds["seconds"],
                **seconds,
            }
            run.log.log(task.step, metrics)
            settled = True
            run.progress.step(engine.step, config.steps, metrics)
            if engine.step % config.checkpoint_every == 0 or engine.step == config.steps:
                kept = keep()
    finally:
        run.progress.stop()
        if settled and engine.step > kept:
            keep()


def _strip(run: Run, engine: Engine, task: Task, scores: torch.Tensor) -> None:
    """The best, median and worst member of this step, rendered again: images are never kept."""
    order = engine.fitness(task, scores).argsort(descending=True).tolist()
    prompts = task.prompts[:STRIP_PROMPTS]
    images = {}
    for label, member in (("best", order[0]), ("median", order[len(order) // 2]), ("worst", order[-1])):
        rows = render_all(run.render, task.step, prompts, member, engine.population)
        images[label] = torch.cat([drawn for drawn, _ in rows])
    run.log.strip(task.step, images, run.render.words(prompts))


def _page(folder: Path, progress: Progress) -> Path | None:
    """The run as one HTML page; a run is not lost over it."""
    try:
        from esengine.report import write_training_page  # Jinja is slow to import

        return write_training_page(folder)
    except Exception as error:
        progress.note(f"warning: no page of the run could be drawn: {reason(error)}")
        return None


def _as_before(config: TrainConfig, saved: dict) -> TrainConfig:
    """What the flags leave to be chosen stays as it was chosen when the run began."""
    chunk = saved["image"]["chunk"] if config.image.chunk is None else config.image.chunk
    return dataclasses.replace(
        config,
        device=saved["device"] if config.device == "auto" else config.device,
        dtype=saved["dtype"] if config.dtype == "auto" else config.dtype,
        image=dataclasses.replace(config.image, chunk=chunk),
    )


def _check_same_run(folder: checkpoint.RunFolder, saved: dict, now: dict) -> None:
    changed = differences(saved["config"], now["config"])
    changed += differences({"reward": saved["rewards"]}, {"reward": now["rewards"]})
    if saved["contract"] != now["contract"]:
        changed.append(f"noise contract: {saved['contract']} -> {now['contract']}")
    for name, what in (("model", "model: its weights"), ("prompts_sha256", "prompts: the file's contents")):
        if saved[name] != now[name]:
            changed.append(what)
    if changed:
        raise RunError(
            f"run folder {folder.path} was trained with other settings ({'; '.join(changed)}): "
            "resume without these flags, or choose another --run-dir"
        )


def _flatten(engine: Engine) -> dict[str, torch.Tensor]:
    state = engine.state_dict()["population"]
    return {f"{part}/{name}": t for part in ("adapter", "optimizer") for name, t in state[part].items()}


def _unflatten(saved: checkpoint.Checkpoint) -> dict:
    parts: dict[str, dict[str, torch.Tensor]] = {"adapter": {}, "optimizer": {}}
    for key, tensor in saved.tensors.items():
        part, _, name = key.partition("/")
        parts[part][name] = tensor
    config = saved.meta["config"]
    noise = {"contract": saved.meta["contract"], "sigma": config["es"]["sigma"]}
    noise |= {"rank": config["es"]["noise_rank"], "seed": config["seed"]}
    return {"step": saved.step, "population": {**parts, "noise": noise}}
