"""The drop-in layer: a linear that perturbs each batch row by its member's noise inside `Population.perturbed`.

`PopulationLinear` is PEFT's LoRA linear, and `PopulationConv2d` its LoRA of a 1x1 convolution. `esengine.es.direct` has
the layer whose weight itself is perturbed.
"""

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import NamedTuple

import torch
from peft import LoraConfig
from peft.tuners.lora import Conv2d as LoraConv2d
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

from esengine.es.base_layers import (
    CONV1D,
    CONV2D,
    LINEAR,
    Kind,
    changed,
    is_quantised,
    kind_of,
    matrix_shape,
    why_refused,
)
from esengine.es.watched_weight import WatchedWeight
from esengine.kernels import (
    STORE_FROM,
    Lora,
    MemberNoise,
    Streams,
    low_rank_part,
    low_rank_part_torch,
    member_factors,
    population_linear,
    population_linear_torch,
    stream_table,
)

ADAPTER = "default"

V, U, V_OUT, U_OUT = range(4)
"""Positions of a linear's factors in `Streams` and in every other tuple of the four factors."""

HONOURED = (
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "runtime_config", "megatron_core"),
)
"""LoraConfig fields that may be set: those that select and scale layers, and those that do not affect the forward."""


@dataclass(frozen=True)
class Chunk:
    """What the layers need to perturb one batch of B rows.

    Attributes:
        noise: noise of the batch. With Triton its step is int64 [1] on the device.
        c: fp32 [B], sign * sigma / sqrt(k). Torch path only.
        factors: V, U, V', U' by layer name, fp32 [P, L, k]; each of P pairs has B / P consecutive rows. None where a
            layer has no such factor. Torch path only.
        copies: how often the members stand in `noise`.
    """

    noise: MemberNoise
    c: torch.Tensor | None = None
    factors: dict[str, tuple[torch.Tensor, ...]] | None = None
    copies: int = 1


class Scope:
    """The current chunk, shared by a population and its layers, and what happened since `enter`.

    Attributes:
        chunk: None outside `Population.perturbed`.
        called: names of the layers that computed with their noise.
        read: names of the layers whose weight was read by other code.
        used: names of the layers whose weight other code computed with.
        ran: whether the whole module ran to its end.
    """

    def __init__(self):
        self.enter(None)

    def enter(self, chunk: Chunk | None) -> None:
        self.chunk, self.ran = chunk, False
        self.called, self.read, self.used = set(), set(), set()

    @contextmanager
    def watch(self, module: nn.Module) -> Iterator[None]:
        """Within the context, record that `module` ran to its end.

        This wraps forward, because torch's encoder layers take another path if they have a forward hook.
        """
        before, forward = vars(module).get("forward"), module.forward

        @functools.wraps(forward)
        def noted(*args, **kwargs):
            result = forward(*args, **kwargs)
            self.ran = True
            return result

        module.forward = noted
        try:
            yield
        finally:
            vars(module).pop("forward", None)
            if before is not None:
                module.forward = before


class Theta(NamedTuple):
    """A tensor that ES optimises, fp32 [L, S], perturbed by U V^T / sqrt(k); the positions of U [L, k] and V [S, k].

    The parameter of a convolution is [L, S, 1, 1].
    """

    parameter: nn.Parameter
    u: int
    v: int

    @property
    def shape(self) -> tuple[int, int]:
        """(L, S)."""
        return tuple(self.parameter.shape[:2])


