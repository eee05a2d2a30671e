"""The fused SANA block against diffusers' own, under a population whose rows are all of different members."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import SanaTransformer2DModel
from diffusers.models.normalization import RMSNorm
from peft import LoraConfig

import esengine
from esengine.kernels import configs
from esengine.kernels.noise import INTERPRET
from esengine.models.sana import sana_block
from esengine.models.sana.sana_block import (
    FusedBlock,
    FusedCaption,
    TokenConv,
    fused_parts,
    patched,
    stacked,
    why_not_fused,
)

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "linear_1", "linear_2", "proj_out", "linear"]
MEMBERS = [5, 0]

needs_triton = pytest.mark.skipif(
    not (INTERPRET or torch.cuda.is_available()), reason="Triton kernels need TRITON_INTERPRET=1 or a GPU"
)


@pytest.fixture
def transformer():
    """All parts of the 1.6B in one block of width 32, because the interpreter is slow."""
    torch.manual_seed(0)
    model = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=16,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=24,
        sample_size=4, patch_size=1, guidance_embeds=True, qk_norm="rms_norm_across_heads",
    )  # fmt: skip
    for module in model.transformer_blocks.modules():
        if isinstance(module, RMSNorm):
            torch.nn.init.normal_(module.weight)
    device = "cuda" if torch.cuda.is_available() and not INTERPRET else "cpu"
    return model.eval().requires_grad_(False).to(device)


@pytest.fixture(params=configs.PATHS["sana_block"].names)
def path(request, monkeypatch, tmp_path):
    """The block's path, as a file of settings chooses it."""
    contents = json.loads(configs.DEFAULT.read_text())
    contents["paths"] = {"sana_block": [{"when": {}, "path": request.param}]}
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(contents))
    monkeypatch.setenv(configs.OVERRIDE, str(file))
    return request.param


@pytest.fixture
def launched(monkeypatch):
    """Names of the ops that the block calls, in order."""
    names = []
    for name in ("shrink", "mix", "fused_linear", "linear_attention", "residual_norm", "rms_norm", "member_factors"):
        op = getattr(sana_block, name)

        def noted(*args, name=name, op=op, **kwargs):
            names.append(name)
            return op(*args, **kwargs)

        monkeypatch.setattr(sana_block, name, noted)
    return names


def inputs(transformer):
    generator = torch.Generator().manual_seed(0)
    config, batch = transformer.config, len(MEMBERS)
    mask = torch.ones(batch, 5, dtype=torch.int64)
    mask[1, 3:] = 0
    arguments = {
        "hidden_states": torch.randn(batch, config.in_channels, 3, 5, generator=generator),
        "encoder_hidden_states": torch.randn(batch, 5, config.caption_channels, generator=generator),
        "encoder_attention_mask": mask,
        "guidance": torch.full((batch,), 0.45),
        "timestep": torch.linspace(0.3, 1, batch),
    }
    for name, value in arguments.items():
        arguments[name] = value.to(transformer.device, transformer.dtype if value.is_floating_point() else None)
    return arguments | {"return_dict": False}


def attach(transformer, targets=TARGETS, **options):
    config = LoraConfig(r=2, lora_alpha=8, target_modules=targets, **options)
    population = esengine.attach(transformer, config, esengine.Noise(sigma=3e-2, rank=2, seed=1))
    for i, layer in enumerate(population.layers.values()):
        layer.b.copy_(torch.randn(layer.b.shape, generator=torch.Generator().manual_seed(i)) / 8)
    return population


def parts_of(transformer, population):
    with population.perturbed(step=0, members=torch.zeros(0, dtype=torch.int64)):
        return fused_parts(transformer, True)


@torch.no_grad()
def both(transformer, population):
    """Velocities by diffusers' blocks and by the fused ones."""
    arguments = inputs(transformer)
    with population.perturbed(step=3, members=torch.tensor(MEMBERS, device=transformer.device)):
        plain = transformer(**arguments)[0]
        parts = fused_parts(transformer, True)
        assert [type(part) for part in parts] == [FusedCaption, FusedBlock]
        with patched(parts, population.perturbation):
            return plain, transformer(**arguments)[0]


