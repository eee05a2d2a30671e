"""Trackers: what they are given, and that none of them can stop a run."""

import dataclasses
import json
import os
import sqlite3
import subprocess
import sys
import types

import journals
import numpy as np
import pytest
from PIL import Image

from esengine.base.errors import ConfigError
from esengine.run import trackers
from esengine.run.train import train

METHODS = ("start", "log", "image", "histogram", "finish")


class Fake:
    """Keeps what it is given; raises in the method `broken`, from the call after the first `good` ones."""

    made = ()

    def __init__(self, folder, identity, broken=None, good=0, error=ConnectionError):
        if broken == "__init__":
            raise error("no network")
        self.broken, self.good, self.error, self.identity = broken, good, error, identity
        self.calls = []
        type(self).made = (*type(self).made, self)

    def __getattr__(self, name):
        if name not in METHODS:
            raise AttributeError(name)

        def method(*args):
            self.calls.append((name, *args))
            if name == self.broken and sum(call[0] == name for call in self.calls) > self.good:
                raise self.error("no\nnetwork")

        return method


@pytest.fixture
def fakes(monkeypatch):
    """Replaces wandb and trackio; `fakes(broken=...)` breaks trackio."""
    monkeypatch.setattr(Fake, "made", ())
    monkeypatch.setattr(trackers, "find_spec", lambda name: types.SimpleNamespace())
    monkeypatch.setitem(trackers.EXTRAS, "wandb", Fake)
    monkeypatch.setitem(trackers.EXTRAS, "trackio", Fake)

    def breaking(**how):
        monkeypatch.setitem(trackers.EXTRAS, "trackio", lambda folder, identity: Fake(folder, identity, **how))

    return breaking


BOTH = ("wandb", "trackio")


def test_a_run_gives_each_its_scores_pictures_histograms_and_settings(small, tmp_path, fakes):
    config = small(tmp_path / "run", trackers=BOTH)
    train(config)
    wandb, trackio = Fake.made
    asked = [call[0] for call in wandb.calls]
    assert asked == [call[0] for call in trackio.calls]
    assert (asked[0], asked[-1], asked.count("start"), asked.count("finish")) == ("start", "finish", 1, 1)
    (settings,) = wandb.calls[0][1:]
    assert settings["es"]["sigma"] == config.es.sigma
    assert settings["identity"].keys() >= {"model", "rewards", "environment"}
    json.dumps(settings)
    logged = [call[1:] for call in wandb.calls if call[0] == "log"]
    steps = {step: scalars for step, scalars in logged if "reward" in scalars}
    lines = journals.steps(tmp_path / "run")
    assert steps == {line.pop("step"): line for line in lines}
    pictures = [call[1:] for call in wandb.calls if call[0] == "image"]
    assert [(step, kind) for step, kind, _ in pictures] == [
        (0, "heldout"), (0, "strips"), (2, "heldout"), (3, "strips"), (4, "heldout"),
    ]  # fmt: skip
    assert all(isinstance(picture, Image.Image) for *_, picture in pictures)
    histograms = [call[1:] for call in wandb.calls if call[0] == "histogram"]
    assert [(step, name) for step, name, _ in histograms] == [
        (step, f"members/{name}") for step in (0, 3) for name in ("jpeg_compressibility", "combined")
    ]
    assert all(values.shape == (config.population,) and np.isfinite(values).all() for *_, values in histograms)


FAILURES = [("__init__", 0), *((method, 0) for method in METHODS), ("log", 1), ("image", 2), ("histogram", 3)]


@pytest.mark.parametrize("error", [ConnectionError, SystemExit])
@pytest.mark.parametrize(("broken", "good"), FAILURES)
def test_one_that_fails_is_dropped_and_said_once(tmp_path, fakes, notes, broken, error, good):
    fakes(broken=broken, error=error, good=good)
    each = trackers.open_trackers(tmp_path, tmp_path / "tensorboard", BOTH, None, notes.said.append)
    each.start({})
    for step in range(4):
        each.log(step, {"x": 1.0})
        each.image(step, "strips", Image.new("RGB", (8, 8)))
        each.histogram(step, "members/a", np.ones(4))
    each.finish()
    (line,) = notes.said
    method = "start" if broken == "__init__" else broken
    assert line.startswith("warning: trackio is dropped")
    assert f"{method} raised {error.__name__}: no network" in line
    assert "\n" not in line
    record = json.loads((tmp_path / "trackers.json").read_text())
    assert list(record["failed"]) == ["trackio"]
    healthy = Fake.made[0]
    assert [call[0] for call in healthy.calls].count("log") == 4
    assert healthy.calls[-1] == ("finish",)
    if broken != "__init__":
        broken_one = Fake.made[1]
        assert [call[0] for call in broken_one.calls].count(broken) == good + 1
        assert broken_one.calls[-1][0] == broken  # nothing was asked of it afterwards


