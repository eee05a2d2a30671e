"""Direct mode: EGGROLL on the weights themselves, without a LoRA (r = 0).

    W_i = W + delta + c U' V^T        y_i = x (W + delta)^T + bias + c (x V) U'^T

Theta is delta, fp32 [out, in] for each target, and starts at zero. Beside the frozen W a target keeps W + delta,
rounded once to W's dtype, with which it computes: a forward costs what it does without delta. Noise is never rounded
into a weight.

Source: Sarkar et al., "Evolution Strategies at the Hyperscale" (arXiv 2511.16652), eq. 4-7.
"""

import copy
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from esengine.es.layers import ADAPTER, U_OUT, Target, Theta, V


@dataclass(frozen=True)
class Direct:
    """Which weights `esengine.attach` perturbs and moves, in place of a LoraConfig.

    Attributes:
        target_modules: as in `peft.LoraConfig`: names that a layer's name ends with, a regular expression of the whole
            name, "all-linear", or None for those that PEFT knows for the architecture.
        exclude_modules: likewise, layers to leave out.
    """

    target_modules: Sequence[str] | str | None = None
    exclude_modules: Sequence[str] | str | None = None

    def selection(self) -> LoraConfig:
        """The LoraConfig that selects the same layers. Raises TypeError for what cannot be names."""
        return LoraConfig(
            r=1,
            target_modules=_names("target_modules", self.target_modules),
            exclude_modules=_names("exclude_modules", self.exclude_modules),
        )


class DirectLinear(Target, nn.Module, BaseTunerLayer):
    """A linear whose weight is W + delta and which perturbs that. Switched off as PEFT's layers are, it is W alone."""

    adapter_layer_names = ("delta",)

    def __init__(self, base_layer: nn.Linear, adapter_name: str, **kwargs):
        super().__init__()
        self.base_layer = base_layer
        weight = base_layer.weight.detach()
        # below the base layer: who asks a module for the dtype of its first parameter is to get W's
        self.delta = nn.ParameterDict({adapter_name: torch.zeros_like(weight, dtype=torch.float32)})
        self.register_buffer("moved", weight.clone(), persistent=False)

    @property
    def base_weight(self) -> torch.Tensor:
        """W + delta as of the last `refresh`, [out, in]."""
        return self.base_layer.weight if self.disable_adapters else self.moved

    def thetas(self) -> dict[str, Theta]:
        return {"delta": Theta(self.delta[ADAPTER], U_OUT, V)}

    def lora(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of full rank r = min(in, out), with B A = delta bit for bit: one of the two is delta, the other 1."""
        delta = self.delta[ADAPTER].data
        one = torch.eye(min(delta.shape), dtype=delta.dtype, device=delta.device)
        return (one, delta) if delta.shape[1] <= delta.shape[0] else (delta, one)

    def unperturbed(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return F.linear(x, self.base_weight, self.bias)

    @torch.no_grad()
    def refresh(self) -> None:
        torch.add(self.base_layer.weight, self.delta[ADAPTER], out=self.moved)  # in place: stacks and graphs hold it


def full_rank(config: LoraConfig, layers: Mapping[str, Target]) -> LoraConfig:
    """`config` for the adapters that `DirectLinear.lora` makes: each layer of its own rank, and alpha = r."""
    config = copy.deepcopy(config)
    ranks = {name: min(layer.base_weight.shape) for name, layer in layers.items()}
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
