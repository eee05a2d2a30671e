"""What the training stages share: a loop that goes on where it was stopped, a learning rate, an average of weights.

Several processes may train together (`torch.distributed`): each draws a whole batch, works on its `share` of it, and
`mean_gradients` makes their steps the same.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import distributed

Stateful = torch.nn.Module | torch.optim.Optimizer
Report = Callable[[str, int, int, dict[str, float]], None]
"""Called with a stage, steps done, steps in all, and the means of what was measured since the last call."""


def train(
    stage: str,
    folder: Path,
    step: Callable[[int], dict[str, torch.Tensor]],
    *,
    steps: int,
    state: Mapping[str, Stateful],
    seed: int,
    every: int = 50,
    save_seconds: float = 120.0,
    report: Report | None = None,
) -> None:
    """Runs a stage's steps, from the last checkpoint if there is one.

    A step draws all its randomness from (seed, its number), so a run that was stopped and goes on gives the same
    weights as one that was not.

    Args:
        stage: Names the files: `<stage>.safetensors`, the checkpoint, and `<stage>.jsonl`, the curve.
        folder: Where they lie.
        step: Does one step of this number and returns scalars to average.
        steps: How many there are.
        state: What to save, by name.
        seed: Seeds torch's generator before each step.
        every: Steps between two reports.
        save_seconds: Time between two checkpoints.
        report: Is told of the progress.

    Raises:
        FloatingPointError: Something measured is not finite; the checkpoint is older than that.
    """
    done = load(folder / f"{stage}.safetensors", state)
    sums, saved, began = {}, time.monotonic(), time.monotonic()
    for i in range(done, steps):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((seed << 32) + i)
            measured = step(i)
        for name, value in measured.items():
            sums[name] = sums.get(name, 0.0) + float(value)
        if not all(map(math.isfinite, sums.values())):
            raise FloatingPointError(f"{stage}: step {i}: {measured}")
        if _rank() > 0:
            continue
        count = (i + 1 - done) % every or every
        if count == every or i + 1 == steps:
            means = {name: value / count for name, value in sums.items()}
            means["seconds"] = time.monotonic() - began
            with (folder / f"{stage}.jsonl").open("a") as log:
                log.write(json.dumps({"step": i + 1, **means}) + "\n")
            if report is not None:
                report(stage, i + 1, steps, means)
            sums, began = {}, time.monotonic()
        if time.monotonic() - saved > save_seconds or i + 1 == steps:
            save(folder / f"{stage}.safetensors", state, i + 1)
            saved = time.monotonic()


def last_values(folder: Path, stage: str) -> dict[str, Any]:
    """Of a stage's curve: steps, seconds on the clock, and the last means."""
    rows = [json.loads(line) for line in (folder / f"{stage}.jsonl").read_text().splitlines()]
    last = {name: value for name, value in rows[-1].items() if name not in ("step", "seconds")}
    return {"steps": rows[-1]["step"], "seconds": round(sum(each["seconds"] for each in rows)), "last": last}


def save(path: Path, state: Mapping[str, Stateful], done: int) -> None:
    """Writes a checkpoint; it appears whole or not at all."""
    tensors = {}
    for name, each in state.items():
        found = each.state_dict()
        if isinstance(each, torch.optim.Optimizer):
            found = {f"{i}.{key}": value for i, kept in found["state"].items() for key, value in kept.items()}
        tensors.update({f"{name}.{key}": value.contiguous() for key, value in found.items()})
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata={"done": str(done)})
    os.replace(part, path)


def load(path: Path, state: Mapping[str, Stateful]) -> int:
    """Reads a checkpoint into `state`. Returns the steps done; 0 without one."""
    if not path.is_file():
        return 0
    with safe_open(path, "pt") as stored:
        names = set(stored.keys())
        for name, each in state.items():
            if isinstance(each, torch.optim.Optimizer):
                for i, parameter in enumerate(each.param_groups[0]["params"]):
                    for key in ("step", "exp_avg", "exp_avg_sq"):
                        if f"{name}.{i}.{key}" not in names:  # a parameter without a gradient so far
                            continue
                        value = stored.get_tensor(f"{name}.{i}.{key}")
                        # fused AdamW wants the parameter's own memory order
                        each.state[parameter][key] = (
                            value if key == "step" else torch.empty_like(parameter).copy_(value).detach()
                        )
            else:
                each.load_state_dict({key: stored.get_tensor(f"{name}.{key}") for key in each.state_dict()})
        return int(stored.metadata()["done"])


def rate(i: int, steps: int, *, peak: float = 1.0, warmup: int = 100, floor: float = 0.02) -> float:
    """Learning rate of step i: linear to `peak` in `warmup` steps, then a cosine down to `floor` of it."""
    if i < warmup:
        return peak * (i + 1) / warmup
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * (i - warmup) / max(1, steps - warmup))) / 2)


def set_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value


def descend(optimizers: Sequence[torch.optim.Optimizer], loss: torch.Tensor, share_of_peak: float) -> torch.Tensor:
    """One step down the loss, whose gradient is the mean over the processes, clipped to a norm of 1.

    Args:
        optimizers: Each has some of the weights; its `defaults` hold the peak of its learning rate.
        loss: A scalar.
        share_of_peak: The learning rate as a share of that peak.

    Returns:
        The norm before it was clipped.
    """
    weights = [weight for each in optimizers for group in each.param_groups for weight in group["params"]]
    for each in optimizers:
        each.zero_grad()
        set_rate(each, share_of_peak * each.defaults["lr"])
    loss.backward()
    mean_gradients(weights)
    norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
    for each in optimizers:
        each.step()
    return norm


def share(batch: torch.Tensor) -> torch.Tensor:
    """This process's rows of a batch [B, ...]."""
    return batch.tensor_split(distributed.get_world_size())[_rank()] if distributed.is_initialized() else batch


def mean_gradients(parameters: Iterable[torch.Tensor]) -> None:
    """Replaces gradients by their mean over the processes."""
    if not distributed.is_initialized():
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def _rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


@torch.no_grad()
def average(mean: torch.nn.Module, module: torch.nn.Module, i: int, *, half_life: float) -> None:
    """Moves `mean` towards `module`: an exponential average whose memory is at most a fifth of the i steps so far."""
    weight = 1 - 0.5 ** (1 / min(half_life, 1 + i / 5))
    torch._foreach_lerp_(list(mean.parameters()), list(module.parameters()), weight)
