"""SIGTERM and SIGINT: the first ends a run with a checkpoint, the second at once."""

import dataclasses
import os
import pkgutil
import signal
import subprocess
import sys
import threading
import time

import journals
import pytest

import esengine.run.train
from esengine.base.errors import Stopped
from esengine.base.group import Group
from esengine.run import checkpoint
from esengine.run.stop import Stop
from esengine.sampling.rollout import Renderer
from esengine.sampling.settings import ImageSettings

REWARD = """
import os, signal
calls = 0


def score(images, prompts):
    global calls
    calls += 1
    if calls in map(int, os.environ["AT"].split(",")):
        os.kill(os.getpid(), getattr(signal, os.environ["WITH"]))
    return images.float().mean(dim=(1, 2, 3)) / 255


score.no_trial = True
"""


def train(config, *args):
    """As the command line calls it, which takes signals over."""
    return esengine.run.train.train(config, *args, stop=Stop())


def test_the_first_signal_asks_and_handlers_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    seen = []

    def gentle(stop):
        with stop.gently():
            seen.append(stop.requested)
            os.kill(os.getpid(), signal.SIGINT)
            seen.append(stop.requested)

    with Stop() as stop, pytest.raises(Stopped):
        gentle(stop)
    assert seen == [False, True]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_outside_the_steps_the_first_signal_interrupts():
    with Stop() as stop, pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
    assert stop.requested


def test_a_library_call_takes_over_no_signal(small, tmp_path, reward):
    before, seen = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)], []

    def looking(images, prompts):
        seen.append([signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)])
        return images.float().mean(dim=(1, 2, 3))

    esengine.run.train.train(small(tmp_path / "run", steps=1, reward=reward(looking), heldout_every=0, strip_every=0))
    assert seen
    assert all(each == before for each in seen)


def test_signals_are_taken_over_only_once_the_processes_have_met(small, tmp_path, monkeypatch):
    """Waiting for the others is torch's, which sees no signal that Python handles."""
    before, join, seen = signal.getsignal(signal.SIGTERM), Group.join, []

    def joining():
        seen.append(signal.getsignal(signal.SIGTERM))
        return join()

    monkeypatch.setattr(Group, "join", joining)
    train(small(tmp_path / "run", steps=1, heldout_every=0, strip_every=0))
    assert seen == [before]


def test_ctrl_c_ends_a_library_call_with_a_checkpoint(small, tmp_path, reward):
    calls = 0

    def interrupting(images, prompts):
        nonlocal calls
        calls += 1
        if calls == 7:  # in the third step
            signal.raise_signal(signal.SIGINT)
        return images.float().mean(dim=(1, 2, 3))

    config = small(tmp_path / "run", reward=reward(interrupting), heldout_every=0, strip_every=0, checkpoint_every=100)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            esengine.run.train.train(config)
    finally:
        signal.signal(signal.SIGINT, before)
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())[-1] == "step_00000002"


PLACES = {
    "the model loads": ("esengine.run.prepare.load_model", 1, None),
    "prompts are encoded": ("esengine.run.prepare.encode", 1, None),
    "the log opens": ("esengine.run.train.Writer", 1, None),
    "the first checkpoint": ("esengine.run.checkpoint.save", 1, None),
    "a held-out measure": ("esengine.run.held_out.HeldOut.measure", 2, 1),
    "the last checkpoint": ("esengine.run.checkpoint.save", 3, 2),
    "the last held-out measure": ("esengine.run.held_out.HeldOut.measure", 3, 2),
    "the comparison": ("esengine.run.train.compare_entries", 1, 2),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_signal_at_any_stage_ends_the_run_and_it_goes_on(small, tmp_path, monkeypatch, place):
    target, at, step = PLACES[place]
    owner, _, name = target.rpartition(".")
    owner = pkgutil.resolve_name(owner)
    function, calls = getattr(owner, name), 0

    def signalled(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*args, **kwargs)

    config = small(tmp_path / "run", steps=2, checkpoint_every=1, heldout_every=1, heldout_prompts=1, strip_every=0)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, signalled)
        with pytest.raises(Stopped) as caught:
            train(config)
    if step is None:
        assert str(caught.value) == "stopped before the first step: there is nothing to resume"
        train(config)
    else:
        again = f"to continue: esengine train --run-dir {config.run_dir} --resume"
        assert str(caught.value) == f"stopped after step {step} of 2; {again}"
        train(dataclasses.replace(config, resume=True))
    assert [each["step"] for each in journals.steps(config.run_dir)] == [0, 1]
    assert (config.run_dir / "eval.json").is_file()


def brightness(images, prompts):
    return images.float().mean(dim=(1, 2, 3)) / 255


