"""ES from an existing LoRA: PEFT's and diffusers' folders in, the same function out; what is refused, and why."""

import json
import math

import pytest
import torch
from diffusers import SanaTransformer2DModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import esengine
from esengine import Direct, Noise, UpdateRule
from esengine.es.lora_folder import lora_files

TARGETS = ["up", "down", "point"]


class Net(nn.Module):
    """x [B, T, 6]: a Linear, a Conv1D and a 1x1 convolution."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.point, self.norm = nn.Linear(6, 9), Conv1D(7, 9), nn.Conv2d(7, 4, 1), nn.LayerNorm(4)
        self.down.weight.data.normal_(std=0.4)

    def forward(self, x):
        y = self.down(torch.tanh(self.up(x)))
        return self.norm(self.point(y.mT[..., None]).squeeze(-1).mT)


def fresh(build=Net):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval()


def x_of(rows=3):
    return torch.randn(rows, 5, 6, generator=torch.Generator().manual_seed(1))


def drawn(peft):
    """A PEFT model with A and B that are not nought."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return peft.eval()


def saved(path, **changes):
    """A PEFT folder on the targets, and what the module computes with it."""
    peft = drawn(get_peft_model(fresh(), LoraConfig(**({"r": 2, "target_modules": TARGETS} | changes))))
    peft.save_pretrained(path)
    with torch.no_grad():
        return peft(x_of())


def population(**changes):
    changes = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS} | changes
    return esengine.attach(fresh(), LoraConfig(**changes), Noise(sigma=0.1, seed=3))


def theta(each):
    return {name: parameter.detach().clone() for name, parameter in each.parameters().items()}


def relative(got, expected):
    return float((got.double() - expected.double()).norm() / expected.double().norm())


ADAPTERS = {
    "plain": {},
    "alpha": {"lora_alpha": 13},
    "no effect": {"lora_alpha": 0},
    "rslora": {"lora_alpha": 5, "use_rslora": True, "r": 3},
    "patterns": {"r": 2, "rank_pattern": {"up": 4, "point": 1}, "alpha_pattern": {"down": 3.5}},
    "regular expressions": {"alpha_pattern": {r".*(up|point)": 3, "^down": 7}, "rank_pattern": {r"[du].*n|up": 3}},
    "first pattern counts": {"alpha_pattern": {"p": 99, ".*p": 3, "up": 5}},
    "rslora and patterns": {"use_rslora": True, "rank_pattern": {"up": 3}, "alpha_pattern": {"up": 2}},
    "dropout": {"lora_dropout": 0.5},
    "gaussian": {"init_lora_weights": "gaussian"},
    "same rank": {"r": 4, "lora_alpha": 6},
}
OWN = {
    "larger": {},
    "rslora": {"use_rslora": True},
    "patterns": {"r": 5, "rank_pattern": {"up": 8}, "alpha_pattern": {"point": 1, "down": 0.25}},
}


@pytest.mark.parametrize("own", OWN)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_function_of_a_peft_folder_is_the_populations(adapter, own, tmp_path):
    expected = saved(tmp_path, **ADAPTERS[adapter])
    each = population(**OWN[own])
    started, scales = theta(each), {name: layer.scale for name, layer in each.layers.items()}
    each.load_lora(tmp_path)
    assert {name: layer.scale for name, layer in each.layers.items()} == scales
    file = load_file(tmp_path / "adapter_model.safetensors")
    for name, now in theta(each).items():
        if name.endswith("lora_A.weight"):
            rank = len(file[f"base_model.model.{name}"])
            assert torch.equal(now[:rank], file[f"base_model.model.{name}"])
            assert torch.equal(now[rank:], started[name][rank:])
        else:
            assert not now[:, file[f"base_model.model.{name}"].shape[1] :].any()
    with torch.no_grad():
        assert relative(each.module(x_of()), expected) < 1e-6
        if adapter != "no effect":
            assert relative(fresh()(x_of()), expected) > 1e-2
        each.save_pretrained(tmp_path / "again")
        again = PeftModel.from_pretrained(fresh(), tmp_path / "again").eval()
        assert relative(again(x_of()), expected) < 1e-6


