"""attach, perturbed, update, save, load, detach: against PEFT with one member's weights set at a time."""

import copy
import errno
import math

import numpy as np
import pytest
import torch
from diffusers import SanaTransformer2DModel
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import nn
from transformers import BertConfig, BertModel, Gemma2Config, Gemma2ForCausalLM

import esengine
from esengine import Noise, UpdateRule
from esengine.base.errors import UnperturbedError, UpdateError
from esengine.es.layers import PopulationLinear
from esengine.kernels import factor, signed_sigma

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "linear_1", "linear_2", "proj_out", "linear"]
DEVICES = ["cpu"] + [pytest.param("cuda", marks=pytest.mark.gpu)] * torch.cuda.is_available()


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(7, 12), nn.GELU(), nn.Linear(12, 5, bias=False)
        self.norm, self.conv, self.table = nn.LayerNorm(5), nn.Conv2d(1, 1, 3), nn.Embedding(3, 5)
        self.attention = nn.MultiheadAttention(5, 1)
        self.norm.weight.requires_grad_(False)

    def forward(self, x):
        return self.norm(self.down(self.act(self.up(x))))


def seeded(build):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval()


def sana():
    model = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=12,
        sample_size=4, patch_size=1, guidance_embeds=True, qk_norm="rms_norm_across_heads",
    )  # fmt: skip
    for parameter in model.parameters():  # the default initialisation leaves tables of tiny numbers and nought biases
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def bert():
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertModel(config)


def gemma():
    config = Gemma2Config(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=24, head_dim=8, max_position_embeddings=16,
    )  # fmt: skip
    return Gemma2ForCausalLM(config)


def inputs(kind, batch, device="cpu"):
    """Keyword arguments of one forward, rows all different."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(batch, *shape, generator=generator).to(device)

    if kind == "mlp":
        return {"x": draw(3, 7)}
    if kind == "sana":
        return {
            "hidden_states": draw(4, 4, 4),
            "encoder_hidden_states": draw(6, 12),
            "timestep": draw().abs(),
            "guidance": draw().abs(),
            "encoder_attention_mask": torch.arange(6, device=device).expand(batch, -1) < 4,
        }
    return {"input_ids": torch.randint(50, (batch, 6), generator=generator).to(device)}


def outputs(model, kwargs):
    out = model(**kwargs)
    for name in ("sample", "last_hidden_state", "logits"):
        if hasattr(out, name):
            return getattr(out, name)
    return out


BUILD = {"mlp": MLP, "sana": sana, "bert": bert, "gemma": gemma}


def fresh(kind="mlp"):
    return seeded(BUILD[kind])


def mlp_config(**changes):
    return LoraConfig(**({"r": 2, "lora_alpha": 6, "target_modules": ["up", "down"]} | changes))


def trained(module, config, noise, **kwargs):
    """A population whose adapter is not nought: LoRA's B starts there."""
    population = esengine.attach(module, config, noise, **kwargs)
    generator = torch.Generator().manual_seed(2)
    for parameter in population.parameters().values():
        parameter.data = (0.2 * torch.randn(parameter.shape, generator=generator)).to(parameter)
    return population


def relative(got, expected):
    return float((got - expected).norm() / expected.norm())


def snapshot(module):
    """All that attach may touch: names, bits, flags, the modules themselves and their attributes."""
    return (
        {name: tensor.clone() for name, tensor in module.state_dict().items()},
        {name: (id(p), p.requires_grad) for name, p in module.named_parameters()},
        {name: (id(m), m.training, sorted(vars(m))) for name, m in module.named_modules()},
    )


def assert_untouched(module, before):
    after = snapshot(module)
    assert list(after[0]) == list(before[0])
    assert all(torch.equal(after[0][name], tensor) for name, tensor in before[0].items())
    assert after[1:] == before[1:]
    assert not hasattr(module, "peft_config")


CASES = {
    "mlp r1 k1": ("mlp", mlp_config(r=1), 1),
    "mlp r3 k2 rslora": ("mlp", mlp_config(r=3, use_rslora=True), 2),
    "mlp r8 k4 patterns": ("mlp", mlp_config(r=8, rank_pattern={"up": 3}, alpha_pattern={"down": 2}), 4),
    "mlp regex": ("mlp", mlp_config(target_modules=r".*(up|down)"), 3),
    "bert r4 k2": (
        "bert",
        LoraConfig(r=4, target_modules=["query", "key", "value", "dense"], exclude_modules=["pooler.dense"]),
        2,
    ),
    "bert regex": (
        "bert",
        LoraConfig(r=2, target_modules=r".*layer\.\d\.(attention.*(query|value)|output.dense)"),
        1,
    ),
    "gemma r2 k3": (
        "gemma",
        LoraConfig(r=2, target_modules=["q_proj", "k_proj", "o_proj", "down_proj"], rank_pattern={"k_proj": 5}),
        3,
    ),
    "sana reference run": ("sana", LoraConfig(r=2, lora_alpha=8, target_modules=TARGETS), 1),
    "sana r1 k2": ("sana", LoraConfig(r=1, target_modules=TARGETS, exclude_modules=r".*\.1\.attn2\..*"), 2),
    "sana r4 k3 rslora": ("sana", LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, use_rslora=True), 3),
    "sana r8 k4 patterns": (
        "sana",
        LoraConfig(
            r=8, lora_alpha=8, target_modules=TARGETS,
            rank_pattern={"proj_out": 3, r"transformer_blocks\.0\.attn1\.to_q": 1},
            alpha_pattern={"to_v": 2, "linear": 5},
        ),
        4,
    ),
}  # fmt: skip
MEMBERS = [5, 0, 3, 2, 1, 6, 5]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("device", DEVICES)
def test_a_mixed_batch_is_every_member_alone_in_peft(case, device):
    kind, config, rank = CASES[case]
    noise = Noise(sigma=0.05, rank=rank, seed=(1 << 63) + 3)
    population = trained(fresh(kind).to(device), config, noise)
    kwargs = inputs(kind, len(MEMBERS), device)
    with torch.no_grad(), population.perturbed(step=9, members=torch.tensor(MEMBERS, device=device)):
        batch = outputs(population.module, kwargs)
    peft = get_peft_model(fresh(kind).to(device), copy.deepcopy(config)).eval()
    assert sum(isinstance(m, PopulationLinear) for m in peft.modules()) == 0
    assert {name.rpartition(".lora_")[0] for name in population.member_state_dict(step=9, member=0)} == {
        name for name, module in peft.named_modules() if hasattr(module, "lora_A")
    }
    for row, member in enumerate(MEMBERS):
        result = set_peft_model_state_dict(peft, population.member_state_dict(step=9, member=member))
        assert not result.unexpected_keys
        assert not [key for key in result.missing_keys if "lora" in key]
        with torch.no_grad():
            alone = outputs(peft, {name: value[row : row + 1] for name, value in kwargs.items()})
        assert relative(batch[row], alone[0]) < 1e-5
    assert relative(batch[6], batch[0]) > 1e-3  # the same member on another input
    # the noise is no rounding error: another member is far away
    set_peft_model_state_dict(peft, population.member_state_dict(step=9, member=4))
    with torch.no_grad():
        assert relative(outputs(peft, {n: v[:1] for n, v in kwargs.items()})[0], batch[0]) > 1e-4


