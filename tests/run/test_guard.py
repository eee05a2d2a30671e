"""What a run does with its held-out scores: the best adapter, the moving average, and a run that ends early."""

import json
import math

import journals
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn

import esengine
from esengine.base.errors import ConfigError, RunError
from esengine.base.progress import Progress
from esengine.es.rule import UpdateRule
from esengine.evaluation.entries import parse_entries
from esengine.report import write_page
from esengine.run import journal
from esengine.run.checkpoint import Checkpoint
from esengine.run.journal import Copied, Ended, Measured
from esengine.run.kept import BEST, EMA, Kept
from esengine.run.replay import replay
from esengine.run.settings import ReplayConfig
from esengine.run.train import train

FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")


def brightness(images, prompts):
    return images.float().mean((1, 2, 3)) / 255


def darkness(images, prompts):
    return -brightness(images, prompts)


@pytest.fixture
def bright(small, reward):
    """Settings of a run that makes images brighter, while a held-out reward wants them dark."""
    name = reward(brightness, dark=darkness)

    def make(run_dir, **changes):
        rule = UpdateRule(lr_scale=40.0)
        settings = dict(reward=name, heldout_reward="own:dark", heldout_every=1, strip_every=0, steps=6, update=rule)
        return small(run_dir, **settings | changes)

    return make


def records(run_dir, kind):
    return journal.read(run_dir / journal.NAME).of(kind)


def files(run_dir, name):
    return [(run_dir / name / file).read_bytes() for file in FILES]


def attached(direct=False):
    module = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).requires_grad_(False)
    config = esengine.Direct(["0", "1"]) if direct else LoraConfig(r=2, target_modules=["0", "1"])
    return esengine.attach(module, config, esengine.Noise(seed=3))


# ---- the copies


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("decay", [0.5, 0.99])
def test_the_average_is_the_weighted_mean_of_the_adapters(decay, direct):
    population = attached(direct)
    kept, thetas = Kept(population, decay=decay), []
    for step in range(5):
        population.update(step=step, fitness=torch.tensor([1.0, -1.0, 0.5, 0.2]))
        kept.average(step + 1)
        thetas.append({name: each.double() for name, each in population.parameters().items()})
    weights = [decay**age for age in reversed(range(5))]
    for name, average in kept.copies[EMA].tensors.items():
        by_hand = sum(w * theta[name] for w, theta in zip(weights, thetas, strict=True)) / sum(weights)
        torch.testing.assert_close(average.double(), by_hand, rtol=1e-5, atol=1e-8)
        assert not torch.equal(average, thetas[-1][name].float())


@pytest.mark.parametrize("direct", [False, True])
def test_a_copy_is_saved_and_the_adapter_stays(tmp_path, direct):
    population = attached(direct)
    kept = Kept(population)
    kept.take(BEST, 0, by="score", mean=1.0)
    first = {name: each.clone() for name, each in population.lora().items()}
    population.update(step=0, fitness=torch.tensor([1.0, -1.0]))
    before = {name: each.clone() for name, each in population.parameters().items()}
    with kept.in_place(BEST) as there:
        there.save_pretrained(tmp_path)
    saved = load_file(tmp_path / FILES[0])
    assert all(torch.equal(saved[f"base_model.model.{name}"], each) for name, each in first.items())
    after = population.parameters()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_checkpoint_restores_the_copies_and_a_wrong_one_is_refused(tmp_path):
    population = attached()
    kept = Kept(population, decay=0.9)
    kept.take(BEST, 4, by="score", mean=1.0)
    kept.average(5)
    saved = Checkpoint(5, tmp_path, kept.tensors(), {"kept": kept.meta()}, ())
    again = Kept(population, decay=0.9, by="score", saved=saved)
    assert again.meta() == kept.meta()
    assert all(torch.equal(each, again.tensors()[name]) for name, each in kept.tensors().items())
    assert EMA not in Kept(population, decay=0.8, by="score", saved=saved)
    assert BEST not in Kept(population, decay=0.9, by="other", saved=saved)
    less = dict(list(kept.tensors().items())[1:])
    more = kept.tensors() | {"kept/worst/0.lora_A.weight": torch.zeros(2, 6)}
    facts = kept.meta()
    for tensors, meta in [
        (less, facts),
        (more, facts),
        (more, facts | {"worst": {"step": 1}}),
        (kept.tensors(), {}),
        (kept.tensors(), facts | {BEST: {"step": "4", "by": "score", "mean": 1.0}}),
        (kept.tensors(), facts | {BEST: {"step": 4, "by": "score"}}),
        (kept.tensors(), [1]),
    ]:
        with pytest.raises(RunError, match="kept"):
            Kept(population, decay=0.9, by="score", saved=Checkpoint(5, tmp_path, tensors, {"kept": meta}, ()))


