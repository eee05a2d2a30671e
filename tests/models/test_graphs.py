"""Graphs on a CPU, where a tape stands in for CUDA: operations repeat with the memory and the scalars they had."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig

import esengine
from esengine.base.errors import ConfigError, RenderError
from esengine.models import RenderSettings, graphs
from esengine.models.graphs import Graphs
from esengine.models.sana.sana_block import fused_parts

KEYS = {"seed": 3, "prompts": torch.tensor([0, 1, 2, 1]), "repeats": torch.tensor([0, 0, 1, 1])}


@contextmanager
def affine(x, y):
    yield lambda: (x * y + 1, x.sum())


def test_inputs_are_read_anew_and_scalars_are_frozen(recorded):
    factor, runs = 2, []

    @contextmanager
    def session(x):
        runs.append(x)
        yield lambda: factor * x

    captured = Graphs(session)
    x = torch.arange(3.0)
    assert torch.equal(captured(x), 2 * x)
    assert torch.equal(captured(x), 2 * x)
    factor = 5
    assert torch.equal(captured(x + 1), 2 * (x + 1))
    assert (len(runs), len(recorded), captured.captured) == (2, 1, 1)
    assert runs[1].data_ptr() != x.data_ptr()


def test_a_shape_is_captured_when_it_comes_again(recorded):
    captured = Graphs(affine)
    for size in (3, 4, 3, 4, 3):
        x = torch.full((size,), float(size))
        product, total = captured(x, x)
        assert product.tolist() == [size * size + 1] * size
        assert total == size * size
    assert len(recorded) == 2
    captured(x.double(), x.double())
    assert captured.captured == 2


def test_strides_are_no_part_of_the_key(recorded):
    captured = Graphs(affine)
    x = torch.arange(6.0).view(2, 3)
    for each in (x, x, x.T.contiguous().T, x.expand(2, 3)):
        assert torch.equal(captured(each, each)[0], each * each + 1)
    assert len(recorded) == 1


def test_the_least_used_shape_goes(recorded):
    captured = Graphs(affine, limit=2)

    def use(size):
        return captured(torch.ones(size), torch.ones(size))

    for size in (1, 1, 2, 2, 1, 3, 3, 1):
        use(size)
    assert len(recorded) == 3
    assert captured.captured == 2
    use(2)
    use(2)
    assert len(recorded) == 4
    with pytest.raises(ValueError, match="limit: expected at least 1, got 0"):
        Graphs(affine, limit=0)


def test_graphs_share_the_pool_of_one_that_lives(recorded, monkeypatch):
    pools, own = [], graphs.record
    monkeypatch.setattr(
        graphs, "record", lambda compute, pool, stream: pools.append(pool) or own(compute, pool, stream)
    )
    captured = Graphs(affine, limit=1)
    for size in (1, 1, 2, 2):
        captured(torch.ones(size), torch.ones(size))
    assert pools == [None, None]  # the first is gone, and its pool with it
    captured = Graphs(affine)
    for size in (1, 1, 2, 2):
        captured(torch.ones(size), torch.ones(size))
    assert pools[2:] == [None, "pool 3"]


def test_all_graphs_are_captured_on_one_stream(recorded):
    """Also those that come when every earlier one is gone: the allocator keeps what was used on a stream for it."""
    captured, other = Graphs(affine, limit=1), Graphs(affine)
    for size in (1, 1, 2, 2, 1, 1):
        captured(torch.ones(size), torch.ones(size))
    for size in (1, 1, 2, 2):
        other(torch.ones(size), torch.ones(size))
    assert [tape.stream for tape in recorded] == ["stream 0"] * 3 + ["stream 1"] * 2


def test_a_capture_runs_on_the_stream_it_is_given_alone(monkeypatch):
    """CUDA's calls, in their order: the warm-up and the capture are on one stream, and the caller's waits for both."""
    log = []

    class Stream:
        device = "cuda:0"

        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            log.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self):
            log.append("replay")

        def pool(self):
            return "its pool"

    @contextmanager
    def inside(what):
        log.append(what)
        yield
        log.append(f"end of {what}")

    current, side = Stream("caller"), Stream("side")
    monkeypatch.setattr(torch.cuda, "device", lambda device: inside(device))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *args: pytest.fail("another stream"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: inside(stream.name))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(
        torch.cuda, "graph", lambda graph, *, pool, stream, **options: inside(f"capture {pool} on {stream.name}")
    )
    outputs, replay, pool = graphs.record(lambda: log.append("compute") or 7, "a pool", side)
    replay()
    assert (outputs, pool) == (7, "its pool")
    warm = ["side waits for caller", "side", "compute", "end of side", "caller waits for side"]
    capture = ["capture a pool on side", "compute", "end of capture a pool on side"]
    assert log == ["cuda:0", *warm, *capture, "end of cuda:0", "replay"]


class Holder(torch.nn.Module):
    """Two linears, one in a list, a buffer, and a bias that is not there."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(3, 3, bias=False)
        self.rest = torch.nn.ModuleList([torch.nn.Linear(3, 3)])
        self.register_buffer("mean", torch.zeros(3))