def relative(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


@needs_triton
@pytest.mark.parametrize("targets", [TARGETS, ["to_out.0"], ["attn1.to_q", "attn1.to_k", "attn1.to_v", "linear_1"]])
def test_equals_diffusers(transformer, path, targets):
    plain, got = both(transformer, attach(transformer, targets))
    assert relative(got, plain) <= 1e-5


@needs_triton
def test_equals_diffusers_with_stored_factors(transformer, path, monkeypatch, launched):
    """As of 16 rows a member on: a factor for each stack, where something reads it."""
    monkeypatch.setattr(sana_block, "STORE_FROM", 1)
    plain, got = both(transformer, attach(transformer, ["to_q", "to_k", "to_v", "to_out.0"]))
    assert relative(got, plain) <= 1e-5
    assert launched.count("member_factors") == 5
    assert launched.count("residual_norm") == (3 if path == "consumer" else 0)
    assert launched.count("rms_norm") == (1 if path == "consumer" else 0)


@needs_triton
@pytest.mark.parametrize("change", ["many columns", "no norms"])
def test_what_the_consumers_cannot_add_the_epilogue_does(transformer, path, monkeypatch, launched, change):
    if change == "many columns":
        monkeypatch.setattr(sana_block, "takes_low", lambda adapters, rank: False)
    else:
        for attention in (transformer.transformer_blocks[0].attn1, transformer.transformer_blocks[0].attn2):
            attention.norm_q = attention.norm_k = None
    plain, got = both(transformer, attach(transformer, ["to_q", "to_k", "to_v", "to_out.0"]))
    assert relative(got, plain) <= 1e-5
    assert "rms_norm" not in launched
    assert ("residual_norm" in launched) == (path == "consumer" and change == "no norms")


@needs_triton
@pytest.mark.parametrize("targets", [TARGETS, ["to_out.0", "attn2.to_q"]])
def test_equals_diffusers_on_the_weights_themselves(transformer, path, targets):
    noise = esengine.Noise(sigma=3e-3, rank=2, seed=1)
    population = esengine.attach(transformer, esengine.Direct(targets), noise, rule=esengine.UpdateRule(lr_scale=1.0))
    parts = parts_of(transformer, population)
    first = both(transformer, population)
    population.update(step=0, fitness=torch.tensor([3.0, -3.0], device=transformer.device))
    second = both(transformer, population)
    for plain, got in (first, second):
        assert relative(got, plain) <= 1e-5
    assert relative(second[0], first[0]) > 1e-3
    # parts that were made before the update, as a captured graph's, compute with the weights of after it
    weights = [part.qkv.weight for part in parts if isinstance(part, FusedBlock)]
    block = transformer.transformer_blocks[0].attn1
    assert torch.equal(weights[0], torch.cat([block.to_q.weight, block.to_k.weight, block.to_v.weight]))


@needs_triton
def test_members_differ(transformer):
    """So that the equality above is not one of two forwards without noise."""
    population = attach(transformer)
    noised, _ = both(transformer, population)
    with torch.no_grad():
        assert relative(noised, transformer(**inputs(transformer))[0]) > 1e-2


@needs_triton
def test_outside_it_is_the_module_as_it_was(transformer):
    population = attach(transformer)
    arguments = inputs(transformer)
    with torch.no_grad():
        before = transformer(**arguments)[0]
        both(transformer, population)
        assert torch.equal(transformer(**arguments)[0], before)
    assert all("forward" not in block.__dict__ for block in transformer.transformer_blocks)


def test_stacking_keeps_one_copy_and_shows_updates(transformer):
    population = attach(transformer)
    attention = transformer.transformer_blocks[0].attn1
    _, block = parts_of(transformer, population)
    weights = [layer.base_layer.weight for layer in (attention.to_q, attention.to_k, attention.to_v)]
    assert torch.equal(block.qkv.weight, torch.cat([w.data for w in weights]))
    assert block.qkv.weight.data_ptr() == weights[0].data_ptr() == stacked(weights).data_ptr()
    if not INTERPRET:  # which takes half a minute for an update
        before = block.qkv.adapters.a.clone()
        population.update(step=1, fitness=torch.linspace(-1, 1, 8))
        assert not torch.equal(block.qkv.adapters.a, before)
        assert torch.equal(block.qkv.adapters.a[:2], attention.to_q.a)
    transformer.double().float()  # moves every tensor by itself
    assert stacked(weights).data_ptr() == weights[0].data_ptr()
    assert torch.equal(stacked(weights), torch.cat([w.data for w in weights]))


def test_neighbours_in_memory_are_not_one_tensor():
    """As CUDA's allocator lays out weights of a multiple of 512 bytes."""
    memory = np.arange(24, dtype=np.float32).reshape(3, 2, 4)
    alone = [torch.nn.Parameter(torch.from_numpy(memory[i]), requires_grad=False) for i in range(3)]
    assert torch.equal(stacked(alone), torch.arange(24.0).view(6, 4))
    assert stacked(alone).data_ptr() == alone[0].data_ptr()
    assert torch.equal(alone[2], torch.arange(16.0, 24.0).view(2, 4))


def test_stacking_in_inference_mode_leaves_ordinary_tensors(transformer):
    population = attach(transformer)
    with torch.inference_mode():
        assert parts_of(transformer, population)
    assert not any(parameter.is_inference() for parameter in transformer.parameters())
    population.detach()
    transformer.requires_grad_(True)


@needs_triton
def test_members_of_any_stride(transformer):
    population = attach(transformer)
    column = torch.tensor([[member, 7] for member in MEMBERS], device=transformer.device)[:, 0]
    with torch.no_grad(), population.perturbed(step=3, members=column):
        parts = fused_parts(transformer, True)
        with patched(parts, population.perturbation):
            got = transformer(**inputs(transformer))[0]
    assert torch.equal(got, both(transformer, population)[1])


@needs_triton
def test_disabled_adapters_stay_off(transformer):
    population = attach(transformer, ["to_q", "to_k", "to_v", "to_out.0"])
    for layer in population.layers.values():
        layer.enable_adapters(False)
    plain, got = both(transformer, population)
    assert relative(got, plain) <= 1e-5


@needs_triton
def test_no_text_mask(transformer):
    population, arguments = attach(transformer, ["to_out.0"]), inputs(transformer) | {"encoder_attention_mask": None}
    with torch.no_grad(), population.perturbed(step=3, members=torch.tensor(MEMBERS, device=transformer.device)):
        plain = transformer(**arguments)[0]
        with patched(fused_parts(transformer, True), population.perturbation):
            assert relative(transformer(**arguments)[0], plain) <= 1e-5


@needs_triton
@pytest.mark.parametrize("direct", [False, True])
def test_bf16_makes_partial_sums_and_errs_no_more_than_diffusers(transformer, path, direct):
    """Against fp32 of the same weights. In bf16 partial sums of the attention and to_out replace two shrinks."""
    transformer.to(torch.bfloat16).float()
    noise = esengine.Noise(sigma=3e-3, rank=2, seed=1)
    population = esengine.attach(transformer, esengine.Direct(TARGETS), noise) if direct else attach(transformer)
    exact = both(transformer, population)[0]
    transformer.to(torch.bfloat16)
    caption, block = parts_of(transformer, population)
    noise_of_batch = esengine.kernels.MemberNoise(torch.zeros(0, dtype=torch.int64), 0, 0, 1e-2, 2)
    assert block.out.as_next_lora(noise_of_batch, torch.bfloat16) is block.out.adapters is not None
    assert block.q.as_next_lora(noise_of_batch, torch.bfloat16) is block.q.adapters is not None
    assert caption.second.as_next_lora(noise_of_batch, torch.bfloat16) is caption.second.adapters is not None
    assert (
        block.out.as_next_lora(noise_of_batch, torch.float32)
        is block.qkv.as_next_lora(noise_of_batch, torch.bfloat16)
        is None
    )
    plain, got = both(transformer, population)
    assert relative(got.float(), exact) <= 1.2 * relative(plain.float(), exact)  # 1.2: roundings fall otherwise


@pytest.mark.parametrize("weight", [None, 1e-3, 50.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_of_cross_attention_is_diffusers_rounded_once(dtype, weight):
    """torch's, which FusedBlock calls: eps under the root, sums in fp32, never further from fp64 than diffusers'."""
    device = "cuda" if torch.cuda.is_available() and not INTERPRET else "cpu"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3 * 35, 2240, generator=generator)[:, :35].to(device, dtype)
    x[0, :5] *= 1e-3  # where eps counts
    x[1, 0] = 0
    norm = RMSNorm(2240, 1e-5).requires_grad_(False)
    if weight is not None:
        norm.weight.copy_(weight * torch.randn(2240, generator=generator))
    norm.to(device, dtype)
    half = x.chunk(2, -1)[0], norm.weight[:1120]
    for values, scale in ((x, norm.weight), half):  # k is half of a wider row
        wide, norm.weight.data = values.double(), scale
        exact = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps) * scale.double()
        got, plain = F.rms_norm(values, scale.shape, scale, norm.eps), norm(values)
        assert got.dtype == plain.dtype == dtype
        assert relative(got.double(), exact) <= max(relative(plain.double(), exact), 2.0**-23)
        assert relative(got.float(), plain.float()) <= 2 * torch.finfo(dtype).eps
    assert torch.equal(F.rms_norm(x[1, :1], [2240], eps=norm.eps), torch.zeros_like(x[1, :1]))


@needs_triton
@torch.no_grad()
def test_cross_attention_norms_by_torchs_op_alone(transformer, monkeypatch):
    """Which is one launch on a GPU, where the module's steps each write what the next reads."""
    population, cross, normed = attach(transformer), transformer.transformer_blocks[0].attn2, []
    rms_norm = F.rms_norm
    with population.perturbed(step=3, members=torch.tensor(MEMBERS, device=transformer.device)):
        parts = fused_parts(transformer, True)
        for norm in (cross.norm_q, cross.norm_k):
            monkeypatch.setattr(norm, "forward", lambda x: pytest.fail("the module was called"))
        monkeypatch.setattr(F, "rms_norm", lambda x, *args: normed.append(tuple(x.shape)) or rms_norm(x, *args))
        with patched(parts, population.perturbation):
            transformer(**inputs(transformer))
    assert normed == [(2, 15, 32), (2, 5, 32)]


def test_wrong_batch_is_refused(transformer):
    population = attach(transformer, ["attn1.to_out.0"])
    z, text = torch.zeros(3, 4, 32), torch.zeros(3, 5, 32)
    with population.perturbed(step=0, members=torch.tensor(MEMBERS)):
        caption, block, keys = *fused_parts(transformer, True), population.perturbation
    with pytest.raises(ValueError, match=r"members: .* int64 \[3\], got int64 \[2\]"):
        block.forward(keys, z, None, text, None, torch.zeros(3, 6 * 32), 2, 2)
    with pytest.raises(ValueError, match=r"members: .* int64 \[3\], got int64 \[2\]"):
        caption.forward(keys, torch.zeros(3, 5, 24))
    with pytest.raises(RuntimeError, match="no gradient"):
        block.forward(keys, z[:2].requires_grad_(), None, text[:2], None, torch.zeros(2, 6 * 32), 2, 2)


def test_other_norms_and_hooks_are_not_fused(transformer):
    population, block = attach(transformer), transformer.transformer_blocks[0]
    block.forward = block.forward  # as a hook leaves it
    assert parts_of(transformer, population) == []
    del block.forward
    assert len(parts_of(transformer, population)) == 2
    transformer.caption_projection.act_1 = torch.nn.SiLU()
    assert parts_of(transformer, population) == []
    transformer.caption_projection.act_1 = torch.nn.GELU(approximate="tanh")
    assert len(parts_of(transformer, population)) == 2
    for attention in (block.attn1, block.attn2):
        norm = attention.norm_q
        for other in (torch.nn.LayerNorm(32), None, RMSNorm(32, 1e-3), RMSNorm(32, norm.eps, bias=True)):
            attention.norm_q = other
            assert parts_of(transformer, population) == []
        attention.norm_q = norm
    assert len(parts_of(transformer, population)) == 2


def test_fp16_whose_overflows_diffusers_clamps_is_not_fused(transformer):
    population = attach(transformer)
    assert parts_of(transformer, population)
    assert parts_of(transformer.half(), population) == []


@pytest.mark.parametrize(
    "options", [{"targets": ["to_q", "attn2.to_k"]}, {"rank_pattern": {"attn1.to_q": 4}}], ids=["targets", "ranks"]
)
def test_linears_of_unlike_adapters_are_not_stacked(transformer, options):
    population = attach(transformer, **options)
    assert parts_of(transformer, population) == []
    with pytest.raises(ValueError, match="all targets or none"):
        FusedBlock(transformer.transformer_blocks[0])


@torch.no_grad()
def test_convolution_on_tokens_equals_diffusers(transformer):
    plain = transformer(**inputs(transformer))[0]
    parts = fused_parts(transformer, False)
    assert [type(part) for part in parts] == [TokenConv]
    with patched(parts, None):
        assert "forward" in vars(transformer.transformer_blocks[0].ff)
        assert relative(transformer(**inputs(transformer))[0], plain) <= 1e-6
    assert "forward" not in vars(transformer.transformer_blocks[0].ff)
    assert torch.equal(transformer(**inputs(transformer))[0], plain)


@torch.no_grad()
def test_convolution_on_tokens_leaves_its_input_alone(transformer):
    conv = transformer.transformer_blocks[0].ff
    x = torch.randn(2, 32, 3, 5).to(transformer.device)
    before = x.clone()
    y = TokenConv(conv).forward(None, x)
    assert y.shape == x.shape
    assert torch.equal(x, before)
    assert relative(y, conv(x)) <= 1e-6


def test_a_raising_forward_puts_everything_back(transformer):
    parts = fused_parts(transformer, False)
    with pytest.raises(KeyError), patched(parts, None):
        raise KeyError
    assert "forward" not in vars(transformer.transformer_blocks[0].ff)


def test_convolutions_with_norms_residuals_and_hooks_stay(transformer):
    conv = transformer.transformer_blocks[0].ff
    for name, value in (("norm_type", "rms_norm"), ("residual_connection", True), ("forward", conv.forward)):
        before = getattr(conv, name)
        setattr(conv, name, value)
        assert fused_parts(transformer, False) == []
        delattr(conv, name) if name == "forward" else setattr(conv, name, before)
    assert fused_parts(transformer, False) != []


class OwnProcessor:
    """Attention of the user's own."""

    def __call__(self, attention, hidden_states, *args, **kwargs):
        return hidden_states


def own_processor(block):
    block.attn1.processor = OwnProcessor()


def hook_on_a_linear(block):
    block.attn2.to_q.register_forward_hook(lambda module, args, y: 2 * y)


def hook_on_attention(block):
    block.attn1.register_forward_pre_hook(lambda module, args: None)


def no_cross_attention(block):
    block.attn2 = None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (own_processor, "attn1 has OwnProcessor in place of SanaLinearAttnProcessor2_0"),
        (hook_on_a_linear, "PopulationLinear stands where a plain linear is expected"),
        (hook_on_attention, "has a forward of its own or a hook"),
        (no_cross_attention, "it has no cross-attention"),
    ],
)
def test_why_blocks_do_not_run_fused_is_a_sentence(transformer, change, words):
    population = attach(transformer)
    assert why_not_fused(transformer, True) is None
    change(transformer.transformer_blocks[0])
    reason = why_not_fused(transformer, True)
    assert reason.startswith("transformer_blocks.0: ")
    assert words in reason
    assert parts_of(transformer, population) == []
    assert why_not_fused(transformer, False) is None
    assert why_not_fused(transformer.half(), True).startswith("in float16")


