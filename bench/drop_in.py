"""The drop-in layer on a CPU: forward and update of a population of small networks, one row a member.

    python bench/drop_in.py [--against PYTHON] [--rounds 5] [--json bench/results/cpu_drop_in.json]

The module is an MLP 256-1024-1024-10. `lora` is a LoRA of rank 4 on its three linears, `direct` moves the weights
themselves. `--against` names the interpreter of an environment with another version of the package. Both are measured
in turns, each round in a fresh process of one thread, and the ratios are of the same round.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import record
import torch
from peft import LoraConfig
from torch import nn

import esengine

SIZES = (64, 256, 1024)
"""Population sizes N."""
FORMS = {
    "lora": lambda: LoraConfig(r=4, target_modules=["0", "2", "4"]),
    "direct": lambda: esengine.Direct(target_modules=["0", "2", "4"]),
}
STEPS = 6
"""Steps of a case in one round. The first is not counted."""


def measure() -> dict[str, dict[str, float]]:
    """Median seconds of a forward, an update and the plain module's forward, for each form and N."""
    torch.set_num_threads(1)
    found = {}
    for form, config in FORMS.items():
        for n in SIZES:
            torch.manual_seed(0)
            module = nn.Sequential(
                nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
            )
            population = esengine.attach(module, config(), esengine.Noise(sigma=0.02, seed=0))
            x, fitness, members = torch.randn(n, 256), torch.randn(n), torch.arange(n)
            times: dict[str, list[float]] = {"forward": [], "update": [], "plain": []}
            for step in range(STEPS):
                marks = [time.perf_counter()]
                with torch.no_grad(), population.perturbed(step=step, members=members):
                    module(x)
                marks.append(time.perf_counter())
                population.update(step=step, fitness=fitness)
                marks.append(time.perf_counter())
                with torch.no_grad():
                    module(x)
                marks.append(time.perf_counter())
                for name, start, end in zip(times, marks[:-1], marks[1:], strict=True):
                    times[name].append(end - start)
            found[f"{form} {n}"] = {name: statistics.median(each[1:]) for name, each in times.items()}
    return found


def measured_by(python: str) -> dict[str, dict[str, float]]:
    """`measure` in a process of its own."""
    command = [python, "-P" if sys.version_info >= (3, 11) else "-s", __file__, "--worker"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=record.bench_environment())
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="PYTHON", help="an interpreter with another version of the package")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="store the record there")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure()))
        return
    pythons = {"here": sys.executable} | ({"against": options.against} if options.against else {})
    rounds: list[dict[str, Any]] = []
    for number in range(options.rounds):
        names = list(pythons) if number % 2 == 0 else list(pythons)[::-1]
        taken = {name: measured_by(pythons[name]) for name in names}
        rounds.append({name: taken[name] for name in pythons})
    table = {}
    for case in rounds[0]["here"]:
        seconds = {
            name: [sum(each[name][case][part] for part in ("forward", "update")) for each in rounds] for name in pythons
        }
        table[case] = {name: statistics.median(each) for name, each in seconds.items()}
        line = f"{case:12} step {1e3 * table[case]['here']:.2f} ms"
        if options.against:
            ratios = [a / b for a, b in zip(seconds["here"], seconds["against"], strict=True)]
            table[case]["ratio"] = {"median": statistics.median(ratios), "each": ratios}
            line += f", {statistics.median(ratios):.2f} of the other ({min(ratios):.2f} to {max(ratios):.2f})"
        print(line)
    if options.json is not None:
        what = {"what": "forward and update, MLP 256-1024-1024-10, one row a member, one thread, seconds"}
        other = record.commit_of(options.against) if options.against else None
        record.write(options.json, {**what, "against": other, "table": table, "rounds": rounds, **record.environment()})


if __name__ == "__main__":
    main()