def moved_by_data(module):
    module.rest[0].weight.data = module.rest[0].weight.data.clone()


def cast_there_and_back(module):
    kept = [each.data for each in module.parameters()]  # so that no address comes back
    module.double().float()
    return kept


def another_parameter(module):
    module.first.bias = torch.nn.Parameter(torch.zeros(3))


def loaded_by_assignment(module):
    module.load_state_dict({name: t.clone() for name, t in module.state_dict().items()}, assign=True)


def another_buffer(module):
    module.mean = torch.zeros(3)


def another_module(module):
    same = torch.nn.Linear(3, 3)
    same.weight, same.bias = module.rest[0].weight, module.rest[0].bias
    module.rest[0] = same


def read_as_another_dtype(module):
    module.mean = module.mean.view(torch.int32)


def without_a_module(module):
    del module.rest[0]


MOVES = [
    *(moved_by_data, cast_there_and_back, another_parameter, loaded_by_assignment),
    *(another_buffer, another_module, read_as_another_dtype, without_a_module),
]


@pytest.mark.parametrize("move", MOVES)
def test_places_know_what_moved(move):
    module = Holder().requires_grad_(False)
    addresses = graphs.Addresses(module)
    module.first.weight.mul_(2)
    module.load_state_dict({name: t.clone() for name, t in module.state_dict().items()})
    assert addresses.unchanged()
    kept = move(module)
    assert not addresses.unchanged()
    assert graphs.Addresses(module).unchanged()
    del kept


def test_places_are_looked_at_without_a_walk(monkeypatch):
    """The walk over a full-size transformer's tree would let the GPU idle before each replay."""
    module = Holder()
    addresses = graphs.Addresses(module)
    for name in ("named_modules", "named_parameters", "named_buffers", "named_children", "parameters", "buffers"):
        monkeypatch.setattr(torch.nn.Module, name, lambda *args, **kwargs: pytest.fail("the tree was walked"))
    assert addresses.unchanged()
    moved_by_data(module)
    assert not addresses.unchanged()


def test_what_cannot_be_captured_says_what_to_do(recorded):
    @contextmanager
    def waits(x):
        yield lambda: x * float(x.sum())

    captured = Graphs(waits)
    captured(torch.ones(2))
    with pytest.raises(RenderError, match=r"no CUDA graph could be captured \(operation not .*graphs never"):
        captured(torch.ones(2))

    @contextmanager
    def large(x):
        yield lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("too much"))

    with pytest.raises(torch.OutOfMemoryError):
        Graphs(large)(torch.ones(2))


def test_capture_in_inference_mode_serves_outside_of_it(recorded):
    captured = Graphs(affine)
    with torch.inference_mode():
        captured(torch.ones(2), torch.ones(2))
        captured(torch.ones(2), torch.ones(2))
    product, _ = captured(torch.full((2,), 3.0), torch.ones(2))
    assert product.tolist() == [4, 4]
    assert not product.requires_grad


