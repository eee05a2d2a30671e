"""A run that starts from an existing LoRA, and evaluations of PEFT folders."""

import dataclasses
import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model

from esengine.base.errors import ConfigError, RunError
from esengine.base.progress import Progress
from esengine.models import Rows, SanaSprint, tiny_model
from esengine.run.replay import replay
from esengine.run.settings import LoraSettings, ReplayConfig
from esengine.run.train import train

TARGETS = ("to_q", "to_k", "to_v", "linear_2")


@pytest.fixture(scope="module")
def lora(cache, tmp_path_factory):
    """A LoRA of rank 1 and alpha 3 that PEFT saved, with both of its matrices random."""
    folder = tmp_path_factory.mktemp("lora")
    model = get_peft_model(
        SanaSprint.from_pretrained(tiny_model()).module,
        LoraConfig(r=1, lora_alpha=3, target_modules=list(TARGETS), init_lora_weights=False),
    )
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def config(small, tmp_path, lora):
    return small(
        tmp_path / "run", steps=2, heldout_every=0, strip_every=0, init_adapter=lora, lora=LoraSettings(targets=TARGETS)
    )


def test_it_starts_from_the_adapter_and_resumes_and_replays(config, outcome, tmp_path, lora, small):
    whole = train(config).folder
    fresh = dataclasses.replace(config, init_adapter=None, run_dir=tmp_path / "fresh")
    assert outcome(train(fresh).folder)["metrics"] != outcome(whole)["metrics"]
    found = replay(ReplayConfig(run_dir=whole), Progress())
    assert (found.steps, found.agreed) == (2, 2)
    halves = dataclasses.replace(config, run_dir=tmp_path / "halves", steps=1)
    train(halves)
    train(dataclasses.replace(halves, steps=2, resume=True))
    assert outcome(tmp_path / "halves") == outcome(whole)


def test_a_run_is_replayed_without_the_folder_that_it_started_from(config, tmp_path, lora):
    copy = shutil.copytree(lora, tmp_path / "lora")
    run = train(dataclasses.replace(config, init_adapter=copy)).folder
    settings = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 4}))
    assert replay(ReplayConfig(run_dir=run), Progress()).agreed == 2
    shutil.rmtree(copy)
    assert replay(ReplayConfig(run_dir=run), Progress()).agreed == 2
    train(dataclasses.replace(config, init_adapter=copy, resume=True, steps=3))
    assert replay(ReplayConfig(run_dir=run), Progress()).agreed == 3
    kept = run / "init_adapter" / "adapter_config.json"
    settings = json.loads(kept.read_text())
    kept.write_text(json.dumps(settings | {"lora_alpha": 4}))
    with pytest.raises(RunError, match="has changed since"):
        replay(ReplayConfig(run_dir=run), Progress())
    (run / "init_adapter" / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(RunError, match="init_adapter"):
        replay(ReplayConfig(run_dir=run), Progress())
    shutil.rmtree(run / "init_adapter")
    with pytest.raises(RunError, match="neither that nor its copy"):
        replay(ReplayConfig(run_dir=run), Progress())
    shutil.copytree(lora, copy)
    assert replay(ReplayConfig(run_dir=run), Progress()).agreed == 3  # a run of an earlier version has no copy


def test_another_first_adapter_on_resume_is_refused(config, tmp_path, lora):
    train(dataclasses.replace(config, steps=1))
    other = shutil.copytree(lora, tmp_path / "other")
    with pytest.raises(RunError, match=r"init_adapter: .* it cannot change"):
        train(dataclasses.replace(config, resume=True, allow_change=True, init_adapter=other))


def test_an_alpha_beyond_every_number_is_refused(config, tmp_path, lora):
    copy = shutil.copytree(lora, tmp_path / "lora")
    settings = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 10**400}))
    with pytest.raises(ConfigError) as caught:
        train(dataclasses.replace(config, init_adapter=copy))
    assert caught.value.setting == "init_adapter"


