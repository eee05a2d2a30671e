"""The drop-in layer: a linear that perturbs each batch row by its member's noise inside `Population.perturbed`.

`PopulationLinear` is PEFT's LoRA linear. `esengine.es.direct` has the linear whose weight itself is perturbed.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

from esengine.kernels import Lora, MemberNoise, Streams, population_linear, population_linear_torch, stream_table

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
    """

    noise: MemberNoise
    c: torch.Tensor | None = None
    factors: dict[str, tuple[torch.Tensor, ...]] | None = None


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


_LOOKS = frozenset((
    *("dtype", "device", "shape", "ndim", "layout", "requires_grad", "is_leaf", "grad_fn", "names", "itemsize"),
    *("is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized", "is_nested", "is_mps", "is_xpu", "is_complex"),
    *("nbytes", "size", "dim", "ndimension", "numel", "nelement", "stride", "element_size", "is_contiguous", "type"),
    *("is_floating_point", "get_device", "is_inference", "is_signed", "__len__"),
    *("new_zeros", "new_ones", "new_empty", "new_full"),
))  # fmt: skip
"""Tensor attributes and methods that do not depend on the tensor's values."""
_VIEWS = ("data", "detach")
_LIKE_THE_SECOND = ("to", "type_as", "view_as", "expand_as", "reshape_as")
"""Methods that take only dtype, device or shape from their second argument."""


class WatchedWeight(torch.Tensor):
    """A target's frozen weight as other code sees it. It has no noise.

    Code may read its dtype, device or shape, as many modules do. Any use of its values is recorded in the scope.
    """

    @classmethod
    def of(cls, weight: torch.Tensor, note: Callable[[], None]) -> "WatchedWeight":
        watched = weight.as_subclass(cls)
        watched.note = note
        return watched

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        name = func.__name__
        if name == "__get__":  # a property: func is its descriptor's __get__
            name = func.__self__.__name__
        if name in _VIEWS and isinstance(args[0], WatchedWeight):
            return cls.of(result, args[0].note)
        if name in _LOOKS or name.endswith("_like"):
            return result
        for each in _flat(args[:1] if name in _LIKE_THE_SECOND else (args, tuple(kwargs.values()))):
            if isinstance(each, WatchedWeight):
                each.note()
        return result


def _flat(value: object) -> Iterator[object]:
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from _flat(each)
    else:
        yield value


class Theta(NamedTuple):
    """A tensor that ES optimises, fp32 [L, S], perturbed by U V^T / sqrt(k); the positions of U [L, k] and V [S, k]."""

    parameter: nn.Parameter
    u: int
    v: int


