"""Every family's tiny pipeline: its rows equal each member's weights merged and run alone by the pipeline itself."""

import copy
import dataclasses
import functools
import gc
import json
import subprocess
import sys
import weakref

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

import esengine
from esengine.base.errors import ConfigError, OutOfMemory, RenderError
from esengine.models import (
    FAMILIES,
    DiffusersPipeline,
    Family,
    RenderSettings,
    Rows,
    SanaSprint,
    load,
    tiny_pipeline,
    write_diffusers_lora,
)
from esengine.models.families import TINY
from esengine.models.pipeline import row_generators
from esengine.models.tiny_pipelines import SIZE, tiny_components

NAMES = [name for name in TINY if name != "sana-sprint"]
PROMPTS = ["a red fox at sunset", 'two green apples on a wooden table, "fresh", soft light', "a cat"]
KEYS = {"seed": 3, "step": 7}
ROWS = Rows(torch.tensor([5, 0, 1, 4, 0]), torch.tensor([0, 1, 2, 1, 1]), torch.tensor([0, 0, 3, 1, 1]))
PLAIN = Rows(None, *ROWS[1:])


def generator(name: str) -> DiffusersPipeline:
    return DiffusersPipeline(tiny_components(name), dataclasses.replace(FAMILIES[name], size=SIZE))


def population_of(model: DiffusersPipeline, sigma: float = 0.1):
    """A LoRA with random weights on the family's targets."""
    lists = [n for n, m in model.module.named_modules() if n.endswith("to_out") and isinstance(m, nn.ModuleList)]
    lora = LoraConfig(r=2, lora_alpha=3, target_modules=list(model.targets), exclude_modules=lists or None)
    population = esengine.attach(model.module, lora, esengine.Noise(sigma=sigma, rank=1, seed=3))
    state = population.state_dict()
    draw = torch.Generator().manual_seed(0)
    for name, tensor in state["adapter"].items():
        if name.endswith("lora_B.weight"):
            state["adapter"][name] = 0.1 * torch.randn(tensor.shape, generator=draw)
    population.load_state_dict(state)
    return population


def merged(module: nn.Module, state: dict[str, torch.Tensor], scale: float = 1.5) -> nn.Module:
    """The module with a member's LoRA in its weights."""
    module = copy.deepcopy(module)
    state = {key.removeprefix("base_model.model."): tensor for key, tensor in state.items()}
    for key, a in state.items():
        if key.endswith("lora_A.weight"):
            name = key.removesuffix(".lora_A.weight")
            module.get_submodule(name).weight.data += scale * state[f"{name}.lora_B.weight"] @ a
    return module


def call(pipe, model: DiffusersPipeline, row: int, settings: RenderSettings, prompt: int | None = None) -> torch.Tensor:
    """One row by the pipeline itself, from its text: float32 [3, H, W]."""
    family = model.family
    given = {family.guidance_argument: settings.guidance_scale, **family.call}
    if given.get("negative_prompt", "") is None:
        del given["negative_prompt"]  # of the embeddings; a text has the pipeline's own default
    if family.name == "qwen-image" and settings.guidance_scale > 1:
        given["negative_prompt"] = " "
    return pipe(
        prompt=PROMPTS[ROWS.prompts[row] if prompt is None else prompt],
        height=SIZE,
        width=SIZE,
        num_inference_steps=settings.num_steps,
        generator=row_generators(**KEYS, rows=PLAIN)[row],
        output_type="pt",
        **given,
    ).images[0]


@pytest.fixture(scope="module", params=NAMES)
def case(request):
    """A generator with encoded prompts, and a plain copy of its pipeline with the text encoders still there."""
    model = generator(request.param)
    plain = copy.deepcopy(model.pipeline)
    plain.set_progress_bar_config(disable=True)
    return model, plain, model.encode(PROMPTS)


def guidances(model: DiffusersPipeline) -> list[float]:
    """The family's own guidance, and 3.0 where that turns classifier-free guidance on."""
    own = model.resolve(RenderSettings()).guidance_scale
    return [own, 3.0] if model._guided(RenderSettings(guidance_scale=3.0)) else [own]


