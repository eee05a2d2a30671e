"""Does a training of sana-sprint-nano repeat the training of the packaged model? Its curves against the stored ones.

    python -m esengine.models.nano.train --out sana-sprint-nano --work nano-training
    python bench/nano training nano-training --json bench/results/nano_training_again.json

A training that is running or was stopped is compared as far as it has come. The first measures exist after seconds. On
the machine of the stored curves, with the same versions, they agree to the last digit. Stages may be in several
folders, for example if one stage was started again from the results of the earlier ones.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import record

STORED = Path(__file__).parents[1] / "results" / "nano_training.json"
STAGES = ("autoencoder", "teacher", "student")


def curves(work: Path) -> dict[str, list[dict[str, float]]]:
    """Of each stage that has begun, what was measured every 50 steps, without the seconds."""
    found = {}
    for stage in STAGES:
        file = work / f"{stage}.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        found[stage] = [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]
    return {stage: rows for stage, rows in found.items() if rows}


def compared(stored: dict[str, list], again: dict[str, list]) -> dict[str, dict[str, Any]]:
    """Of each stage: steps made again, of how many, and up to which they agree to the last digit."""
    found = {}
    for stage, rows in again.items():
        pairs = zip(rows, stored[stage], strict=False)
        alike = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(rows), len(stored[stage])))
        agree = rows[alike - 1]["step"] if alike else 0
        found[stage] = {"steps": rows[-1]["step"], "of": stored[stage][-1]["step"], "agree_up_to": agree}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, nargs="+", help="the folder that was given as --work, or several")
    parser.add_argument("--json", type=Path, help="store the record there")
    parser.add_argument("--first", action="store_true", help="store these curves, as those of the package's model")
    options = parser.parse_args()
    again = {stage: rows for work in options.work for stage, rows in curves(work).items()}
    if not again:
        folders = ", ".join(map(str, options.work))
        raise SystemExit(f"{folders}: expected the working folder of a training, found no curve in it")
    what = {"what": f"bench/nano training{' --first' * options.first}"}
    if options.first:
        record.write(STORED, {**what, "curves": again, **record.environment()})
        return 0
    found = compared(json.loads(STORED.read_text(encoding="utf-8"))["curves"], again)
    for stage, each in found.items():
        print(f"{stage}: {each['steps']} of {each['of']} steps, equal up to step {each['agree_up_to']}")
    if options.json:
        record.write(options.json, {**what, "stages": found, **record.environment()})
    return int(any(each["agree_up_to"] < each["steps"] for each in found.values()))
