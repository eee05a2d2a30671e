"""Model folders of others: one clear error, no file from elsewhere, no code by name."""

import json
import os
import shutil

import pytest
import torch
from hostile import no_hang
from safetensors.torch import load_file, save_file

from esengine.base.errors import ConfigError
from esengine.models import DiffusersPipeline, SanaSprint, tiny_pipeline
from esengine.rewards.clip import ClipText


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory):
    return tiny_pipeline("sd", tmp_path_factory.mktemp("sd"))


@pytest.fixture(params=["sana", "sd"])
def folder(request, tiny_folder, sd_folder, tmp_path):
    """A copy of a model folder, and how it is loaded whole."""
    of = {"sana": (tiny_folder, SanaSprint), "sd": (sd_folder, DiffusersPipeline)}[request.param]
    made = shutil.copytree(of[0], tmp_path / "model")
    return made, lambda: of[1].from_pretrained(made).encode(["a cat"])


def denoiser(folder):
    return "unet" if (folder / "unet").is_dir() else "transformer"


def set_keys(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def refused(load, *words):
    with no_hang(), pytest.raises(ConfigError, match=r"model: cannot (load|encode)") as caught:
        load()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("part", ["denoiser", "vae", "text_encoder"])
@pytest.mark.parametrize(
    "value",
    [{"quant_method": "bitsandbytes", "load_in_4bit": True}, {"quant_method": "torchao"}, 3],
)
def test_a_quantisation_that_cannot_be_loaded_names_file_and_key(folder, part, value):
    part = denoiser(folder[0]) if part == "denoiser" else part
    set_keys(folder[0] / part / "config.json", quantization_config=value)
    refused(folder[1], f"{part}/config.json", "quantization_config")


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize(
    "value", ["flash_attention_2", "kernels-community/flash-attn", "me/mine@main:attention", "x", 3]
)
def test_an_attention_implementation_that_is_not_here_names_file_and_key(folder, key, value):
    set_keys(folder[0] / "text_encoder" / "config.json", **{key: value})
    refused(folder[1], "text_encoder/config.json", key)


def test_an_attention_implementation_of_a_part_is_looked_at_too(folder):
    set_keys(folder[0] / "text_encoder" / "config.json", text_config={"attn_implementation": {"": "me/mine"}})
    refused(folder[1], "text_encoder/config.json", "attn_implementation", "me/mine")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer/tokenizer.json", "{}"),
        ("tokenizer/tokenizer.json", "["),
        ("tokenizer/tokenizer_config.json", '{"model_max_length": "x"}'),
        ("tokenizer/tokenizer_config.json", '{"added_tokens_decoder": 3}'),
        ("scheduler/scheduler_config.json", "[]"),
        ("scheduler/scheduler_config.json", "[" * 100_000),
        ("text_encoder/config.json", '{"hidden_size": ' + "9" * 5_000 + "}"),
        ("vae/config.json", '{"a": ' * 500 + "1" + "}" * 500),
    ],
)
def test_a_file_that_no_library_can_use_is_one_line(folder, file, text):
    if not (folder[0] / file).exists():
        pytest.skip("this family has no such file")
    (folder[0] / file).write_text(text)
    refused(folder[1], file.partition("/")[0] if "model_max" not in text else "encode")


@pytest.mark.parametrize(
    "file", ["model_index.json", "vae/config.json", "text_encoder/config.json", "tokenizer/vocab.json"]
)
def test_a_pipe_is_refused(folder, file):
    (folder[0] / file).unlink(missing_ok=True)
    os.mkfifo(folder[0] / file)
    refused(folder[1], "regular file")


