"""A step's scores: their order, and that a reward which waits is asked while the next chunk renders."""

import contextlib
import threading

import pytest
import torch

from esengine.base.errors import RewardError
from esengine.es.engine import Task
from esengine.rewards import Weighted
from esengine.run.train import train
from esengine.sampling.rollout import Renderer, _Stopwatch, score_task
from esengine.sampling.settings import ImageSettings

DEADLINE = 30
"""Seconds after which a test that waits for another thread has failed."""


class Texts:
    prompts = ("a", "b", "c")

    def trimmed_length(self, prompts):
        return 7


class Model:
    device = torch.device("cpu")
    deferred_checks = staticmethod(contextlib.nullcontext)


class Numbers(Renderer):
    """Draws member i, prompt p, repeat r as a pixel each."""

    def chunks(self, step, rows, population=None, *, length):
        return (self.draw(*each) for each in rows)

    def draw(self, members, prompts, repeats):
        pixels = torch.stack([members, prompts, repeats], dim=1).to(torch.uint8)
        return pixels.view(-1, 3, 1, 1).expand(-1, 3, 4, 4).contiguous()


def place(images, prompts):
    """A number that says which image it is: 100 member + 10 prompt + repeat."""
    assert prompts == [Texts.prompts[int(image[1, 0, 0])] for image in images]
    return (images[:, :, 0, 0].float() * torch.tensor([100.0, 10.0, 1.0])).sum(1)


TASK = Task(step=5, prompts=torch.tensor([2, 0]), size=4, repeats=3)
EXPECTED = torch.tensor([[[100.0 * m + 10 * p + r for r in range(3)] for p in (2, 0)] for m in range(4)])


def waiting(function):
    """The reward `function`, which says that it waits for something else."""

    class Waiting:
        overlaps = True

        def __call__(self, images, prompts):
            return function(images, prompts)

    return Waiting()


@pytest.mark.parametrize("chunk", [1, 5, 24, 100])
@pytest.mark.parametrize("overlaps", [False, True])
def test_scores_are_in_the_order_of_the_task(chunk, overlaps):
    heard = []
    reward = Weighted([("place", waiting(place) if overlaps else place, 1.0), ("twice", lambda i, p: place(i, p), 0.0)])
    scores, seconds = score_task(Numbers(Model(), Texts(), None, 0, chunk), reward, None, TASK, heard.append)
    assert {name: score.dtype for name, score in scores.items()} == dict.fromkeys(
        ("place", "twice", "combined"), torch.float32
    )
    for score in scores.values():
        assert torch.equal(score, EXPECTED)
    assert sum(heard) == TASK.images
    assert seconds.keys() == {"seconds", "seconds_render", "seconds_score"}
    if not overlaps:
        assert 0 < seconds["seconds_render"] + seconds["seconds_score"] <= seconds["seconds"]


def test_a_reward_that_waits_is_asked_while_the_next_chunk_renders():
    """Chunk 0 is not scored before chunk 1 is being rendered: one after the other, this would wait for ever."""
    second = threading.Event()

    class Signalling(Numbers):
        def draw(self, members, prompts, repeats):
            if members[0] == 1:
                second.set()
            return super().draw(members, prompts, repeats)

    def score(images, prompts):
        assert second.wait(DEADLINE), "nothing was rendered meanwhile"
        return place(images, prompts)

    reward = Weighted([("place", waiting(score), 1.0)])
    scores, _ = score_task(Signalling(Model(), Texts(), None, 0, 6), reward, None, TASK, lambda count: None)
    assert torch.equal(scores["place"], EXPECTED)


def test_it_is_never_more_than_one_chunk_ahead():
    """When a chunk's rendering begins, all but the one before it are scored."""
    scored, ahead = [], []

    class Counting(Numbers):
        def draw(self, members, prompts, repeats):
            ahead.append(len(ahead) - len(scored))
            return super().draw(members, prompts, repeats)

    def score(images, prompts):
        scored.append(len(images))
        return place(images, prompts)

    reward = Weighted([("place", waiting(score), 1.0)])
    score_task(Counting(Model(), Texts(), None, 0, 2), reward, None, TASK, lambda count: None)
    assert len(ahead) == 12
    assert max(ahead) <= 1


@pytest.mark.parametrize("bad", [0, 2, 3])
def test_an_error_in_the_other_thread_names_step_and_members(bad):
    def score(images, prompts):
        if images[0, 0, 0, 0] == bad:
            raise KeyError("lost")
        return place(images, prompts)

    reward = Weighted([("place", waiting(score), 1.0)])
    with pytest.raises(RewardError, match=rf"reward place, step 5, member {bad} .*raised KeyError"):
        score_task(Numbers(Model(), Texts(), None, 0, 6), reward, None, TASK, lambda count: None)
    assert not [thread for thread in threading.enumerate() if "ThreadPool" in thread.name]


def test_a_failing_render_is_what_is_raised_and_the_thread_ends():
    class Breaking(Numbers):
        def draw(self, members, prompts, repeats):
            if members[0] == 2:
                raise ValueError("no image")
            return super().draw(members, prompts, repeats)

    reward = Weighted([("place", waiting(place), 1.0)])
    with pytest.raises(ValueError, match="no image"):
        score_task(Breaking(Model(), Texts(), None, 0, 6), reward, None, TASK, lambda count: None)
    assert not [thread for thread in threading.enumerate() if "ThreadPool" in thread.name]


def test_a_run_is_the_same_either_way(small, outcome, tmp_path, reward):
    def score(images, prompts):
        return images.float().mean(dim=(1, 2, 3))

    for folder, function in (("plain", score), ("waits", waiting(score))):
        train(small(tmp_path / folder, reward=reward(function), steps=3, image=ImageSettings(chunk=2)))
    assert outcome(tmp_path / "plain") == outcome(tmp_path / "waits")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_time_on_a_gpu_is_that_of_the_stream():
    watch = _Stopwatch(torch.device("cuda"))
    x = torch.randn(4096, 4096, device="cuda")
    for _ in range(3):
        with watch:
            x = x @ x / 64
    x.cpu()
    assert watch.total() > 0
