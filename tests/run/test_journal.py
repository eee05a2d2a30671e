import contextlib
import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from esengine.base.errors import RunError
from esengine.run import journal
from esengine.run.journal import Journal, Measured, Saved, Start, Step, Writer, plain, read
from esengine.run.trackers import open_trackers

IDENTITY = {name: kind() for name, kind in journal.IDENTITY.items()}
START = Start(0, {"population": 2, "es": {"sigma": 0.5}}, IDENTITY)
SCORES = {"a": {"mean": 2.5, "change": -0.5, "standard_error": None, "each": [2.5]}}


def step(number, **metrics):
    return Step(number, [1.0, -1.0], metrics)


@pytest.fixture
def path(tmp_path):
    return tmp_path / journal.NAME


def write(path, *records, before=None):
    first, *others = records
    with Writer(path, first, before) as writer:
        for record in others:
            writer.append(record)
    return path


def whole(path):
    """A journal of four steps with a checkpoint of step 2."""
    measured = Measured(2, SCORES, "a", [], {"prompts": ["x"], "rewards": {}})
    return write(path, START, Saved(0, "00"), step(0), step(1), Saved(2, "22"), measured, step(2), step(3))


def test_what_is_written_is_read_at_once(path):
    with Writer(path, START) as writer:
        assert read(path).records == [START]
        writer.append(step(0, reward=1.5, why="start", images=64))
        found = read(path)
        assert (found.done, found.start, found.records[1]) == (1, START, step(0, reward=1.5, why="start", images=64))
        writer.append(Saved(1, "ab"))
        writer.append(Measured(1, SCORES, "a", ["b"]))
    assert read(path).records == writer.contents.records
    assert read(path).held_out == [Measured(1, SCORES, "a", ["b"])]
    assert b"".join(read(path).lines) == path.read_bytes()


def test_numbers_that_are_not_finite_are_null_and_nan_to_readers(path):
    metrics = {"a": float("nan"), "b": float("inf"), "c": -float("inf"), "d": np.float64("nan"), "e": 1e308, "f": "x"}
    write(path, START, Step(0, [1.0, -1.0], plain(metrics)))
    line = json.loads(path.read_text().splitlines()[1], parse_constant=pytest.fail)
    assert line["metrics"] == dict.fromkeys("abcd") | {"e": 1e308, "f": "x"}
    (found,) = read(path).of(Step)
    assert [name for name, value in found.numbers.items() if value != value] == list("abcde")  # 1e308 is no float32
    assert "f" not in found.numbers


def test_float32_survives(path):
    fitness = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 30, 4096)
    write(path, Start(0, {"population": 4096}, IDENTITY), Step(0, fitness.tolist(), {}))
    (found,) = read(path).of(Step)
    assert torch.equal(torch.tensor(found.fitness, dtype=torch.float32), fitness)


@pytest.mark.parametrize(("at", "kept"), [(0, 2), (1, 3), (2, 5), (3, 7), (4, 8)])
def test_a_cut_ends_with_the_checkpoint_or_with_the_step_before_it(path, at, kept):
    found = read(whole(path))
    cut = found.cut(at)
    assert (cut.done, cut.records) == (at, found.records[:kept])
    again = dataclasses.replace(START, step=at, settings={"population": 4})
    write(path, again, before=cut)
    assert read(path).records == [*found.records[:kept], again]


def test_a_cut_beyond_the_last_step_is_an_error(path):
    with pytest.raises(RunError, match=r"journal\.jsonl: expected 5 steps, got 4"):
        read(whole(path)).cut(5)


def test_a_series_of_held_out_scores_begins_with_its_prompts_and_rewards(path):
    first, second = {"prompts": ["x"], "rewards": {}}, {"prompts": ["y"], "rewards": {}}
    series = [Measured(0, SCORES, "a", [], first), Measured(0, SCORES, "a", []), Measured(0, SCORES, "a", [], second)]
    assert read(write(path, START)).held_out == []
    assert read(write(path, START, *series[:2])).held_out == series[:2]
    assert read(write(path, START, *series)).held_out == series[2:]


@pytest.mark.parametrize(
    "torn", [b'{"kind": "step", "step": 4, "fit', b'{"k', b"\0\0\0", b'{"kind": "saved", "step": 4}']
)
def test_a_last_line_without_a_break_is_still_being_written(path, torn):
    data = whole(path).read_bytes()
    path.write_bytes(data + torn)
    assert read(path).done == 4
    write(path, dataclasses.replace(START, step=4), before=read(path).cut(4))
    assert path.read_bytes().startswith(data)
    assert path.read_bytes().count(b"\n") == data.count(b"\n") + 1


def line(**changes):
    record = {"kind": "step", "step": 4, "fitness": [1, -1], "metrics": {}} | changes
    return json.dumps({name: value for name, value in record.items() if value is not ...})


