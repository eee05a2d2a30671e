"""A journal with a value missing, changed or added is refused on resume, if replay needs it."""

import copy
import dataclasses
import json
import shutil

import journals
import pytest

from esengine.base.errors import RunError
from esengine.base.progress import Progress
from esengine.run import journal
from esengine.run.folder import RunFolder
from esengine.run.prepare import _saved
from esengine.run.replay import replay
from esengine.run.settings import ReplayConfig, load_run
from esengine.run.state import latest
from esengine.run.train import train


@pytest.fixture(scope="module")
def twice(small, tmp_path_factory):
    """A run of two starts: three steps, then resumed to the fourth."""
    config = small(tmp_path_factory.mktemp("twice") / "run", steps=3, strip_every=0)
    train(config)
    train(dataclasses.replace(config, steps=4, resume=True))
    return config.run_dir


def places(value, path=()):
    """The path of every value below a JSON value. Of a list, its first and its last."""
    inner = value.items() if isinstance(value, dict) else list(enumerate(value))[:: max(1, len(value) - 1)]
    for key, each in inner:
        yield (*path, key)
        if isinstance(each, dict | list):
            yield from places(each, (*path, key))


def changed(record, path, how):
    record = copy.deepcopy(record)
    holder = record
    for key in path[:-1]:
        holder = holder[key]
    key, value = path[-1], holder[path[-1]]
    if how == "missing":
        del holder[key]
    elif how == "null":
        holder[key] = None
    elif how == "NaN":
        holder[key] = float("nan")
    elif how == "text":
        holder[key] = "x"
    elif how == "larger":
        holder[key] = value + 1 if type(value) in (int, float) else [value, value]
    elif isinstance(holder, list):
        holder.append(holder[-1])
    else:
        holder["more"] = 1.0
    return record


def with_defaults(value):
    """A section of settings with the values that runs of earlier versions had."""
    return journal.NEWER | value if isinstance(value, dict) else value


def needed(run):
    """What replay takes from a journal."""
    found = journal.read(run / journal.NAME)
    starts = [
        {name: with_defaults(each.settings.get(name)) for name in journal.IN_THE_UPDATE}
        for each in found.of(journal.Start)
    ]
    saved = [(each.step, each.adapter_sha256) for each in found.of(journal.Saved)]
    return starts, journals.fitness(run), saved


HOWS = ["missing", "null", "NaN", "text", "larger", "more"]


@pytest.mark.parametrize("how", HOWS)
def test_what_replay_needs_is_checked_on_resume(twice, tmp_path, monkeypatch, how):
    run, newest = tmp_path / "run", latest(twice / "checkpoints")
    shutil.copytree(twice, run)
    monkeypatch.setattr("esengine.run.state.latest", lambda root: newest)  # read once
    lines = (twice / journal.NAME).read_bytes().splitlines()
    whole, refused = needed(run), 0
    for number, line in enumerate(lines):
        record = json.loads(line)
        for path in places(record):
            of_settings = len(path) > 1 and path[0] == "settings"
            if "environment" in path or (number and of_settings and path[1] not in journal.IN_THE_UPDATE):
                continue
            other = json.dumps(changed(record, path, how)).encode()
            if other == line:
                continue
            (run / journal.NAME).write_bytes(b"\n".join([*lines[:number], other, *lines[number + 1 :], b""]))
            try:
                _, kept = _saved(RunFolder(run, None))
            except RunError:
                refused += 1
                continue
            if len(kept.lines) < len(lines):  # behind the checkpoint: cut off
                (run / journal.NAME).write_bytes(b"".join(kept.cut(4).lines))
                assert number >= len(kept.lines)
                continue
            assert needed(run) == whole, f"line {number + 1}: {path}"
    assert refused > 50


@pytest.mark.parametrize("name", ["es", "lora", "update", "seed"])
def test_a_start_that_lacks_a_setting_is_named(twice, tmp_path, name):
    run = tmp_path / "run"
    shutil.copytree(twice, run)

    def without(records):
        value = records[0]["settings"][name]
        if isinstance(value, dict):
            del value[next(iter(value))]
        else:
            del records[0]["settings"][name]
        return records

    journals.rewrite(run, without)
    before = (run / journal.NAME).read_bytes()
    config = load_run(run)
    with pytest.raises(RunError, match=rf"settings of start 1: expected a value of {name}"):
        train(dataclasses.replace(config, run_dir=run, resume=True, steps=5))
    assert (run / journal.NAME).read_bytes() == before
    assert replay(ReplayConfig(run_dir=twice), Progress()).agreed == 4


def test_lines_in_another_order_are_refused(twice, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(twice, run)
    lines = (twice / journal.NAME).read_bytes().splitlines(keepends=True)
    for number in range(len(lines) - 1):
        swapped = [*lines[:number], lines[number + 1], lines[number], *lines[number + 2 :]]
        (run / journal.NAME).write_bytes(b"".join(swapped))
        try:
            _, found = _saved(RunFolder(run, None))
        except RunError:
            continue
        (run / journal.NAME).write_bytes(b"".join(found.lines))  # a resumed run drops damaged lines behind its steps
        assert needed(run)[:2] == needed(twice)[:2]
