import json
import math
import shutil

import diffusers.schedulers.scheduling_scm as scm
import pytest
import torch

from esengine.base.errors import ConfigError
from esengine.models import RenderSettings, SanaSprint, latents

SHAPE = (8, 8, 8)
SEED, STEP = 7, 3


def diffusers_call(pipeline, texts, rows, monkeypatch, *, output_type, dtype=None, **kwargs):
    """`SanaSprintPipeline.__call__` itself, with our latents and our noise in place of its own."""
    prompts, repeats = rows
    draws = [
        latents(seed=SEED, step=STEP, prompts=prompts, repeats=repeats, shape=SHAPE, draw=draw) for draw in range(4)
    ]
    feed = iter(draws[1:])
    monkeypatch.setattr(scm, "randn_tensor", lambda *args, **kwargs: next(feed))
    embeds, mask = texts.batch(prompts, dtype=dtype)
    return pipeline(
        prompt_embeds=embeds,
        prompt_attention_mask=mask,
        latents=draws[0],
        height=64,
        width=64,
        use_resolution_binning=False,
        output_type=output_type,
        **kwargs,
    ).images


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_images_equal_the_pipelines_own(model, pipeline, texts, rows, monkeypatch, steps):
    kwargs = {"num_inference_steps": steps, "intermediate_timesteps": 1.3 if steps == 2 else None}
    keys = {"seed": SEED, "step": STEP, "prompts": rows[0], "repeats": rows[1]}
    settings = RenderSettings(num_steps=steps)

    expected = diffusers_call(pipeline, texts, rows, monkeypatch, output_type="latent", **kwargs)
    torch.testing.assert_close(model.denoise(texts, **keys, settings=settings), expected, rtol=0, atol=0)

    pictures = diffusers_call(pipeline, texts, rows, monkeypatch, output_type="np", **kwargs)
    expected = torch.from_numpy((pictures * 255).round().astype("uint8")).permute(0, 3, 1, 2)
    images = model.render(texts, **keys, settings=settings)
    assert images.dtype == torch.uint8
    assert torch.equal(images, expected)


def test_bf16_equals_the_pipelines_own(tiny_folder, texts, rows, monkeypatch):
    model = SanaSprint.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    half = model.encode(texts.prompts)
    model.pipeline.set_progress_bar_config(disable=True)
    expected = diffusers_call(model.pipeline, half, rows, monkeypatch, output_type="latent", num_inference_steps=2)
    keys = {"seed": SEED, "step": STEP, "prompts": rows[0], "repeats": rows[1]}
    assert half.dtype == torch.bfloat16
    assert torch.equal(model.denoise(half, **keys, settings=RenderSettings(num_steps=2)), expected)


def test_pil_output_is_reproduced(model, pipeline, texts, rows):
    x0 = latents(seed=0, step=0, prompts=rows[0], repeats=rows[1], shape=SHAPE)
    with torch.no_grad():
        decoded = pipeline.vae.decode(x0 / pipeline.vae.config.scaling_factor).sample
    pictures = pipeline.image_processor.postprocess(decoded, output_type="pil")
    ours = model.decode(x0, chunk=8).permute(0, 2, 3, 1)
    assert all(picture.tobytes() == image.numpy().tobytes() for picture, image in zip(pictures, ours, strict=True))


@pytest.mark.parametrize("instruction", [True, False])
def test_encode_equals_the_pipelines_own(model, pipeline, instruction):
    prompts = ["A Fox, at sunset", "two"]
    texts = model.encode(prompts, instruction=instruction)
    calls = []
    encode_prompt = pipeline.encode_prompt
    pipeline.encode_prompt = lambda *args, **kwargs: calls.append(encode_prompt(*args, **kwargs)) or calls[-1]
    try:
        kwargs = {} if instruction else {"complex_human_instruction": None}
        pipeline(prompts, height=64, width=64, use_resolution_binning=False, output_type="latent", **kwargs)
    finally:
        del pipeline.encode_prompt
    embeds, mask = calls[0]
    assert embeds.shape[1] == 300
    for row, length in enumerate(mask.sum(1).tolist()):
        assert texts[row].shape[0] == length
        torch.testing.assert_close(texts[row], embeds[row, :length], rtol=1e-5, atol=1e-5)


