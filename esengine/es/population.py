"""A population of adapters on one module: attach, render members in one batch, update, detach.

    population = esengine.attach(module, LoraConfig(...), esengine.Noise(sigma=1e-2, rank=1, seed=0))
    with population.perturbed(step=7, members=members):     # int64 [B], one for each batch row
        y = module(x)
    population.update(step=7, fitness=fitness)              # fp32 [N]

No member is stored. Its noise is regenerated from (seed, step, layer, member) wherever it is needed.

Theta is what ES optimises: A and B of a LoRA. With `esengine.Direct` in place of the LoraConfig, theta is delta, which
is added to the weights.
"""

import copy
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save
from torch import nn

from esengine.base.errors import UnperturbedError
from esengine.base.files import replace_file
from esengine.base.memory import oom_guard
from esengine.base.transfer import upload
from esengine.es.base_layers import CONV1D, Wrapped, offloading, plain, shared_layers, unwrapped, wrapped_below
from esengine.es.direct import Direct, DirectLinear, full_rank
from esengine.es.fitness import as_float32
from esengine.es.layers import (
    ADAPTER,
    Chunk,
    PopulationLinear,
    Scope,
    Target,
    Theta,
    check_config,
    make_layer,
    strip,
    why_not_perturbed,
)
from esengine.es.lora_folder import PEFT_PREFIX, read_lora
from esengine.es.model_card import library_card, write_card
from esengine.es.rule import UpdateRule
from esengine.es.update import Updater, UpdateStats
from esengine.kernels import (
    CONTRACT,
    MemberNoise,
    UpdatePlan,
    check_fitness,
    es_update,
    factor,
    key_words,
    linear_streams,
    signed_sigma,
    step_tensor,
    uses_triton,
)


@dataclass(frozen=True)
class Noise:
    """How members differ from the adapter.

    Attributes:
        sigma: standard deviation of the noise on every element of theta (A and B, or delta).
        rank: rank k of the noise on each tensor.
        seed: the run's seed, in [0, 2^64).
    """

    sigma: float = 1e-2
    rank: int = 1
    seed: int = 0

    def __post_init__(self):
        if not (math.isfinite(self.sigma) and self.sigma > 0):
            raise ValueError(f"sigma: expected a positive number, got {self.sigma}")
        if self.rank < 1:
            raise ValueError(f"rank: expected at least 1, got {self.rank}")
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed: expected an integer in [0, 2^64), got {self.seed}")


def attach(
    module: nn.Module,
    config: LoraConfig | Direct,
    noise: Noise | None = None,
    *,
    rule: UpdateRule | None = None,
    backend: Literal["auto", "triton", "torch"] = "auto",
) -> "Population":
    """Attach an adapter to `module` in place, so that its members can be rendered in one batch.

    Args:
        module: any module with layers below it that can be targets: `torch.nn.Linear`, plain or quantised by torchao,
            transformers' `Conv1D`, and `torch.nn.Conv2d` of 1x1. A module that torch.compile wrapped counts as the
            plain one: names of layers, noise and saved keys are those of the plain module.
        config: PEFT's LoraConfig. Its target_modules, exclude_modules, rank_pattern, alpha_pattern and the rest select
            as in PEFT. Or `Direct`, which perturbs and updates the weights themselves.
        noise: defaults to `Noise()`.
        rule: rule of `update`, defaults to `UpdateRule()`.
        backend: `auto` uses Triton on CUDA and batched torch elsewhere.

    Returns:
        The population. `module` computes with the unperturbed adapter outside `Population.perturbed`.

    Raises:
        ValueError: `config` has an option that ES on frozen weights does not support, a target matches nothing,
            `module` or a submodule already has an adapter, a target has two owners, or stream ids collide.
        TypeError: a target is another kind of layer, or has a hook or a replaced forward; its weights are offloaded, on
            the meta device, lazy or sharded; or it is quantised and `config` is `Direct`. The module is as it was.
    """
    noise, rule = noise or Noise(), rule or UpdateRule()
    form = DirectLinear if isinstance(config, Direct) else PopulationLinear
    config = copy.deepcopy(config.selection() if isinstance(config, Direct) else config)
    check_config(config, also=("fan_in_fan_out",))
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"backend: expected auto, triton or torch, got {backend}")
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    given, module = module, plain(module)
    wrapped = wrapped_below(module)
    with unwrapped(wrapped):
        _check_module(module, config)
        before = Before(given, wrapped, {name: p.requires_grad for name, p in module.named_parameters()})
        try:
            config, layers = _inject(module, config, form, noise)
            population = Population(module, layers, config, noise, rule, backend, before)
            if backend == "triton" and not uses_triton(population.device):
                raise ValueError(
                    f"backend: triton needs Triton and a CUDA device, the module is on {population.device}"
                )
            return population
        except BaseException:
            strip(module, before.trainable)
            raise