def test_equal_settings_are_equal_bits(tmp_path):
    one = population()
    state = one.state_dict()
    for name, tensor in state["adapter"].items():
        state["adapter"][name] = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name)))
    one.load_state_dict(state)
    one.save_pretrained(tmp_path)
    two = population()
    two.load_lora(str(tmp_path))
    assert all(torch.equal(tensor, theta(one)[name]) for name, tensor in theta(two).items())


def test_direct_takes_the_product(tmp_path):
    expected = saved(tmp_path / "lora", lora_alpha=5, use_rslora=True)
    one, two = (esengine.attach(fresh(), Direct(TARGETS), Noise(sigma=0.1)) for _ in range(2))
    one.load_lora(tmp_path / "lora")
    with torch.no_grad():
        assert relative(one.module(x_of()), expected) < 1e-6
    one.save_pretrained(tmp_path / "direct")
    two.load_lora(tmp_path / "direct")
    assert all(torch.equal(tensor, theta(one)[name]) for name, tensor in theta(two).items())
    with torch.no_grad():
        assert torch.equal(two.module(x_of()), one.module(x_of()))


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_es_goes_on_from_it(optimizer, tmp_path):
    saved(tmp_path, lora_alpha=9)
    rule = UpdateRule(optimizer=optimizer)
    config = LoraConfig(r=3, target_modules=TARGETS)
    used, new = (esengine.attach(fresh(), config, Noise(sigma=0.1, seed=3), rule=rule) for _ in range(2))
    fitness = torch.tensor([1.0, -1, 0.5, 2])
    for name, parameter in used.parameters().items():
        assert torch.equal(parameter, new.parameters()[name])
    used.update(step=9, fitness=fitness)
    rows = {name: p.data.clone() for name, p in new.parameters().items()}
    for name, parameter in used.parameters().items():
        parameter.data.copy_(rows[name])
    for each in (used, new):
        each.load_lora(tmp_path)
        with torch.no_grad(), each.perturbed(step=0, members=torch.arange(3)):
            each.module(x_of())
        each.update(step=0, fitness=fitness)
    for part in ("adapter", "optimizer"):
        one, two = used.state_dict()[part], new.state_dict()[part]
        assert one.keys() == two.keys()
        assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_in_the_file(dtype, tmp_path):
    saved(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    each = population(r=2, lora_alpha=8)
    each.load_lora(tmp_path)
    for name, tensor in tensors.items():
        assert torch.equal(theta(each)[name.removeprefix("base_model.model.")], tensor.float())


# ---- diffusers


def sana():
    return SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=12,
        sample_size=4, patch_size=1, qk_norm="rms_norm_across_heads",
    )  # fmt: skip


SANA = {"target_modules": ["to_q", "to_v", "conv_point"]}


def render(transformer):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return transformer(
            torch.randn(2, 4, 4, 4, generator=generator), torch.randn(2, 6, 12, generator=generator),
            torch.ones(2), return_dict=False,
        )[0]  # fmt: skip


def sana_file(path, config, *, metadata=True, whole=True):
    """What diffusers saves of a transformer: by its pipeline, or of the transformer alone. What it computes with it."""
    from diffusers import SanaSprintPipeline

    transformer = fresh(sana)
    transformer.add_adapter(config)
    drawn(transformer)
    if not whole:
        transformer.save_lora_adapter(path)
    else:
        from peft.utils import get_peft_model_state_dict

        more = {"transformer_lora_adapter_metadata": transformer.peft_config["default"].to_dict()} if metadata else {}
        SanaSprintPipeline.save_lora_weights(
            path, transformer_lora_layers=get_peft_model_state_dict(transformer), **more
        )
    return render(transformer)


