import json
import os
import random
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from esengine.base import files
from esengine.base.errors import RunError
from esengine.run import checkpoint
from esengine.run.folder import RunFolder, checkpoint_folders

META = {"noise": 1, "lr": 0.1, "name": "é", "history": [1.5, None, True], "nested": {"b": 2, "a": 1}}


def tensors(value=1.0):
    return {
        "b.weight": torch.full((3, 5), value),
        "a.weight": torch.arange(6.0).reshape(2, 3).to(torch.bfloat16),
        "step": torch.tensor(7),
        "mask": torch.tensor([True, False]),
        "none": torch.zeros(0, 4),
    }


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def names(root):
    return sorted(path.name for path in root.iterdir())


def flip(path, index, mask=1):
    data = bytearray(path.read_bytes())
    data[index] ^= mask
    path.write_bytes(data)


def test_round_trip(tmp_path):
    path = checkpoint.save(tmp_path / "deep" / "er", 12, tensors(), META)
    assert path == tmp_path / "deep" / "er" / "step_00000012"
    assert names(path) == ["meta.json", "state.safetensors"]
    for found in (checkpoint.load(path), checkpoint.load(str(path)), checkpoint.load_latest(path.parent)):
        assert (found.step, found.path, found.meta, found.skipped) == (12, path, META, ())
        assert found.tensors.keys() == tensors().keys()
        for name, tensor in tensors().items():
            assert found.tensors[name].dtype == tensor.dtype
            assert torch.equal(found.tensors[name], tensor)
    assert json.loads((path / "meta.json").read_text())["format"] == checkpoint.FORMAT


def test_views_transposes_shared_storage_and_gradients(tmp_path):
    base = torch.arange(12.0, requires_grad=True)
    given = {"t": base.reshape(3, 4).t(), "row": base[2:5], "wide": base[:1].expand(6), "base": base}
    found = checkpoint.load(checkpoint.save(tmp_path, 0, given, {}))
    assert all(torch.equal(found.tensors[name], given[name]) for name in given)
    found.tensors["t"][0, 0] = 100.0
    assert found.tensors["base"][0] == 0.0


def test_same_input_same_bytes(tmp_path):
    one = checkpoint.save(tmp_path / "1", 3, tensors(), META)
    reordered = dict(reversed(tensors().items()))
    other = checkpoint.save(tmp_path / "2", 3, reordered, dict(reversed(META.items())))
    assert contents(one) == contents(other)
    third = checkpoint.save(tmp_path / "3", 3, tensors(2.0), META)
    assert contents(one) != contents(third)


def test_prunes_to_the_newest(tmp_path):
    for step in (1, 2, 3, 100_000_000):
        checkpoint.save(tmp_path, step, tensors(), {})
    assert names(tmp_path) == ["step_00000003", "step_100000000"]
    assert checkpoint_folders(tmp_path)[0].name == "step_100000000"
    (tmp_path / "notes").mkdir()
    checkpoint.save(tmp_path, 100_000_001, tensors(), {}, keep=1)
    assert names(tmp_path) == ["notes", "step_100000001"]


def test_after_going_back_the_abandoned_later_steps_go_and_the_good_ones_stay(tmp_path):
    checkpoint.save(tmp_path, 10, tensors(), {})
    bad = checkpoint.save(tmp_path, 20, tensors(), {})
    flip(bad / "state.safetensors", -1)
    assert checkpoint.load_latest(tmp_path).step == 10
    checkpoint.save(tmp_path, 15, tensors(), {}, keep=1)
    assert names(tmp_path) == ["step_00000015"]


def test_a_step_saved_again(tmp_path):
    checkpoint.save(tmp_path, 1, tensors(), META)
    path = checkpoint.save(tmp_path, 2, tensors(), META)
    inode = (path / "meta.json").stat().st_ino
    checkpoint.save(tmp_path, 2, tensors(), META)
    assert (path / "meta.json").stat().st_ino == inode
    flip(path / "state.safetensors", -1)
    checkpoint.save(tmp_path, 2, tensors(), META)
    assert checkpoint.load(path).meta == META
    checkpoint.save(tmp_path, 2, tensors(5.0), META)
    assert checkpoint.load(path).tensors["b.weight"][0, 0] == 5.0
    assert names(tmp_path) == ["step_00000001", "step_00000002"]


