"""Runs without --run-dir, and a working folder whose name is not UTF-8."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from esengine.base.errors import RunError
from esengine.cli import main
from esengine.run import folder
from esengine.run.folder import RunFolder
from esengine.run.settings import load, load_run

REWARD = "def score(images, prompts):\n    return images.float().mean(dim=(1, 2, 3)) / 255\n"
FLAGS = [
    "--model", "tiny", "--prompts", "p.txt", "--eval-prompts", "h.txt", "--reward", "own:score", "--steps", "1",
    "--population", "4", "--es.prompts-per-step", "2", "--es.repeats", "1", "--heldout-every", "0",
    "--strip-every", "0", "--lora.targets", "to_q", "--image.chunk", "4",
]  # fmt: skip
SAME_SECOND = """
import sys
from esengine.run import folder
folder.dated = lambda: "2026-01-01_00-00-00"
from esengine.cli import main
sys.exit(main(sys.argv[1:]))
"""


def prepare(place):
    place.mkdir(exist_ok=True)
    (place / "p.txt").write_text("a red fox\ntwo green apples\nthe sea at night\n")
    (place / "h.txt").write_text("an owl\na lamp\n")
    (place / "own.py").write_text(REWARD)
    return place


def call(place, *args, program=("-m", "esengine")):
    command = [sys.executable, *program, *map(os.fspath, args)]
    return subprocess.run(command, cwd=place, capture_output=True, timeout=300)


def test_runs_that_start_in_the_same_second_take_a_folder_each(cache, tmp_path):
    place = prepare(tmp_path)
    with ThreadPoolExecutor(3) as pool:
        done = list(pool.map(lambda seed: call(place, "train", *FLAGS, "--seed", str(seed), program=("-c", SAME_SECOND)), range(3)))  # noqa: E501 # fmt: skip
    assert [each.returncode for each in done] == [0, 0, 0], done
    runs = sorted((place / "runs").iterdir())
    assert [run.name for run in runs] == ["2026-01-01_00-00-00" + end for end in ("", "_2", "_3")]
    assert sorted(load_run(run).seed for run in runs) == [0, 1, 2]
    for each in done:
        named = next(line for line in each.stdout.decode().splitlines() if line.startswith("run folder"))
        assert (place / named.split()[-1] / "report.html").is_file()


def test_a_dated_folder_is_new_and_is_left_by_a_run_that_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "dated", lambda: "now")
    with RunFolder.open_dated(tmp_path / "runs") as first, RunFolder.open_dated(tmp_path / "runs") as second:
        assert [first.path.name, second.path.name] == ["now", "now_2"]
    with pytest.raises(ZeroDivisionError), RunFolder.open_dated(tmp_path / "others"):
        raise ZeroDivisionError
    assert not (tmp_path / "others").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="is a file"):
        RunFolder.open_dated(tmp_path / "file")


@pytest.fixture
def odd(tmp_path):
    """A folder whose name is not UTF-8. The file system must allow it."""
    place = tmp_path / os.fsdecode(b"odd-\xff\xfe")
    try:
        return prepare(place)
    except OSError:
        pytest.skip("this file system allows UTF-8 names only")


def test_a_working_folder_that_is_not_utf8(cache, odd, monkeypatch, capsys):
    monkeypatch.chdir(odd)
    monkeypatch.delitem(sys.modules, "own", raising=False)

    def good(*args):
        assert main(list(args)) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    assert "held-out prompts" in good("train", *FLAGS, "--run-dir", "a")
    assert load(odd / "a" / "config.yaml") == load_run(odd / "a")
    good("train", "--config", "a/config.yaml", "--run-dir", "b")
    assert load_run(odd / "b") == load_run(odd / "a")
    good("train", "--run-dir", "b", "--resume", "--steps", "2")
    good("train", *FLAGS, "--run-dir", "c", "--init-adapter", "a/adapter")
    for run in ("b", "c"):
        assert "bit for bit" in good("replay", run)
        assert good("report", run) == f"{run}/report.html\n"
    for _ in range(2):  # made, then read back
        assert "2 prompts of h" in good("eval", "--run-dir", "b", "--benchmark", "h.txt", "--reward", "own:score")
    good("report", "b/evaluations/h")
    good("render", "--run-dir", "b", "an owl")
