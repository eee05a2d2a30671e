"""Replays a run from its journal, to check its adapter. Nothing is rendered."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from esengine.base.errors import ConfigError, RunError
from esengine.base.files import utf8_name
from esengine.base.progress import Progress
from esengine.base.settings_file import from_dict
from esengine.es.population import PEFT_PREFIX, Population
from esengine.evaluation.entries import ADAPTER
from esengine.models import Generator
from esengine.run import journal
from esengine.run.folder import INIT_ADAPTER, KEPT, checkpoint_folders, path_step
from esengine.run.journal import IN_THE_UPDATE, Journal, Saved, Start, Step
from esengine.run.kept import EMA, Kept
from esengine.run.prepare import attach_population, start_population
from esengine.run.saving import adapter_sha256, card_of, save_adapter
from esengine.run.settings import ReplayConfig, TrainConfig, load_run
from esengine.sampling.build import load_model, pick_dtype
from esengine.sampling.device import take_device

WEIGHTS = "adapter_model.safetensors"
_OF_A_POPULATION = [name for name in IN_THE_UPDATE if name != "init_adapter"]
"""Settings that a population is attached with. The first adapter is not among them."""


@dataclass(frozen=True)
class Replayed:
    """The result of a replay.

    Attributes:
        steps: number of updates that give the run's adapter: the recorded steps, or fewer if the held-out guard rolled
            the adapter back.
        sha256: hash of the replayed adapter, see `adapter_sha256`.
        agreed: number of updates after which the replayed adapter equals the run's adapter bit for bit. It is less
            than `steps` if the run was killed between two checkpoints or is still running. None if they are never
            equal, or if the run has no adapter.
        parted: names of the tensors that differ after all steps; empty if `agreed` is not None. None if the run has no
            adapter.
        kept: for each other adapter of the run, by its folder's name, the number of updates after which the replayed
            one equals it; None if they are never equal.
    """

    steps: int
    sha256: str
    agreed: int | None
    parted: list[str] | None
    kept: dict[str, int | None]


def replay(config: ReplayConfig, progress: Progress) -> Replayed:
    """Repeat the updates in a run's journal, starting from the initial adapter that the seed determines.

    On the same kind of device with the same versions the result equals the run's adapter bit for bit.

    Raises:
        ConfigError: the folder holds no run, or the model cannot be loaded.
        RunError: the journal is damaged, has no step, or is too short for the adapter; or the adapter cannot be read.
    """
    run = load_run(config.run_dir)
    found = journal.read(config.run_dir / journal.NAME)
    if not found.done:
        raise RunError(f"{found.path}: expected at least one step, there is none: nothing to replay")
    stored = {name: _read_adapter(config.run_dir / name / WEIGHTS) for name in (ADAPTER, *KEPT.values())}
    device = take_device(run.device if config.device == "auto" else config.device)
    progress.note(f"model {run.model} on {device}, for the shapes of its layers")
    first = _settings(found.of(Start)[0], found)
    model = load_model(
        config.model or run.model, None if config.model else run.revision, device, pick_dtype(first.dtype, device)
    )
    first = _with_kept_adapter(first, config.run_dir, found.path)
    end = found.ended.adapter_step if found.ended else found.done
    agreed: dict[str, int | None] = {name: None for name, each in stored.items() if each is not None}
    for done, copies in _states(model, first, found):
        for name, parted in _compared(copies, stored):
            if parted is None and not (name == ADAPTER and done > end):
                agreed[name] = done
        if done == end:
            sha256 = adapter_sha256(copies.population)
            parted = None if stored[ADAPTER] is None else list(_parted(copies.population, stored[ADAPTER]))
            if config.out is not None:
                save_adapter(copies.population, config.out, model.denoiser, **card_of(found.until(end), model))
        progress.count("steps", done, found.done)
    equal = agreed.pop(ADAPTER, None)
    kept = max(map(path_step, checkpoint_folders(config.run_dir / "checkpoints")), default=0)
    if equal is None and parted is not None and kept > found.done:
        raise RunError(
            f"{found.path}: lines are missing: it ends after step {found.done}, but there is a checkpoint of step "
            f"{kept}; replay does not give the run's adapter"
        )
    return Replayed(end, sha256, equal, parted if equal is None else [], agreed)


def _states(model: Generator, config: TrainConfig, run: Journal) -> Iterator[tuple[int, Kept]]:
    """The population after 0, 1, 2, ... steps, with the moving average. `config` is that of the first step."""
    population = _started(model, config)
    for saved in run.of(Saved):
        if saved.step == 0 and saved.adapter_sha256 != adapter_sha256(population):
            what = f"{config.init_adapter} has changed since" if config.init_adapter else "the initial adapter differs"
            raise RunError(f"{run.path}: expected the adapter {saved.adapter_sha256} before the first step: {what}")
    copies = Kept(population, decay=config.ema)
    yield 0, copies
    for step, then in _steps(run):
        if any(getattr(then, name) != getattr(config, name) for name in _OF_A_POPULATION):
            copies.population = population = _changed(model, population, then, run.path)
        if then.ema != copies.decay:
            copies.decay = then.ema
            copies.drop(EMA)
        config = then
        population.update(step=step.step, fitness=torch.tensor(step.fitness, dtype=torch.float32))
        if config.ema:
            copies.average(step.step + 1)
        yield step.step + 1, copies


def _compared(copies: Kept, stored: Mapping[str, dict[str, torch.Tensor] | None]) -> Iterator[tuple[str, str | None]]:
    """The name of each stored adapter, and its first tensor that differs from the replayed adapter, or None."""
    for name, tensors in stored.items():
        if tensors is None:
            continue
        if name != KEPT[EMA]:
            yield name, next(_parted(copies.population, tensors), None)
        elif EMA in copies:
            with copies.in_place(EMA) as population:
                yield name, next(_parted(population, tensors), None)


def _with_kept_adapter(config: TrainConfig, run_dir: Path, path: Path) -> TrainConfig:
    """The settings with the run's copy of the adapter that it started from in place of the original."""
    kept, given = run_dir / INIT_ADAPTER, config.init_adapter
    if given is None:
        return config
    if kept.is_dir():
        return dataclasses.replace(config, init_adapter=kept)
    if not given.exists():
        raise RunError(f"{path}: the run started from {given}; neither that nor its copy {kept} exists: restore one")
    return config


