"""Targets besides a plain Linear: Conv1D, 1x1 convolutions, quantised weights; and what is refused by name."""

import copy
import importlib.util
import pickle

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import esengine
from esengine import Direct, Noise
from esengine.base.errors import UnperturbedError
from esengine.es.population import PEFT_PREFIX

MEMBERS = [5, 0, 3, 2, 2, 7, 5, 4]


class Mixed(nn.Module):
    """x [B, T, 6] through a Conv1D, a 1x1 convolution over T pixels in two rows, and a Linear."""

    def __init__(self, bias=True):
        super().__init__()
        self.wide = Conv1D(10, 6)
        self.point = nn.Conv2d(10, 7, 1, bias=bias)
        self.last = nn.Linear(7, 7, bias=bias)
        self.wide.weight.data.normal_(std=0.4)
        self.wide.bias.data.normal_()

    def forward(self, x):
        y_bct = torch.tanh(self.wide(x)).mT
        y_bchw = torch.tanh(self.point(y_bct.unflatten(2, (2, -1)))).contiguous()
        return self.last(y_bchw.flatten(2).mT.contiguous())


def seeded(build):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval()


def rows(count, tokens=6, width=6):
    return torch.randn(count, tokens, width, generator=torch.Generator().manual_seed(1))


def trained(module, config, noise=None, **kwargs):
    """A population whose theta is not nought."""
    population = esengine.attach(module, config, noise or Noise(sigma=0.1, rank=2, seed=3), **kwargs)
    state, generator = population.state_dict(), torch.Generator().manual_seed(2)
    for name, tensor in state["adapter"].items():
        state["adapter"][name] = 0.2 * torch.randn(tensor.shape, generator=generator)
    population.load_state_dict(state)
    return population


def relative(got, expected):
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def perturbed(population, x, members=MEMBERS, **kwargs):
    with torch.no_grad(), population.perturbed(step=4, members=torch.tensor(members, dtype=torch.int64), **kwargs):
        return population.module(x)