class Members:
    """Stands in for a population: shifts the transformer's output by member and ES step, read where it is computed."""

    backend = "torch"

    def __init__(self, transformer):
        self.layers = {"proj_out": SimpleNamespace(disable_adapters=False, scale=4.0)}
        self.noise, self.now, self.entered = esengine.Noise(), None, 0
        self.gain = torch.nn.Parameter(torch.tensor(0.1), requires_grad=False)
        transformer.proj_out.register_parameter("gain", self.gain)
        transformer.proj_out.register_forward_hook(self.shift)

    def shift(self, module, args, y_btc):
        if self.now is None:
            return None
        step, members = self.now
        return y_btc + (self.gain * torch.as_tensor(step) + 0.01 * members)[:, None, None]

    @contextmanager
    def perturbed(self, *, step, members):
        self.now, self.entered = (step, members), self.entered + 1
        try:
            yield
        finally:
            self.now = None


@pytest.fixture
def replaying(fresh_model, recorded, monkeypatch):
    monkeypatch.setattr(type(fresh_model), "fuses", lambda self, population: True)
    return fresh_model


def denoise(model, texts, population, step, members, **settings):
    members = torch.as_tensor(members)
    rows = {name: column if name == "seed" else column[: len(members)] for name, column in KEYS.items()}
    return model.denoise(
        texts,
        **rows,
        step=step,
        members=members,
        population=population,
        settings=RenderSettings(**settings),
        text_length=graphs.TEXT_MULTIPLE * 3,
    )


def test_a_replay_follows_members_step_prompts_and_settings(replaying, texts, recorded):
    population = Members(replaying.transformer)
    seen = []
    for step, members, scale in (
        (1, [0, 1, 2, 3], 4.5),
        (1, [0, 1, 2, 3], 4.5),
        (7, [5, 4, 0, 0], 4.5),
        (7, [1] * 4, 2.0),
    ):
        seen.append(denoise(replaying, texts, population, step, members, guidance_scale=scale))
        plain = denoise(replaying, texts, population, step, members, guidance_scale=scale, graphs="never")
        assert torch.equal(seen[-1], plain)
    assert len(recorded) == 1
    assert not torch.equal(seen[1], seen[2])
    assert torch.equal(seen[0], seen[1])  # what a caller holds is not overwritten


def test_one_graph_serves_all_denoising_steps(replaying, texts, recorded):
    population = Members(replaying.transformer)
    got = denoise(replaying, texts, population, 2, [0, 1, 2, 3], num_steps=2)
    assert len(recorded) == 1
    assert torch.equal(got, denoise(replaying, texts, population, 2, [0, 1, 2, 3], num_steps=2, graphs="never"))