def _inject(
    module: nn.Module, config: LoraConfig, form: type[Target], noise: Noise
) -> tuple[LoraConfig, dict[str, Target]]:
    """Replace the targets of a module by layers of a form. Returns the config for the saved adapter, and the layers."""
    shared, offloaded = shared_layers(module), offloading(module)
    config._register_custom_module({nn.Module: partial(make_layer, form, offloaded=offloaded)})
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(noise.seed & (1 << 63) - 1)  # only the CPU's generator
        LoraModel(module, config, ADAPTER)
    layers = {name: m for name, m in module.named_modules() if isinstance(m, Target)}
    for layer in layers.values():
        if places := shared.get(id(layer.base_layer)):
            raise ValueError(
                f"target_modules: {' and '.join(map(repr, places))} are one {type(layer.base_layer).__name__} with "
                "several owners, and PEFT loads an adapter for the first alone; give each owner one of its own, or "
                "exclude it"
            )
        layer.train(layer.base_layer.training)
    conv1d = any(layer.kind is CONV1D for layer in layers.values())
    if config.fan_in_fan_out and not conv1d:
        raise ValueError("config.fan_in_fan_out: expected False, as no target is a Conv1D, got True")
    config = full_rank(config, layers) if form is DirectLinear else config
    config.fan_in_fan_out = conv1d
    return config, layers


def _check_module(module: nn.Module, config: LoraConfig) -> None:
    """Raises ValueError if the module already has an adapter or lacks one of the targets."""
    for name, each in module.named_modules():
        if getattr(each, "peft_config", None) or isinstance(each, BaseTunerLayer):
            where = f"at '{name}'" if name else "with peft_config"
            raise ValueError(
                f"module: expected one without an adapter, got one {where}; detach, unload or merge it first"
            )
    names = [name for name, _ in module.named_modules(remove_duplicate=False)]
    for target in config.target_modules if isinstance(config.target_modules, (list, set, tuple)) else ():
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise ValueError(f"target_modules: '{target}' matches nothing in {type(module).__name__}")


class Before(NamedTuple):
    """What `Population.detach` restores besides the base layers.

    Attributes:
        module: the one that `attach` was given.
        wrapped: the wrappers of torch.compile below it.
        trainable: requires_grad of its parameters, by the names in the plain module.
    """

    module: nn.Module
    wrapped: list[Wrapped]
    trainable: dict[str, bool]