def test_a_run_ends_with_the_same_bytes_without_them(small, outcome, trained, tmp_path, fakes, notes):
    fakes(broken="log", good=2)
    train(small(tmp_path / "run", trackers=BOTH), notes)
    assert sum("dropped" in line for line in notes.said) == 1
    assert outcome(tmp_path / "run") == outcome(trained[1].folder)


def test_tensorboard_cannot_stop_a_run_either(small, tmp_path, notes, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trackers.TensorBoard, "log", full)
    train(small(tmp_path / "run", steps=1), notes)
    (line,) = [line for line in notes.said if "tensorboard" in line]
    assert "No space left on device" in line
    assert "tensorboard" in json.loads((tmp_path / "run" / "trackers.json").read_text())["failed"]


def test_a_resumed_run_goes_on_in_the_same_place(small, tmp_path, fakes):
    config = small(tmp_path / "run", steps=1, strip_every=0, trackers=("wandb",))
    train(config)
    train(dataclasses.replace(config, resume=True, steps=2))
    train(small(tmp_path / "other", steps=1, strip_every=0, trackers=("wandb",)))
    first, again, other = (fake.identity for fake in Fake.made)
    assert first == again != other


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '{"identity": "', "\0", "[" * 100_000])
def test_a_damaged_record_is_a_new_place(tmp_path, fakes, damage):
    (tmp_path / "trackers.json").write_text(damage)
    opened = trackers.open_trackers(tmp_path, tmp_path / "tb", ("wandb",), 3, pytest.fail)
    opened.start({})
    opened.finish()
    (fake,) = Fake.made
    assert len(fake.identity) == 12
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"identity": fake.identity, "failed": {}}


def test_one_that_is_not_installed_is_told_before_the_run(small, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"trackers: trackio is not installed; .*pip install -e .\.\[trackio\]'"):
        train(small(tmp_path / "run", trackers=("trackio",)))
    assert list(tmp_path.iterdir()) == []


# ---- the real ones, in a process of their own

REAL = """
import sys
import numpy as np
from PIL import Image
from pathlib import Path
from esengine.run import trackers

name, folder, step = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
opened = trackers.open_trackers(folder, folder / "tb", (name,), step or None, sys.exit)
opened.start({"es": {"sigma": 0.01}, "targets": ["to_q"], "revision": None})
for at in range(step, step + 2):
    opened.log(at, {"reward": float(at), "heldout/a": -1.0})
    opened.image(at, "strips", Image.new("RGB", (16, 8)))
    opened.histogram(at, "members/a", np.arange(4, dtype=np.float32))
opened.finish()
"""


def real(name, folder, **env):
    folder.mkdir(exist_ok=True)
    for step in (0, 2):
        done = subprocess.run(
            [sys.executable, "-c", REAL, name, str(folder), str(step)],
            env=os.environ | env | {"PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == ""
    return json.loads((folder / "trackers.json").read_text())


def test_wandb_offline(tmp_path):
    pytest.importorskip("wandb")
    record = real("wandb", tmp_path / "run", WANDB_MODE="offline", WANDB_DIR=str(tmp_path))
    assert record["failed"] == {}
    files = list((tmp_path / "run").glob(f"wandb/offline-run-*-{record['identity']}/run-{record['identity']}.wandb"))
    assert len(files) == 2  # one for each process, the same run
    assert all(path.stat().st_size > 0 for path in files)


def test_trackio(tmp_path):
    pytest.importorskip("trackio")
    record = real("trackio", tmp_path / "run", TRACKIO_DIR=str(tmp_path / "db"), HF_HUB_OFFLINE="1")
    assert record["failed"] == {}
    (database,) = (tmp_path / "db").glob("*.db")
    with sqlite3.connect(database) as opened:
        rows = opened.execute("select run_name, step, metrics from metrics order by step, id").fetchall()
    assert {row[0] for row in rows} == {f"run-{record['identity']}"}
    rewards = [(step, json.loads(metrics)["reward"]) for _, step, metrics in rows if "reward" in json.loads(metrics)]
    assert rewards == [(step, float(step)) for step in range(4)]
