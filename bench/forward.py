"""The price of a population: one batched forward with every row its own member, over the plain forward of that batch.

    python bench/forward.py [--json bench/results/cpu_forward.json]

Tiny SANA-Sprint's transformer, fp32, the reference run's eight targets, LoRA r = 2, noise rank 1. In one run, turn about:

    plain       the same batch through the transformer that has no adapter
    adapter     the same batch through PEFT's unperturbed adapter
    population  every row its own member: `with population.perturbed(...)`, noise generation included
    noise       entering `perturbed` alone
    loop        each member in turn: its LoRA copied into PEFT's, its rows rendered; the weights lie ready in memory
    loop_noise  the same with the member's weights built in the loop by `member_state_dict`

First of all, population must equal loop to 1e-5; no figure is taken otherwise. Then the peak memory of a step at a fixed
chunk, for N members from 64 to 65536, each N in processes of its own.
"""

import argparse
import copy
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig
from record import environment, interleaved, ratio, write

import esengine
from esengine.models import SanaSprint, build_tiny
from esengine.models.tiny import NAME
from esengine.population import PEFT_PREFIX

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "linear_1", "linear_2", "proj_out", "linear"]
LAYOUTS = {"64 members x 1 image": (64, 1), "8 members x 8 images": (8, 8)}
MEMORY_MEMBERS = (64, 1024, 16384, 65536)
CHUNK = 64
TEXT_TOKENS = 40
TOLERANCE = 1e-5
STEP = 3


def load(folder: Path) -> torch.nn.Module:
    """Tiny SANA-Sprint's transformer, frozen, fp32."""
    return SanaSprint.from_pretrained(folder / NAME).transformer


def attach(transformer: torch.nn.Module) -> esengine.Population:
    """A population with the reference run's settings, whose B is no longer zero."""
    config = LoraConfig(r=2, lora_alpha=8, target_modules=TARGETS)
    population = esengine.attach(transformer, config, esengine.Noise(sigma=1e-2, rank=1, seed=0))
    population.update(step=0, fitness=torch.linspace(-1, 1, 64))
    return population


def inputs(transformer: torch.nn.Module, batch: int) -> dict:
    """One denoising step's arguments for `batch` rows."""
    config, generator = transformer.config, torch.Generator().manual_seed(0)
    size, text = config.sample_size, config.caption_channels
    return {
        "hidden_states": torch.randn(batch, config.in_channels, size, size, generator=generator),
        "encoder_hidden_states": torch.randn(batch, TEXT_TOKENS, text, generator=generator),
        "encoder_attention_mask": torch.ones(batch, TEXT_TOKENS, dtype=torch.int64),
        "guidance": torch.full((batch,), 0.45),
        "timestep": torch.full((batch,), 1.0),
        "return_dict": False,
    }


def rows(arguments: dict, chosen: slice) -> dict:
    return {name: value[chosen] if torch.is_tensor(value) else value for name, value in arguments.items()}


