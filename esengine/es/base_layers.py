"""The layers that a population takes as targets, and why it refuses others.

A target computes x M^T + bias for a matrix M [out, in]. How M, x and y are stored depends on the kind of layer:

    torch.nn.Linear               weight M           x [B, ..., in]
    Conv1D of transformers        weight M^T         x [B, ..., in]
    torch.nn.Conv2d, 1x1          weight M[..., None, None]      x [B, in, H, W]

The weight of a Linear may be quantised: a tensor subclass that knows its product with x, such as torchao's. The base
layer computes that product, and only the low-rank part is added.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import Conv1D  # of transformers, as PEFT knows it
from torch import nn
from torch.nn.parameter import is_lazy


class Kind(NamedTuple):
    """How a kind of layer stores the matrix M [out, in], x and y.

    Attributes:
        name: of the constant below. Copies and pickles of a layer refer to that.
        native: M to the shape of the layer's weight, a view. A matrix A or B of a LoRA likewise.
        rows: x to [B, T, in], T rows a batch row.
        spread: [B, T, out] to the shape of y, a view.
        product: x, weight and bias to y, as the layer's own forward.
    """

    name: str
    native: Callable[[torch.Tensor], torch.Tensor]
    rows: Callable[[torch.Tensor], torch.Tensor]
    spread: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    product: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]

    def __reduce__(self) -> str:
        return self.name


def _flat_rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(len(x), -1, x.shape[-1])


def _conv1d(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[1])


LINEAR = Kind("LINEAR", lambda m: m, _flat_rows, lambda low, y: low.view(y.shape), F.linear)
CONV1D = Kind("CONV1D", lambda m: m.T, _flat_rows, lambda low, y: low.view(y.shape), _conv1d)
CONV2D = Kind(
    "CONV2D",
    lambda m: m[..., None, None],
    lambda x: x.flatten(2).mT,
    lambda low, y: low.mT.unflatten(2, y.shape[2:]),
    F.conv2d,
)
_FORWARDS = {nn.Linear: LINEAR, Conv1D: CONV1D, nn.Conv2d: CONV2D}


def kind_of(layer: nn.Module) -> Kind | None:
    """The kind of a layer by the forward that its class has, or None."""
    return next((kind for each, kind in _FORWARDS.items() if type(layer).forward is each.forward), None)


def matrix_shape(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of M."""
    out, inner = layer.weight.shape[:2]
    return (inner, out) if kind_of(layer) is CONV1D else (out, inner)


def is_quantised(weight: torch.Tensor) -> bool:
    """Whether a weight is a tensor subclass with products of its own."""
    own, plain = type(weight), (torch.Tensor.__torch_function__, nn.Parameter.__torch_function__)
    if own.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return True
    return _function(own.__torch_function__) not in map(_function, plain)


def changed(module: nn.Module) -> bool:
    """Whether a module's forward was replaced or a hook was added."""
    return "forward" in vars(module) or bool(module._forward_hooks or module._forward_pre_hooks)


def why_refused(layer: nn.Module, name: str, offloaded: dict[str, str]) -> str | None:
    """Why a layer cannot be a target, as `expected .., got ..`; None if it can.

    Args:
        layer: the layer.
        name: its name.
        offloaded: from `offloading` of the module that holds the layer.
    """
    lazy = [each for each, tensor in layer.named_parameters() if is_lazy(tensor)]
    if lazy:
        return (
            f"expected weights with a shape at '{name}', got a lazy {type(layer).__name__} whose {lazy[0]} has none; "
            "run the module once, then attach"
        )
    by = next((place for place in offloaded if not place or f"{name}.".startswith(f"{place}.")), None)
    if by is not None:
        return (
            f"expected weights that stay in place at '{name}', got a {type(layer).__name__} that is offloaded by "
            f"{offloaded[by]} on {repr(by) if by else 'the module'}; remove that hook, then attach"
        )
    if any(tensor.is_meta for tensor in (*layer.parameters(), *layer.buffers())):
        return (
            f"expected weights in memory at '{name}', got a {type(layer).__name__} on the meta device; load its "
            "weights or end its offloading, then attach"
        )
    return _why_not_plain(layer, name)


