"""A run made again from its settings and its fitness log."""

import dataclasses
import json
import shutil

import pytest
import torch

from esengine.base.errors import ConfigError, RunError
from esengine.base.progress import Progress
from esengine.es.population import Population
from esengine.es.rule import UpdateRule
from esengine.models.sana import sana_sprint
from esengine.run import checkpoint
from esengine.run.replay import read_fitness, replay
from esengine.run.settings import ESSettings, LoraSettings, ReplayConfig, TrainConfig
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
            found[chunk] = First(patch)
            settings = dict(image=ImageSettings(chunk=chunk), heldout_every=0, strip_every=0, steps=2)
            train(small(run, reward=reward(found[chunk].score), **settings))
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


def test_the_fitness_log_holds_every_digit(trained):
    config, result = trained
    lines = [json.loads(line) for line in (result.folder / "fitness.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(config.steps))
    for line, logged in zip(lines, read_fitness(result.folder / "fitness.jsonl", config), strict=True):
        fitness = logged.fitness
        assert fitness.tolist() == line["fitness"]
        assert abs(float(fitness.mean())) < 1e-6
        assert float(fitness.std(unbiased=False)) == pytest.approx(1, abs=1e-6)


def test_a_changed_log_is_another_adapter(trained, esengine, workspace):
    shutil.copytree(trained[1].folder, workspace / "run")
    assert esengine("replay", "run")[:2] == (0, esengine("replay", "run")[1])
    code, out, err = esengine("replay", "run")
    assert "4 steps made again" in out
    assert "equals run/adapter bit for bit" in out
    lines = (workspace / "run" / "fitness.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    first["fitness"][0], first["fitness"][1] = first["fitness"][1], first["fitness"][0]
    (workspace / "run" / "fitness.jsonl").write_text("\n".join([json.dumps(first), *lines[1:]]) + "\n")
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
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
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
    with open(tmp_path / "run" / "fitness.jsonl", "a") as log:
        log.write('{"step": 5, "fitn')
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
    log = tmp_path / "run" / "fitness.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert ["settings" in line for line in lines] == [True, False, True, False, False]
    assert [len(line["fitness"]) for line in lines] == [4, 4, 6, 6, 6]
    assert replay(ReplayConfig(run_dir=tmp_path / "run"), Progress()).agreed == 5
    del lines[2]["settings"]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(RunError, match="line 3: expected step 2 and 4 finite numbers"):
        replay(ReplayConfig(run_dir=tmp_path / "run"), Progress())


def test_another_precision_on_the_way_is_replayed_from_the_first(small, tmp_path):
    """Where an adapter begins depends on the model's precision."""
    config = small(tmp_path / "run", steps=1, heldout_every=0, strip_every=0)
    train(config)
    train(dataclasses.replace(config, resume=True, allow_change=True, dtype="bfloat16", steps=2))
    assert replay(ReplayConfig(run_dir=tmp_path / "run"), Progress()).agreed == 2


def test_a_log_with_its_end_missing_is_said_to_be_that(trained, esengine, workspace):
    shutil.copytree(trained[1].folder, workspace / "run")
    lines = (workspace / "run" / "fitness.jsonl").read_text().splitlines(keepends=True)
    (workspace / "run" / "fitness.jsonl").write_text("".join(lines[:3]))
    code, _, err = esengine("replay", "run")
    assert code == 1
    assert "run/fitness.jsonl: lines are missing: it ends after step 3, and there is a checkpoint of step 4" in err


def test_an_adapter_that_cannot_be_read_is_one_line(trained, esengine, workspace):
    shutil.copytree(trained[1].folder, workspace / "run")
    file = workspace / "run" / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    code, _, err = esengine("replay", "run")
    assert code == 1
    assert "adapter_model.safetensors: cannot be read" in err
    assert err.count("\n") <= 2


LINE = json.dumps({"step": 0, "fitness": [1.0, -1.0]})
TWO = TrainConfig(population=2)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (LINE + "\n" + LINE, "line 2: expected step 1"),
        ('{"step": 0, "fitness": [1%s, 1]}' % ("0" * 400), "line 1"),
        ('{"step": 0, "settings": {"reward": "evil:score"}, "fitness": [1, -1]}', "line 1"),
        ('{"step": 0, "settings": 7, "fitness": [1, -1]}', "line 1"),
        ('{"step": 0, "fitness": [[1], [-1]]}', "line 1"),
        ("[" * 20000, "line 1"),
        ('{"step": 0, "fitness": [1.0]}', "line 1: .* 2 finite numbers"),
        ('{"step": 0, "fitness": [1.0, NaN]}', "line 1"),
        ('{"step": 0, "fitness": [1.0, "a"]}', "line 1"),
        ('{"step": 0}', "line 1"),
        ("[]", "line 1"),
        (LINE + '\n{"step": 1, "fit', "line 2"),
    ],
)
def test_a_damaged_log_is_named_with_its_line(tmp_path, text, where):
    (tmp_path / "fitness.jsonl").write_text(f"{text}\n")
    with pytest.raises(RunError, match=where):
        read_fitness(tmp_path / "fitness.jsonl", TWO)


@pytest.mark.parametrize("text", ["", LINE, LINE[:-4]])
def test_a_log_without_a_step_is_one_line(tmp_path, text):
    (tmp_path / "fitness.jsonl").write_text(text)
    with pytest.raises(RunError, match="expected the fitness of a step at least"):
        read_fitness(tmp_path / "fitness.jsonl", TWO)


def test_settings_in_a_log_that_are_none_are_one_line(tmp_path):
    line = {"step": 0, "settings": {"es": {"sigma": -1}}, "fitness": [1, -1]}
    (tmp_path / "fitness.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(ConfigError, match=r"es\.sigma: expected a positive number"):
        read_fitness(tmp_path / "fitness.jsonl", TWO)


def test_a_missing_log_is_one_line(tmp_path):
    with pytest.raises(RunError, match=r"fitness\.jsonl: No such file"):
        read_fitness(tmp_path / "fitness.jsonl", TWO)


def test_float32_survives_json(tmp_path):
    fitness = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 30, 4096)
    (tmp_path / "f.jsonl").write_text(json.dumps({"step": 0, "fitness": fitness.tolist()}) + "\n")
    assert torch.equal(read_fitness(tmp_path / "f.jsonl", TrainConfig(population=4096))[0].fitness, fitness)
