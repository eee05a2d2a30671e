import pytest
import torch
from diffusers import SanaSprintPipeline
from peft import LoraConfig

import esengine
from esengine.models import RenderSettings, latents, write_diffusers_lora

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "linear_1", "linear_2", "proj_out", "linear"]
KEYS = {"seed": 3, "step": 11}


@pytest.mark.parametrize(
    "settings",
    [RenderSettings(), RenderSettings(x0_angle=1.3), RenderSettings(num_steps=2)],
    ids=["one step", "angle 1.3", "two steps"],
)
def test_a_member_renders_what_diffusers_renders_from_its_file(fresh_model, texts, tiny_folder, tmp_path, settings):
    config = LoraConfig(r=2, lora_alpha=8, target_modules=TARGETS, rank_pattern={"proj_out": 4})
    population = esengine.attach(fresh_model.transformer, config, esengine.Noise(sigma=3e-2, rank=2, seed=5))
    population.update(step=0, fitness=torch.linspace(-30, 30, 8))
    prompts, repeats, members = torch.tensor([0, 1, 2, 0]), torch.tensor([0, 0, 1, 0]), torch.tensor([6, 1, 7, 0])
    rows = {**KEYS, "prompts": prompts, "repeats": repeats, "settings": settings}
    batch = fresh_model.denoise(texts, **rows, members=members, population=population)
    still = fresh_model.denoise(texts, **rows)
    assert not torch.equal(batch, still)

    for row, member in enumerate(members.tolist()):
        state = population.member_state_dict(step=KEYS["step"], member=member)
        state = {key.removeprefix("base_model.model."): value for key, value in state.items()}
        modules = {key.rsplit(".lora_", 1)[0] for key in state}
        scaling = {module: 8 / (4 if module == "proj_out" else 2) for module in modules}
        write_diffusers_lora(tmp_path, state, scaling)
        alone = type(fresh_model).from_pretrained(tiny_folder)
        alone.load_adapter(tmp_path)
        one = {**rows, "prompts": prompts[row : row + 1], "repeats": repeats[row : row + 1]}
        expected = alone.denoise(texts, **one, text_length=texts.trimmed_length(prompts))[0]
        assert (batch[row] - expected).norm() / expected.norm() < 1e-5


def test_the_updated_adapter_in_plain_diffusers(fresh_model, texts, tiny_folder, tmp_path):
    config = LoraConfig(r=2, lora_alpha=8, target_modules=TARGETS)
    population = esengine.attach(fresh_model.transformer, config, esengine.Noise(sigma=3e-2, seed=5))
    population.update(step=0, fitness=torch.linspace(-30, 30, 8))
    state = {key.removeprefix("base_model.model."): value for key, value in population.parameters().items()}
    write_diffusers_lora(tmp_path, state, dict.fromkeys({key.rsplit(".lora_", 1)[0] for key in state}, 4.0))

    pipeline = SanaSprintPipeline.from_pretrained(tiny_folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors", use_safetensors=True)
    rows = {**KEYS, "prompts": torch.tensor([0]), "repeats": torch.tensor([0])}
    expected = pipeline(
        texts.prompts[0],
        num_inference_steps=1,
        intermediate_timesteps=None,
        latents=latents(**rows, shape=(8, 8, 8)),
        height=64,
        width=64,
        use_resolution_binning=False,
        output_type="latent",
    ).images
    ours = fresh_model.denoise(texts, **rows, settings=RenderSettings())
    population.detach()
    base = fresh_model.denoise(texts, **rows, settings=RenderSettings())
    assert (ours - base).norm() / base.norm() > 0.01
    assert (ours - expected).norm() / expected.norm() < 1e-5