@pytest.mark.parametrize("kind", ["mlp", "sana"])
def test_a_row_does_not_depend_on_its_batch_mates(kind):
    config = mlp_config() if kind == "mlp" else LoraConfig(r=2, target_modules=TARGETS)
    population = trained(fresh(kind), config, Noise(sigma=0.05, rank=2))
    kwargs, members = inputs(kind, 6), torch.tensor([8, 3, 3, 0, 9, 1 << 32])
    with torch.no_grad():
        with population.perturbed(step=1, members=members):
            whole = outputs(population.module, kwargs)
        for order in ([0], [4, 1], [5, 4, 3, 2, 1, 0], [2, 2, 2]):
            with population.perturbed(step=1, members=members[order]):
                some = outputs(population.module, {name: value[order] for name, value in kwargs.items()})
            assert relative(some, whole[order]) < 5e-6  # sums in another order; other noise: over 1e-4


def test_outside_perturbed_it_is_pefts_forward():
    config, kwargs = mlp_config(), inputs("mlp", 4)
    population = trained(fresh(), config, Noise())
    peft = get_peft_model(fresh(), copy.deepcopy(config)).eval()
    set_peft_model_state_dict(peft, {f"base_model.model.{name}": p.data for name, p in population.parameters().items()})
    with torch.no_grad():
        assert torch.equal(population.module(**kwargs), peft(**kwargs))
        with population.perturbed(step=0, members=torch.arange(4)):
            assert not torch.allclose(population.module(**kwargs), peft(**kwargs))
        assert torch.equal(population.module(**kwargs), peft(**kwargs))


def test_member_state_dict_is_the_design_s_formula():
    population = trained(fresh(), mlp_config(r=3), Noise(sigma=0.2, rank=2, seed=4))
    layer, pairs = population.layers["up"], torch.tensor([3])
    for member in (6, 7):
        c = float(signed_sigma(torch.tensor(member), 0.2, 2))
        assert c == pytest.approx((1 if member == 6 else -1) * 0.2 / 2**0.5)
        noise = dict(seed=4, step=8, pairs=pairs, rank=2)
        v, u = factor(stream=layer.streams.a_v, length=7, **noise), factor(stream=layer.streams.a_u, length=3, **noise)
        state = population.member_state_dict(step=8, member=member)
        assert all(tensor.dtype == torch.float32 for tensor in state.values())
        expected = layer.a + c * u[0] @ v[0].T
        torch.testing.assert_close(state["base_model.model.up.lora_A.weight"], expected, rtol=0, atol=1e-7)
        v, u = factor(stream=layer.streams.b_v, length=3, **noise), factor(stream=layer.streams.b_u, length=12, **noise)
        expected = layer.b + c * u[0] @ v[0].T
        torch.testing.assert_close(state["base_model.model.up.lora_B.weight"], expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_module_keeps_its_adapter_in_fp32(dtype):
    module = fresh().to(dtype)
    population = trained(module, mlp_config(), Noise(sigma=0.05))
    assert {p.dtype for p in population.parameters().values()} == {torch.float32}
    x = inputs("mlp", 4)["x"]
    with torch.no_grad(), population.perturbed(step=1, members=torch.tensor([0, 1, 2, 3])):
        half = module(x.to(dtype))
    assert half.dtype == dtype
    wide = trained(fresh(), mlp_config(), Noise(sigma=0.05))
    with torch.no_grad(), wide.perturbed(step=1, members=torch.tensor([0, 1, 2, 3])):
        expected = wide.module(x)
    assert relative(half.float(), expected) < (2e-2 if dtype == torch.bfloat16 else 3e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_after_a_move(device):
    population = trained(fresh(), mlp_config(), Noise(sigma=0.05), rule=UpdateRule(optimizer="momentum"))
    population.update(step=0, fitness=torch.tensor([1.0, -1.0]))
    with torch.no_grad(), population.perturbed(step=1, members=torch.tensor([3, 0])):
        before = population.module(**inputs("mlp", 2))
    population.module.to("cpu").to(device)
    assert population.device.type == device
    with torch.no_grad(), population.perturbed(step=1, members=torch.tensor([3, 0], device=device)):
        after = population.module(**inputs("mlp", 2, device))
    torch.testing.assert_close(after.cpu(), before, rtol=1e-5, atol=1e-6)
    adapter = copy.deepcopy(population.parameters()["up.lora_A.weight"].data)
    population.update(step=1, fitness=torch.tensor([1.0, -1.0]))
    assert not torch.equal(population.parameters()["up.lora_A.weight"].data, adapter)


def test_gradients_of_the_input_flow_outside_and_inside():
    population = trained(fresh(), mlp_config(), Noise())
    x = inputs("mlp", 2)["x"].requires_grad_()
    with population.perturbed(step=0, members=torch.tensor([0, 1])):
        population.module(x).square().sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().max() > 0
    assert all(p.grad is None for p in population.parameters().values())


def test_contexts_do_not_nest_and_the_outer_one_goes_on():
    population, kwargs = trained(fresh(), mlp_config(), Noise()), inputs("mlp", 2)
    members = torch.tensor([4, 1])
    with torch.no_grad(), population.perturbed(step=0, members=members):
        expected = population.module(**kwargs)
        with (
            pytest.raises(RuntimeError, match="perturbed: already inside one"),
            population.perturbed(step=1, members=members),
        ):
            pass
        assert torch.equal(population.module(**kwargs), expected)
    with torch.no_grad():
        assert not torch.equal(population.module(**kwargs), expected)


def test_an_exception_inside_leaves_it_unperturbed():
    population, kwargs = trained(fresh(), mlp_config(), Noise()), inputs("mlp", 2)
    with torch.no_grad():
        expected = population.module(**kwargs)
        with pytest.raises(KeyError), population.perturbed(step=0, members=torch.tensor([0, 1])):
            raise KeyError("reward")
        assert torch.equal(population.module(**kwargs), expected)
        with pytest.raises(ValueError, match="members"), population.perturbed(step=0, members=torch.tensor([0, -1])):
            pass
        assert torch.equal(population.module(**kwargs), expected)
        with population.perturbed(step=0, members=torch.tensor([0, 1])):
            assert not torch.equal(population.module(**kwargs), expected)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (torch.tensor([0, -3]), r"members: expected values in \[0, 2\^33\), got -3"),
        (torch.tensor([1 << 33, 0]), r"members: expected values in \[0, 2\^33\), got 8589934592"),
        (torch.tensor([0, 1], dtype=torch.int32), r"members: expected int64 \[B\], got int32 \[2\]"),
        (torch.tensor([0.0, 1.0]), r"members: expected int64 \[B\], got float32 \[2\]"),
        (torch.tensor([True, False]), r"members: expected int64 \[B\], got bool \[2\]"),
        (torch.zeros(2, 1, dtype=torch.int64), r"members: expected int64 \[B\], got int64 \[2, 1\]"),
        (torch.tensor(0), r"members: expected int64 \[B\], got int64 \[\]"),
        ([0, 1], r"members: expected int64 \[B\], got list"),
        (torch.zeros(2, dtype=torch.int64, device="meta"), r"members: expected on cpu, .* got on meta"),
    ],
)
def test_wrong_members(members, message):
    population = trained(fresh(), mlp_config(), Noise())
    with pytest.raises(ValueError, match=message), population.perturbed(step=0, members=members):
        pass


