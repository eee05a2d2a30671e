import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from esengine.checkpoint import RunFolder
from esengine.runlog import RunLog, draw_strip


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


def test_strip_shows_every_image_unaltered_in_its_place():
    images = {"best": noise(2, 128, 160), "worst": noise(3, 128, 160)}
    picture = np.asarray(draw_strip(images, captions=["one", "two"], margin=4))
    gutter, header = picture.shape[1] - 3 * 164, picture.shape[0] - 2 * 132
    for row, label in enumerate(images):
        for column, image in enumerate(images[label].permute(0, 2, 3, 1).numpy()):
            top, left = header + row * 132, gutter + column * 164
            assert np.array_equal(picture[top : top + 128, left : left + 160], image)
    assert (picture[:header] < 128).any()  # captions
    for row in range(2):
        assert (picture[header + row * 132 :, :gutter][:128] < 128).any()  # labels
    assert (picture[header : header + 128, gutter + 2 * 164 :] == 255).all()  # best has no third image


@pytest.mark.parametrize(("size", "shown"), [((8, 8), (128, 128)), ((50, 100), (100, 200)), ((600, 1024), (300, 512))])
def test_strip_scale(size, shown):
    picture = draw_strip({"a": noise(1, *size)}, margin=0)
    assert picture.height == shown[0]
    assert picture.width - shown[1] == draw_strip({"a": noise(1, 128, 128)}, margin=0).width - 128


def test_strips_of_the_same_images_have_the_same_pixels():
    images = {"best": noise(2)}
    assert draw_strip(images, ["x"]).tobytes() == draw_strip(images, ["x"]).tobytes()


@pytest.mark.parametrize("images", [{}, {"a": noise(0)}, {"a": noise(1).float()}, {"a": noise(1)[0]}])
def test_strip_refuses(images):
    with pytest.raises(ValueError, match="images"):
        draw_strip(images)


def test_tensorboard_is_imported_only_when_a_log_is_opened():
    program = "import sys, esengine.runlog; sys.exit('torch.utils.tensorboard' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
