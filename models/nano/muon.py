"""Muon: the momentum of a matrix, made orthogonal, is its step. It learns from fewer images than AdamW.

    m <- mu m + g,  u = g + mu m,  W <- W - lr sqrt(max(1, rows / columns)) O(u)
    O(u): five steps of X <- a X + (b X X' + c (X X')^2) X from u / |u|, which drive all singular values near 1

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024).
"""

from collections import defaultdict
from collections.abc import Iterable

import torch

_A, _B, _C = 3.4445, -4.7750, 2.0315


class Muon(torch.optim.Optimizer):
    """For weights [rows, columns] or of 1 x 1 convolutions; those of one shape are stepped as one batch.

    Args:
        parameters: The weights.
        lr: Step size: the spectral norm of a square matrix's step.
        momentum: mu.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], *, lr: float = 0.02, momentum: float = 0.95):
        super().__init__(parameters, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes[parameter.shape].append(parameter)
            for shape, same in shapes.items():
                gradients = [parameter.grad for parameter in same]
                means = [self.state[parameter].setdefault("exp_avg", torch.zeros_like(parameter)) for parameter in same]
                torch._foreach_mul_(means, group["momentum"])
                torch._foreach_add_(means, gradients)
                ahead = torch._foreach_add(gradients, means, alpha=group["momentum"])
                steps = orthogonal(torch.stack(ahead).flatten(2) if len(shape) > 2 else torch.stack(ahead))
                scale = max(1.0, shape[0] / shape[1]) ** 0.5
                steps = [each.view(shape) for each in steps.float()]
                torch._foreach_add_(same, steps, alpha=-group["lr"] * scale)


def optimizers(*models: torch.nn.Module, lr: float = 2e-3) -> tuple[Muon, torch.optim.AdamW]:
    """Muon for the matrices of a transformer's blocks, AdamW of this `lr` for all else that is trained."""
    matrices, others = [], []
    for model in models:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                inner = "blocks." in name or "layers." in name or "caption_projection." in name
                matrix = parameter.dim() == 2 or parameter.shape[2:] == (1, 1)
                (matrices if inner and matrix and name.endswith("weight") else others).append(parameter)
    return Muon(matrices), torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)


def orthogonal(u_nrc: torch.Tensor) -> torch.Tensor:
    """Nearly the nearest orthogonal matrix of each of [N, rows, columns], bfloat16."""
    wide = u_nrc.shape[1] <= u_nrc.shape[2]
    x = (u_nrc if wide else u_nrc.mT).bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = _A * x + (_B * square + _C * (square @ square)) @ x
    return x if wide else x.mT