@pytest.mark.parametrize("length", [0, 1, 3, 6])
def test_members_of_another_length_than_the_batch(length):
    population = trained(fresh(), mlp_config(), Noise())
    members, message = torch.zeros(length).long(), rf"members: .* row of up, int64 \[2\], got int64 \[{length}\]"
    with population.perturbed(step=0, members=members), pytest.raises(ValueError, match=message):
        population.module(**inputs("mlp", 2))


@pytest.mark.parametrize("form", [mlp_config(r=3), esengine.Direct(["up", "down"])], ids=["lora", "direct"])
@pytest.mark.parametrize("copies", [1, 2, 3])
@pytest.mark.parametrize("members", [[5, 0, 3, 2], [0, 1, 2, 3], [4, 4, 1], [7]], ids=str)
def test_copies_of_a_batch_are_stacked(copies, members, form):
    population = esengine.attach(fresh(), form, Noise(sigma=0.05, rank=2))
    for parameter in population.parameters().values():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    x, members = inputs("mlp", copies * len(members))["x"], torch.tensor(members)
    with torch.no_grad():
        with population.perturbed(step=1, members=members.repeat(copies)):
            expected = population.module(x)
        with population.perturbed(step=1, members=members, copies=copies):
            assert torch.equal(population.module(x), expected)
            assert population.perturbation.members.tolist() == [*members.tolist()] * copies
        for row in range(len(x)):
            with population.perturbed(step=1, members=members[row % len(members)][None]):
                assert relative(population.module(x[row : row + 1])[0], expected[row]) < 1e-5


@pytest.mark.parametrize(("rows", "copies"), [(4, 1), (2, 2), (3, 2), (8, 2), (4, 3)])
def test_the_error_about_rows_names_copies(rows, copies):
    population = trained(fresh(), mlp_config(), Noise())
    message = rf"members: .* row of up, int64 \[{rows}\], got int64 \[2\] .*copies={copies}\b.* {2 * copies} rows"
    with (
        population.perturbed(step=0, members=torch.tensor([0, 1]), copies=copies),
        pytest.raises(ValueError, match=message),
    ):
        population.module(**inputs("mlp", rows))


@pytest.mark.parametrize("copies", [0, -1, 1.5, 2.0, True, None, "2"])
def test_wrong_copies(copies):
    population = trained(fresh(), mlp_config(), Noise())
    with (
        pytest.raises(ValueError, match="copies: expected an integer of at least 1"),
        population.perturbed(step=0, members=torch.tensor([0, 1]), copies=copies),
    ):
        pass
    with pytest.raises(RuntimeError, match="perturbation"):
        population.perturbation  # noqa: B018


@pytest.mark.parametrize("step", [-1, 1 << 32])
def test_a_step_out_of_range(step):
    population = trained(fresh(), mlp_config(), Noise())
    members = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="step: expected"), population.perturbed(step=step, members=members):
        pass
    with pytest.raises(ValueError, match="step: expected"):
        population.update(step=step, fitness=torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="step: expected"):
        population.member_state_dict(step=step, member=0)


def test_no_rows():
    population = trained(fresh(), mlp_config(), Noise())
    with torch.no_grad(), population.perturbed(step=0, members=torch.zeros(0, dtype=torch.int64)):
        assert population.module(torch.zeros(0, 3, 7)).shape == (0, 3, 5)