@pytest.mark.parametrize("moment", ["write_synced", "sync_folder", "rename"])
def test_a_crash_while_saving_leaves_the_last_checkpoint(tmp_path, monkeypatch, moment):
    checkpoint.save(tmp_path, 1, tensors(), META)

    def crash(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*((checkpoint.Path, "rename") if moment == "rename" else (checkpoint, moment)), crash)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path, 2, tensors(2.0), META)
    assert any(name.startswith(".tmp-") for name in names(tmp_path))
    assert checkpoint.load_latest(tmp_path).step == 1
    assert checkpoint_folders(tmp_path)[0].name == "step_00000001"
    checkpoint.save(tmp_path, 2, tensors(2.0), META)
    assert names(tmp_path) == ["step_00000001", "step_00000002"]
    assert checkpoint.load_latest(tmp_path).tensors["b.weight"][0, 0] == 2.0


def test_killed_again_and_again_it_always_loads(tmp_path):
    program = (
        "import sys, torch; from esengine.run import checkpoint\n"
        "print('go', flush=True)\n"
        "for step in range(1, 10**6):\n"
        "    checkpoint.save(sys.argv[1], step, {'w': torch.full((50_000,), float(step))}, {'step': step}, keep=1)\n"
        "    print(step, flush=True)\n"
    )
    for saves in (1, 4, 7):
        writer = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout.readline() == "go\n"
        for _ in range(saves):
            reported = int(writer.stdout.readline())
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        found = checkpoint.load_latest(tmp_path)
        assert found.step >= reported
        assert found.meta == {"step": found.step}
        assert torch.equal(found.tensors["w"], torch.full((50_000,), float(found.step)))
        assert found.skipped == ()
        shutil.rmtree(found.path)


def test_every_flipped_byte_is_found(tmp_path):
    path = checkpoint.save(tmp_path, 1, {"w": torch.arange(3.0)}, {"a": [1, 2.5], "b": "é"})
    for file in path.iterdir():
        for index in range(file.stat().st_size):
            flip(file, index, 0x01)
            with pytest.raises(RunError, match="step_00000001"):
                checkpoint.load(path)
            flip(file, index, 0x01)
    assert checkpoint.load(path).step == 1


def test_a_thousand_faults_are_found_the_one_before_is_used_and_the_file_named(tmp_path):
    """Bytes changed, files cut, in the newest of two."""
    draw = random.Random(0)
    for step in (1, 2):
        path = checkpoint.save(tmp_path, step, tensors() | {"large": torch.arange(5000.0)}, META | {"step": step})
    whole = {file: file.read_bytes() for file in sorted(path.iterdir())}
    for _ in range(1000):
        file = draw.choice(list(whole))
        data = bytearray(whole[file])
        place = draw.randrange(len(data))
        if draw.random() < 0.2:
            del data[place:]
        else:
            data[place] ^= draw.randrange(1, 256)
        file.write_bytes(data)
        found = checkpoint.load_latest(tmp_path)
        assert found.step == 1
        ((bad, why),) = found.skipped
        assert bad == path
        assert f"step_00000002/{file.name}" in why
        file.write_bytes(whole[file])
    assert checkpoint.load_latest(tmp_path).step == 2


@pytest.mark.parametrize("name", ["state.safetensors", "meta.json"])
@pytest.mark.parametrize("size", [0, 1, 40, -2])
def test_truncation_is_found_and_named(tmp_path, name, size):
    path = checkpoint.save(tmp_path, 1, tensors(), META)
    data = (path / name).read_bytes()
    (path / name).write_bytes(data[:size])
    with pytest.raises(RunError, match=rf"step_00000001/{name}: corrupt"):
        checkpoint.load(path)
    (path / name).unlink()
    with pytest.raises(RunError, match=rf"step_00000001/{name}: No such file"):
        checkpoint.load(path)


