"""A stranger's folder as --out of an evaluation, and as a run to go on with: an error that names the file, no wait."""

import os
import shutil

import pytest
from hostile import no_hang

from esengine.base.errors import RunError
from esengine.base.files import read_regular, refuse_links
from esengine.evaluation.folder import EvaluationFolder, _line, _record
from esengine.run.checkpoint import load, load_latest
from esengine.run.folder import RunFolder
from esengine.run.trackers import Record


@pytest.mark.parametrize("name", ["evaluation.json", "scores.jsonl", "report.html", "images/base@1", ".lock.0-of-1"])
def test_an_evaluation_with_a_pipe_is_refused(tmp_path, name):
    (tmp_path / "images").mkdir()
    (tmp_path / "evaluation.json").write_text("{}")
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with no_hang(), pytest.raises(RunError, match="pipe"), EvaluationFolder.open(tmp_path):
        pass


@pytest.mark.parametrize(
    "change",
    [
        {"image": 3},
        {"image": None},
        {"entry": ["a"]},
        {"index": "0"},
        {"index": [0]},
        {"repeat": 1.0},
        {"repeat": True},
    ],
)
def test_a_record_with_a_right_checksum_and_wrong_values_is_damaged(change):
    record = {"entry": "base@1", "index": 0, "repeat": 0, "image": "images/a.png", "scores": {}}
    assert _record(_line(record)) == (("base@1", 0, 0), record)
    assert _record(_line(record | change))[0] is None
    assert _record(b"[" * 5_000)[0] is None
    assert _record(b'{"crc32": ' + b"9" * 5_000 + b"}")[0] is None


@pytest.mark.parametrize("image", ["../away.png", "images/link.png", "images/pipe.png", "images/text.png"])
def test_an_image_elsewhere_is_drawn_again(tmp_path, image):
    folder = EvaluationFolder(tmp_path / "out", (0, 1))
    (tmp_path / "out" / "images").mkdir(parents=True)
    (tmp_path / "away.png").write_bytes(b"\x89PNG")
    (tmp_path / "out/images/link.png").symlink_to(tmp_path / "away.png")
    os.mkfifo(tmp_path / "out/images/pipe.png")
    (tmp_path / "out/images/text.png").write_text("text")
    with no_hang():
        assert folder._problem({"image": image}) == "the image cannot be read"
    assert folder._problem({"image": "images/none.png"}) == "the image is gone"


@pytest.mark.parametrize(
    "name", ["config.yaml", "journal.jsonl", "eval.json", "trackers.json", "checkpoints", "strips"]
)
def test_a_run_with_a_pipe_is_refused(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with no_hang(), pytest.raises(RunError, match=rf"{name} is a pipe"), RunFolder.open(tmp_path):
        pass


@pytest.mark.parametrize("name", ["meta.json", "state.safetensors"])
def test_a_checkpoint_with_a_pipe_is_passed_over(trained, tmp_path, name):
    root = shutil.copytree(trained[0].run_dir / "checkpoints", tmp_path / "checkpoints")
    older, newest = sorted(root.iterdir())[-2:]
    (newest / name).unlink()
    os.mkfifo(newest / name)
    with no_hang():
        with pytest.raises(RunError, match="regular file"):
            load(newest)
        assert load_latest(root).path == older


def test_the_record_of_trackers_may_be_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "trackers.json")
    with no_hang():
        assert Record(tmp_path / "trackers.json", resume=True).identity


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/stdin", "/proc/self", "/"])
def test_only_regular_files_are_read(path):
    with no_hang(), pytest.raises(OSError, match=r".+"):
        read_regular(path, 10)


def test_a_file_that_grows_is_no_way_around_the_limit(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 11)
    with pytest.raises(OSError, match="at most 10 bytes"):
        read_regular(tmp_path / "a", 10)
    assert read_regular(tmp_path / "a", 11) == b"x" * 11
    with pytest.raises(OSError, match="at most 10 bytes"):
        read_regular("/proc/self/maps", 10)  # its size is said to be 0


def test_what_a_run_writes_is_no_device(tmp_path):
    refuse_links("x", [tmp_path, tmp_path / "none"])
    with pytest.raises(RunError, match="device"):
        refuse_links("x", [tmp_path.__class__("/dev/null")])