REFUSED = {
    "one bad name": (mlp_config(target_modules=["up", "nothing"]), ValueError, "'nothing' matches nothing in MLP"),
    "only bad names": (mlp_config(target_modules=["nothing"]), ValueError, "nothing"),
    "bad regex": (mlp_config(target_modules=r"no\.such.*"), ValueError, r"no\\?\.such"),
    "all excluded": (mlp_config(exclude_modules=["up", "down"]), ValueError, "exclude"),
    "convolution": (
        mlp_config(target_modules=["up", "conv"]),
        TypeError,
        "dense torch.nn.Linear at 'conv', got Conv2d",
    ),
    "embedding": (mlp_config(target_modules=["up", "table"]), TypeError, "at 'table', got Embedding"),
    "norm": (mlp_config(target_modules=["norm"]), TypeError, "at 'norm', got LayerNorm"),
    "attention": (mlp_config(target_modules=["attention"]), TypeError, "at 'attention', got MultiheadAttention"),
    "inside attention": (mlp_config(target_modules=["up", "out_proj"]), TypeError, "NonDynamicallyQuantizableLinear"),
    "dropout": (mlp_config(lora_dropout=0.1), ValueError, "config.lora_dropout"),
    "dora": (mlp_config(use_dora=True), ValueError, "config.use_dora"),
    "bias": (mlp_config(bias="all"), ValueError, "config.bias"),
    "lora bias": (mlp_config(lora_bias=True), ValueError, "config.lora_bias"),
    "modules to save": (mlp_config(modules_to_save=["norm"]), ValueError, "config.modules_to_save"),
    "parameters": (mlp_config(target_parameters=["up.weight"]), ValueError, "config.target_parameters"),
    "initialisation": (mlp_config(init_lora_weights="pissa"), ValueError, "config.init_lora_weights"),
    "no config": ({"r": 2}, TypeError, "config: expected peft.LoraConfig or esengine.Direct, got dict"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_attach_refuses_leaves_the_module_as_it_was(name):
    config, error, message = REFUSED[name]
    module, kwargs = fresh(), inputs("mlp", 2)
    before, expected = snapshot(module), module(**kwargs)
    with pytest.raises(error, match=message):
        esengine.attach(module, config)
    assert_untouched(module, before)
    assert torch.equal(module(**kwargs), expected)
    esengine.attach(module, mlp_config()).detach()
    assert_untouched(module, before)


def test_attach_refuses_a_second_adapter_and_leaves_the_first():
    population, kwargs = trained(fresh(), mlp_config(), Noise()), inputs("mlp", 2)
    with torch.no_grad():
        expected = population.module(**kwargs)
        with pytest.raises(ValueError, match="module: expected one without an adapter"):
            esengine.attach(population.module, mlp_config())
        assert torch.equal(population.module(**kwargs), expected)


def test_attach_refuses_an_unknown_backend():
    with pytest.raises(ValueError, match="backend: expected auto, triton or torch, got cuda"):
        esengine.attach(fresh(), mlp_config(), backend="cuda")


def test_clashing_streams_are_an_error(monkeypatch):
    import esengine.es.population as module

    streams = module.linear_streams
    monkeypatch.setattr(module, "linear_streams", lambda name, **form: streams("up")._replace(b_u=len(name)))
    mlp = fresh()
    before = snapshot(mlp)
    with pytest.raises(ValueError, match="stream ids: down and up clash"):
        esengine.attach(mlp, mlp_config())
    assert_untouched(mlp, before)


def test_default_targets_are_pefts():
    """target_modules left out: PEFT knows the architecture."""
    population = esengine.attach(fresh("bert"), LoraConfig(r=2))
    peft = get_peft_model(fresh("bert"), LoraConfig(r=2))
    assert {f"base_model.model.{name}" for name in population.layers} == {
        name for name, module in peft.named_modules() if hasattr(module, "lora_A")
    }


def test_all_linear_layers_as_peft_finds_them():
    population = esengine.attach(fresh("bert"), LoraConfig(r=2, target_modules="all-linear"))
    peft = get_peft_model(fresh("bert"), LoraConfig(r=2, target_modules="all-linear"))
    assert {f"base_model.model.{name}" for name in population.layers} == {
        name for name, module in peft.named_modules() if hasattr(module, "lora_A")
    }


def test_a_target_that_is_excluded_by_name_is_no_error():
    population = esengine.attach(fresh(), mlp_config(exclude_modules=["down"]))
    assert list(population.layers) == ["up"]


def test_a_state_whose_moments_are_of_unknown_layers_changes_nothing():
    rule = UpdateRule(optimizer="momentum")
    population, other = (trained(fresh(), mlp_config(), Noise(), rule=rule) for _ in range(2))
    other.update(step=3, fitness=torch.tensor([3.0, -1.0]))
    state, before = other.state_dict(), adapter_of(population)
    state["optimizer"]["more.lora_A.weight.momentum_buffer"] = torch.zeros(2, 7)
    with pytest.raises((ValueError, KeyError)):
        population.load_state_dict(state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter_of(population).items())


def test_the_callers_config_is_not_changed():
    config = mlp_config()
    before = copy.deepcopy(config.to_dict())
    esengine.attach(fresh(), config)
    assert config.to_dict() == before
    assert getattr(config, "_custom_modules", None) is None


def test_attach_depends_on_the_seed_alone():
    def adapter(seed, kind="mlp"):
        population = esengine.attach(fresh(), mlp_config(), Noise(seed=seed))
        return {name: p.data for name, p in population.parameters().items()}

    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    one = adapter(7)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(6)
    two, other = adapter(7), adapter(8)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["up.lora_A.weight"], other["up.lora_A.weight"])
    assert not one["up.lora_B.weight"].any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_attach_leaves_the_generator_of_the_gpu_alone():
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    esengine.attach(fresh().cuda(), mlp_config())
    assert torch.equal(torch.cuda.get_rng_state(), state)


@pytest.mark.parametrize("kind", BUILD)
def test_detach_gives_back_the_module(kind):
    module, kwargs = fresh(kind), inputs(kind, 2)
    config = CASES[
        {"mlp": "mlp r1 k1", "sana": "sana reference run", "bert": "bert r4 k2", "gemma": "gemma r2 k3"}[kind]
    ][1]
    before = snapshot(module)
    with torch.no_grad():
        expected = outputs(module, kwargs)
        population = trained(module, config, Noise())
        assert not any(p.requires_grad for p in module.parameters())
        assert not torch.equal(outputs(module, kwargs), expected)
        assert population.detach() is module
        assert_untouched(module, before)
        assert torch.equal(outputs(module, kwargs), expected)
    for spent in (
        lambda: population.detach(),
        lambda: population.update(step=0, fitness=torch.tensor([1.0, 0.0])),
        lambda: population.member_state_dict(step=0, member=0),
        lambda: population.perturbed(step=0, members=torch.tensor([0])).__enter__(),
    ):
        with pytest.raises(RuntimeError, match="detached"):
            spent()


def test_detach_inside_perturbed_is_refused():
    population = trained(fresh(), mlp_config(), Noise())
    with population.perturbed(step=0, members=torch.tensor([0, 1])):
        with pytest.raises(RuntimeError, match="inside perturbed"):
            population.detach()
        assert population.layers


@pytest.mark.parametrize(
    "case", ["mlp r8 k4 patterns", "mlp r3 k2 rslora", "mlp regex", "bert r4 k2", "sana r8 k4 patterns"]
)
def test_peft_reads_the_saved_adapter(tmp_path, case):
    kind, config, rank = CASES[case]
    population, kwargs = trained(fresh(kind), config, Noise(rank=rank)), inputs(kind, 3)
    population.save_pretrained(tmp_path / "run" / "adapter")
    population.save_pretrained(str(tmp_path / "run" / "adapter"))
    files = sorted(path.name for path in (tmp_path / "run" / "adapter").iterdir())
    assert files == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    peft = PeftModel.from_pretrained(fresh(kind), tmp_path / "run" / "adapter").eval()
    assert not any(isinstance(module, PopulationLinear) for module in peft.modules())
    with torch.no_grad():
        expected = outputs(population.module, kwargs)
        assert torch.equal(outputs(peft, kwargs), expected)
        assert relative(outputs(fresh(kind), kwargs), expected) > 1e-3


@pytest.mark.parametrize("at", [0, 1])
def test_a_full_disk_leaves_every_file_of_the_folder_whole(tmp_path, monkeypatch, at):
    trained(fresh(), mlp_config(), Noise()).save_pretrained(tmp_path)
    names = ("adapter_model.safetensors", "adapter_config.json")
    before, calls = {name: (tmp_path / name).read_bytes() for name in names}, []

    def full(file):
        calls.append(file)
        if len(calls) > 2 * at:  # of a file, then of its folder
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        trained(fresh(), mlp_config(r=5), Noise()).save_pretrained(tmp_path)
    assert caught.value.filename == str(tmp_path / names[at])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["README.md", *names])
    assert (tmp_path / names[1]).read_bytes() == before[names[1]]
    assert ((tmp_path / names[0]).read_bytes() == before[names[0]]) == (at == 0)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_state_round_trip_continues_bit_for_bit(optimizer):
    noise, rule = Noise(sigma=0.1, rank=2, seed=3), UpdateRule(optimizer=optimizer, lr_scale=2.0, max_norm=3.0)
    fitness = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))

    def run(population, steps):
        for step in steps:
            population.update(step=step, fitness=fitness[step])

    whole = esengine.attach(fresh(), mlp_config(), noise, rule=rule)
    run(whole, range(6))
    first = esengine.attach(fresh(), mlp_config(), noise, rule=rule)
    run(first, range(3))
    state = first.state_dict()
    frozen = copy.deepcopy(state)
    run(first, range(3, 6))
    second = esengine.attach(fresh(), mlp_config(), noise, rule=rule)
    run(second, [5, 4])  # whatever it did before is forgotten
    second.load_state_dict(state)
    run(second, range(3, 6))
    for population in (first, second):
        mine, expected = population.state_dict(), whole.state_dict()
        for part in ("adapter", "optimizer"):
            assert mine[part].keys() == expected[part].keys()
            assert all(torch.equal(mine[part][name], tensor) for name, tensor in expected[part].items())
    # the state is a copy: neither run has written into it
    for part in ("adapter", "optimizer"):
        assert all(torch.equal(state[part][name], tensor) for name, tensor in frozen[part].items())