@pytest.mark.parametrize("text", ["[]", "3", "{}", '{"format": 1}', '{"format": 1, "step": NaN}', "\xff", "null"])
def test_meta_that_is_not_ours(tmp_path, text):
    path = checkpoint.save(tmp_path, 1, tensors(), META)
    (path / "meta.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(RunError, match=r"meta\.json: corrupt"):
        checkpoint.load(path)


def test_another_format_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    path = checkpoint.save(tmp_path, 1, tensors(), META)
    monkeypatch.undo()
    with pytest.raises(RunError, match="expected format 1, got 2"):
        checkpoint.load(path)


def test_a_bad_one_is_skipped_logged_and_returned(tmp_path, caplog):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, tensors(step), META, keep=3)
    flip(tmp_path / "step_00000003" / "state.safetensors", -1)
    (tmp_path / "step_00000002" / "meta.json").unlink()
    found = checkpoint.load_latest(tmp_path)
    assert found.step == 1
    assert [path.name for path, _ in found.skipped] == ["step_00000003", "step_00000002"]
    assert "SHA-256" in found.skipped[0][1]
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "step_00000003" in caplog.records[0].getMessage()
    flip(tmp_path / "step_00000001" / "state.safetensors", 30)
    with pytest.raises(RunError, match=r"can be read; the newest: .*step_00000003"):
        checkpoint.load_latest(tmp_path)


