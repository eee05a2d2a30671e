"""The contents of a run's checkpoint: the adapter, the optimizer's moments, and what else the next step needs."""

from collections.abc import Collection
from pathlib import Path

import torch

from esengine.base.errors import RunError
from esengine.es.engine import Engine
from esengine.run.checkpoint import Checkpoint, load_latest
from esengine.run.journal import Start
from esengine.run.kept import PART, Kept
from esengine.run.settings import MAY_CHANGE, MAY_CHANGE_BELOW, TrainConfig, differences, to_dict

_PARTS = ("adapter", "optimizer", PART)
_META = {"contract": int, "adapter_sha256": str, "steps_sha256": str}
LIMITS = ("limit", "scoring_limit")
"""Names of the two batch limits: images in one forward, images scored together. None before any out-of-memory."""


def tensors(engine: Engine, kept: Kept) -> dict[str, torch.Tensor]:
    """The state as fp32 tensors, `adapter/<tensor>`, `optimizer/<tensor>.<moment>` and `kept/<kind>/<tensor>`."""
    state = engine.state_dict()["population"]
    parts = {f"{part}/{name}": t for part in ("adapter", "optimizer") for name, t in state[part].items()}
    return parts | kept.tensors()


def latest(root: Path) -> Checkpoint:
    """The newest valid checkpoint of a run under root. Its `skipped` lists the newer ones that are not valid.

    Raises:
        RunError: there is no valid checkpoint.
    """
    return load_latest(root, check=_check)


def engine_state(saved: Checkpoint, config: TrainConfig) -> dict:
    """The state for `Engine.load_state_dict`: step and tensors of the checkpoint, noise settings of `config`."""
    parts: dict[str, dict[str, torch.Tensor]] = {part: {} for part in _PARTS}
    for key, tensor in saved.tensors.items():
        part, _, name = key.partition("/")
        parts[part][name] = tensor
    noise = {"contract": saved.meta["contract"], "sigma": config.es.sigma}
    noise |= {"rank": config.es.noise_rank, "seed": config.seed}
    return {"step": saved.step, "population": {**parts, "noise": noise}}


def changes(before: Start, now: Start, free: Collection[str] = (*MAY_CHANGE, *MAY_CHANGE_BELOW)) -> list[str]:
    """Differences between two starts of a run or of its processes, as text. Settings in `free` are not compared.

    A setting that `before` does not have counts as its default.
    """
    config = to_dict(TrainConfig())
    for name, value in before.settings.items():
        section = config.get(name)
        config[name] = section | value if isinstance(section, dict) and isinstance(value, dict) else value
    old, new = before.identity, now.identity
    found = differences(config, now.settings, free)
    found += differences({"reward": old["rewards"]}, {"reward": new["rewards"]}, free)
    for name, what in (("model", "model: its weights"), ("prompts_sha256", "prompts: the file's contents")):
        if old[name] != new[name]:
            found.append(what)
    columns = old.get("metadata_sha256")  # runs of older versions have none
    if columns not in (None, new.get("metadata_sha256")) and old["prompts_sha256"] == new["prompts_sha256"]:
        found.append("prompts: the file's columns besides the prompt")
    return found


def _check(saved: Checkpoint) -> None:
    """Raise RunError for contents that no run writes, such as a wrong type or a number that is not finite."""

    def refuse(what: str, expected: str, got: object) -> RunError:
        return RunError(f"checkpoint {saved.path}: {what}: expected {expected}, got {got}")

    for name, kind in _META.items():
        if type(saved.meta.get(name)) is not kind:
            raise refuse(name, kind.__name__, type(saved.meta.get(name)).__name__)
    for name in LIMITS:
        limit = saved.meta.get(name)
        if limit is not None and (type(limit) is not int or limit < 1):
            raise refuse(name, "None or an integer of at least 1", limit)
    for name, tensor in sorted(saved.tensors.items()):
        if name.partition("/")[0] not in _PARTS:
            raise refuse(f"tensor {name}", f"a name that begins with {' or '.join(_PARTS)}", "another")
        if tensor.dtype != torch.float32:
            raise refuse(f"tensor {name}", "float32", str(tensor.dtype).removeprefix("torch."))
        if not tensor.isfinite().all():
            raise refuse(f"tensor {name}", "finite numbers", "NaN or infinity")