def adapter_of(population):
    return {name: p.detach().clone() for name, p in population.parameters().items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["noise"].update(sigma=0.5), "state: expected noise .*, got .*0.5"),
        (lambda s: s["noise"].update(rank=2), "state: expected noise"),
        (lambda s: s["noise"].update(seed=9), "state: expected noise"),
        (lambda s: s["noise"].update(contract=2), "state: expected noise"),
        (lambda s: s["adapter"].pop("down.lora_B.weight"), r"state: layers differ .* down.lora_B.weight \[5, 2\]"),
        (lambda s: s["adapter"].update({"up.lora_A.weight": torch.zeros(3, 7)}), "state: layers differ .* up.lora_A"),
        (
            lambda s: s["adapter"].update({"more.lora_A.weight": torch.zeros(3, 7)}),
            "state: layers differ .* more.lora_A",
        ),
    ],
)
def test_a_state_of_another_population_is_refused(change, message):
    rule = UpdateRule(optimizer="momentum")
    population = trained(fresh(), mlp_config(), Noise(), rule=rule)
    population.update(step=0, fitness=torch.tensor([1.0, -1.0]))
    other = trained(fresh(), mlp_config(), Noise(), rule=rule)
    other.update(step=3, fitness=torch.tensor([3.0, -1.0]))
    state, before = other.state_dict(), population.state_dict()
    change(state)
    with pytest.raises(ValueError, match=message):
        population.load_state_dict(state)
    for part in ("adapter", "optimizer"):
        assert all(torch.equal(population.state_dict()[part][name], tensor) for name, tensor in before[part].items())


@pytest.mark.parametrize("rule", ["momentum", "adam"])
def test_a_state_of_another_optimizer_is_refused(rule):
    """Its moments mean something else: a resumed run would not be the run."""
    other = trained(fresh(), mlp_config(), Noise(), rule=UpdateRule(optimizer=rule))
    other.update(step=3, fitness=torch.tensor([3.0, -1.0]))
    population = trained(fresh(), mlp_config(), Noise())
    population.update(step=0, fitness=torch.tensor([1.0, -1.0]))
    before = adapter_of(population)
    with pytest.raises(ValueError, match="state"):
        population.load_state_dict(other.state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter_of(population).items())


@pytest.mark.parametrize("n", [2, 6, 200])
def test_the_update_is_the_fitness_weighted_mean_of_the_members(n):
    noise = Noise(sigma=0.05, rank=2, seed=6)
    rule = UpdateRule(lr_scale=0.7, max_norm=None)
    population = trained(fresh(), mlp_config(r=3), noise, rule=rule)
    fitness = torch.randn(n, generator=torch.Generator().manual_seed(n))
    theta = adapter_of(population)
    mean = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in theta.items()}
    for member in range(n):
        state = population.member_state_dict(step=4, member=member)
        for name in mean:
            # E_i from the member's own weights: (theta_i - theta) / sigma
            unit = (state[f"base_model.model.{name}"].double() - theta[name].double()) / noise.sigma
            mean[name] += float(fitness[member]) * unit / n
    gradient = population.gradient(step=4, fitness=fitness)
    stats = population.update(step=4, fitness=fitness)
    for name, parameter in population.parameters().items():
        assert relative(gradient[name].double(), mean[name]) < 2e-5
        step = parameter.double() - theta[name].double()
        assert relative(step, 0.7 * 0.05 * mean[name]) < 1e-4  # of a step that is rounded to theta's last place
    norm = math.sqrt(sum(float(m.square().sum()) for m in mean.values()))
    assert stats.gradient_norm == pytest.approx(norm, rel=1e-4)
    assert stats.step_norm == pytest.approx(0.7 * 0.05 * norm, rel=1e-4)


def test_the_gradient_does_not_depend_on_other_targets():
    """Adding a target changes no other tensor's noise."""
    fitness = torch.randn(8, generator=torch.Generator().manual_seed(0))
    one = trained(fresh(), mlp_config(target_modules=["up"]), Noise()).gradient(step=1, fitness=fitness)
    two = trained(fresh(), mlp_config(), Noise()).gradient(step=1, fitness=fitness)
    assert all(torch.equal(two[name], tensor) for name, tensor in one.items())
    assert len(two) == 2 * len(one)


@pytest.mark.parametrize(
    ("fitness", "message"),
    [
        (torch.tensor([1.0, float("nan")]), "fitness: expected finite values, got nan"),
        (torch.tensor([1.0, float("inf"), 0.0, 0.0]), "fitness: expected finite values, got inf"),
        (torch.tensor([1.0, 2.0, 3.0]), r"fitness: expected float32 \[N\] with N even, got float32 \[3\]"),
        (torch.zeros(0), r"fitness: .* got float32 \[0\]"),
        (torch.zeros(2, 2), r"fitness: .* got float32 \[2, 2\]"),
        (torch.zeros(2, dtype=torch.float64), r"fitness: .* got float64 \[2\]"),
        (torch.zeros(2, dtype=torch.int64), r"fitness: .* got int64 \[2\]"),
    ],
)
def test_wrong_fitness_leaves_the_adapter(fitness, message):
    population = trained(fresh(), mlp_config(), Noise(), rule=UpdateRule(optimizer="adam"))
    population.update(step=0, fitness=torch.tensor([1.0, -1.0]))
    before = population.state_dict()
    with pytest.raises(ValueError, match=message):
        population.update(step=1, fitness=fitness)
    for part in ("adapter", "optimizer"):
        assert all(torch.equal(population.state_dict()[part][name], tensor) for name, tensor in before[part].items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(sigma=0.0), "sigma: expected a positive number, got 0.0"),
        (dict(sigma=float("nan")), "sigma: expected a positive number, got nan"),
        (dict(rank=0), "rank: expected at least 1, got 0"),
        (dict(seed=-1), "seed: expected an integer"),
        (dict(seed=1 << 64), "seed: expected an integer"),
    ],
)
def test_wrong_noise_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Noise(**settings)