def _started(model: Generator, config: TrainConfig) -> Population:
    """The population before the first step."""
    try:
        return start_population(model, config)
    except ConfigError as error:
        if error.setting != "init_adapter":
            raise
        raise RunError(f"the adapter that the run started from: {error.problem}: restore it") from error


def _settings(start: Start, run: Journal) -> TrainConfig:
    return from_dict(TrainConfig(), start.settings, f"{run.path}: settings")


def _steps(run: Journal) -> Iterator[tuple[Step, TrainConfig]]:
    """Each step with the settings that it was made with."""
    for record in run.records:
        if isinstance(record, Start):
            config = _settings(record, run)
        elif isinstance(record, Step):
            yield record, config


def _changed(model: Generator, population: Population, config: TrainConfig, path: Path) -> Population:
    """The population with other settings and the same state, as after a resume with those settings."""
    state = population.state_dict()
    population.detach()
    population = attach_population(model, config)
    try:
        population.load_state_dict(state | {"noise": population.state_dict()["noise"]})
    except ValueError as error:
        raise RunError(f"{path}: a run cannot continue with its changed settings: {error}") from error
    return population


def _read_adapter(file: Path) -> dict[str, torch.Tensor] | None:
    if not file.is_file():
        return None
    try:
        with utf8_name(file) as name:
            return load_file(name)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{file}: cannot be read, so there is nothing to compare with: {error}") from error


def _parted(population: Population, stored: dict[str, torch.Tensor]) -> Iterator[str]:
    """Names of the tensors that differ in any bit or exist in only one of the two."""
    names = [f"{PEFT_PREFIX}{name}.lora_{side}.weight" for name in population.layers for side in "AB"]
    yield from sorted(stored.keys() ^ set(names))
    for name, layer in population.layers.items():
        for side, mine in zip("AB", layer.lora(), strict=True):
            key = f"{PEFT_PREFIX}{name}.lora_{side}.weight"
            if key in stored and not _same(stored[key], mine.detach().cpu()):
                yield key


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
