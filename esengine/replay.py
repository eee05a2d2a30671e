"""A run made again from its settings and its fitness log: nothing is rendered, so anyone can check an adapter."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from esengine.config import ReplayConfig, load_run
from esengine.errors import RunError
from esengine.loop import adapter_sha256, save_adapter
from esengine.population import PEFT_PREFIX, Population
from esengine.progress import Progress
from esengine.setup import load_model, pick_device, pick_dtype
from esengine.train import attach_population


@dataclass(frozen=True)
class Replayed:
    """What a replay found.

    Attributes:
        steps: so many updates were made.
        sha256: of the adapter they make, see `adapter_sha256`.
        parted: names of tensors that differ from the run's adapter; None if it has none to compare with.
    """

    steps: int
    sha256: str
    parted: list[str] | None


def replay(config: ReplayConfig, progress: Progress) -> Replayed:
    """Make the updates of a run folder's fitness.jsonl again, from the adapter that its seed gives.

    The result is that of the run bit for bit on the same kind of device with the same versions.

    Raises:
        ConfigError: no run there, or a model that cannot be loaded.
        RunError: the fitness log is missing, damaged, or not of this population.
    """
    run = load_run(config.run_dir)
    fitness = read_fitness(config.run_dir / "fitness.jsonl", run.population)
    device = pick_device(run.device if config.device == "auto" else config.device)
    progress.note(f"model {run.model} on {device}, for the shapes of its layers")
    model = load_model(config.model or run.model, run.revision, device, pick_dtype(run.dtype, device))
    population = attach_population(model, run)
    for step, each in enumerate(fitness):
        population.update(step=step, fitness=each)
        progress.count("steps", step + 1, len(fitness))
    if config.out is not None:
        save_adapter(population, config.out)
    return Replayed(len(fitness), adapter_sha256(population), _parted(population, config.run_dir / "adapter"))


def read_fitness(path: Path, size: int) -> list[torch.Tensor]:
    """float32 [N] of steps 0, 1, ..., every bit as it was.

    Raises:
        RunError: the file is missing, or a line is not what a run of N members writes; with its number.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise RunError(f"{path}: {error.strerror or error}") from error
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            fitness = torch.tensor(record["fitness"], dtype=torch.float32)
            good = record["step"] == len(found) and fitness.shape == (size,) and bool(fitness.isfinite().all())
        except (ValueError, TypeError, KeyError, RecursionError):
            good = False
        if not good:
            raise RunError(f"{path}, line {number}: expected step {len(found)} and {size} finite numbers as fitness")
        found.append(fitness)
    return found


def _parted(population: Population, adapter: Path) -> list[str] | None:
    file = adapter / "adapter_model.safetensors"
    if not file.is_file():
        return None
    stored = load_file(file)
    mine = {f"{PEFT_PREFIX}{name}": each.detach().cpu() for name, each in population.lora().items()}
    names = sorted(stored.keys() | mine.keys())
    return [name for name in names if not (name in stored and name in mine and torch.equal(stored[name], mine[name]))]
