"""Renders several models on the same prompts and latents, chunk by chunk, and scores the images."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from esengine.base.errors import RewardError
from esengine.base.prompt_files import Metadata
from esengine.es.lora_folder import lora_files
from esengine.es.rows import Rows
from esengine.evaluation.benchmarks import Benchmark
from esengine.evaluation.entries import Entry
from esengine.evaluation.statistics import Report, summarise
from esengine.kernels import CONTRACT
from esengine.models import Generator, RenderSettings, TextEmbeddings
from esengine.rewards import Weighted
from esengine.rewards.fault_tolerant import FaultTolerant
from esengine.sampling.environment import PACKAGES, describe
from esengine.sampling.rollout import Renderer

EVAL_STEP = (1 << 32) - 1
"""The step of the noise contract at which evaluation draws its latents. No training run reaches it."""

Places = list[tuple[int, int]]
"""(prompt, repeat) of each image of a chunk."""


@dataclass(frozen=True)
class Plan:
    """The images to render. Every entry renders the same rows in the same chunks, from the same latents.

    Attributes:
        entries: the entries to compare. The others are compared with the first.
        prompts: number of prompts, P.
        repeats: images of each prompt, R.
        seed: seed of the latents, which also depend on the prompt's index and the repeat.
        settings: how to render. Each entry has its own number of steps; `x0_angle` applies only to one step.
        chunk: images in one forward.
    """

    entries: tuple[Entry, ...]
    prompts: int
    repeats: int
    seed: int
    settings: RenderSettings
    chunk: int

    def chunks(self) -> list[Places]:
        """Rows of every forward of an entry. They depend only on P, R and the chunk size."""
        rows = [(prompt, repeat) for prompt in range(self.prompts) for repeat in range(self.repeats)]
        return [rows[start : start + self.chunk] for start in range(0, len(rows), self.chunk)]

    def settings_of(self, entry: Entry) -> RenderSettings:
        angle = self.settings.x0_angle if entry.steps == 1 else None
        return replace(self.settings, num_steps=entry.steps, x0_angle=angle)


@dataclass(frozen=True)
class Batch:
    """A chunk that is rendered and scored.

    Attributes:
        entry: the entry that rendered it.
        rows: B pairs (prompt, repeat).
        images: uint8 [B, 3, H, W] on the model's device.
        scores: B numbers for each reported score name.
    """

    entry: Entry
    rows: Places
    images: torch.Tensor
    scores: dict[str, list[float]]


def reported(reward: Weighted) -> list[str]:
    """Names of the scores that a report shows. `combined` is left out if it equals one of the others."""
    weights = [term.weight for term in reward.terms if term.weight]
    return reward.names if weights == [1.0] else [*reward.names, "combined"]


@torch.no_grad()
def draw(
    model: Generator,
    texts: TextEmbeddings,
    reward: Weighted,
    plan: Plan,
    work: Sequence[tuple[Entry, Places]],
    metadata: Sequence[Metadata] | None = None,
) -> Iterator[Batch]:
    """Render and score chunks of a plan in the given order, with at most one adapter in memory.

    Adapters are loaded as diffusers loads them, in the model's dtype, while training kept them in float32. So this
    measures what their users get. The base model has no adapter. `metadata` has the columns of each prompt.

    Raises:
        ConfigError: an adapter cannot be loaded.
        RewardError, RenderError: see `Weighted.score` and `Generator.render_chunks`.
    """
    length = texts.trimmed_length(torch.arange(len(texts)))
    names, loaded = reported(reward), None
    render = Renderer(
        model, texts, plan.settings, plan.seed, plan.chunk, metadata=metadata if metadata and any(metadata) else None
    )
    for entry, rows in work:
        if entry != loaded:
            load_entry(model, entry)
            loaded, render.settings = entry, plan.settings_of(entry)
        prompts, repeats = torch.tensor(rows).unbind(1)
        (images,) = render.chunks(EVAL_STEP, [Rows(None, prompts, repeats)], length=length)
        scores = reward.score(images, render.words(prompts), **render.columns(prompts))
        yield Batch(entry, rows, images, {name: scores[name].tolist() for name in names})


def load_entry(model: Generator, entry: Entry) -> None:
    """Load the entry's adapter into the model, or unload any adapter if the entry has none."""
    if entry.adapter is None:
        model.unload_adapter()
    else:
        model.load_adapter(entry.adapter)


