"""Renders and scores a step's images chunk by chunk, with as few waits as possible."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from esengine.base.errors import OutOfMemory, Stopped
from esengine.base.group import ALONE, Group
from esengine.base.memory import give_back, oom_guard
from esengine.base.prompt_files import METADATA, Metadata
from esengine.es.engine import Task
from esengine.es.population import Population
from esengine.es.rows import Rows
from esengine.models import Generator, RenderSettings, TextEmbeddings
from esengine.rewards import COMBINED, Weighted
from esengine.rewards.fault_tolerant import FaultTolerant

_log = logging.getLogger(__name__)


@dataclass
class Renderer:
    """Renders a list of prompts in the same way at every step.

    Attributes:
        model: the generator, with the run's population attached.
        texts: embeddings of the prompts.
        settings: how an image is sampled.
        seed: seed of latents and noise.
        chunk: images that are rendered and scored together.
        limit: most images in one forward; None: a chunk. On out-of-memory it is halved for the rest of the run.
        note: called with a warning when the limit is halved.
        metadata: the columns of each prompt, for rewards. None: the prompts have none.
        reward_vae: whether `score_task` decodes by the model's decoder for a reward.
    """

    model: Generator
    texts: TextEmbeddings
    settings: RenderSettings
    seed: int
    chunk: int
    limit: int | None = None
    note: Callable[[str], None] = _log.warning
    metadata: Sequence[Metadata] | None = None
    reward_vae: bool = False

    def decoding(self, full: bool = False) -> AbstractContextManager:
        """A context in which images are decoded for the reward. `full`: by the model's own decoder all the same."""
        return self.model.reward_decoding() if self.reward_vae and not full else nullcontext()

    def chunks(
        self, step: int, rows: Iterable[Rows], population: Population | None = None, *, length: int
    ) -> Iterator[torch.Tensor]:
        """Yields uint8 [B, 3, H, W] for each of the given chunks of a step. See `Generator.render_chunks`.

        Raises:
            OutOfMemory: not even one image fits.
            RenderError: see `Generator.render_chunks`.
        """
        keys = dict(seed=self.seed, step=step, population=population, settings=self.settings, text_length=length)
        todo = list(rows)
        while True:
            parts = [chunk.split(self.limit or max(1, chunk.count)) for chunk in todo]
            drawn = self.model.render_chunks(self.texts, (part for each in parts for part in each), **keys)
            try:
                for each in parts:
                    with oom_guard(f"{each[0].count} images in one forward", "give a smaller chunk"):
                        images = [next(drawn) for _ in each]
                        images = images[0] if len(images) == 1 else torch.cat(images)
                    yield images
                    todo.pop(0)
                return
            except OutOfMemory as error:
                self._halve(parts[0][0].count, error)
            del drawn  # this and the error hold tensors of the failed forward
            self.model.release_graphs()
            give_back(self.model.device)

    def _halve(self, images: int, error: OutOfMemory) -> None:
        if images <= 1:
            raise error
        self.limit = images // 2
        self.note(f"warning: {error}; from here on {self.limit} in one forward")

    def words(self, prompts: torch.Tensor) -> list[str]:
        return [self.texts.prompts[index] for index in prompts.tolist()]

    def columns(self, prompts: torch.Tensor) -> dict[str, list[Metadata]]:
        """The argument `metadata` for prompts by their indices, int64 [B]; nothing if no prompt has columns."""
        if self.metadata is None:
            return {}
        return {METADATA: [self.metadata[index] for index in prompts.tolist()]}


