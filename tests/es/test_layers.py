"""The drop-in layer: what it takes, what it refuses, and what `strip` puts back."""

from collections import OrderedDict

import pytest
import torch
from peft import LoraConfig
from torch import nn

import esengine
from esengine.es.layers import ADAPTER, PopulationLinear, check_config, make_layer, strip
from esengine.kernels import Lora, MemberNoise, linear_streams, population_linear_ref, stream_table


def two_layers():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        rest = nn.Sequential(OrderedDict(act=nn.Tanh(), last=nn.Linear(8, 4, bias=False)))
        return nn.Sequential(OrderedDict(first=nn.Linear(6, 8), rest=rest))


def attached(**changes):
    module = two_layers()
    config = LoraConfig(**({"r": 2, "lora_alpha": 6, "target_modules": ["first", "rest.last"]} | changes))
    population = esengine.attach(module, config, esengine.Noise(sigma=0.1, rank=2, seed=3))
    generator = torch.Generator().manual_seed(1)
    for parameter in population.parameters().values():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return population


def test_a_layer_computes_the_reference():
    population = attached()
    members, x = torch.tensor([4, 1, 9]), torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(2))
    layer = population.layers["first"]
    with torch.no_grad(), population.perturbed(step=6, members=members):
        y = layer(x)
    base = layer.base_layer
    target = Lora(layer.a, layer.b, 3.0, stream_table((linear_streams("first"),), x.device))
    expected = population_linear_ref(x, base.weight, base.bias, target, MemberNoise(members, 3, 6, 0.1, 2))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(layer(x), expected, atol=0.1)


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({}, 3.0),
        ({"use_rslora": True}, 6 / 2**0.5),
        ({"alpha_pattern": {"first": 1}}, 0.5),
        ({"rank_pattern": {"first": 4}}, 1.5),
    ],
)
def test_scale_is_pefts(changes, scale):
    assert attached(**changes).layers["first"].scale == pytest.approx(scale)


def test_factors_are_named_after_the_layer():
    population = attached()
    assert list(population.layers) == ["first", "rest.last"]
    assert population.layers["rest.last"].name == "rest.last"
    assert population.layers["rest.last"].streams == linear_streams("rest.last")
    assert list(population.parameters()) == [
        "first.lora_A.weight", "first.lora_B.weight", "rest.last.lora_A.weight", "rest.last.lora_B.weight",
    ]  # fmt: skip
    shapes = [tuple(p.shape) for p in population.parameters().values()]
    assert shapes == [(2, 6), (8, 2), (2, 8), (4, 2)]


def test_adapters_switched_off_inside_perturbed_are_off():
    population = attached()
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        plain = two_layers()(x)
        with population.perturbed(step=0, members=torch.tensor([0, 1])):
            for layer in population.layers.values():
                layer.enable_adapters(False)
            assert torch.equal(population.module(x), plain)
            for layer in population.layers.values():
                layer.enable_adapters(True)
            assert not torch.allclose(population.module(x), plain)


def test_a_layer_without_a_population_is_pefts():
    linear = nn.Linear(3, 4)
    layer = make_layer(PopulationLinear, linear, ADAPTER, config=LoraConfig(r=2, lora_alpha=4), r=2, lora_alpha=4)
    assert isinstance(layer, PopulationLinear)
    assert layer.base_layer is linear
    x = torch.ones(2, 3)
    assert torch.equal(layer(x), linear(x))  # B starts at nought


class Odd(nn.Linear):
    """A subclass with a forward of its own: its result is not x W^T + bias."""

    def forward(self, x):
        return 2 * super().forward(x)


class Plain(nn.Linear):
    """A subclass that computes what nn.Linear does."""


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        (nn.Conv2d(2, 2, 3), "Conv2d"),
        (nn.Embedding(3, 2), "Embedding"),
        (nn.Bilinear(2, 2, 2), "Bilinear"),
        (Odd(2, 2), "Odd"),
        (nn.MultiheadAttention(4, 1).out_proj, "NonDynamicallyQuantizableLinear"),
    ],
)
def test_other_layers_are_refused_by_name(target, kind):
    with pytest.raises(TypeError, match=rf"target_modules: expected a dense torch.nn.Linear at 'x.y', got {kind}"):
        make_layer(PopulationLinear, target, ADAPTER, target_name="x.y")


def test_quantised_weights_are_refused():
    linear = nn.Linear(2, 2)
    linear.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="expected a dense"):
        make_layer(PopulationLinear, linear, ADAPTER, target_name="x")


def test_a_subclass_with_the_same_forward_is_taken():
    config = LoraConfig(r=2)
    assert isinstance(
        make_layer(PopulationLinear, Plain(2, 2), ADAPTER, config=config, r=2, lora_alpha=2), PopulationLinear
    )


def test_strip_puts_the_same_objects_back():
    module = two_layers()
    first, last = module.first, module.rest.last
    module.first.bias.requires_grad_(False)
    trainable = {name: p.requires_grad for name, p in module.named_parameters()}
    population = esengine.attach(module, LoraConfig(r=1, target_modules=["first", "rest.last"]))
    assert module.first is not first
    strip(module, trainable)
    assert module.first is first
    assert module.rest.last is last
    assert {name: p.requires_grad for name, p in module.named_parameters()} == trainable
    assert not hasattr(module, "peft_config")
    strip(module, trainable)  # nothing left to do
    assert population.layers


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lora_dropout", 0.1),
        ("bias", "lora_only"),
        ("use_dora", True),
        ("lora_bias", True),
        ("fan_in_fan_out", True),
        ("modules_to_save", ["head"]),
        ("target_parameters", ["0.weight"]),
        ("init_lora_weights", "olora"),
    ],
)
def test_options_that_es_cannot_honour(name, value):
    with pytest.raises(ValueError, match=rf"config.{name}: expected .*, got {value!r}".replace("[", r"\[")):
        check_config(LoraConfig(r=2, **{name: value}))


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_options_that_are_taken(init):
    check_config(LoraConfig(r=2, init_lora_weights=init, use_rslora=True, modules_to_save=None, target_modules=["0"]))


def test_shared_input_is_left_alone():
    """q, k and v read one x: the in-place sum is into the layer's own output."""
    population = attached()
    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(2))
    before = x.clone()
    with torch.no_grad(), population.perturbed(step=0, members=torch.tensor([0, 3])):
        one, two = population.layers["first"](x), population.layers["first"](x)
    assert torch.equal(x, before)
    assert torch.equal(one, two)
    assert one.data_ptr() != two.data_ptr()