def test_every_row_is_its_member_alone(case):
    model, plain, texts = case
    population = population_of(model)
    try:
        drawn, states = {}, {}
        for guidance in guidances(model):
            settings = model.resolve(RenderSettings(num_steps=2, guidance_scale=guidance))
            keys = dict(**KEYS, population=population, text_length=texts.trimmed_length(ROWS.prompts))
            whole, good = model.draw(texts, rows=ROWS, settings=settings, **keys)
            small = dataclasses.replace(settings, decode_chunk=2)
            parts = [model.draw(texts, rows=part, settings=small, **keys)[0] for part in ROWS.split(2)]
            assert good.all()
            drawn[guidance] = settings, whole, torch.cat(parts)
        states = {m: population.member_state_dict(step=7, member=m) for m in set(ROWS.members.tolist())}
    finally:
        population.detach()
    own, wrong = getattr(plain, model.denoiser), {5: 4, 0: 1, 1: 0, 4: 5}
    try:
        for settings, whole, parts in drawn.values():
            for row in (0, 1, 2):
                member = int(ROWS.members[row])
                setattr(plain, model.denoiser, merged(own, states[member]))
                alone = call(plain, model, row, settings)
                setattr(plain, model.denoiser, merged(own, states[wrong[member]]))
                effect = (call(plain, model, row, settings) - alone).norm()
                for images in (whole, parts):
                    assert (images[row] - alone).norm() <= 1e-4 * effect
    finally:
        setattr(plain, model.denoiser, own)


def test_a_row_does_not_depend_on_its_batch(case):
    model, _, texts = case
    whole, _ = model.draw(texts, rows=PLAIN, **KEYS)
    for row in (2, 4):
        (part,) = Rows(None, *(column[row : row + 1] for column in PLAIN[1:])).split(1)
        alone, _ = model.draw(texts, rows=part, **KEYS)
        assert (whole[row] - alone[0]).abs().max() < 5e-5
    assert (whole[1] - whole[3]).abs().max() > 0.01  # another repeat
    assert torch.equal(model.draw(texts, rows=PLAIN, **KEYS)[0], whole)
    other, _ = model.draw(texts, rows=PLAIN, seed=3, step=8)
    assert (whole[0] - other[0]).abs().max() > 0.01


def test_images_are_bytes_and_the_encoders_are_gone(case):
    model, _, texts = case
    images = model.render(texts, rows=PLAIN, **KEYS)
    assert (images.dtype, tuple(images.shape)) == (torch.uint8, (5, 3, SIZE, SIZE))
    floats, _ = model.draw(texts, rows=PLAIN, **KEYS)
    assert torch.equal(images, (floats * 255).round().to(torch.uint8))
    parts = model.pipeline.components
    assert not any(isinstance(part, PreTrainedModel) for part in parts.values())
    assert not any(part is not None for name, part in parts.items() if name.startswith("tokenizer"))
    for part in parts.values():
        if isinstance(part, nn.Module):
            assert not any(each.training for each in part.modules())
            assert not any(parameter.requires_grad for parameter in part.parameters())
    assert model.encode(PROMPTS[:1])[0].keys() == texts[0].keys()  # known already
    with pytest.raises(ConfigError, match="prompts: the text encoders were dropped"):
        model.encode(["another prompt"])


def test_a_loaded_pipeline_frees_its_encoders_and_keeps_their_results(monkeypatch, tmp_path):
    held, asked = [], []
    kind = DiffusersPipeline.from_pretrained("tiny:sd3").pipeline.__class__
    encode = kind.encode_prompt

    @functools.wraps(encode)
    def watched(self, prompt, *args, **kwargs):
        if kwargs.get("prompt_embeds") is None:
            asked.append(prompt)
            held.extend(weakref.ref(part) for part in self.components.values() if isinstance(part, PreTrainedModel))
        return encode(self, prompt, *args, **kwargs)

    monkeypatch.setattr(kind, "encode_prompt", watched)
    model = DiffusersPipeline.from_pretrained("tiny:sd3")
    first = model.encode([*PROMPTS, PROMPTS[0]], cache_dir=tmp_path)
    assert asked == [*PROMPTS, ""]  # each once and alone, and the empty prompt of guidance
    gc.collect()
    assert held
    assert not any(reference() is not None for reference in held)
    images = model.render(first, rows=PLAIN, **KEYS)
    again = DiffusersPipeline.from_pretrained("tiny:sd3")
    assert torch.equal(again.render(again.encode(PROMPTS, cache_dir=tmp_path), rows=PLAIN, **KEYS), images)
    assert len(asked) == 4  # all from the cache
    again.encode(["a new one"], cache_dir=tmp_path)  # after images, the encoders are loaded again
    assert asked[4:] == ["a new one"]
    (index,) = tmp_path.glob("*.json")
    content = json.loads(index.read_text())
    next(iter(content["prompts"].values()))["sha256"] = "0" * 64
    index.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="text cache: cannot use"):
        DiffusersPipeline.from_pretrained("tiny:sd3").encode(PROMPTS, cache_dir=tmp_path)


