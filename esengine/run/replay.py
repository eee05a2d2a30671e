"""Replays a run from its settings and its fitness log, to check its adapter. Nothing is rendered."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from esengine.base.errors import RunError
from esengine.base.progress import Progress
from esengine.base.settings_file import from_dict
from esengine.es.population import PEFT_PREFIX, Population
from esengine.models import Generator
from esengine.run.folder import checkpoint_folders, path_step
from esengine.run.loop import adapter_sha256, save_adapter
from esengine.run.prepare import IN_THE_UPDATE, attach_population
from esengine.run.settings import ReplayConfig, TrainConfig, load_run
from esengine.sampling.build import load_model, pick_dtype, take_device


@dataclass(frozen=True)
class Replayed:
    """The result of a replay.

    Attributes:
        steps: number of updates made, which is the number of logged steps.
        sha256: hash of the replayed adapter, see `adapter_sha256`.
        agreed: number of updates after which the replayed adapter equals the run's adapter bit for bit. It is less
            than `steps` if the run was killed between two checkpoints or is still running. None if they are never
            equal, or if the run has no adapter.
        parted: names of the tensors that differ after all steps; empty if `agreed` is not None. None if the run has no
            adapter.
    """

    steps: int
    sha256: str
    agreed: int | None
    parted: list[str] | None


@dataclass(frozen=True)
class Logged:
    """A logged step: its fitness, float32 [N], exact to the bit, and the settings of the run at that step."""

    fitness: torch.Tensor
    config: TrainConfig


def replay(config: ReplayConfig, progress: Progress) -> Replayed:
    """Repeat the updates in a run folder's fitness.jsonl, starting from the initial adapter that the seed determines.

    On the same kind of device with the same versions the result equals the run's adapter bit for bit.

    Raises:
        ConfigError: the folder holds no run, or the model cannot be loaded.
        RunError: the fitness log is missing, empty, damaged, of another population, or too short for the adapter; or
            the adapter cannot be read.
    """
    run = load_run(config.run_dir)
    kept = max(map(path_step, checkpoint_folders(config.run_dir / "checkpoints")), default=0)
    logged = read_fitness(config.run_dir / "fitness.jsonl", run)
    stored = _read_adapter(config.run_dir / "adapter" / "adapter_model.safetensors")
    device = take_device(run.device if config.device == "auto" else config.device)
    progress.note(f"model {run.model} on {device}, for the shapes of its layers")
    now = logged[0].config
    model = load_model(
        config.model or run.model, None if config.model else run.revision, device, pick_dtype(now.dtype, device)
    )
    population, agreed = attach_population(model, now), None
    for step, each in enumerate(logged):
        if stored is not None and next(_parted(population, stored), None) is None:
            agreed = step
        if each.config != now:
            population, now = _changed(model, population, each.config), each.config
        population.update(step=step, fitness=each.fitness)
        progress.count("steps", step + 1, len(logged))
    parted = None if stored is None else list(_parted(population, stored))
    if parted == []:
        agreed = len(logged)
    if config.out is not None:
        save_adapter(population, config.out, model.denoiser)
    if agreed is None and parted is not None and kept > len(logged):
        raise RunError(
            f"{config.run_dir / 'fitness.jsonl'}: lines are missing: it ends after step {len(logged)}, and there is a "
            f"checkpoint of step {kept}; what is logged does not make the run's adapter"
        )
    return Replayed(len(logged), adapter_sha256(population), agreed, parted if agreed is None else [])


def read_fitness(path: Path, run: TrainConfig) -> list[Logged]:
    """Steps 0, 1, ... of a fitness log. A last line without a line break is incomplete and is ignored.

    Args:
        path: path of fitness.jsonl.
        run: settings of the run. Settings in a line, those of `IN_THE_UPDATE`, replace them from its step on.

    Raises:
        RunError: the file is missing or empty, or a line was not written by a run of N members; the message gives its
            number.
        ConfigError: the settings in a line are invalid.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise RunError(f"{path}: {error.strerror or error}") from error
    found: list[Logged] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            settings = record.get("settings", {})
            if settings.keys() - IN_THE_UPDATE:
                raise ValueError("other settings")
            fitness = torch.tensor(record["fitness"], dtype=torch.float32)
            good = record["step"] == len(found) and bool(fitness.isfinite().all())
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, OverflowError):
            good = False
        if good and settings:
            run = from_dict(run, settings, f"{path}, line {number}: settings")
        if not good or fitness.shape != (run.population,):
            what = f"expected step {len(found)} and {run.population} finite numbers as fitness"
            raise RunError(f"{path}, line {number}: {what}")
        found.append(Logged(fitness, run))
    if not found:
        raise RunError(f"{path}: expected the fitness of a step at least, there is none: nothing to make again")
    return found


def _changed(model: Generator, population: Population, config: TrainConfig) -> Population:
    """The population with other settings and the same state, as after a resume with those settings."""
    state = population.state_dict()
    population.detach()
    population = attach_population(model, config)
    try:
        population.load_state_dict(state | {"noise": population.state_dict()["noise"]})
    except ValueError as error:
        raise RunError(f"fitness.jsonl: its settings change to what no run can go on with: {error}") from error
    return population


def _read_adapter(file: Path) -> dict[str, torch.Tensor] | None:
    if not file.is_file():
        return None
    try:
        return load_file(file)
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
