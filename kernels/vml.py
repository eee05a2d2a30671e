"""Prevents a race condition at the first call of torch's CPU math library.

The torch CPU ops below call oneMKL's vector math (VML) from every intra-op thread. oneMKL of 2024 selects a function's
kernel at the first call. If two threads make this call at the same time, one of them may use the low-accuracy kernel
(errors near 1e-4) for its part of that call. For example, the text embedding of the first prompt of a process could
differ. After one call of each function on one thread, all kernels are selected.

Source: pytorch/pytorch issue 188792.
"""

import torch

UNARY = (
    *("acos", "acosh", "asin", "asinh", "atan", "atanh", "cos", "cosh", "erf"),
    *("erfc", "erfinv", "exp", "exp2", "expm1", "lgamma", "log", "log10", "log1p"),
    *("log2", "rsqrt", "sigmoid", "sin", "sinh", "sqrt", "tan", "tanh"),
)
"""Names of torch's elementwise functions that call VML in some build."""


def resolve_vml() -> None:
    """Call each function of `UNARY` once in float32 and float64, on one element and so on one thread."""
    for dtype in (torch.float32, torch.float64):
        one = torch.ones(1, dtype=dtype)
        for name in UNARY:
            getattr(torch, name)(one)