@pytest.mark.parametrize("whole", [True, False], ids=["pipeline", "transformer"])
@pytest.mark.parametrize(
    "changes", [{}, {"lora_alpha": 5}, {"lora_alpha": 5, "use_rslora": True}, {"rank_pattern": {"to_q": 3}}], ids=str
)
def test_a_diffusers_folder_with_metadata(changes, whole, tmp_path):
    expected = sana_file(tmp_path, LoraConfig(r=2, **SANA, **changes), whole=whole)
    for path in (tmp_path, tmp_path / "pytorch_lora_weights.safetensors"):
        each = esengine.attach(fresh(sana), LoraConfig(r=4, lora_alpha=6, **SANA))
        each.load_lora(path)
        assert relative(render(each.module), expected) < 1e-5
    assert relative(render(fresh(sana)), expected) > 1e-3


@pytest.mark.parametrize("alpha", [None, 3.0])
@pytest.mark.parametrize("spelling", [("lora_A", "lora_B"), ("lora.down", "lora.up"), ("lora_down", "lora_up")])
def test_without_metadata_alpha_is_the_files_or_r(alpha, spelling, tmp_path):
    """Without metadata a pipeline takes alpha = r, whatever the file was trained with."""
    config = LoraConfig(r=2, lora_alpha=alpha or 2, rank_pattern={} if alpha else {"to_q": 3}, **SANA)
    if not alpha:
        config.alpha_pattern = {"to_q": 3}
    expected = sana_file(tmp_path, config, metadata=False)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    tensors = load_file(file)
    assert tensors
    renamed = {
        name.replace("lora_A", spelling[0]).replace("lora_B", spelling[1]): tensor for name, tensor in tensors.items()
    }
    if alpha:
        renamed |= {
            f"{name.rpartition('.lora_A')[0]}.alpha": torch.tensor(alpha) for name in tensors if "lora_A" in name
        }
    save_file(renamed, file)
    each = esengine.attach(fresh(sana), LoraConfig(r=4, lora_alpha=6, **SANA))
    each.load_lora(tmp_path)
    assert relative(render(each.module), expected) < 1e-5


def test_names_that_a_compiled_module_left_in_a_file(tmp_path):
    expected = saved(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name.replace("up.", "_orig_mod.up."): tensor for name, tensor in load_file(file).items()}, file)
    each = population()
    each.load_lora(tmp_path)
    with torch.no_grad():
        assert relative(each.module(x_of()), expected) < 1e-6


# ---- refused


def tensors_of(change):
    def spoil(path):
        tensors = load_file(path / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, path / "adapter_model.safetensors")

    return spoil


def settings_of(**changes):
    def spoil(path):
        file = path / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return spoil


def pickled(path):
    torch.save(load_file(path / "adapter_model.safetensors"), path / "adapter_model.bin")
    (path / "adapter_model.safetensors").unlink()


