import errno
import json
import os

import pytest
import torch
from hostile import no_hang
from safetensors.torch import load_file, save_file

from esengine.base import files
from esengine.base.errors import ConfigError
from esengine.models import DiffusersPipeline, SanaSprint, TextEmbeddings, text_cache
from esengine.models.conditioning import channels_of
from esengine.models.families import TINY
from esengine.models.text_cache import embed_prompts, fingerprint

KEY = {"model": "m"}


class Encoder:
    """Embeddings of len(prompt) tokens; remembers what it was asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, prompts):
        self.asked.append(list(prompts))
        for prompt in prompts:
            generator = torch.Generator().manual_seed(len(prompt))
            yield torch.randn(len(prompt), 4, generator=generator).bfloat16()


def test_second_time_nothing_is_encoded(tmp_path):
    encode, told = Encoder(), []
    first = embed_prompts(["aa", "b", "aa"], encode, key=KEY, cache_dir=tmp_path, progress=lambda *a: told.append(a))
    assert encode.asked == [["aa", "b"]]
    assert told == [(1, 2), (2, 2)]
    second = embed_prompts(["b", "aa"], encode, key=KEY, cache_dir=tmp_path)
    assert len(encode.asked) == 1
    assert second.prompts == ("b", "aa")
    assert torch.equal(second[0], first[1])
    assert torch.equal(second[1], first[0])
    assert second.dtype == torch.bfloat16


def test_new_prompts_are_appended(tmp_path):
    encode = Encoder()
    embed_prompts(["aa"], encode, key=KEY, cache_dir=tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.glob("*.safetensors")}
    embed_prompts(["b", "aa"], encode, key=KEY, cache_dir=tmp_path)
    embed_prompts(["aa", "b"], encode, key=KEY, cache_dir=tmp_path)
    assert encode.asked == [["aa"], ["b"]]
    assert all(file.read_bytes() == content for file, content in before.items())
    assert not list(tmp_path.glob(".*"))


def test_another_key_shares_nothing(tmp_path):
    encode = Encoder()
    embed_prompts(["aa"], encode, key=KEY, cache_dir=tmp_path)
    embed_prompts(["aa"], encode, key={"model": "n"}, cache_dir=tmp_path)
    assert encode.asked == [["aa"], ["aa"]]


def test_no_cache_dir_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encode = Encoder()
    for _ in range(2):
        embed_prompts(["aa"], encode, key=KEY)
    assert len(encode.asked) == 2
    assert not list(tmp_path.iterdir())


def flip_last_byte(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


def empty(file):
    file.write_bytes(b"")


def deep(file):
    file.write_text("[" * 100_000)


def other_key(file):
    content = json.loads(file.read_text())
    content["key"]["model"] = "n"
    file.write_text(json.dumps(content))


def other_checksum(file):
    content = json.loads(file.read_text())
    content["prompts"]["aa"]["sha256"] = "0" * 64
    file.write_text(json.dumps(content))


def swap_shard_for_a_path(file):
    content = json.loads(file.read_text())
    content["prompts"]["aa"]["shard"] = "../elsewhere.safetensors"
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("pattern", "damage", "named"),
    [
        ("*.safetensors", flip_last_byte, "*.safetensors"),
        ("*.safetensors", truncate, "*.safetensors"),
        ("*.safetensors", empty, "*.safetensors"),
        ("*.json", truncate, "*.json"),
        ("*.json", empty, "*.json"),
        ("*.json", deep, "*.json"),
        ("*.json", other_key, "*.json"),
        ("*.json", other_checksum, "*.safetensors"),
        ("*.json", swap_shard_for_a_path, "*.json"),
    ],
)
def test_damage_is_an_error_that_names_the_file(tmp_path, pattern, damage, named):
    encode = Encoder()
    embed_prompts(["aa", "bbb"], encode, key=KEY, cache_dir=tmp_path)
    damage(next(tmp_path.glob(pattern)))
    with pytest.raises(ConfigError, match="deleting it is safe") as caught:
        embed_prompts(["aa", "bbb"], encode, key=KEY, cache_dir=tmp_path)
    file = next(tmp_path.glob(named))
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    file.unlink()
    embed_prompts(["aa", "bbb"], encode, key=KEY, cache_dir=tmp_path)
    embed_prompts(["aa", "bbb"], encode, key=KEY, cache_dir=tmp_path)


def test_no_prompts_is_an_error():
    with pytest.raises(ConfigError, match="prompts: expected at least one"):
        embed_prompts([], Encoder(), key=KEY)


def test_the_model_loads_its_text_encoder_once(tiny_folder, tmp_path, monkeypatch):
    loads = []
    encode = SanaSprint._encode
    monkeypatch.setattr(SanaSprint, "_encode", lambda *args: loads.append(args[1]) or encode(*args))
    first = SanaSprint.from_pretrained(tiny_folder).encode(["a fox", "a cat"], cache_dir=tmp_path)
    model = SanaSprint.from_pretrained(tiny_folder)
    again = model.encode(["a cat", "a fox"], cache_dir=tmp_path)
    assert loads == [["a fox", "a cat"]]
    assert torch.equal(first[0], again[1])
    assert torch.equal(first[1], again[0])
    assert model.pipeline.text_encoder is None
    for change in ({"instruction": False}, {"max_sequence_length": 20}, {"dtype": torch.bfloat16}):
        model.encode(["a cat"], cache_dir=tmp_path, **change)
    assert len(loads) == 4


def test_an_embedding_does_not_depend_on_what_else_is_encoded(model):
    together = model.encode(["a fox in the rain", "a cat"])
    alone = model.encode(["a cat"])
    assert torch.equal(together[1], alone[0])


def test_fingerprint_follows_contents_and_names(tmp_path):
    (tmp_path / "text_encoder").mkdir()
    file = tmp_path / "text_encoder" / "weights"
    file.write_bytes(b"abc")
    first = fingerprint(tmp_path)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "weights").write_bytes(b"x")
    assert fingerprint(tmp_path) == first
    file.write_bytes(b"abd")
    second = fingerprint(tmp_path)
    file.rename(file.with_name("other"))
    assert len({first, second, fingerprint(tmp_path)}) == 3


def test_fingerprint_reads_every_byte_of_a_large_file(tmp_path):
    (tmp_path / "text_encoder").mkdir()
    file = tmp_path / "text_encoder" / "weights"
    with open(file, "wb") as stream:
        stream.truncate(66 << 20)
    seen = {fingerprint(tmp_path)}
    for at in (0, 33 << 20, (66 << 20) - 1):
        with open(file, "r+b") as stream:
            stream.seek(at)
            stream.write(b"\1")
        seen.add(fingerprint(tmp_path))
    assert len(seen) == 4


def test_batches_are_padded_and_masked():
    texts = TextEmbeddings(["a", "b", "c"], [torch.full((n, 2), float(n)) for n in (1, 3, 2)])
    indices = torch.tensor([2, 0, 2])
    assert texts.trimmed_length(indices) == 2
    embeds, mask = texts.batch(indices)
    assert embeds[:, :, 0].tolist() == [[2, 2], [1, 0], [2, 2]]
    assert mask.tolist() == [[1, 1], [1, 0], [1, 1]]
    assert mask.dtype == torch.int64
    embeds, mask = texts.batch(indices, length=4, dtype=torch.float16)
    assert embeds.shape == (3, 4, 2)
    assert embeds.dtype == torch.float16
    assert mask.sum(1).tolist() == [2, 1, 2]


@pytest.mark.parametrize(
    ("indices", "length", "message"),
    [
        (torch.tensor([0.0]), None, "indices: expected int64"),
        (torch.tensor([], dtype=torch.int64), None, "B >= 1"),
        (torch.tensor([3]), None, r"expected values in \[0, 3\), got 3..3"),
        (torch.tensor([-1]), None, "expected values in"),
        (torch.tensor([1]), 2, "length: expected at least 3"),
    ],
)
def test_wrong_batches_are_refused(indices, length, message):
    texts = TextEmbeddings(["a", "b", "c"], [torch.zeros(n, 2) for n in (1, 3, 2)])
    with pytest.raises(ValueError, match=message):
        texts.batch(indices, length=length)


def rewrite_cache(folder, change) -> None:
    """Replace every cached tensor by what `change` makes of it, with checksums that are right."""
    for index in folder.glob("*.json"):
        content = json.loads(index.read_text())
        for entry in content["prompts"].values():
            shard = load_file(folder / entry["shard"])
            made = change(shard[entry["tensor"]])
            shard[entry["tensor"]] = made
            entry["sha256"] = text_cache._tensor_sha256(made)
            save_file(shard, folder / entry["shard"])
        index.write_text(json.dumps(content))


OTHER_SHAPES = {
    "wider": lambda t: torch.cat([t, t], 1) if t.is_floating_point() else t,
    "narrower": lambda t: t[:, :3].clone() if t.is_floating_point() else t,
    "flat": lambda t: t.reshape(-1),
    "deep": lambda t: t[None],
    "a number": lambda t: t.sum() if t.is_floating_point() else t,
    "empty": lambda t: t[:0],
    "whole numbers": lambda t: t.long() if t.is_floating_point() else t[:, :0],
    "not finite": lambda t: t / 0 if t.is_floating_point() else t.flatten(),
    "truth": lambda t: t.bool() if t.is_floating_point() else t[:, :1].clone() if t.shape[1] > 1 else t[:, :0],
}


@pytest.mark.parametrize("family", ["tiny", "tiny:sd3", "tiny:pixart", "tiny:z-image", "tiny:hunyuan-image"])
@pytest.mark.parametrize("change", OTHER_SHAPES)
def test_a_cache_with_right_checksums_and_wrong_tensors_is_refused(cache, tmp_path, family, change):
    kind = SanaSprint if family == "tiny" else DiffusersPipeline
    kind.from_pretrained(family).encode(["a cat", "dogs"], cache_dir=tmp_path)
    rewrite_cache(tmp_path, OTHER_SHAPES[change])
    with pytest.raises(ConfigError, match=r"text cache: cannot use .*deleting it is safe"):
        kind.from_pretrained(family).encode(["a cat", "dogs"], cache_dir=tmp_path)


def test_texts_of_several_lengths_are_refused_where_there_is_no_mask(cache, tmp_path):
    DiffusersPipeline.from_pretrained("tiny:sd3").encode(["a cat"], cache_dir=tmp_path)
    rewrite_cache(tmp_path, lambda t: t[:5].clone())
    with pytest.raises(ConfigError, match="one length"):
        DiffusersPipeline.from_pretrained("tiny:sd3").encode(["a cat", "dogs"], cache_dir=tmp_path)


def test_another_dtype_is_refused(cache, tmp_path):
    SanaSprint.from_pretrained("tiny").encode(["a cat"], cache_dir=tmp_path)
    rewrite_cache(tmp_path, lambda t: t.double())
    with pytest.raises(ConfigError, match="text cache"):
        SanaSprint.from_pretrained("tiny").encode(["a cat"], cache_dir=tmp_path)


@pytest.mark.parametrize("family", [each for each in TINY if each != "sana-sprint"])
def test_what_a_family_encodes_fits_its_denoiser(cache, tmp_path, family):
    first = DiffusersPipeline.from_pretrained(f"tiny:{family}").encode(["a cat", "dogs"], cache_dir=tmp_path)
    model = DiffusersPipeline.from_pretrained(f"tiny:{family}")
    again = model.encode(["a cat", "dogs"], cache_dir=tmp_path)
    assert set(channels_of(model.module.config)) & set(first[0])
    assert all(torch.equal(again[0][name], tensor) for name, tensor in first[0].items())


@pytest.mark.parametrize("where", ["below a file", "a full disk", "a pipe"])
def test_a_cache_that_cannot_be_used_is_left_out_with_one_warning(tmp_path, monkeypatch, caplog, where):
    files.warned.clear()
    folder = tmp_path / "cache"
    if where == "below a file":
        folder.write_text("x")
    elif where == "a full disk":

        def full(path, data):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

        monkeypatch.setattr(text_cache, "replace_file", full)
    else:
        folder.mkdir()
        os.mkfifo(text_cache.Cache(folder, KEY).index)
    encode = Encoder()
    for _ in range(2):
        with no_hang():
            found = embed_prompts(["aa", "bbb"], encode, key=KEY, cache_dir=folder)
        assert len(found) == 2
    assert len(encode.asked) == 2
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "ESENGINE_CACHE" in caplog.text