# ---- in a run


def test_the_best_adapter_is_kept_and_survives_a_resume(bright, tmp_path):
    whole = train(bright(tmp_path / "whole", keep="best", keep_by="own:score", ema=0.5))
    means = [record.scores["own:score"]["mean"] for record in records(tmp_path / "whole", Measured)]
    best = max(range(len(means)), key=lambda at: means[at])
    copied = records(tmp_path / "whole", Copied)
    assert best > 0
    assert copied[-1] == Copied(best, BEST, "own:score", means[best])
    assert [each.mean for each in copied] == sorted({max(means[: at + 1]) for at in range(len(means))})
    assert whole.kept == {BEST: best, EMA: 6}
    train(bright(tmp_path / "parts", keep="best", keep_by="own:score", ema=0.5, steps=3))
    train(bright(tmp_path / "parts", keep="best", keep_by="own:score", ema=0.5, resume=True))
    for name in ("adapter", "adapter-best", "adapter-ema"):
        assert files(tmp_path / "whole", name) == files(tmp_path / "parts", name)
    assert files(tmp_path / "whole", "adapter-ema") != files(tmp_path / "whole", "adapter")
    entries = [row["entry"] for row in whole.comparison.overall]
    assert [name.partition("@")[0] for name in entries] == ["base", "adapter", "adapter-best", "adapter-ema"]
    replayed = replay(ReplayConfig(tmp_path / "parts"), Progress())
    assert replayed.agreed == 6
    assert replayed.kept == {"adapter-best": best, "adapter-ema": 6}
    assert parse_entries([f"{tmp_path / 'whole' / 'adapter-best'}@1"])[0].name == "adapter-best"


def test_without_these_settings_a_run_is_as_before(bright, tmp_path):
    plain, kept = tmp_path / "plain", tmp_path / "kept"
    train(bright(plain))
    train(bright(kept, keep="best", ema=0.9))
    assert files(plain, "adapter") == files(kept, "adapter")
    assert journals.fitness(plain) == journals.fitness(kept)
    assert not list(plain.glob("adapter-*"))


@pytest.mark.parametrize("action", ["stop", "rollback"])
def test_a_run_whose_rewards_diverge_ends(bright, tmp_path, action, notes, outcome):
    warned = train(bright(tmp_path / "warned"))
    at = warned.parted["own:dark"]
    assert 0 < at < 6
    result = train(bright(tmp_path / "run", heldout_action=action), notes)
    run = journal.read(tmp_path / "run" / journal.NAME)
    left = at if action == "stop" else at - 1
    assert run.done == at
    assert run.ended == Ended(at, ["own:dark"], left)
    assert result.parted == {"own:dark": at}
    assert any(f"--heldout-action {action}" in line and "--resume" in line for line in notes.said)
    replayed = replay(ReplayConfig(tmp_path / "run"), notes)
    assert (replayed.steps, replayed.agreed) == (left, left)
    page = write_page(tmp_path / "run").read_text()
    assert f"The run ended after step {at}" in page
    assert (f"Its adapter is that of step {left}" in page) == (action == "rollback")
    # it can go on, and is then the run that was only warned
    train(bright(tmp_path / "run", resume=True))
    assert outcome(tmp_path / "run")["adapter"] == outcome(tmp_path / "warned")["adapter"]
    assert journals.fitness(tmp_path / "run") == journals.fitness(tmp_path / "warned")
    assert not records(tmp_path / "run", Ended)


def test_a_run_that_has_ended_ends_again_if_it_is_resumed(bright, tmp_path):
    train(bright(tmp_path / "run", heldout_action="rollback"))
    before = files(tmp_path / "run", "adapter"), records(tmp_path / "run", Ended)
    train(bright(tmp_path / "run", heldout_action="rollback", resume=True))
    assert (files(tmp_path / "run", "adapter"), records(tmp_path / "run", Ended)) == before


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        (dict(heldout_action="stop", heldout_every=0), "heldout_action"),
        (dict(keep="best", heldout_every=0), "keep"),
        (dict(heldout_action="stop", heldout_reward="none"), "heldout_action"),
        (dict(keep="best", heldout_reward="none"), "keep"),
        (dict(keep="best", keep_by="own:dork"), "keep_by"),
        (dict(keep_by="own:dark"), "keep_by"),
    ],
)
def test_a_guard_that_could_never_act_is_refused(bright, tmp_path, changes, setting):
    with pytest.raises(ConfigError) as caught:
        train(bright(tmp_path / "run", **changes))
    assert caught.value.setting == setting
    assert not journal.has_steps(tmp_path / "run" / journal.NAME)


