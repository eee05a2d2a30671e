"""Updates the adapter along the ES gradient by torch.optim's rules, then caps the norms of the step and the adapter."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from esengine.base.errors import UpdateError
from esengine.es.rule import UpdateRule
from esengine.kernels.noise import KEPT_BYTES

_AT_ONCE = 1 << 17
"""Most elements of a piece of a CPU tensor, and of pieces that are subtracted together. They fit into the cache."""


@dataclass(frozen=True)
class UpdateStats:
    """L2 norms of one update: of g, of the step taken, and of the adapter after it."""

    gradient_norm: float
    step_norm: float
    adapter_norm: float


class Updater:
    """Applies a rule to named fp32 tensors in place. The optimizer's state is plain tensors.

    Args:
        rule: the update rule.
        parameters: the tensors by name.
        sigma: the noise scale, the unit of the learning rate.
    """

    def __init__(self, rule: UpdateRule, parameters: dict[str, torch.nn.Parameter], sigma: float):
        self.rule, self.parameters = rule, parameters
        tensors, rate = list(parameters.values()), rule.lr_scale * sigma
        self._before: list[torch.Tensor] = []
        if rule.optimizer == "adam":
            self.optimizer = torch.optim.Adam(tensors, lr=rate, betas=(rule.momentum, rule.beta2), foreach=True)
        elif rule.optimizer not in ("sgd", "momentum"):
            raise ValueError(f"optimizer: expected sgd, momentum or adam, got {rule.optimizer}")
        else:
            momentum = rule.momentum if rule.optimizer == "momentum" else 0.0
            self.optimizer = torch.optim.SGD(tensors, lr=rate, momentum=momentum, foreach=True)

    @torch.no_grad()
    def step(self, gradient: dict[str, torch.Tensor]) -> UpdateStats:
        """Move every tensor up its gradient, which has the same name, shape and dtype.

        After any error nothing has changed.

        Raises:
            UpdateError: the gradient, the step, the adapter or a moment would not be finite.
        """
        gradient_norm = _norm(gradient.values())
        if not math.isfinite(gradient_norm):
            norms = {"gradient": gradient_norm}
            raise UpdateError(f"gradient: expected a finite norm, got {gradient_norm}", norms)
        for parameter, state in self.optimizer.state.items():  # follows a module moved to another device
            state |= {key: value.to(parameter.device) for key, value in state.items() if _moves(key, value)}
        theta = list(self.parameters.values())
        before, moments = self._copies_of(theta), self.state_dict()
        try:
            stats = self._move(theta, [gradient[name] for name in self.parameters], gradient_norm, before)
            kept = [v for state in self.optimizer.state.values() for key, v in state.items() if _moves(key, v)]
            norms = {"step": stats.step_norm, "adapter": stats.adapter_norm, "moments": _norm(kept)}
            if not all(map(math.isfinite, norms.values())):
                found = ", ".join(f"{name} {norm:.3g}" for name, norm in norms.items())
                raise UpdateError(
                    f"update: expected finite norms, got {found} from a gradient of {gradient_norm:.3g}: "
                    "lower lr_scale or sigma",
                    {"gradient": gradient_norm, **norms},
                )
        except BaseException:
            torch._foreach_copy_(theta, before)
            self._restore(moments, copy=False)  # needs no memory, which may have run out
            raise
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        return stats

    def _move(
        self,
        theta: list[torch.nn.Parameter],
        gradient: list[torch.Tensor],
        gradient_norm: float,
        before: list[torch.Tensor],
    ) -> UpdateStats:
        if self.rule.optimizer == "sgd":  # same as torch.optim.SGD, with less overhead
            torch._foreach_add_(theta, gradient, alpha=self.optimizer.param_groups[0]["lr"])
        else:
            for parameter, each in zip(theta, gradient, strict=True):
                parameter.grad = each
            torch._foreach_neg_(gradient)  # negate in place and back; maximize=True would copy
            try:
                self.optimizer.step()
            finally:
                torch._foreach_neg_(gradient)
        step_norm, norm = _norm(theta, less=before), _norm(theta)
        capped = self.rule.max_step_norm is not None and step_norm > self.rule.max_step_norm
        if capped:
            moved = torch._foreach_sub(theta, before)
            torch._foreach_mul_(moved, self.rule.max_step_norm / step_norm)
            torch._foreach_copy_(theta, torch._foreach_add(before, moved))
            norm = _norm(theta)
        if self.rule.max_norm is not None and norm > self.rule.max_norm:
            capped = True
            torch._foreach_mul_(theta, self.rule.max_norm / norm)
            norm = _norm(theta)
        if capped:
            step_norm = _norm(theta, less=before)
        return UpdateStats(gradient_norm, step_norm, norm)

    def _copies_of(self, theta: list[torch.nn.Parameter]) -> list[torch.Tensor]:
        """Copies of theta. Small copies reuse the memory of the last ones, because new memory costs more on a CPU."""
        kept, self._before = self._before, []
        if [each.device for each in kept] == [each.device for each in theta]:
            torch._foreach_copy_(kept, theta)
        else:
            kept = _copies(theta)
        if sum(each.nbytes for each in kept) <= KEPT_BYTES:
            self._before = kept
        return kept

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The optimizer's moments and counters as `<tensor>.<moment>`."""
        found = {
            f"{name}.{key}": value
            for name, parameter in self.parameters.items()
            for key, value in self.optimizer.state.get(parameter, {}).items()
            if value is not None
        }
        return dict(zip(found, _copies(list(found.values())), strict=True))

    def check_state(self, state: dict[str, torch.Tensor]) -> None:
        """Raises ValueError if the state belongs to another optimizer or to other tensors."""
        moments = {"sgd": (), "momentum": ("momentum_buffer",), "adam": ("step", "exp_avg", "exp_avg_sq")}
        known = {f"{name}.{moment}" for name in self.parameters for moment in moments[self.rule.optimizer]}
        if set(state) not in (set(), known):
            odd = sorted(set(state) ^ known)[0]
            raise ValueError(f"state: expected the moments of {self.rule.optimizer}, differs first at {odd}")
        for key, value in state.items():
            name, _, moment = key.rpartition(".")
            if moment != "step" and value.shape != self.parameters[name].shape:
                expected = list(self.parameters[name].shape)
                raise ValueError(f"state: {key}: expected {expected}, got {list(value.shape)}")

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what `state_dict` returned."""
        self._restore(state, copy=True)

    def _restore(self, state: dict[str, torch.Tensor], copy: bool) -> None:
        self.optimizer.state.clear()
        for key, value in state.items():
            name, _, moment = key.rpartition(".")
            parameter = self.parameters[name]
            device = "cpu" if moment == "step" else parameter.device
            self.optimizer.state[parameter][moment] = value.to(device, copy=copy)


def _moves(key: str, value: torch.Tensor | None) -> bool:
    """Whether a state entry follows its parameter's device. Adam's step counter stays on the CPU, as in torch.optim."""
    return isinstance(value, torch.Tensor) and key != "step"


def _copies(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Copies of many tensors in one call, made by multiplying by 1."""
    return list(torch._foreach_mul(tensors, 1.0)) if tensors else []


def _norm(tensors: Iterable[torch.Tensor], less: Iterable[torch.Tensor] = ()) -> float:
    """The L2 norm of all tensors together, or of their differences from `less`, summed in fp64."""
    pieces, others = _pieces(tensors), _pieces(less)
    if not pieces:
        return 0.0
    if not others:
        norms = torch._foreach_norm(pieces, 2, torch.float64)
    else:
        norms, start = [], 0
        while start < len(pieces):
            end, room = start + 1, _AT_ONCE - pieces[start].numel()
            while end < len(pieces) and (not pieces[end].is_cpu or pieces[end].numel() <= room):
                room -= pieces[end].numel()
                end += 1
            norms += torch._foreach_norm(torch._foreach_sub(pieces[start:end], others[start:end]), 2, torch.float64)
            start = end
    return math.hypot(*torch.stack(norms).tolist())


def _pieces(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Flat pieces of long CPU tensors; other tensors as they are."""
    found: list[torch.Tensor] = []
    for each in tensors:
        found += each.reshape(-1).split(_AT_ONCE) if each.is_cpu and each.numel() > _AT_ONCE else (each,)
    return found
