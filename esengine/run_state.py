"""What a run's checkpoint holds: the adapter and the optimizer's moments as tensors, and what they belong to."""

from pathlib import Path

import torch

from esengine.checkpoint import Checkpoint, load_latest
from esengine.config import TrainConfig
from esengine.engine import Engine
from esengine.errors import RunError

_PARTS = ("adapter", "optimizer")
_META = {
    "config": dict,
    "prompts_sha256": str,
    "model": str,
    "rewards": dict,
    "contract": int,
    "environment": dict,
    "adapter_sha256": str,
}


def tensors(engine: Engine) -> dict[str, torch.Tensor]:
    """The engine's state as fp32 tensors, `adapter/<tensor>` and `optimizer/<tensor>.<moment>`."""
    state = engine.state_dict()["population"]
    return {f"{part}/{name}": t for part in _PARTS for name, t in state[part].items()}


def latest(root: Path) -> Checkpoint:
    """The newest checkpoint under root that verifies and is a run's; those passed over are in its `skipped`.

    Raises:
        RunError: there is none.
    """
    return load_latest(root, check=_check)


def engine_state(saved: Checkpoint, config: TrainConfig) -> dict:
    """What `Engine.load_state_dict` takes, with the noise settings of `config`."""
    parts: dict[str, dict[str, torch.Tensor]] = {part: {} for part in _PARTS}
    for key, tensor in saved.tensors.items():
        part, _, name = key.partition("/")
        parts[part][name] = tensor
    noise = {"contract": saved.meta["contract"], "sigma": config.es.sigma}
    noise |= {"rank": config.es.noise_rank, "seed": config.seed}
    return {"step": saved.step, "population": {**parts, "noise": noise}}


def _check(saved: Checkpoint) -> None:
    """Raises RunError for what no run writes, such as another type or a number that is not finite."""

    def refuse(what: str, expected: str, got: object) -> RunError:
        return RunError(f"checkpoint {saved.path}: {what}: expected {expected}, got {got}")

    for name, kind in _META.items():
        if type(saved.meta.get(name)) is not kind:
            raise refuse(name, kind.__name__, type(saved.meta.get(name)).__name__)
    limit = saved.meta.get("limit")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise refuse("limit", "None or an integer of at least 1", limit)
    for name, tensor in sorted(saved.tensors.items()):
        if name.partition("/")[0] not in _PARTS:
            raise refuse(f"tensor {name}", f"a name that begins with {' or '.join(_PARTS)}", "another")
        if tensor.dtype != torch.float32:
            raise refuse(f"tensor {name}", "float32", str(tensor.dtype).removeprefix("torch."))
        if not tensor.isfinite().all():
            raise refuse(f"tensor {name}", "finite numbers", "NaN or infinity")
