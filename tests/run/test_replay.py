"""A run made again from its settings and its fitness log."""

import dataclasses
import shutil
from functools import partial

import journals
import pytest
import torch

from esengine.base.errors import ConfigError, RunError
from esengine.base.progress import Progress
from esengine.es.population import Population
from esengine.es.rule import UpdateRule
from esengine.models.sana import sana_sprint
from esengine.run import checkpoint
from esengine.run.replay import replay
from esengine.run.settings import ESSettings, LoraSettings, ReplayConfig
from esengine.run.train import train
from esengine.sampling.settings import ImageSettings


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_every_bit_comes_back(small, tmp_path, optimizer):
    config = small(tmp_path / "run", update=UpdateRule(optimizer=optimizer, lr_scale=0.5), heldout_every=0)
    train(config)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    found = replay(ReplayConfig(run_dir=tmp_path / "run", out=tmp_path / "again"), Progress())
    assert (found.steps, found.parted) == (4, [])
    for name in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "run" / "adapter" / name).read_bytes()


class First:
    """What the first step of a run is made of: images, latents and each member's noise."""

    def __init__(self, patch):
        self.images, self.latents, self.noise = [], [], {}
        chunk, drawn = Population._chunk, sana_sprint.latents

        def noise(population, step, members):
            found = chunk(population, step, members)
            for row, member in enumerate(members.tolist() if step == 0 else []):
                rows = len(members)
                each = [f[row * len(f) // rows].clone() for layer in found.factors.values() for f in layer]
                for one, other in zip(each, self.noise.setdefault(member, each), strict=True):
                    assert torch.equal(one, other)
            return found

        def latents(**keys):
            found = drawn(**keys)
            if keys["step"] == 0 and keys["draw"] == 0:
                self.latents.append(found.clone())
            return found

        patch.setattr(Population, "_chunk", noise)
        patch.setattr(sana_sprint, "latents", latents)

    def score(self, images, prompts):
        if sum(map(len, self.images)) < 8:
            self.images.append(images.int())
        return images.float().mean(dim=(1, 2, 3)) / 255


def test_the_chunk_changes_images_by_rounding_and_the_update_not_at_all(small, tmp_path, monkeypatch, reward):
    """T2: images within 1 level of 255. T0: noise, latents and the update of given scores, every bit."""
    found = {}
    for chunk in (8, 3, 2, 1):
        run = tmp_path / str(chunk)
        with monkeypatch.context() as patch:
            patch.setattr("esengine.run.train.check_members", lambda ready: None)  # it renders other rows
            found[chunk] = First(patch)
            settings = dict(image=ImageSettings(chunk=chunk), heldout_every=0, strip_every=0, steps=2)
            train(small(run, reward=reward(partial(found[chunk].score)), **settings))
        assert replay(ReplayConfig(run_dir=run), Progress()).parted == []
        ours, theirs = found[chunk], found[8]
        assert [len(each) for each in ours.images] == {8: [8], 3: [3, 3, 2], 2: [2] * 4, 1: [1] * 8}[chunk]
        assert (torch.cat(ours.images) - torch.cat(theirs.images)).abs().max() <= 1
        assert torch.equal(torch.cat(ours.latents), torch.cat(theirs.latents))
        assert sorted(ours.noise) == [0, 1, 2, 3]
        for member, factors in ours.noise.items():
            assert all(torch.equal(one, other) for one, other in zip(factors, theirs.noise[member], strict=True))


def test_two_hundred_steps_come_back(small, tmp_path):
    settings = dict(steps=200, heldout_every=0, strip_every=0, checkpoint_every=100)
    train(small(tmp_path / "run", lora=LoraSettings(targets=("linear_2",)), **settings))
    found = replay(ReplayConfig(run_dir=tmp_path / "run"), Progress())
    assert (found.steps, found.parted) == (200, [])


def test_the_journal_holds_every_digit(trained):
    config, result = trained
    fitness = torch.tensor(journals.fitness(result.folder), dtype=torch.float32)
    assert fitness.tolist() == journals.fitness(result.folder)
    assert fitness.shape == (config.steps, config.population)
    assert fitness.mean(1).abs().max() < 1e-6
    assert fitness.std(1, unbiased=False).tolist() == pytest.approx([1] * config.steps, abs=1e-6)


def swapped(records):
    """The first step with the fitness of two members exchanged."""
    step = next(record for record in records if record["kind"] == "step")
    step["fitness"][0], step["fitness"][1] = step["fitness"][1], step["fitness"][0]
    return records


def test_a_changed_log_is_another_adapter(trained, esengine, workspace):
    shutil.copytree(trained[1].folder, workspace / "run")
    assert esengine("replay", "run")[:2] == (0, esengine("replay", "run")[1])
    code, out, err = esengine("replay", "run")
    assert "4 steps made again" in out
    assert "equals run/adapter bit for bit" in out
    journals.rewrite(workspace / "run", swapped)
    code, out, err = esengine("replay", "run")
    assert code == 1
    assert "it differs from run/adapter, first in base_model.model." in err


def test_without_an_adapter_there_is_nothing_to_compare(trained, esengine, workspace):
    shutil.copytree(trained[1].folder, workspace / "run", ignore=shutil.ignore_patterns("adapter"))
    code, out, _ = esengine("replay", "run", "--out", "again")
    assert code == 0
    assert "no adapter to compare with" in out
    assert (workspace / "again" / "adapter_model.safetensors").is_file()


def test_a_run_that_dropped_pairs_comes_back(small, tmp_path, reward):
    first = []

    def score(images, prompts):
        """No number for the first image it is ever asked for."""
        scores = images.float().mean(dim=(1, 2, 3)) / 255
        first.append(float(scores[0]))
        return torch.where(scores == first[0], torch.nan, scores)

    settings = dict(population=12, on_bad_reward="drop-pair", heldout_every=0, strip_every=0, steps=2)
    train(small(tmp_path / "run", reward=reward(score), **settings))
    metrics = journals.steps(tmp_path / "run")
    assert [line["dropped_pairs"] for line in metrics] == [1, 0]
    assert replay(ReplayConfig(run_dir=tmp_path / "run"), Progress()).agreed == 2


def test_a_deterministic_run_comes_back(small, tmp_path):
    train(small(tmp_path / "run", deterministic=True, heldout_every=0, strip_every=0))
    assert replay(ReplayConfig(run_dir=tmp_path / "run"), Progress()).agreed == 4


@pytest.mark.parametrize(("every", "agreed"), [(3, 3), (9, 0)])
def test_a_run_killed_between_checkpoints_has_its_log_ahead(small, tmp_path, monkeypatch, esengine, every, agreed):
    """What SIGKILL leaves: no checkpoint of the end, and perhaps a line that is not whole."""
    settings = dict(checkpoint_every=every, heldout_every=0, strip_every=0, steps=5)
    whole = checkpoint.save

    def save(root, step, *rest):
        if step == 5:
            raise KeyboardInterrupt
        return whole(root, step, *rest)

    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(KeyboardInterrupt):
        train(small(tmp_path / "run", **settings))
    with open(tmp_path / "run" / "journal.jsonl", "a") as journal:
        journal.write('{"kind": "step", "step": 5, "fitn')
    found = replay(ReplayConfig(run_dir=tmp_path / "run"), Progress())
    assert (found.steps, found.agreed, found.parted) == (5, agreed, [])
    code, out, _ = esengine("replay", tmp_path / "run")
    assert code == 0
    assert f"equals the result of the first {agreed} steps bit for bit" in out
    assert f"the log has {5 - agreed} more" in out


def test_settings_that_changed_on_the_way_are_replayed(small, tmp_path):
    config = small(tmp_path / "run", steps=2, heldout_every=0, strip_every=0)
    train(config)
    es = ESSettings(sigma=0.02, prompts_per_step=2, repeats=1)
    changed = dict(es=es, population=6, seed=3, update=UpdateRule(optimizer="momentum", lr_scale=0.5), steps=4)
    train(dataclasses.replace(config, resume=True, allow_change=True, **changed))
    train(dataclasses.replace(config, resume=True, **changed | {"steps": 5}))
    assert [len(each) for each in journals.fitness(tmp_path / "run")] == [4, 4, 6, 6, 6]
    assert replay(ReplayConfig(run_dir=tmp_path / "run"), Progress()).agreed == 5
    lost = lambda records: [each for each in records if each["kind"] != "start" or each["step"] == 0]  # noqa: E731
    journals.rewrite(tmp_path / "run", lost)
    with pytest.raises(RunError, match="expected a fitness of 4 numbers, got 6"):
        replay(ReplayConfig(run_dir=tmp_path / "run"), Progress())


def test_settings_in_a_journal_that_are_none_are_one_line(trained, tmp_path):
    shutil.copytree(trained[1].folder, tmp_path / "run")

    def wrong(records):
        records[0]["settings"]["es"]["sigma"] = -1
        return records

    journals.rewrite(tmp_path / "run", wrong)
    with pytest.raises(ConfigError, match=r"es\.sigma: expected a positive number"):
        replay(ReplayConfig(run_dir=tmp_path / "run"), Progress())


def test_a_journal_without_a_step_is_one_line(trained, tmp_path):
    shutil.copytree(trained[1].folder, tmp_path / "run")
    journals.rewrite(tmp_path / "run", lambda records: records[:1])
    with pytest.raises(RunError, match=r"journal\.jsonl: expected at least one step"):
        replay(ReplayConfig(run_dir=tmp_path / "run"), Progress())


def test_settings_that_changed_before_the_first_step_are_replayed(small, tmp_path):
    config = small(tmp_path / "run", steps=2, heldout_every=0, strip_every=0)

    class Killed(Exception):
        pass

    def killed(*_):
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("esengine.run.loop._score", killed)
        with pytest.raises(Killed):
            train(config)
    train(dataclasses.replace(config, resume=True, allow_change=True, seed=5))
    assert replay(ReplayConfig(run_dir=tmp_path / "run"), Progress()).agreed == 2


def test_another_precision_on_the_way_is_replayed_from_the_first(small, tmp_path):
    """Where an adapter begins depends on the model's precision."""
    config = small(tmp_path / "run", steps=1, heldout_every=0, strip_every=0)
    train(config)
    train(dataclasses.replace(config, resume=True, allow_change=True, dtype="bfloat16", steps=2))
    assert replay(ReplayConfig(run_dir=tmp_path / "run"), Progress()).agreed == 2


def test_a_log_with_its_end_missing_is_said_to_be_that(trained, esengine, workspace):
    shutil.copytree(trained[1].folder, workspace / "run")
    journals.rewrite(workspace / "run", lambda records: [each for each in records if each["step"] < 3])
    code, _, err = esengine("replay", "run")
    assert code == 1
    assert "run/journal.jsonl: lines are missing: it ends after step 3, but there is a checkpoint of step 4" in err


def test_an_adapter_that_cannot_be_read_is_one_line(trained, esengine, workspace):
    shutil.copytree(trained[1].folder, workspace / "run")
    file = workspace / "run" / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    code, _, err = esengine("replay", "run")
    assert code == 1
    assert "adapter_model.safetensors: cannot be read" in err
    assert err.count("\n") <= 2
