"""Several processes make the run that one makes, bit for bit, and end together."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.multiprocessing as processes

from esengine.base.errors import ConfigError, RunError
from esengine.base.group import Group, place
from esengine.base.progress import Progress
from esengine.run.replay import replay
from esengine.run.settings import ReplayConfig
from esengine.run.stop import Stop

REWARD = """
import os
from pathlib import Path


def score(images, prompts):
    if os.environ["RANK"] == os.environ.get("FAILS") and Path("run/checkpoints/step_00000002").exists():
        raise RuntimeError("this rank is ill")
    return images.float().mean(dim=(1, 2, 3)) / 255
"""


@pytest.fixture
def torchrun(workspace, prompt_files):
    """The command line in K processes: the finished process."""

    def call(count, run, *flags, chunk=3, **environment):
        (workspace / "mine.py").write_text(REWARD)
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", count, "--standalone"]
        command += ["-m", "esengine", "train", "--run-dir", run, *flags]
        if "--resume" not in flags:
            command += [
                "--model",
                "tiny",
                "--prompts",
                prompt_files[0],
                "--eval-prompts",
                prompt_files[1],
                "--population",
                4,
            ]
            command += ["--reward", "mine:score", "--lora.targets", "to_q", "--checkpoint-every", 2, "--steps", 4]
            command += ["--es.prompts-per-step", 2, "--es.repeats", 1, "--image.chunk", chunk, "--strip-every", 0]
        return subprocess.run(
            list(map(str, command)), cwd=workspace, env={**os.environ, **environment}, capture_output=True, text=True,
            timeout=240,
        )  # fmt: skip

    return call


@pytest.mark.parametrize(
    ("rank", "size", "expected"),
    [(None, None, (0, 1)), ("0", "1", (0, 1)), ("2", "3", (2, 3))]
    + [(rank, size, None) for rank, size in (("x", "2"), (None, "2"), ("1", None), ("2", "2"), ("0", "0"), ("-1", "2"))]
    + [("", "", None), ("0", "2.0", None), ("²", "3", None)],
)
def test_the_place_of_a_process(monkeypatch, rank, size, expected):
    for name, value in (("RANK", rank), ("WORLD_SIZE", size)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    if expected:
        assert place() == expected
        return
    with pytest.raises(ConfigError) as caught:
        Group.join()
    assert caught.value.setting == "RANK, WORLD_SIZE"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "chunks"), [((), (3, 3)), (("--deterministic",), (3, 2))], ids=["T1", "deterministic"]
)
def test_two_processes_make_the_run_of_one_and_it_is_replayed(torchrun, outcome, workspace, flags, chunks):
    for count, run, chunk in zip((1, 2), ("one", "two"), chunks, strict=True):
        done = torchrun(count, run, *flags, chunk=chunk)
        assert done.returncode == 0, done.stderr
    assert outcome(workspace / "two") == outcome(workspace / "one")
    assert "2 processes" in done.stderr
    assert done.stdout.count("base against adapter on 3 held-out prompts") == 1
    assert replay(ReplayConfig(run_dir=workspace / "two"), Progress()).agreed == 4


def test_a_rank_that_dies_ends_the_group_and_the_run_goes_on_with_another_number(torchrun, outcome, workspace):
    assert torchrun(1, "whole").returncode == 0
    done = torchrun(2, "run", FAILS="1")
    assert done.returncode != 0
    assert "this rank is ill" in done.stderr
    done = torchrun(4, "run", "--resume")
    assert done.returncode == 0, done.stderr
    assert outcome(workspace / "run")["adapter"] == outcome(workspace / "whole")["adapter"]
    assert outcome(workspace / "run")["metrics"] == outcome(workspace / "whole")["metrics"]


def joined(rank, size, port):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    return Group.join()


def meet(function, size=3):
    """What `function(group)` gives in `size` processes."""
    context, port = processes.get_context("fork"), 20000 + os.getpid() % 20000
    queue = context.SimpleQueue()

    def work(rank):
        group = joined(rank, size, port)
        queue.put((rank, function(group)))
        group.leave()

    started = [context.Process(target=work, args=(rank,)) for rank in range(size)]
    for each in started:
        each.start()
    found = dict(queue.get() for _ in started)
    for each in started:
        each.join()
    return [found[rank] for rank in range(size)]


def test_gathered_parts_are_in_the_order_of_ranks_and_of_any_length():
    def gather(group):
        part = torch.arange(2 * group.rank, dtype=torch.float32).view(-1, 2) + group.rank
        return [each.tolist() for each in group.gather(part)], group.any(group.rank == 1), group.any(False)

    expected = [[], [[1.0, 2.0]], [[2.0, 3.0], [4.0, 5.0]]]
    assert meet(gather) == [(expected, True, False)] * 3


def test_a_process_that_ends_is_an_error_of_one_line_for_the_others():
    def gather(group):
        if group.rank == 1:
            return "left"
        with pytest.raises(RunError, match=r"process \d of 3") as caught:
            [group.gather(torch.ones(2)) for _ in range(9)]
        return "\n" in str(caught.value)

    assert meet(gather) == [False, "left", False]


def test_a_second_signal_ends_a_process_that_waits_for_the_others():
    context, port = processes.get_context("fork"), 20000 + os.getpid() % 20000
    ready = context.Event()

    def work(rank):
        group = joined(rank, 2, port)
        if rank == 0:
            time.sleep(60)
        with Stop() as stop, stop.gently():
            ready.set()
            group.wait()

    started = [context.Process(target=work, args=(rank,)) for rank in range(2)]
    try:
        for each in started:
            each.start()
        assert ready.wait(60)
        time.sleep(0.3)
        started[1].terminate()
        time.sleep(0.5)
        assert started[1].is_alive()
        started[1].terminate()
        started[1].join(20)
        assert started[1].exitcode == -signal.SIGTERM
    finally:
        for each in started:
            each.kill()


def test_alone_nothing_is_exchanged():
    group = Group()
    tensor = torch.ones(3)
    assert group.gather(tensor)[0] is tensor
    assert group.any(True)
    assert not group.any(False)
    with group.first():
        group.wait()
    assert threading.active_count() >= 1
