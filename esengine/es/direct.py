"""Direct mode: EGGROLL on the weights themselves, without a LoRA (r = 0).

    W_i = W + delta + c U' V^T        y_i = x (W + delta)^T + bias + c (x V) U'^T

Theta is delta, fp32 [out, in] for each target. It starts at zero. A target keeps the frozen W and also W + delta,
rounded once to W's dtype. It computes with W + delta, so delta adds no cost to a forward. Noise is never rounded into a
weight. W may be stored as a Conv1D or a 1x1 convolution stores it. A quantised W cannot be updated and is refused.

Source: Sarkar et al., "Evolution Strategies at the Hyperscale" (arXiv 2511.16652), eq. 4-7.
"""

import copy
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from esengine.es.base_layers import CONV2D, kind_of, matrix_shape
from esengine.es.layers import ADAPTER, U_OUT, Target, Theta, V


@dataclass(frozen=True)
class Direct:
    """Selects the weights that `esengine.attach` perturbs and updates. Used in place of a LoraConfig.

    Attributes:
        target_modules: as in `peft.LoraConfig`: suffixes of layer names, a regular expression for the whole name,
            "all-linear", or None for PEFT's defaults for the architecture.
        exclude_modules: layers to leave out, in the same form.
    """

    target_modules: Sequence[str] | str | None = None
    exclude_modules: Sequence[str] | str | None = None

    def selection(self) -> LoraConfig:
        """The LoraConfig that selects the same layers. Raises TypeError for a value that does not hold names."""
        return LoraConfig(
            r=1,
            target_modules=_names("target_modules", self.target_modules),
            exclude_modules=_names("exclude_modules", self.exclude_modules),
        )


class DirectLinear(Target, nn.Module, BaseTunerLayer):
    """A layer that computes with W + delta and perturbs it. With adapters disabled, as in PEFT, it computes with W."""

    adapter_layer_names = ("delta",)
    updates_weight = True

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs):
        super().__init__()
        self.base_layer, self.kind = base_layer, kind_of(base_layer)
        weight = base_layer.weight.detach()
        delta = torch.zeros(matrix_shape(base_layer), dtype=torch.float32, device=weight.device)
        # after the base layer: the dtype of the module's first parameter must be W's
        self.delta = nn.ParameterDict({adapter_name: delta})
        self.register_buffer("moved", weight.clone(), persistent=False)

    @property
    def base_weight(self) -> torch.Tensor:
        """W + delta as of the last `refresh`, stored as W; W with adapters disabled."""
        return self.base_layer.weight if self.disable_adapters else self.moved

    def thetas(self) -> dict[str, Theta]:
        return {"delta": Theta(self.delta[ADAPTER], U_OUT, V)}

    def lora(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A LoRA of full rank r = min(in, out), with B A = delta bit for bit: one factor is delta, the other is 1."""
        delta = self.delta[ADAPTER].data
        one = torch.eye(min(delta.shape), dtype=delta.dtype, device=delta.device)
        a, b = (one, delta) if delta.shape[1] <= delta.shape[0] else (delta, one)
        return (self.kind.native(a), self.kind.native(b)) if self.kind is CONV2D else (a, b)

    def continued(self, a: torch.Tensor, b: torch.Tensor, scale: float) -> dict[str, torch.Tensor]:
        return {"delta": scale * b @ a}

    def unperturbed(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return self.kind.product(x, self.base_weight, self.bias)

    def without_noise(self, x: torch.Tensor) -> torch.Tensor:
        return self.unperturbed(x)

    @torch.no_grad()
    def refresh(self) -> None:
        delta = self.kind.native(self.delta[ADAPTER])
        torch.add(self.base_layer.weight, delta, out=self.moved)  # in place: stacks and graphs use it


def full_rank(config: LoraConfig, layers: Mapping[str, Target]) -> LoraConfig:
    """`config` for the adapters that `DirectLinear.lora` makes: each layer has its full rank r, and alpha = r."""
    config = copy.deepcopy(config)
    ranks = {name: min(matrix_shape(layer.base_layer)) for name, layer in layers.items()}
    config.r = config.lora_alpha = Counter(ranks.values()).most_common(1)[0][0]
    config.rank_pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = dict(config.rank_pattern)
    return config


def _names(argument: str, value: Sequence[str] | str | None) -> list[str] | str | None:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, Iterable) or not all(isinstance(name, str) for name in value):
        raise TypeError(f"{argument}: expected names, a regular expression or None, got {value!r}")
    return sorted(value)
