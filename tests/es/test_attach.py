"""What attach unwraps, what it refuses by name, and how it leaves the module then."""

import copy
import json

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook, dispatch_model
from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import nn
from torch.nn.parameter import is_lazy

import esengine
from esengine import Direct, Noise
from esengine.base.errors import UnperturbedError


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(6, 9), nn.Linear(9, 6), nn.LayerNorm(6)

    def forward(self, x):
        return self.norm(x + self.down(torch.tanh(self.up(x.to(self.up.weight.dtype)))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.blocks = nn.Linear(6, 6), nn.ModuleList([Block(), Block()])
        self.first.bias.requires_grad_(False)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x


def fresh():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().eval()


FORMS = {
    "lora": LoraConfig(r=2, target_modules=["first", "blocks.0.up", "down"]),
    "direct": Direct(["first", "blocks.0.up", "down"]),
}
NAMES = ["first", "blocks.0.up", "blocks.0.down", "blocks.1.down"]


@pytest.fixture(params=FORMS)
def form(request):
    return FORMS[request.param]


def x_of(rows=4):
    return torch.randn(rows, 3, 6, generator=torch.Generator().manual_seed(1))


def moved(population):
    """The population after an update and with theta that is not nought."""
    state, generator = population.state_dict(), torch.Generator().manual_seed(2)
    for name, tensor in state["adapter"].items():
        state["adapter"][name] = 0.2 * torch.randn(tensor.shape, generator=generator)
    population.load_state_dict(state)
    return population


def empty(tensor):
    return is_lazy(tensor) or tensor.is_meta


def snapshot(module):
    """All that attach may touch: names, bits, flags, the modules themselves, their attributes and their hooks."""
    return (
        {name: tensor if empty(tensor) else tensor.clone() for name, tensor in module.state_dict().items()},
        {name: (id(p), p.requires_grad) for name, p in module.named_parameters()},
        {
            name: (id(m), m.training, sorted(vars(m)), id(vars(m).get("forward")), list(m._forward_pre_hooks))
            for name, m in module.named_modules(remove_duplicate=False)
        },
    )


def assert_as_it_was(module, before):
    after = snapshot(module)
    assert list(after[0]) == list(before[0])
    for name, tensor in before[0].items():
        assert empty(after[0][name]) if empty(tensor) else torch.equal(after[0][name], tensor)
    assert after[1:] == before[1:]


# ---- torch.compile


def whole(net):
    return torch.compile(net, backend="eager")


def block(net):
    net.blocks[0] = torch.compile(net.blocks[0], backend="eager")
    return net


def target(net):
    net.first = torch.compile(net.first, backend="eager")
    net.blocks[1].down = torch.compile(net.blocks[1].down, backend="eager")
    return net


def everything(net):
    return whole(target(block(net)))


def in_place(net):
    net.compile(backend="eager")
    net.blocks[0].compile(backend="eager")
    return net


COMPILED = [whole, block, target, everything, in_place]


@pytest.mark.parametrize("compiled", COMPILED)
def test_a_compiled_module_is_the_plain_one(compiled, form, tmp_path):
    noise, members, x = Noise(sigma=0.1, rank=2, seed=5), torch.tensor([0, 3, 2, 2]), x_of()
    plain, module = moved(esengine.attach(fresh(), form, noise)), compiled(fresh())
    with torch.no_grad():
        untouched = module(x)
    before = snapshot(module)
    population = moved(esengine.attach(module, form, noise))
    assert sorted(population.layers) == sorted(NAMES)
    assert {name: layer.streams for name, layer in population.layers.items()} == {
        name: layer.streams for name, layer in plain.layers.items()
    }
    assert list(population.state_dict()["adapter"]) == list(plain.state_dict()["adapter"])
    for call in (module, population.module):
        with torch.no_grad():
            for step in (1, 2):
                with plain.perturbed(step=step, members=members):
                    expected = plain.module(x)
                with population.perturbed(step=step, members=members):
                    assert torch.equal(call(x), expected)
            assert torch.equal(call(x), plain.module(x))
            assert not torch.equal(call(x), expected)
    fitness = torch.tensor([1.0, -1, 0.5, 2])
    for each in (plain, population):
        each.update(step=2, fitness=fitness)
    with torch.no_grad():
        assert torch.equal(module(x), plain.module(x))
    states = [each.member_state_dict(step=3, member=1) for each in (plain, population)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    population.save_pretrained(tmp_path)
    assert not [key for key in load_file(tmp_path / "adapter_model.safetensors") if "_orig_mod" in key]
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(fresh(), tmp_path).eval()(x)
        assert torch.allclose(loaded, population.module(x), atol=1e-5)
    assert population.detach() is module
    assert_as_it_was(module, before)
    with torch.no_grad():
        assert torch.equal(module(x), untouched)


def test_saved_bytes_do_not_depend_on_compile(tmp_path):
    for name, build in (("plain", lambda net: net), ("compiled", everything)):
        moved(esengine.attach(build(fresh()), FORMS["lora"])).save_pretrained(tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "compiled" / file).read_bytes()
    assert "_orig_mod" not in json.dumps(json.loads((tmp_path / "compiled" / "adapter_config.json").read_text()))


@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.parametrize("names", [["first", "norm"], ["first", "nothing"], ["first", "_orig_mod"]])
def test_a_refusal_leaves_the_wrappers(compiled, names):
    module = compiled(fresh())
    before = snapshot(module)
    with pytest.raises((TypeError, ValueError), match=names[1]):
        esengine.attach(module, LoraConfig(r=2, target_modules=names))
    assert_as_it_was(module, before)
    esengine.attach(module, FORMS["lora"]).detach()
    assert_as_it_was(module, before)


def test_a_block_under_two_names_one_of_them_compiled_is_one_owner():
    module = fresh()
    module.fast = torch.compile(module.blocks[0], backend="eager")
    before = snapshot(module)
    population = esengine.attach(module, FORMS["lora"])
    assert sorted(population.layers) == sorted(NAMES)
    population.detach()
    assert_as_it_was(module, before)


@pytest.mark.parametrize("compiled", [whole, block])
def test_a_target_that_a_compiled_module_does_not_call_is_an_error(compiled):
    class Skips(Block):
        def forward(self, x):
            return self.down(torch.tanh(torch.nn.functional.linear(x, self.up.weight, self.up.bias)))

    net = fresh()
    net.blocks[0] = Skips()
    module = compiled(net)
    population = esengine.attach(module, FORMS["lora"])

    def run():
        with torch.no_grad(), population.perturbed(step=0, members=torch.arange(4)):
            module(x_of())

    with pytest.raises(UnperturbedError) as caught:
        run()
    assert list(caught.value.layers) == ["blocks.0.up"]


# ---- refused by name


@pytest.mark.parametrize("what", [torch.compile(lambda x: x), "model", None], ids=["function", "str", "None"])
def test_what_is_no_module_is_refused(what):
    with pytest.raises(TypeError, match=r"module: expected a torch\.nn\.Module"):
        esengine.attach(what, FORMS["lora"])


def meta(net):
    net.blocks[1].to("meta")


def meta_layer(net):
    net.blocks[1].down.to("meta")


def lazy(net):
    net.blocks[1].down = nn.LazyLinear(6)


def lazy_elsewhere(net):
    """A lazy layer that is no target, and a target that is refused."""
    net.head, net.blocks[1].down = nn.LazyLinear(3), nn.LazyLinear(6)


def lazy_convolution(net):
    net.blocks[1].down = nn.LazyConv2d(6, 1)


def offloaded(net):
    cpu_offload(net.blocks[1], execution_device=torch.device("cpu"))


def offloaded_whole(net):
    cpu_offload(net, execution_device=torch.device("cpu"))


def offloaded_after_use(net):
    cpu_offload_with_hook(net, execution_device=torch.device("cpu"))


def dispatched(net):
    dispatch_model(
        net, {"first": "disk", "blocks.0": "cpu", "blocks.1": "disk"}, main_device="cpu", offload_dir=net.folder,
        force_hooks=True,
    )  # fmt: skip


def in_a_sequence(net):
    hook = SequentialHook(AlignDevicesHook(io_same_device=True), AlignDevicesHook(offload=True, execution_device="cpu"))
    add_hook_to_module(net.blocks[1].down, hook)


def in_groups(net):
    apply_group_offloading(net, onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)


def by_leaf(net):
    apply_group_offloading(net.blocks[1], onload_device=torch.device("cpu"), offload_type="leaf_level")


REFUSED = {
    meta: "'blocks.1.down'.*meta", meta_layer: "'blocks.1.down'.*meta",
    lazy: "'blocks.1.down'.*[Ll]azy", lazy_elsewhere: "'blocks.1.down'.*[Ll]azy",
    lazy_convolution: "'blocks.1.down'.*[Ll]azy",
    offloaded: "'blocks.1.down'.*offloaded", offloaded_whole: "'first'.*offloaded",
    offloaded_after_use: "'first'.*offloaded", dispatched: "'first'.*offloaded",
    in_a_sequence: "'blocks.1.down'.*offloaded",
    in_groups: "'(first|blocks.0.up)'.*offloaded", by_leaf: "'blocks.1.down'.*offloaded",
}  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("spoil", REFUSED)
def test_weights_that_are_not_there_are_refused_by_name(spoil, form, training, tmp_path):
    module = fresh().train(training)
    module.folder = str(tmp_path)
    spoil(module)
    before = snapshot(module)
    with pytest.raises(TypeError, match=REFUSED[spoil]):
        esengine.attach(module, form)
    assert_as_it_was(module, before)
    assert not hasattr(module, "peft_config")


CONVOLUTIONS = {
    "3x3": nn.Conv2d(2, 2, 3, padding=1), "1x3": nn.Conv2d(2, 2, (1, 3)), "stride": nn.Conv2d(2, 2, 1, stride=2),
    "padding": nn.Conv2d(2, 2, 1, padding=1), "groups": nn.Conv2d(2, 2, 1, groups=2),
    "dilation": nn.Conv2d(2, 2, 1, dilation=2), "1d": nn.Conv1d(2, 2, 1), "3d": nn.Conv3d(2, 2, 1),
    "transposed": nn.ConvTranspose2d(2, 2, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_other_convolutions_are_refused_with_what_to_do(name, form):
    module = fresh()
    module.first = copy.deepcopy(CONVOLUTIONS[name])
    before = snapshot(module)
    with pytest.raises(TypeError, match=rf"'first', got {type(module.first).__name__}.*exclude_modules"):
        esengine.attach(module, form)
    assert_as_it_was(module, before)
    excluding = copy.deepcopy(form) if isinstance(form, LoraConfig) else Direct(form.target_modules, ["first"])
    excluding.__dict__["exclude_modules"] = ["first"]
    assert "first" not in esengine.attach(module, excluding).layers


def test_a_convolution_of_its_own_forward_is_refused():
    class Own(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    module = fresh()
    module.first = Own(2, 2, 1)
    before = snapshot(module)
    with pytest.raises(TypeError, match="'first', got Own"):
        esengine.attach(module, FORMS["lora"])
    module.first = nn.Conv2d(2, 2, 1)
    module.first.register_forward_hook(lambda module, args, y: 2 * y)
    with pytest.raises(TypeError, match="'first', got one with a hook"):
        esengine.attach(module, FORMS["lora"])
    assert list(module.state_dict()) == list(before[0])


def test_hooks_that_move_no_weights_are_no_offloading():
    module = fresh()
    add_hook_to_module(module, AlignDevicesHook(io_same_device=True))
    population = moved(esengine.attach(module, FORMS["lora"]))
    with torch.no_grad(), population.perturbed(step=0, members=torch.arange(4)):
        assert module(x_of(1).expand(4, -1, -1)).std(0).max() > 0