def gpt2():
    settings = dict(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=12)
    return GPT2LMHeadModel(GPT2Config(**settings, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


TARGETS = ["wide", "point", "last"]
LORAS = {
    "conv1d": LoraConfig(r=3, lora_alpha=4, target_modules=["wide"], fan_in_fan_out=True),
    "conv2d": LoraConfig(r=3, lora_alpha=4, target_modules=["point"]),
    "all": LoraConfig(r=2, target_modules=TARGETS, rank_pattern={"point": 4}, alpha_pattern={"wide": 3}),
    "rslora": LoraConfig(r=4, target_modules=TARGETS, use_rslora=True, init_lora_weights="gaussian"),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [2, 6, 40])
@pytest.mark.parametrize("name", LORAS)
def test_a_mixed_batch_is_every_member_alone_in_peft(name, tokens, bias):
    population, x = trained(seeded(lambda: Mixed(bias)), LORAS[name]), rows(len(MEMBERS), tokens)
    batch = perturbed(population, x)
    peft = get_peft_model(seeded(lambda: Mixed(bias)), copy.deepcopy(LORAS[name])).eval()
    for row, member in enumerate(MEMBERS):
        loaded = set_peft_model_state_dict(peft, population.member_state_dict(step=4, member=member))
        assert not loaded.unexpected_keys
        with torch.no_grad():
            assert relative(batch[row], peft(x[row : row + 1])[0]) < 1e-5
    set_peft_model_state_dict(peft, population.member_state_dict(step=4, member=3))
    with torch.no_grad():
        assert relative(batch[:1], peft(x[:1])) > 1e-2  # another member is far away
        merged = peft.merge_and_unload()
        assert relative(batch[2], merged(x[2:3])[0]) < 1e-5


@torch.no_grad()
def by_hand(population, build, member=None):
    """A plain fp64 module with the weights of a member of the direct form, or of none."""
    module = build().double()
    state = {f"{PEFT_PREFIX}{name}": delta for name, delta in population.parameters().items()}
    if member is not None:
        state = population.member_state_dict(step=4, member=member)
    for name, delta in state.items():
        layer = module.get_submodule(name.removeprefix(PEFT_PREFIX).removesuffix(".delta"))
        delta = delta.double()
        layer.weight += delta.T if isinstance(layer, Conv1D) else delta.view(layer.weight.shape)
    return module


@pytest.mark.parametrize("tokens", [2, 40])
def test_direct_perturbs_the_weights_of_all_kinds(tokens, tmp_path):
    build = lambda: seeded(Mixed)  # noqa: E731
    population, x = trained(build(), Direct(TARGETS)), rows(len(MEMBERS), tokens)
    assert {name: tuple(delta.shape) for name, delta in population.parameters().items()} == {
        "wide.delta": (10, 6), "point.delta": (7, 10), "last.delta": (7, 7),
    }  # fmt: skip
    batch = perturbed(population, x)
    with torch.no_grad():
        for row, member in enumerate(MEMBERS):
            assert relative(batch[row], by_hand(population, build, member)(x[row : row + 1].double())[0]) < 1e-5
        plain = population.module(x)
        assert relative(plain, by_hand(population, build)(x.double())) < 1e-5
        population.save_pretrained(tmp_path)
        assert relative(PeftModel.from_pretrained(build(), tmp_path).eval()(x), plain) < 1e-5
        assert population.detach()(x).equal(build()(x))


def test_direct_starts_as_the_module():
    module, x = seeded(Mixed), rows(3)
    with torch.no_grad():
        expected = module(x)
        esengine.attach(module, Direct(TARGETS))
        assert torch.equal(module(x), expected)


@pytest.mark.parametrize("name", LORAS)
def test_peft_reads_what_is_saved(name, tmp_path, recwarn):
    population, x = trained(seeded(Mixed), LORAS[name]), rows(3)
    population.save_pretrained(tmp_path)
    peft = PeftModel.from_pretrained(seeded(Mixed), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(peft(x), population.module(x))
        assert relative(seeded(Mixed)(x), population.module(x)) > 1e-2
    if name == "conv1d":
        assert not [each for each in recwarn if "fan_in_fan_out" in str(each.message)]


def test_a_convolution_is_stored_as_peft_stores_it():
    population = trained(seeded(Mixed), LORAS["conv2d"])
    shapes = {"point.lora_A.weight": (3, 10, 1, 1), "point.lora_B.weight": (7, 3, 1, 1)}
    assert {name: tuple(theta.shape) for name, theta in population.parameters().items()} == shapes
    gradient = population.gradient(step=4, fitness=torch.tensor([1.0, -1.0]))
    assert {name: tuple(each.shape) for name, each in gradient.items()} == shapes
    for name, theta in population.parameters().items():
        one, two = (population.member_state_dict(step=4, member=i)[f"{PEFT_PREFIX}{name}"] for i in (0, 1))
        expected = (one.double() - two.double()) / 2 / population.noise.sigma
        assert relative(gradient[name], expected) < 1e-5
        assert relative((one + two) / 2, theta) < 1e-6


@pytest.mark.parametrize("config", [LORAS["all"], Direct(TARGETS)], ids=["lora", "direct"])
def test_es_learns_on_all_kinds(config):
    module, x = seeded(Mixed), rows(32)
    target = torch.tanh(x.sum(-1, keepdim=True)).expand(-1, -1, 7)
    rule = esengine.UpdateRule(optimizer="adam", lr_scale=1.0)
    population = esengine.attach(module, config, Noise(sigma=0.03), rule=rule)
    first = float((module(x) - target).square().mean())
    for step in range(40):
        with torch.no_grad(), population.perturbed(step=step, members=torch.arange(32)):
            losses = (module(x[:1].repeat(32, 1, 1)) - target[:1]).square().mean((1, 2))
        population.update(step=step, fitness=-(losses - losses.mean()) / losses.std())
    assert float((module(x[:1]) - target[:1]).square().mean()) < 0.8 * first


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_keeps_the_layout_of_its_result(layout):
    module = seeded(lambda: nn.Sequential(nn.Conv2d(4, 6, 1))).to(memory_format=layout)
    population = trained(module, LoraConfig(r=2, target_modules=["0"]))
    x = torch.randn(4, 4, 5, 3, generator=torch.Generator().manual_seed(1)).to(memory_format=layout)
    with torch.no_grad():
        plain = population.layers["0"].base_layer(x)
    y = perturbed(population, x, [0, 1, 4, 5])
    assert y.stride() == plain.stride()
    assert relative(y, plain) > 1e-2
    with pytest.raises(ValueError, match=r"0: expected x \[B, in, H, W\].* got"):
        perturbed(population, x[0], [0, 1, 4, 5])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [LORAS["all"], Direct(TARGETS)], ids=["lora", "direct"])
def test_half_precision(config, dtype):
    x, population = rows(8), trained(seeded(Mixed).to(dtype), config)
    assert {theta.dtype for theta in population.parameters().values()} == {torch.float32}
    half = perturbed(population, x.to(dtype))
    assert half.dtype == dtype
    wide = perturbed(trained(seeded(Mixed), config), x)
    assert relative(half, wide) < (3e-2 if dtype == torch.bfloat16 else 5e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative(perturbed(trained(seeded(Mixed), config), x), wide) < 3e-2


def test_gradients_of_the_input_flow():
    population, x = trained(seeded(Mixed), LORAS["all"]), rows(8).requires_grad_()
    with population.perturbed(step=4, members=torch.tensor(MEMBERS)):
        population.module(x).square().sum().backward()
    eps, direction = 1e-3, rows(8, 6).flip(0)
    up, down = (perturbed(population, x.detach() + s * eps * direction).double().square().sum() for s in (1, -1))
    assert float((x.grad * direction).sum()) == pytest.approx(float(up - down) / (2 * eps), rel=2e-2)


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("config", [LORAS["all"], Direct(TARGETS)], ids=["lora", "direct"])
def test_a_copy_of_a_layer_knows_its_kind(config, again):
    population = trained(seeded(Mixed), config)
    for layer in population.layers.values():
        assert again(layer).kind is layer.kind
    assert [layer.dense for layer in population.layers.values()] == [False, False, True]


def test_no_rows():
    population = trained(seeded(Mixed), LORAS["all"])
    assert perturbed(population, torch.zeros(0, 6, 6), []).shape == (0, 6, 7)


@pytest.mark.parametrize("config", [LORAS["all"], Direct(TARGETS)], ids=["lora", "direct"])
@pytest.mark.parametrize("layer", ["wide", "point"])
def test_a_weight_that_other_code_uses_is_an_error(config, layer):
    module = seeded(Mixed)
    population = trained(module, config)

    def run():
        with torch.no_grad(), population.perturbed(step=4, members=torch.tensor(MEMBERS)):
            weight = module.get_submodule(layer).weight
            assert weight.shape == Mixed().get_submodule(layer).weight.shape
            module(rows(8) + weight.sum())

    with pytest.raises(UnperturbedError) as caught:
        run()
    assert list(caught.value.layers) == [layer]


def test_gpt2():
    tokens = torch.randint(40, (4, 7), generator=torch.Generator().manual_seed(1))
    config = LoraConfig(r=2, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    population = trained(seeded(gpt2), config)
    assert len(population.layers) == 8
    members = [0, 1, 5, 2]
    with torch.no_grad(), population.perturbed(step=4, members=torch.tensor(members)):
        batch = population.module(tokens).logits
    peft = get_peft_model(seeded(gpt2), copy.deepcopy(config)).eval()
    for row, member in enumerate(members):
        set_peft_model_state_dict(peft, population.member_state_dict(step=4, member=member))
        with torch.no_grad():
            assert relative(batch[row], peft(tokens[row : row + 1]).logits[0]) < 1e-5


def test_fan_in_fan_out_without_a_conv1d_is_refused():
    module = seeded(Mixed)
    keys = list(module.state_dict())
    with pytest.raises(ValueError, match=r"config\.fan_in_fan_out"):
        esengine.attach(module, LoraConfig(r=2, target_modules=["last"], fan_in_fan_out=True))
    assert list(module.state_dict()) == keys
    config = LoraConfig(r=2, target_modules=["wide"])
    assert esengine.attach(module, config).config.fan_in_fan_out
    assert not config.fan_in_fan_out


# ---- quantised weights


class Int8(torch.Tensor):
    """A weight of int8 with one scale a row: a subclass that knows its product and shows a dtype of floating point.

    It stands for torchao's own where that is not installed.
    """

    @staticmethod
    def __new__(cls, levels, scale):
        return torch.Tensor._make_wrapper_subclass(cls, levels.shape, dtype=scale.dtype, device=levels.device)

    def __init__(self, levels, scale):
        self.levels, self.scale = levels, scale

    @classmethod
    def of(cls, weight):
        scale = weight.abs().amax(1) / 127
        return cls((weight / scale[:, None]).round().to(torch.int8), scale)

    def dequantize(self):
        return self.levels.to(self.scale.dtype) * self.scale[:, None]

    def __tensor_flatten__(self):
        return ["levels", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):
        return cls(inner["levels"], inner["scale"])

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.linear:
            x, weight, bias = (*args, kwargs.get("bias"))[:3]
            y = F.linear(x, weight.levels.to(x.dtype)) * weight.scale
            return y if bias is None else y + bias
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):
        weight, kwargs = args[0], kwargs or {}
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default, torch.ops.aten.alias.default):
            return cls(func(weight.levels), func(weight.scale))
        if func is torch.ops.aten._to_copy.default:
            device = kwargs.get("device")
            return cls(weight.levels.to(device), weight.scale.to(device, kwargs.get("dtype")))
        raise NotImplementedError(f"{func} of an int8 weight")


def quantise_(module):
    """Give every Linear of a module an `Int8` weight."""
    for each in module.modules():
        if isinstance(each, nn.Linear):
            each.weight = nn.Parameter(Int8.of(each.weight.detach()), requires_grad=False)
    return module


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32, bias=False)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


def torchao_(module):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(module, Int8WeightOnlyConfig())
    return module


def torchao_dynamic_(module):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(module, Int8DynamicActivationInt8WeightConfig())
    return module


absent = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
QUANTISERS = [
    quantise_,
    pytest.param(torchao_, marks=absent),
    pytest.param(torchao_dynamic_, marks=absent),
]
LORA = LoraConfig(r=2, lora_alpha=6, target_modules=["up", "down"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantise", QUANTISERS)
def test_quantised_linears_compute_as_they_are_and_the_low_rank_part_is_added(quantise, dtype, tmp_path):
    def build():
        return quantise(seeded(Two).to(dtype))

    module, x = build(), rows(8, 5, 32).to(dtype)
    with torch.no_grad():
        expected = module(x)
    population = trained(module, LORA)
    assert {theta.dtype for theta in population.parameters().values()} == {torch.float32}
    batch = perturbed(population, x)
    assert batch.dtype == dtype
    assert relative(batch, expected) > 2e-2
    population.save_pretrained(tmp_path)
    peft = PeftModel.from_pretrained(build(), tmp_path).eval()
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    if quantise is torchao_dynamic_:
        bound = 1e-2  # another last bit of an activation is another level of it
    with torch.no_grad():
        assert relative(population.module(x), peft(x)) < bound
        for row, member in enumerate(MEMBERS):
            set_peft_model_state_dict(peft, population.member_state_dict(step=4, member=member))
            assert relative(batch[row], peft(x[row : row + 1])[0]) < bound
        population.update(step=4, fitness=torch.tensor([1.0, -1, 2, -2]))
        assert population.detach() is module
        assert torch.equal(module(x), expected)


@pytest.mark.parametrize("quantise", QUANTISERS)
def test_a_quantised_weight_cannot_be_updated_or_merged(quantise):
    module = quantise(seeded(Two))
    before = [(name, id(each)) for name, each in module.named_modules()]
    with pytest.raises(TypeError, match=r"'up'.*quantised"):
        esengine.attach(module, Direct(["up", "down"]))
    assert [(name, id(each)) for name, each in module.named_modules()] == before
    population = trained(module, LORA)
    with pytest.raises(RuntimeError, match="'up' is quantised"):
        module.up.merge()
    perturbed(population, rows(8, 5, 32))


@pytest.mark.parametrize("quantise", QUANTISERS)
def test_a_quantised_weight_is_watched(quantise):
    module = quantise(seeded(Two))
    population, x = trained(module, LORA), rows(8, 5, 32)

    def run(use):
        with torch.no_grad(), population.perturbed(step=4, members=torch.tensor(MEMBERS)):
            return module(use(module.up.weight))

    looked = run(lambda w: x.to(w.dtype).to(w.device).view(-1, 5, w.shape[1]) + 0 * w.size(0))
    assert torch.equal(looked, perturbed(population, x))
    for use in (lambda w: x + F.linear(x, w).sum(), lambda w: x + F.linear(x, w.data).sum()):
        with pytest.raises(UnperturbedError, match="'up'"):
            run(use)


def test_a_quantised_linear_moves_with_its_module():
    population, x = trained(quantise_(seeded(Two)), LORA), rows(8, 5, 32)
    before = perturbed(population, x)
    population.module.to(torch.bfloat16)
    assert isinstance(population.module.up.base_layer.weight, Int8)
    assert {theta.dtype for theta in population.parameters().values()} == {torch.float32}
    assert relative(perturbed(population, x.bfloat16()), before) < 2e-2
