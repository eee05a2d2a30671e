"""Chooses the device by its name. This module imports torch alone, so that `esengine env` is fast."""

import os

import torch

from esengine.base.errors import ConfigError


def pick_device(name: str) -> torch.device:
    """`auto` selects a GPU if there is one. Under torchrun, `cuda` without a number selects this process's GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or not (index.isdecimal() or name == kind):
        raise ConfigError(f"device: expected auto, cpu, cuda or cuda:N, got '{name}'")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device: '{name}' is not there; torch {torch.__version__} sees {torch.cuda.device_count()} GPUs"
        )
    return torch.device(name)


def take_device(name: str) -> torch.device:
    """As `pick_device`. A GPU with a number also becomes torch's current device, which launches the kernels."""
    device = pick_device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device
