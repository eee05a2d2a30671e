import json

import pytest
import torch
from diffusers import SanaSprintPipeline
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from esengine.base.errors import ConfigError
from esengine.models import WEIGHT_NAME, SanaSprint, write_diffusers_lora

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "linear_1", "linear_2", "proj_out", "linear"]
RANKS = {"proj_out": 3, "to_q": 1, "time_embed.linear": 5}
ALPHAS = {"to_k": 32, "proj_out": 1}


@pytest.fixture
def adapter(pipeline, tiny_folder):
    """PEFT's own adapter with random weights: its transformer, state and scaling of each module."""
    transformer = SanaSprintPipeline.from_pretrained(tiny_folder, text_encoder=None, tokenizer=None).transformer
    config = LoraConfig(r=2, lora_alpha=8, target_modules=TARGETS, rank_pattern=RANKS, alpha_pattern=ALPHAS)
    inject_adapter_in_model(config, transformer)
    generator = torch.Generator().manual_seed(0)
    state = {
        key: 0.1 * torch.randn(value.shape, generator=generator)
        for key, value in get_peft_model_state_dict(transformer).items()
    }
    set_peft_model_state_dict(transformer, state)
    layers = {name: module for name, module in transformer.named_modules() if len(getattr(module, "lora_A", ()))}
    return transformer, state, {name: layer.scaling["default"] for name, layer in layers.items()}


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 8, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(2, 5, 64, generator=generator),
        "timestep": torch.tensor([1.0, 0.5]),
        "guidance": torch.tensor([0.45, 0.45]),
        "encoder_attention_mask": torch.ones(2, 5, dtype=torch.int64),
    }


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@torch.no_grad()
def test_the_pipeline_loads_what_peft_meant(fresh_model, adapter, inputs, tmp_path):
    transformer, state, scaling = adapter
    assert len({scaling[name] for name in scaling}) >= 4
    write_diffusers_lora(tmp_path, state, scaling)
    base = fresh_model.transformer(**inputs).sample
    fresh_model.load_adapter(tmp_path)
    expected = transformer(**inputs).sample
    assert relative(fresh_model.transformer(**inputs).sample, expected) < 1e-5
    assert relative(base, expected) > 0.05

    loaded = {n: m for n, m in fresh_model.transformer.named_modules() if len(getattr(m, "lora_A", ()))}
    assert set(loaded) == set(scaling)
    assert all(layer.scaling == {"default_0": 1.0} for layer in loaded.values())
    assert not any(p.requires_grad for p in fresh_model.transformer.parameters())

    fresh_model.adapter_enabled(False)
    assert torch.equal(fresh_model.transformer(**inputs).sample, base)
    fresh_model.adapter_enabled(True)
    assert relative(fresh_model.transformer(**inputs).sample, expected) < 1e-5
    fresh_model.load_adapter(tmp_path)
    assert relative(fresh_model.transformer(**inputs).sample, expected) < 1e-5


@torch.no_grad()
def test_a_loader_that_ignores_metadata_is_right_too(adapter, inputs, tmp_path, tiny_folder):
    transformer, state, scaling = adapter
    file = write_diffusers_lora(tmp_path, state, scaling)
    with safe_open(file, framework="pt") as opened:
        weights = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    pipeline = SanaSprintPipeline.from_pretrained(tiny_folder, text_encoder=None, tokenizer=None)
    pipeline.load_lora_weights(weights)
    assert relative(pipeline.transformer(**inputs).sample, transformer(**inputs).sample) < 1e-5


def test_metadata_names_every_module_in_full(adapter, tmp_path):
    _, state, scaling = adapter
    with safe_open(write_diffusers_lora(tmp_path, state, scaling), framework="pt") as opened:
        metadata = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert metadata["transformer.r"] == metadata["transformer.lora_alpha"] == 2
    assert metadata["transformer.rank_pattern"] == metadata["transformer.alpha_pattern"]
    assert metadata["transformer.rank_pattern"]["^proj_out"] == 3
    assert metadata["transformer.target_modules"] == sorted(scaling)
    assert [file.name for file in tmp_path.iterdir()] == [WEIGHT_NAME]