@torch.no_grad()
def measure(folder: Path, members: int, images: int, rounds: int) -> dict:
    """One layout: the correctness check, then every variant turn about.

    Returns:
        `error` of population against loop, seconds of each variant, and their ratios.

    Raises:
        RuntimeError: population and loop differ by more than the tolerance.
    """
    transformer = load(folder)
    plain, looped = copy.deepcopy(transformer), copy.deepcopy(transformer)
    population, loop_parameters = attach(transformer), attach(looped).parameters()
    arguments = inputs(plain, members * images)
    ids = torch.arange(members).repeat_interleave(images)

    def render_population():
        with population.perturbed(step=STEP, members=ids):
            return transformer(**arguments)[0]

    def noise_alone():
        with population.perturbed(step=STEP, members=ids):
            pass

    def render_member(member: int, state: dict):
        for name, parameter in loop_parameters.items():
            parameter.copy_(state[PEFT_PREFIX + name])
        return looped(**rows(arguments, slice(member * images, (member + 1) * images)))[0]

    def member_state(member: int):
        return population.member_state_dict(step=STEP, member=member)

    states = [member_state(member) for member in range(members)]
    variants = {
        "plain": lambda: plain(**arguments)[0],
        "adapter": lambda: transformer(**arguments)[0],
        "population": render_population,
        "noise": noise_alone,
        "loop": lambda: torch.cat([render_member(member, state) for member, state in enumerate(states)]),
        "loop_noise": lambda: torch.cat([render_member(member, member_state(member)) for member in range(members)]),
    }
    got, expected = variants["population"](), variants["loop"]()
    error = ((got - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).max().item()
    if not error <= TOLERANCE:
        raise RuntimeError(f"population: expected loop to {TOLERANCE:g} relative, got {error:g}; nothing was timed")
    signal = ((got - variants["adapter"]()).norm() / expected.norm()).item()

    seconds = interleaved(variants, rounds)
    pairs = {
        "population / plain": ("population", "plain"),
        "population / adapter": ("population", "adapter"),
        "adapter / plain": ("adapter", "plain"),
        "loop / population": ("loop", "population"),
        "loop_noise / population": ("loop_noise", "population"),
    }
    return {
        "members": members,
        "images_per_member": images,
        "relative_error": error,
        "relative_perturbation": signal,
        "seconds": seconds,
        "ratios": {name: ratio(seconds[over], seconds[under]) for name, (over, under) in pairs.items()},
    }


@torch.no_grad()
def step_peaks(folder: Path, members: int) -> dict[str, int]:
    """Peak resident bytes of this process after rendering chunks of N members, and after the update from all N.

    The chunks are the first, the last and two between, so that a render is the same work for every N.
    """
    population = attach(load(folder))
    arguments = inputs(population.module, CHUNK)
    for first in (0, members // 3 // CHUNK * CHUNK, members // 2 // CHUNK * CHUNK, members - CHUNK):
        with population.perturbed(step=STEP, members=torch.arange(first, first + CHUNK)):
            population.module(**arguments)
    forward = _peak_bytes()
    start = time.perf_counter()
    population.update(step=STEP, fitness=torch.linspace(-1, 1, members))
    return {"forward": forward, "update": _peak_bytes(), "update_seconds": time.perf_counter() - start}


def measure_memory(folder: Path, repeats: int) -> dict:
    """`step_peaks` for each N, the median of processes taken turn about, and what each further member costs."""
    taken: dict[int, list[dict]] = {members: [] for members in MEMORY_MEMBERS}
    for _ in range(repeats):
        for members in MEMORY_MEMBERS:
            command = [sys.executable, __file__, "--folder", str(folder), "--peaks", str(members)]
            taken[members].append(json.loads(subprocess.run(command, capture_output=True, check=True).stdout))
    peaks = {
        members: {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        for members, runs in taken.items()
    }
    few, many = MEMORY_MEMBERS[0], MEMORY_MEMBERS[-1]
    population = attach(load(folder))
    numbers = population.parameters().values()
    return {
        "chunk": CHUNK,
        "peak_bytes": peaks,
        "bytes_per_further_member": {
            name: (peaks[many][name] - peaks[few][name]) / (many - few) for name in ("forward", "update")
        },
        "stored_member_bytes": sum(parameter.nbytes for parameter in numbers),
        "runs": taken,
    }


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the record there")
    parser.add_argument("--rounds", type=int, default=40, help="samples of each variant (default 40)")
    parser.add_argument("--memory-runs", type=int, default=3, help="processes for each N (default 3, 0 for none)")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--peaks", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peaks:
        print(json.dumps(step_peaks(options.folder, options.peaks)))
        return
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        build_tiny(folder / NAME)
        record = {
            "benchmark": "forward",
            "model": f"{NAME} transformer, fp32, 8 x 8 latents, {TEXT_TOKENS} text tokens",
            "adapter": {"r": 2, "lora_alpha": 8, "noise_rank": 1, "sigma": 1e-2, "targets": TARGETS},
            "environment": environment(),
            "layouts": {},
        }
        for name, (members, images) in LAYOUTS.items():
            result = record["layouts"][name] = measure(folder, members, images, options.rounds)
            print(f"{name}: population equals loop to {result['relative_error']:.1e}")
            for variant, taken in result["seconds"].items():
                print(f"  {variant:11}", "  ".join(f"{p} {1e3 * taken[p]:7.1f} ms" for p in ("median", "p20", "p80")))
            for pair, taken in result["ratios"].items():
                low, high = taken["paired_p20"], taken["paired_p80"]
                print(f"  {pair:24} {taken['of_medians']:.3f}  (by round {low:.3f} to {high:.3f})")
        if options.memory_runs:
            memory = record["memory"] = measure_memory(folder, options.memory_runs)
            for members, peak in memory["peak_bytes"].items():
                print(
                    f"N {members:6}: peak {peak['forward'] / 2**20:.1f} MiB forward, {peak['update'] / 2**20:.1f} update"
                )
            print("bytes per further member:", memory["bytes_per_further_member"])
        record["load_average_after"] = environment()["load_average"]
    if options.json:
        write(options.json, record)
        print(f"wrote {options.json}")


if __name__ == "__main__":
    main()
