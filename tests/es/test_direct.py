"""Direct mode: against dense weights W + delta + c U V^T formed by hand, and as a run on the command line."""

import copy
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertModel

import esengine
from esengine import Direct, Noise, UpdateRule
from esengine.base.errors import ConfigError
from esengine.base.progress import Progress
from esengine.es.direct import DirectLinear
from esengine.kernels import factor, linear_streams, uses_triton
from esengine.run.replay import replay
from esengine.run.settings import LoraSettings, ReplayConfig
from esengine.run.train import train
from esengine.sampling.build import load_model

DEVICES = ["cpu"] + [pytest.param("cuda", marks=pytest.mark.gpu)] * torch.cuda.is_available()
TARGETS = Direct(["up", "down"])


class MLP(nn.Module):
    """Wider, higher and square targets."""

    def __init__(self):
        super().__init__()
        self.up, self.act, self.mid = nn.Linear(7, 12), nn.GELU(), nn.Linear(12, 12)
        self.down, self.norm = nn.Linear(12, 5, bias=False), nn.LayerNorm(5)
        self.up.bias.requires_grad_(False)

    def forward(self, x):
        return self.norm(self.down(self.act(self.mid(self.act(self.up(x))))))


def fresh(dtype=torch.float32):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MLP().eval().to(dtype)


def rows(batch):
    return torch.randn(batch, 3, 7, generator=torch.Generator().manual_seed(1))


def trained(module, config=TARGETS, noise=None, **kwargs):
    """A population whose delta is not nought."""
    population = esengine.attach(module, config, noise or Noise(sigma=0.05, rank=2, seed=3), **kwargs)
    state, generator = population.state_dict(), torch.Generator().manual_seed(2)
    for name, delta in state["adapter"].items():
        state["adapter"][name] = 0.1 * torch.randn(delta.shape, generator=generator)
    population.load_state_dict(state)
    return population


