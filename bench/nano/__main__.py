"""Experiments on the nano world: python bench/nano EXPERIMENT [flags].

    base        the packaged model without an adapter: steps, guidance scales, judges
    checker     how often a judge is right
    demo        `esengine train` without flags, on several seeds
    es          which settings of ES are best
    headline    a longer run on three seeds, and its pictures
    dissect     the adapters of the headline taken apart
    training    the curves of a training of the model, compared with the stored ones

`python bench/nano EXPERIMENT --help` shows the flags of one.
"""

import argparse
import importlib
import sys
from pathlib import Path

EXPERIMENTS = ("base", "checker", "demo", "es", "headline", "dissect", "training")


def main() -> int | None:
    parser = argparse.ArgumentParser(
        prog="bench/nano", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", choices=EXPERIMENTS)
    name = parser.parse_args(sys.argv[1:2]).experiment
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # in place of this folder
    sys.argv = [f"bench/nano {name}", *sys.argv[2:]]
    return importlib.import_module(f"nano.{name}").main()


if __name__ == "__main__":
    sys.exit(main())
