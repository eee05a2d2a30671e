"""Draws the prompts of each step."""

import numpy as np
import torch

from esengine.base.errors import ConfigError


class PromptSampler:
    """Draws prompts without replacement, epoch after epoch, as a pure function of (seed, step).

    Epoch e is a permutation of all prompts: the stable argsort of `count` raw 64-bit Philox4x64-10 words under the key
    (seed, e). NumPy keeps these words the same in every release. Epochs follow one another, and step t takes positions
    t * per_step to (t + 1) * per_step - 1. So no prompt repeats before all have been drawn, and a resumed run needs no
    state. A step that spans two epochs can hold a prompt twice.

    Args:
        count: number of prompts.
        per_step: prompts drawn in each step, 1 to count.
        seed: the run's seed, taken modulo 2^64.

    Raises:
        ConfigError: per_step is out of range.
    """

    def __init__(self, count: int, per_step: int, seed: int):
        if not 1 <= per_step <= count:
            raise ConfigError(
                f"es.prompts_per_step: expected prompts per step of 1 to the number of prompts, {count}, got {per_step}"
            )
        self.count, self.per_step, self.seed = count, per_step, seed % 2**64

    def draw(self, step: int) -> torch.Tensor:
        """Indices of a step's prompts, int64 [per_step]. Steps count from 0. Raises ValueError if step is negative."""
        if step < 0:
            raise ValueError(f"step: expected 0 or more, got {step}")
        epoch, start = divmod(step * self.per_step, self.count)
        order = self._epoch(epoch)[start : start + self.per_step]
        if len(order) < self.per_step:
            order = np.concatenate([order, self._epoch(epoch + 1)[: self.per_step - len(order)]])
        return torch.from_numpy(order.astype(np.int64))

    def _epoch(self, epoch: int) -> np.ndarray:
        key = np.array([self.seed, epoch], dtype=np.uint64)
        return np.argsort(np.random.Philox(key=key).random_raw(self.count), kind="stable")
