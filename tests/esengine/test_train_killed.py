"""Killed by SIGKILL anywhere and resumed, a run ends with the same bytes."""

import json
import os
import random
import subprocess
import sys

import pytest

from esengine.config import UpdateRule, load, to_dict
from esengine.models import tiny_model

RULES = {
    "momentum": UpdateRule(optimizer="momentum", lr_scale=0.5),
    "adam": UpdateRule(optimizer="adam", lr_scale=0.5),
}


DRIVER = '''
import dataclasses, json, os, signal, sys
from pathlib import Path
import torch
import esengine.train
import killer
import torch.utils.tensorboard  # once, not in every child
from esengine.config import TrainConfig, from_dict
from esengine.errors import RunError
from esengine.train import train

esengine.train._page = lambda folder, progress: None
torch.set_num_threads(1)


def fork(config, kind, at):
    """The code a child leaves with: 0 done, 2 nothing to resume, 3 another error, -9 killed."""
    child = os.fork()
    if child == 0:
        try:
            killer.arm(kind, at)
            train(config)
            os._exit(0)
        except RunError as error:
            os._exit(2 if "nothing to resume" in str(error) else 3)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(4)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


found = {}
for case in json.loads(Path(sys.argv[1]).read_text()):
    config = from_dict(TrainConfig(), case["config"], "case")
    codes = [fork(config, *case["kill"])]
    if codes[0] != 0:
        codes.append(fork(dataclasses.replace(config, resume=True), None, 0))
        if codes[1] == 2:
            codes.append(fork(config, None, 0))
    found[case["name"]] = codes
Path(sys.argv[2]).write_text(json.dumps(found))
'''

KILLER = """
import os, signal
armed, calls = (None, 0), {"reward": 0, "fsync": 0}
sync = os.fsync


def arm(kind, at):
    global armed
    armed = kind, at


def reach(kind):
    if armed == (kind, calls[kind]):
        os.kill(os.getpid(), signal.SIGKILL)
    calls[kind] += 1


def fsync(file):
    reach("fsync")
    sync(file)


def score(images, prompts):
    reach("reward")
    return images.float().mean(dim=(1, 2, 3)) / 255


os.fsync = fsync
"""

# five steps of three chunks; held-out measures are calls 0, 7, 14 and 18, the comparison 19 and 20
KILLS = [("reward", at, rule) for at, rule in zip((0, 1, 5, 9, 7, 12, 17, 20), 4 * list(RULES), strict=True)]
KILLS += [("reward", at, rule) for at, rule in ((3, "adam"), (11, "momentum"), (14, "adam"), (18, "momentum"))]
# syncs: 0 and 1 of the configuration, 2 and 3 of the logs, 4 to 8 of the first checkpoint, which is there from 8 on
KILLS += [("fsync", at, "adam") for at in range(9)] + [("fsync", at, "momentum") for at in (12, 15, 18, 22, 27)]
KILLS += [("reward", at, rule) for at, rule in ((2, "adam"), (8, "momentum"), (10, "adam"), (16, "momentum"))]
DRAWN = random.Random(0)
MANY = [("reward", DRAWN.randrange(21), DRAWN.choice(list(RULES))) for _ in range(140)]
MANY += [("fsync", DRAWN.randrange(30), "momentum") for _ in range(60)]
EVERY = {"momentum": 1, "adam": 3}


def run_all(kills, small, root):
    """Every case in one process that forks a child for each run: (folder of a case, exit codes, stderr)."""
    (root / "killer.py").write_text(KILLER)
    (root / "driver.py").write_text(DRIVER)
    tiny_model()
    cases = []
    for number, (kind, at, rule) in enumerate([*kills, *((None, 0, rule) for rule in RULES)]):
        name = f"{kind}-{at}-{rule}" if kind is None else f"{number}-{kind}-{at}-{rule}"
        config = small(
            root / name, steps=5, reward="killer:score", update=RULES[rule], checkpoint_every=EVERY[rule], strip_every=0
        )
        cases.append({"name": name, "kill": [kind, at], "config": to_dict(config)})
    (root / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "driver.py", "cases.json", "codes.json"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr
    return root, json.loads((root / "codes.json").read_text()), done.stderr


def check(killed, outcome, number, kind, at, rule):
    root, codes, errors = killed
    name, whole = f"{number}-{kind}-{at}-{rule}", f"None-0-{rule}"
    assert codes[whole] == [0]
    assert codes[name][0] == -9, f"it was not killed: {codes[name]}"
    # resumed; or, killed before the first checkpoint, begun again
    assert codes[name][1:] in ([0], [2, 0]), f"{codes[name]} {errors}"
    assert codes[name][1:] == [0] or kind == "fsync"
    assert outcome(root / name) == outcome(root / whole)
    assert not list((root / name).rglob(".tmp-*"))


@pytest.fixture(scope="module")
def killed(small, tmp_path_factory):
    return run_all(KILLS, small, tmp_path_factory.mktemp("killed"))


@pytest.mark.parametrize(("number", "case"), enumerate(KILLS), ids=["-".join(map(str, each)) for each in KILLS])
def test_killed_and_resumed_it_ends_with_the_same_bytes(killed, outcome, number, case):
    check(killed, outcome, number, *case)


@pytest.mark.slow
def test_killed_two_hundred_times(small, outcome, tmp_path):
    killed = run_all(MANY, small, tmp_path)
    for number, case in enumerate(MANY):
        check(killed, outcome, number, *case)


def test_the_command_line_killed_and_resumed(killed, outcome, tmp_path):
    root, _, _ = killed
    config = load(root / "None-0-momentum" / "config.yaml")
    (tmp_path / "killer.py").write_text(KILLER + "\narm('reward', int(os.environ.get('KILL', -1)))\n")
    flags = [
        "--prompts", config.prompts, "--eval-prompts", config.eval_prompts, "--reward", config.reward,
        "--steps", config.steps, "--population", config.population, "--checkpoint-every", 1, "--strip-every", 0,
        "--heldout-every", 2, "--model", "tiny",
        "--lora.targets", *config.lora.targets, "--es.prompts-per-step", 2, "--es.repeats", 1, "--image.chunk", 3,
        "--update.optimizer", "momentum", "--update.lr-scale", 0.5,
    ]  # fmt: skip

    def call(*args, **env):
        command = [sys.executable, "-m", "esengine", "train", "--run-dir", "run", *map(str, args)]
        return subprocess.run(command, cwd=tmp_path, env=os.environ | env, capture_output=True, text=True, timeout=120)

    assert call(*flags, KILL="8").returncode == -9
    done = call("--resume")
    assert done.returncode == 0, done.stderr
    assert "resuming run after step 2 of 5" in done.stderr
    assert "base against adapter on 3 held-out prompts" in done.stdout
    assert outcome(tmp_path / "run") == outcome(root / "None-0-momentum")
