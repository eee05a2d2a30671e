"""A finished run that is resumed: it says so, and does not compare again."""

import dataclasses
import shutil

import pytest

from esengine.run import train as module
from esengine.run.train import train


@pytest.fixture
def finished(trained, tmp_path):
    config, result = trained
    shutil.copytree(config.run_dir, tmp_path / "run")
    return dataclasses.replace(config, run_dir=tmp_path / "run", resume=True), result


def files(run):
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}


def test_it_says_so_and_nothing_is_written(finished, notes, monkeypatch):
    config, result = finished
    monkeypatch.setattr(module, "compare_entries", lambda *args, **keys: pytest.fail("it compares again"))
    before, seen = files(config.run_dir), []
    again = train(config, notes, finish=seen.append)
    (line,) = [line for line in notes.said if "is finished" in line]
    assert "--steps" in line
    assert "esengine eval --run-dir" in line
    assert again.comparison == result.comparison
    assert seen == [config.run_dir] == [again.folder]
    assert files(config.run_dir) == before


def gone(run):
    (run / "eval.json").unlink()


def damaged(run):
    (run / "eval.json").write_text('{"settings": {')


def other(run):
    file = run / "adapter" / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("change", [gone, damaged, other])
def test_a_comparison_that_is_missing_is_made(finished, outcome, trained, notes, change):
    config, _ = finished
    change(config.run_dir)
    train(config, notes)
    assert not [line for line in notes.said if "is finished" in line]
    assert [line for line in notes.said if "the comparison is left" in line]
    assert outcome(config.run_dir) == outcome(trained[0].run_dir)


def test_other_prompts_are_compared(finished, tmp_path, notes):
    config, _ = finished
    (tmp_path / "others.txt").write_text("a hill\na stone\na bird\n")
    train(dataclasses.replace(config, eval_prompts=tmp_path / "others.txt"), notes)
    assert not [line for line in notes.said if "is finished" in line]
