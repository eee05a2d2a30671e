"""Tuning: every task fits its op, the gate judges candidates, and all of it runs at toy size in the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import tune

from esengine.kernels import configs
from esengine.kernels.noise import INTERPRET

SCRIPT = Path(tune.__file__)


def run(*words):
    variables = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, SCRIPT, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=300)


def bounds(rule):
    least, most = rule if isinstance(rule, list) else (rule, rule)
    return least or 0, 1 << 31 if most is None else most


@pytest.mark.parametrize("scale", tune.SCALES)
def test_every_task_is_of_an_op_and_every_op_has_a_task(scale):
    tasks = tune.tasks(tune.SCALES[scale])
    assert {task.op for task in tasks} == set(configs.OPS)
    for task in tasks:
        spec = configs.OPS[task.op]
        assert set(task.values) == set(spec.conditions)
        assert len(task.grid) > 5
        assert all(set(launch) == set(spec.settings) for launch in tune.candidates(task, None))
        for name, rule in task.bands.items():
            least, most = bounds(rule)
            assert least <= task.values[name] <= most


def test_no_launch_is_spoken_for_twice():
    def apart(x, y):
        if isinstance(x, list):
            return bounds(x)[1] < bounds(y)[0] or bounds(y)[1] < bounds(x)[0]
        return x != y

    tasks = [(task.op, task.values | task.bands) for task in tune.tasks(tune.SCALES["full"])]
    for i, (op, when) in enumerate(tasks):
        for other, rules in tasks[:i]:
            assert op != other or any(apart(when[name], rules[name]) for name in when), (op, when, rules)


def test_a_candidate_is_what_launches_take(tmp_path):
    task = tune.tasks(tune.SCALES["full"])[0]
    for launch in task.grid[:2]:
        with tune.using(tmp_path, task.op, launch):
            assert configs.settings(task.op, torch.device("cpu"), **task.values) == launch
    assert len(list(tmp_path.iterdir())) == 2


def test_the_clock_sees_calls_alone(tmp_path, monkeypatch):
    task = tune.tasks(tune.SCALES["full"])[0]
    launches, seen = tune.candidates(task, 2), []

    def call():
        seen.append(configs.settings(task.op, torch.device("cpu"), **task.values))
        return torch.ones(2)

    def clocked(variants, rounds, **options):
        for variant in variants.values():
            variant()
        seen.clear()
        with monkeypatch.context() as timed:  # from here on nothing is read, written or made into text
            for owner, name in ((Path, "read_text"), (Path, "write_text"), (json, "dumps"), (json, "loads")):
                timed.setattr(owner, name, None)
            for variant in reversed(variants.values()):
                variant()
        return {name: {"median": 1.0 + int(name)} for name in variants}

    monkeypatch.setattr(tune.clock, "interleaved", clocked)
    toy = task._replace(build=lambda rows, device: (call, lambda: torch.ones(2)))
    entry = tune.measure(toy, launches, tune.SCALES["tiny"], torch.device("cpu"), tmp_path)
    assert seen == launches[::-1]
    assert "launch" not in entry
    assert configs.config_file(torch.device("cpu")) == configs.DEFAULT


@pytest.mark.skipif(INTERPRET, reason="the interpreter compiles nothing")
def test_the_gate_drops_what_spills_and_what_does_not_fit():
    scale = tune.SCALES["full"]
    tasks = tune.tasks(scale)
    usual = tune.default_launch(tasks[0])
    assert tune.fault(scale, 0, usual, 90) is None
    assert "spill" in tune.fault(scale, 0, usual | {"BLOCK_N": 256, "num_warps": 4}, 90)
    assert "shared memory" in tune.fault(scale, 0, usual | {"num_stages": 9}, 90)
    update = next(i for i, task in enumerate(tasks) if task.op == "es_update")
    assert tune.fault(scale, update, tune.default_launch(tasks[update]), 90) is None


def test_an_output_off_the_reference_is_said():
    right = torch.randn(64, 64)
    assert tune.wrong((right.bfloat16(), None), (right, None)) is None
    assert "off the reference" in tune.wrong(right * 1.01, right)
    assert "off the reference" in tune.wrong(torch.full_like(right, float("nan")), right)


def test_the_whole_path_writes_a_file_that_launches_can_read(tmp_path, monkeypatch):
    out = tmp_path / "toy.json"
    done = run("--scale", "tiny", "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    contents = json.loads(out.read_text())
    made, usual = contents["made"], json.loads(configs.DEFAULT.read_text())["ops"]
    found = [entry for op, entries in contents["ops"].items() for entry in entries[: len(entries) - len(usual[op])]]
    assert made["unmeasured"] == []
    assert len(found) + len(made["default_kept"]) == len(tune.tasks(tune.SCALES["tiny"]))
    for entry in found + made["default_kept"]:
        assert 0 < entry["measured"]["seconds"] <= entry["measured"]["default_seconds"]
        assert entry["measured"]["timed"] == 2
    paths = contents["paths"]["population_linear"]
    assert len(paths) == len(tune.path_shapes(tune.SCALES["tiny"]))
    for entry in paths:
        seconds = entry["measured"]["seconds"]
        assert entry["path"] == min(seconds, key=seconds.get)
    assert made["command"].endswith(str(out))
    assert {"commit", "dirty", "versions", "device", "driver", "date"} <= set(made)
    monkeypatch.setenv(configs.OVERRIDE, str(out))
    assert configs.describe(torch.device("cpu"))["file"] == str(out)


def test_no_time_leaves_the_default_and_says_so(tmp_path):
    out = tmp_path / "toy.json"
    assert run("--scale", "tiny", "--out", out, "--budget-minutes", 0).returncode == 0
    contents = json.loads(out.read_text())
    scale = tune.SCALES["tiny"]
    assert len(contents["made"]["unmeasured"]) == len(tune.tasks(scale)) + len(tune.path_shapes(scale))
    assert contents["paths"] == {"population_linear": []}
    assert contents["ops"] == json.loads(configs.DEFAULT.read_text())["ops"]


def test_figures_of_no_device_go_to_a_named_file_only():
    done = run("--scale", "tiny")
    assert done.returncode == 2
    assert "out: expected a file" in done.stderr
