"""A step's images: rendered and scored chunk by chunk, without waiting where nothing has to wait."""

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from esengine.engine import Task
from esengine.models import RenderSettings, SanaSprint, TextEmbeddings
from esengine.models.sana_sprint import Rows
from esengine.population import Population
from esengine.rewards import Weighted


@dataclass(frozen=True)
class Renderer:
    """How a run draws a list of prompts, the same from step to step.

    Attributes:
        model: with the run's population attached.
        texts: embeddings of the prompts.
        settings: how an image is sampled.
        seed: keys latents and noise.
        chunk: images in one forward.
    """

    model: SanaSprint
    texts: TextEmbeddings
    settings: RenderSettings
    seed: int
    chunk: int

    def chunks(
        self, step: int, rows: Iterable[Rows], population: Population | None = None, *, length: int
    ) -> Iterator[torch.Tensor]:
        """uint8 [B, 3, H, W] of each of some chunks of (prompts, repeats, members). See `SanaSprint.render_chunks`."""
        keys = dict(seed=self.seed, step=step, population=population, settings=self.settings, text_length=length)
        return self.model.render_chunks(self.texts, rows, **keys)

    def words(self, prompts: torch.Tensor) -> list[str]:
        return [self.texts.prompts[index] for index in prompts.tolist()]


def score_task(
    render: Renderer, reward: Weighted, population: Population, task: Task, heard: Callable[[int], None]
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Render and score every image of a step.

    Scores stay on the device until the last chunk. A reward with an attribute `overlaps = True`, which waits for
    something other than this machine's processors, is asked in a thread while the next chunk renders: one chunk
    behind, never more, so at most two chunks of images are held. The scores are the same either way.

    Args:
        heard: called with so many images that are rendered and scored, or on their way to be scored.

    Returns:
        Scores by reward name and "combined", float32 [N, P, R] on the CPU; and seconds: all of it by the wall clock
        as "seconds", and those spent on "seconds_render" and "seconds_score", which together are more where the two
        overlap.

    Raises:
        RewardError, RenderError: naming the step and the members.
    """
    began = time.perf_counter()
    overlapped = any(getattr(each, "overlaps", False) for _, each, _ in reward.terms)
    length = render.texts.trimmed_length(task.prompts)
    rendering = _Stopwatch(render.model.device)
    scoring = _Stopwatch(torch.device("cpu") if overlapped else render.model.device)

    def score(images: torch.Tensor, prompts: torch.Tensor, members: torch.Tensor) -> dict[str, torch.Tensor]:
        with scoring:
            return reward.score(images, render.words(prompts), step=task.step, members=members.tolist())

    rows = list(zip(*(column.split(render.chunk) for column in task.rows()), strict=True))
    drawn = render.chunks(
        task.step, ((prompts, repeats, members) for members, prompts, repeats in rows), population, length=length
    )
    parts: list[Future] = []
    with ThreadPoolExecutor(1) if overlapped else _AtOnce() as worker, render.model.deferred_checks():
        for members, prompts, _ in rows:
            with rendering:
                images = next(drawn)
            if parts:
                parts[-1].result()
            parts.append(worker.submit(score, images, prompts, members))
            heard(len(members))
        done = [part.result() for part in parts]
    scores = {name: torch.cat([each[name] for each in done]).cpu().view(task.shape) for name in done[0]}
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
    render: Renderer, step: int, prompts: torch.Tensor, member: int | None = None, population: Population | None = None
) -> Iterator[tuple[torch.Tensor, list[str]]]:
    """The first repeat of each of some prompts, chunk by chunk.

    Args:
        prompts: int64 [K].
        member: of the population. None: the adapter as it stands.
        population: the member's.

    Yields:
        uint8 [B, 3, H, W] and the B prompts.
    """
    length, parts = render.texts.trimmed_length(prompts), prompts.split(render.chunk)
    rows = ((part, torch.zeros_like(part), None if member is None else torch.full_like(part, member)) for part in parts)
    for part, images in zip(parts, render.chunks(step, rows, population, length=length), strict=True):
        yield images, render.words(part)