def sharded(part, away):
    """Split a component's weights into two files with an index. Returns the index and the second file."""
    (file,) = part.glob("*.safetensors")
    stem = file.name.removesuffix(".safetensors")
    weights = load_file(file)
    names = [f"{stem}-00001-of-00002.safetensors", f"{stem}-00002-of-00002.safetensors"]
    halves = sorted(weights)[::2], sorted(weights)[1::2]
    for name, half in zip(names, halves, strict=True):
        save_file({key: weights[key] for key in half}, part / name, metadata={"format": "pt"})
    file.unlink()
    index = {
        "metadata": {},
        "weight_map": {key: name for name, half in zip(names, halves, strict=True) for key in half},
    }
    (part / f"{file.name}.index.json").write_text(json.dumps(index))
    away.mkdir(exist_ok=True)
    shutil.copy(part / names[1], away / names[1])
    return part / f"{file.name}.index.json", part / names[1]


@pytest.mark.parametrize("part", ["denoiser", "text_encoder"])
@pytest.mark.parametrize("how", ["above", "absolute", "link", "number", "none"])
def test_shards_elsewhere_are_refused(folder, part, how, tmp_path):
    part = denoiser(folder[0]) if part == "denoiser" else part
    index, shard = sharded(folder[0] / part, tmp_path / "away")
    folder[1]()  # as it is, it can be loaded
    content = json.loads(index.read_text())
    name = {"above": f"../../away/{shard.name}", "absolute": str(tmp_path / "away" / shard.name), "number": 3}.get(how)
    if how == "link":
        shard.unlink()
        shard.symlink_to(tmp_path / "away" / shard.name)
    elif how == "none":
        content["weight_map"] = [shard.name]
    else:
        content["weight_map"] = {
            key: name if each == shard.name else each for key, each in content["weight_map"].items()
        }
    index.write_text(json.dumps(content))
    refused(folder[1], part, "weight_map" if how != "link" else "leads out")


def test_the_identity_covers_every_shard(folder, tmp_path):
    kind = SanaSprint if denoiser(folder[0]) == "transformer" else DiffusersPipeline
    _, shard = sharded(folder[0] / "text_encoder", tmp_path / "away")
    before = kind.from_pretrained(folder[0]).identity()
    weights = load_file(shard)
    name = min(weights)
    save_file(weights | {name: weights[name] + 1}, shard, metadata={"format": "pt"})
    assert kind.from_pretrained(folder[0]).identity() != before


def test_the_links_of_the_hubs_cache_are_followed(folder, tmp_path):
    commit = tmp_path / "hub" / "models--a--b" / "snapshots" / "0123"
    blobs = commit.parents[1] / "blobs"
    shutil.copytree(folder[0], commit)
    blobs.mkdir()
    for number, file in enumerate(sorted(each for each in commit.rglob("*") if each.is_file())):
        file.rename(blobs / str(number))
        file.symlink_to(os.path.relpath(blobs / str(number), file.parent))
    kind = SanaSprint if denoiser(folder[0]) == "transformer" else DiffusersPipeline
    kind.from_pretrained(commit).encode(["a cat"])


def test_a_vae_elsewhere_is_looked_at_too(tiny_folder, tmp_path):
    vae = shutil.copytree(tiny_folder / "vae", tmp_path / "vae")
    set_keys(vae / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(ConfigError, match=r"vae: cannot use .*vae/config\.json.*quantization_config"):
        SanaSprint.from_pretrained(tiny_folder, vae=vae)


@pytest.mark.parametrize(
    ("keys", "word"),
    [
        ({"attn_implementation": "me/mine"}, "attn_implementation"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "quantization_config"),
    ],
)
def test_a_clip_of_others(tmp_path, keys, word):
    from esengine.models import nano

    folder = shutil.copytree(nano.CLIP, tmp_path / "clip")
    set_keys(folder / "config.json", **keys)
    with pytest.raises(ConfigError, match=rf"config\.json.*{word}"):
        ClipText.from_pretrained(model=str(folder))
    set_keys(folder / "config.json", **dict.fromkeys(keys))
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "../model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": torch.zeros(1)}, folder / "other.safetensors")
    with pytest.raises(ConfigError, match="weight_map"):
        ClipText.from_pretrained(model=str(folder))
