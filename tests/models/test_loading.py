import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from esengine.base.errors import ConfigError, OutOfMemory
from esengine.models import SanaSprint, loading
from esengine.models.sana import sana_sprint

NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.00 GiB. GPU 0 has 1.00 GiB is free.")


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "model")


def load_all(folder):
    SanaSprint.from_pretrained(folder).encode(["a cat"])


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_a_weight_that_is_missing_is_named(folder, part):
    (file,) = (folder / part).glob("*.safetensors")
    weights = load_file(file)
    name = sorted(weights)[1]
    del weights[name]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=rf"model: cannot load .*: {part} lacks 1 of its weights, such as {name}"):
        load_all(folder)
    if part == "vae":
        with pytest.raises(ConfigError, match=rf"vae: cannot use .*: vae lacks 1 of its weights, such as {name}"):
            SanaSprint.from_pretrained(folder, vae=folder / "vae")


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_a_weight_of_another_shape_is_refused(folder, part):
    (file,) = (folder / part).glob("*.safetensors")
    weights = load_file(file)
    name = max(weights, key=lambda each: weights[each].numel())
    save_file({**weights, name: weights[name][:1].clone()}, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="model: cannot load"):
        load_all(folder)


@pytest.mark.parametrize("file", ["model_index.json", "transformer/config.json", "vae/config.json"])
@pytest.mark.parametrize("deep", ["[", '{"a":'])
def test_deep_settings_are_refused(folder, file, deep):
    (folder / file).write_text(deep * 100_000)
    with pytest.raises(ConfigError, match="model: cannot load"):
        load_all(folder)


@pytest.mark.parametrize(("name", "value"), [("patch_size", 0), ("num_attention_heads", 0), ("num_layers", "x")])
def test_settings_that_make_no_model_are_refused(folder, name, value):
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    with pytest.raises(ConfigError, match="model: cannot load"):
        load_all(folder)


@pytest.mark.parametrize("where", ["read", "to"])
def test_a_model_that_does_not_fit_says_so_with_the_numbers(tiny_folder, monkeypatch, where):
    def full(*args, **kwargs):
        raise NO_MEMORY

    holder, name = {"read": (loading, "_whole"), "to": (loading.SanaSprintPipeline, "to")}[where]
    monkeypatch.setattr(holder, name, full)
    with pytest.raises(OutOfMemory, match=r"the model's weights do not fit .*\(asked for 4.00 GiB, free 1.00 GiB\)"):
        SanaSprint.from_pretrained(tiny_folder)


def test_a_prompt_that_does_not_fit_says_so(model, monkeypatch):
    def full(*args, **kwargs):
        raise NO_MEMORY

    monkeypatch.setattr(sana_sprint.SanaSprintPipeline, "encode_prompt", full)
    with pytest.raises(OutOfMemory, match=r"a prompt's tokens do not fit .*\(asked for 4.00 GiB, free 1.00 GiB\)"):
        model.encode(["a cat"])
