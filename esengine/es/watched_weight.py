"""A target's weight as other code sees it inside `Population.perturbed`: any use of its values is recorded."""

from collections.abc import Callable, Iterator

import torch

from esengine.es.base_layers import is_quantised

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
    A quantised weight has no values that another subclass could show, so `behind` holds it.
    """

    @classmethod
    def of(cls, weight: torch.Tensor, note: Callable[[], None]) -> "WatchedWeight":
        behind = weight if is_quantised(weight) else None
        if behind is not None:
            weight = torch.empty((), dtype=weight.dtype, device=weight.device).expand(weight.shape)
        watched = weight.as_subclass(cls)
        watched.note, watched.behind = note, behind
        return watched

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(isinstance(each, cls) and each.behind is not None for each in _flat((args, tuple(kwargs.values())))):
            result = func(*_unwatched(args), **{name: _unwatched(value) for name, value in kwargs.items()})
        else:
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


def _unwatched(value: object) -> object:
    """The same with every quantised weight instead of its `WatchedWeight`."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(_unwatched, value))
    return value.behind if isinstance(value, WatchedWeight) and value.behind is not None else value