def test_no_checkpoint(tmp_path):
    for root in (tmp_path, tmp_path / "missing"):
        assert checkpoint_folders(root) == []
        with pytest.raises(RunError, match="no checkpoint under"):
            checkpoint.load_latest(root)
    with pytest.raises(RunError, match="No such file"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize(
    ("step", "keep", "meta", "error"),
    [
        (-1, 2, {}, ValueError),
        (1, 0, {}, ValueError),
        (1, 2, {"a": float("nan")}, ValueError),
        (1, 2, {"a": object()}, TypeError),
    ],
)
def test_save_refuses_before_it_writes(tmp_path, step, keep, meta, error):
    with pytest.raises(error):
        checkpoint.save(tmp_path, step, {}, meta, keep=keep)
    assert names(tmp_path) == []


def test_replace_file_keeps_the_old_contents_in_a_crash(tmp_path, monkeypatch):
    path = tmp_path / "f"
    files.replace_file(path, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", lambda descriptor: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            files.replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    files.replace_file(path, b"newer")
    assert contents(tmp_path) == {"f": b"newer"}


def test_run_folder_paths(tmp_path):
    with RunFolder.open(tmp_path / "runs" / "a") as run:
        assert run.path.is_dir()
        found = [run.config, run.journal, run.checkpoints, run.adapter, run.tensorboard, run.strips]
    expected = ["config.yaml", "journal.jsonl", "checkpoints", "adapter", "tensorboard", "strips"]
    assert found == [tmp_path / "runs" / "a" / name for name in expected]


def test_run_folder_in_use_names_the_process(tmp_path):
    program = (
        "import sys; from esengine.run.folder import RunFolder\n"
        "with RunFolder.open(sys.argv[1]):\n"
        "    print('locked', flush=True)\n"
        "    sys.stdin.readline()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "locked\n"
        for resume in (False, True):
            with pytest.raises(RunError, match=rf"is in use by process {holder.pid} on {os.uname().nodename}$"):
                RunFolder.open(tmp_path, resume=resume)
    finally:
        holder.kill()
        holder.wait()
    RunFolder.open(tmp_path).close()  # the lock died with its process


def test_a_second_command_leaves_before_torch_is_loaded(tmp_path):
    program = "import sys\nfrom esengine.cli import main\nprint(main(sys.argv[1:]), 'torch' in sys.modules)"
    command = [sys.executable, "-c", program, "train", "--run-dir", str(tmp_path), "--model", "tiny"]
    with RunFolder.open(tmp_path):
        held = subprocess.run(command, capture_output=True, text=True, timeout=60)
        other = {**os.environ, "RANK": "1", "WORLD_SIZE": "x"}
        rank = subprocess.run(command, capture_output=True, text=True, timeout=60, env=other)
    assert held.stdout == "1 False\n"
    assert f"error: run folder {tmp_path} is in use by process {os.getpid()} on " in held.stderr
    assert rank.stdout == "1 True\n"  # the leading process holds the folder for all
    assert "WORLD_SIZE" in rank.stderr


def test_looking_for_a_lock_changes_nothing(tmp_path):
    RunFolder.require_free(tmp_path / "missing")
    assert names(tmp_path) == []
    with RunFolder.open(tmp_path / "a") as run:
        before = (run.path / ".lock").read_bytes()
        with pytest.raises(RunError, match="in use"):
            RunFolder.require_free(run.path)
    RunFolder.require_free(tmp_path / "a")
    RunFolder.open(tmp_path / "a").close()
    (tmp_path / "victim").write_bytes(before)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / ".lock").symlink_to("../victim")
    RunFolder.require_free(tmp_path / "b")
    assert (tmp_path / "victim").read_bytes() == before


def test_run_folder_is_locked_within_one_process_and_released(tmp_path):
    with RunFolder.open(tmp_path) as run, pytest.raises(RunError, match=f"in use by process {os.getpid()} "):
        RunFolder.open(tmp_path)
    run.close()
    with pytest.raises(ZeroDivisionError), RunFolder.open(tmp_path):
        1 / 0  # noqa: B018
    RunFolder.open(tmp_path).close()


def test_run_folder_that_holds_a_run(tmp_path):
    with RunFolder.open(tmp_path / "a") as run:
        run.config.write_text("seed: 0\n")
        checkpoint.save(run.checkpoints, 0, tensors(), {})
    with RunFolder.open(tmp_path / "a", resume=True) as run:
        assert checkpoint.load_latest(run.checkpoints).step == 0
    with RunFolder.open(tmp_path / "a") as run:  # no step is behind it, so it may begin anew
        checkpoint.save(run.checkpoints, 1, tensors(), {})
    with pytest.raises(RunError, match=r"already holds a run: add --resume, or choose another --run-dir"):
        RunFolder.open(tmp_path / "a")


def test_a_refusal_leaves_no_lock_in_a_folder_of_somebody_else(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="nothing to resume"):
        RunFolder.open(tmp_path, resume=True)
    with pytest.raises(ZeroDivisionError), RunFolder.open(tmp_path):
        raise ZeroDivisionError
    assert names(tmp_path) == ["notes.txt"]


def test_half_written_files_are_removed_on_the_next_visit(tmp_path):
    with RunFolder.open(tmp_path / "a") as run:
        checkpoint.save(run.checkpoints, 1, tensors(), {})
        run.adapter.mkdir()
        (run.adapter / ".tmp-adapter_model.safetensors-x").write_text("torn")
        (run.path / ".tmp-config.yaml-x").write_text("torn")
    with RunFolder.open(tmp_path / "a", resume=True) as run:
        assert names(run.adapter) == []
        assert names(run.path) == [".lock", "adapter", "checkpoints"]


def test_run_folder_with_nothing_to_resume(tmp_path):
    with pytest.raises(RunError, match=r"missing: nothing to resume"):
        RunFolder.open(tmp_path / "missing", resume=True)
    assert names(tmp_path) == []
    (tmp_path / "checkpoints" / ".tmp-step_00000001").mkdir(parents=True)
    with pytest.raises(RunError, match="nothing to resume, it holds no checkpoint"):
        RunFolder.open(tmp_path, resume=True)
    RunFolder.open(tmp_path).close()  # the refusal released the lock


def test_run_folder_that_is_a_file(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(RunError, match="there is a file"):
        RunFolder.open(tmp_path / "f")
    with pytest.raises(RunError, match="there is a file"):
        RunFolder.open(tmp_path / "f" / "g")
