"""The closed table of families: what a model folder may hold, before anything of it is imported or loaded."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from esengine import models
from esengine.base.errors import ConfigError
from esengine.models import (
    FAMILIES,
    DiffusersPipeline,
    RenderSettings,
    SanaSprint,
    load,
    require_pipeline,
    tiny_pipeline,
)
from esengine.models.families import TINY, family_of

SPY = "open({mark!r}, 'w').close()\nclass X:\n    pass\n"


def index_of(name: str) -> dict:
    return json.loads((tiny_pipeline(name) / "model_index.json").read_text())


@pytest.mark.parametrize("name", TINY)
def test_a_folder_is_of_its_family(name):
    assert family_of(index_of(name)).name == name
    assert require_pipeline(f"tiny:{name}", None).pipeline == FAMILIES[name].pipeline


def test_every_row_is_whole():
    for row in FAMILIES.values():
        assert row.licence
        assert {row.denoiser, "vae", "scheduler", *row.encoders} <= row.components.keys()
        assert row.copies == 1 or row.guided_above is not None
        masked = [name for name in row.texts if name and "mask" in name]
        assert len(set(row.texts) - {None}) == len([name for name in row.texts if name])
        assert not (row.ragged and masked)


def test_the_page_has_the_rows():
    page = Path(models.__file__).with_name("README.md").read_text()
    for row in FAMILIES.values():
        assert f"| `{row.name}` | `{row.pipeline}` | {row.steps} | {row.guidance:g} | {row.licence} |" in page


@pytest.mark.parametrize("name", ["z-image", "sdxl", "sana-sprint"])
@pytest.mark.parametrize(
    ("component", "value"),
    [
        ("scheduler", ["some_module", "X"]),
        ("scheduler", ["diffusers", "DiffusionPipeline"]),
        ("scheduler", ["builtins", "eval"]),
        ("vae", ["some_module", "X"]),
        ("vae", ["diffusers", "AutoencoderKLWan"]),
        ("vae", None),
        ("text_encoder", ["transformers", "AutoModel"]),
        ("tokenizer", ["esengine", "Noise"]),
        ("another", ["some_module", "X"]),
        ("another", {"a": 1}),
        ("scheduler", "some_module.X"),
        ("scheduler", ["some_module", "X", "y"]),
        ("scheduler", []),
    ],
)
def test_other_classes_are_refused_before_anything_is_imported(tmp_path, monkeypatch, name, component, value):
    folder, mark = tmp_path / "model", tmp_path / "imported"
    shutil.copytree(tiny_pipeline(name), folder)
    for place in (tmp_path, folder, folder / "scheduler"):
        (place / "some_module.py").write_text(SPY.format(mark=str(mark)))
    (folder / "model_index.json").write_text(json.dumps(index_of(name) | {component: value}))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(folder)
    for attempt in (lambda: load(str(folder)), lambda: require_pipeline(str(folder), None)):
        with pytest.raises(ConfigError) as error:
            attempt()
        assert error.value.setting == "model"
        for part in (f"component {component}", "expected", "got"):
            assert part in error.value.problem
    if name == "sana-sprint":
        with pytest.raises(ConfigError, match=f"component {component}"):
            SanaSprint.from_pretrained(folder)
    assert not mark.exists()
    assert "some_module" not in sys.modules


@pytest.mark.parametrize("kind", ["KandinskyPipeline", "DiffusionPipeline", ["mine", "X"], None, 3, "../x"])
def test_a_pipeline_that_is_not_listed_gets_the_list_and_the_library_call(tmp_path, kind):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    with pytest.raises(ConfigError) as error:
        load(str(tmp_path))
    for part in ("SanaSprintPipeline", "ZImagePipeline", "esengine.models.DiffusersPipeline(pipe, family)"):
        assert part in error.value.problem


def test_a_missing_component_and_a_missing_weight_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(tiny_pipeline("sd3"), folder)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    gone = tensors.pop("proj_out.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"transformer lacks 1 of its weights, such as proj_out\.weight"):
        load(str(folder))
    save_file(tensors | {"proj_out.weight": gone[:1].clone()}, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="model: cannot load"):
        load(str(folder))
    index = index_of("sd3")
    del index["transformer"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"component transformer .*SD3Transformer2DModel, got none"):
        load(str(folder))


def test_an_encoder_with_a_missing_weight_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(tiny_pipeline("sd"), folder)
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="text_encoder lacks 1 of its weights"):
        load(str(folder)).encode(["a cat"])


@pytest.mark.parametrize("name", ["z-image", "sana-sprint"])
def test_a_hub_model_is_checked_by_its_index_alone(name, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--nobody--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    shutil.copytree(tiny_pipeline(name), cached / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    kind = SanaSprint if name == "sana-sprint" else DiffusersPipeline
    model = kind.from_pretrained("nobody/model", local_files_only=True)
    assert model.identity() == f"nobody/model@{commit}"
    assert len(model.encode(["a cat"])) == 1
    index = cached / "snapshots" / commit / "model_index.json"
    index.write_text(json.dumps(index_of(name) | {"scheduler": ["some_module", "X"]}))
    monkeypatch.setattr("esengine.models.loading.download", lambda *a, **k: pytest.fail("more was downloaded"))
    with pytest.raises(ConfigError, match="component scheduler"):
        kind.from_pretrained("nobody/model", local_files_only=True)


def changed(tmp_path, name, **changes):
    """A copy of a family's tiny folder with other entries in its index."""
    folder = shutil.copytree(tiny_pipeline(name), tmp_path / name)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | changes))
    return str(folder)


def test_options_in_the_index_are_in_the_identity_and_in_the_key_of_the_text_cache(tmp_path):
    first, other = load("tiny:sdxl"), load(changed(tmp_path, "sdxl", force_zeros_for_empty_prompt=False))
    assert first.identity() != other.identity()
    first.encode(["a cat"], cache_dir=tmp_path / "cache")
    cached = other.encode(["a cat"], cache_dir=tmp_path / "cache")
    fresh = load(changed(tmp_path / "again", "sdxl", force_zeros_for_empty_prompt=False)).encode(["a cat"])
    one, two = (each.batch(torch.tensor([0]), guided=True) for each in (cached, fresh))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert one["negative_prompt_embeds"].abs().sum() > 0


def test_the_guidance_of_an_lcm_is_for_a_denoiser_that_takes_it(tmp_path):
    lcm = ["diffusers", "LCMScheduler"]
    plain = load(changed(tmp_path, "sdxl", scheduler=lcm))
    assert plain.family.name == "sdxl-lcm"
    assert plain.resolve(RenderSettings()).guidance_scale == 0
    assert load("tiny:sdxl-lcm").resolve(RenderSettings()).guidance_scale == 8