def test_autocast_is_left_outside():
    population = trained(fresh(), mlp_config(), Noise(sigma=0.05))
    members, x = torch.tensor([0, 1]), inputs("mlp", 2)
    with torch.no_grad(), population.perturbed(step=1, members=members):
        expected = population.module(**x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert relative(population.module(**x).float(), expected) < 2e-2


def test_the_default_dtype_has_no_say():
    population = trained(fresh(), mlp_config(), Noise(sigma=0.05))
    expected = population.member_state_dict(step=1, member=3)
    gradient = population.gradient(step=1, fitness=torch.tensor([1.0, -2.0]))
    torch.set_default_dtype(torch.bfloat16)
    try:
        again = population.member_state_dict(step=1, member=3)
        repeated = population.gradient(step=1, fitness=torch.tensor([1.0, -2.0], dtype=torch.float32))
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(again[name], expected[name]) for name in expected)
    assert all(torch.equal(repeated[name], gradient[name]) for name in gradient)


def test_a_gradient_that_overflows_changes_nothing():
    population = trained(fresh(), mlp_config(), Noise(sigma=0.05), rule=UpdateRule(optimizer="adam"))
    population.update(step=0, fitness=torch.tensor([1.0, -1.0]))
    before = population.state_dict()
    with pytest.raises(UpdateError, match="gradient: expected a finite norm"):
        population.update(step=1, fitness=torch.tensor([3e38, -3e38]))
    after = population.state_dict()
    for part in ("adapter", "optimizer"):
        assert all(torch.equal(after[part][name], before[part][name]) for name in before[part])


def test_an_update_inside_inference_mode_is_one_like_any_other():
    population = trained(fresh(), mlp_config(), Noise(sigma=0.05), rule=UpdateRule(optimizer="momentum"))
    twin = trained(fresh(), mlp_config(), Noise(sigma=0.05), rule=UpdateRule(optimizer="momentum"))
    fitness = torch.tensor([1.0, -1.0])
    with torch.inference_mode():
        population.update(step=0, fitness=fitness)
    twin.update(step=0, fitness=fitness)
    assert population.update(step=1, fitness=fitness) == twin.update(step=1, fitness=fitness)


def test_detach_with_a_parameter_that_came_later():
    module = fresh()
    population = trained(module, mlp_config(), Noise())
    module.late = torch.nn.Parameter(torch.zeros(1))
    assert population.detach() is module
    assert module.late.requires_grad


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_triton_without_a_gpu_is_refused():
    module = fresh()
    keys = list(module.state_dict())
    with pytest.raises(ValueError, match="backend: triton needs"):
        esengine.attach(module, mlp_config(), backend="triton")
    assert list(module.state_dict()) == keys


# ---- nothing is left without noise in silence


class Branches(torch.nn.Module):
    """Owners that treat `up` each in their way."""

    def __init__(self, how):
        super().__init__()
        self.how, self.up, self.down = how, torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x):
        if self.how == "ties":
            return self.up(torch.nn.functional.linear(x, self.up.weight)) + self.down(x)
        if self.how == "looks":
            x = x.to(self.up.weight.dtype).view(-1, self.up.weight.shape[1])
        if self.how == "reads":
            return self.down(torch.nn.functional.linear(x, self.up.weight, self.up.bias))
        return self.down(x if self.how == "skips" else self.up(x))

    def other(self, x):
        return type(self).forward(self, x)


FORMS = [LoraConfig(r=2, target_modules=["up", "down"]), esengine.Direct(target_modules=["up", "down"])]


@pytest.mark.parametrize("form", FORMS, ids=["lora", "direct"])
@pytest.mark.parametrize(
    ("how", "why"),
    [("reads", "reads its weight"), ("skips", "was not called"), ("ties", "computed with its weight too")],
)
def test_a_target_that_its_owner_never_calls_is_an_error_with_its_name(form, how, why):
    module = Branches(how)
    population = esengine.attach(module, form)
    with (
        pytest.raises(UnperturbedError, match="'up'") as caught,
        torch.no_grad(),
        population.perturbed(step=0, members=torch.arange(4)),
    ):
        module(torch.randn(4, 8))
    assert list(caught.value.layers) == ["up"]
    assert why in caught.value.layers["up"]
    module.how = "calls"
    with torch.no_grad(), population.perturbed(step=0, members=torch.arange(4)):
        assert module(torch.randn(1, 8).expand(4, 8)).std(0).min() > 0
    assert "forward" not in vars(module)


@pytest.mark.parametrize("form", FORMS, ids=["lora", "direct"])
@pytest.mark.parametrize("enter", [lambda m, x: m[0](x), lambda m, x: m[0].other(x)], ids=["submodule", "method"])
def test_a_part_of_the_module_is_enough_to_render_and_not_to_update(form, enter):
    module = torch.nn.Sequential(Branches("skips"))
    population, x = esengine.attach(module, form), torch.randn(4, 8)
    before = {name: p.clone() for name, p in population.parameters().items()}
    with torch.no_grad(), population.perturbed(step=0, members=torch.arange(4)):
        enter(module, x)
    fitness = torch.tensor([1.0, -1, 0.5, -0.5])
    with pytest.raises(UnperturbedError) as caught:
        population.update(step=0, fitness=fitness)
    assert list(caught.value.layers) == ["0.up"]
    assert all(torch.equal(p, before[name]) for name, p in population.parameters().items())
    module[0].how = "looks"  # asking for the weight's dtype and shape is no use of it
    with torch.no_grad(), population.perturbed(step=0, members=torch.arange(4)):
        enter(module, x)
    population.update(step=0, fitness=fitness)
    population.update(step=1, fitness=fitness)  # a replay renders nothing
    for how in ("ties", "reads"):
        module[0].how = how
        with (
            pytest.raises(UnperturbedError, match=r"'0\.up'"),
            torch.no_grad(),
            population.perturbed(step=0, members=torch.arange(4)),
        ):
            enter(module, x)