def test_wrong_states_are_refused(tmp_path):
    a, b = torch.zeros(2, 4), torch.zeros(3, 2)
    good = {"m.lora_A.weight": a, "m.lora_B.weight": b}
    for state, scaling, message in [
        ({"m.lora_A.weight": a}, {"m": 1.0}, "state: expected"),
        ({**good, "other": a}, {"m": 1.0}, "state: expected"),
        ({}, {}, "state: expected"),
        (good, {}, "scaling: expected a value for each module"),
        ({**good, "m.lora_B.weight": torch.zeros(3, 1)}, {"m": 1.0}, r"expected A \[r, in\] and B \[out, r\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            write_diffusers_lora(tmp_path, state, scaling)
    assert not list(tmp_path.iterdir())


def test_adapters_that_do_not_load(fresh_model, adapter, tmp_path):
    transformer, _, _ = adapter
    with pytest.raises(ConfigError, match="does not exist"):
        fresh_model.load_adapter(tmp_path)
    with pytest.raises(ValueError, match="expected an adapter loaded"):
        fresh_model.adapter_enabled(True)
    (tmp_path / WEIGHT_NAME).write_bytes(b"not safetensors")
    with pytest.raises(ConfigError, match="cannot load"):
        fresh_model.load_adapter(tmp_path)
    transformer.save_lora_adapter(tmp_path, weight_name=WEIGHT_NAME)  # lacks the "transformer." prefix
    with pytest.raises(ConfigError, match=r"expected pairs transformer\.<layer>\.lora_A\.weight and lora_B"):
        fresh_model.load_adapter(tmp_path)
    elsewhere = {"transformer_blocks.9.attn1.to_q": (2, 128, 128), "proj_out": (2, 128, 8)}
    state = {}
    for name, (rank, wide, high) in elsewhere.items():
        state[f"{name}.lora_A.weight"] = torch.zeros(rank, wide)
        state[f"{name}.lora_B.weight"] = torch.zeros(high, rank)
    write_diffusers_lora(tmp_path, state, dict.fromkeys(elsewhere, 1.0))
    with pytest.raises(ConfigError, match=r"the model has no layer transformer_blocks\.9\.attn1\.to_q"):
        fresh_model.load_adapter(tmp_path)


Q = "transformer.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def hostile_model(tiny_folder):
    """One that refused adapters leave as it was."""
    return SanaSprint.from_pretrained(tiny_folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({f"{Q}.lora_A.weight": None}, r"to_q\.lora_A\.weight is missing"),
        ({f"{Q}.lora_B.weight": None}, r"to_q\.lora_B\.weight is missing"),
        ({f"{Q}.lora_magnitude_vector": torch.ones(128)}, "lora_magnitude_vector is in it"),
        ({f"{Q}.alpha": torch.ones(())}, r"to_q\.alpha is in it"),
        (
            {f"{Q}.lora_A.weight": torch.zeros(2, 127)},
            r"to_q: expected A and B of a weight \[128, 128\], got A \[2, 127\]",
        ),
        ({f"{Q}.lora_B.weight": torch.zeros(128, 3)}, r"got A \[2, 128\] and B \[128, 3\]"),
        ({f"{Q}.lora_A.weight": torch.zeros(0, 128), f"{Q}.lora_B.weight": torch.zeros(128, 0)}, r"got A \[0, 128\]"),
        ({f"{Q}.lora_A.weight": torch.full((2, 128), torch.nan)}, "to_q: expected finite"),
        ({f"{Q}.lora_B.weight": torch.zeros(128, 2, dtype=torch.int64)}, "to_q: expected finite"),
        ({f"{Q}.lora_A.weight": None, f"{Q}.lora_B.weight": None}, "but no tensor at all is in it"),
    ],
)
def test_an_adapter_that_is_not_whole_is_refused(hostile_model, tmp_path, change, words):
    tensors = {f"{Q}.lora_A.weight": torch.zeros(2, 128), f"{Q}.lora_B.weight": torch.zeros(128, 2)} | change
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, tmp_path / WEIGHT_NAME)
    with pytest.raises(ConfigError, match=words):
        hostile_model.load_adapter(tmp_path)
    assert not hasattr(hostile_model.transformer.transformer_blocks[0].attn1.to_q, "lora_A")