class Target:
    """Base class of the perturbed linears. List it before an `nn.Module` with a `base_layer` among the bases.

    Attributes:
        name, streams, scope: set by the population.
        kind: how the base layer stores its matrix; set by `make_layer`.
        quantised: whether its weight is a tensor subclass that knows its own product; set by `make_layer`.
        a: LoRA A, fp32 [r, in], or None.
        b: LoRA B, fp32 [out, r], or None.
        scale: s = lora_alpha / r.
        owner: class of the module that holds this layer.
    """

    name: str
    owner: type[nn.Module] = nn.Module
    streams: Streams
    scope: Scope | None = None
    kind: Kind = LINEAR
    quantised = False
    updates_weight = False
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    scale = 1.0

    def thetas(self) -> dict[str, Theta]:
        """The tensors that ES optimises, by the suffix of their name."""
        raise NotImplementedError

    def lora(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A [r, in] and B [out, r], fp32, of a convolution [r, in, 1, 1] and [out, r, 1, 1], as PEFT stores them.

        Theta adds `scale` times B A to the weight.
        """
        raise NotImplementedError

    def continued(self, a: torch.Tensor, b: torch.Tensor, scale: float) -> dict[str, torch.Tensor]:
        """Theta that adds `scale` times B A to the weight, fp64, by the names of `thetas`.

        Args:
            a, b: fp64 [r, in] and [out, r].
            scale: of the LoRA that they come from.

        Raises:
            ValueError: theta cannot hold them; the message is the reason.
        """
        raise NotImplementedError

    @property
    def base_weight(self) -> torch.Tensor:
        """W, the frozen weight that noise is added to, as the base layer stores it: [out, in] of a linear."""
        raise NotImplementedError

    @property
    def dense(self) -> bool:
        """Whether W is a plain [out, in], whose product the kernels compute. Otherwise the base layer computes it."""
        return self.kind is LINEAR and not self.quantised

    @property
    def operands(self) -> Lora:
        """The target in the form that kernels take."""
        return Lora(self.a, self.b, self.scale, stream_table((self.streams,), self.base_weight.device))

    @property
    def weight(self) -> torch.Tensor:
        """`base_weight`, for code that treats this layer as a plain linear. It has no noise, so its use is recorded."""
        if self.scope is None or self.scope.chunk is None:
            return self.base_weight
        self.scope.read.add(self.name)
        # torch's encoder layer checks for tensor subclasses; a compiler cannot tell reading a shape from computing
        if self.owner.forward is nn.TransformerEncoderLayer.forward or torch.compiler.is_compiling():
            return self.base_weight
        return WatchedWeight.of(self.base_weight, lambda: self.scope.used.add(self.name))

    def mark_called(self) -> None:
        """Record that this layer computed with its noise. Code that computes in its place must call this."""
        if self.scope is not None:
            self.scope.called.add(self.name)

    def require_in_force(self) -> None:
        """Raises RuntimeError if the layer would compute something other than what is perturbed."""
        self.require_unmerged()
        if changed(self.base_layer):
            what = "has a base layer with a hook or a forward of its own, which would be left out; take that off"
        elif list(self.active_adapters) != [ADAPTER]:
            active = " and ".join(map(str, self.active_adapters)) or "none"
            what = f"is not the active one, which is {active}; make it so first: set_adapter('{ADAPTER}')"
        else:
            return
        raise RuntimeError(f"perturbed: the adapter of '{self.name}' {what}")

    def require_unmerged(self) -> None:
        """Raises RuntimeError if the adapter is merged into the frozen weight."""
        if self.merged:
            raise RuntimeError(
                f"adapter of '{self.name}' is merged into the weight, where noise or a step would count twice; take it "
                "out first: unmerge() or unfuse_lora()"
            )

    def unperturbed(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """y of the adapter without noise."""
        raise NotImplementedError

    def without_noise(self, x: torch.Tensor) -> torch.Tensor:
        """What the low-rank part is added to: y of W, with delta in the direct form."""
        raise NotImplementedError

    def refresh(self) -> None:
        """Recompute what is derived from theta, after theta has changed."""

    def lengths(self) -> tuple[int, ...]:
        """Lengths of V, U, V', U'; 0 for a factor that does not exist."""
        found = [0] * 4
        for theta in self.thetas().values():
            found[theta.u], found[theta.v] = theta.shape
        return tuple(found)

    def _apply(self, fn, *args, **kwargs):
        """Move and cast with the module. Theta stays fp32."""
        masters = [(theta.parameter, theta.parameter.data) for theta in self.thetas().values()]
        super()._apply(fn, *args, **kwargs)
        for parameter, master in masters:
            if parameter.dtype != torch.float32:
                parameter.data = master.to(parameter.device)
        self.refresh()
        return self

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        chunk = self.scope.chunk if self.scope is not None else None
        if chunk is None:
            return self.unperturbed(x, *args, **kwargs)
        if self.disable_adapters:  # disabled by the user: no noise
            return self.unperturbed(x, *args, **kwargs)
        self.require_in_force()
        if len(x) != len(chunk.noise.members):
            count = len(chunk.noise.members) // chunk.copies
            raise ValueError(
                f"members: expected one for each batch row of {self.name}, int64 [{len(x)}], got int64 [{count}] and "
                f"copies={chunk.copies}, which is {count * chunk.copies} rows; if the module stacks its batch several "
                "times (row i of member i % B), say how often by copies"
            )
        self.mark_called()
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self._perturbed(x.to(self.base_weight.dtype), chunk)
        return self._perturbed(x, chunk)

    def _perturbed(self, x: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        if not self.dense:
            return self._beside_base(x, chunk)
        if chunk.factors is None:
            return population_linear(x, self.base_weight, self.bias, self.operands, chunk.noise)
        return population_linear_torch(
            x, self.base_weight, self.bias, self.a, self.b,
            factors=chunk.factors[self.name], c=chunk.c, scale=self.scale,
        )  # fmt: skip

    def _beside_base(self, x: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        """y of the base layer as it is, and the low-rank part added to it."""
        if self.kind is CONV2D and x.dim() != 4:
            raise ValueError(f"{self.name}: expected x [B, in, H, W], a member for each batch row, got {list(x.shape)}")
        y = self.without_noise(x)
        if y.numel() == 0:
            return y
        x_btk = self.kind.rows(x)
        if chunk.factors is None:
            n, k = matrix_shape(self.base_layer)
            stored = member_factors(self.operands, chunk.noise, k=k, n=n) if x_btk.shape[1] >= STORE_FROM else None
            low = low_rank_part(x_btk, None, self.operands, chunk.noise, n=n, factors=stored)
        else:
            low = low_rank_part_torch(
                x_btk, self.a, self.b, factors=chunk.factors[self.name], c=chunk.c, scale=self.scale
            )
        low = self.kind.spread(low, y)
        return (y + low).to(y.dtype) if y.requires_grad else y.add_(low)


class LoraTarget(Target):
    """A LoRA that renders one member per batch row while its scope holds a chunk. Otherwise it is PEFT's layer."""

    @property
    def a(self) -> torch.Tensor:
        return self.lora_A[ADAPTER].weight

    @property
    def b(self) -> torch.Tensor:
        return self.lora_B[ADAPTER].weight

    @property
    def scale(self) -> float:
        """s = lora_alpha / r, or PEFT's rank-stabilised variant of it."""
        return self.scaling[ADAPTER]

    @property
    def base_weight(self) -> torch.Tensor:
        return self.get_base_layer().weight

    def thetas(self) -> dict[str, Theta]:
        a, b = self.lora()
        return {"lora_A.weight": Theta(a, U, V), "lora_B.weight": Theta(b, U_OUT, V_OUT)}

    def lora(self) -> tuple[nn.Parameter, nn.Parameter]:
        return self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight

    def continued(self, a: torch.Tensor, b: torch.Tensor, scale: float) -> dict[str, torch.Tensor]:
        r = len(self.a)
        if len(a) > r:
            raise ValueError(f"its rank is {len(a)} and the population's is {r}; attach with r={len(a)} or more")
        if not self.scale:
            raise ValueError("the population's lora_alpha is 0, which no LoRA but nought fits")
        rows, columns = self.a.double(), torch.zeros(len(b), r, dtype=torch.float64, device=self.b.device)
        rows[: len(a)] = a
        columns[:, : len(a)] = b * (scale / self.scale)
        return {"lora_A.weight": rows, "lora_B.weight": columns}

    def without_noise(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x)

    def merge(self, *args, **kwargs) -> None:
        """PEFT's `merge`. Raises RuntimeError if the weight is quantised."""
        if self.quantised:
            raise RuntimeError(
                f"merge: the weight of '{self.name}' is quantised ({type(self.base_weight).__name__}); detach, and "
                "load the saved adapter by PEFT"
            )
        super().merge(*args, **kwargs)


class PopulationLinear(LoraTarget, LoraLinear):
    """The LoRA of a `torch.nn.Linear` or of transformers' `Conv1D`."""

    def unperturbed(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return LoraLinear.forward(self, x, *args, **kwargs)


class PopulationConv2d(LoraTarget, LoraConv2d):
    """The LoRA of a 1x1 `torch.nn.Conv2d`. PEFT stores A [r, in, 1, 1] and B [out, r, 1, 1]."""

    @property
    def a(self) -> torch.Tensor:
        return self.lora_A[ADAPTER].weight.flatten(1)

    @property
    def b(self) -> torch.Tensor:
        return self.lora_B[ADAPTER].weight.flatten(1)

    def unperturbed(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return LoraConv2d.forward(self, x, *args, **kwargs)


def make_layer(
    form: type[Target],
    target: nn.Module,
    adapter_name: str,
    *,
    offloaded: Mapping[str, str] = MappingProxyType({}),
    **kwargs,
) -> Target:
    """Build the layer of a target, called by PEFT's dispatch.

    Args:
        form: `PopulationLinear`, or `DirectLinear`.
        target: the base layer.
        adapter_name: PEFT's.
        offloaded: from `esengine.es.base_layers.offloading` of the whole module.
        kwargs: PEFT's.

    Raises:
        TypeError: the target cannot be perturbed, or in the direct form its weight cannot be updated. The message names
            it.
    """
    name = kwargs.get("target_name", "?")
    if (why := why_refused(target, name, offloaded)) is not None:
        raise TypeError(f"target_modules: {why}")
    kind, quantised = kind_of(target), is_quantised(target.weight)
    if quantised and form.updates_weight:
        raise TypeError(
            f"target_modules: expected a weight that can be updated at '{name}', got one that is quantised "
            f"({type(target.weight).__name__}); use a LoraConfig, or leave it out by exclude_modules"
        )
    if form is PopulationLinear:
        form = PopulationConv2d if kind is CONV2D else form
        kwargs["config"] = copy.copy(kwargs["config"])
        kwargs["config"].fan_in_fan_out = kind is CONV1D
    layer = form(target, adapter_name, **kwargs)
    layer.kind, layer.quantised = kind, quantised
    return layer


def why_not_perturbed(layer: Target, scope: Scope) -> str:
    """Why a target had no noise in a forward, for an error message."""
    name = layer.name
    if name in scope.called:
        return "it was called, but other code computed with its weight too"
    if name not in scope.read:
        return "it was not called"
    why = f"its owner, {layer.owner.__name__}, reads its weight and does not call it"
    if issubclass(layer.owner, nn.TransformerEncoderLayer):
        why += "; torch.backends.mha.set_fastpath_enabled(False) makes it call it"
    return why


def strip(module: nn.Module, trainable: dict[str, bool]) -> None:
    """Put the base layers back and remove the adapter."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, Target):
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, layer.base_layer)
    if hasattr(module, "peft_config"):
        del module.peft_config
    for name, parameter in module.named_parameters():
        parameter.requires_grad = trainable.get(name, parameter.requires_grad)  # lazy ones have no requires_grad_


def check_config(config: LoraConfig, also: Sequence[str] = ()) -> None:
    """Reject options that would change the base weights, add parameters besides A and B, or make the forward random.

    `also` names options that the caller checks by the layers.
    """
    if not isinstance(config, LoraConfig):
        raise TypeError(f"config: expected peft.LoraConfig or esengine.Direct, got {type(config).__name__}")
    default = LoraConfig()
    for name in (f.name for f in fields(LoraConfig)):
        value, expected = getattr(config, name), getattr(default, name)
        if name not in (*HONOURED, *also) and value != expected and value:
            raise ValueError(f"config.{name}: expected {expected!r} for ES on frozen weights, got {value!r}")
    if config.init_lora_weights not in (True, False, "gaussian"):
        raise ValueError(
            f"config.init_lora_weights: expected True, False or 'gaussian', got {config.init_lora_weights!r}"
        )