def test_asking_why_moves_no_weight_and_hides_no_bug(transformer, monkeypatch):
    attach(transformer)
    places = [p.data_ptr() for p in transformer.parameters()]
    assert why_not_fused(transformer, True) is None
    assert [p.data_ptr() for p in transformer.parameters()] == places

    def broken(*layers):
        raise ValueError("a bug")

    monkeypatch.setattr(sana_block, "stacked", broken)
    with pytest.raises(ValueError, match="a bug"):
        fused_parts(transformer, True)


@pytest.mark.parametrize("name", ["norm1", "attn1.norm_q", "attn1.to_out.1", "ff.conv_depth", "ff.nonlinearity"])
def test_a_hook_anywhere_in_a_block_is_not_passed_over(transformer, name):
    attach(transformer)
    module = transformer.transformer_blocks[0].get_submodule(name)
    handle = module.register_forward_hook(lambda module, args, result: result)
    words = f"{name.removeprefix('ff.')} has a forward of its own or a hook"
    assert words in (why_not_fused(transformer, True) or "")
    if name.startswith("ff."):
        assert "hook" in why_not_fused(transformer, False)
    handle.remove()
    assert why_not_fused(transformer, True) is why_not_fused(transformer, False) is None


def test_other_convolutions_and_computed_weights_are_not_fused(transformer):
    conv = transformer.transformer_blocks[0].ff
    silu, conv.nonlinearity = conv.nonlinearity, torch.nn.GELU()
    assert "convolutions" in why_not_fused(transformer, False)
    conv.nonlinearity = silu
    point, conv.conv_point = conv.conv_point, torch.nn.Conv2d(*conv.conv_point.weight.shape[1::-1], 1)
    assert "convolutions" in why_not_fused(transformer, False)
    conv.conv_point = point
    query = transformer.transformer_blocks[0].attn1.to_q
    torch.nn.utils.parametrize.register_parametrization(query, "weight", torch.nn.Identity())
    assert "computed anew" in why_not_fused(transformer, True)
