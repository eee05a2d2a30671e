"""A run made again from its settings and its fitness log."""

import json
import shutil

import pytest
import torch

from esengine.config import ImageSettings, LoraSettings, ReplayConfig, UpdateRule
from esengine.errors import RunError
from esengine.progress import Progress
from esengine.replay import read_fitness, replay
from esengine.train import train


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_every_bit_comes_back(small, tmp_path, optimizer):
    config = small(tmp_path / "run", update=UpdateRule(optimizer=optimizer, lr_scale=0.5), heldout_every=0)
    train(config)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    found = replay(ReplayConfig(run_dir=tmp_path / "run", out=tmp_path / "again"), Progress())
    assert (found.steps, found.parted) == (4, [])
    for name in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "run" / "adapter" / name).read_bytes()


@pytest.mark.parametrize("chunk", [1, 2, 3, 8])
def test_the_chunk_changes_scores_by_rounding_and_the_update_not_at_all(trained, small, tmp_path, chunk):
    """T2 and T0: a step's mean reward within 1e-3, and the update of those scores bit for bit."""
    train(small(tmp_path / "run", image=ImageSettings(chunk=chunk), heldout_every=0, strip_every=0))
    assert replay(ReplayConfig(run_dir=tmp_path / "run"), Progress()).parted == []
    logs = [folder / "metrics.jsonl" for folder in (tmp_path / "run", trained[1].folder)]
    first, other = (json.loads(log.read_text().splitlines()[0])["reward"] for log in logs)
    assert first == pytest.approx(other, rel=1e-3)


def test_two_hundred_steps_come_back(small, tmp_path):
    settings = dict(steps=200, heldout_every=0, strip_every=0, checkpoint_every=100)
    train(small(tmp_path / "run", lora=LoraSettings(targets=("linear_2",)), **settings))
    found = replay(ReplayConfig(run_dir=tmp_path / "run"), Progress())
    assert (found.steps, found.parted) == (200, [])


def test_the_fitness_log_holds_every_digit(trained):
    config, result = trained
    lines = [json.loads(line) for line in (result.folder / "fitness.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(config.steps))
    for line, fitness in zip(lines, read_fitness(result.folder / "fitness.jsonl", config.population), strict=True):
        assert fitness.tolist() == line["fitness"]
        assert abs(float(fitness.mean())) < 1e-6
        assert float(fitness.std(unbiased=False)) == pytest.approx(1, abs=1e-6)


def test_a_changed_log_is_another_adapter(trained, esengine, workspace):
    shutil.copytree(trained[1].folder, workspace / "run")
    assert esengine("replay", "run")[:2] == (0, esengine("replay", "run")[1])
    code, out, err = esengine("replay", "run")
    assert "4 steps made again" in out
    assert "it is run/adapter bit for bit" in out
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


LINE = json.dumps({"step": 0, "fitness": [1.0, -1.0]})


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (LINE + "\n" + LINE, "line 2: expected step 1"),
        ('{"step": 0, "fitness": [1.0]}', "line 1: .* 2 finite numbers"),
        ('{"step": 0, "fitness": [1.0, NaN]}', "line 1"),
        ('{"step": 0, "fitness": [1.0, "a"]}', "line 1"),
        ('{"step": 0}', "line 1"),
        ("[]", "line 1"),
        (LINE + '\n{"step": 1, "fit', "line 2"),
    ],
)
def test_a_damaged_log_is_named_with_its_line(tmp_path, text, where):
    (tmp_path / "fitness.jsonl").write_text(text)
    with pytest.raises(RunError, match=where):
        read_fitness(tmp_path / "fitness.jsonl", 2)


def test_a_missing_log_is_one_line(tmp_path):
    with pytest.raises(RunError, match=r"fitness\.jsonl: No such file"):
        read_fitness(tmp_path / "fitness.jsonl", 2)


def test_float32_survives_json(tmp_path):
    fitness = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 30, 4096)
    (tmp_path / "f.jsonl").write_text(json.dumps({"step": 0, "fitness": fitness.tolist()}))
    assert torch.equal(read_fitness(tmp_path / "f.jsonl", 4096)[0], fitness)
