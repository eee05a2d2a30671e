"""Runs whose reward scores images of a cheaper decoder."""

import subprocess
import sys
from dataclasses import replace

import journals
import pytest
import torch
from diffusers import AutoencoderDC

from esengine.base.errors import RunError
from esengine.base.progress import Progress
from esengine.models import load
from esengine.run.dry_run import dry_run
from esengine.run.replay import replay
from esengine.run.settings import ESSettings, LoraSettings, ReplayConfig, to_yaml
from esengine.run.train import train
from esengine.sampling.reward_decoder import CORRELATION, COSINE
from esengine.sampling.settings import ImageSettings

FEW = dict(strip_every=0, heldout_every=2, steps=3, checkpoint_every=1, es=ESSettings(prompts_per_step=1, repeats=1))


@pytest.fixture(scope="module")
def decoder(cache, tmp_path_factory):
    """A decoder of a tiny SANA-Sprint's latents, with other weights."""
    folder = tmp_path_factory.mktemp("decoder")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        AutoencoderDC.from_config(load("tiny").vae.config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checked(small, decoder, tmp_path_factory):
    """A run of three steps that is checked every second one, and the lines that it noted."""
    image, said = ImageSettings(chunk=3, reward_vae=str(decoder), reward_vae_check=2), []

    class Notes(Progress):
        def note(self, text):
            said.append(text)

    config = small(tmp_path_factory.mktemp("checked") / "run", image=image, **FEW)
    train(config, Notes())
    return config, said


def test_the_check_is_in_the_steps_metrics(checked):
    config, said = checked
    steps = journals.steps(config.run_dir)
    for step in steps:
        assert (CORRELATION in step) == (COSINE in step) == (step["step"] % 2 == 0)
        if step["step"] % 2 == 0:
            assert -1 <= step[CORRELATION] <= 1
            assert {"reward_vae/full/combined", "reward_vae/full/jpeg_compressibility"} <= step.keys()
            assert step["reward_vae/full/combined"] != step["reward"]
    low = [step["step"] for step in steps if min(step.get(CORRELATION, 1), step.get(COSINE, 1)) < 0.85]
    warned = [line for line in said if "--image.reward-vae" in line]
    assert [f"warning: step {step}:" in line for step, line in zip(low, warned, strict=True)] == [True] * len(low)


def test_only_the_reward_sees_its_images(checked, small, tmp_path):
    config, _ = checked
    plain = small(tmp_path / "plain", image=ImageSettings(chunk=3), **FEW)
    train(plain)
    assert journals.fitness(plain.run_dir)[0] != journals.fitness(config.run_dir)[0]
    assert journals.measured(plain.run_dir)[0]["scores"] == journals.measured(config.run_dir)[0]["scores"]
    full = [step["reward_vae/full/combined"] for step in journals.steps(config.run_dir)[:1]]
    assert full == pytest.approx([journals.steps(plain.run_dir)[0]["reward"]])


def test_it_resumes_and_replays_and_evaluates(checked, outcome, tmp_path, esengine):
    config, _ = checked
    halves = replace(config, run_dir=tmp_path / "halves", steps=1)
    train(halves)
    train(replace(halves, steps=3, resume=True))
    first, second = outcome(config.run_dir), outcome(halves.run_dir)
    for part in first.keys() - {"grids"}:  # the first half also measured at its end
        assert first[part] == second[part]
    assert replay(ReplayConfig(run_dir=config.run_dir), Progress()).agreed == 3
    code, _, err = esengine("eval", "--run-dir", config.run_dir, "--json", tmp_path / "eval.json")
    assert code == 0, err


def test_the_check_does_not_change_the_adapter(checked, outcome, tmp_path):
    config, _ = checked
    other = replace(config, run_dir=tmp_path / "run", image=replace(config.image, reward_vae_check=0))
    train(other)
    assert outcome(other.run_dir)["adapter"] == outcome(config.run_dir)["adapter"]
    assert not any(CORRELATION in step for step in journals.steps(other.run_dir))
    train(replace(other, steps=4, resume=True, image=replace(config.image, reward_vae_check=1)))
    assert CORRELATION in journals.steps(other.run_dir)[3]


def test_another_decoder_on_resume_is_refused(checked, decoder, tmp_path, small):
    config, _ = checked
    run = small(tmp_path / "run", image=config.image, **FEW | {"steps": 1})
    train(run)
    with pytest.raises(RunError, match=r"image\.reward_vae"):
        train(replace(run, steps=2, resume=True, image=replace(config.image, reward_vae=None)))
    file = decoder / "config.json"
    before = file.read_text()
    try:
        file.write_text(before + "\n")  # other bytes
        with pytest.raises(RunError, match="model: its weights"):
            train(replace(run, steps=2, resume=True))
    finally:
        file.write_text(before)


def test_other_families_and_the_flag(esengine, prompt_files, tmp_path):
    flags = ["--prompts", prompt_files[0], "--eval-prompts", prompt_files[1], "--population", "4", "--steps", "1"]
    flags += ["--es.prompts-per-step", "1", "--es.repeats", "1", "--strip-every", "0", "--heldout-every", "0"]
    flags += ["--reward", "jpeg_compressibility", "--image.reward-vae", "tiny", "--image.reward-vae-check", "1"]
    code, _, err = esengine("train", "--model", "tiny:sd", *flags, "--run-dir", "run")
    assert code == 0, err
    (step,) = journals.steps(tmp_path / "run")
    assert COSINE in step
    code, _, err = esengine("train", "--model", "tiny:flux2-klein", *flags, "--run-dir", "other")
    assert code == 1
    assert "--image.reward-vae" in err


def test_the_estimate_counts_the_checks(small, tmp_path, decoder):
    image = ImageSettings(chunk=3, reward_vae=str(decoder), reward_vae_check=2)
    without = dry_run(small(tmp_path / "run", image=ImageSettings(chunk=3), lora=LoraSettings(), **FEW))
    found = dry_run(small(tmp_path / "run", image=image, lora=LoraSettings(), **FEW))
    assert found.images - without.images == 2 * found.images_per_step


def test_an_evaluation_refuses_it(esengine, prompt_files, trained):
    for words in (["eval", "--prompts", prompt_files[1], "--reward", "jpeg_compressibility"], ["render", "a cat"]):
        code, _, err = esengine(*words, "--run-dir", trained[1].folder, "--image.reward-vae", "tiny", "--out", "drawn")
        assert code == 1
        assert "--image.reward-vae" in err
        assert "train only" in err


@pytest.mark.slow
def test_two_processes_make_the_run_of_one(checked, tmp_path):
    config, _ = checked
    (tmp_path / "given.yaml").write_text(to_yaml(replace(config, run_dir=None)))
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "esengine",
    ]
    command = [*torchrun, "train", "--config", tmp_path / "given.yaml", "--run-dir", tmp_path / "two"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    for name in ("adapter_model.safetensors", "README.md", "adapter_config.json"):
        assert (tmp_path / "two" / "adapter" / name).read_bytes() == (config.run_dir / "adapter" / name).read_bytes()
    metrics = [[step.get(name) for name in (CORRELATION, COSINE)] for step in journals.steps(tmp_path / "two")]
    assert metrics == [[step.get(name) for name in (CORRELATION, COSINE)] for step in journals.steps(config.run_dir)]
