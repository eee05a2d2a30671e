"""Adapters whose numbers are finite in the file, and not in the data type that they are used in."""

import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import esengine
from esengine.base.errors import ConfigError
from esengine.models import SanaSprint, write_diffusers_lora

DOUBLE = torch.float64
LAYER = "transformer_blocks.0.attn1.to_q"


@pytest.fixture
def diffusers_folder(fresh_model, tmp_path):
    out, inner = fresh_model.transformer.get_submodule(LAYER).weight.shape
    state = {f"{LAYER}.lora_A.weight": torch.ones(2, inner), f"{LAYER}.lora_B.weight": torch.ones(out, 2)}
    write_diffusers_lora(tmp_path / "diffusers", state, {LAYER: 1.0})
    return tmp_path / "diffusers"


@pytest.fixture
def peft_folder(fresh_model, tmp_path):
    made = get_peft_model(torch.nn.Sequential(torch.nn.Linear(3, 4)), LoraConfig(r=2, target_modules=["0"]))
    made.save_pretrained(tmp_path / "peft")
    return tmp_path / "peft"


def put(file, key, value, dtype):
    """Give one number of a tensor another value, in another data type."""
    tensors = load_file(file)
    tensors[key] = tensors[key].to(dtype)
    tensors[key][0, 0] = value
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("value", "dtype"), [(1e300, torch.float64), (-1e39, torch.float64), (math.inf, torch.float16)]
)
@pytest.mark.parametrize("side", "AB")
def test_a_model_refuses_them_by_the_tensors_name(fresh_model, diffusers_folder, value, dtype, side):
    key = f"transformer.{LAYER}.lora_{side}.weight"
    put(diffusers_folder / "pytorch_lora_weights.safetensors", key, value, dtype)
    with pytest.raises(ConfigError, match=f"finite.*{key}"):
        fresh_model.load_adapter(diffusers_folder)


def test_a_model_of_less_range_refuses_them_too(tiny_folder, diffusers_folder):
    put(diffusers_folder / "pytorch_lora_weights.safetensors", f"transformer.{LAYER}.lora_B.weight", 1e6, torch.float32)
    SanaSprint.from_pretrained(tiny_folder).load_adapter(diffusers_folder)
    model = SanaSprint.from_pretrained(tiny_folder, dtype=torch.float16)
    with pytest.raises(ConfigError, match=rf"float16.*{LAYER}"):
        model.load_adapter(diffusers_folder)
    assert not any("lora_" in name for name, _ in model.transformer.named_parameters())


@pytest.mark.parametrize(
    ("value", "dtype"), [(1e300, torch.float64), (-1e39, torch.float64), (math.nan, torch.float16)]
)
@pytest.mark.parametrize("side", "AB")
def test_a_population_refuses_them_by_the_tensors_name(peft_folder, value, dtype, side):
    put(peft_folder / "adapter_model.safetensors", f"base_model.model.0.lora_{side}.weight", value, dtype)
    population = esengine.attach(
        torch.nn.Sequential(torch.nn.Linear(3, 4)), LoraConfig(r=2, target_modules=["0"]), esengine.Noise(sigma=0.1)
    )
    with pytest.raises(ValueError, match=f"'0': expected finite.*lora_{side}"):
        population.load_lora(peft_folder)


def test_a_scale_that_takes_them_out_of_range_is_refused(peft_folder):
    put(peft_folder / "adapter_model.safetensors", "base_model.model.0.lora_B.weight", 1e30, torch.float32)
    config = peft_folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 1e30}))
    population = esengine.attach(
        torch.nn.Sequential(torch.nn.Linear(3, 4)), LoraConfig(r=2, target_modules=["0"]), esengine.Noise(sigma=0.1)
    )
    with pytest.raises(ValueError, match=r"finite.*scale"):
        population.load_lora(peft_folder)


@pytest.mark.parametrize("name", ["x\x1b[2J\x1b]0;t\x07", "a\u202eb", "c\x9b31m", "d\u2066e", "f\rg"])
def test_names_of_layers_lose_their_control_codes(fresh_model, diffusers_folder, peft_folder, name):
    file = diffusers_folder / "pytorch_lora_weights.safetensors"
    save_file({key.replace("to_q", name): each for key, each in load_file(file).items()}, file)
    with pytest.raises(ConfigError, match="has no layer") as caught:
        fresh_model.load_adapter(diffusers_folder)
    file = peft_folder / "adapter_model.safetensors"
    save_file({key.replace(".0.", f".{name}."): each for key, each in load_file(file).items()}, file)
    population = esengine.attach(
        torch.nn.Sequential(torch.nn.Linear(3, 4)), LoraConfig(r=2, target_modules=["0"]), esengine.Noise(sigma=0.1)
    )
    with pytest.raises(ValueError, match="is not a target") as other:
        population.load_lora(peft_folder)
    for text in (str(caught.value), str(other.value)):
        assert not set(text) & set("\x1b\x07\u202e\x9b\u2066\r")
