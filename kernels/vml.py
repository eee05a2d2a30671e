"""A cold-start race of the CPU build of torch, closed before it can be met.

torch's CPU ops below call oneMKL's vector math (VML) from every intra-op thread. oneMKL of 2024 chooses each function's
kernel at its first call; when two threads make that call at once, one of them may run the low-accuracy kernel (errors
near 1e-4) for its share of that single call. The text embedding of the first prompt of a process could differ so. One
call of each function on one thread leaves nothing to choose.

Source: pytorch/pytorch issue 188792.
"""

import torch

UNARY = (
    *("acos", "acosh", "asin", "asinh", "atan", "atanh", "cos", "cosh", "erf"),
    *("erfc", "erfinv", "exp", "exp2", "expm1", "lgamma", "log", "log10", "log1p"),
    *("log2", "rsqrt", "sigmoid", "sin", "sinh", "sqrt", "tan", "tanh"),
)
"""Names of torch's elementwise functions that reach VML in some build."""


def resolve_vml() -> None:
    """Calls each function of `UNARY` once in float32 and float64 on a single element, hence on a single thread."""
    for dtype in (torch.float32, torch.float64):
        one = torch.ones(1, dtype=dtype)
        for name in UNARY:
            getattr(torch, name)(one)
