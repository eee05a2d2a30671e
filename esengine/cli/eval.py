"""`esengine eval`: compares base and adapters on the same prompts and latents. Prints a table or fills a folder."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from esengine.base.errors import ConfigError, RunError, of_setting
from esengine.base.files import refuse_links
from esengine.base.group import place
from esengine.base.progress import Progress
from esengine.cli.settings import EvalConfig
from esengine.evaluation.benchmarks import Benchmark, read_benchmark
from esengine.evaluation.draw import Plan, compare_entries, draw, load_entry, provenance, reported
from esengine.evaluation.entries import Entry, adapter_of, default_entries, parse_entries
from esengine.evaluation.folder import EvaluationFolder
from esengine.evaluation.statistics import Report, summarise
from esengine.models import Generator, TextEmbeddings, require_pipeline
from esengine.models.defaults import Defaults, defaults
from esengine.report import write_evaluation_page
from esengine.rewards import Weighted
from esengine.rewards.registry import load_terms
from esengine.rewards.roles import HUMAN, judges
from esengine.rewards.spec import Term, read
from esengine.rewards.trial import Trial
from esengine.run.curves import kept_curves
from esengine.run.settings import TrainConfig, load_run
from esengine.sampling.build import (
    encode,
    is_folder,
    load_model,
    pick_chunk,
    pick_dtype,
    refuse_reward_vae,
    render_settings,
    resolved,
    size_before_loading,
)
from esengine.sampling.device import take_device
from esengine.sampling.settings import ImageSettings


@dataclass(frozen=True)
class Evaluated:
    """The result of `evaluate`.

    Attributes:
        report: the statistics; None while other shards are unfinished.
        folder: folder of the images and reports; None without --out and --benchmark.
    """

    report: Report | None
    folder: Path | None


def evaluate(config: EvalConfig, progress: Progress) -> Evaluated:
    """Compare entries on prompts. Settings that the flags do not give come from the run folder.

    Raises:
        ConfigError: the adapter, model, prompts, an entry or the reward cannot be used. Nothing is written.
        RunError: the folder holds another evaluation, or another process renders the same shard.
        RewardError, RenderError: an image could not be rendered or scored. Finished images are kept.
    """
    run = load_run(config.run_dir) if config.run_dir else TrainConfig()
    name, revision = config.model or run.model, config.revision or (None if config.model else run.revision)
    model_defaults = defaults(name)
    prompts = config.prompts or (None if config.benchmark else run.eval_prompts or model_defaults.heldout)
    with of_setting(_setting_of_prompts(config), "benchmark", "prompts"):
        benchmark = read_benchmark(config.benchmark, prompts).first(config.limit)
    image = config.image or run.image
    refuse_reward_vae(image, run.image)
    adapter = config.adapter
    if not adapter and config.run_dir and (not config.entries or any(e.startswith("adapter@") for e in config.entries)):
        adapter = adapter_of(config.run_dir)
    _entries(config, image.num_steps or 1, adapter)  # reports a missing adapter before the model is looked up
    folder = _folder(config, benchmark)
    shard = _shard(config, folder)
    device = take_device(config.device)
    dtype = pick_dtype(run.dtype if config.dtype == "auto" else config.dtype, device)
    render_settings(image)
    family = require_pipeline(name, revision, image.vae)
    image = resolved(image, family)
    size = size_before_loading(image, name, revision, family)
    where = _setting_of_prompts(config)
    trial = Trial(size, benchmark.prompts, benchmark.metadata, tolerant=False, note=progress.note, setting=where)
    entries = _entries(config, image.num_steps, adapter)
    with of_setting("reward", where):
        reward = load_terms(_scored(config, run, model_defaults), device=str(device), trial=trial)
    with of_setting(_setting_of_prompts(config)):
        reward.check_prompts(benchmark.prompts, benchmark.metadata)
    for cut in reward.cut_prompts(benchmark.prompts):
        progress.note(f"warning: {cut.text()}")

    labels = ", ".join(entry.label for entry in entries)
    progress.note(f"model {name} on {device} in {str(dtype).removeprefix('torch.')}: {labels}")
    model = load_model(name, revision, device, dtype, image.vae)
    image = resolved(image, model)
    for entry in entries:
        load_entry(model, entry)  # reports a damaged adapter before any rendering
    repeats = 1 if config.benchmark else run.es.repeats
    plan = Plan(
        entries=entries,
        prompts=len(benchmark),
        repeats=repeats if config.repeats is None else config.repeats,
        seed=run.seed if config.seed is None else config.seed,
        settings=render_settings(image),
        chunk=pick_chunk(image, model),
    )
    job = _Job(model, reward, benchmark, plan, image, _record(name, model, benchmark, plan, reward, image), progress)
    return Evaluated(job.at_once(), None) if folder is None else Evaluated(job.in_folder(folder, shard), folder)


def _setting_of_prompts(config: EvalConfig) -> str:
    return "prompts" if config.prompts else "benchmark" if config.benchmark else "eval_prompts"


def _scored(config: EvalConfig, run: TrainConfig, model_defaults: Defaults) -> list[Term]:
    """The rewards of an evaluation: those of --reward, else the benchmark's, else the run's with its held-out rewards.

    The model's own benchmark on a run of that model uses the last of these: the run's rewards with their weights, and
    the model's other judges with weight 0.
    """
    if config.reward:
        terms = read(config.reward)
        if HUMAN in {term.name for term in terms}:
            problem = f"expected rewards that score one image, got {HUMAN}; to compare images yourself: esengine judge"
            raise ConfigError(problem, setting="reward")
        return terms
    own_run = config.run_dir and model_defaults.watches and defaults(run.model).watches
    if config.benchmark and not (config.benchmark == model_defaults.benchmark_name and own_run):
        return read(model_defaults.benchmark(config.benchmark))
    optimised = read(run.reward or model_defaults.reward)
    if optimised[0].name == HUMAN:  # a person cannot score one image
        optimised = [replace(term, weight=1.0) for term in read(run.heldout_reward)]
    own_prompts = not config.benchmark and bool(config.prompts or run.eval_prompts)
    return optimised + judges(model_defaults, optimised, own_prompts)


@dataclass(frozen=True)
class _Job:
    """An evaluation that is ready to render."""

    model: Generator
    reward: Weighted
    benchmark: Benchmark
    plan: Plan
    image: ImageSettings
    record: dict[str, Any]
    progress: Progress

    def at_once(self) -> Report:
        """Render and score everything, without keeping the images."""
        return compare_entries(
            self.model,
            self._texts(),
            self.reward,
            self.plan,
            benchmark=self.benchmark,
            settings=self.record["settings"],
            progress=lambda done, total: self.progress.count("images", done, total),
        )

    def in_folder(self, path: Path, shard: tuple[int, int]) -> Report | None:
        """Render the missing images of this shard. If no shard lacks an image, also write the report and the page.

        Returns:
            The report; None if other shards are unfinished.
        """
        with EvaluationFolder.open(path, shard) as folder:
            with folder.alone():  # one process encodes, the others find it in the cache
                record = folder.begin(self.record, keep=() if self.image.chunk else ("chunk",))
                try:
                    folder.keep_curves(lambda: kept_curves(self.plan.entries))
                except RunError as error:  # it concerns a run folder, not this one
                    self.progress.note(f"warning: the page will have no curves of training: {error}")
                texts = self._texts()
            plan = replace(self.plan, chunk=record["settings"]["chunk"])
            work = folder.missing(plan, self.progress)
            done, total = 0, sum(len(rows) for _, rows in work)
            part = f", shard {shard[0]}/{shard[1]}" if shard[1] > 1 else ""
            everything = len(plan.entries) * plan.prompts * plan.repeats
            self.progress.note(f"{path}: {total} of {everything} images to draw{part}")
            drawn = draw(self.model, texts, self.reward, plan, work, self.benchmark.metadata)
            for count in folder.store(drawn, self.benchmark):
                done += count
                self.progress.count("images", done, total)
            with folder.alone():
                records = folder.merge(plan, self.progress)
                if records is None:
                    return None
                report = summarise(self.benchmark, record["entries"], record["scores"], records, record["settings"])
                folder.publish(report)
                write_evaluation_page(folder.where())
        return report

    def _texts(self) -> TextEmbeddings:
        (texts,) = encode(self.model, [self.benchmark.prompts], self.image, self.progress)
        return texts


def _entries(config: EvalConfig, steps: int, adapter: Path | None) -> tuple[Entry, ...]:
    if config.entries:
        return parse_entries(config.entries, adapter)
    if adapter is None and not config.benchmark:
        raise ConfigError("entries: expected --entries, or the adapter of --run-dir or --adapter, got none of them")
    return default_entries(steps, adapter, two_steps=config.benchmark is not None)


def _folder(config: EvalConfig, benchmark: Benchmark) -> Path | None:
    if config.out is not None or config.benchmark is None:
        return config.out
    run = config.run_dir or Path()
    folder = run / "evaluations" / benchmark.name
    refuse_links(f"run folder {run}", [folder.parent, folder])
    return folder


def _shard(config: EvalConfig, folder: Path | None) -> tuple[int, int]:
    """Shard (k, n) of --shard. Without the flag, this process's place under torchrun."""
    k, n = map(int, config.shard.split("/")) if config.shard else place()
    if folder is None and n > 1:
        raise ConfigError(f"shard: {n} processes need a shared folder: give --out")
    return k, n


def _record(
    name: str, model: Generator, benchmark: Benchmark, plan: Plan, reward: Weighted, image: ImageSettings
) -> dict:
    """The contents of evaluation.json: everything that affects a pixel or a score."""
    return {
        "benchmark": benchmark.name,
        "prompts": len(benchmark),
        "prompts_sha256": benchmark.sha256(),
        "entries": [entry.label for entry in plan.entries],
        "scores": reported(reward),
        "settings": {
            "model": Path(name).name if is_folder(name) else name,
            "instruction": image.instruction,
            **provenance(model, plan, reward),
        },
    }