@pytest.mark.parametrize("ema", [-0.1, 1.0, math.nan, "much"])
def test_a_decay_outside_its_range_is_refused(bright, tmp_path, ema):
    with pytest.raises(ConfigError) as caught:
        bright(tmp_path / "run", ema=ema)
    assert caught.value.setting == "ema"


def test_records_of_the_guard_are_checked(bright, tmp_path):
    train(bright(tmp_path / "run", heldout_action="stop", keep="best"))
    path = tmp_path / "run" / journal.NAME
    *lines, last = path.read_text().splitlines()
    for bad in ('"adapter_step": 99', '"adapter_step": "1"', '"adapter_step": -1'):
        path.write_text("\n".join([*lines, last.rpartition('"adapter_step"')[0] + bad + "}"]) + "\n")
        with pytest.raises(RunError, match="step"):
            journal.read(path)
    path.write_text("\n".join([*lines, last, last]) + "\n")
    with pytest.raises(RunError, match="after the end"):
        journal.read(path)


def test_a_run_that_has_ended_is_left_as_it_is_until_it_may_go_on(bright, tmp_path, notes):
    """Also after its last step: the adapter that was rolled back comes back with `warn`."""
    at = train(bright(tmp_path / "warned")).parted["own:dark"]
    train(bright(tmp_path / "run", heldout_action="rollback", steps=at))
    rolled = files(tmp_path / "run", "adapter")
    before = (tmp_path / "run" / journal.NAME).read_bytes()
    train(bright(tmp_path / "run", heldout_action="rollback", steps=at, resume=True), notes)
    assert any("is finished" in line or "has ended" in line for line in notes.said)
    assert (tmp_path / "run" / journal.NAME).read_bytes() == before
    assert files(tmp_path / "run", "adapter") == rolled
    train(bright(tmp_path / "run", steps=at, resume=True))
    train(bright(tmp_path / "short", steps=at))
    assert files(tmp_path / "run", "adapter") == files(tmp_path / "short", "adapter") != rolled


def test_the_best_of_the_last_step_is_kept_if_the_run_goes_on(small, reward, tmp_path):
    """Between two measurements, at a step that only the shorter run measured."""
    scores = iter([1.0, 2.0, 9.0, 3.0, 2.0, 9.0, 3.0, 1.0, 1.0, 1.0, 1.0])

    def falling(images, prompts):
        return torch.full((len(images),), next(scores, 0.0)) + torch.arange(len(images)) * 0.01

    name = reward(brightness, other=falling)
    settings = dict(reward=name, heldout_reward="own:other", heldout_every=2, strip_every=0, keep="best")
    train(small(tmp_path / "run", steps=3, **settings))
    first = records(tmp_path / "run", Copied)[-1]
    assert first.step == 3
    train(small(tmp_path / "run", steps=4, resume=True, **settings))
    assert [each.step for each in records(tmp_path / "run", Measured)] == [0, 2, 3, 4]


def test_what_is_kept_may_change_on_resume(bright, tmp_path, notes):
    train(bright(tmp_path / "run", keep="best", ema=0.5, steps=2))
    train(bright(tmp_path / "run", steps=3, resume=True, allow_change=True), notes)
    for name in ("adapter-best", "adapter-ema"):
        assert any(name in line and "no longer" in line for line in notes.said)
    train(bright(tmp_path / "run", steps=4, resume=True, keep="best", heldout_reward="jpeg_compressibility"), notes)
    assert records(tmp_path / "run", Copied)[-1].by == "jpeg_compressibility"


def test_eval_json_names_the_adapter_that_was_compared(bright, tmp_path):
    train(bright(tmp_path / "run", heldout_action="rollback"))
    replayed = replay(ReplayConfig(tmp_path / "run"), Progress())
    made = json.loads((tmp_path / "run" / "eval.json").read_text())["settings"]
    assert made["adapter_sha256"] == replayed.sha256