def test_text_is_trimmed_to_the_longest_real_prompt():
    model = generator("pixart")
    texts = model.encode(PROMPTS)
    assert texts.lengths.tolist() == sorted(texts.lengths.tolist(), key=lambda n: -n) or len(set(texts.lengths)) > 1
    batch = texts.batch(torch.tensor([0, 2]))
    longest = int(texts.lengths[[0, 2]].max())
    assert batch["prompt_embeds"].shape[:2] == batch["prompt_attention_mask"].shape == (2, longest)
    assert batch["prompt_attention_mask"].sum(1).tolist() == texts.lengths[[0, 2]].tolist()
    assert texts.batch(torch.tensor([2]), length=20)["prompt_embeds"].shape[1] == 20
    with pytest.raises(ValueError, match="length: expected at least"):
        texts.batch(torch.tensor([0]), length=1)
    guided = texts.batch(torch.tensor([0, 2]), guided=True)
    assert guided["negative_prompt_embeds"].shape == guided["prompt_embeds"].shape
    assert texts.select([PROMPTS[2]]).lengths.tolist() == [int(texts.lengths[2])]


def test_the_length_of_a_step_changes_no_image():
    model = generator("sana")
    texts = model.encode(PROMPTS)
    short, _ = model.draw(texts, rows=PLAIN, **KEYS)
    padded, _ = model.draw(texts, rows=PLAIN, **KEYS, text_length=200)
    assert (short - padded).abs().max() < 5e-5


DRAW = """
import sys, json, torch
from diffusers import DiffusionPipeline
jobs = json.load(open(sys.argv[1]))
for job in jobs:
    pipe = DiffusionPipeline.from_pretrained(job["folder"])
    pipe.set_progress_bar_config(disable=True)
    if job["loader"] == "pipeline":
        pipe.load_lora_weights(job["adapter"])
    elif job["loader"] == "module":
        pipe.transformer.load_lora_adapter(job["adapter"], weight_name="pytorch_lora_weights.safetensors")
    else:
        from peft import PeftModel
        PeftModel.from_pretrained(pipe.transformer, job["adapter"])
    draw = [torch.Generator().manual_seed(seed) for seed in job["seeds"]]
    keys = dict(output_type="pt", **job["call"])
    images = [pipe(prompt=p, generator=g, **keys).images[0] for p, g in zip(job["prompts"], draw)]
    torch.save(torch.stack(images), job["out"])
assert "esengine" not in sys.modules
"""


