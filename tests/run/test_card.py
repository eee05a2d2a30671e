"""The model card of a run's adapter."""

import re
import shutil
from dataclasses import replace

import diffusers
import journals
import pytest
import torch
from huggingface_hub import ModelCard
from peft.tuners.tuners_utils import BaseTunerLayer

from esengine.base.progress import Progress
from esengine.models import FAMILIES, tiny_pipeline
from esengine.run import journal
from esengine.run.card import run_card
from esengine.run.replay import replay
from esengine.run.settings import ESSettings, LoraSettings, ReplayConfig
from esengine.run.train import train
from esengine.sampling.settings import ImageSettings

CARD = "README.md"


def text_of(run) -> str:
    return (run / "adapter" / CARD).read_text()


def test_the_recipe_and_the_gains_are_the_journals(trained):
    run = trained[1].folder
    card = ModelCard(text_of(run))
    assert (card.data.base_model, card.data.library_name) == ("tiny", "diffusers")
    assert {"lora", "esengine"} <= set(card.data.tags)
    assert FAMILIES["sana-sprint"].licence in card.text
    for row in ("| steps | 4 |", "| images | 32 |", "| seed | 0 |", '"sigma": 0.01', '"population": 4'):
        assert row in card.text
    last = journals.measured(run)[-1]
    assert last["step"] == 4
    score = last["scores"]["jpeg_compressibility"]
    assert f"{score['change']:+.4g} ± {score['standard_error']:.2g}" in card.text


def test_a_resumed_and_a_replayed_run_have_the_same_card(trained, small, tmp_path):
    run = trained[1].folder
    halves = small(tmp_path / "halves", steps=2)
    train(halves)
    train(replace(halves, steps=4, resume=True))
    assert text_of(tmp_path / "halves") == text_of(run)
    replay(ReplayConfig(run_dir=run, out=tmp_path / "again"), Progress())
    for name in (CARD, "adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (run / "adapter" / name).read_bytes()


def test_what_was_not_measured_is_said(small, tmp_path):
    run = train(small(tmp_path / "run", steps=1, strip_every=0, heldout_every=0)).folder
    assert "not measured" in text_of(run)


def test_secrets_and_markup_of_settings_stay_out(trained, tmp_path):
    shutil.copytree(trained[1].folder, tmp_path / "run")

    def changed(records):
        settings = records[0]["settings"]
        settings["reward"] = "remote(url='http://scorer/x?token=SECRET')"
        settings["heldout_reward"] = "own:score(key=SECRET)"
        settings["init_adapter"] = "a|b\n# head\n```"
        settings["revision"] = "````\n# head"
        records[0]["identity"]["rewards"] = {"own:a|b": {"weight": 2.0, "key": "SECRET"}}
        return records

    journals.rewrite(tmp_path / "run", changed)
    card = run_card(journal.read(tmp_path / "run" / journal.NAME), FAMILIES["sana-sprint"])
    assert "SECRET" not in card
    assert not re.search(r"^# head", card, re.MULTILINE)
    assert r"own:a\|b times 2.0" in card


@pytest.mark.parametrize("name", ["sd", "pixart"])
def test_its_code_loads_the_adapter(name, small, tmp_path):
    model = str(tiny_pipeline(name))
    quick = dict(strip_every=0, heldout_every=0, lora=LoraSettings(), es=ESSettings(prompts_per_step=1, repeats=1))
    run = train(small(tmp_path / "run", steps=1, model=model, image=ImageSettings(num_steps=1), **quick)).folder
    card = ModelCard(text_of(run))
    assert card.data.base_model == model
    assert FAMILIES[name].licence in card.text
    found = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    kind = getattr(diffusers, FAMILIES[name].pipeline)
    assert len(found) == (2 if hasattr(kind, "load_lora_weights") else 1)
    for code in found:
        names = {}
        exec(code.replace("FOLDER", str(run / "adapter")), names)
        layers = [each for each in getattr(names["pipe"], FAMILIES[name].denoiser).modules() if hasattr(each, "lora_B")]
        assert layers
        assert all(isinstance(each, BaseTunerLayer) for each in layers)
        assert any(torch.any(b.weight != 0) for each in layers for b in each.lora_B.values())


def test_the_code_for_a_packaged_model_runs(trained):
    """`tiny` is no name of a hub: the card says where the folder is."""
    _, result = trained
    card = (result.folder / "adapter" / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == 2
    for code in blocks:
        exec(code.replace("FOLDER", str(result.folder / "adapter")), {})