@pytest.mark.parametrize(
    "use", [lambda w: w.T, lambda w: torch.cat([w, w]), lambda w: w.to(torch.float64), torch.norm, lambda w: w.data + 1]
)
def test_every_computation_with_a_targets_weight_is_seen_and_gives_a_plain_tensor(use):
    module = Branches("calls")
    population = esengine.attach(module, FORMS[0])
    plain = use(module.up.weight)

    def run():
        with torch.no_grad(), population.perturbed(step=0, members=torch.arange(4)):
            used = use(module.up.weight)
            assert type(used) is torch.Tensor
            assert torch.equal(used, plain)
            module(torch.randn(4, 8))

    with pytest.raises(UnperturbedError, match="'up'"):
        run()


@pytest.mark.parametrize("form", FORMS, ids=["lora", "direct"])
def test_adapters_switched_off_are_off_and_an_update_is_an_error(form):
    population = esengine.attach(Branches("calls"), form)
    before = {name: p.clone() for name, p in population.parameters().items()}
    for layer in population.layers.values():
        layer.enable_adapters(False)
    with torch.no_grad(), population.perturbed(step=0, members=torch.arange(4)):
        assert population.module(torch.randn(1, 8).expand(4, 8)).std(0).max() == 0
    with pytest.raises(UnperturbedError, match="switched off"):
        population.update(step=0, fitness=torch.tensor([1.0, -1, 0.5, -0.5]))
    assert all(torch.equal(p, before[name]) for name, p in population.parameters().items())


def test_a_merged_or_replaced_adapter_is_refused_until_it_is_back():
    population = esengine.attach(Branches("calls"), FORMS[0], esengine.Noise(sigma=0.5))
    population.update(step=0, fitness=torch.tensor([1.0, -1, 2, -2]))
    layer, x, members = population.module.up, torch.randn(4, 8), torch.arange(4)

    def render():
        with torch.no_grad(), population.perturbed(step=0, members=members):
            return population.module(x)

    before = render()
    layer.merge()
    with pytest.raises(RuntimeError, match="'up' is merged"):
        render()
    layer.unmerge()
    layer.update_layer("second", 2, 4, config=LoraConfig(r=2, lora_alpha=4))
    layer.set_adapter("second")
    with pytest.raises(RuntimeError, match="'up' is not the active one, which is second"):
        render()
    layer.set_adapter("default")
    assert torch.allclose(render(), before, atol=1e-5)


@pytest.mark.parametrize(
    "use",
    [
        lambda w, x: x.to(w),
        lambda w, x: x.type_as(w),
        lambda w, x: x + w.new_zeros(8),
        lambda w, x: x + 0 * torch.zeros_like(w)[0],
        lambda w, x: x.view_as(x) if w.dim() == w.ndim and w.size(0) == 8 and w.device == x.device else None,
        lambda w, x: x.to(w.data.dtype).to(w.detach()),
    ],
)
def test_a_weight_may_lend_its_dtype_device_and_shape(use):
    module = Branches("calls")
    population = esengine.attach(module, FORMS[0])
    with torch.no_grad(), population.perturbed(step=0, members=torch.arange(4)):
        module(use(module.up.weight, torch.randn(4, 8)))


@pytest.mark.parametrize(
    "use",
    [
        lambda w: torch.zeros(8, 8).__setitem__(slice(None), w),
        lambda w: w.tolist(),
        lambda w: w.numpy(),
        lambda w: torch.equal(w, w),
        lambda w: w.new_tensor(w),
        lambda w: w.data_ptr(),
        lambda w: w.sum().item(),
    ],
)
def test_a_use_of_a_weight_that_gives_no_tensor_is_seen_too(use):
    population = esengine.attach(Branches("calls"), FORMS[0])

    def run():
        with torch.no_grad(), population.perturbed(step=0, members=torch.arange(4)):
            use(population.module.up.weight)
            population.module(torch.randn(4, 8))

    with pytest.raises(UnperturbedError, match="'up'"):
        run()


def test_looks_are_no_uses_for_a_compiler():
    population = esengine.attach(Branches("looks"), FORMS[0])
    compiled, x = torch.compile(population.module, backend="eager"), torch.randn(4, 8)
    with torch.no_grad(), population.perturbed(step=0, members=torch.arange(4)):
        assert torch.allclose(compiled(x), population.module(x), atol=1e-6)


class OwnEncoder(torch.nn.TransformerEncoderLayer):
    def forward(self, x):
        return self.linear1(x) + torch.nn.functional.linear(x, self.linear1.weight)


def test_an_encoder_layer_of_ones_own_is_watched_as_any_module():
    population = esengine.attach(OwnEncoder(8, 2, 16), LoraConfig(r=2, target_modules=["linear1"]))
    with (
        pytest.raises(UnperturbedError, match="computed with its weight too"),
        torch.no_grad(),
        population.perturbed(step=0, members=torch.arange(4)),
    ):
        population.module(torch.randn(4, 8))


