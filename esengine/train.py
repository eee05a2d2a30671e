"""A training run: prompts -> render -> score -> fitness -> update -> checkpoint, in a folder that can be resumed."""

import dataclasses
import hashlib
import importlib.util
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch
from peft import LoraConfig

import esengine
from esengine import checkpoint
from esengine.config import ImageSettings, TrainConfig, differences, to_dict, to_yaml
from esengine.engine import Engine, Task
from esengine.errors import ConfigError, RunError
from esengine.evaluate import Comparison, compare
from esengine.files import cache_root, replace_file
from esengine.kernels import CONTRACT
from esengine.models import RenderSettings, SanaSprint, TextEmbeddings, write_diffusers_lora
from esengine.population import Noise, Population, attach
from esengine.prompts import HELDOUT, TRAIN, PromptSampler, read_prompts
from esengine.rewards import Weighted, parse
from esengine.runlog import RunLog
from esengine.setup import load_model, pick_chunk, pick_device, pick_dtype, render_settings

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
    """What a finished run leaves: its folder, and base against adapter on prompts it did not train on."""

    folder: Path
    comparison: Comparison


@dataclass(frozen=True)
class Run:
    """The parts of a run that do not change from step to step."""

    config: TrainConfig
    model: SanaSprint
    reward: Weighted
    texts: TextEmbeddings
    settings: RenderSettings
    progress: Progress


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
    reward = parse(config.reward)
    sampler = PromptSampler(len(prompts), config.es.prompts_per_step, config.seed)
    settings = render_settings(config.image)
    pick_device(config.device)  # before a folder is made
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise ConfigError("wandb: not installed; pip install 'eggroll-esengine[wandb]'")
    if config.resume and config.run_dir is None:
        raise ConfigError("resume: which run? give its folder with --run-dir")
    run_dir = config.run_dir or Path("runs") / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")

    with checkpoint.RunFolder.open(run_dir, resume=config.resume) as folder:
        saved = checkpoint.load_latest(folder.checkpoints) if config.resume else None
        if saved is not None:
            config = _as_before(config, saved.meta["config"])
        device = pick_device(config.device)
        dtype = pick_dtype(config.dtype, device)
        progress.note(f"model {config.model} on {device} in {str(dtype).removeprefix('torch.')}")
        model = load_model(config.model, config.revision, device, dtype)
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
            image=dataclasses.replace(config.image, chunk=pick_chunk(config.image, model)),
        )
        meta = {
            "config": to_dict(config),
            "prompts_sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
            "model": model.identity(),
            "contract": CONTRACT,
            "esengine": esengine.__version__,
        }
        if saved is not None:
            _check_same_run(folder, saved.meta, meta)
        population = attach_population(model, config)
        fused = ", fused blocks" if model.fuses(population) else ""
        progress.note(f"population of {config.population}, kernels: {population.backend}{fused}")
        engine = Engine(
            population, sampler, size=config.population, repeats=config.es.repeats, shaping=config.es.shaping
        )
        if saved is not None:
            engine.load_state_dict(_unflatten(saved))
            for path, why in saved.skipped:
                progress.note(f"skipped {path}: {why}")
            progress.note(f"resuming {folder.path} after step {engine.step} of {config.steps}")

        progress.note(f"encoding {len(prompts)} prompts to train on and {len(eval_prompts)} held out")
        if shared := set(prompts) & set(eval_prompts):
            progress.note(f"warning: {len(shared)} of the held-out prompts are trained on too")
        texts, held_out = encode(model, (prompts, eval_prompts), config.image, progress)
        run = Run(config, model, reward, texts, settings, progress)
        resume_step = engine.step if saved is not None else None
        with _mirror(config, folder), RunLog(folder, resume_step) as log:
            _loop(run, engine, folder, log, meta, resumed=saved is not None)
        population.detach()

        progress.note(f"comparing base and adapter on {len(eval_prompts)} held-out prompts")
        model.load_adapter(folder.adapter)
        comparison = compare(
            model,
            held_out,
            reward,
            seed=config.seed,
            repeats=config.es.repeats,
            settings=settings,
            chunk=config.image.chunk,
            progress=lambda done, total: progress.count("images", done, total),
        )
        replace_file(Path(folder.path) / "eval.json", comparison.to_json().encode())
        return Result(Path(folder.path), comparison)


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


