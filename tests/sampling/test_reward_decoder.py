"""How two decoders' scores of one step are compared."""

import math

import pytest
import torch
from peft import LoraConfig
from torch import nn

import esengine
from esengine.es.prompts import PromptSampler
from esengine.rewards import COMBINED
from esengine.sampling.reward_decoder import CORRELATION, COSINE, compare, warning


@pytest.fixture
def engine():
    module = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    noise = esengine.Noise(sigma=0.1, rank=2, seed=3)
    population = esengine.attach(module, LoraConfig(r=2, target_modules=["0", "2"]), noise)
    return esengine.Engine(population, PromptSampler(4, 2, 0), size=8, repeats=2)


def scores(engine, seed):
    drawn = torch.randn(engine.ask().shape, generator=torch.Generator().manual_seed(seed))
    return {COMBINED: drawn, "one": drawn + 1}


def test_correlation_and_cosine_are_those_of_fitness_and_gradient(engine):
    task, cheap, full = engine.ask(), scores(engine, 0), scores(engine, 1)
    before = engine.population.state_dict()["adapter"]
    found = compare(engine, task, cheap, full)
    fitness = [engine.fitness(task, each[COMBINED]) for each in (cheap, full)]
    assert found[CORRELATION] == pytest.approx(float(torch.corrcoef(torch.stack(fitness))[0, 1]), abs=1e-6)
    noise = []
    for member in range(task.size):
        state = engine.population.member_state_dict(step=task.step, member=member)
        noise.append(torch.cat([
            (tensor - before[name.removeprefix("base_model.model.")]).flatten() for name, tensor in state.items()
        ]))  # fmt: skip
    g, h = (each @ torch.stack(noise) for each in fitness)
    assert found[COSINE] == pytest.approx(float(torch.cosine_similarity(g, h, dim=0)), abs=1e-5)
    assert found["reward_vae/full/one"] == pytest.approx(float(full["one"].mean()))
    after = engine.population.state_dict()["adapter"]
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_equal_opposite_and_flat(engine):
    task, one = engine.ask(), scores(engine, 0)
    flat = {name: torch.zeros_like(each) for name, each in one.items()}
    found = compare(engine, task, one, one)
    assert (found[CORRELATION], found[COSINE]) == (pytest.approx(1), pytest.approx(1))
    assert warning(found) is None
    found = compare(engine, task, {name: -each for name, each in one.items()}, one)
    assert (found[CORRELATION], found[COSINE]) == (pytest.approx(-1), pytest.approx(-1))
    found = compare(engine, task, flat, one)
    assert (found[CORRELATION], found[COSINE]) == (0, 0)
    assert "--image.reward-vae" in warning(found)
    found = compare(engine, task, flat, flat)
    assert math.isnan(found[CORRELATION])
    assert math.isnan(found[COSINE])
    assert warning(found) is None


@pytest.mark.parametrize(("correlation", "cosine", "warned"), [(0.86, 0.86, 0), (0.84, 0.9, 1), (0.9, 0.84, 1)])
def test_below_the_limit_there_is_a_warning(correlation, cosine, warned):
    assert bool(warning({CORRELATION: correlation, COSINE: cosine})) == bool(warned)
