"""Other ways to put a different LoRA under every batch row, with one signature, for one run beside ours.

    peer(x [B, T, in], weight [out, in], bias [out] or None, a [B, r, in], b [B, out, r], scale) -> y [B, T, out]
    y_i = x_i W^T + bias + scale (x_i a_i^T) b_i^T

a and b are the members' own tensors, stored, in the dtype of x. A peer comes prepared: `prepare(weight, bias, a, b,
scale)` gives the callable of x alone that is timed, so that what can be done once is not counted.
"""

import importlib
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model

Prepared = Callable[[torch.Tensor], torch.Tensor]


def peft_mixed_batch(weight, bias, a_bri, b_bor, scale: float) -> Prepared:
    """PEFT's mixed-adapter batch: one adapter for each row, `adapter_names=` with one name for each row."""
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = torch.nn.Parameter(bias, requires_grad=False)
    holder, r = torch.nn.Sequential(linear), a_bri.shape[1]
    names = [f"member_{i}" for i in range(len(a_bri))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is an adapter already
        for name in names:
            config = LoraConfig(r=r, lora_alpha=scale * r, target_modules=["0"])
            inject_adapter_in_model(config, holder, name)
    layer = holder[0].eval().requires_grad_(False).to(weight.device)
    for name, a, b in zip(names, a_bri, b_bor, strict=True):
        layer.lora_A[name].weight.data, layer.lora_B[name].weight.data = a, b
    return lambda x: layer(x, adapter_names=names)


def batched_bmm(weight, bias, a_bri, b_bor, scale: float) -> Prepared:
    """The plain GEMM and two batched products over the stored weights of the members."""
    a_bir, scaled_bro = a_bri.mT.contiguous(), (scale * b_bor).mT.contiguous()
    return lambda x: torch.baddbmm(F.linear(x, weight, bias), torch.bmm(x, a_bir), scaled_bro)


def by_path(spec: str) -> Callable[..., Prepared]:
    """`module:function` to a peer; the function takes x, weight, bias, a, b, scale, as at the head of this file.

    Raises:
        ValueError: not of that form, or nothing callable is there.
    """
    module, colon, name = spec.partition(":")
    if not (module and colon and name):
        raise ValueError(f"peer: expected module:function, got {spec!r}")
    function = getattr(importlib.import_module(module), name, None)
    if not callable(function):
        raise ValueError(f"peer: expected a callable at {spec!r}, got {type(function).__name__}")
    return lambda weight, bias, a, b, scale: lambda x: function(x, weight, bias, a, b, scale)


KNOWN = {"peft_mixed_batch": peft_mixed_batch, "batched_bmm": batched_bmm}
