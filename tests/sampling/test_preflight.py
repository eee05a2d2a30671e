"""Rows of a batch that get another member's noise are found before the first step."""

import pytest
import torch
from peft import LoraConfig

import esengine
from esengine.base.errors import ConfigError
from esengine.models import RenderSettings, load
from esengine.sampling.preflight import preflight

PROMPTS = ["a red cat", "a blue bowl of soup"]


@pytest.fixture
def make(cache):
    def make(name, targets=None):
        model = load(name, device="cpu", dtype=torch.float32)
        lora = LoraConfig(r=2, lora_alpha=8, target_modules=list(targets or model.targets))
        population = esengine.attach(model.module, lora, esengine.Noise(sigma=0.01, seed=0))
        return model, model.encode(PROMPTS), model.resolve(RenderSettings()), population

    return make


@pytest.mark.parametrize("name", ["tiny", "tiny:z-image", "tiny:sd3", "tiny:sdxl"])
def test_rows_of_a_batch_are_their_own_members(make, name):
    found = preflight(*make(name), seed=0, most=8)
    assert found.layers
    assert max(found.layers.values()) <= 1e-3
    assert found.images.shape[:2] == (5, 3)
    assert [prompt == PROMPTS[0] for prompt in found.prompts] == [True, True, False, False, True]
    assert found.seconds > 0


MIXED = {
    "rows in another order": lambda x: x.flip(0),
    "rows that see each other": lambda x: x + x.mean(0, keepdim=True),
    "the next row's": lambda x: x.roll(1, 0),
}


@pytest.mark.parametrize("mix", MIXED.values(), ids=MIXED)
def test_a_module_that_mixes_rows_is_refused_by_the_first_layer_behind_it(make, mix):
    model, texts, settings, population = make("tiny:sd3", ("to_q", "to_k", "to_v"))
    model.module.transformer_blocks[0].register_forward_hook(lambda module, inputs, output: tuple(map(mix, output)))
    with pytest.raises(ConfigError) as caught:
        preflight(model, texts, settings, population, seed=0, most=8)
    assert caught.value.setting == "lora.targets"
    assert "transformer_blocks.1." in caught.value.problem


@pytest.mark.parametrize(("most", "images", "compared"), [(1, 1, False), (2, 2, True), (3, 3, True)])
def test_no_batch_is_larger_than_the_chunk(make, most, images, compared):
    found = preflight(*make("tiny"), seed=0, most=most)
    assert len(found.images) == images
    assert bool(found.layers) is compared


def test_where_memory_runs_out_fewer_rows_are_compared(make, monkeypatch):
    model, *others = make("tiny")
    render, sizes = model.render, []

    def full(texts, *, rows, **keys):
        sizes.append(rows.count)
        if rows.count > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return render(texts, rows=rows, **keys)

    monkeypatch.setattr(
        model, "render_chunks", lambda texts, chunks, **keys: (full(texts, rows=r, **keys) for r in chunks)
    )
    found = preflight(model, *others, seed=0, most=8)
    assert sizes == [5, 2, 2, 2]
    assert found.layers


def test_nothing_stays_behind(make):
    model, texts, settings, population = make("tiny:sd3")
    before = {name: tensor.clone() for name, tensor in population.parameters().items()}
    preflight(model, texts, settings, population, seed=0, most=8)
    assert all(torch.equal(tensor, before[name]) for name, tensor in population.parameters().items())
    assert not any(layer._forward_hooks for layer in population.layers.values())
