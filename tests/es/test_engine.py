import pytest
import torch
from peft import LoraConfig
from torch import nn

from esengine import Engine, Noise, UpdateRule, attach
from esengine.base.errors import ConfigError
from esengine.es.fitness import shape
from esengine.es.prompts import PromptSampler

PROMPTS = 6


class Toy(nn.Module):
    """A generator: prompt p and repeat r give an input, the 'image' is the MLP's output, near a target it scores."""

    def __init__(self, seed=0):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 3)).requires_grad_(False)
        self.inputs = torch.randn(PROMPTS, 4, 5, generator=draw)  # [prompt, repeat, :]
        self.target = torch.randn(3, generator=draw)

    @torch.no_grad()
    def score(self, prompts, repeats):
        return -(self.net(self.inputs[prompts, repeats]) - self.target).square().sum(1)

    def mean(self):
        prompts, repeats = torch.meshgrid(torch.arange(PROMPTS), torch.arange(4), indexing="ij")
        return float(self.score(prompts.reshape(-1), repeats.reshape(-1)).mean())


def build(seed=0, size=8, per_step=2, repeats=2, rule=None, sigma=0.05, **settings):
    toy = Toy(seed)
    population = attach(
        toy.net, LoraConfig(r=2, lora_alpha=4, target_modules=["0", "2"]), Noise(sigma=sigma, seed=seed), rule=rule
    )
    sampler = PromptSampler(PROMPTS, per_step, seed)
    return toy, Engine(population, sampler, size=size, repeats=repeats, **settings)


def scores(toy, engine, task, chunk=1000):
    """Scores [N, P, R], rendered `chunk` rows at a time."""
    parts = []
    for members, prompts, repeats in zip(*(column.split(chunk) for column in task.rows()), strict=True):
        with engine.population.perturbed(step=task.step, members=members):
            parts.append(toy.score(prompts, repeats))
    return torch.cat(parts).view(task.shape)


def run(toy, engine, steps, chunk=1000):
    for _ in range(steps):
        task = engine.ask()
        engine.tell(task, scores(toy, engine, task, chunk))


def theta(engine):
    return {name: tensor.clone() for name, tensor in engine.population.parameters().items()}


def flat(state, prefix=""):
    for name, value in state.items():
        yield from flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]


def same(a, b):
    """Bit equality of nested states."""
    a, b = dict(flat(a)), dict(flat(b))
    return a.keys() == b.keys() and all(
        torch.equal(a[n], b[n]) if isinstance(a[n], torch.Tensor) else a[n] == b[n] for n in a
    )


def test_ask_is_the_same_until_told():
    toy, engine = build()
    first, again = engine.ask(), engine.ask()
    assert first.step == again.step == engine.step == 0
    assert torch.equal(first.prompts, again.prompts)
    before = theta(engine)
    told = engine.tell(first, scores(toy, engine, first))
    assert set(told) == {"fitness", "gradient_norm", "step_norm", "adapter_norm"}
    assert told["fitness"].shape == (engine.size,)
    assert engine.ask().step == engine.step == 1
    assert not same(before, theta(engine))


def test_rows_are_the_flattened_scores():
    _, engine = build(size=4, per_step=3, repeats=2)
    task = engine.ask()
    members, prompts, repeats = task.rows()
    assert (task.shape, task.images, len(members)) == ((4, 3, 2), 24, 24)
    assert all(column.dtype == torch.int64 for column in task.rows())
    index = torch.arange(24).view(task.shape)
    for n in range(4):
        for p in range(3):
            for r in range(2):
                row = index[n, p, r]
                assert (members[row], prompts[row], repeats[row]) == (n, task.prompts[p], r)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_wrong_tell_changes_nothing(optimizer):
    toy, engine = build(rule=UpdateRule(optimizer=optimizer))
    run(toy, engine, 1)
    stale, task = build()[1].ask(), engine.ask()
    good = scores(toy, engine, task)
    nan, inf = good.clone(), good.clone()
    nan[3, 1, 0], inf[0, 0, 0] = float("nan"), float("-inf")
    before = engine.state_dict()
    for wrong_task, wrong in [
        (stale, good),
        (task, nan),
        (task, inf),
        (task, good[:-1]),
        (task, good[:, :, :0]),
        (task, good.double()),
        (task, good.half()),
        (task, good.long()),
    ]:
        with pytest.raises(ValueError, match=r"task|scores"):
            engine.tell(wrong_task, wrong)
        assert same(before, engine.state_dict())
    engine.tell(task, good)
    assert engine.step == 2


def test_fitness_is_shaped_as_was_asked():
    toy, engine = build(prompt_std="own", shaping="centered_rank")
    task = engine.ask()
    found = scores(toy, engine, task)
    found[:, 0] *= 10
    own, together = (shape(found, "centered_rank", each) for each in ("own", "global"))
    assert torch.equal(engine.fitness(task, found), own)
    assert not torch.equal(own, together)