def score_task(run: Run, population: Population, task: Task) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Render and score a step's images chunk by chunk.

    Returns:
        Scores by reward name and "combined", float32 [N, P, R] on the CPU, and seconds spent on "render" and "score".
    """
    columns = task.rows()
    length = run.texts.trimmed_length(task.prompts)
    parts: list[dict[str, torch.Tensor]] = []
    seconds = {"render": 0.0, "score": 0.0}
    for members, prompts, repeats in zip(*(column.split(run.config.image.chunk) for column in columns), strict=True):
        start = time.perf_counter()
        images = _render(run, population, task.step, prompts, repeats, members, length)
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        rendered = time.perf_counter()
        words = [run.texts.prompts[index] for index in prompts.tolist()]
        scores = run.reward.score(images, words, step=task.step, members=members.tolist())
        parts.append({name: score.cpu() for name, score in scores.items()})
        seconds["render"] += rendered - start
        seconds["score"] += time.perf_counter() - rendered
        run.progress.images(len(members))
    return {name: torch.cat([part[name] for part in parts]).view(task.shape) for name in parts[0]}, seconds


def _mirror(config: TrainConfig, folder: checkpoint.RunFolder) -> AbstractContextManager:
    """A Weights & Biases run that follows the TensorBoard writer opened inside it, or nothing."""
    if not config.wandb:
        return nullcontext()
    import wandb

    name = folder.path.resolve().name
    return wandb.init(project="esengine", name=name, dir=folder.path, config=to_dict(config), sync_tensorboard=True)


def _render(run: Run, population: Population, step: int, prompts, repeats, members, length: int) -> torch.Tensor:
    """One chunk: int64 [B] of prompts, repeats and members -> uint8 [B, 3, H, W]."""
    return run.model.render(
        run.texts,
        seed=run.config.seed,
        step=step,
        prompts=prompts,
        repeats=repeats,
        members=members,
        population=population,
        settings=run.settings,
        text_length=length,
    )


def _loop(run: Run, engine: Engine, folder: checkpoint.RunFolder, log: RunLog, meta: dict, *, resumed: bool) -> None:
    config, population = run.config, engine.population

    def keep() -> int:
        checkpoint.save(folder.checkpoints, engine.step, _flatten(engine), meta)
        save_adapter(population, folder.adapter)
        return engine.step

    if engine.step > config.steps:
        raise RunError(
            f"run folder {folder.path}: {engine.step} steps are done, --steps {config.steps} lies behind them"
        )
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
        while engine.step < config.steps:
            task = engine.ask()
            scores, seconds = score_task(run, population, task)
            total = scores["combined"]
            if config.strip_every and (task.step % config.strip_every == 0 or task.step == config.steps - 1):
                _strip(run, engine, task, total, log)
            start, settled = time.perf_counter(), False
            norms = engine.tell(task, total)
            seconds["update"] = time.perf_counter() - start
            members = total.mean(dim=(1, 2))
            metrics = {
                "reward": float(total.mean()),
                "reward_best": float(members.max()),
                "reward_worst": float(members.min()),
                "reward_std": float(members.std(unbiased=False)),
                **{f"reward/{name}": float(scores[name].mean()) for name in run.reward.names},
                **norms,
                "images_per_second": task.images / sum(seconds.values()),
                "seconds": sum(seconds.values()),
                **{f"seconds_{part}": spent for part, spent in seconds.items()},
            }
            log.log(task.step, metrics)
            settled = True
            run.progress.step(engine.step, config.steps, metrics)
            if engine.step % config.checkpoint_every == 0 or engine.step == config.steps:
                kept = keep()
    finally:
        run.progress.stop()
        if settled and engine.step > kept:
            keep()


def _strip(run: Run, engine: Engine, task: Task, scores: torch.Tensor, log: RunLog) -> None:
    """The best, median and worst member of this step, rendered again: images are never kept."""
    order = engine.fitness(task, scores).argsort(descending=True)
    prompts, length = task.prompts[:STRIP_PROMPTS], run.texts.trimmed_length(task.prompts)
    images = {}
    for label, member in (("best", order[0]), ("median", order[len(order) // 2]), ("worst", order[-1])):
        rows = [
            _render(run, engine.population, task.step, part, torch.zeros_like(part), member.repeat(len(part)), length)
            for part in prompts.split(run.config.image.chunk)
        ]
        images[label] = torch.cat(rows)
    log.strip(task.step, images, [run.texts.prompts[index] for index in prompts.tolist()])


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
