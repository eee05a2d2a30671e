"""Runs of several families' tiny pipelines: train, resume, replay, eval and render."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from esengine.base.errors import ConfigError
from esengine.es.rule import UpdateRule
from esengine.models.families import FAMILIES
from esengine.run.settings import ESSettings, LoraSettings, TrainConfig, load, to_yaml
from esengine.run.train import train
from esengine.sampling.settings import ImageSettings

FEW = dict(steps=2, checkpoint_every=1, strip_every=2, heldout_every=2, lora=LoraSettings())
QUICK = ImageSettings(chunk=3, num_steps=2)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("flux2-klein", "sd3")]


@pytest.mark.parametrize("name", ["z-image", "sdxl", *SLOW])
def test_a_run_of_a_family(name, small, tmp_path, esengine, outcome, prompt_files):
    straight, resumed = small(tmp_path / "straight", model=f"tiny:{name}", image=QUICK, **FEW), tmp_path / "resumed"
    result = train(straight)
    saved = load(result.folder / "config.yaml")
    family = FAMILIES[name]
    assert saved.lora.targets == family.targets
    assert (saved.image.num_steps, saved.image.guidance_scale) == (2, family.guidance)
    assert result.comparison.entries == ["base@2", "adapter@2"]

    train(small(resumed, model=f"tiny:{name}", image=QUICK, **FEW | {"steps": 1}))
    train(small(resumed, model=f"tiny:{name}", image=QUICK, **FEW, resume=True))
    first, second = outcome(straight.run_dir), outcome(resumed)
    for part in ("adapter", "lora", "checkpoint", "metrics", "eval"):
        assert first[part] == second[part]
    trained = load_file(straight.run_dir / "adapter" / "pytorch_lora_weights.safetensors")
    assert all(key.startswith(f"{family.denoiser}.") for key in trained)
    assert any(tensor.abs().max() > 0 for key, tensor in trained.items() if "lora_B" in key)

    code, out, err = esengine("replay", straight.run_dir)
    assert code == 0, err
    assert "bit for bit" in out
    code, out, err = esengine("eval", "--run-dir", straight.run_dir, "--json", "eval.json")
    assert code == 0, err
    ours = json.loads((straight.run_dir / "eval.json").read_text())
    again = json.loads(Path("eval.json").read_text())
    assert [group["rows"] for group in again["groups"]] == [group["rows"] for group in ours["groups"]]
    code, _, err = esengine("render", "a lamp", "--run-dir", straight.run_dir, "--out", "drawn")
    assert code == 0, err
    sizes = {Image.open(file).size for file in Path("drawn").glob("0*.png")}
    assert sizes == {(64, 64)}


def test_settings_of_another_pipeline_are_refused_by_their_flag(esengine, prompt_files):
    for flags, words in (
        (["--image.x0-angle", "1.3"], "--image.x0-angle: 1.3 does not apply to ZImagePipeline"),
        (["--image.decode", "compiled"], "--image.decode: compiled does not apply"),
        (["--image.overlap"], "--image.overlap: True does not apply"),
        (["--image.vae", "someone/lite"], "--image.vae: someone/lite does not apply"),
        (["--image.no-instruction"], "--image.no-instruction: False does not apply"),
    ):
        code, _, err = esengine("train", "--model", "tiny:z-image", "--run-dir", "run", *flags)
        assert code == 1
        assert words in err
        assert not Path("run").exists()
    code, _, err = esengine("eval", "--entries", "base@1", "--model", "tiny:sd3", "--image.x0-angle", "1.3")
    assert code == 1
    assert "--image.x0-angle: 1.3 does not apply to StableDiffusion3Pipeline" in err
    code, _, err = esengine("train", "--model", "tiny:nothing", "--run-dir", "run")
    assert code == 1
    assert "--model: expected tiny:FAMILY with one of sana-sprint" in err


def test_guidance_that_a_loaded_model_does_not_take_is_refused(small, tmp_path):
    image = ImageSettings(guidance_scale=4.0)
    with pytest.raises(ConfigError, match=r"image\.guidance_scale: 4\.0 does not apply"):
        train(small(tmp_path / "run", model="tiny:flux2-klein", image=image, **FEW))


def test_guidance_doubles_the_batch_for_all_members(small, tmp_path):
    image = ImageSettings(chunk=3, num_steps=1, guidance_scale=3.0)
    result = train(small(tmp_path / "run", model="tiny:sd3", image=image, **FEW, es=ESSettings(prompts_per_step=1)))
    assert torch.tensor(result.comparison.overall[1]["mean"]["jpeg_compressibility"]).isfinite()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["z-image", "flux2-klein", "sdxl", "sd3"])
def test_a_killed_run_of_a_family_ends_with_the_same_bytes(name, small, tmp_path, outcome):
    many = FEW | {"steps": 5}
    straight = small(tmp_path / "straight", model=f"tiny:{name}", image=QUICK, **many)
    train(straight)
    killed = small(tmp_path / "killed", model=f"tiny:{name}", image=QUICK, **many)
    (tmp_path / "given.yaml").write_text(to_yaml(replace(killed, run_dir=None)))
    command = [sys.executable, "-m", "esengine", "train", "--config", tmp_path / "given.yaml"]
    process = subprocess.Popen([*command, "--run-dir", killed.run_dir], stdout=subprocess.DEVNULL)
    while process.poll() is None and not (killed.run_dir / "checkpoints" / "step_00000002").is_dir():
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    train(replace(killed, resume=True))
    first, second = outcome(straight.run_dir), outcome(killed.run_dir)
    for part in ("adapter", "lora", "checkpoint", "metrics", "heldout", "eval"):
        assert first[part] == second[part]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["z-image", "flux2-klein", "sdxl", "sd3"])
def test_two_processes_make_the_run_of_one(name, small, tmp_path):
    config = small(tmp_path / "one", model=f"tiny:{name}", image=QUICK, **FEW)
    train(config)
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
    for file in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors"):
        assert (tmp_path / "one" / "adapter" / file).read_bytes() == (tmp_path / "two" / "adapter" / file).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sana", "sdxl", "pixart"])
def test_es_improves_a_reward_on_held_out_prompts(name, cache, tmp_path):
    settings = dict(steps=30, population=16, strip_every=0, heldout_every=0, checkpoint_every=30)
    es, image = ESSettings(sigma=0.03, prompts_per_step=4, repeats=1), ImageSettings(num_steps=2)
    config = TrainConfig(model=f"tiny:{name}", es=es, image=image, update=UpdateRule(lr_scale=3.0), **settings)
    result = train(replace(config, run_dir=tmp_path / "run"))
    gained = result.comparison.overall[1]["against_first"]["jpeg_compressibility"]
    assert gained["difference"] > 3 * gained["standard_error"]
