"""The update rule of the adapter. Plain Python, so that `--help` need not import torch."""

import math
from dataclasses import dataclass
from typing import Literal

from esengine.base.errors import ConfigError


@dataclass(frozen=True)
class UpdateRule:
    """How the adapter theta moves along g = mean_i(f_i E_i).

    With `sgd`, theta + lr_scale * sigma * g, as in the reference run. Momentum and Adam are torch.optim's, with
    learning rate lr_scale * sigma. Afterwards the step, then the adapter, are scaled down to their norm caps.
    """

    optimizer: Literal["sgd", "momentum", "adam"] = "sgd"
    """sgd: the update of the reference run. momentum, adam: torch.optim's."""
    lr_scale: float = 0.1
    """Learning rate in units of sigma."""
    momentum: float = 0.9
    """Momentum; for adam, beta1."""
    beta2: float = 0.999
    """beta2 of adam."""
    max_step_norm: float | None = None
    """Cap on the L2 norm of one step."""
    max_norm: float | None = 40.0
    """Cap on the L2 norm of the adapter."""

    def __post_init__(self):
        if self.optimizer not in ("sgd", "momentum", "adam"):
            raise ConfigError(f"optimizer: expected sgd, momentum or adam, got {self.optimizer}")
        for name in ("lr_scale", "max_step_norm", "max_norm"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name}: expected a positive number, got {value}")
        for name in ("momentum", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected a number in [0, 1), got {getattr(self, name)}")