def unit_noise(name, shape, *, seed, step, member, rank):
    """E_i = sign U V^T / sqrt(k) of the weight [out, in] of a layer, in fp64."""
    streams = linear_streams(name, direct=True)
    noise = dict(seed=seed, step=step, pairs=torch.tensor([member // 2]), rank=rank)
    u = factor(stream=streams.b_u, length=shape[0], **noise)[0].double()
    v = factor(stream=streams.a_v, length=shape[1], **noise)[0].double()
    return (-1) ** member / math.sqrt(rank) * u @ v.T


def deltas(population):
    return {name: delta.detach().clone() for name, delta in population.parameters().items()}


def relative(got, expected):
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@torch.no_grad()
def by_hand(population, step, member=None, dtype=torch.float64):
    """A plain module with the weights of one member, or of none."""
    module, noise = fresh(dtype), population.noise
    for name, delta in deltas(population).items():
        layer = name.removesuffix(".delta")
        weight = module.get_submodule(layer).weight
        weight += delta.cpu().to(dtype)
        if member is not None:
            keys = dict(seed=noise.seed, step=step, member=member, rank=noise.rank)
            weight += (noise.sigma * unit_noise(layer, weight.shape, **keys)).to(dtype)
    return module


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("config", [TARGETS, Direct(r".*(up|mid)"), Direct("all-linear", ["up"])], ids=str)
def test_a_mixed_batch_is_every_member_alone(config, rank, device):
    population = trained(fresh().to(device), config, Noise(sigma=0.05, rank=rank, seed=(1 << 63) + 3))
    assert population.backend == ("triton" if uses_triton(device) else "torch")
    members, x = torch.tensor([5, 0, 3, 2, 1, 4, 5, 1 << 32]), rows(8)
    with torch.no_grad(), population.perturbed(step=9, members=members.to(device)):
        batch = population.module(x.to(device)).cpu()
    with torch.no_grad():
        for row, member in enumerate(members.tolist()):
            alone = by_hand(population, 9, member)(x[row : row + 1].double())[0]
            assert relative(batch[row], alone) < 1e-5
        assert relative(by_hand(population, 9, 4)(x[:1].double())[0], batch[0]) > 1e-3
        outside = population.module(x.to(device)).cpu()
        assert relative(outside, by_hand(population, 9)(x.double())) < 1e-5
        assert relative(batch, outside) > 1e-2
        assert relative(outside, fresh()(x)) > 1e-2


def test_at_the_start_the_module_is_as_it_was():
    x, module = rows(2), fresh()
    with torch.no_grad():
        expected = module(x)
        population = esengine.attach(module, TARGETS)
        assert torch.equal(module(x), expected)
    assert {name: tuple(delta.shape) for name, delta in population.parameters().items()} == {
        "up.delta": (12, 7),
        "down.delta": (5, 12),
    }
    assert not any(delta.any() for delta in population.parameters().values())


def test_a_row_does_not_depend_on_its_batch_mates():
    population, x, members = trained(fresh()), rows(4), torch.tensor([8, 3, 3, 0])
    with torch.no_grad():
        with population.perturbed(step=1, members=members):
            whole = population.module(x)
        for order in ([0], [3, 1], [2, 2, 0]):
            with population.perturbed(step=1, members=members[order]):
                assert relative(population.module(x[order]), whole[order]) < 1e-6


def test_a_member_as_plain_weights():
    population = trained(fresh())
    for member in (6, 7):
        state = population.member_state_dict(step=8, member=member)
        assert set(state) == {"base_model.model.up.delta", "base_model.model.down.delta"}
        for name, delta in deltas(population).items():
            layer, got = name.removesuffix(".delta"), state[f"base_model.model.{name}"]
            expected = delta + 0.05 * unit_noise(layer, delta.shape, seed=3, step=8, member=member, rank=2)
            assert got.dtype == torch.float32
            torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("n", [2, 6, 130])
def test_the_gradient_is_the_mean_of_fitness_times_noise(n):
    population = trained(fresh(), rule=UpdateRule(lr_scale=0.7, max_norm=None))
    fitness, before = torch.randn(n, generator=torch.Generator().manual_seed(n)), deltas(population)
    gradient = population.gradient(step=4, fitness=fitness)
    stats = population.update(step=4, fitness=fitness)
    assert list(gradient) == ["up.delta", "down.delta"]
    squares = 0.0
    for name, delta in population.parameters().items():
        keys = dict(seed=3, step=4, rank=2)
        units = [unit_noise(name.removesuffix(".delta"), delta.shape, member=i, **keys) for i in range(n)]
        mean = sum(float(f) * unit for f, unit in zip(fitness, units, strict=True)) / n
        assert relative(gradient[name], mean) < 1e-5
        assert relative(delta.detach() - before[name], 0.7 * 0.05 * mean) < 1e-4
        squares += float(mean.square().sum())
    assert stats.gradient_norm == pytest.approx(math.sqrt(squares), rel=1e-5)
    with torch.no_grad():  # the layers compute with the weights of now
        assert relative(population.module(rows(2)), by_hand(population, 0)(rows(2).double())) < 1e-5


def test_the_norm_cap_is_on_delta():
    population = esengine.attach(fresh(), TARGETS, Noise(sigma=0.1), rule=UpdateRule(lr_scale=100, max_norm=0.25))
    stats = population.update(step=0, fitness=torch.tensor([1.0, -1.0]))
    assert stats.adapter_norm == pytest.approx(0.25, rel=1e-5)
    assert torch.cat([d.flatten() for d in population.parameters().values()]).norm() == pytest.approx(0.25, rel=1e-5)


def test_es_on_the_weights_learns():
    module, x = fresh(), rows(64)[:, 0]
    target = torch.tanh(x[:, :5])
    population = esengine.attach(
        module, Direct(["up", "mid", "down"]), Noise(sigma=0.03), rule=UpdateRule(optimizer="adam", lr_scale=0.5)
    )

    def error():
        with torch.no_grad():
            return float((module(x) - target).square().mean())

    first = error()
    for step in range(60):
        with torch.no_grad(), population.perturbed(step=step, members=torch.arange(64)):
            y = module(x[step % 8 :: 8].repeat(8, 1).contiguous())
        losses = (y - target[step % 8 :: 8].repeat(8, 1)).square().mean(1)
        population.update(step=step, fitness=-(losses - losses.mean()) / losses.std())
    assert error() < 0.8 * first


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_module_keeps_delta_in_fp32(dtype):
    population = trained(fresh(dtype))
    members, x = torch.tensor([0, 1, 2, 3]), rows(4)
    assert {delta.dtype for delta in population.parameters().values()} == {torch.float32}
    assert next(population.module.parameters()).dtype == dtype
    for layer in population.layers.values():
        rounded = (layer.base_layer.weight.float() + layer.delta["default"]).to(dtype)
        assert torch.equal(layer.weight, rounded)
    with torch.no_grad(), population.perturbed(step=1, members=members):
        half = population.module(x.to(dtype))
    assert half.dtype == dtype
    wide = trained(fresh())
    before = deltas(wide)
    with torch.no_grad(), wide.perturbed(step=1, members=members):
        assert relative(half, wide.module(x)) < (2e-2 if dtype == torch.bfloat16 else 3e-3)
    wide.module.to(dtype)  # cast after the fact
    assert all(torch.equal(delta, before[name]) for name, delta in deltas(wide).items())
    with torch.no_grad(), wide.perturbed(step=1, members=members):
        assert torch.equal(wide.module(x.to(dtype)), half)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_a_resumed_run_is_the_run(optimizer):
    rule = UpdateRule(optimizer=optimizer, lr_scale=2.0, max_norm=3.0)
    fitness, x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), rows(2)

    def run(population, steps):
        for step in steps:
            population.update(step=step, fitness=fitness[step])
        return population

    def make():
        return esengine.attach(fresh(), TARGETS, Noise(sigma=0.1, rank=2), rule=rule)

    whole, first = run(make(), range(6)), run(make(), range(3))
    state = copy.deepcopy(first.state_dict())
    second = run(make(), [5, 4])  # whatever it did before is forgotten
    second.load_state_dict(state)
    run(second, range(3, 6))
    for part in ("adapter", "optimizer"):
        expected, got = whole.state_dict()[part], second.state_dict()[part]
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    with torch.no_grad():
        assert torch.equal(second.module(x), whole.module(x))


def test_a_lora_s_state_is_refused():
    population = trained(fresh())
    before = deltas(population)
    lora = esengine.attach(fresh(), LoraConfig(r=2, target_modules=["up", "down"]), population.noise)
    with pytest.raises(ValueError, match="state: layers differ"):
        population.load_state_dict(lora.state_dict())
    assert all(torch.equal(delta, before[name]) for name, delta in deltas(population).items())


def test_detach_gives_back_the_module():
    module, x = fresh(torch.bfloat16), rows(2).bfloat16()
    module.down.weight = module.mid.weight = nn.Parameter(module.mid.weight.data)  # tied, which stays two layers
    module.norm = nn.LayerNorm(12, dtype=torch.bfloat16)
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    flags = {name: (id(p), p.requires_grad) for name, p in module.named_parameters()}
    with torch.no_grad():
        expected = module(x)
        population = trained(module)
        population.update(step=0, fitness=torch.tensor([30.0, -30.0]))
        assert not torch.equal(module(x), expected)
        assert torch.equal(module.mid.weight, weights["mid.weight"])
        assert population.detach() is module
        assert torch.equal(module(x), expected)
    assert list(module.state_dict()) == list(weights)
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in weights.items())
    assert {name: (id(p), p.requires_grad) for name, p in module.named_parameters()} == flags
    assert not hasattr(module, "peft_config")
    with pytest.raises(RuntimeError, match="detached"):
        population.update(step=0, fitness=torch.tensor([1.0, 0.0]))


def test_peft_switches_it_off_and_on():
    population, x = trained(fresh()), rows(2)
    with torch.no_grad():
        moved = population.module(x)
        for enabled, expected in ((False, fresh()(x)), (True, moved)):
            for layer in population.layers.values():
                layer.enable_adapters(enabled)
            assert torch.equal(population.module(x), expected)


@pytest.mark.parametrize("config", [TARGETS, Direct(r".*(up|mid|down)"), Direct("all-linear", ["mid"])], ids=str)
def test_peft_reads_what_is_saved(tmp_path, config):
    population, x = trained(fresh(), config), rows(3)
    population.save_pretrained(tmp_path / "adapter")
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, delta in deltas(population).items():
        a, b = (state[f"base_model.model.{name.removesuffix('.delta')}.lora_{side}.weight"] for side in "AB")
        assert torch.equal(b @ a, delta)
        assert len(a) == min(delta.shape)
    peft = PeftModel.from_pretrained(fresh(), tmp_path / "adapter").eval()
    assert not any(isinstance(module, DirectLinear) for module in peft.modules())
    adapted = {name.removeprefix("base_model.model.") for name, m in peft.named_modules() if hasattr(m, "lora_A")}
    assert adapted == set(population.layers)
    with torch.no_grad():
        assert relative(peft(x), population.module(x)) < 1e-6
        assert relative(fresh()(x), population.module(x)) > 1e-2


def bert():
    settings = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    return BertModel(BertConfig(vocab_size=50, max_position_embeddings=16, **settings))


@pytest.mark.parametrize(
    "chosen",
    [
        dict(),
        dict(target_modules="all-linear"),
        dict(target_modules=["query", "dense"], exclude_modules=["pooler.dense"]),
        dict(target_modules=("1.output.dense", "key")),
        dict(target_modules=r".*layer\.\d\.(attention.*(query|value)|output.dense)", exclude_modules=r".*\.0\..*"),
    ],
    ids=str,
)
def test_it_selects_the_layers_that_a_lora_selects(chosen, tmp_path):
    population = esengine.attach(bert(), Direct(**chosen))
    names = chosen | ({"target_modules": list(chosen["target_modules"])} if "1.output.dense" in str(chosen) else {})
    peft = get_peft_model(bert(), LoraConfig(r=2, **names))
    assert {f"base_model.model.{name}" for name in population.layers} == {
        name for name, module in peft.named_modules() if hasattr(module, "lora_A")
    }
    population.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(bert(), tmp_path)
    assert {f"base_model.model.{name}" for name in population.layers} == {
        name for name, module in again.named_modules() if hasattr(module, "lora_A")
    }


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (Direct(["up", "nothing"]), ValueError, "'nothing' matches nothing in MLP"),
        (Direct(r"no\.such.*"), ValueError, r"no\\?\.such"),
        (Direct([]), ValueError, "target"),
        (Direct(["up"], ["up"]), ValueError, "exclude"),
        (Direct(["norm"]), TypeError, "dense torch.nn.Linear at 'norm', got LayerNorm"),
        (Direct(3), TypeError, "target_modules: expected names, a regular expression or None, got 3"),
        (Direct(["up"], ["up", 3]), TypeError, "exclude_modules: expected names"),
    ],
)
def test_what_attach_refuses_leaves_the_module_as_it_was(config, error, message):
    module, x = fresh(), rows(2)
    expected, names = module(x), [(name, id(each)) for name, each in module.named_modules()]
    with pytest.raises(error, match=message):
        esengine.attach(module, config)
    assert [(name, id(each)) for name, each in module.named_modules()] == names
    assert torch.equal(module(x), expected)
    assert module.up.weight.requires_grad


