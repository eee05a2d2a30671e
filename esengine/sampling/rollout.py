"""A step's images: rendered and scored chunk by chunk, without waiting where nothing has to wait."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from esengine.base.errors import OutOfMemory, Stopped
from esengine.base.group import ALONE, Group
from esengine.base.memory import fits, give_back
from esengine.es.engine import Task
from esengine.es.population import Population
from esengine.models import RenderSettings, SanaSprint, TextEmbeddings
from esengine.models.sana.sana_sprint import Rows
from esengine.rewards import COMBINED, Weighted
from esengine.rewards.fault_tolerant import Bearing

_log = logging.getLogger(__name__)


@dataclass
class Renderer:
    """How a run draws a list of prompts, the same from step to step.

    Attributes:
        model: with the run's population attached.
        texts: embeddings of the prompts.
        settings: how an image is sampled.
        seed: keys latents and noise.
        chunk: images that are drawn and scored together.
        limit: images in one forward; at first a chunk. Where memory runs out it is halved, and stays so.
        note: told of that.
    """

    model: SanaSprint
    texts: TextEmbeddings
    settings: RenderSettings
    seed: int
    chunk: int
    limit: int | None = None
    note: Callable[[str], None] = _log.warning

    def chunks(
        self, step: int, rows: Iterable[Rows], population: Population | None = None, *, length: int
    ) -> Iterator[torch.Tensor]:
        """uint8 [B, 3, H, W] of each of some chunks of (prompts, repeats, members). See `SanaSprint.render_chunks`.

        Raises:
            OutOfMemory: not even one image fits.
            RenderError: see `SanaSprint.render`.
        """
        keys = dict(seed=self.seed, step=step, population=population, settings=self.settings, text_length=length)
        todo = [tuple(chunk) for chunk in rows]
        while True:
            parts = [self._parts(chunk) for chunk in todo]
            drawn = self.model.render_chunks(self.texts, (part for each in parts for part in each), **keys)
            try:
                for each in parts:
                    with fits(f"{len(each[0][0])} images in one forward", "give a smaller chunk"):
                        images = [next(drawn) for _ in each]
                        images = images[0] if len(images) == 1 else torch.cat(images)
                    yield images
                    todo.pop(0)
                return
            except OutOfMemory as error:
                self._halve(max(len(each[0]) for each in parts[0]), error)
            del drawn  # with the error, all that holds tensors of the failed forward
            self.model.release_graphs()
            give_back(self.model.device)

    def _parts(self, chunk: Rows) -> list[Rows]:
        """A chunk in as many forwards as it takes."""
        limit = self.limit or len(chunk[0])
        columns = [[None] * -(-len(chunk[0]) // limit) if each is None else each.split(limit) for each in chunk]
        return list(zip(*columns, strict=True))

    def _halve(self, images: int, error: OutOfMemory) -> None:
        if images <= 1:
            raise error
        self.limit = images // 2
        self.note(f"warning: {error}; from here on {self.limit} in one forward")

    def words(self, prompts: torch.Tensor) -> list[str]:
        return [self.texts.prompts[index] for index in prompts.tolist()]


def score_task(
    render: Renderer,
    reward: Weighted | Bearing,
    population: Population,
    task: Task,
    heard: Callable[[int], None],
    *,
    stopped: Callable[[], bool] = lambda: False,
    group: Group = ALONE,
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Render and score every image of a step.

    Scores stay on the device until the last chunk. A reward with an attribute `overlaps = True`, which waits for
    something other than this machine's processors, is asked in a thread while the next chunk renders: one chunk
    behind, never more, so at most two chunks of images are held. The scores are the same either way.

    Of K processes the one of rank r draws chunks r, r + K, ... Chunks are as for one process, and so are the scores.

    Args:
        heard: called with so many images that are rendered and scored, or on their way to be scored.
        stopped: asked before each chunk.
        group: the processes that share the step.

    Returns:
        Scores by reward name and "combined", float32 [N, P, R] on the CPU; and seconds: all of it by the wall clock
        as "seconds", and those spent on "seconds_render" and "seconds_score", which together are more where the two
        overlap.

    Raises:
        RewardError, RenderError: naming the step and the members.
        Stopped: it was asked for, in whichever process.
    """
    began = time.perf_counter()
    overlapped = any(getattr(each, "overlaps", False) for _, each, _ in reward.terms)
    length = render.texts.trimmed_length(task.prompts)
    rendering = _Stopwatch(render.model.device)
    scoring = _Stopwatch(torch.device("cpu") if overlapped else render.model.device)

    def score(images: torch.Tensor, prompts: torch.Tensor, members: torch.Tensor) -> dict[str, torch.Tensor]:
        with scoring:
            return reward.score(images, render.words(prompts), step=task.step, members=members.tolist())

    chunks = list(zip(*(column.split(render.chunk) for column in task.rows()), strict=True))
    mine = chunks[group.rank :: group.size]
    drawn = render.chunks(task.step, ((p, r, m) for m, p, r in mine), population, length=length)
    parts: list[Future] = []
    with (
        ThreadPoolExecutor(1) if overlapped else _AtOnce() as worker,
        render.model.deferred_checks(),
        reward.deferred_checks(),
    ):
        for members, prompts, _ in mine:
            if stopped():
                break
            with rendering:
                images = next(drawn)
            if parts:
                parts[-1].result()
            parts.append(worker.submit(score, images, prompts, members))
            heard(len(members))
        done = [part.result() for part in parts]
    if group.any(stopped()):
        raise Stopped(f"stopped in step {task.step}")
    heard(task.images - sum(len(members) for members, _, _ in mine))  # by the others
    names = [*reward.names, COMBINED]
    own = [torch.cat([each[name] for each in done]).cpu() if done else torch.empty(0) for name in names]
    table = torch.empty(task.images, len(names))
    for rank, part in enumerate(group.gather(torch.stack(own, 1))):
        places = torch.arange(task.images).split(render.chunk)[rank :: group.size]
        table[torch.cat(places) if places else slice(0)] = part
    scores = {name: column.reshape(task.shape) for name, column in zip(names, table.unbind(1), strict=True)}
    seconds = {"seconds": time.perf_counter() - began}
    return scores, seconds | {"seconds_render": rendering.total(), "seconds_score": scoring.total()}


class _AtOnce(Executor):
    """Does the work where it is handed in."""

    def submit(self, fn: Callable, /, *args, **kwargs) -> Future:
        future = Future()
        future.set_result(fn(*args, **kwargs))
        return future


class _Stopwatch:
    """Adds up the time inside its `with` blocks: the host's, or between events of a GPU's stream without waiting."""

    def __init__(self, device: torch.device):
        self.device = device
        self._spans: list[list] = []

    def __enter__(self) -> None:
        self._spans.append([self._mark()])

    def __exit__(self, *exception) -> None:
        self._spans[-1].append(self._mark())

    def total(self) -> float:
        """Seconds of all blocks. On a GPU, call it when the stream is done with the last."""
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
    """The first repeat of each of some prompts, chunk by chunk.

    Args:
        prompts: int64 [K].
        member: of the population. None: the adapter as it stands.
        population: the member's.
        stopped: asked before each chunk; the others are left out.

    Yields:
        uint8 [B, 3, H, W] and the B prompts.
    """
    length, parts = render.texts.trimmed_length(prompts), prompts.split(render.chunk)
    rows = ((part, torch.zeros_like(part), None if member is None else torch.full_like(part, member)) for part in parts)
    drawn = render.chunks(step, rows, population, length=length)
    for part in parts:
        if stopped():
            return
        yield next(drawn), render.words(part)
