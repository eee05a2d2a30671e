"""The demo on several seeds: does ES on sana-sprint-nano raise the reward of captions that it was not trained on?

    python bench/nano demo [--seeds 0 1 2] [--json bench/results/cpu_demo.json]

Each seed is `esengine train --seed S` without other flags, in a folder that is removed afterwards.
"""

import argparse
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import record

from esengine.models import SanaSprint
from esengine.run.settings import load, to_dict
from esengine.run.train import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run for each")
    parser.add_argument("--json", type=Path, help="store the record there")
    options = parser.parse_args()
    environment, runs = record.environment(), {}
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            comparison = train(replace(load("nano"), seed=seed, run_dir=Path(folder) / "run")).comparison
            runs[str(seed)] = {"seconds": time.perf_counter() - start, **asdict(comparison)}
        print(f"seed {seed}: {runs[str(seed)]['seconds']:.0f} s\n{comparison.table()}")
    if options.json:
        config = to_dict(load("nano"))
        what = {"what": "esengine train", "model": SanaSprint.from_pretrained("nano").identity(), "config": config}
        record.write(options.json, {**what, "runs": runs, **environment})
