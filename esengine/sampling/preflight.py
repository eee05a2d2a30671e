"""Checks before the first step that each row of a mixed batch is computed with its own member.

Members 0 and 1 are rendered in one batch, and each of them alone with the same prompts and latents. For row i and the
output y of a target layer at its first call:

    e = max_i |mixed_i - alone_i| / max_i |other_i - alone_i|       other: the same row with the other member

Up to rounding, e is 0. It is about 1 if a module mixes up or flattens the rows of its batch.
"""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from esengine.base.errors import ConfigError, OutOfMemory
from esengine.base.memory import give_back, oom_guard
from esengine.es.population import Population
from esengine.es.rows import Rows
from esengine.models import Generator, RenderSettings, TextEmbeddings

MEMBERS, PROMPTS = torch.tensor([0, 1, 1, 0, 1]), torch.tensor([0, 0, 1, 1, 0])
"""Rows of the mixed batch. Reversing, shifting by one or doubling each row changes them."""
LARGEST = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Largest e of a data type. In half precision, where members differ by little more than rounding, it is 0.5."""
SAMPLES = 4096
"""Numbers of a row of a layer's output that are compared, evenly spread."""


@dataclass(frozen=True)
class Preflight:
    """What the check found.

    Attributes:
        layers: e of each target layer that was compared, in the order of their calls.
        seconds: time to render one image, on average.
        images: uint8 [B, 3, H, W] on the CPU, of the mixed batch.
        prompts: their B prompts.
    """

    layers: dict[str, float]
    seconds: float
    images: torch.Tensor
    prompts: list[str]


def preflight(
    model: Generator,
    texts: TextEmbeddings,
    settings: RenderSettings,
    population: Population,
    *,
    seed: int,
    most: int,
) -> Preflight:
    """Render a few images of two members, together and alone.

    Args:
        model: the generator, with `population` attached.
        texts: embeddings of at least one prompt.
        settings: how an image is sampled.
        population: the population.
        seed: seed of the latents.
        most: most images in one forward. With one, members never share a batch, and nothing is compared. It is halved
            when memory runs out.

    Raises:
        ConfigError: a row of a mixed batch differs from its member alone. The message names the first such layer.
        OutOfMemory: not even one image fits.
        RenderError: an image cannot be rendered.
    """
    count = min(most, len(MEMBERS))
    while True:
        try:
            with oom_guard(f"{count} images in one forward", "give a smaller chunk"):
                return _compared(model, texts, settings, population, seed, count)
        except OutOfMemory:
            if count == 1:
                raise
            count //= 2
        model.release_graphs()
        give_back(model.device)


def _compared(
    model: Generator, texts: TextEmbeddings, settings: RenderSettings, population: Population, seed: int, count: int
) -> Preflight:
    """`preflight` with `count` rows."""
    members, prompts = MEMBERS[:count], PROMPTS[:count] % len(texts)
    settings = dataclasses.replace(settings, graphs="never")  # a graph would be captured with the hooks in it
    keys = dict(seed=seed, step=0, population=population, settings=settings)

    def render(members: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor, float]:
        rows, start = Rows(members, prompts, torch.zeros_like(prompts)), time.perf_counter()
        with _first_outputs(population, len(members)) as found:
            (images,) = model.render_chunks(texts, [rows], **keys, text_length=texts.trimmed_length(prompts))
            images = images.cpu()
        return found, images, (time.perf_counter() - start) / len(members)

    mixed, images, seconds = render(members)
    words, errors = [texts.prompts[index] for index in prompts.tolist()], {}
    if count == 1:
        return Preflight(errors, seconds, images, words)
    zero, _, _ = render(torch.zeros_like(members))
    one, _, seconds = render(torch.ones_like(members))
    for name in mixed:
        if name in zero and name in one and mixed[name].shape == zero[name].shape == one[name].shape:
            first = members.repeat(len(mixed[name]) // count).eq(0)[:, None]
            own = torch.where(first, zero[name], one[name])
            between = (zero[name] - one[name]).abs().max()
            if between > 0:
                errors[name] = float((mixed[name] - own).abs().max() / between)
    _require_apart(errors, LARGEST.get(model.dtype, 0.5))
    return Preflight(errors, seconds, images, words)


def _require_apart(errors: dict[str, float], largest: float) -> None:
    for name, error in errors.items():
        if not error <= largest:  # or NaN
            raise ConfigError(
                f"lora.targets: {name}: expected each row of a batch to equal its member rendered alone, got a "
                f"difference of {error:.2g} of that between two members (limit {largest:g}): a module at or before "
                "this layer mixes the rows of its batch; leave such layers out"
            )


@contextmanager
def _first_outputs(population: Population, rows: int) -> Iterator[dict[str, torch.Tensor]]:
    """Inside, each target's first output is kept, fp32 [copies * rows, at most SAMPLES] on the CPU, by its name."""
    found: dict[str, torch.Tensor] = {}

    def keep(name: str):
        def hook(module, inputs, output):
            if name not in found and isinstance(output, torch.Tensor) and len(output) % rows == 0:
                flat = output.detach().flatten(1)
                found[name] = flat[:, :: max(1, flat.shape[1] // SAMPLES)].float().cpu()

        return hook

    handles = [layer.register_forward_hook(keep(name)) for name, layer in population.layers.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
