"""Images per second of training steps with 1, 2, ... processes on this machine.

    python bench/scaling.py [--processes 1 2] [--steps 12] [--json bench/results/cpu_scaling.json]

Each run is `torchrun --nproc-per-node K -m esengine train` on the tiny model, with one thread a process, in a folder
that is removed afterwards. The first steps do not count. Processes exchange N P R numbers a step and no weights. So for
more processes a model is used: a step takes the time of the largest share, ceil(chunks / K) chunks, and of the update.
"""

import argparse
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import record

from esengine.run import journal

WARM = 3
POPULATION, CHUNK, PER_STEP = 32, 32, 8
FLAGS = {
    "--model": "tiny",
    "--population": POPULATION,
    "--es.prompts-per-step": PER_STEP,
    "--es.repeats": 1,
    "--image.chunk": CHUNK,
}


def measure(processes: int, steps: int) -> dict:
    """Seconds of a step and of its update, medians and 20th and 80th percentiles, by the leading process's clock."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        flags = [str(part) for pair in FLAGS.items() for part in pair]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command += ["-m", "esengine", "train", "--run-dir", str(run), "--steps", str(steps), "--strip-every", "0"]
        command += ["--heldout-every", "0", "--checkpoint-every", str(steps), *flags]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
        lines = [step.metrics for step in journal.read(run / journal.NAME).of(journal.Step)][WARM:]
    found = {}
    for name in ("seconds", "seconds_update"):
        values = sorted(line[name] for line in lines)
        p20, p80 = (values[round(share * (len(values) - 1))] for share in (0.2, 0.8))
        found[name] = {"median": statistics.median(values), "p20": p20, "p80": p80}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="how many at a time")
    parser.add_argument("--steps", type=int, default=12, help=f"of each run; the first {WARM} are left out")
    parser.add_argument("--json", type=Path, help="store the record there")
    options = parser.parse_args()
    environment = record.environment()
    runs = {str(processes): measure(processes, options.steps) for processes in options.processes}
    one, images, chunks = runs[str(options.processes[0])], POPULATION * PER_STEP, POPULATION * PER_STEP // CHUNK
    update = one["seconds_update"]["median"]
    for processes, run in runs.items():
        run["images_per_second"] = images / run["seconds"]["median"]
        share = int(processes) / options.processes[0]
        run["efficiency"] = one["seconds"]["median"] / run["seconds"]["median"] / share
        print(f"{processes}: {run['images_per_second']:.1f} images/s, efficiency {run['efficiency']:.2f}")
    modelled = {}
    for processes in (1, 2, 4, 8, 16, 64):
        step = (one["seconds"]["median"] - update) * math.ceil(chunks / processes) / chunks + update
        modelled[str(processes)] = one["seconds"]["median"] / step / processes
    if options.json:
        flags = {name.lstrip("-"): value for name, value in FLAGS.items()}
        what = {"what": "bench/scaling.py", "settings": flags | {"steps": options.steps, "threads": 1}}
        record.write(options.json, {**what, "runs": runs, "modelled_efficiency": modelled, **environment})


if __name__ == "__main__":
    main()
