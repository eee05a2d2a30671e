"""A real limit on a process's memory, as of `ulimit -v`: batches are halved, or the run ends with one line."""

import json
import os
import resource
import subprocess
import sys

import journals
import pytest

from esengine.run.settings import ESSettings, LoraSettings, to_dict
from esengine.sampling.settings import ImageSettings

DRIVER = """
import json, os, resource, sys, torch
from pathlib import Path
import numpy as np
from esengine.base.errors import EsengineError
from esengine.base.progress import Progress
from esengine.base.settings_file import from_dict
from esengine.run.settings import TrainConfig
from esengine.run.train import train

torch.set_num_threads(1)
ROOM = int(sys.argv[2]) << 20


class Limit(Progress):
    def note(self, text):
        print(text)

    def start(self, total, done):
        if ROOM >= 0:
            with open("/proc/self/statm") as statm:
                now = int(statm.read().split()[0]) * os.sysconf("SC_PAGESIZE") + ROOM
            resource.setrlimit(resource.RLIMIT_AS, (now, now))


def bright(images, prompts):
    return images.float().mean(dim=(1, 2, 3)) / 255


def wide(images, prompts):
    np.ones((len(images), 4 << 20), np.uint8)
    return images.float().mean(dim=(1, 2, 3)) / 255


sys.modules["driver"] = sys.modules["__main__"]
try:
    train(from_dict(TrainConfig(), json.loads(Path(sys.argv[1]).read_text()), "case"), Limit())
    print("done")
except EsengineError as error:
    print(type(error).__name__, error)
"""


@pytest.fixture
def limited(small, tmp_path):
    """`limited(name, room, reward)`: what a run of one step says that has so many megabytes of memory for its steps."""
    (tmp_path / "driver.py").write_text(DRIVER)

    def call(name, room, reward="bright"):
        config = small(
            tmp_path / name, reward=f"driver:{reward}", steps=1, population=16, strip_every=0, heldout_every=0,
            lora=LoraSettings(targets=("to_q",)), es=ESSettings(prompts_per_step=4, repeats=1),
            image=ImageSettings(chunk=64, height=128, width=128),
        )  # fmt: skip
        (tmp_path / "case.json").write_text(json.dumps(to_dict(config)))
        done = subprocess.run(
            [sys.executable, "driver.py", "case.json", str(room)], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    return call


def rewards(run):
    return [step["reward"] for step in journals.steps(run)]


needs_limit = pytest.mark.skipif(
    not os.path.exists("/proc/self/statm") or resource.getrlimit(resource.RLIMIT_AS)[1] != resource.RLIM_INFINITY,
    reason="no /proc, or memory is limited already",
)


@needs_limit
def test_batches_halve_until_they_fit(limited, tmp_path):
    assert limited("whole", -1).endswith("done\n")
    said = limited("drawn", 40)
    assert "in one forward do not fit into memory" in said or "in one transformer forward do not fit" in said
    assert said.endswith("done\n"), said
    assert rewards(tmp_path / "drawn") == pytest.approx(rewards(tmp_path / "whole"), rel=1e-3)


@needs_limit
def test_a_reward_that_runs_out_of_memory_is_no_bad_reward(limited, tmp_path):
    said = limited("scored", 120, "wide")
    assert "64 images and reward driver:wide do not fit into memory" in said
    assert "are scored together" in said
    assert said.endswith("done\n"), said


@needs_limit
@pytest.mark.parametrize("room", [0, 4])
def test_where_nothing_fits_it_is_one_line(limited, room):
    said = limited("none", room)
    *_, last = said.splitlines()
    assert last.startswith("OutOfMemory "), said
    assert "do not fit into memory" in last
