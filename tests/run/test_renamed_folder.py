"""A run whose folder is renamed, and another that begins under the old name: neither writes into the other's."""

import os
import subprocess
import sys
import time

import pytest

from esengine.base import locks
from esengine.base.errors import RunError
from esengine.run import checkpoint
from esengine.run.folder import LOCK, RunFolder
from esengine.run.settings import to_yaml

REWARD = """
import os, time

def score(images, prompts):
    while os.path.exists(os.environ["HOLD"]) and os.path.exists(os.environ["STEPS"]):
        time.sleep(0.01)
    return images.float().mean(dim=(1, 2, 3)) / 255
"""


@pytest.fixture
def start(small, tmp_path):
    """`start(name, seed)`: a run of the command line in `run`, which waits while there is a file of that name."""
    (tmp_path / "held.py").write_text(REWARD)

    def begin(name, seed, run_dir="run", steps=4):
        settings = tmp_path / f"{name}.yaml"
        settings.write_text(to_yaml(small("", seed=seed, steps=steps, reward="held:score")))
        (tmp_path / name).write_text("")
        command = [sys.executable, "-m", "esengine", "train", "--config", settings, "--run-dir", run_dir]
        env = os.environ | {"HOLD": name, "STEPS": f"{name}.go", "PYTHONPATH": str(tmp_path)}
        keys = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        return subprocess.Popen(list(map(str, command)), cwd=tmp_path, env=env, **keys)

    return begin


def until(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def test_two_processes_and_a_renamed_folder(start, outcome, tmp_path):
    whole = {}
    for name, seed in (("alone1", 1), ("alone2", 2)):
        done = start(name, seed, name + "-run")
        assert done.wait(120) == 0, done.communicate()
        whole[seed] = outcome(tmp_path / f"{name}-run")

    first = start("first", 1)
    until((tmp_path / "run" / "checkpoints" / "step_00000000").is_dir, first)
    (tmp_path / "first.go").write_text("")  # holds the first run before its first or second step
    time.sleep(0.2)
    (tmp_path / "run").rename(tmp_path / "moved")
    second = start("second", 2)
    until((tmp_path / "run" / "checkpoints" / "step_00000000").is_dir, second)
    (tmp_path / "second.go").write_text("")
    (tmp_path / "first").unlink()
    out, said = first.communicate(timeout=120)
    assert first.returncode == 0, said
    assert "was moved or replaced" in said
    assert "moved/adapter" in out
    (tmp_path / "second").unlink()
    _, said = second.communicate(timeout=120)
    assert second.returncode == 0, said
    assert outcome(tmp_path / "moved") == whole[1]
    assert outcome(tmp_path / "run") == whole[2]
    for folder in ("moved", "run"):
        names = {path.name for path in (tmp_path / folder).iterdir()}
        assert names == {path.name for path in (tmp_path / "alone1-run").iterdir()}


def test_a_folder_that_is_removed_is_one_line(start, tmp_path):
    run = start("first", 1)
    until((tmp_path / "run" / "checkpoints" / "step_00000000").is_dir, run)
    (tmp_path / "first.go").write_text("")
    time.sleep(0.2)
    (tmp_path / "run").rename(tmp_path / "away")
    subprocess.run(["rm", "-r", tmp_path / "away"], check=True)
    (tmp_path / "first").unlink()
    _, said = run.communicate(timeout=120)
    assert run.returncode == 1
    assert "Traceback" not in said
    assert "/proc/" not in said
    assert not (tmp_path / "run").exists()


def test_what_is_written_follows_the_folder(tmp_path):
    with RunFolder.open(tmp_path / "a") as first:
        (tmp_path / "a").rename(tmp_path / "b")
        assert first.moved
        assert first.where() == tmp_path / "b"
        with RunFolder.open(tmp_path / "a") as second:
            checkpoint.save(second.held.checkpoints, 0, {}, {"of": "second"})
            for step in range(3):
                checkpoint.save(first.held.checkpoints, step, {}, {"of": "first"})
            assert checkpoint.load_latest(tmp_path / "a" / "checkpoints").meta == {"of": "second"}
            assert checkpoint.load_latest(tmp_path / "b" / "checkpoints").step == 2
            with pytest.raises(OSError, match="No such file") as caught, second:
                (second.held.strips / "x").write_text("")
            assert caught.value.filename == str(tmp_path / "a" / "strips" / "x")


def test_a_failed_run_does_not_remove_the_lock_of_another(tmp_path):
    def fails():
        with RunFolder.open(tmp_path / "a"):
            (tmp_path / "a").rename(tmp_path / "b")
            others.append(RunFolder.open(tmp_path / "a"))
            raise ZeroDivisionError

    others = []
    with pytest.raises(ZeroDivisionError):
        fails()
    assert (tmp_path / "a" / LOCK).exists()
    others[0].close()


def test_a_lock_file_that_was_removed_frees_nothing(tmp_path):
    with RunFolder.open(tmp_path / "a"):
        (tmp_path / "a" / LOCK).unlink()
        with pytest.raises(RunError, match="in use"):
            RunFolder.open(tmp_path / "a")


def test_without_proc_a_moved_folder_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_BY_NUMBER", "/nowhere")
    with RunFolder.open(tmp_path / "a") as run:
        assert run.held.journal == run.journal
        (tmp_path / "a").rename(tmp_path / "b")
        (tmp_path / "a").mkdir()
        with pytest.raises(RunError, match="moved, removed or replaced"):
            _ = run.held