DAMAGED = {
    "no JSON": "{]",
    "a list": "[]",
    "zeros": "\0\0\0",
    "deep": "[" * 100_000,
    "a number of thousands of digits": line(step=4).replace("4", "4" + "0" * 5000),
    "another kind": line(kind="evil"),
    "no kind": line(kind=...),
    "kind of a list": line(kind=[]),
    "a step too far": line(step=5),
    "a step twice": line(step=3),
    "no step": line(step=...),
    "step of true": line(step=True),
    "half a step": line(step=4.0),
    "no fitness": line(fitness=...),
    "fitness of one": line(fitness=[1.0]),
    "fitness of three": line(fitness=[1.0, 2.0, 3.0]),
    "fitness NaN": line(fitness=[1.0, float("nan")]),
    "fitness without end": '{"kind": "step", "step": 4, "fitness": [1, 1e999], "metrics": {}}',
    "fitness of texts": line(fitness=["1", "-1"]),
    "fitness of lists": line(fitness=[[1], [-1]]),
    "fitness of null": line(fitness=None),
    "no metrics": line(metrics=...),
    "metrics of a list": line(metrics=[1]),
    "a metric of a list": line(metrics={"a": [1]}),
    "a metric of true": line(metrics={"a": True}),
    "more than a step has": line(settings={}),
    "a start that is early": line(kind="start", step=3, settings={"population": 2}, identity=IDENTITY, fitness=...),
    "a start without settings": json.dumps({"kind": "start", "step": 4, "identity": IDENTITY}),
    "a start without a population": json.dumps({"kind": "start", "step": 4, "settings": {}, "identity": IDENTITY}),
    "a start of nothing": json.dumps({"kind": "start", "step": 4, "settings": {"population": 2}, "identity": {}}),
    "a hash of a number": json.dumps({"kind": "saved", "step": 4, "adapter_sha256": 7}),
    "scores of a list": json.dumps({"kind": "held_out", "step": 4, "scores": [], "optimised": "a", "parted": []}),
    "a score without its change": json.dumps(
        {"kind": "held_out", "step": 4, "scores": {"a": {"mean": 1}}, "optimised": "a", "parted": []}
    ),
    "each of a number": json.dumps(
        {"kind": "held_out", "step": 4, "scores": {"a": {**SCORES["a"], "each": 5}}, "optimised": "a", "parted": []}
    ),
    "of a number": json.dumps(
        {"kind": "held_out", "step": 4, "scores": SCORES, "optimised": "a", "parted": [], "of": 5}
    ),
    "parted of a text": json.dumps({"kind": "held_out", "step": 4, "scores": {}, "optimised": "a", "parted": "b"}),
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_a_line_that_no_run_writes_is_named(path, damage, caplog):
    data = whole(path).read_bytes()
    path.write_bytes(data + damage.encode() + b"\n" + line(step=4).encode() + b"\n")
    with pytest.raises(RunError, match=r"journal\.jsonl, line 9: ") as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(path))
    # a run that resumes from a checkpoint before it does not need it
    assert read(path, needed=4).done == 4
    assert "line 9" in caplog.text
    with pytest.raises(RunError, match="line 9"):
        read(path, needed=5)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda lines: lines[1:], "line 1: .*expected the start"),
        (lambda lines: lines[:2] + lines[3:], "line 3: .*expected step 0, got 1"),
        (lambda lines: lines[:3] + lines[2:], "line 4: .*expected step 1, got 0"),
        (lambda lines: [], "expected the start of a run"),
    ],
)
def test_a_gap_or_a_step_twice_is_refused(path, change, where):
    lines = whole(path).read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(change(lines)))
    with pytest.raises(RunError, match=where):
        read(path)


def test_a_file_that_is_none_is_one_line(path, tmp_path):
    with pytest.raises(RunError, match=r"journal\.jsonl: No such file"):
        read(path)
    path.mkdir()
    with pytest.raises(RunError, match=r"journal\.jsonl: "):
        read(path)


@given(data=st.data())
def test_any_bytes_are_read_or_refused(tmp_path_factory, data):
    """A damage anywhere is an error of one kind, or the file is still a journal of whole records."""
    path = tmp_path_factory.mktemp("j") / journal.NAME
    content = bytearray(whole(path).read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at : at + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    path.write_bytes(content)
    with contextlib.suppress(RunError):
        found = read(path)
        assert isinstance(found, Journal)
        assert [each.step for each in found.of(Step)] == list(range(found.done))


def test_a_full_disk_names_the_file_and_leaves_no_half_line(path, monkeypatch):
    with Writer(path, START) as writer:
        writer.append(step(0))
        before = path.read_bytes()

        class Full:
            def __init__(self, file):
                self.file, self.calls = file, 0

            def write(self, data):
                self.calls += 1
                if self.calls > 1:
                    raise OSError(28, "No space left on device")
                return self.file.write(data[:5])

            def __getattr__(self, name):
                return getattr(self.file, name)

        file, writer._file = writer._file, Full(writer._file)
        with pytest.raises(OSError, match="No space left") as caught:
            writer.append(step(1))
        assert caught.value.filename == str(path)
        assert path.read_bytes() == before
        writer._file = file
        writer.append(step(1))
    assert read(path).done == 2


def test_a_record_that_cannot_follow_is_not_written(path):
    with Writer(path, START) as writer, pytest.raises(ValueError, match="expected step 0, got 1"):
        writer.append(step(1))
    assert read(path).done == 0


def test_torch_is_not_imported():
    program = "import sys, esengine.run.journal; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_tensorboard_has_histograms_and_settings(tmp_path):
    trackers = open_trackers(tmp_path, tmp_path / "tensorboard", (), None, pytest.fail)
    trackers.start({"es": {"sigma": 0.5}, "targets": ["to_q"]})
    trackers.histogram(3, "members/a", np.array([1.0, 2.0, 2.0, 5.0]))
    trackers.finish()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (histogram,) = events.Histograms("members/a")
    assert (histogram.step, histogram.histogram_value.num, histogram.histogram_value.max) == (3, 4, 5)
    (text,) = events.Tensors("settings/text_summary")
    assert "sigma: 0.5" in text.tensor_proto.string_val[0].decode()


def test_tensorboard_purges_the_steps_that_come_again(tmp_path):
    for resumed, values in ((None, range(6)), (3, (30, 40))):
        trackers = open_trackers(tmp_path, tmp_path / "tensorboard", (), resumed, pytest.fail)
        trackers.start({})
        for at, value in enumerate(values, start=resumed or 0):
            trackers.log(at, {"x": value})
        trackers.finish()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("x")] == [(0, 0), (1, 1), (2, 2), (3, 30), (4, 40)]
