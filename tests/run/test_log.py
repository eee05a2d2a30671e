import errno
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from esengine.run.folder import RunFolder
from esengine.run.log import RunLog


@pytest.fixture
def folder(tmp_path):
    with RunFolder.open(tmp_path / "run") as folder:
        yield folder


def records(folder):
    return [json.loads(line) for line in folder.metrics.read_text().splitlines()]


def scalars(folder, tag):
    events = EventAccumulator(str(folder.tensorboard))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def noise(count, height=8, width=8):
    return torch.randint(256, (count, 3, height, width), dtype=torch.uint8)


def test_one_line_a_step_readable_at_once(folder):
    with RunLog(folder) as log:
        log.log(0, {"reward/mean": 1.5, "images": 64, "why": "start"})
        assert records(folder) == [{"step": 0, "reward/mean": 1.5, "images": 64, "why": "start"}]
        log.log(1, {"reward/mean": 2.5})
    assert [record["step"] for record in records(folder)] == [0, 1]
    assert scalars(folder, "reward/mean") == [(0, 1.5), (1, 2.5)]


def test_numbers_that_are_not_finite_are_null(folder):
    with RunLog(folder) as log:
        log.log(0, {"a": float("nan"), "b": float("inf"), "c": -float("inf"), "d": np.float64("nan"), "e": 1e308})
    text = folder.metrics.read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 0} | dict.fromkeys("abcd") | {"e": 1e308}


def test_resume_drops_what_comes_again(folder):
    with RunLog(folder) as log:
        for step in range(6):
            log.log(step, {"x": step})
    with RunLog(folder, resume_step=3) as log:
        assert [record["step"] for record in records(folder)] == [0, 1, 2]
        for step in range(3, 5):
            log.log(step, {"x": 10 * step})
    assert [record["x"] for record in records(folder)] == [0, 1, 2, 30, 40]
    assert scalars(folder, "x") == [(0, 0), (1, 1), (2, 2), (3, 30), (4, 40)]
    with RunLog(folder, resume_step=0):
        assert records(folder) == []


@pytest.mark.parametrize("torn", ['{"step": 2, "x', "{", '{"step": 2}\n{"st', "\0\0\0"])
def test_a_torn_last_line_is_dropped_with_a_warning(folder, torn, caplog):
    whole = '{"step": 0}\n{"step": 1}\n'
    folder.metrics.write_text(whole + torn)
    with RunLog(folder, resume_step=2) as log:
        assert folder.metrics.read_text() == whole
        log.log(2, {})
    assert records(folder) == [{"step": 0}, {"step": 1}, {"step": 2}]
    assert "dropped 1 line" in caplog.text


def test_a_whole_line_that_lacks_its_newline_stays(folder):
    folder.metrics.write_text('{"step": 0}\n{"step": 1}')
    with RunLog(folder, resume_step=2) as log:
        log.log(2, {})
    assert [record["step"] for record in records(folder)] == [0, 1, 2]


def test_nothing_to_drop_leaves_the_file_alone(folder):
    folder.metrics.write_text('{"step": 0}\n')
    inode = folder.metrics.stat().st_ino
    with RunLog(folder, resume_step=1):
        assert folder.metrics.stat().st_ino == inode
    with RunLog(folder):
        assert folder.metrics.read_text() == ""


def test_strip_file_and_tensorboard(folder):
    images = {"best": noise(3), "median": noise(2), "worst": noise(3)}
    with RunLog(folder) as log:
        path = log.strip(10, images, captions=["a cat", "猫 ünicode\nnewline", "word " * 90])
    assert path == folder.strips / "step_00000010.png"
    with Image.open(path) as picture:
        assert picture.mode == "RGB"
        size = picture.size
    events = EventAccumulator(str(folder.tensorboard))
    events.Reload()
    (image,) = events.Images("strips")
    assert (image.step, image.width, image.height) == (10, *size)


def test_a_measure_is_a_line_a_picture_and_curves(folder):
    record = {"step": 10, "scores": {"a": {"mean": 2.5, "change": -0.5}}, "optimised": "a", "parted": []}
    with RunLog(folder) as log:
        path = log.measured(record, noise(3), ["one", "two", "three"])
        assert log.held_out == [record]
    assert path == folder.path / "heldout" / "step_00000010.png"
    assert json.loads((folder.path / "heldout.jsonl").read_text()) == record
    assert scalars(folder, "heldout/a") == [(10, 2.5)]
    assert scalars(folder, "heldout_change/a") == [(10, -0.5)]
    events = EventAccumulator(str(folder.tensorboard))
    events.Reload()
    (image,) = events.Images("heldout")
    with Image.open(path) as picture:
        assert (image.step, image.width, image.height) == (10, *picture.size)


def test_measures_are_dropped_on_resume_and_can_be_set_aside(folder):
    with RunLog(folder) as log:
        for step in (0, 2, 4):
            log.measured({"step": step, "scores": {}}, noise(1), ["x"])
    with RunLog(folder, resume_step=4) as log:
        assert [record["step"] for record in log.held_out] == [0, 2]
        log.measured({"step": 4, "scores": {}}, noise(1), ["x"])
        assert log.set_held_out_aside() == folder.path / "heldout.4.jsonl"
        assert log.held_out == []
        log.measured({"step": 5, "scores": {}}, noise(1), ["x"])
    assert (folder.path / "heldout.jsonl").read_bytes() == b'{"step": 5, "scores": {}}\n'
    kept = (folder.path / "heldout.4.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in kept] == [0, 2, 4]


def test_histograms_and_settings_are_in_tensorboard(folder):
    with RunLog(folder, settings={"es": {"sigma": 0.5}, "targets": ["to_q"]}) as log:
        log.histogram(3, "members/a", torch.tensor([1.0, 2.0, 2.0, 5.0]))
    events = EventAccumulator(str(folder.tensorboard))
    events.Reload()
    (histogram,) = events.Histograms("members/a")
    assert (histogram.step, histogram.histogram_value.num, histogram.histogram_value.max) == (3, 4, 5)
    (text,) = events.Tensors("settings/text_summary")
    assert "sigma: 0.5" in text.tensor_proto.string_val[0].decode()


def test_tensorboard_is_imported_only_when_a_log_is_opened():
    program = "import sys, esengine.run.log; sys.exit('torch.utils.tensorboard' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_full_disk_is_told_with_the_logs_name(folder):
    log = RunLog(folder)
    log._metrics.close()
    log._metrics._file = open("/dev/full", "a")  # noqa: SIM115 (the log's to close)
    for spend in (lambda: log.log(0, {"reward": 1.0}), log.close):
        with pytest.raises(OSError, match="No space left") as caught:
            spend()
        assert caught.value.filename == str(folder.metrics)


def test_a_full_disk_is_told_with_the_pictures_name_and_leaves_no_half_of_it(folder, monkeypatch):
    def full(self, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with RunLog(folder) as log, pytest.raises(OSError, match="No space left") as caught:
        log.strip(0, {"best": noise(1)})
    assert caught.value.filename == str(folder.strips / "step_00000000.png")
    assert list(folder.strips.iterdir()) == []