def test_one_adapter_at_a_time():
    population = trained(fresh())
    with pytest.raises(ValueError, match="module: expected one without an adapter"):
        esengine.attach(population.module, LoraConfig(target_modules=["mid"]))


@pytest.mark.parametrize("settings", [dict(alpha=0.0), dict(alpha=float("nan")), dict(targets=())])
def test_the_other_settings_of_a_lora_are_checked_all_the_same(settings):
    with pytest.raises(ConfigError, match=r"lora\.(alpha|targets)"):
        LoraSettings(rank=0, **settings)


@pytest.fixture(scope="module")
def run(small, tmp_path_factory):
    """Four steps, population 4."""
    lora = LoraSettings(rank=0, targets=("to_q", "linear_2"))
    return train(small(tmp_path_factory.mktemp("direct") / "run", model="tiny", lora=lora))


def test_a_run_leaves_a_lora_that_diffusers_loads(run):
    state = load_file(run.folder / "adapter" / "adapter_model.safetensors")
    pipeline = load_model("tiny", None, torch.device("cpu"), torch.float32).pipeline
    pipeline.load_lora_weights(run.folder / "adapter", use_safetensors=True)
    peft = {n: m for n, m in pipeline.transformer.named_modules() if len(getattr(m, "lora_A", ()))}
    assert {f"base_model.model.{name}.lora_B.weight" for name in peft} == {key for key in state if "lora_B" in key}
    for name, layer in peft.items():
        a, b = (state[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        delta = b @ a
        assert delta.shape == layer.base_layer.weight.shape
        assert delta.any()
        torch.testing.assert_close(layer.get_delta_weight(next(iter(layer.lora_A))), delta, rtol=0, atol=0)


def test_replay_makes_every_bit_again(run):
    found = replay(ReplayConfig(run_dir=run.folder), Progress())
    assert (found.steps, found.parted) == (4, [])


def test_a_changed_rank_is_another_run(run, esengine):
    code, _, err = esengine("train", "--run-dir", run.folder, "--resume", "--lora.rank", "2")
    assert code == 1
    assert "lora.rank: 0 -> 2" in err


def test_the_command_line_resumes_evaluates_and_renders(esengine, workspace, prompt_files, outcome):
    def go(folder, steps, *more):
        code, _, err = esengine(
            "train", "--run-dir", folder, "--model", "tiny", "--lora.rank", "0", "--population", "4",
            "--prompts", prompt_files[0], "--eval-prompts", prompt_files[1], "--es.prompts-per-step", "2",
            "--es.repeats", "1", "--es.sigma", "1e-3", "--checkpoint-every", "1", "--steps", steps, *more,
        )  # fmt: skip
        assert code == 0, err

    go("whole", "2")
    go("parts", "1")
    go("parts", "2", "--resume", "--allow-change")
    whole, parts = outcome(workspace / "whole"), outcome(workspace / "parts")
    for name in ("adapter", "lora", "checkpoint", "peft"):
        assert parts[name] == whole[name], name
    peft = whole["peft"]
    assert peft["lora_alpha"] == peft["r"]
    code, out, err = esengine("replay", "whole")
    assert (code, "bit for bit" in out) == (0, True), err
    code, _, err = esengine("eval", "--run-dir", "whole", "--limit", "2", "--json", "again.json")
    assert code == 0, err
    code, _, err = esengine("render", "a red fox", "--run-dir", "whole", "--out", "drawn")
    assert code == 0, err
    assert len(list((workspace / "drawn").glob("*.png"))) >= 1
