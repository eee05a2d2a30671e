"""The drop-in layer on a CPU: forward and update of a population of small networks, one row a member.

    python bench/drop_in.py [--against PYTHON] [--shardes PYTHON] [--rounds 5] [--json bench/results/cpu_drop_in.json]

The module is an MLP 256-1024-1024-10. `lora` is a LoRA of rank 4 on its three linears. `direct` trains the weights
themselves. `--against` names the Python of an environment with another version of the package. Both versions are
measured in turns. Each round is a fresh process of one thread, and a ratio compares the same round. `--shardes` names a
Python that has shardes. The MLP of `peers/shardes_mlp.py` is then measured in the same way.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
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
PARTS = ("forward", "update")
"""Of a step, whose seconds are added."""
PEER = Path(__file__).parent / "peers" / "shardes_mlp.py"


def measure() -> dict[str, dict[str, float]]:
    """Median seconds of CPU time of a forward, an update and the plain module's forward, for each form and N."""
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
                marks = [time.process_time()]
                with torch.no_grad(), population.perturbed(step=step, members=members):
                    module(x)
                marks.append(time.process_time())
                population.update(step=step, fitness=fitness)
                marks.append(time.process_time())
                with torch.no_grad():
                    module(x)
                marks.append(time.process_time())
                for name, start, end in zip(times, marks[:-1], marks[1:], strict=True):
                    times[name].append(end - start)
            found[f"{form} {n}"] = {name: statistics.median(each[1:]) for name, each in times.items()}
    return found


def measured_by(python: str, script: str) -> dict[str, dict[str, float]]:
    """What a script measures in a process of its own."""
    command = [python, "-P" if sys.version_info >= (3, 11) else "-s", script, "--worker"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=record.bench_environment())
    return json.loads(done.stdout.splitlines()[-1])


def versions_of(python: str) -> dict[str, str]:
    """Of shardes and of JAX."""
    code = "import json, jax, shardes; print(json.dumps({'jax': jax.__version__, 'shardes': shardes.__version__}))"
    return json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)


def compared(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians of a case by who was measured, and of each round how much of the other's time `here` took."""
    found: dict[str, Any] = {name: statistics.median(each) for name, each in seconds.items()}
    for name, others in seconds.items():
        if name != "here":
            ratios = [a / b for a, b in zip(seconds["here"], others, strict=True)]
            key = "ratio" if name == "against" else f"ratio_{name}"
            found[key] = {"median": statistics.median(ratios), "each": ratios}
    return found


def main(script: str, text: str, measure: Callable[[], dict[str, dict[str, float]]], what: str) -> None:
    """The command line of a script whose `measure` gives seconds by case and part."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="PYTHON", help="an interpreter with another version of the package")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="store the record there")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    if script == __file__:
        parser.add_argument("--shardes", metavar="PYTHON", help="an interpreter with shardes")
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure()))
        return
    shardes = getattr(options, "shardes", None)
    measured = {"here": (sys.executable, script)}
    measured |= {"against": (options.against, script)} if options.against else {}
    measured |= {"shardes": (shardes, str(PEER))} if shardes else {}
    rounds: list[dict[str, Any]] = []
    for number in range(options.rounds):
        names = list(measured) if number % 2 == 0 else list(measured)[::-1]
        taken = {name: measured_by(*measured[name]) for name in names}
        rounds.append({name: taken[name] for name in measured})
    table = {}
    for case in rounds[0]["here"]:
        names = [name for name in measured if case in rounds[0][name]]
        table[case] = compared(
            {name: [sum(each[name][case].get(part, 0.0) for part in PARTS) for each in rounds] for name in names}
        )
        line = f"{case:12} step {1e3 * table[case]['here']:.2f} ms"
        for name in names[1:]:
            ratios = table[case]["ratio" if name == "against" else f"ratio_{name}"]
            spread = f"{min(ratios['each']):.2f} to {max(ratios['each']):.2f}"
            line += f", {ratios['median']:.2f} of {name} ({spread})"
        print(line)
    if options.json is not None:
        others = {"against": record.commit_of(options.against) if options.against else None}
        others |= {"shardes": versions_of(shardes)} if shardes else {}
        record.write(options.json, {"what": what, **others, "table": table, "rounds": rounds, **record.environment()})


if __name__ == "__main__":
    what = "forward and update, MLP 256-1024-1024-10, one row a member, one thread, seconds of CPU time"
    main(__file__, __doc__, measure, what)
