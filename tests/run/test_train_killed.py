"""Killed by SIGKILL anywhere and resumed, a run ends with the same bytes."""

import json
import os
import random
import subprocess
import sys

import pytest

from esengine.es.rule import UpdateRule
from esengine.models import tiny_model
from esengine.run.settings import load, to_dict

RULES = {
    "momentum": UpdateRule(optimizer="momentum", lr_scale=0.5),
    "adam": UpdateRule(optimizer="adam", lr_scale=0.5),
}


DRIVER = '''
import dataclasses, json, os, signal, sys
from pathlib import Path
import torch
import killer
import torch.utils.tensorboard  # once, not in every child
from esengine.run.settings import TrainConfig
from esengine.base.settings_file import from_dict
from esengine.base.errors import RunError
from esengine.run.train import train

torch.set_num_threads(1)


def fork(config, kind, at):
    """The code a child leaves with: 0 done, 2 nothing to resume, 3 another error, -9 killed."""
    child = os.fork()
    if child == 0:
        try:
            killer.arm(kind, at)
            train(config)
            if kind == "count":
                Path("calls.json").write_text(json.dumps(killer.calls))
            os._exit(0)
        except RunError as error:
            os._exit(2 if "nothing to resume" in str(error) else 3)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(4)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


found, calls, cases = {}, {}, json.loads(Path(sys.argv[1]).read_text())
first = from_dict(TrainConfig(), cases[0]["config"], "case")
fork(dataclasses.replace(first, run_dir=Path("warm")), None, 0)  # writes the text cache, which the others only read
for case in cases:
    config = from_dict(TrainConfig(), case["config"], "case")
    kind, share, rule = case["kill"]
    codes = [fork(config, kind, int(share * calls[rule][kind]) if kind != "count" else 0)]
    if kind == "count":
        calls[rule] = json.loads(Path("calls.json").read_text())
    elif codes[0] != 0:
        codes.append(fork(dataclasses.replace(config, resume=True), None, 0))
        if codes[1] == 2:
            codes.append(fork(config, None, 0))
    found[case["name"]] = codes
Path(sys.argv[2]).write_text(json.dumps(found))
'''

KILLER = """
import functools, os, pathlib, signal
from esengine.run.journal import Writer

SYSTEM = ("fsync", "rename", "replace", "unlink", "mkdir")
armed, calls = (None, 0), dict.fromkeys(("reward", "append", *SYSTEM), 0)


def arm(kind, at):
    global armed
    armed = kind, at
    calls.update(dict.fromkeys(calls, 0))


def reach(kind, last_words=lambda: None):
    if armed == (kind, calls[kind]):
        last_words()
        os.kill(os.getpid(), signal.SIGKILL)
    calls[kind] += 1


def system(kind, call, *args, **keys):
    reach(kind)
    return call(*args, **keys)


def append(writer, record, whole=Writer.append):
    reach("append", lambda: writer._file.write(b'{"kind": "step", "step": 1'))
    whole(writer, record)


def score(images, prompts):
    reach("reward")
    return images.float().mean(dim=(1, 2, 3)) / 255


Writer.append = append
for name in SYSTEM:
    wrapped = functools.partial(system, name, getattr(os, name))
    setattr(os, name, wrapped)
    if hasattr(pathlib, "_NormalAccessor") and name != "fsync":  # Python 3.10 keeps its own
        setattr(pathlib._NormalAccessor, name, wrapped)
"""

KINDS = ("reward", "append", "fsync", "rename", "replace", "unlink", "mkdir")
"""What a run does when it is killed: before a call, or with half a line of the journal written."""


def drawn(count, seed):
    """(kind, where among its calls as a share of them, update rule), of each kind as often as of the next."""
    draw = random.Random(seed)
    return [(KINDS[number % len(KINDS)], round(draw.random(), 3), draw.choice(list(RULES))) for number in range(count)]


KILLS, MANY = drawn(30, seed=0), drawn(200, seed=1)
EVERY = {"momentum": 1, "adam": 3}


def run_all(kills, small, root):
    """Every case in one process that forks a child for each run: (folder of a case, exit codes, stderr)."""
    (root / "killer.py").write_text(KILLER)
    (root / "driver.py").write_text(DRIVER)
    tiny_model()
    cases = []
    for number, (kind, share, rule) in enumerate([*(("count", 0, rule) for rule in RULES), *kills], -len(RULES)):
        name = f"{kind}-{rule}" if kind == "count" else f"{number}-{kind}-{share}-{rule}"
        config = small(
            root / name, steps=5, reward="killer:score", update=RULES[rule], checkpoint_every=EVERY[rule], strip_every=2
        )
        cases.append({"name": name, "kill": [kind, share, rule], "config": to_dict(config)})
    (root / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "driver.py", "cases.json", "codes.json"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr
    return root, json.loads((root / "codes.json").read_text()), done.stderr


def check(killed, outcome, number, kind, share, rule):
    root, codes, errors = killed
    name, whole = f"{number}-{kind}-{share}-{rule}", f"count-{rule}"
    assert codes[whole] == [0]
    assert codes[name][0] == -9, f"it was not killed: {codes[name]}"
    # resumed; or, killed before the first checkpoint, begun again
    assert codes[name][1:] in ([0], [2, 0]), f"{codes[name]} {errors}"
    assert codes[name][1:] == [0] or kind != "reward"
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
    config = load(root / "count-momentum" / "config.yaml")
    (tmp_path / "killer.py").write_text(KILLER + "\narm('reward', int(os.environ.get('KILL', -1)))\n")
    flags = [
        "--prompts", config.prompts, "--eval-prompts", config.eval_prompts, "--reward", config.reward,
        "--steps", config.steps, "--population", config.population, "--checkpoint-every", 1, "--strip-every", 2,
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
    assert outcome(tmp_path / "run") == outcome(root / "count-momentum")