def test_saved_adapters_in_plain_diffusers(tmp_path):
    """All families in one process without esengine: the images are those of the population's own adapter."""
    jobs, expected = [], {}
    for name in NAMES:
        model = DiffusersPipeline.from_pretrained(f"tiny:{name}")
        texts = model.encode(PROMPTS)
        settings = model.resolve(RenderSettings(num_steps=2))
        base, _ = model.draw(texts, rows=PLAIN, settings=settings, **KEYS)
        population = population_of(model)
        drawn, _ = model.draw(texts, rows=PLAIN, settings=settings, **KEYS)
        folder = tmp_path / name
        population.save_pretrained(folder)
        scaling = {layer: each.scale for layer, each in population.layers.items()}
        write_diffusers_lora(folder, population.lora(), scaling, model.denoiser)
        population.detach()

        model.load_adapter(folder)
        loaded, _ = model.draw(texts, rows=PLAIN, settings=settings, **KEYS)
        effect = (drawn - base).norm()
        assert effect > 0.1
        assert (loaded - drawn).norm() <= 1e-4 * effect
        model.adapter_enabled(False)
        assert torch.equal(model.draw(texts, rows=PLAIN, settings=settings, **KEYS)[0], base)
        model.adapter_enabled(True)
        assert not any(module.training for module in model.module.modules())
        model.unload_adapter()
        assert torch.equal(model.draw(texts, rows=PLAIN, settings=settings, **KEYS)[0], base)
        with pytest.raises(ValueError, match="expected an adapter loaded"):
            model.adapter_enabled(True)

        given = {model.family.guidance_argument: settings.guidance_scale, **model.family.call}
        given = {key: value for key, value in given.items() if value is not None}
        kind = type(model.pipeline)
        loader = "pipeline" if hasattr(kind, "load_lora_weights") else "module" if name == "hunyuan-image" else "peft"
        jobs.append({
            "folder": str(tiny_pipeline(name)),
            "adapter": str(folder),
            "loader": loader,
            "seeds": [each.initial_seed() for each in row_generators(**KEYS, rows=PLAIN)],
            "prompts": [PROMPTS[index] for index in PLAIN.prompts.tolist()],
            "call": {**given, "height": SIZE, "width": SIZE, "num_inference_steps": 2},
            "out": str(folder / "images.pt"),
        })  # fmt: skip
        expected[name] = drawn, effect
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    (tmp_path / "draw.py").write_text(DRAW)
    command = [sys.executable, str(tmp_path / "draw.py"), str(tmp_path / "jobs.json")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for name, (drawn, effect) in expected.items():
        plain = torch.load(tmp_path / name / "images.pt")
        assert (plain - drawn).norm() <= 1e-4 * effect, name


def test_an_adapter_of_another_family_is_refused(tmp_path):
    model = DiffusersPipeline.from_pretrained("tiny:sd")
    write_diffusers_lora(
        tmp_path,
        {"proj_out.lora_A.weight": torch.zeros(2, 4), "proj_out.lora_B.weight": torch.zeros(4, 2)},
        {"proj_out": 1.0},
    )
    with pytest.raises(ConfigError, match=r"adapter: cannot load .*unet"):
        model.load_adapter(tmp_path)
    with pytest.raises(ConfigError, match="does not exist"):
        model.load_adapter(tmp_path / "none")


def test_load_picks_the_class():
    assert isinstance(load("tiny"), SanaSprint)
    assert isinstance(load("tiny:sana-sprint"), SanaSprint)
    model = load("tiny:z-image", device="cpu", dtype=torch.float32)
    assert isinstance(model, DiffusersPipeline)
    assert load(tiny_pipeline("z-image")).identity() == model.identity()
    assert (model.denoiser, model.image_size, model.dtype) == ("transformer", SIZE, torch.float32)
    assert load("tiny:sdxl").denoiser == "unet"
    assert load("tiny:sdxl-lcm").family.name == "sdxl-lcm"
    with pytest.raises(ConfigError, match=r"tiny:FAMILY with one of sana-sprint, sana, .*, got 'tiny:nothing'"):
        load("tiny:nothing")
    with pytest.raises(ConfigError, match="revision: tiny:sd3"):
        load("tiny:sd3", revision="main")


def test_the_generic_way_renders_sana_sprint_too():
    from diffusers import SanaSprintPipeline

    model = DiffusersPipeline(SanaSprintPipeline.from_pretrained(tiny_pipeline("sana-sprint")), "sana-sprint")
    texts = model.encode(PROMPTS[:2])
    rows = Rows(None, torch.tensor([0, 1]), torch.tensor([0, 0]))
    one = model.render(texts, rows=rows, **KEYS)
    two = model.render(texts, rows=rows, **KEYS, settings=RenderSettings(num_steps=2))
    assert one.shape == two.shape == (2, 3, SIZE, SIZE)
    assert not torch.equal(one, two)
    with pytest.raises(ConfigError, match=r"x0_angle: 1\.3 does not apply"):
        model.resolve(RenderSettings(x0_angle=1.3))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (dict(x0_angle=1.3), "x0_angle"),
        (dict(graphs="always"), "graphs"),
        (dict(decode="compiled"), "decode"),
        (dict(decode="graphed"), "decode"),
        (dict(overlap=True), "overlap"),
        (dict(guidance_scale=4.0), "guidance_scale"),
    ],
)
def test_settings_that_do_not_apply_are_refused(settings, name):
    model = load("tiny:flux2-klein")
    with pytest.raises(ConfigError) as error:
        model.resolve(RenderSettings(**settings))
    assert error.value.setting == name
    assert "Flux2KleinPipeline" in error.value.problem


