"""What may lie in a run folder, and who may hold it. See also test_checkpoint.py."""

import errno
import fcntl
import os
import subprocess
import sys
import time

import pytest

from esengine.base.errors import RunError
from esengine.run import checkpoint
from esengine.run.folder import RunFolder


@pytest.mark.parametrize(
    "name",
    [
        ".lock", "config.yaml", "journal.jsonl", "eval.json", "comparison.png", "trackers.json", "report.html",
        "checkpoints", "adapter", "tensorboard", "strips", "heldout", "wandb",
        "checkpoints/.tmp-step_00000001", "checkpoints/step_00000003", "strips/step_00000000.png",
        "heldout/step_00000000.png", "adapter/adapter_config.json", "tensorboard/events",
    ],
)  # fmt: skip
@pytest.mark.parametrize("resume", [False, True])
def test_a_link_out_of_the_folder_is_refused_and_what_it_leads_to_is_untouched(tmp_path, name, resume):
    run, link, away = tmp_path / "run", tmp_path / "run" / name, tmp_path / "away"
    link.parent.mkdir(parents=True)
    if resume:
        checkpoint.save(run / "checkpoints", 1, {}, {}) if name != "checkpoints" else None
    (away / ".tmp-precious").mkdir(parents=True)
    (away / "step_00000001").mkdir()
    (tmp_path / "victim").write_text("precious\n")
    folder = name in ("checkpoints", "adapter", "tensorboard", "strips", "heldout", "wandb") or "step_0000000" in name
    link.symlink_to(away if folder and not name.endswith("png") else tmp_path / "victim")
    with pytest.raises(RunError, match=rf"{os.path.basename(name)} is a symbolic link"):
        RunFolder.open(run, resume=resume)
    assert (tmp_path / "victim").read_text() == "precious\n"
    assert sorted(path.name for path in away.iterdir()) == [".tmp-precious", "step_00000001"]
    assert link.is_symlink()


def test_a_lock_that_is_another_file_too_is_refused_and_not_written_to(tmp_path):
    (tmp_path / "victim").write_text("precious\n")
    os.link(tmp_path / "victim", tmp_path / ".lock")
    with pytest.raises(RunError, match=r"expected \.lock to be a file with one name"):
        RunFolder.open(tmp_path)
    assert (tmp_path / "victim").read_text() == "precious\n"
    (tmp_path / ".lock").unlink()
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(RunError, match=r"expected \.lock to be a file with one name"):
        RunFolder.open(tmp_path)


def test_a_full_disk_is_told_with_the_locks_name(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left") as caught:
        RunFolder.open(tmp_path)
    assert caught.value.filename == str(tmp_path / ".lock")


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    torn = [tmp_path / place / ".tmp-step_00000001.png-ab" for place in ("", "adapter", "strips", "heldout")]
    for path in torn:
        path.parent.mkdir(exist_ok=True)
        path.write_text("half")
    with RunFolder.open(tmp_path):
        assert not [path for path in torn if path.exists()]


def test_a_refused_process_leaves_the_holders_lock_as_it_is(tmp_path):
    with RunFolder.open(tmp_path):
        before = (tmp_path / ".lock").read_text()
        for refused in (RunFolder.open, RunFolder.require_free):
            with pytest.raises(RunError, match="in use by"):
                refused(tmp_path)
        assert (tmp_path / ".lock").read_text() == before
    RunFolder.require_free(tmp_path)
    RunFolder.require_free(tmp_path / "missing")
    assert not (tmp_path / "missing").exists()


def test_a_second_process_leaves_within_two_seconds_before_torch_is_imported(tmp_path):
    program = (
        "import sys\n"
        "from esengine.cli import main\n"
        "code = main(['train', '--model', 'tiny', '--run-dir', sys.argv[1]])\n"
        'sys.exit(f\'{code} {sorted({"torch", "diffusers", "peft"} & set(sys.modules))}\')\n'
    )
    with RunFolder.open(tmp_path):
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=60, cwd="/"
        )
    assert f"run folder {tmp_path} is in use by process {os.getpid()} on " in done.stderr
    assert done.stderr.endswith("\n1 []\n"), done.stderr


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    run = RunFolder.open(tmp_path)
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(tell, b"!")
        time.sleep(30)
        os._exit(0)
    try:
        assert os.read(ready, 1) == b"!"
        with pytest.raises(RunError, match="in use"):  # the parent's is still there
            RunFolder.open(tmp_path)
        run.close()
        RunFolder.open(tmp_path).close()
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_a_lock_that_its_holder_took_away_is_not_taken_for_the_folders(tmp_path, monkeypatch):
    """Two that open `.lock` before and after it is removed must not both hold the folder."""
    lock, opened = fcntl.flock, []

    def removed_first(descriptor, kind):
        if not opened:
            (tmp_path / "run" / ".lock").unlink()
        opened.append(descriptor)
        lock(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    with RunFolder.open(tmp_path / "run"):
        assert len(opened) == 2
        with pytest.raises(RunError, match=f"in use by process {os.getpid()}"):
            RunFolder.open(tmp_path / "run")


@pytest.mark.parametrize("damaged", [False, True])
def test_a_run_that_has_lost_its_checkpoints_is_not_begun_anew(trained, tmp_path, damaged):
    content = b"{}\n" if damaged else (trained[1].folder / "journal.jsonl").read_bytes()
    (tmp_path / "journal.jsonl").write_bytes(content)
    with pytest.raises(RunError, match=r"already holds a run, journal\.jsonl without a checkpoint; choose another"):
        RunFolder.open(tmp_path)
    assert (tmp_path / "journal.jsonl").read_bytes() == content
    checkpoint.save(tmp_path / "checkpoints", 0, {}, {})
    with pytest.raises(RunError, match="already holds a run: add --resume"):
        RunFolder.open(tmp_path)


def test_things_of_others_that_are_named_like_torn_files_are_in_nobodys_way(tmp_path):
    with RunFolder.open(tmp_path) as run:
        checkpoint.save(run.checkpoints, 1, {}, {})
    (tmp_path / ".tmp-x").mkdir()
    (tmp_path / "checkpoints" / ".tmp-file").write_text("")
    with RunFolder.open(tmp_path, resume=True) as run:
        checkpoint.save(run.checkpoints, 2, {}, {})
    assert (tmp_path / ".tmp-x").is_dir()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000001", "step_00000002"]
