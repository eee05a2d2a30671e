"""Compares a step's scores by a reward's cheaper decoder with those by the model's own decoder.

Symbols: f, f' the fitness of N members by the two decoders; g = mean_i f_i E_i the ES gradient, see `Population`.

    correlation = corr(f, f')        cosine = <g, g'> / (|g| |g'|)

An update by the cheaper decoder gains about `cosine` of what the other one gains at the same step size.
"""

import math
from collections.abc import Mapping

import torch

from esengine.es.engine import Engine, Task
from esengine.rewards import COMBINED

LEAST = 0.85
"""Below this correlation or cosine a warning is logged. Near it, what the decoder saves no longer pays."""
CORRELATION, COSINE = "reward_vae/correlation", "reward_vae/cosine"


def compare(
    engine: Engine, task: Task, cheap: Mapping[str, torch.Tensor], full: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """Metrics of one step. Changes nothing.

    Args:
        engine: the engine, before the step's update.
        task: the step's task.
        cheap, full: scores by name, float32 [N, P, R], by the two decoders.

    Returns:
        Correlation and cosine: NaN if neither fitness varies, 0 if only one does. And the mean score of the images by
        the model's own decoder, `reward_vae/full/<name>`.
    """
    fitness = [engine.fitness(task, each[COMBINED]) for each in (cheap, full)]
    one, two = (each.double() - each.double().mean() for each in fitness)
    g, h = (engine.population.gradient(step=task.step, fitness=each) for each in fitness)
    found = {CORRELATION: _cosine({"": one}, {"": two}), COSINE: _cosine(g, h)}
    for name, scores in full.items():
        found[f"reward_vae/full/{name}"] = float(scores[scores.isfinite()].mean())
    return found


def warning(found: Mapping[str, float]) -> str | None:
    """What to say about the metrics of `compare`; None if there is nothing to say."""
    if not min(found[CORRELATION], found[COSINE]) < LEAST:
        return None
    return (
        f"--image.reward-vae ranks members differently from the model's own decoder: fitness correlation "
        f"{found[CORRELATION]:.2f}, cosine of the ES gradient {found[COSINE]:.2f}, expected at least {LEAST}; "
        "take another decoder, or none"
    )


def _cosine(one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor]) -> float:
    """Cosine of two vectors in parts."""

    def dot(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> float:
        return math.fsum(float((a[name].double() * b[name].double()).sum()) for name in a)

    lengths = math.sqrt(dot(one, one)), math.sqrt(dot(two, two))
    if 0.0 in lengths:
        return math.nan if lengths == (0.0, 0.0) else 0.0
    return max(-1.0, min(1.0, dot(one, two) / lengths[0] / lengths[1]))