def test_open_settings_are_the_familys():
    model = load("tiny:z-image")
    assert model.resolve(RenderSettings(decode_chunk=3)) == RenderSettings(
        decode_chunk=3, num_steps=8, guidance_scale=0.0
    )
    given = RenderSettings(num_steps=3, guidance_scale=2.0, height=32, width=96)
    assert model.resolve(given) == given
    texts = model.encode(PROMPTS[:1])
    rows = Rows(None, torch.tensor([0]), torch.tensor([0]))
    assert model.render(texts, rows=rows, **KEYS, settings=given).shape == (1, 3, 32, 96)
    sprint = load("tiny")
    assert sprint.resolve(RenderSettings()) == RenderSettings(num_steps=1, guidance_scale=4.5)


def test_rows_are_checked():
    model = load("tiny:sd")
    texts = model.encode(PROMPTS)
    with pytest.raises(ValueError, match="one for each of 5 rows"):
        model.render(texts, rows=Rows(None, PLAIN.prompts, PLAIN.repeats[:2]), **KEYS)
    with pytest.raises(ValueError, match="members, population: expected both or neither"):
        model.render(texts, rows=ROWS, **KEYS)


def test_images_are_ordinary_tensors():
    """A reward may change them in place, which torch refuses for a tensor of its inference mode."""
    model = load("tiny:sd")
    texts = model.encode(PROMPTS)
    images, (floats, good) = model.render(texts, rows=PLAIN, **KEYS), model.draw(texts, rows=PLAIN, **KEYS)
    assert not any(each.is_inference() for each in (images, floats, good))
    images += 1
    floats += 1


def test_an_image_that_is_not_finite_is_named():
    model = load("tiny:sd")
    texts = model.encode(PROMPTS)
    population = population_of(model)
    with torch.no_grad():
        model.pipeline.vae.post_quant_conv.weight.fill_(torch.inf)
    with pytest.raises(RenderError, match=r"step 7, member 5, prompt 'a red fox at sunset': the image is not finite"):
        model.render(texts, rows=ROWS, population=population, **KEYS)
    with pytest.raises(RenderError, match="prompt 'a cat'"), model.deferred_checks():
        model.render(texts, rows=Rows(None, torch.tensor([2]), torch.tensor([0])), **KEYS)
    assert "decode" not in vars(model.pipeline.vae)


def test_out_of_memory_is_told(monkeypatch):
    model = load("tiny:sd")
    texts = model.encode(PROMPTS)

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.00 GiB.")

    monkeypatch.setattr(model.pipeline.vae, "decode", full)
    with pytest.raises(OutOfMemory, match=r"2 images in one VAE call .* give a smaller decode chunk"):
        model.render(texts, rows=PLAIN, **KEYS, settings=RenderSettings(decode_chunk=2))
    monkeypatch.setattr(type(model.pipeline), "__call__", full)
    with pytest.raises(OutOfMemory, match="5 images in one transformer forward"):
        model.render(texts, rows=PLAIN, **KEYS)


def test_a_pipeline_of_no_family_needs_a_row():
    pipe = tiny_components("sd")
    with pytest.raises(
        ConfigError, match=r"family: expected a row for StableDiffusionPipeline, got one for SanaPipeline"
    ):
        DiffusersPipeline(pipe, "sana")
    with pytest.raises(ConfigError, match="family: expected a Family or one of sana-sprint"):
        DiffusersPipeline(pipe, "nothing")
    row = Family(
        name="mine",
        pipeline="StableDiffusionPipeline",
        denoiser="unet",
        texts=("prompt_embeds", None),
        guided_above=None,
    )
    model = DiffusersPipeline(pipe, row)
    assert model.image_size == SIZE
    images = model.render(model.encode(PROMPTS), rows=PLAIN, **KEYS)
    assert len(images.flatten(1).unique(dim=0)) == 4  # two rows are the same
    assert model.identity().startswith("sha256:")
    population_of(model)
    assert model.identity() == DiffusersPipeline(tiny_components("sd"), "sd").identity()


def test_the_tiny_pipelines_are_built_the_same_each_time(tmp_path, monkeypatch):
    monkeypatch.setenv("ESENGINE_CACHE", str(tmp_path))
    folder = tiny_pipeline("sana")
    assert folder.parent == tmp_path
    torch.manual_seed(123)
    state = torch.get_rng_state()
    again = tiny_components("sana")
    assert torch.equal(torch.get_rng_state(), state)
    stored = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in again.transformer.state_dict().items())
    assert isinstance(DiffusionPipeline.from_pretrained(folder), DiffusionPipeline)
