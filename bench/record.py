"""What every record contains: the machine, the versions, the commit, and the raw samples of each summary."""

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from esengine.kernels import configs, uses_triton

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "diffusers", "transformers", "peft", "numpy")


def device_name(device: torch.device | str = "cpu") -> str:
    """The GPU's name, or the CPU's model and the cores that this process may use."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{models[0] if models else platform.machine()}, {cores} cores"


def versions() -> dict[str, str | None]:
    """Python and the packages that compute; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def commit() -> dict[str, Any]:
    """The commit that is checked out, and whether a tracked or new file differs from it; None outside a checkout.

    `ESENGINE_COMMIT` says it where there is no checkout.
    """
    if given := os.environ.get("ESENGINE_COMMIT"):
        return {"commit": given, "dirty": None}

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # results are left out: the record that is being written must not make the tree dirty
        changes = git("status", "--porcelain", "--", ".", ":!bench/results")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changes)}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def bench_environment() -> dict[str, str]:
    """Of a process that measures: this one's, with `bench/` among the places where Python looks."""
    return os.environ | {"PYTHONPATH": str(ROOT / "bench"), "OMP_NUM_THREADS": "1"}


def commit_of(python: str) -> str | None:
    """The commit of the checkout that an interpreter imports the package from; None if it is in none."""
    code = "import esengine, pathlib; print(pathlib.Path(esengine.__file__).parent)"
    return commit_in(
        subprocess.run([python, "-c", code], cwd="/", capture_output=True, text=True, check=True).stdout.strip()
    )


def commit_in(folder: str | Path) -> str | None:
    """The commit of the checkout that a folder is part of; None if it is in none."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True)
    return done.stdout.strip() or None


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Device, driver, threads, load, versions and the kernels' launch settings, as of now."""
    cuda = torch.device(device).type == "cuda"
    return {
        "device": device_name(device),
        "driver": _driver() if cuda else None,
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
        "kernel_settings": configs.describe(torch.device(device)) if uses_triton(device) else None,
        **commit(),
    }


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """Median, 20th and 80th percentile of seconds, with the samples in the order they were taken."""
    if len(samples) < 2:
        raise ValueError(f"samples: expected at least 2, got {len(samples)}")
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return {"median": statistics.median(samples), "p20": fifths[0], "p80": fifths[3], "samples": list(samples)}


def interleaved(
    variants: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, dict[str, Any]]:
    """Times every variant once a round. The order rotates by one each round, so that all meet the same load.

    Args:
        variants: what to call, by name. Each is called once before the clock starts.
        rounds: samples of each.
        clock: in seconds; `time.process_time` on a busy machine.

    Returns:
        `summary` of each, in seconds.
    """
    names = list(variants)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for call in variants.values():
        call()
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = clock()
            variants[name]()
            samples[name].append(clock() - start)
    return {name: summary(taken) for name, taken in samples.items()}


def ratio(over: dict[str, Any], under: dict[str, Any]) -> dict[str, float]:
    """Quotient of the medians, and median, 20th and 80th percentile of the quotients of each round."""
    paired = summary([a / b for a, b in zip(over["samples"], under["samples"], strict=True)])
    return {
        "of_medians": over["median"] / under["median"],
        **{f"paired_{name}": paired[name] for name in ("median", "p20", "p80")},
    }


def write(path: str | Path, record: dict[str, Any]) -> None:
    """One JSON file, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(path.name + ".tmp")
    work.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    os.replace(work, path)


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return None