def test_x0_angle_changes_only_where_x0_is_read(model, texts, rows):
    keys = {"seed": SEED, "step": STEP, "prompts": rows[0], "repeats": rows[1]}
    noise = latents(**keys, shape=SHAPE) * 0.5
    plain = model.denoise(texts, **keys, settings=RenderSettings()) * 0.5
    angle = torch.tensor(1.57080)
    velocity = (torch.cos(angle) * noise - plain) / torch.sin(angle)

    turned = model.denoise(texts, **keys, settings=RenderSettings(x0_angle=1.3))
    expected = (0.26749882862 * noise - 0.96355818541 * velocity) / 0.5
    torch.testing.assert_close(turned, expected, rtol=1e-5, atol=1e-6)
    assert (turned - plain / 0.5).abs().max() > 0.1


def test_trimmed_text_equals_all_padded_tokens(model, texts, rows):
    keys = {"seed": SEED, "step": STEP, "prompts": rows[0], "repeats": rows[1], "settings": RenderSettings(num_steps=2)}
    trimmed = model.denoise(texts, **keys)
    padded = model.denoise(texts, **keys, text_length=300)
    assert (trimmed - padded).norm() / padded.norm() < 1e-5


def test_a_mixed_batch_equals_its_rows_alone(model, texts, rows):
    prompts, repeats = rows
    kwargs = {"seed": SEED, "step": STEP, "text_length": texts.trimmed_length(prompts)}
    settings = RenderSettings(num_steps=2, decode_chunk=2)
    x0 = model.denoise(texts, prompts=prompts, repeats=repeats, settings=settings, **kwargs)
    images = model.render(texts, prompts=prompts, repeats=repeats, settings=settings, **kwargs)
    for row in range(len(prompts)):
        one = {"prompts": prompts[row : row + 1], "repeats": repeats[row : row + 1], "settings": settings, **kwargs}
        alone = model.denoise(texts, **one)
        # fp32: another batch size sums the matrix products in another order, no more
        assert (x0[row] - alone[0]).norm() / alone.norm() < 1e-5
        assert (images[row].int() - model.render(texts, **one)[0].int()).abs().max() <= 1


def test_images_follow_prompt_latent_and_weights(fresh_model, texts):
    prompts, repeats = torch.tensor([0, 1, 2, 0]), torch.tensor([0, 0, 0, 1])
    images = fresh_model.render(texts, seed=0, step=0, prompts=prompts, repeats=repeats).float()
    assert images.std(dim=(1, 2, 3)).min() > 20
    assert ((images == 0) | (images == 255)).float().mean() < 0.1
    for other in (1, 2, 3):
        assert (images[0] - images[other]).abs().mean() > 3


@pytest.mark.parametrize("target", ["to_q", "to_k", "to_v", "to_out.0", "linear_1", "linear_2", "proj_out", "linear"])
def test_every_target_of_the_reference_run_shows_in_the_image(fresh_model, texts, target):
    keys = {"seed": 0, "step": 0, "prompts": torch.tensor([0, 1]), "repeats": torch.tensor([0, 0])}
    before = fresh_model.denoise(texts, **keys, settings=RenderSettings())
    generator = torch.Generator().manual_seed(0)
    for name, module in fresh_model.transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and f".{name}".endswith(f".{target}"):
            noise = torch.randn(module.weight.shape, generator=generator)
            module.weight.data += 0.1 * module.weight.std() * noise
    after = fresh_model.denoise(texts, **keys, settings=RenderSettings())
    assert (after - before).norm() / before.norm() > 0.003


class Recorder:
    """Stands in for a population: remembers when the transformer is called, and shifts its output."""

    backend = "torch"

    def __init__(self, transformer):
        self.calls, self.open = [], None
        transformer.register_forward_pre_hook(lambda *_: self.calls.append(self.open))

    def perturbed(self, *, step, members):
        recorder = self

        class Context:
            def __enter__(self):
                recorder.open = (step, members.tolist())

            def __exit__(self, *_):
                recorder.open = None

        return Context()