def test_text_is_padded_so_that_lengths_share_a_graph(replaying, texts, recorded):
    population, lengths = Members(replaying.transformer), []
    batch = type(texts).batch
    texts.batch = lambda *args, length, **kwargs: lengths.append(length) or batch(texts, *args, length=length, **kwargs)
    try:
        rows = {**KEYS, "step": 0, "members": torch.arange(4), "population": population, "settings": RenderSettings()}
        longest = texts.trimmed_length(KEYS["prompts"])
        got = [replaying.denoise(texts, **rows, text_length=length) for length in (longest, longest + 1, None)]
        plain = replaying.denoise(texts, **{**rows, "settings": RenderSettings(graphs="never")})
    finally:
        del texts.batch
    multiple = graphs.TEXT_MULTIPLE
    assert longest % multiple
    assert -(-longest // multiple) == -(-(longest + 1) // multiple)
    assert lengths == [-(-longest // multiple) * multiple] * 3 + [None]
    assert all((each - plain).norm() / plain.norm() < 1e-5 for each in got)
    assert len(recorded) == 1


def test_weights_changed_in_place_show_and_moved_ones_capture_anew(replaying, texts, recorded):
    population = Members(replaying.transformer)

    def both():
        got = denoise(replaying, texts, population, 1, [0, 1, 2, 3])
        assert torch.equal(got, denoise(replaying, texts, population, 1, [0, 1, 2, 3], graphs="never"))
        return got

    both()
    before = both()
    population.gain.mul_(3)
    assert not torch.equal(both(), before)
    assert len(recorded) == 1
    population.gain.data = population.gain.data.clone() * 2
    both()
    both()
    assert len(recorded) == 2
    population.layers["proj_out"].disable_adapters = True
    both()
    both()
    assert len(recorded) == 3
    other = Members(replaying.transformer)
    denoise(replaying, texts, other, 1, [0, 1, 2, 3])
    assert replaying._captured[0][0] is other


def test_a_detached_population_leaves_no_graphs(replaying, texts, recorded, rows):
    population = Members(replaying.transformer)
    for _ in range(2):
        denoise(replaying, texts, population, 1, [0, 1, 2, 3])
    plain = dict(seed=0, step=0, prompts=rows[0], repeats=rows[1], settings=RenderSettings())
    replaying.denoise(texts, **plain)
    assert replaying._captured is not None  # strips and base images between steps cost no capture
    population.layers = {}
    replaying.denoise(texts, **plain)
    assert replaying._captured is None


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([0, 1, 2, -1], r"members: expected values in \[0, 2\^33\)"),
        ([0, 1, 2, 1 << 33], r"members: expected values in \[0, 2\^33\)"),
        ([0.0, 1, 2, 3], "members: expected int64"),
        ([0, 1], "expected one for each of 4 rows"),
    ],
)
def test_a_replay_refuses_what_the_population_would(replaying, texts, members, message):
    population = Members(replaying.transformer)
    for _ in range(2):
        denoise(replaying, texts, population, 1, [0, 1, 2, 3])
    rows = {**KEYS, "step": 1, "population": population, "settings": RenderSettings()}
    with pytest.raises(ValueError, match=message):
        replaying.denoise(texts, **rows, members=torch.tensor(members))
    with pytest.raises(ValueError, match="step: expected an integer"):
        replaying.denoise(texts, **{**rows, "step": -1}, members=torch.arange(4))


def test_the_choice_is_shown(fresh_model, texts, recorded, monkeypatch):
    population = Members(fresh_model.transformer)
    monkeypatch.setattr(type(fresh_model), "fuses", lambda self, population: False)
    settings = RenderSettings()
    assert fresh_model.plan(population, settings) == "diffusers' blocks, no CUDA graphs, decode eager"
    denoise(fresh_model, texts, population, 1, [0, 1, 2, 3])
    denoise(fresh_model, texts, population, 1, [0, 1, 2, 3])
    assert not recorded
    with pytest.raises(ConfigError, match="graphs: always needs fused blocks on a CUDA device"):
        denoise(fresh_model, texts, population, 1, [0, 1, 2, 3], graphs="always")
    monkeypatch.setattr(type(fresh_model), "fuses", lambda self, population: True)
    fresh_model._captured = None
    assert fresh_model.plan(population, settings) == "fused blocks, CUDA graphs, decode eager"
    never = RenderSettings(graphs="never", decode="compiled", overlap=True)
    assert fresh_model.plan(population, never) == "fused blocks, no CUDA graphs, decode compiled"


def test_without_a_gpu_there_are_none(fresh_model, texts):
    population = Members(fresh_model.transformer)
    for _ in range(2):
        denoise(fresh_model, texts, population, 1, [0, 1, 2, 3])
    assert fresh_model._captured is None
    with pytest.raises(ConfigError, match="graphs: always needs fused blocks on a CUDA device"):
        denoise(fresh_model, texts, population, 1, [0, 1, 2, 3], graphs="always")


TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.mark.parametrize("config", [LoraConfig(r=2, target_modules=TARGETS), esengine.Direct(TARGETS)])
def test_an_update_moves_no_weights(fresh_model, config):
    """So that what was captured before an ES step serves after it."""
    for optimizer in ("sgd", "momentum", "adam"):
        rule = esengine.UpdateRule(optimizer=optimizer, max_step_norm=1e-3, max_norm=1.0)
        population = esengine.attach(fresh_model.transformer, config, rule=rule)
        fused_parts(fresh_model.transformer, False)
        addresses = graphs.Addresses(fresh_model.transformer)
        before = {name: (p.data_ptr(), p.clone()) for name, p in population.parameters().items()}
        for step in range(2):
            population.update(step=step, fitness=torch.linspace(-1, 1, 8))
        population.load_state_dict(population.state_dict())
        after = population.parameters()
        assert addresses.unchanged()
        assert all(after[name].data_ptr() == place for name, (place, _) in before.items())
        assert any(not torch.equal(after[name], value) for name, (_, value) in before.items())
        population.detach()
