"""Every family's tiny pipeline: a population's rows equal each member's weights merged and run alone by it."""

import copy
import dataclasses

import pytest
import torch
from peft import LoraConfig
from torch import nn

import esengine
from esengine.models import (
    FAMILIES,
    DiffusersPipeline,
    RenderSettings,
    Rows,
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