def test_a_run_on_convolutions_is_saved_drawn_and_continued(small, tmp_path, esengine, prompt_files):
    flags = ["--model", "tiny:sd", "--population", "2", "--es.prompts-per-step", "1", "--heldout-every", "0"]
    flags += [
        "--strip-every",
        "0",
        "--steps",
        "1",
        "--reward",
        "jpeg_compressibility",
        "--eval-prompts",
        prompt_files[1],
    ]
    flags += ["--lora.targets", "conv_shortcut", "to_q", "--lora.alpha-pattern", "conv_shortcut", "4"]
    code, _, err = esengine("train", *flags, "--run-dir", tmp_path / "run")
    assert code == 0, err
    peft = shutil.copytree(tmp_path / "run" / "adapter", tmp_path / "peft")
    (peft / "pytorch_lora_weights.safetensors").unlink()
    for adapter in (tmp_path / "run" / "adapter", peft):
        code, _, err = esengine(
            "render", "a cat", "--model", "tiny:sd", "--adapter", adapter, "--out", f"{adapter}.out"
        )
        assert code == 0, err
    code, _, err = esengine("train", *flags, "--run-dir", tmp_path / "again", "--init-adapter", peft)
    assert code == 0, err


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (dict(lora=LoraSettings(targets=("to_q",))), "target"),
        (dict(lora=LoraSettings(targets=(*TARGETS, "proj_out"))), "proj_out"),
        (dict(init_adapter="nosuch"), "does not exist"),
        (dict(init_adapter="."), "adapter_config.json"),
    ],
)
def test_what_cannot_be_continued_is_refused_by_name(config, tmp_path, changes, expected):
    if "init_adapter" in changes:
        changes["init_adapter"] = tmp_path / changes["init_adapter"]
    with pytest.raises(ConfigError) as caught:
        train(dataclasses.replace(config, **changes))
    assert caught.value.setting == "init_adapter"
    assert expected in caught.value.problem
    assert not (tmp_path / "run").exists()


def test_a_peft_folder_draws_what_peft_draws(lora):
    """Against the weights W + s B A, set by hand."""
    rows = Rows(None, torch.tensor([0, 1]), torch.tensor([0, 0]))
    model, plain = (SanaSprint.from_pretrained(tiny_model()) for _ in range(2))
    texts = model.encode(["a cat", "a dog"])
    base = plain.render(texts, seed=0, step=0, rows=rows)
    merged = get_peft_model(plain.module, LoraConfig(r=1, lora_alpha=3, target_modules=list(TARGETS)))
    merged.load_adapter(str(lora), "given")
    merged.set_adapter("given")
    merged.merge_and_unload()
    model.load_adapter(lora)
    drawn = model.render(texts, seed=0, step=0, rows=rows).int()
    assert (drawn - plain.render(texts, seed=0, step=0, rows=rows).int()).abs().max() <= 1
    assert (drawn - base.int()).abs().float().mean() > 1


def test_the_command_line_takes_a_peft_folder(lora, esengine, workspace, prompt_files):
    flags = ["--model", "tiny", "--adapter", lora, "--prompts", prompt_files[1], "--reward", "jpeg_compressibility"]
    code, out, err = esengine("eval", *flags)
    assert code == 0, err
    assert "adapter@1" in out
    code, out, err = esengine("render", "a cat", "--model", "tiny", "--adapter", lora, "--out", "drawn")
    assert code == 0, err
    damaged = shutil.copytree(lora, workspace / "damaged")
    (damaged / "adapter_model.safetensors").write_bytes(b"no")
    code, _, err = esengine("eval", *flags[:3], damaged, *flags[4:])
    assert code == 1
    assert "damaged" in err


def test_two_files_of_one_folder_are_read_in_one_order(config, lora, esengine, prompt_files, tmp_path):
    """`train`, `eval` and `render` refuse a folder whose two files differ, and name them."""
    run = train(config).folder
    two = shutil.copytree(run / "adapter", tmp_path / "two")
    shutil.copytree(lora, two, dirs_exist_ok=True)
    with pytest.raises(ConfigError, match="pytorch_lora_weights"):
        train(dataclasses.replace(config, init_adapter=two, run_dir=tmp_path / "other"))
    for command in (
        ("eval", "--prompts", prompt_files[1], "--reward", "jpeg_compressibility"),
        ("render", "a cat", "--out", tmp_path / "drawn"),
    ):
        code, _, err = esengine(*command, "--model", "tiny", "--adapter", two)
        assert code == 1
        assert "pytorch_lora_weights.safetensors" in err
        assert "adapter_model.safetensors" in err