@pytest.mark.parametrize("transposed", [(0, 2, 1), (1, 0, 2)])
def test_scores_in_another_order_of_axes_are_refused(transposed):
    toy, engine = build(size=8, per_step=2, repeats=4)
    task = engine.ask()
    with pytest.raises(ValueError, match="scores"):
        engine.tell(task, scores(toy, engine, task).permute(transposed).contiguous())


def test_flat_scores_are_as_good():
    (toy, a), (_, b) = build(), build()
    task = a.ask()
    found = scores(toy, a, task)
    a.tell(task, found)
    b.tell(b.ask(), found.reshape(-1))
    assert same(a.state_dict(), b.state_dict())


@pytest.mark.parametrize(
    "wrong", [{"size": 3}, {"size": 0}, {"repeats": 0}, {"shaping": "best"}, {"prompt_std": "best"}, {"per_step": 7}]
)
def test_settings_are_checked(wrong):
    with pytest.raises(ConfigError, match="expected"):
        build(**wrong)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("stop", [0, 1, 4])
def test_a_state_moved_to_another_engine_goes_on_bit_for_bit(optimizer, stop):
    rule = UpdateRule(optimizer=optimizer, lr_scale=0.5)
    toy, whole = build(rule=rule)
    run(toy, whole, 6)
    toy, first = build(rule=rule)
    run(toy, first, stop)
    state = first.state_dict()
    run(toy, first, 1)  # the state is a copy: what follows does not reach into it
    toy, second = build(rule=rule)
    second.load_state_dict(state)
    assert second.step == stop
    assert same(state, second.state_dict())
    run(toy, second, 6 - stop)
    assert same(whole.state_dict(), second.state_dict())


def test_a_state_of_other_noise_or_layers_is_refused():
    toy, engine = build()
    run(toy, engine, 1)
    before = engine.state_dict()
    other = build(sigma=0.1)[1].state_dict()
    with pytest.raises(ValueError, match="noise"):
        engine.load_state_dict(other)
    assert same(before, engine.state_dict())


def test_the_same_scores_give_the_same_bytes_whoever_rendered_them():
    (toy, a), (_, b) = build(), build()
    for _ in range(3):
        task = a.ask()
        found = scores(toy, a, task)
        a.tell(task, found)
        b.tell(b.ask(), found.clone())
    assert same(a.state_dict(), b.state_dict())


@pytest.mark.parametrize("chunk", [1, 3, 5, 32])
def test_chunks_change_scores_by_rounding_alone(chunk):
    toy, engine = build(size=8, per_step=2, repeats=2)
    run(toy, engine, 2)
    task = engine.ask()
    whole, parts = scores(toy, engine, task), scores(toy, engine, task, chunk)
    assert (whole - parts).abs().max() <= 1e-5 * whole.abs().max()
    assert whole.std() > 1e-2


def improvement(seed, rule, shaping, shuffled):
    """Share of the distance to the target that 40 steps remove; `shuffled` scores go to the wrong members."""
    toy, engine = build(seed, size=16, shaping=shaping, rule=rule)
    draw, before = torch.Generator().manual_seed(seed), toy.mean()
    for _ in range(40):
        task = engine.ask()
        found = scores(toy, engine, task)
        engine.tell(task, found[torch.randperm(len(found), generator=draw)] if shuffled else found)
    return 1 - toy.mean() / before


@pytest.mark.parametrize("shaping", ["zscore", "centered_rank"])
@pytest.mark.parametrize(("optimizer", "lr_scale"), [("sgd", 2.0), ("momentum", 0.3), ("adam", 0.4)])
def test_it_learns(optimizer, lr_scale, shaping):
    rule = UpdateRule(optimizer=optimizer, lr_scale=lr_scale, max_norm=None)
    learnt, chance = (
        torch.tensor([improvement(seed, rule, shaping, shuffled) for seed in range(8)]) for shuffled in (False, True)
    )
    gain = learnt - chance
    assert learnt.min() > 0, learnt
    assert gain.mean() > 4 * gain.std() / len(gain) ** 0.5, gain


def test_no_reward_no_step():
    """A reward that cannot tell members apart moves nothing, whatever its level."""
    _, engine = build(repeats=1)
    before = theta(engine)
    task = engine.ask()
    told = engine.tell(task, torch.full(task.shape, 1e6))
    assert told["step_norm"] == 0
    assert same(before, theta(engine))


@pytest.mark.parametrize("kind", [torch.Tensor.tolist, torch.Tensor.numpy, lambda t: t.double().numpy().ravel()])
def test_scores_may_be_lists_and_arrays(kind):
    (toy, a), (_, b) = build(), build()
    task = a.ask()
    found = scores(toy, a, task)
    assert torch.equal(a.tell(task, found)["fitness"], b.tell(task, kind(found))["fitness"])
    assert same(a.state_dict(), b.state_dict())


@pytest.mark.parametrize("wrong", [None, 1.0, "x", [["a"]], {}, [[[1.0]], [[1.0, 2.0]]]])
def test_scores_of_no_numbers_are_named(wrong):
    _, engine = build()
    with pytest.raises(TypeError, match="scores: expected a float32 tensor"):
        engine.tell(engine.ask(), wrong)
    assert engine.step == 0
