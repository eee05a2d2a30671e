"""A reward's cheaper decoder: it decodes as the pipeline itself would with this decoder, and nothing else changes."""

import copy
import dataclasses
import json

import diffusers
import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny

from esengine.base.errors import ConfigError
from esengine.models import FAMILIES, DiffusersPipeline, RenderSettings, Rows, load, require_pipeline
from esengine.models.families import TINY
from esengine.models.pipeline import row_generators
from esengine.models.reward_vae import latent_facts
from esengine.models.tiny_pipelines import SIZE, tiny_components, tiny_pipeline

PROMPTS = ["a red fox", "a cat"]
ROWS = Rows(None, torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]))
KEYS = dict(seed=3, step=7, rows=ROWS)
ONE = RenderSettings(num_steps=1, decode_chunk=2)


def small_decoder(channels: int, compression: int = 8, **changes) -> AutoencoderTiny:
    blocks = compression.bit_length()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        widths, counts = (8,) * blocks, (1,) * blocks
        return AutoencoderTiny(
            encoder_block_out_channels=widths,
            decoder_block_out_channels=widths,
            num_encoder_blocks=counts,
            num_decoder_blocks=counts,
            latent_channels=channels,
            **changes,
        ).eval()


@pytest.mark.parametrize(
    "name", [each for each in TINY if each != "sana-sprint" and FAMILIES[each].tiny_vae is not None]
)
def test_it_decodes_by_the_pipelines_own_conventions(name):
    pipe = tiny_components(name)
    plain = copy.deepcopy(pipe)
    plain.set_progress_bar_config(disable=True)
    model = DiffusersPipeline(pipe, dataclasses.replace(FAMILIES[name], size=SIZE))
    facts = latent_facts({"_class_name": type(pipe.vae).__name__, **pipe.vae.config})
    vae = small_decoder(facts["channels"], scaling_factor=0.7, shift_factor=0.2)
    texts, settings = model.encode(PROMPTS), model.resolve(ONE)
    before, _ = model.draw(texts, **KEYS, settings=settings)
    model.set_reward_vae(copy.deepcopy(vae), "mine")
    with model.reward_decoding():
        drawn, good = model.draw(texts, **KEYS, settings=settings)
    assert good.all()
    assert torch.equal(model.draw(texts, **KEYS, settings=settings)[0], before)
    plain.vae = vae
    given = {model.family.guidance_argument: settings.guidance_scale, **model.family.call}
    given = {key: value for key, value in given.items() if (key, value) != ("negative_prompt", None)}
    for row, draw in enumerate(row_generators(3, 7, ROWS)):
        prompt = PROMPTS[int(ROWS.prompts[row])]
        size = dict(height=SIZE, width=SIZE, num_inference_steps=1)
        alone = plain(prompt=prompt, generator=draw, output_type="pt", **size, **given).images[0]
        assert (drawn[row] - alone).abs().max() < 1e-4
        assert (drawn[row] - before[row]).abs().max() > 0.05


@pytest.mark.parametrize("kind", ["AutoencoderTiny", "AutoencoderDC"])
def test_it_decodes_a_sana_sprint(kind, tmp_path):
    plain = load("tiny")
    if kind == "AutoencoderTiny":
        facts = latent_facts({"_class_name": "AutoencoderDC", **plain.vae.config})
        small_decoder(**facts).save_pretrained(tmp_path)
    else:
        with torch.random.fork_rng(devices=[]):
            AutoencoderDC.from_config(plain.vae.config).save_pretrained(tmp_path)
    model = load("tiny", reward_vae=tmp_path)
    texts, settings = model.encode(PROMPTS), model.resolve(ONE)
    before = model.render(texts, **KEYS, settings=settings)
    with model.reward_decoding():
        (drawn,) = model.render_chunks(texts, [ROWS], seed=3, step=7, settings=settings)
        assert torch.equal(model.render(texts, **KEYS, settings=settings), drawn)
    assert torch.equal(model.render(texts, **KEYS, settings=settings), before)
    latents = model.denoise(texts, seed=3, step=7, prompts=ROWS.prompts, repeats=ROWS.repeats, settings=settings)
    vae = getattr(diffusers, kind).from_pretrained(tmp_path)
    with torch.no_grad():
        decoded = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
    expected = (model.pipeline.image_processor.postprocess(decoded, output_type="pt") * 255).round()
    assert (drawn - expected).abs().max() <= 1
    assert (drawn.float() - before.float()).abs().max() > 10


def test_an_untrained_one_is_always_the_same_and_named():
    for name in ("nano", "tiny:sd3"):
        one, two = (load(name, reward_vae="tiny") for _ in range(2))
        assert one.reward_vae_identity == two.reward_vae_identity
        state = two.reward_vae.state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in one.reward_vae.state_dict().items())
        assert not any(each.training for each in one.reward_vae.modules())
        assert not any(each.requires_grad for each in one.reward_vae.parameters())
        assert one.identity() == load(name).identity()


def test_without_one_nothing_changes():
    model = load("tiny:sd")
    texts = model.encode(PROMPTS)
    with model.reward_decoding():
        drawn = model.render(texts, **KEYS, settings=ONE)
    assert torch.equal(drawn, model.render(texts, **KEYS, settings=ONE))


def test_what_does_not_decode_the_latents_is_refused(tmp_path):
    own = load("tiny:sd3").pipeline.vae
    small_decoder(5).save_pretrained(tmp_path / "channels")
    small_decoder(4, 16).save_pretrained(tmp_path / "compression")
    AutoencoderKL.from_config({**own.config, "scaling_factor": 2.0}).save_pretrained(tmp_path / "scale")
    AutoencoderKL.from_config({**own.config, "shift_factor": 2.0}).save_pretrained(tmp_path / "shift")
    AutoencoderDC.from_config(load("tiny").vae.config).save_pretrained(tmp_path / "kind")
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.json").write_text(json.dumps([1]))
    (tmp_path / "empty").mkdir()
    (tmp_path / "less").mkdir()
    (tmp_path / "less" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderTiny"}))
    for folder, word in (
        ("channels", "channels 4"),
        ("compression", "compression 8"),
        ("scale", "scaling factor 1.5"),
        ("shift", "shift factor 0.06"),
        ("kind", "expected AutoencoderKL or AutoencoderTiny"),
        ("list", "mapping"),
        ("empty", "config.json"),
        ("less", "upsampling_scaling_factor"),
    ):
        with pytest.raises(ConfigError, match=f"reward_vae: cannot use .*{folder}") as caught:
            require_pipeline("tiny:sd3", None, reward_vae=str(tmp_path / folder))
        assert word in str(caught.value)
    for name, model, word in (
        ("./none", "tiny:sd3", "neither tiny, nor a folder, nor a hub id"),
        ("tiny", "tiny:flux2-klein", "Flux2KleinPipeline cannot decode by an AutoencoderTiny"),
        ("tiny", "tiny:qwen-image", "QwenImagePipeline cannot decode by an AutoencoderTiny"),
        ("tiny", str(tiny_pipeline("sana")), "no AutoencoderTiny of sana is known"),
    ):
        with pytest.raises(ConfigError, match="reward_vae") as caught:
            require_pipeline(model, None, reward_vae=name)
        assert word in str(caught.value)
    small_decoder(4).save_pretrained(tmp_path / "damaged")
    (tmp_path / "damaged" / "diffusion_pytorch_model.safetensors").write_bytes(b"no")
    with pytest.raises(ConfigError, match="reward_vae: cannot use"):
        load("tiny:sd3", reward_vae=tmp_path / "damaged")