CHANGES = {
    "hook": lambda linear: linear.register_forward_hook(lambda module, args, y: 10 * y),
    "pre-hook": lambda linear: linear.register_forward_pre_hook(lambda module, args: (10 * args[0],)),
    "forward": lambda linear: setattr(linear, "forward", lambda x: 10 * x),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("form", FORMS, ids=["lora", "direct"])
def test_a_linear_with_a_hook_or_a_forward_of_its_own_is_refused_before_and_after(form, change):
    module = Branches("calls")
    CHANGES[change](module.up)
    with pytest.raises(TypeError, match="'up', got one with a hook or a forward of its own"):
        esengine.attach(module, form)
    population = esengine.attach(Branches("calls"), form)
    CHANGES[change](population.module.up.base_layer)
    with pytest.raises(RuntimeError, match="'up' has a base layer with a hook"):
        render(population)
    # a hook on the target itself runs as on any module
    population = esengine.attach(Branches("calls"), form, esengine.Noise(sigma=1e-8))
    x = torch.randn(1, 8).expand(4, 8)
    population.module.up.register_forward_hook(lambda module, args, y: 10 * y)
    with torch.no_grad():
        assert torch.allclose(render(population, x), population.module(x), atol=1e-5)


def render(population, x=None):
    with torch.no_grad(), population.perturbed(step=0, members=torch.arange(4)):
        return population.module(torch.randn(4, 8) if x is None else x)


def test_nothing_moves_or_leaves_while_an_adapter_is_merged():
    population = esengine.attach(Branches("calls"), FORMS[0], esengine.Noise(sigma=0.5))
    fitness, layer = torch.tensor([1.0, -1, 2, -2]), population.module.up
    population.update(step=0, fitness=fitness)
    frozen, state = layer.base_layer.weight.clone(), population.state_dict()
    layer.merge()
    for call in (
        lambda: population.update(step=1, fitness=fitness),
        lambda: population.load_state_dict(state),
        population.detach,
    ):
        with pytest.raises(RuntimeError, match="'up' is merged into the weight"):
            call()
    layer.unmerge()
    population.update(step=1, fitness=fitness)
    assert torch.allclose(population.detach().up.weight, frozen, atol=1e-6)


@pytest.mark.parametrize("nested", [False, True])
def test_torchs_fused_encoder_layer_is_named(nested):
    encoder = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    module = torch.nn.Sequential(encoder) if nested else encoder
    population, x = (
        esengine.attach(module, LoraConfig(r=2, target_modules=["linear1", "linear2"])),
        torch.randn(2, 3, 8),
    )
    with (
        pytest.raises(UnperturbedError) as caught,
        torch.no_grad(),
        population.perturbed(step=0, members=torch.tensor([0, 1])),
    ):
        module(x)
    assert [name.rpartition(".")[2] for name in caught.value.layers] == ["linear1", "linear2"]
    assert all("set_fastpath_enabled" in why for why in caught.value.layers.values())
    module.train()
    with torch.no_grad(), population.perturbed(step=0, members=torch.tensor([0, 1])):
        module(x)


def test_an_error_inside_is_not_hidden_by_that_of_a_target():
    population = esengine.attach(Branches("skips"), FORMS[0])

    def run():
        with torch.no_grad(), population.perturbed(step=0, members=torch.arange(4)):
            population.module(torch.randn(4, 8))
            raise KeyError("mine")

    with pytest.raises(KeyError):
        run()


@pytest.mark.parametrize("form", FORMS, ids=["lora", "direct"])
def test_one_linear_with_two_owners_is_refused_and_a_shared_owner_is_not(form):
    up = torch.nn.Linear(8, 8)
    module = torch.nn.ModuleDict({"a": torch.nn.ModuleDict({"up": up}), "b": torch.nn.ModuleDict({"up": up})})
    module["b"]["down"] = torch.nn.Linear(8, 8)
    with pytest.raises(ValueError, match=r"'a\.up' and 'b\.up' are one Linear"):
        esengine.attach(module, form)
    assert module["a"]["up"] is module["b"]["up"] is up
    assert not hasattr(module, "peft_config")
    block = torch.nn.Sequential(torch.nn.Linear(8, 8))
    shared = torch.nn.Sequential(block, block)
    population = esengine.attach(shared, LoraConfig(r=2, target_modules=["0.0"]), esengine.Noise(sigma=0.1))
    x, members = torch.randn(2, 8), torch.tensor([0, 1])
    with torch.no_grad(), population.perturbed(step=3, members=members):
        both = shared(x)
    for row, member in enumerate(members.tolist()):
        merged = population.member_state_dict(step=3, member=member)
        a, b = (merged[f"base_model.model.0.0.lora_{side}.weight"] for side in "AB")
        linear = block[0].base_layer
        weight = linear.weight + population.layers["0.0"].scale * b @ a
        once = torch.nn.functional.linear(x[row], weight, linear.bias)
        assert torch.allclose(both[row], torch.nn.functional.linear(once, weight, linear.bias), atol=1e-6)


@pytest.mark.parametrize("form", FORMS, ids=["lora", "direct"])
def test_an_adapter_on_a_module_below_is_refused_and_untouched(form):
    below = Branches("calls")
    esengine.attach(below, LoraConfig(r=4, target_modules=["up"]))
    for parameter in below.parameters():
        parameter.data.normal_()
    module = torch.nn.Sequential(below)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError, match="without an adapter, got one at '0'"):
        esengine.attach(module, form)
    after = module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_layers_are_in_the_mode_of_the_module_they_are_on():
    for mode in (True, False):
        module = Branches("calls").train(mode)
        population = esengine.attach(module, FORMS[0])
        assert {each.training for each in module.modules()} == {mode}
        population.detach()


@pytest.mark.parametrize("form", FORMS, ids=["lora", "direct"])
def test_noise_that_was_made_in_inference_mode_serves_the_update(form):
    fitness = torch.tensor([1.0, -1, 2, -2])
    moved = []
    for mode in (torch.inference_mode, torch.no_grad):
        torch.manual_seed(0)
        population = esengine.attach(Branches("calls"), form)
        with mode(), population.perturbed(step=0, members=torch.arange(4)):
            population.module(torch.randn(4, 8))
        population.update(step=0, fitness=fitness)
        moved.append({name: p.clone() for name, p in population.parameters().items()})
    assert all(torch.equal(moved[0][name], moved[1][name]) for name in moved[0])


SEQUENCES = {
    "list": list,
    "tuple": tuple,
    "numpy": np.array,
    "numpy float64": lambda values: np.array(values, np.float64),
    "numpy float16": lambda values: np.array(values, np.float16),
    "numpy big-endian": lambda values: np.array(values, ">f4"),
    "numpy of integers": lambda values: (np.array(values) * 4).astype(np.int8),
    "list of tensors": lambda values: [torch.tensor(each) for each in values],
}


@pytest.mark.parametrize("kind", SEQUENCES)
def test_fitness_may_be_any_sequence_of_numbers(kind):
    values = [0.5, -0.25, 1.0, 0.75]
    scale = 4 if kind == "numpy of integers" else 1
    one, other = (trained(fresh(), mlp_config(), Noise()) for _ in range(2))
    expected = one.update(step=0, fitness=scale * torch.tensor(values))
    assert other.update(step=0, fitness=SEQUENCES[kind](values)) == expected
    for name, tensor in one.state_dict()["adapter"].items():
        assert torch.equal(other.state_dict()["adapter"][name], tensor)


@pytest.mark.parametrize(
    ("fitness", "error"),
    [
        (None, TypeError),
        (1.0, TypeError),
        ("1234", TypeError),
        (["1", "2"], TypeError),
        ([None, 1.0], TypeError),
        ([True, False], TypeError),
        (np.array([1j, 2j]), TypeError),
        ({0: 1.0, 1: 2.0}, TypeError),
        ([[1.0], [1.0, 2.0]], TypeError),
        (iter([1.0, 2.0]), TypeError),
        ([1e39, 1.0], ValueError),
        ([10**400, 1], TypeError),
        ([float("nan"), 1.0], ValueError),
        (np.ma.masked_equal([1.0, 2.0], 1.0), ValueError),
        ([1.0], ValueError),
        ([], ValueError),
        ([[1.0, 2.0]], ValueError),
    ],
    ids=lambda value: repr(value).partition(" at 0x")[0][:60],
)
def test_fitness_of_no_numbers_is_named(fitness, error):
    population = trained(fresh(), mlp_config(), Noise())
    before = population.state_dict()["adapter"]
    with pytest.raises(error, match="fitness: expected"):
        population.update(step=0, fitness=fitness)
    assert all(torch.equal(population.state_dict()["adapter"][name], tensor) for name, tensor in before.items())
