"""Processes of one run, forked here: the run of one, whatever their number; and what happens where they differ."""

import dataclasses
import os
import signal
import socket
import traceback

import journals
import pytest
import torch
import torch.multiprocessing as processes

from esengine.base.progress import Progress
from esengine.es.population import Population
from esengine.models import SanaSprint
from esengine.run import checkpoint
from esengine.run.replay import replay
from esengine.run.settings import ReplayConfig
from esengine.run.stop import Stop
from esengine.run.train import train
from esengine.sampling.settings import ImageSettings


class Told(Progress):
    def __init__(self):
        self.said = []

    def note(self, text):
        self.said.append(text)


def world(size, config_of, before=lambda rank: None):
    """Trains in `size` processes: by rank, what it said and the error it ended with."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    context = processes.get_context("fork")
    queue = context.SimpleQueue()

    def work(rank):
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        torch.set_num_threads(1)
        told, error = Told(), ""
        try:
            before(rank)
            train(config_of(rank), told, Stop())
        except Exception as failed:
            error = f"{type(failed).__name__}: {failed}"
            traceback.print_exc()
        queue.put((rank, (told.said, error)))

    started = [context.Process(target=work, args=(rank,)) for rank in range(size)]
    for each in started:
        each.start()
    found = dict(queue.get() for _ in started)
    for each in started:
        each.join()
    return [found[rank] for rank in range(size)]


def steps(run):
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").iterdir())


@pytest.mark.parametrize("size", [2, 4])
def test_any_number_of_processes_makes_the_run_of_one(small, outcome, trained, tmp_path, size):
    found = world(size, lambda rank: small(tmp_path / "run"))
    assert [error for _, error in found] == [""] * size
    assert outcome(tmp_path / "run") == outcome(trained[1].folder)


@pytest.mark.parametrize("size", [2, 4])
def test_one_image_at_a_time_no_bit_depends_on_the_number_of_processes(small, outcome, tmp_path, size):
    settings = dict(deterministic=True, steps=2, image=ImageSettings(chunk=3))
    train(small(tmp_path / "one", **settings))
    found = world(size, lambda rank: small(tmp_path / "run", **settings))
    assert [error for _, error in found] == [""] * size
    assert outcome(tmp_path / "run") == outcome(tmp_path / "one")


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_that_come_to_differ_end_and_leave_no_checkpoint_of_it(small, tmp_path, rank):
    config = small(tmp_path / "run", steps=6, heldout_every=0, strip_every=0)

    def nudge(mine):
        update = Population.update

        def nudged(self, *, step, fitness):
            stats = update(self, step=step, fitness=fitness)
            if step == 2 and mine == rank:
                next(iter(self.parameters().values())).data[0, 0] += 1e-3
            return stats

        Population.update = nudged

    found = world(2, lambda rank: config, nudge)
    for _, error in found:
        assert error == "RunError: process 1: its adapter differs from that of process 0 after step 4"
    assert steps(tmp_path / "run") == [0, 2]
    train(dataclasses.replace(config, resume=True))
    assert replay(ReplayConfig(run_dir=tmp_path / "run"), Progress()).agreed == 6


def test_processes_that_differ_leave_no_checkpoint_where_they_are_stopped(small, tmp_path):
    config = small(tmp_path / "run", steps=9, checkpoint_every=9, heldout_every=0, strip_every=0)

    def nudge(mine):
        update = Population.update

        def nudged(self, *, step, fitness):
            stats = update(self, step=step, fitness=fitness)
            if step == 1 and mine == 1:
                next(iter(self.parameters().values())).data[0, 0] += 1e-3
            if step == 2 and mine == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return stats

        Population.update = nudged

    found = world(2, lambda rank: config, nudge)
    for _, error in found:
        assert error == "RunError: process 1: its adapter differs from that of process 0 after step 3"
    assert steps(tmp_path / "run") == [0]


@pytest.mark.parametrize(("at", "step"), [(9, 1), (16, 2)])
def test_a_signal_in_a_measure_which_the_first_process_makes_alone_stops_all(small, tmp_path, reward, at, step):
    """A measure is three chunks, its share of a step four: in the second measure, and in the last."""
    calls = 0

    def signalling(images, prompts):
        nonlocal calls
        calls += 1
        if calls == at and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGTERM)
        return images.float().mean(dim=(1, 2, 3))

    settings = dict(steps=2, checkpoint_every=1, heldout_every=1, image=ImageSettings(chunk=1), strip_every=0)
    found = world(2, lambda rank: small(tmp_path / "run", reward=reward(signalling), **settings))
    assert found[0][1].startswith(f"Stopped: stopped after step {step} of 2; to continue")
    assert found[1][1] == ""
    assert len(journals.measured(tmp_path / "run")) == step
    assert steps(tmp_path / "run")[-1] == step


def test_memory_that_runs_out_in_one_process_is_told_by_the_first_and_kept_by_all(small, tmp_path, reward):
    config = small(tmp_path / "run", steps=2, image=ImageSettings(chunk=4), heldout_every=0, strip_every=0)
    config = dataclasses.replace(config, reward=reward(lambda images, prompts: images.float().mean(dim=(1, 2, 3))))

    def narrow(mine):
        velocity = SanaSprint._velocity

        def failing(self, x, *args):
            if len(x) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return velocity(self, x, *args)

        def scored(images, prompts):
            if len(images) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return images.float().mean(dim=(1, 2, 3))

        if mine == 1:
            SanaSprint._velocity = failing
            reward(scored)

    found = world(2, lambda rank: config, narrow)
    assert [error for _, error in found] == ["", ""]
    said = [line for line in found[0][0] if "memory ran out" in line]
    assert said == [
        "warning: memory ran out in process 1: from here on 2 in one forward at most",
        "warning: memory ran out in process 1: from here on 1 scored together at most",
    ]
    meta = checkpoint.load_latest(tmp_path / "run" / "checkpoints").meta
    assert (meta["limit"], meta["scoring_limit"]) == (2, 1)


DIFFER = {
    "prompts": ({}, "prompts: the file's contents"),
    "steps": ({"steps": 3}, "steps: 4 -> 3"),
    "population": ({"population": 6}, "population: 4 -> 6"),
    "reward": ({"reward": "jpeg_incompressibility"}, "reward: jpeg_compressibility -> jpeg_incompressibility"),
}


@pytest.mark.parametrize("what", DIFFER)
def test_processes_that_are_given_different_runs_end_before_a_step(small, tmp_path, what):
    changes, words = DIFFER[what]
    if what == "prompts":
        (tmp_path / "other.txt").write_text("one\ntwo\nthree\nfour\n")
        changes = {"prompts": tmp_path / "other.txt"}
    found = world(2, lambda rank: small(tmp_path / "run", **(changes if rank else {})))
    for _, error in found:
        assert error.startswith("RunError: process 1: its run differs from that of process 0 (")
        assert words in error
    assert not (tmp_path / "run").exists()


def test_processes_may_name_the_same_prompts_differently(small, tmp_path, prompt_files):
    (tmp_path / "same.txt").write_bytes(prompt_files[0].read_bytes())
    changes = [{}, {"prompts": tmp_path / "same.txt"}]
    found = world(2, lambda rank: small(tmp_path / "run", steps=1, heldout_every=0, strip_every=0, **changes[rank]))
    assert [error for _, error in found] == ["", ""]
    assert journals.steps(tmp_path / "run")[0]["step"] == 0
