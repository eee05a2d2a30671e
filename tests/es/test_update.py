"""The update rule by itself: the reference step, torch.optim's rules, the caps."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from esengine.base.errors import ConfigError, UpdateError
from esengine.es.rule import UpdateRule
from esengine.es.update import Updater


def setup(seed=0, **rule):
    generator = torch.Generator().manual_seed(seed)
    parameters = {name: nn.Parameter(torch.randn(shape, generator=generator), requires_grad=False) for name, shape in
                  (("up.a", (2, 3)), ("down.a", (4,)))}  # fmt: skip
    rule = UpdateRule(**({"max_norm": None} | rule))
    return parameters, Updater(rule, parameters, sigma=0.05)


def gradients(steps):
    generator = torch.Generator().manual_seed(9)
    return [
        {"up.a": torch.randn(2, 3, generator=generator), "down.a": torch.randn(4, generator=generator)}
        for _ in range(steps)
    ]


def values(parameters):
    return {name: p.detach().clone() for name, p in parameters.items()}


def norm(tensors):
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))


def test_sgd_is_the_reference_step():
    parameters, updater = setup(lr_scale=0.1)
    before, g = values(parameters), gradients(1)[0]
    stats = updater.step(g)
    for name, p in parameters.items():
        torch.testing.assert_close(p.data, before[name] + 0.1 * 0.05 * g[name], rtol=1e-6, atol=1e-7)
    assert stats.gradient_norm == pytest.approx(norm(g.values()), rel=1e-6)
    assert stats.step_norm == pytest.approx(0.1 * 0.05 * norm(g.values()), rel=1e-4)
    assert stats.adapter_norm == pytest.approx(norm(parameters.values()), rel=1e-6)


def test_momentum_by_hand():
    parameters, updater = setup(optimizer="momentum", lr_scale=2.0, momentum=0.7)
    expected, velocity = values(parameters), None
    for g in gradients(4):
        updater.step(g)
        velocity = g if velocity is None else {name: 0.7 * velocity[name] + g[name] for name in g}
        expected = {name: expected[name] + 2.0 * 0.05 * velocity[name] for name in g}
    for name, p in parameters.items():
        torch.testing.assert_close(p.data, expected[name], rtol=1e-5, atol=1e-6)


def test_adam_by_hand():
    parameters, updater = setup(optimizer="adam", lr_scale=2.0, momentum=0.8, beta2=0.95)
    expected = {name: p.double() for name, p in values(parameters).items()}
    m, v = ({name: torch.zeros_like(p) for name, p in expected.items()} for _ in range(2))
    for t, g in enumerate(gradients(4), 1):
        updater.step(g)
        for name in g:
            m[name] = 0.8 * m[name] + 0.2 * g[name]
            v[name] = 0.95 * v[name] + 0.05 * g[name].double().square()
            expected[name] += 0.1 * (m[name] / (1 - 0.8**t)) / ((v[name] / (1 - 0.95**t)).sqrt() + 1e-8)
    for name, p in parameters.items():
        torch.testing.assert_close(p.data.double(), expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_the_cap_on_the_step(optimizer):
    """The step is the uncapped one, shortened; all tensors by the same factor."""
    (free, uncapped), (held, capped) = (
        setup(optimizer=optimizer, lr_scale=10.0, max_step_norm=cap) for cap in (None, 0.25)
    )
    start, g = values(free), gradients(1)[0]
    wide, short = uncapped.step(g), capped.step(g)
    assert wide.step_norm > 0.5
    assert short.step_norm == pytest.approx(0.25, rel=1e-5)
    assert short.gradient_norm == wide.gradient_norm
    for name in start:
        shrunk = (free[name] - start[name]) * (0.25 / wide.step_norm)
        torch.testing.assert_close(held[name] - start[name], shrunk, rtol=1e-4, atol=1e-6)


def test_a_cap_that_is_not_reached_changes_no_bit():
    (one, free), (two, capped) = setup(), setup(max_step_norm=100.0, max_norm=100.0)
    for g in gradients(3):
        assert free.step(g) == capped.step(g)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_cap_on_the_adapter():
    """The adapter is scaled onto the ball, its direction kept."""
    (free, uncapped), (held, capped) = setup(lr_scale=10.0), setup(lr_scale=10.0, max_norm=1.5)
    start, g = values(held), gradients(1)[0]
    wide, short = uncapped.step(g), capped.step(g)
    assert wide.adapter_norm > 2
    assert short.adapter_norm == pytest.approx(1.5, rel=1e-6)
    for name in free:
        torch.testing.assert_close(held[name].data, free[name] * (1.5 / wide.adapter_norm), rtol=1e-5, atol=1e-6)
    assert short.step_norm == pytest.approx(norm(held[n] - start[n] for n in held), rel=1e-6)


def test_both_caps_hold_together():
    parameters, updater = setup(lr_scale=100.0, max_step_norm=0.5, max_norm=2.0)
    for g in gradients(20):
        assert updater.step(g).adapter_norm <= 2.0 * (1 + 1e-6)
    assert norm(parameters.values()) <= 2.0 * (1 + 1e-6)


def test_the_default_cap_is_the_reference_runs():
    assert UpdateRule().max_norm == 40.0
    assert UpdateRule().lr_scale == 0.1
    assert UpdateRule().optimizer == "sgd"


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_the_state_is_plain_tensors_and_copies(optimizer):
    _, updater = setup(optimizer=optimizer)
    assert updater.state_dict() == {}
    updater.step(gradients(1)[0])
    state = updater.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    moments = {"momentum_buffer"} if optimizer == "momentum" else {"step", "exp_avg", "exp_avg_sq"}
    assert set(state) == {f"{name}.{moment}" for name in ("up.a", "down.a") for moment in moments}
    before = {name: value.clone() for name, value in state.items()}
    updater.step(gradients(2)[1])
    assert all(torch.equal(state[name], value) for name, value in before.items())


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_the_gradient_is_not_written_to_and_not_kept(optimizer):
    parameters, updater = setup(optimizer=optimizer)
    g = gradients(1)[0]
    before = {name: value.clone() for name, value in g.items()}
    updater.step(g)
    updater.step(gradients(2)[1])
    assert all(torch.equal(g[name], value) for name, value in before.items())
    assert all(p.grad is None for p in parameters.values())


@pytest.mark.parametrize(
    "rule",
    [
        dict(),
        dict(max_norm=40.0),
        dict(max_step_norm=1.0),
        dict(optimizer="momentum", max_norm=40.0),
    ],
)
def test_a_step_out_of_float32_is_taken_back(rule):
    """So are the moments: the next step is as if there had been no such one."""
    (parameters, updater), (twins, twin) = setup(**rule), setup(**rule)
    for each in (updater, twin):
        each.optimizer.param_groups[0]["lr"] = 1e-3
        each.step(gradients(1)[0])
    before, moments = values(parameters), updater.state_dict()
    updater.optimizer.param_groups[0]["lr"] = 3e38
    with pytest.raises(UpdateError, match=r"update: expected finite norms, got step .*: lower lr_scale or sigma"):
        updater.step({name: 10 * g for name, g in gradients(2)[1].items()})
    assert all(torch.equal(parameters[name], before[name]) for name in before)
    after = updater.state_dict()
    assert after.keys() == moments.keys()
    assert all(torch.equal(after[name], moments[name]) for name in moments)
    updater.optimizer.param_groups[0]["lr"] = 1e-3
    for each in (updater, twin):
        each.step(gradients(3)[2])
    assert all(torch.equal(parameters[name], twins[name]) for name in twins)


def test_moments_out_of_float32_are_taken_back():
    parameters, updater = setup(optimizer="adam", max_norm=40.0)
    before = values(parameters)
    with pytest.raises(UpdateError, match="moments inf"):
        updater.step({name: 1e25 * g for name, g in gradients(1)[0].items()})
    assert all(torch.equal(parameters[name], before[name]) for name in before)
    assert updater.state_dict() == {}


def test_an_error_in_the_middle_of_a_step_changes_nothing():
    parameters, updater = setup(optimizer="momentum", max_step_norm=1e-3)
    updater.step(gradients(1)[0])
    before, moments = values(parameters), updater.state_dict()
    step = updater.optimizer.step

    def half():
        step()
        raise torch.OutOfMemoryError("too much")

    updater.optimizer.step = half
    with pytest.raises(torch.OutOfMemoryError):
        updater.step(gradients(2)[1])
    assert all(torch.equal(parameters[name], before[name]) for name in before)
    assert all(torch.equal(value, moments[name]) for name, value in updater.state_dict().items())


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("optimizer", "lion", ("sgd, momentum or adam", "lion")),
        ("lr_scale", 0.0, ("positive", "0.0")),
        ("lr_scale", float("nan"), ("positive", "nan")),
        ("lr_scale", float("inf"), ("positive", "inf")),
        ("max_norm", -1.0, ("positive", "-1.0")),
        ("max_step_norm", 0.0, ("positive", "0.0")),
        ("momentum", 1.0, ("[0, 1)", "1.0")),
        ("beta2", -0.1, ("[0, 1)", "-0.1")),
        ("beta2", float("nan"), ("[0, 1)", "nan")),
    ],
)
def test_wrong_rules(setting, value, words):
    with pytest.raises(ConfigError) as caught:
        UpdateRule(**{setting: value})
    assert caught.value.setting == setting
    assert all(word in caught.value.problem for word in words)


class Count(TorchDispatchMode):
    """How many operations torch was asked for."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_many_tensors_take_few_operations(optimizer):
    parameters = {str(i): torch.nn.Parameter(torch.randn(2, 3), requires_grad=False) for i in range(336)}
    updater = Updater(UpdateRule(optimizer=optimizer), parameters, 0.1)
    gradient = {name: torch.randn(2, 3) for name in parameters}
    updater.step(gradient)
    with Count() as count:
        updater.step(gradient)
    assert 0 < count.calls <= 1000


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_long_tensors_count_as_short_ones(optimizer):
    """Their norms are summed over pieces; neither the gradient nor the result depends on that."""
    rule = UpdateRule(optimizer=optimizer, max_norm=None)
    whole = torch.nn.Parameter(torch.randn(300, 301, generator=torch.Generator().manual_seed(0)), requires_grad=False)
    rows = {str(i): torch.nn.Parameter(row.clone(), requires_grad=False) for i, row in enumerate(whole)}
    one, many = Updater(rule, {"x": whole}, 0.1), Updater(rule, rows, 0.1)
    for step in range(3):
        g = torch.randn(300, 301, generator=torch.Generator().manual_seed(step))
        before = g.clone()
        stats = one.step({"x": g})
        others = many.step({str(i): row for i, row in enumerate(before)})
        assert torch.equal(g, before)
        assert torch.equal(whole, torch.stack(list(rows.values())))
        for name, value in vars(stats).items():
            assert value == pytest.approx(getattr(others, name), rel=1e-12)
