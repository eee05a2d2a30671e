import pytest
import torch
from peft import LoraConfig
from suite import pickscore, standin

import esengine
from esengine.es.prompts import PromptSampler
from esengine.models import RenderSettings


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_full_size_counts_are_the_published_ones():
    transformer = standin.transformer(device="meta")
    vae = standin.autoencoder(device="meta")
    clip = standin.clip(device="meta")
    assert parameters(transformer) == 1_610_237_472
    assert parameters(vae) == 312_250_275
    assert parameters(vae.decoder) == 159_223_171
    assert parameters(clip) == 986_109_441
    assert all(p.is_meta for module in (transformer, vae, clip) for p in module.parameters())


def test_lite_decodes_the_same_latents_by_another_decoder():
    own, lite = standin.autoencoder(device="meta"), standin.autoencoder(lite=True, device="meta")
    assert parameters(lite.encoder) == parameters(own.encoder)
    assert parameters(lite.decoder) == 268_154_124
    for name in ("latent_channels", "scaling_factor", "encoder_block_out_channels"):
        assert lite.config[name] == own.config[name]
    latent = torch.randn(1, 32, 4, 4, device="meta")
    assert lite.decode(latent).sample.shape == own.decode(latent).sample.shape == (1, 3, 128, 128)
    tiny = standin.autoencoder("tiny", lite=True)
    latents = torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    pixels = tiny.decode(latents / tiny.config.scaling_factor).sample
    assert pixels.shape == standin.autoencoder("tiny").decode(latents).sample.shape
    assert 0.2 < pixels.std() < 0.9


def test_full_size_shapes_are_those_of_the_kernels():
    block = standin.transformer(device="meta").transformer_blocks[0]
    assert block.attn1.to_q.weight.shape == (2240, 2240)
    assert block.ff.conv_depth.weight.shape == (11200, 1, 3, 3)
    assert standin.transformer(device="meta").time_embed.linear.weight.shape == (13440, 2240)
    assert standin.transformer(device="meta").caption_projection.linear_1.weight.shape == (2240, 2304)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiny_renders_scores_and_trains(dtype):
    model = standin.sana_sprint("tiny", dtype=dtype)
    assert {p.dtype for m in (model.transformer, model.vae) for p in m.parameters()} == {dtype}
    assert not any(p.requires_grad for m in (model.transformer, model.vae) for p in m.parameters())
    assert model.identity() == "stand-in-tiny@seed-0"
    texts = standin.text_embeddings("tiny", prompts=5, dtype=dtype)
    assert texts.lengths.tolist() == [40, 39, 38, 37, 40]
    scorer = pickscore.Scorer(standin.clip("tiny", dtype=dtype), texts.prompts)
    population = esengine.attach(model.transformer, LoraConfig(r=2, target_modules=["to_q", "linear"]))
    engine = esengine.Engine(population, PromptSampler(5, 2, seed=0), size=4)
    task = engine.ask()
    members, prompts, repeats = task.rows()
    settings = RenderSettings(height=64, width=64)
    rows = dict(seed=0, step=0, prompts=prompts, repeats=repeats, members=members)
    images = model.render(texts, **rows, population=population, settings=settings)
    assert images.shape == (8, 3, 64, 64)
    assert 30 < images.float().std() < 100
    scores = scorer(images, [texts.prompts[i] for i in prompts])
    assert scores.dtype == torch.float32
    assert scores.std() > 0
    assert engine.tell(task, scores)["step_norm"] > 0


def test_weights_follow_the_seed_alone():
    state = torch.random.get_rng_state()
    first, again, other = (standin.transformer("tiny", seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_default_dtype() == torch.float32
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["proj_out.weight"], other["proj_out.weight"])


def test_score_is_the_formula_one_image_at_a_time():
    clip = standin.clip("tiny")
    scorer = pickscore.Scorer(clip, ["a", "b"], chunk=2)
    images = torch.randint(0, 256, (5, 3, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    prompts = ["a", "b", "b", "a", "b"]
    together = scorer(images, prompts)
    alone = torch.cat([scorer(images[i : i + 1], prompts[i : i + 1]) for i in range(5)])
    assert torch.allclose(together, alone, atol=1e-5)
    assert together.abs().max() <= clip.logit_scale.exp() * 1.0001
    assert not torch.allclose(scorer(images[:1], ["a"]), scorer(images[:1], ["b"]))


def test_what_is_wrong_is_named():
    with pytest.raises(ValueError, match="scale: expected one of full, tiny, got 'huge'"):
        standin.sana_sprint("huge")
    with pytest.raises(ValueError, match="prompts, tokens"):
        standin.text_embeddings("tiny", tokens=3)
