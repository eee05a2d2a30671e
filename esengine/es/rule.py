"""The update rule of the adapter. Plain Python, so that `--help` need not import torch."""

from typing import Literal

from esengine.base.settings import Decay, Positive, settings


@settings()
class UpdateRule:
    """How the adapter theta moves along g = mean_i(f_i E_i).

    With `sgd`, theta + lr_scale * sigma * g, as in the reference run. Momentum and Adam are torch.optim's, with
    learning rate lr_scale * sigma. Afterwards the step, then the adapter, are scaled down to their norm caps.
    """

    optimizer: Literal["sgd", "momentum", "adam"] = "sgd"
    """sgd: the update of the reference run. momentum, adam: torch.optim's."""
    lr_scale: Positive = 0.1
    """Learning rate in units of sigma."""
    momentum: Decay = 0.9
    """Momentum; for adam, beta1."""
    beta2: Decay = 0.999
    """beta2 of adam."""
    max_step_norm: Positive | None = None
    """Cap on the L2 norm of one step."""
    max_norm: Positive | None = 40.0
    """Cap on the L2 norm of the adapter."""