UP = "base_model.model.up.lora_{}.weight"
REFUSED = {
    "larger rank": ({"r": 5}, None, "rank is 5 and the population's is 4"),
    "larger rank of one": ({"rank_pattern": {"down": 6}}, None, "'down'.*rank is 6"),
    "dora": ({"use_dora": True}, None, "use_dora|DoRA"),
    "dora, not said": ({}, tensors_of(lambda t: t.update({"base_model.model.up.lora_magnitude_vector": torch.ones(9)})),
                       "DoRA"),
    "bias": ({"bias": "lora_only"}, None, "bias"),
    "bias of b": ({"lora_bias": True}, None, "lora_bias"),
    "bias, not said": ({}, tensors_of(lambda t: t.update({"base_model.model.up.bias": torch.ones(9)})), "bias"),
    "modules to save": ({"modules_to_save": ["norm"]}, None, "modules_to_save"),
    "module, not said": ({}, tensors_of(lambda t: t.update({"base_model.model.norm.weight": torch.ones(4)})),
                         r"norm\.weight.*modules_to_save"),
    "another target": ({}, tensors_of(lambda t: t.update({
        UP.format("A").replace("up", "more"): torch.ones(2, 4), UP.format("B").replace("up", "more"): torch.ones(4, 2),
    })), "'more' is not a target"),
    "fewer targets": ({"target_modules": ["up", "down"]}, None, "no layer 'point'"),
    "a alone": ({}, tensors_of(lambda t: t.pop(UP.format("B"))), "'up': expected A and B"),
    "shape of a": ({}, tensors_of(lambda t: t.update({UP.format("A"): torch.ones(2, 5)})), "'up': expected A and B"),
    "shape of b": ({}, tensors_of(lambda t: t.update({UP.format("B"): torch.ones(9, 3)})), "'up': expected A and B"),
    "other rank than said": ({}, settings_of(r=3), "expected A of 3 rows"),
    "nan": ({}, tensors_of(lambda t: t[UP.format("A")].fill_(math.nan)), "'up': expected finite"),
    "infinite": ({}, tensors_of(lambda t: t[UP.format("B")].view(-1)[:1].fill_(math.inf)), "'up': expected finite"),
    "whole numbers": ({}, tensors_of(lambda t: t.update({UP.format("B"): torch.ones(9, 2).int()})), "floating"),
    "too large": ({"lora_alpha": 1000}, tensors_of(lambda t: t[UP.format("B")].fill_(3e38)), "float32"),
    "alpha nan": ({}, settings_of(lora_alpha=math.nan), "lora_alpha: expected a finite number"),
    "alpha of text": ({}, settings_of(lora_alpha="8"), "lora_alpha: expected a finite number"),
    "alpha true": ({}, settings_of(lora_alpha=True), "lora_alpha: expected a finite number"),
    "slow pattern": ({}, settings_of(alpha_pattern={"(a+)+b": 3}), "alpha_pattern"),
    "broken pattern": ({}, settings_of(alpha_pattern={"(a": 3}), "alpha_pattern"),
    "pattern of a list": ({}, settings_of(rank_pattern=["up"]), "rank_pattern"),
    "pissa": ({}, settings_of(init_lora_weights="pissa"), "init_lora_weights"),
    "another method": ({}, settings_of(peft_type="LOHA"), "peft_type"),
    "an option of later": ({}, settings_of(use_of_tomorrow=True), "use_of_tomorrow"),
    "layers replicated": ({}, settings_of(layer_replication=[[0, 1]]), "layer_replication"),
    "no json": ({}, lambda path: (path / "adapter_config.json").write_text("{"), "adapter_config.json.*JSON"),
    "json of a list": ({}, lambda path: (path / "adapter_config.json").write_text("[]"), "expected a mapping"),
    "no config": ({}, lambda path: (path / "adapter_config.json").unlink(), "adapter_config.json"),
    "no weights": ({}, lambda path: (path / "adapter_model.safetensors").unlink(), "pytorch_lora_weights.safetensors"),
    "cut": ({}, lambda path: (path / "adapter_model.safetensors").write_bytes(b"\x09" + bytes(20)), "[Hh]eader"),
    "pickle": ({}, pickled, r"adapter_model\.bin, a pickle"),
    "no prefix": ({}, tensors_of(lambda t: t.update({"up.lora_A.weight": t.pop(UP.format("A"))})), "base_model.model"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_continued_is_refused_with_the_reason(name, tmp_path):
    changes, spoil, message = REFUSED[name]
    saved(tmp_path, **changes)
    if spoil is not None:
        spoil(tmp_path)
    each = esengine.attach(fresh(), LoraConfig(r=4, target_modules=TARGETS), rule=UpdateRule(optimizer="momentum"))
    each.update(step=0, fitness=torch.tensor([1.0, -1.0]))
    before = each.state_dict()
    with pytest.raises(ValueError, match=message) as caught:
        each.load_lora(tmp_path)
    assert str(tmp_path) in str(caught.value)
    after = each.state_dict()
    for part in ("adapter", "optimizer"):
        assert all(torch.equal(tensor, after[part][key]) for key, tensor in before[part].items())


@pytest.mark.parametrize("missing", ["folder", "file.safetensors", "file.bin"])
def test_what_does_not_exist_is_named(missing, tmp_path):
    with pytest.raises(ValueError, match=missing.replace(".", r"\.")):
        population().load_lora(tmp_path / missing)


def test_a_diffusers_file_of_two_components_is_refused(tmp_path):
    sana_file(tmp_path, LoraConfig(r=2, **SANA))
    file = tmp_path / "pytorch_lora_weights.safetensors"
    more = {f"text_encoder.q.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    save_file(load_file(file) | more, file)
    with pytest.raises(ValueError, match="text_encoder and transformer"):
        esengine.attach(fresh(sana), LoraConfig(r=4, **SANA)).load_lora(tmp_path)


def test_alpha_in_metadata_and_in_tensors_is_refused(tmp_path):
    sana_file(tmp_path, LoraConfig(r=2, **SANA))
    file = tmp_path / "pytorch_lora_weights.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors)).rpartition(".lora_")[0]
    save_file(
        tensors | {f"{name}.alpha": torch.tensor(2.0)}, file,
        metadata={LORA_ADAPTER_METADATA_KEY: json.dumps({"transformer.r": 2, "transformer.lora_alpha": 4})},
    )  # fmt: skip
    each = esengine.attach(fresh(sana), LoraConfig(r=4, **SANA))
    with pytest.raises(ValueError, match="alpha"):
        each.load_lora(tmp_path)
    save_file(tensors | {f"{name}.alpha": torch.tensor(2.0)}, file)
    with pytest.raises(ValueError, match="alpha"):
        each.load_lora(tmp_path)


def test_it_is_not_loaded_at_the_wrong_time(tmp_path):
    saved(tmp_path)
    each = population()
    with each.perturbed(step=0, members=torch.arange(3)), pytest.raises(RuntimeError, match="inside perturbed"):
        each.load_lora(tmp_path)
    each.module.up.merge()
    with pytest.raises(RuntimeError, match="'up' is merged"):
        each.load_lora(tmp_path)
    each.module.up.unmerge()
    each.detach()
    with pytest.raises(RuntimeError, match="detached"):
        each.load_lora(tmp_path)


def both(folder, one=lambda tensors: tensors, settings=None):
    """A folder with the files of PEFT and of diffusers. `one` changes the latter's tensors."""
    saved(folder, lora_alpha=3)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors = {f"transformer.{key.removeprefix('base_model.model.')}": each for key, each in tensors.items()}
    tensors = {key: 1.5 * each if "lora_B" in key else each for key, each in tensors.items()}
    save_file(one(tensors), folder / "pytorch_lora_weights.safetensors", metadata=settings)


def test_of_two_files_that_are_one_lora_pefts_is_read(tmp_path):
    both(tmp_path)
    assert [file.name for file in lora_files(tmp_path)] == ["adapter_config.json", "adapter_model.safetensors"]
    one, two = population(), population()
    one.load_lora(tmp_path)
    (tmp_path / "pytorch_lora_weights.safetensors").unlink()
    two.load_lora(tmp_path)
    assert all(torch.equal(tensor, theta(one)[name]) for name, tensor in theta(two).items())


def test_the_same_change_by_other_factors_is_one_lora(tmp_path):
    both(tmp_path, lambda tensors: {k: 2 * each if "lora_A" in k else each / 2 for k, each in tensors.items()})
    population().load_lora(tmp_path)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda tensors: {key: each * 1.001 for key, each in tensors.items()}, "two"),
        (lambda tensors: {key: each.flip(0) if "lora_B" in key else each for key, each in tensors.items()}, "two"),
        (lambda tensors: {key: each for key, each in tensors.items() if ".up." not in key}, "up"),
        (lambda tensors: {key: each * torch.nan for key, each in tensors.items()}, "finite"),
    ],
)
def test_two_files_that_differ_are_refused(tmp_path, change, word):
    both(tmp_path, change)
    each = population()
    before = theta(each)
    with pytest.raises(ValueError, match=r"pytorch_lora_weights\.safetensors.*adapter_model\.safetensors") as caught:
        each.load_lora(tmp_path)
    assert word in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in theta(each).items())


def test_pefts_weights_without_its_settings_are_refused_beside_another_file(tmp_path):
    both(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"adapter_config\.json does not exist"):
        population().load_lora(tmp_path)