@pytest.mark.parametrize(
    "metadata",
    [
        {"rank_pattern": {"(": 3}},
        {"rank_pattern": {"(a+)+$": 2}},
        {"rank_pattern": {"\\": 2}},
        {"rank_pattern": {"to_q": 10**12}},
        {"rank_pattern": {"to_q": 0}},
        {"rank_pattern": [2]},
        {"rank_pattern": 7},
        {"alpha_pattern": {"to_q": "x"}},
        {"alpha_pattern": {"to_q": float("nan")}},
        {"r": 10**12},
        {"r": "x"},
        {"r": True},
        {"r": None},
        {"lora_alpha": float("inf")},
        {"lora_alpha": 10**400},
        {"alpha_pattern": {"to_q": -(10**400)}},
        {"target_modules": "(a|a)*b"},
        {"target_modules": [["to_q"]]},
        {"exclude_modules": ["("]},
        {"layers_pattern": "("},
        {"init_lora_weights": "pissa"},
        {"use_dora": True},
        {"layer_replication": [[0, 2]]},
        {"modules_to_save": ["proj_out"]},
        {"__class__": "x"},
    ],
)
def test_metadata_that_says_more_than_rank_and_scale_is_refused(hostile_model, tmp_path, metadata):
    file = write_diffusers_lora(
        tmp_path,
        {f"{Q[12:]}.lora_A.weight": torch.zeros(2, 128), f"{Q[12:]}.lora_B.weight": torch.zeros(128, 2)},
        {Q[12:]: 1.0},
    )
    fine = {"transformer.r": 2, "transformer.lora_alpha": 2}
    given = fine | {f"transformer.{name}": value for name, value in metadata.items()}
    tensors = load_file(file)
    save_file(tensors, file, metadata={"lora_adapter_metadata": json.dumps(given)})
    with pytest.raises(ConfigError, match=f"metadata: {next(iter(metadata))}"):
        hostile_model.load_adapter(tmp_path)


@pytest.mark.parametrize("packed", ["{", "[]", "[" * 20000, '"x"', "{}"])
def test_metadata_that_is_no_mapping_is_refused(hostile_model, tmp_path, packed):
    tensors = {f"{Q}.lora_A.weight": torch.zeros(2, 128), f"{Q}.lora_B.weight": torch.zeros(128, 2)}
    save_file(tensors, tmp_path / WEIGHT_NAME, metadata={"lora_adapter_metadata": packed})
    with pytest.raises(ConfigError, match="adapter: cannot load"):
        hostile_model.load_adapter(tmp_path)


def test_adapters_of_others_are_loaded(hostile_model, adapter, tmp_path):
    """As PEFT and diffusers write them: all of a LoraConfig in the metadata, or none."""
    transformer, state, _ = adapter
    tensors = {f"transformer.{name}": tensor.contiguous() for name, tensor in state.items()}
    save_file(tensors, tmp_path / WEIGHT_NAME)
    hostile_model.load_adapter(tmp_path)
    SanaSprintPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=state,
        transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
    )
    hostile_model.load_adapter(tmp_path)
    scaling = {n: m.scaling["default_0"] for n, m in hostile_model.transformer.named_modules() if hasattr(m, "scaling")}
    assert scaling == adapter[2]
    hostile_model.pipeline.unload_lora_weights()


@torch.no_grad()
def test_an_adapter_with_dropout_in_its_metadata_is_drawn_the_same_each_time(fresh_model, adapter, inputs, tmp_path):
    transformer, state, scaling = adapter
    file = write_diffusers_lora(tmp_path, state, scaling)
    with safe_open(file, framework="pt") as opened:
        metadata = json.loads(opened.metadata()["lora_adapter_metadata"])
    packed = json.dumps(metadata | {"transformer.lora_dropout": 0.5})
    save_file(load_file(file), file, metadata={"format": "pt", "lora_adapter_metadata": packed})
    fresh_model.load_adapter(tmp_path)
    assert not any(module.training for module in fresh_model.transformer.modules())
    first = fresh_model.transformer(**inputs).sample
    assert torch.equal(fresh_model.transformer(**inputs).sample, first)
    assert relative(first, transformer(**inputs).sample) < 1e-5