def _why_not_plain(layer: nn.Module, name: str) -> str | None:
    kind, got = kind_of(layer), type(layer).__name__
    dense = f"expected a dense torch.nn.Linear at '{name}', got {got}"
    if kind is not None and changed(layer):
        what = "torch.nn.Linear" if kind is LINEAR else got
        return (
            f"expected a plain {what} at '{name}', got one with a hook or a forward of its own, which perturbed rows "
            "would leave out"
        )
    if isinstance(layer, nn.Conv2d) and (kind is None or not _is_pointwise(layer)):
        return (
            f"{dense} with kernel_size {layer.kernel_size}, stride {layer.stride}, padding {layer.padding}, dilation "
            f"{layer.dilation} and groups {layer.groups}; of convolutions only a plain Conv2d of 1x1 with stride 1, "
            "padding 0, dilation 1 and groups 1 can be a target; leave the others out by exclude_modules"
        )
    # the owner of such a linear reads its weight directly
    if kind is None or isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return f"{dense}; leave it out by exclude_modules (a 1x1 Conv2d and transformers' Conv1D can be targets too)"
    weight = layer.weight
    if type(weight).__name__ == "DTensor":
        return f"{dense} whose weight is sharded over processes; attach before sharding, or leave it out"
    if not weight.is_floating_point():
        return f"{dense} whose weight is {weight.dtype}; quantise with torchao, whose weights know their own product"
    if is_quantised(weight) and kind is not LINEAR:
        return f"{dense} whose weight is quantised ({type(weight).__name__}); leave it out by exclude_modules"
    return None


def _is_pointwise(conv: nn.Conv2d) -> bool:
    padding = (0, 0) if conv.padding in ("valid", "same") else conv.padding
    return (conv.kernel_size, conv.stride, padding, conv.dilation, conv.groups) == ((1, 1), (1, 1), (0, 0), (1, 1), 1)


def offloading(module: nn.Module) -> dict[str, str]:
    """The hook that offloads weights, by the name of the module it is on: accelerate's, or diffusers' for groups."""
    found = {}
    for name, each in module.named_modules():
        hooks = [hook for hook in _hooks(getattr(each, "_hf_hook", None)) if _offloads(hook)]
        registry = getattr(getattr(each, "_diffusers_hook", None), "hooks", None) or {}
        hooks += [hook for key, hook in registry.items() if "offload" in key]
        if hooks:
            found[name] = type(hooks[0]).__name__
    return found


def _hooks(hook: Any) -> list[Any]:
    """A hook of accelerate, or those that a SequentialHook holds."""
    inner = getattr(hook, "hooks", None)
    return [each for part in inner for each in _hooks(part)] if inner else [hook]


def _offloads(hook: Any) -> bool:
    return bool(getattr(hook, "offload", False)) or "CpuOffload" in (kind.__name__ for kind in type(hook).__mro__)


def shared_layers(module: nn.Module) -> dict[int, list[str]]:
    """Names of each layer that has several owners, by its id. A shared parent counts as one owner."""
    places: dict[int, dict[tuple[int, str], str]] = {}
    for name, each in module.named_modules(remove_duplicate=False):
        parent, _, child = name.rpartition(".")
        if name and isinstance(each, tuple(_FORWARDS)):
            places.setdefault(id(each), {}).setdefault((id(module.get_submodule(parent)), child), name)
    return {layer: list(names.values()) for layer, names in places.items() if len(names) > 1}


class Wrapped(NamedTuple):
    """A module that torch.compile wrapped, and its place."""

    parent: nn.Module
    child: str
    wrapper: nn.Module


def plain(module: nn.Module) -> nn.Module:
    """The module itself, or the one that torch.compile wrapped."""
    compiler = sys.modules.get("torch._dynamo.eval_frame")  # importing it takes seconds
    while compiler is not None and isinstance(module, compiler.OptimizedModule):
        module = module._orig_mod
    return module


def wrapped_below(module: nn.Module) -> list[Wrapped]:
    """The wrappers of torch.compile below a plain module."""
    return [
        Wrapped(parent, child, each)
        for parent in module.modules()
        if plain(parent) is parent
        for child, each in parent._modules.items()
        if each is not None and plain(each) is not each
    ]


@contextmanager
def unwrapped(places: list[Wrapped]) -> Iterator[None]:
    """Within the context, the plain modules stand in the places of their wrappers.

    On exit each wrapper is put back, unless another layer has taken its place meanwhile.
    """
    for parent, child, wrapper in places:
        if parent._modules[child] is wrapper:
            parent._modules[child] = plain(wrapper)
    try:
        yield
    finally:
        for parent, child, wrapper in places:
            if parent._modules[child] is plain(wrapper):
                parent._modules[child] = wrapper


def _function(method: Any) -> Any:
    return getattr(method, "__func__", method)
