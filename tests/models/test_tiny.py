import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer, GemmaTokenizerFast

from esengine.base.errors import ConfigError
from esengine.models import SanaSprint, build_tiny, tiny, tiny_model


def contents(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_the_build_is_deterministic_and_leaves_the_global_generator(tiny_folder, tmp_path):
    torch.manual_seed(123)
    state = torch.get_rng_state()
    again = build_tiny(tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), state)
    assert contents(again) == contents(tiny_folder)
    other = build_tiny(tmp_path / "other", seed=1)
    differ = {str(name) for name, content in contents(other).items() if content != contents(again)[name]}
    assert len(differ) == 3
    assert all(name.endswith(".safetensors") for name in differ)
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["again", "other"]


def test_an_existing_path_is_left_alone(tiny_folder):
    before = contents(tiny_folder)
    with pytest.raises(FileExistsError, match="expected a folder that does not exist"):
        build_tiny(tiny_folder)
    assert contents(tiny_folder) == before


def test_plain_diffusers_runs_it(pipeline):
    images = pipeline(
        "a red fox", height=64, width=64, use_resolution_binning=False, generator=torch.Generator().manual_seed(0)
    ).images
    assert images[0].size == (64, 64)


def test_it_has_the_features_of_the_large_one(pipeline):
    config = pipeline.transformer.config
    assert config.guidance_embeds
    assert config.guidance_embeds_scale == 0.1
    assert config.qk_norm == "rms_norm_across_heads"
    assert not config.attention_bias
    assert (config.mlp_ratio, config.patch_size, config.interpolation_scale) == (2.5, 1, None)
    assert config.attention_head_dim == 32
    assert config.cross_attention_head_dim != 32
    assert config.caption_channels == pipeline.text_encoder.config.hidden_size


def test_the_tokenizer_is_gemmas_in_every_loader(tiny_folder):
    fast = GemmaTokenizerFast.from_pretrained(tiny_folder / "tokenizer")
    auto = AutoTokenizer.from_pretrained(tiny_folder / "tokenizer")
    for text in ("a red fox in a quiet forest, watercolor", "Zażółć 🦊 \n\t<tag>", " two  spaces "):
        ids = fast(text).input_ids
        assert ids[0] == fast.bos_token_id
        assert fast.unk_token_id not in ids
        assert fast.decode(ids[1:]) == text
        assert auto(text).input_ids == ids
    assert len(fast("a red fox in a quiet forest").input_ids) < 12
    # transformers 4.57 reads tokenizer.json only under the Fast name
    assert json.loads((tiny_folder / "model_index.json").read_text())["tokenizer"][1] == "GemmaTokenizerFast"


def test_the_default_model_is_built_once(tmp_path, monkeypatch):
    monkeypatch.setenv("ESENGINE_CACHE", str(tmp_path / "cache"))
    first = tiny_model()
    assert first.parent == tmp_path / "cache"
    before = (first / "model_index.json").stat().st_mtime_ns
    assert tiny_model() == first
    assert (first / "model_index.json").stat().st_mtime_ns == before
    monkeypatch.delenv("ESENGINE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tiny_model().parent == tmp_path / "xdg" / "esengine"


def test_a_builder_that_comes_second_takes_the_firsts_folder(tiny_folder, tmp_path, monkeypatch):
    save = tiny._save_pipeline

    def overtaken(path, seed):
        save(path, seed)
        shutil.copytree(tiny_folder, tmp_path / tiny.NAME)
        (tmp_path / tiny.NAME / "mark").touch()

    monkeypatch.setattr(tiny, "_save_pipeline", overtaken)
    assert (tiny_model(tmp_path) / "mark").exists()
    assert [file.name for file in tmp_path.iterdir()] == [tiny.NAME]


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot build the default model"):
        tiny_model(tmp_path / "file")


def test_nothing_is_printed(tmp_path, capfd):
    SanaSprint.from_pretrained(build_tiny(tmp_path / "tiny")).encode(["a cat"])
    assert capfd.readouterr() == ("", "")
