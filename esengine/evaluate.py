"""Base against adapter: the same prompts and latents, the paired difference and how sure it is."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from esengine.models import RenderSettings, SanaSprint, TextEmbeddings
from esengine.rewards import Weighted

EVAL_STEP = (1 << 32) - 1
"""The step of the noise contract that evaluation draws its latents at; no training run gets there."""


@dataclass(frozen=True)
class Score:
    """One reward on P prompts, each averaged over its repeats first.

    Attributes:
        base: mean without the adapter.
        adapter: mean with it.
        difference: mean of adapter minus base.
        standard_error: of the difference: its standard deviation over prompts / sqrt(P); None for one prompt.
        won: share of prompts where the adapter scores higher; a tie counts half.
    """

    base: float
    adapter: float
    difference: float
    standard_error: float | None
    won: float


@dataclass(frozen=True)
class Comparison:
    """Scores by reward name over `prompts` prompts with `repeats` images each, and how the images were made."""

    prompts: int
    repeats: int
    scores: dict[str, Score]
    settings: dict[str, Any]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    def table(self) -> str:
        """The scores as aligned text, one reward a line."""
        rows = [("reward", "base", "adapter", "difference", "std. error", "prompts won")]
        for name, s in self.scores.items():
            error = "-" if s.standard_error is None else f"{s.standard_error:.4f}"
            rows.append((name, f"{s.base:.4f}", f"{s.adapter:.4f}", f"{s.difference:+.4f}", error, f"{s.won:.0%}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for first, *others in rows:
            cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
            lines.append("  ".join([first.ljust(widths[0]), *cells]))
        return "\n".join(lines)


@torch.no_grad()
def compare(
    model: SanaSprint,
    texts: TextEmbeddings,
    reward: Weighted,
    *,
    seed: int,
    repeats: int,
    settings: RenderSettings,
    chunk: int,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Score the model without and with the adapter that it has loaded, on shared latents.

    This measures what users of diffusers get: its loader holds the adapter in the model's dtype, where training kept
    it in float32.

    Args:
        model: with an adapter from `load_adapter`.
        texts: the prompts to compare on; a prompt's place among them keys its latents.
        reward: what scores the images.
        seed: keys the latents.
        repeats: images of each prompt.
        settings: how to render.
        chunk: images in one forward.
        progress: called with (images done, images in all).

    Returns:
        The scores of every reward, and of their weighted sum when there are several.
    """
    everyone = torch.arange(len(texts))
    order, draws = everyone.repeat_interleave(repeats), torch.arange(repeats).repeat(len(texts))
    length = texts.trimmed_length(everyone)
    total, done = 2 * len(order), 0
    found: list[dict[str, torch.Tensor]] = []
    for enabled in (False, True):
        model.adapter_enabled(enabled)
        parts = []
        for rows, draw in zip(order.split(chunk), draws.split(chunk), strict=True):
            images = model.render(
                texts,
                seed=seed,
                step=EVAL_STEP,
                prompts=rows,
                repeats=draw,
                settings=settings,
                text_length=length,
            )
            parts.append(reward.score(images, [texts.prompts[i] for i in rows.tolist()]))
            done += len(rows)
            if progress is not None:
                progress(done, total)
        found.append({name: torch.cat([p[name].cpu() for p in parts]).double() for name in parts[0]})
    names = reward.names if len(reward.names) == 1 else [*reward.names, "combined"]
    scores = {name: _score(*(f[name].view(-1, repeats).mean(1) for f in found)) for name in names}
    made = {"seed": seed, "device": str(model.device), "dtype": str(model.dtype).removeprefix("torch."), "chunk": chunk}
    return Comparison(len(texts), repeats, scores, made | asdict(settings))


def _score(base: torch.Tensor, adapter: torch.Tensor) -> Score:
    d = adapter - base
    error = float(d.std() / math.sqrt(len(d))) if len(d) > 1 else None
    won = float((d > 0).double().mean() + (d == 0).double().mean() / 2)
    return Score(float(base.mean()), float(adapter.mean()), float(d.mean()), error, won)