class Target:
    """Base class of the perturbed linears. List it before an `nn.Module` with a `base_layer` among the bases.

    Attributes:
        name, streams, scope: set by the population.
        a: LoRA A, fp32 [r, in], or None.
        b: LoRA B, fp32 [out, r], or None.
        scale: s = lora_alpha / r.
        owner: class of the module that holds this layer.
    """

    name: str
    owner: type[nn.Module] = nn.Module
    streams: Streams
    scope: Scope | None = None
    a: nn.Parameter | None = None
    b: nn.Parameter | None = None
    scale = 1.0

    def thetas(self) -> dict[str, Theta]:
        """The tensors that ES optimises, by the suffix of their name."""
        raise NotImplementedError

    def lora(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A [r, in] and B [out, r], fp32. Theta adds `scale` times B A to the weight."""
        raise NotImplementedError

    @property
    def base_weight(self) -> torch.Tensor:
        """W [out, in], the frozen weight that noise is added to."""
        raise NotImplementedError

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
        raise NotImplementedError

    def refresh(self) -> None:
        """Recompute what is derived from theta, after theta has changed."""

    def lengths(self) -> tuple[int, ...]:
        """Lengths of V, U, V', U'; 0 for a factor that does not exist."""
        found = [0] * 4
        for theta in self.thetas().values():
            found[theta.u], found[theta.v] = theta.parameter.shape
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
            raise ValueError(
                f"members: expected one for each batch row of {self.name}, int64 [{len(x)}], "
                f"got int64 [{len(chunk.noise.members)}]"
            )
        self.mark_called()
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self._perturbed(x.to(self.base_weight.dtype), chunk)
        return self._perturbed(x, chunk)

    def _perturbed(self, x: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        if chunk.factors is None:
            return population_linear(x, self.base_weight, self.bias, self.operands, chunk.noise)
        return population_linear_torch(
            x, self.base_weight, self.bias, self.a, self.b,
            factors=chunk.factors[self.name], c=chunk.c, scale=self.scale,
        )  # fmt: skip


class PopulationLinear(Target, LoraLinear):
    """A LoRA linear that renders one member per batch row while its scope holds a chunk. Otherwise it is PEFT's."""

    @property
    def a(self) -> nn.Parameter:
        return self.lora_A[ADAPTER].weight

    @property
    def b(self) -> nn.Parameter:
        return self.lora_B[ADAPTER].weight

    @property
    def scale(self) -> float:
        """s = lora_alpha / r, or PEFT's rank-stabilised variant of it."""
        return self.scaling[ADAPTER]

    @property
    def base_weight(self) -> torch.Tensor:
        return self.get_base_layer().weight

    def thetas(self) -> dict[str, Theta]:
        return {"lora_A.weight": Theta(self.a, U, V), "lora_B.weight": Theta(self.b, U_OUT, V_OUT)}

    def lora(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.a, self.b

    def unperturbed(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return LoraLinear.forward(self, x, *args, **kwargs)


def make_layer(form: type[Target], target: nn.Module, adapter_name: str, **kwargs) -> Target:
    """Build the layer of a target, called by PEFT's dispatch.

    Raises:
        TypeError: the target is not a dense `torch.nn.Linear`; the message names it.
    """
    dense = isinstance(target, nn.Linear) and type(target).forward is nn.Linear.forward
    fused = isinstance(target, nn.modules.linear.NonDynamicallyQuantizableLinear)  # its owner reads the weight directly
    name = kwargs.get("target_name", "?")
    if dense and changed(target):
        raise TypeError(
            f"target_modules: expected a plain torch.nn.Linear at '{name}', got one with a hook or a forward of "
            "its own, which perturbed rows would leave out"
        )
    if not dense or fused or not target.weight.is_floating_point():
        raise TypeError(f"target_modules: expected a dense torch.nn.Linear at '{name}', got {type(target).__name__}")
    return form(target, adapter_name, **kwargs)


def changed(module: nn.Module) -> bool:
    """Whether a module's forward was replaced or a hook was added."""
    return "forward" in vars(module) or bool(module._forward_hooks or module._forward_pre_hooks)


def shared_linears(module: nn.Module) -> dict[int, list[str]]:
    """Names of each linear that has several owners, by its id. A shared parent counts as one owner."""
    places: dict[int, dict[tuple[int, str], str]] = {}
    for name, each in module.named_modules(remove_duplicate=False):
        parent, _, child = name.rpartition(".")
        if name and isinstance(each, nn.Linear):
            places.setdefault(id(each), {}).setdefault((id(module.get_submodule(parent)), child), name)
    return {linear: list(names.values()) for linear, names in places.items() if len(names) > 1}


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
        parameter.requires_grad_(trainable.get(name, parameter.requires_grad))


def check_config(config: LoraConfig) -> None:
    """Reject options that would change the base weights, add parameters besides A and B, or make the forward random."""
    if not isinstance(config, LoraConfig):
        raise TypeError(f"config: expected peft.LoraConfig or esengine.Direct, got {type(config).__name__}")
    default = LoraConfig()
    for name in (f.name for f in fields(LoraConfig)):
        value, expected = getattr(config, name), getattr(default, name)
        if name not in HONOURED and value != expected and value:
            raise ValueError(f"config.{name}: expected {expected!r} for ES on frozen weights, got {value!r}")
    if config.init_lora_weights not in (True, False, "gaussian"):
        raise ValueError(
            f"config.init_lora_weights: expected True, False or 'gaussian', got {config.init_lora_weights!r}"
        )