class Population:
    """The members of one run on one module. Made by `attach`."""

    def __init__(
        self,
        module: nn.Module,
        layers: dict[str, Target],
        config: LoraConfig,
        noise: Noise,
        rule: UpdateRule,
        backend: str,
        before: Before,
    ):
        self.module, self.layers, self.config, self.noise, self.rule = module, layers, config, noise, rule
        self._backend, self._before, self._scope = backend, before, Scope()
        self._kept_plan: UpdatePlan | None = None
        self._called: set[str] | None = None  # targets perturbed since the last update; None: `perturbed` not used
        taken: dict[int, str] = {}
        for name, layer in layers.items():
            layer.name, layer.scope = name, self._scope
            layer.owner = type(module.get_submodule(name.rpartition(".")[0]))
            layer.streams = linear_streams(name, direct=layer.a is None)
            for theta in layer.thetas().values():
                theta.parameter.data = theta.parameter.data.float()
                theta.parameter.requires_grad_(False)
            for stream in (s for s, length in zip(layer.streams, layer.lengths(), strict=True) if length):
                if stream in taken:
                    raise ValueError(f"stream ids: {name} and {taken[stream]} clash; exclude one of the two")
                taken[stream] = name
        self._updater = Updater(rule, self.parameters(), noise.sigma)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Theta, fp32: `<layer>.lora_A.weight` and `<layer>.lora_B.weight`, or `<layer>.delta`, for every layer."""
        return {name: theta.parameter for name, _, theta in self._thetas()}

    def lora(self) -> dict[str, torch.Tensor]:
        """The adapter as a LoRA, fp32: `<layer>.lora_A.weight` and `<layer>.lora_B.weight` for every layer.

        A delta becomes a LoRA of full rank r = min(in, out). A or B is the identity, so B A equals delta bit for bit.
        """
        found = {}
        for name, layer in self.layers.items():
            found[f"{name}.lora_A.weight"], found[f"{name}.lora_B.weight"] = layer.lora()
        return found

    @property
    def device(self) -> torch.device:
        """The device of the targets. Raises RuntimeError after `detach`."""
        self._check_attached()
        return next(iter(self.layers.values())).base_weight.device

    @property
    def backend(self) -> str:
        """`triton` or `torch`: the backend of the layers on their current device."""
        if self._backend != "auto":
            return self._backend
        return "triton" if uses_triton(self.device) else "torch"

    @property
    def perturbation(self) -> MemberNoise:
        """The current batch's noise, in the form that kernels take. Raises RuntimeError outside `perturbed`."""
        if self._scope.chunk is None:
            raise RuntimeError("perturbation: expected to be inside perturbed")
        return self._scope.chunk.noise

    @contextmanager
    def perturbed(self, *, step: int | torch.Tensor, members: torch.Tensor, copies: int = 1) -> Iterator["Population"]:
        """Within the context, every target perturbs each batch row by the noise of that row's member.

        A target's batch has copies * B rows: the module's batch of B rows, stacked `copies` times. Row i belongs to
        members[i % B]. So copies=2 is classifier-free guidance as one doubled batch, [negative rows | positive rows].
        Interleaved copies, where row i belongs to members[i // copies], are not offered: repeat the members yourself.

        On a GPU the forward supports no gradient. Call it under torch.no_grad.

        Args:
            step: step of the noise contract, an int in [0, 2^32) or an int64 [1] tensor on the module's device.
            members: int64 [B], one in [0, 2^33) for each batch row, on the module's device or the CPU. Checking them on
                the CPU does not wait for the device.
            copies: how often the module stacks its batch, at least 1. It is never guessed from the number of rows.

        Raises:
            ValueError: `members` has another dtype, shape or device, or an entry out of range, or `copies` is not a
                positive integer. The forward raises it if a target's batch does not have copies * B rows.
            UnperturbedError: on exit, if the module ran but a target was not called, or if other code computed with a
                target's weight. That weight has no noise, so every member would compute the same there. A disabled
                adapter raises no error here; `update` then raises it.
            RuntimeError: inside another `perturbed`, or after `detach`; or a target's adapter is merged into the weight
                or is not the active one; or its base linear has a hook or a replaced forward.
        """
        self._check_attached()
        if self._scope.chunk is not None:
            raise RuntimeError("perturbed: already inside one; contexts do not nest")
        for layer in self.layers.values():
            layer.require_in_force()
        if not isinstance(copies, int) or isinstance(copies, bool) or copies < 1:
            raise ValueError(f"copies: expected an integer of at least 1, got {copies!r}")
        if copies > 1:
            members = self._check_members(members).repeat(copies)
        chunk = self._chunk(step, members)
        self._scope.enter(replace(chunk, copies=copies) if copies > 1 else chunk)
        try:
            with self._scope.watch(self.module):
                yield self
            if len(members):
                self._require_all_called()
        finally:
            self._scope.enter(None)

    def _require_all_called(self) -> None:
        scope = self._scope
        missed = {
            name: why_not_perturbed(layer, scope)
            for name, layer in self.layers.items()
            if not layer.disable_adapters
            and (name in scope.used or (name not in scope.called and (scope.ran or name in scope.read)))
        }
        if missed:
            raise UnperturbedError(missed)
        self._called = (self._called or set()) | scope.called

    @torch.no_grad()
    def gradient(self, *, step: int, fitness: torch.Tensor) -> dict[str, torch.Tensor]:
        """g = mean_i(f_i E_i) for every tensor of `parameters`, fp32. The noise is regenerated, never stored.

        Args:
            step: step of the noise contract.
            fitness: as in `update`.
        """
        self._check_attached()
        fitness = as_float32(fitness, "fitness")
        check_fitness(fitness)
        if not fitness.isfinite().all():
            raise ValueError(f"fitness: expected finite values, got {fitness[~fitness.isfinite()][0]:g}")
        fitness, noise = fitness.to(self.device), dict(seed=self.noise.seed, step=step)
        if self.backend == "triton":
            sums = [
                es_update(fitness, shape=shape, stream_u=u, stream_v=v, rank=self.noise.rank, **noise)
                for shape, u, v in self._tensors()
            ]
        else:
            sums = self._plan.sums(fitness, **noise)
        torch._foreach_div_(sums, len(fitness))
        return {name: g.view(theta.shape) for (name, theta), g in zip(self.parameters().items(), sums, strict=True)}

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(self, *, step: int, fitness: torch.Tensor) -> UpdateStats:
        """Update the adapter along g by the population's rule. After an error nothing has changed.

        Args:
            step: the step that the members were rendered with.
            fitness: [N], finite, N even, entry i for member i. A float32 tensor on any device; or numbers in a list, a
                tuple or a numpy array, which are rounded to float32.

        Raises:
            TypeError: `fitness` is no sequence of numbers.
            ValueError: `fitness` has another dtype or shape, an odd length, or a value that is not finite.
            UnperturbedError: `perturbed` was used since the last update, but a target never had its noise there. The
                update would move that target at random.
            RuntimeError: an adapter is merged into the weight. After an update it could not be unmerged.
            UpdateError: the adapter would not be finite.
            OutOfMemory: the update does not fit into memory.
        """
        self._require_unmerged()
        if self._called is not None and (missed := [name for name in self.layers if name not in self._called]):
            why = {True: "its adapter was switched off", False: "it was not called since the last update"}
            raise UnperturbedError({name: why[bool(self.layers[name].disable_adapters)] for name in missed})
        with oom_guard("the numbers of an update", "stop what else uses this device"):
            stats = self._updater.step(self.gradient(step=step, fitness=fitness))
        self._refresh()
        self._called = None
        return stats

    @torch.no_grad()
    def member_state_dict(self, *, step: int, member: int) -> dict[str, torch.Tensor]:
        """One member's theta as plain weights, fp32: what `perturbed` renders.

        A LoRA has PEFT's key names. A delta has the key `base_model.model.<layer>.delta`.
        """
        self._check_attached()
        members = self._check_members(torch.tensor([member], device=self.device))
        c = signed_sigma(members, self.noise.sigma, self.noise.rank)
        noise = dict(seed=self.noise.seed, step=step, pairs=members >> 1, rank=self.noise.rank)
        state = {}
        for name, layer, theta in self._thetas():
            l, s = theta.shape
            u = factor(stream=layer.streams[theta.u], length=l, **noise)[0]
            v = factor(stream=layer.streams[theta.v], length=s, **noise)[0]
            state[f"{PEFT_PREFIX}{name}"] = theta.parameter + (c * u @ v.T).view(theta.parameter.shape)
        return state

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs: the adapter and the optimizer's state as tensors, and the noise settings."""
        noise = {"contract": CONTRACT, "sigma": self.noise.sigma, "rank": self.noise.rank, "seed": self.noise.seed}
        adapter = {name: parameter.detach().clone() for name, parameter in self.parameters().items()}
        return {"adapter": adapter, "optimizer": self._updater.state_dict(), "noise": noise}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: the state has other noise settings, layers, shapes or optimizer. Nothing has changed then.
        """
        self._require_unmerged()
        mine, parameters = self.state_dict(), self.parameters()
        if state["noise"] != mine["noise"]:
            raise ValueError(f"state: expected noise {mine['noise']}, got {state['noise']}")
        shapes, got = ({k: tuple(t.shape) for k, t in s["adapter"].items()} for s in (mine, state))
        if shapes != got:
            odd = sorted(set(shapes.items()) ^ set(got.items()))[0]
            raise ValueError(f"state: layers differ from the attached ones, first at {odd[0]} {list(odd[1])}")
        self._updater.check_state(state["optimizer"])
        for name, parameter in parameters.items():
            parameter.copy_(state["adapter"][name])
        self._refresh()
        self._updater.load_state_dict(state["optimizer"])

    @torch.no_grad()
    def load_lora(self, path: str | os.PathLike) -> None:
        """Start ES from an existing LoRA. The module then computes with it, up to the rounding of fp32.

        The population keeps its own r and lora_alpha. Its scale is s and the file's is s': B becomes B s' / s. If the
        file's rank is smaller, the other rows of A stay as they are, and the other columns of B are zero. In the direct
        form, delta becomes s' B A. The optimizer starts anew.

        Args:
            path: a folder that PEFT saved, a folder with pytorch_lora_weights.safetensors as diffusers' pipelines save
                it, or such a file. Any alpha, rsLoRA, rank_pattern and alpha_pattern. The scale is the one that PEFT or
                diffusers would apply. Pickles are never read.

        Raises:
            ValueError: what cannot be continued exactly, with the reason: a larger rank than the population's, other
                target layers, DoRA, a bias, modules_to_save, numbers that are not finite, a damaged file. Nothing has
                changed then.
            RuntimeError: inside `perturbed`, after `detach`, or while an adapter is merged.
        """
        self._check_attached()
        self._require_unmerged()
        if self._scope.chunk is not None:
            raise RuntimeError("load_lora: inside perturbed; leave it first")
        targets = {name: tuple(each.shape for each in layer.lora()) for name, layer in self.layers.items()}
        theta = {}
        for name, (a, b, scale) in read_lora(path, targets).items():
            a, b = (each.flatten(1).to(self.device, torch.float64) for each in (a, b))
            try:
                continued = self.layers[name].continued(a, b, scale)
            except ValueError as error:
                raise ValueError(f"{path}: '{name}': {error}") from error
            theta |= {f"{name}.{end}": tensor.float() for end, tensor in continued.items()}
        if odd := next((name for name, tensor in theta.items() if not tensor.isfinite().all()), None):
            raise ValueError(f"{path}: {odd}: expected numbers that fit into float32 at the population's scale")
        for name, parameter in self.parameters().items():
            parameter.copy_(theta[name].view(parameter.shape))
        self._refresh()
        self._updater.load_state_dict({})

    def save_pretrained(
        self, path: str | os.PathLike, *, base_model: str | None = None, card: str | None = None
    ) -> None:
        """Write the adapter as a PEFT folder: adapter_config.json, adapter_model.safetensors and a README.md.

        A delta becomes a LoRA of full rank min(in, out) at scale 1, see `lora`. Any LoRA reader can load it. Its size
        is about that of the weights in fp32, or twice that if they are square.

        Args:
            path: the folder. A README.md in it is replaced only if it is a model card of esengine.
            base_model: name of the model that the adapter is for. Default: the module's `base_model_name`, which
                `esengine.models.load` sets, or `name_or_path`, if it has one.
            card: text of the model card. Default: one with the population's settings.
        """
        path = Path(path)
        tensors = {f"{PEFT_PREFIX}{name}": p.detach().cpu().contiguous() for name, p in self.lora().items()}
        config = copy.deepcopy(self.config)
        config._custom_modules, config.inference_mode = None, True
        for name in ("base_model_name", "name_or_path"):
            base_model = base_model or getattr(self.module, name, None) or None
        config.base_model_name_or_path = base_model
        facts = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
        facts = dict(sorted(facts.items()))  # patterns keep their order: PEFT takes the first that matches
        replace_file(path / "adapter_model.safetensors", save(tensors, metadata={"format": "pt"}))
        replace_file(path / "adapter_config.json", json.dumps(facts, indent=2).encode())
        write_card(path, library_card(base_model, self._recipe(facts)) if card is None else card)

    def _recipe(self, facts: dict[str, Any]) -> dict[str, Any]:
        """The settings of the population for its model card. `facts`: those of its LoraConfig."""
        shown = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules")
        lora = {name: facts[name] for name in shown if facts[name]}
        return {"lora": lora, "noise": asdict(self.noise), "update": asdict(self.rule)}

    def detach(self) -> nn.Module:
        """Remove the adapter and return the module as it was given. The population cannot be used afterwards.

        Raises:
            RuntimeError: inside `perturbed`, after another `detach`, or while an adapter is merged.
        """
        self._check_attached()
        if self._scope.chunk is not None:
            raise RuntimeError("detach: inside perturbed; leave it first")
        self._require_unmerged()
        with unwrapped(self._before.wrapped):
            strip(self.module, self._before.trainable)
        self.layers = {}
        return self._before.module

    def _thetas(self) -> Iterator[tuple[str, Target, Theta]]:
        """Yields the name, layer and tensor of each theta."""
        for name, layer in self.layers.items():
            for end, theta in layer.thetas().items():
                yield f"{name}.{end}", layer, theta

    def _refresh(self) -> None:
        for layer in self.layers.values():
            layer.refresh()

    def _require_unmerged(self) -> None:
        for layer in self.layers.values():
            layer.require_unmerged()

    def _check_attached(self) -> None:
        if not self.layers:
            raise RuntimeError("population: detached; attach a new one")

    def _check_members(self, members: torch.Tensor) -> torch.Tensor:
        if not isinstance(members, torch.Tensor) or members.dtype != torch.int64 or members.dim() != 1:
            got = (
                f"{members.dtype} {list(members.shape)}"
                if isinstance(members, torch.Tensor)
                else type(members).__name__
            )
            raise ValueError(f"members: expected int64 [B], got {got.removeprefix('torch.')}")
        if members.device not in (self.device, torch.device("cpu")):
            raise ValueError(f"members: expected on {self.device}, as the module, or cpu, got on {members.device}")
        low, high = torch.stack(members.aminmax()).tolist() if len(members) else (0, 0)
        if low < 0 or high >= 1 << 33:
            bad = members[(members < 0) | (members >= 1 << 33)][0]
            raise ValueError(f"members: expected values in [0, 2^33), got {bad}")
        return upload(members, self.device)

    def _chunk(self, step: int | torch.Tensor, members: torch.Tensor) -> Chunk:
        members = self._check_members(members)
        key_words(self.noise.seed, step)
        triton = self.backend == "triton"
        step = step_tensor(step, self.device) if triton else int(step)
        noise = MemberNoise(members.contiguous(), self.noise.seed, step, self.noise.sigma, self.noise.rank)
        if triton:
            return Chunk(noise)
        c, pair = signed_sigma(members, self.noise.sigma, self.noise.rank), members >> 1
        pairs, rows = torch.unique_consecutive(pair, return_counts=True)
        found, slots = pairs.tolist(), None
        if len(set(rows.tolist())) > 1 or len(set(found)) < len(found):
            # otherwise each pair has equally many consecutive rows, and no row needs a copy of its pair's noise
            pairs, slots = torch.unique(pair, return_inverse=True)
        return Chunk(noise, c, self._factors(step, pairs, slots))

    def _factors(self, step: int, pairs: torch.Tensor, slots: torch.Tensor | None) -> dict[str, tuple]:
        """V, U, V', U' of every layer, [P, L, k], or [B, L, k] with `slots`. None where a layer has no such factor."""
        block = self._plan.noise.block(seed=self.noise.seed, step=step, pairs=pairs, slots=slots)
        found: dict[str, list[torch.Tensor | None]] = {name: [None] * 4 for name in self.layers}
        for (_, layer, theta), (u, v) in zip(self._thetas(), self._plan.places, strict=True):
            found[layer.name][theta.u], found[layer.name][theta.v] = block[u], block[v]
        return {name: tuple(factors) for name, factors in found.items()}

    @property
    def _plan(self) -> UpdatePlan:
        """The plan of all noise on the torch path, on the layers' current device."""
        if self._kept_plan is None or self._kept_plan.device != self.device:
            self._kept_plan = UpdatePlan(self._tensors(), self.noise.rank, self.device)
        return self._kept_plan

    def _tensors(self) -> list[tuple[tuple[int, int], int, int]]:
        """Shape, stream of U and stream of V of each theta."""
        return [(theta.shape, layer.streams[theta.u], layer.streams[theta.v]) for _, layer, theta in self._thetas()]