def test_one_forward_a_step_inside_the_population(fresh_model, texts, rows):
    population = Recorder(fresh_model.transformer)
    members = torch.tensor([4, 5, 0, 1, 1])
    keys = {"seed": 0, "step": 9, "prompts": rows[0], "repeats": rows[1], "settings": RenderSettings(num_steps=2)}
    fresh_model.render(texts, **keys, members=members, population=population)
    assert population.calls == [(9, members.tolist())] * 2
    with pytest.raises(ValueError, match="expected both or neither"):
        fresh_model.render(texts, **keys, members=members)
    with pytest.raises(ValueError, match="expected one for each of 5 rows"):
        fresh_model.render(texts, **keys, members=members[:2], population=population)


def test_sizes_other_than_the_models_own(model, texts, rows):
    settings = RenderSettings(height=32, width=96)
    images = model.render(texts, seed=0, step=0, prompts=rows[0], repeats=rows[1], settings=settings)
    assert images.shape == (5, 3, 32, 96)
    assert model.image_size == 64


def test_loading_leaves_nothing_trainable_and_no_text_encoder(model):
    assert model.pipeline.text_encoder is None
    assert model.pipeline.tokenizer is None
    assert not any(p.requires_grad for part in (model.transformer, model.vae) for p in part.parameters())
    assert not model.transformer.training
    assert not model.vae.training


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"height": 48}, "height: expected a positive multiple of 32, got 48"),
        ({"width": 0}, "width: expected at least 1, got 0"),
        ({"num_steps": 0}, "num_steps: expected at least 1, got 0"),
        ({"decode_chunk": 0}, "decode_chunk: expected at least 1, got 0"),
        ({"guidance_scale": math.nan}, "guidance_scale: expected at least -10000, got nan"),
        ({"guidance_scale": -1e39}, r"guidance_scale: expected at least -10000, got -1e\+39"),
        ({"num_steps": 2, "x0_angle": 1.3}, "x0_angle: expected None unless num_steps is 1, got 1.3 for 2"),
        ({"x0_angle": 2.0}, r"x0_angle: expected at most 1\.5708, got 2\.0"),
    ],
)
def test_settings_say_what_is_wrong(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        RenderSettings(**kwargs)


def test_models_that_cannot_be_loaded(tmp_path, tiny_folder):
    with pytest.raises(ConfigError, match="neither a folder nor a hub id"):
        SanaSprint.from_pretrained(tmp_path / "none")
    with pytest.raises(ConfigError, match="no complete copy of a hub model"):
        SanaSprint.from_pretrained("nobody/nothing", local_files_only=True)
    with pytest.raises(ConfigError, match=r"cannot load .*model_index\.json"):
        SanaSprint.from_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "SanaPipeline"}')
    with pytest.raises(ConfigError, match="expected a SanaSprintPipeline, got SanaPipeline"):
        SanaSprint.from_pretrained(tmp_path)
    for file in tiny_folder.rglob("*"):
        if file.is_file():
            copy = tmp_path / file.relative_to(tiny_folder)
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(file.read_bytes())
    weights = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="cannot load"):
        SanaSprint.from_pretrained(tmp_path)


def test_a_hub_id_is_keyed_by_its_commit(tiny_folder, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--nobody--tiny" / "snapshots" / commit
    shutil.copytree(tiny_folder, snapshot)
    (tmp_path / "models--nobody--tiny" / "refs").mkdir()
    (tmp_path / "models--nobody--tiny" / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = SanaSprint.from_pretrained("nobody/tiny", local_files_only=True)
    model.encode(["a cat"], cache_dir=tmp_path / "text")
    key = json.loads(next((tmp_path / "text").glob("*.json")).read_text())["key"]
    assert (key["model"], key["commit"]) == ("nobody/tiny", commit)
    assert "fingerprint" not in key


def test_every_part_is_in_the_identity_of_a_folder(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "model")
    seen = {SanaSprint.from_pretrained(tmp_path / "model").identity()}
    parts = ("transformer", "vae", "scheduler", "text_encoder", "tokenizer")
    for part in parts:
        file = max((tmp_path / "model" / part).iterdir(), key=lambda file: file.stat().st_size)
        data = file.read_bytes()
        file.write_bytes(data + b"\n" if file.suffix == ".json" else data[:-1] + bytes([data[-1] ^ 1]))
        seen.add(SanaSprint.from_pretrained(tmp_path / "model").identity())
    assert len(seen) == len(parts) + 1