def compare_entries(
    model: Generator,
    texts: TextEmbeddings,
    reward: Weighted,
    plan: Plan,
    *,
    benchmark: Benchmark | None = None,
    settings: dict[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
    watch: Callable[[Batch], None] | None = None,
    drop_bad: bool = False,
) -> Report:
    """Render and score the whole plan without keeping the images.

    Args:
        model: the model that the entries' adapters are for. It has no adapter afterwards.
        texts: embeddings of the benchmark's prompts.
        reward: scores the images.
        plan: what to render.
        benchmark: name, groups and metadata of the prompts. None: they have no groups and no metadata.
        settings: how the images are made, for the report. None: `provenance`.
        progress: called with (images done, images in all).
        watch: called with each batch, in the order of the plan.
        drop_bad: leave out every prompt with an image that has no score, and count these prompts in the settings as
            `prompts_left_out`; see `FaultTolerant`. If False, a missing score is an error.
    """
    if benchmark is None:
        nothing = (None,) * len(texts)
        benchmark = Benchmark("prompts", texts.prompts, nothing, nothing)
    settings = provenance(model, plan, reward) if settings is None else dict(settings)
    work = [(entry, rows) for entry in plan.entries for rows in plan.chunks()]
    total, records = sum(len(rows) for _, rows in work), []
    if drop_bad:
        reward = FaultTolerant(reward, total, least=len(plan.entries) * plan.repeats)  # one prompt's
    for batch in draw(model, texts, reward, plan, work, benchmark.metadata):
        records += batch_records(batch)
        if watch is not None:
            watch(batch)
        if progress is not None:
            progress(len(records), total)
    model.unload_adapter()
    if bad := {each["index"] for each in records if not all(map(math.isfinite, each["scores"].values()))}:
        settings["prompts_left_out"] = len(bad)
        benchmark, records = _without(benchmark, records, bad)
    return summarise(benchmark, [entry.label for entry in plan.entries], reported(reward), records, settings)


def _without(benchmark: Benchmark, records: list[dict], bad: set[int]) -> tuple[Benchmark, list[dict]]:
    """The benchmark and records without the prompts in `bad`, with new indices."""
    good = [index for index in range(len(benchmark)) if index not in bad]
    if not good:
        raise RewardError("comparison: of every prompt an image has no score")
    place = {index: at for at, index in enumerate(good)}
    columns = ([column[i] for i in good] for column in (benchmark.prompts, benchmark.categories, benchmark.challenges))
    kept = [{**each, "index": place[each["index"]]} for each in records if each["index"] in place]
    return Benchmark(benchmark.name, *map(tuple, columns)), kept


def provenance(model: Generator, plan: Plan, reward: Weighted) -> dict[str, Any]:
    """How a plan's images are made and scored, as JSON values: weights, settings, device, versions."""
    made = asdict(plan.settings)
    del made["num_steps"]  # each entry has its own
    made["height"], made["width"] = made["height"] or model.image_size, made["width"] or model.image_size
    facts = describe()
    return {
        "weights": model.identity(),
        "adapters": {
            entry.label: "sha256:"
            + hashlib.sha256(b"".join(map(Path.read_bytes, lora_files(entry.adapter)))).hexdigest()
            for entry in plan.entries
            if entry.adapter is not None
        },
        "rewards": json.loads(json.dumps(reward.settings(), default=str)),
        "seed": plan.seed,
        "repeats": plan.repeats,
        **made,
        "chunk": plan.chunk,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu",
        "noise_contract": CONTRACT,
        "versions": {package: facts[package] for package in ("esengine", *PACKAGES)},
    }


def batch_records(batch: Batch) -> list[dict]:
    """One {"entry", "index", "repeat", "scores"} for each image."""
    return [
        {
            "entry": batch.entry.label,
            "index": index,
            "repeat": repeat,
            "scores": {name: values[row] for name, values in batch.scores.items()},
        }
        for row, (index, repeat) in enumerate(batch.rows)
    ]
