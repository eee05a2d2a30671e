"""`train --dry-run` loads and checks everything, says what the run would take, and writes nothing."""

import dataclasses

import pytest

from esengine.base.errors import ConfigError, RewardError, RunError
from esengine.run.dry_run import dry_run
from esengine.run.train import train


def test_it_counts_what_a_run_makes(small, tmp_path, reward):
    scored = []

    def count(images, prompts):
        scored.append(len(images))
        return images.float().mean(dim=(1, 2, 3))

    config = small(tmp_path / "run", reward=reward(count), heldout_every=3, strip_every=3)
    found = dry_run(config)
    assert not (tmp_path / "run").exists()
    scored.clear()
    train(config)
    assert found.images == sum(scored) + 2 * 3 * 2  # two strips of three members, which are not scored
    assert found.images_per_step == config.population * 2
    assert found.run_dir == tmp_path / "run"
    files = " ".join(found.files)
    assert f"strips: {len(list((tmp_path / 'run' / 'strips').iterdir()))} pictures" in files
    assert f"heldout: {len(list((tmp_path / 'run' / 'heldout').iterdir()))} pictures of 3 images" in files
    assert max(found.layers.values()) <= 1e-3
    assert found.seconds > 0


def test_it_refuses_what_a_run_refuses(small, trained, tmp_path, reward):
    with pytest.raises(RunError, match="already holds a run"):
        dry_run(dataclasses.replace(trained[0]))
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="expected a folder"):
        dry_run(small(tmp_path / "file"))
    with pytest.raises(RewardError):
        dry_run(small(tmp_path / "run", reward=reward(lambda images, prompts: [0.0])))
    with pytest.raises(ConfigError) as caught:
        dry_run(dataclasses.replace(small(tmp_path / "run"), dry_run=True, resume=True))
    assert caught.value.setting == "dry_run"
    assert not (tmp_path / "run").exists()


def test_the_command_line_says_it_in_lines(small, esengine, workspace, prompt_files):
    train_file, held_file = prompt_files
    flags = ["--model", "tiny:sd3", "--reward", "jpeg_compressibility", "--population", "4", "--steps", "3"]
    flags += ["--prompts", train_file, "--eval-prompts", held_file]
    before = set(workspace.rglob("*"))
    code, out, _ = esengine("train", "--dry-run", "--run-dir", "run", *flags)
    assert code == 0
    lines = dict(line.split(maxsplit=1) for line in out.splitlines() if not line.startswith(" "))
    assert {"images", "time", "memory", "members", "folder", "nothing"} <= set(lines)
    assert "48 a step" in lines["images"] or " a step" in lines["images"]
    assert set(workspace.rglob("*")) == before


def test_it_counts_the_adapters_that_a_run_keeps(small, tmp_path):
    plain = dry_run(small(tmp_path / "run"))
    kept = dry_run(small(tmp_path / "run", keep="best", keep_by="jpeg_compressibility", ema=0.9))
    assert kept.images - plain.images == 2 * 3
    assert kept.checkpoint_bytes == 3 * plain.checkpoint_bytes
    assert "adapter-best, adapter-ema" in kept.files[0]