@pytest.mark.parametrize(("at", "step"), [(1, 0), (13, 1), (23, 2)])
def test_a_held_out_measure_breaks_off_between_chunks(small, outcome, tmp_path, reward, at, step):
    """A measure is three chunks, a step eight: in the first measure, one between steps, the last."""
    settings = dict(steps=2, checkpoint_every=1, heldout_every=1, image=ImageSettings(chunk=1), strip_every=1)
    train(small(tmp_path / "whole", reward=reward(brightness), **settings))
    calls = 0

    def signalling(images, prompts):
        nonlocal calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return brightness(images, prompts)

    config = small(tmp_path / "run", reward=reward(signalling), **settings)
    with pytest.raises(Stopped, match=f"stopped after step {step} of 2; to continue"):
        train(config)
    assert calls == at
    assert [each["step"] for each in journals.measured(tmp_path / "run")] == list(range(step))
    calls = 100
    train(dataclasses.replace(config, resume=True))
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("at", [1, 2, 6])
def test_a_signal_in_a_strip_ends_the_run_once_the_step_is_recorded(small, outcome, tmp_path, monkeypatch, at):
    """A strip is three members in two chunks each: few images beside those of the step."""
    settings = dict(steps=2, heldout_every=1, image=ImageSettings(chunk=1), strip_every=1)
    train(small(tmp_path / "whole", **settings))
    config, chunks, drawn = small(tmp_path / "run", **settings), Renderer.chunks, 0

    def counted(self, step, rows, population=None, **keys):
        nonlocal drawn
        rows = list(rows)
        of_a_strip = step == 0 and len(rows) == 2
        for images in chunks(self, step, rows, population, **keys):
            drawn += of_a_strip
            if of_a_strip and drawn == at:
                os.kill(os.getpid(), signal.SIGTERM)
            yield images

    with monkeypatch.context() as patch:
        patch.setattr(Renderer, "chunks", counted)
        with pytest.raises(Stopped, match="stopped after step 1 of 2; to continue"):
            train(config)
    assert drawn == 6
    assert [path.name for path in (tmp_path / "run" / "strips").iterdir()] == ["step_00000000.png"]
    train(dataclasses.replace(config, resume=True))
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    pictures = [
        {path.name: path.read_bytes() for path in (tmp_path / run / "strips").iterdir()} for run in ("run", "whole")
    ]
    assert pictures[0] == pictures[1]
    assert len(pictures[0]) == 2


def test_in_another_thread_signals_stay_as_they_are():
    found = []

    def look():
        with Stop() as stop:
            found.append(stop.requested)

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [False]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_chunk_is_finished_and_a_checkpoint_written(small, outcome, tmp_path, reward, number):
    calls = 0

    def signalling(images, prompts):
        nonlocal calls
        calls += 1
        if calls == 8:  # in step 2 of three chunks a step
            os.kill(os.getpid(), number)
        return brightness(images, prompts)

    train(small(tmp_path / "whole", reward=reward(brightness), heldout_every=0))
    config = small(tmp_path / "run", reward=reward(signalling), heldout_every=0, checkpoint_every=100)
    with pytest.raises(Stopped, match=r"stopped after step 2 of 4; to continue: esengine train --run-dir .*run --res"):
        train(config)
    assert calls == 8
    assert checkpoint.load_latest(tmp_path / "run" / "checkpoints").step == 2
    calls = 100
    train(small(tmp_path / "run", reward=reward(signalling), heldout_every=0, checkpoint_every=100, resume=True))
    assert outcome(tmp_path / "run")["adapter"] == outcome(tmp_path / "whole")["adapter"]
    assert outcome(tmp_path / "run")["metrics"] == outcome(tmp_path / "whole")["metrics"]


@pytest.mark.parametrize(("name", "at", "code"), [("SIGTERM", "4", 0), ("SIGINT", "4", 0), ("SIGINT", "1", 0)])
def test_the_command_line_leaves_with_a_line(workspace, prompt_files, name, at, code):
    (workspace / "mine.py").write_text(REWARD)
    flags = [
        "--prompts", prompt_files[0], "--eval-prompts", prompt_files[1], "--reward", "mine:score", "--steps", 50,
        "--model", "tiny",
        "--population", 4, "--heldout-every", 0, "--es.prompts-per-step", 2, "--es.repeats", 1, "--image.chunk", 4,
    ]  # fmt: skip
    command = [sys.executable, "-m", "esengine", "train", "--run-dir", "run", *map(str, flags)]
    environment = {**os.environ, "AT": at, "WITH": name}
    done = subprocess.run(command, cwd=workspace, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("esengine: stopped after step ")
    assert line.endswith("; to continue: esengine train --run-dir run --resume")


def test_a_second_signal_leaves_at_once(workspace, prompt_files):
    (workspace / "mine.py").write_text(
        "import time\nfrom pathlib import Path\n\n\ndef score(images, prompts):\n"
        "    Path('asked').touch()\n    time.sleep(60)\n"
    )
    flags = ["--prompts", prompt_files[0], "--eval-prompts", prompt_files[1], "--es.prompts-per-step", 2]
    command = [
        sys.executable,
        "-m",
        "esengine",
        "train",
        "--run-dir",
        "run",
        "--model",
        "tiny",
        "--reward",
        "mine:score",
    ]
    command += [*map(str, flags), "--heldout-every", "0"]
    process = subprocess.Popen(command, cwd=workspace, env=os.environ, stderr=subprocess.PIPE)
    try:
        for _ in range(600):
            if (workspace / "asked").exists():
                break
            time.sleep(0.1)
        process.terminate()
        time.sleep(0.5)
        assert process.poll() is None
        process.terminate()
        assert process.wait(timeout=20) == -signal.SIGTERM
    finally:
        process.kill()
        process.stderr.close()