def score_task(
    render: Renderer,
    reward: Weighted | FaultTolerant,
    population: Population,
    task: Task,
    on_images: Callable[[int], None],
    *,
    stopped: Callable[[], bool] = lambda: False,
    group: Group = ALONE,
    full: bool = False,
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Render and score every image of a step.

    Scores stay on the device until the last chunk. A reward that `_overlaps` is at most one chunk behind, so at most
    two chunks of images are in memory. The scores are the same either way.
    With K processes, rank r renders chunks r, r + K, ... Chunks and scores are those of one process.

    Args:
        on_images: called with the number of images that are rendered and scored, or queued to be scored.
        stopped: called before each chunk. True ends the step.
        group: the processes that share the step.
        full: decode by the model's own decoder, even if the reward has another one.

    Returns:
        Scores by reward name and "combined", float32 [N, P, R] on the CPU; and times in seconds: "seconds" in all,
        "seconds_render" and "seconds_score", which may overlap.

    Raises:
        RewardError, RenderError: the message names the step and the members.
        Stopped: `stopped` returned True in any process.
    """
    began, overlapped = time.perf_counter(), _overlaps(reward)
    rendering = _Stopwatch(render.model.device)
    scoring = _Stopwatch(torch.device("cpu") if overlapped else render.model.device)

    def score(images: torch.Tensor, prompts: torch.Tensor, members: torch.Tensor) -> dict[str, torch.Tensor]:
        with scoring:
            words, columns = render.words(prompts), render.columns(prompts)
            return reward.score(images, words, **columns, step=task.step, members=members.tolist())

    mine = task.rows().split(render.chunk)[group.rank :: group.size]
    drawn = render.chunks(task.step, mine, population, length=render.texts.trimmed_length(task.prompts))
    worker, parts = ThreadPoolExecutor(1) if overlapped else _AtOnce(), []
    with worker, render.decoding(full), render.model.deferred_checks(), reward.deferred_checks():
        for members, prompts, _ in mine:
            if stopped():
                break
            with rendering:
                images = next(drawn)
            if parts:
                parts[-1].result()
            parts.append(worker.submit(score, images, prompts, members))
            on_images(len(members))
        done = [part.result() for part in parts]
    if group.any(stopped()):
        raise Stopped(f"stopped in step {task.step}")
    on_images(task.images - sum(len(members) for members, _, _ in mine))  # by the other processes
    scores = _gathered(task, [*reward.names, COMBINED], done, render.chunk, group)
    spent = {"seconds_render": rendering.total(), "seconds_score": scoring.total()}
    return scores, {"seconds": time.perf_counter() - began, **spent}


def judge_task(
    render: Renderer,
    judge: Callable[[torch.Tensor, list[str]], torch.Tensor],
    population: Population,
    task: Task,
    on_images: Callable[[int], None],
    *,
    names: Sequence[str],
    stopped: Callable[[], bool] = lambda: False,
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Render every image of a step, and have all of them compared at once.

    Args:
        judge: takes the images uint8 [N P R, 3, H, W] on the CPU, in the order of `Task.rows`, and their prompts.
            Returns float32 [N P R].
        names: names of the scores that get the result, besides "combined".
        stopped: called before each chunk. True ends the step.

    Returns:
        As `score_task`. "seconds_score" is the time that the person took.
    """
    began, watch, parts = time.perf_counter(), _Stopwatch(render.model.device), []
    rows = task.rows()
    chunks = rows.split(render.chunk)
    with watch, render.decoding(), render.model.deferred_checks():
        length = render.texts.trimmed_length(task.prompts)
        drawn = render.chunks(task.step, chunks, population, length=length)
        for chunk in chunks:
            if stopped():
                raise Stopped(f"stopped in step {task.step}")
            parts.append(next(drawn).cpu())
            on_images(len(chunk.prompts))
    rendered = time.perf_counter()
    scores = judge(torch.cat(parts), render.words(rows.prompts)).reshape(task.shape)
    spent = {"seconds_render": watch.total(), "seconds_score": time.perf_counter() - rendered}
    return dict.fromkeys((*names, COMBINED), scores), {"seconds": time.perf_counter() - began, **spent}


def _overlaps(reward: Weighted | FaultTolerant) -> bool:
    """Whether the reward is called in a thread while the next chunk renders.

    A reward sets `overlaps = True` if it waits for something other than this machine's processors.
    """
    return any(getattr(term.reward, "overlaps", False) for term in reward.terms)


def _gathered(
    task: Task, names: list[str], done: list[dict[str, torch.Tensor]], chunk: int, group: Group
) -> dict[str, torch.Tensor]:
    """Scores float32 [N, P, R] by name, gathered from the chunks of all processes."""
    own = [torch.cat([each[name] for each in done]).cpu() if done else torch.empty(0) for name in names]
    table = torch.empty(task.images, len(names))
    for rank, part in enumerate(group.gather(torch.stack(own, 1))):
        places = torch.arange(task.images).split(chunk)[rank :: group.size]
        table[torch.cat(places) if places else slice(0)] = part
    return {name: column.reshape(task.shape) for name, column in zip(names, table.unbind(1), strict=True)}


class _AtOnce(Executor):
    """An executor that runs the work inside `submit`."""

    def submit(self, fn: Callable, /, *args, **kwargs) -> Future:
        future = Future()
        future.set_result(fn(*args, **kwargs))
        return future


class _Stopwatch:
    """Sums the time of its `with` blocks: host time, or time between events of a GPU's stream, without waiting."""

    def __init__(self, device: torch.device):
        self.device = device
        self._spans: list[list] = []

    def __enter__(self) -> None:
        self._spans.append([self._mark()])

    def __exit__(self, *exception) -> None:
        self._spans[-1].append(self._mark())

    def total(self) -> float:
        """Seconds of all blocks. On a GPU, call it after the stream has finished the last block."""
        if self.device.type != "cuda":
            return sum(end - start for start, end in self._spans)
        return sum(start.elapsed_time(end) for start, end in self._spans) / 1000

    def _mark(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


def render_all(
    render: Renderer,
    step: int,
    prompts: torch.Tensor,
    member: int | None = None,
    population: Population | None = None,
    *,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[torch.Tensor, list[str]]]:
    """Render the first repeat of each of the given prompts, chunk by chunk.

    Args:
        prompts: int64 [K], indices into the renderer's prompts.
        member: a member of the population. None: the current adapter.
        population: the population of the member.
        stopped: called before each chunk. True skips the remaining chunks.

    Yields:
        uint8 [B, 3, H, W] and the B prompts.
    """
    length, parts = render.texts.trimmed_length(prompts), prompts.split(render.chunk)
    rows = (
        Rows(None if member is None else torch.full_like(part, member), part, torch.zeros_like(part)) for part in parts
    )
    drawn = render.chunks(step, rows, population, length=length)
    for part in parts:
        if stopped():
            return
        yield next(drawn), render.words(part)
