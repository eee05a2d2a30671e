"""Describes the environment of a result: versions, devices, and which kernels are in use and why."""

import importlib.metadata
import json
import platform

import torch

import esengine
from esengine.base.errors import ConfigError
from esengine.kernels import CONTRACT, configs, uses_triton
from esengine.kernels.noise import INTERPRET
from esengine.sampling.device import pick_device

PACKAGES = ("torch", "triton", "diffusers", "transformers", "peft", "safetensors", "numpy", "pillow")


def describe() -> dict[str, str]:
    """Facts by name, for display and for a result's record.

    Raises:
        ConfigError: the file of launch settings is not usable.
    """
    facts = {"esengine": esengine.__version__, "python": platform.python_version(), "system": platform.platform()}
    for package in PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not installed"
    device = pick_device("auto")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["device"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        facts["cuda"] = str(torch.version.cuda)
    else:
        facts["device"] = f"cpu, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    facts["kernels"] = _kernels(device)
    facts["fused blocks"] = _fused(device)
    facts["kernel settings"] = _settings(device)
    facts["noise contract"] = f"v{CONTRACT}"
    return facts


def to_json(facts: dict[str, str]) -> str:
    return json.dumps(facts, indent=1)


def _settings(device: torch.device) -> str:
    """The file of launch settings, its hash, and the hash of the settings that determine the order of sums."""
    if not uses_triton(device):
        return "none: no Triton kernels in use"
    try:
        used = configs.describe(device)
    except ValueError as error:
        raise ConfigError(f"kernel settings: {error}") from None
    return f"{used['file']} {used['sha256']}, order of sums {used['order']}"


def _fused(device: torch.device) -> str:
    """Whether a model's blocks can run fused here. A run's plan states this for its model."""
    if not uses_triton(device):
        return f"none: they need the Triton kernels ({_kernels(device)})"
    return "of SANA-Sprint in bfloat16 or float32; `esengine train` prints why where a model's blocks cannot"


def _kernels(device: torch.device) -> str:
    if uses_triton(device):
        return "triton, under its interpreter" if INTERPRET else "triton: there is a CUDA device and Triton"
    if device.type == "cuda":
        return "batched torch: triton is not installed (pip install 'eggroll-esengine[gpu]')"
    return "batched torch: there is no CUDA device"
