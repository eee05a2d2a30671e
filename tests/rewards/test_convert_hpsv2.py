"""The converter, against a forward pass written out from open_clip's own names."""

import json
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from esengine import rewards
from esengine.base.errors import ConfigError
from esengine.rewards.convert_hpsv2 import convert, main, rename

WIDTH, TEXT_WIDTH, SHARED, LENGTH, EDGE, PATCH, LAYERS = 160, 128, 24, 16, 32, 8, 2
PROMPTS = ["a cat", "the red owl", "", "Ein Öl-Bild, 3 ✓", "a dog and the owl " * 9]


def block(width, generator):
    def normal(*shape):
        return torch.randn(shape, generator=generator) * width**-0.5

    return {
        "ln_1.weight": 1 + normal(width), "ln_1.bias": normal(width),
        "attn.in_proj_weight": 3 * normal(3 * width, width), "attn.in_proj_bias": normal(3 * width),
        "attn.out_proj.weight": normal(width, width), "attn.out_proj.bias": normal(width),
        "ln_2.weight": 1 + normal(width), "ln_2.bias": normal(width),
        "mlp.c_fc.weight": normal(4 * width, width), "mlp.c_fc.bias": normal(4 * width),
        "mlp.c_proj.weight": normal(width, 4 * width), "mlp.c_proj.bias": normal(width),
    }  # fmt: skip


@pytest.fixture(scope="module")
def weights(clip_folder):
    """A small CLIP under open_clip's names, with the vocabulary of `clip_folder`."""
    vocabulary = len(json.loads((clip_folder / "vocab.json").read_text()))
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, scale=0.2):
        return torch.randn(shape, generator=generator) * scale

    towers = {
        f"{prefix}transformer.resblocks.{at}.{name}": value
        for prefix, width in (("visual.", WIDTH), ("", TEXT_WIDTH))
        for at in range(LAYERS)
        for name, value in block(width, generator).items()
    }
    return towers | {
        "logit_scale": torch.tensor(4.6),
        "positional_embedding": normal(LENGTH, TEXT_WIDTH), "token_embedding.weight": normal(vocabulary, TEXT_WIDTH),
        "ln_final.weight": 1 + normal(TEXT_WIDTH), "ln_final.bias": normal(TEXT_WIDTH),
        "text_projection": normal(TEXT_WIDTH, SHARED), "visual.proj": normal(WIDTH, SHARED),
        "visual.class_embedding": normal(WIDTH), "visual.conv1.weight": normal(WIDTH, 3, PATCH, PATCH),
        "visual.positional_embedding": normal((EDGE // PATCH) ** 2 + 1, WIDTH),
        "visual.ln_pre.weight": 1 + normal(WIDTH), "visual.ln_pre.bias": normal(WIDTH),
        "visual.ln_post.weight": 1 + normal(WIDTH), "visual.ln_post.bias": normal(WIDTH),
    }  # fmt: skip


@pytest.fixture(scope="module")
def published(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("published") / "HPS.pt"
    torch.save({"epoch": 3, "state_dict": weights}, path)
    return path


@pytest.fixture(scope="module")
def converted(published, clip_folder, tmp_path_factory):
    return convert(published, tmp_path_factory.mktemp("converted") / "hps", processor=str(clip_folder))


def tower(w, prefix, x, heads, mask=None):
    """x [1, T, width], in float64."""
    for at in range(LAYERS):
        stem = f"{prefix}transformer.resblocks.{at}."
        b = {name.removeprefix(stem): value for name, value in w.items() if name.startswith(stem)}
        h = F.layer_norm(x, x.shape[-1:], b["ln_1.weight"], b["ln_1.bias"])
        q, k, v = (h @ b["attn.in_proj_weight"].T + b["attn.in_proj_bias"]).chunk(3, -1)
        q, k, v = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (q, k, v))
        score = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        score = score if mask is None else score + mask
        h = (score.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + h @ b["attn.out_proj.weight"].T + b["attn.out_proj.bias"]
        h = F.layer_norm(x, x.shape[-1:], b["ln_2.weight"], b["ln_2.bias"])
        h = F.gelu(h @ b["mlp.c_fc.weight"].T + b["mlp.c_fc.bias"])
        x = x + h @ b["mlp.c_proj.weight"].T + b["mlp.c_proj.bias"]
    return x


def image_features(w, pixels):
    x = F.conv2d(pixels, w["visual.conv1.weight"], stride=PATCH).flatten(2).transpose(1, 2)
    x = torch.cat([w["visual.class_embedding"].expand(len(x), 1, -1), x], 1) + w["visual.positional_embedding"]
    x = F.layer_norm(x, x.shape[-1:], w["visual.ln_pre.weight"], w["visual.ln_pre.bias"])
    x = tower(w, "visual.", x, WIDTH // 80)[:, 0]
    return F.layer_norm(x, x.shape[-1:], w["visual.ln_post.weight"], w["visual.ln_post.bias"]) @ w["visual.proj"]


def text_features(w, ids):
    """ids int64 [1, T], padded with zeros as open_clip does; the last token has the highest id."""
    x = w["token_embedding.weight"][ids] + w["positional_embedding"]
    x = tower(w, "", x, TEXT_WIDTH // 64, torch.full((LENGTH, LENGTH), -math.inf).triu(1).double())
    x = F.layer_norm(x, x.shape[-1:], w["ln_final.weight"], w["ln_final.bias"])
    return x[0, ids.argmax()][None] @ w["text_projection"]


def test_scores_are_those_of_open_clips_forward_pass(weights, converted, images):
    reward = rewards.load("hpsv2", model=converted)
    batch = images(len(PROMPTS), EDGE, EDGE)
    w = {name: value.double() for name, value in weights.items()}
    ids = [F.pad(ids, (0, LENGTH - ids.shape[1])) for ids in map(reward.encoder.tokenize, PROMPTS)]
    texts = torch.cat([text_features(w, each) for each in ids])
    expected = F.cosine_similarity(image_features(w, reward.encoder.preprocess(batch).double()), texts)
    torch.testing.assert_close(reward(batch, PROMPTS), expected.float(), rtol=1e-4, atol=1e-6)
    assert expected.std() > 0.01
    assert reward.encoder.scale == pytest.approx(math.exp(4.6), rel=1e-6)


def test_the_folder_is_whole_and_holds_no_pickle(converted):
    names = {path.name for path in converted.iterdir()}
    assert names >= {"config.json", "model.safetensors", "preprocessor_config.json", "vocab.json", "merges.txt"}
    assert not [name for name in names if name.endswith((".pt", ".bin"))]


def test_a_constant_of_older_versions_has_no_place_and_needs_none(weights):
    assert rename({**weights, "attn_mask": torch.zeros(LENGTH, LENGTH)}).keys() == rename(weights).keys()


def test_the_command(published, clip_folder, tmp_path, capsys):
    assert main([str(published), str(tmp_path / "out"), "--processor", str(clip_folder)]) == 0
    assert f"hpsv2(model={tmp_path / 'out'})" in capsys.readouterr().out
    assert main([str(published), str(tmp_path / "out"), "--processor", str(clip_folder)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: folder: expected a new or an empty one")
    assert said.count("\n") == 1


class Code:
    def __reduce__(self):
        return print, ("this ran",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Code(), "cannot be read as weights alone"),
        ({"state_dict": {"a": Code()}}, "cannot be read as weights alone"),
        ([1, 2], "expected a state dict, got list"),
        ({"state_dict": 3}, "expected a state dict, got int"),
        ({"state_dict": {}}, "state dict of an open_clip ViT-H-14"),
        ({"visual.head.weight": torch.zeros(2)}, "no place for visual.head.weight"),
        (b"no archive", "cannot be read as weights alone"),
        (None, "cannot be read as weights alone"),
    ],
)
def test_another_file(clip_folder, tmp_path, capsys, content, message):
    source = tmp_path / "HPS.pt"
    if isinstance(content, bytes):
        source.write_bytes(content)
    elif content is not None:
        torch.save(content, source)
    with pytest.raises(ConfigError, match=message) as caught:
        convert(source, tmp_path / "out", processor=str(clip_folder))
    assert "\n" not in str(caught.value)
    assert "this ran" not in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_weight_too_few(weights, clip_folder, tmp_path):
    torch.save({name: value for name, value in weights.items() if name != "ln_final.bias"}, tmp_path / "HPS.pt")
    with pytest.raises(ConfigError, match=r"text_model.final_layer_norm.bias"):
        convert(tmp_path / "HPS.pt", tmp_path / "out", processor=str(clip_folder))


def test_a_processor_that_is_not_there(published, write_clip, tmp_path):
    bare = write_clip(tmp_path / "bare", processor=False)
    with pytest.raises(ConfigError, match=r"preprocessor_config.json"):
        convert(published, tmp_path / "out", processor=str(bare))


def test_the_error_of_the_reward_names_the_command():
    with pytest.raises(ConfigError, match=r"esengine.rewards.convert_hpsv2"):
        rewards.load("hpsv2")


def test_help_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "esengine.rewards.convert_hpsv2", "-h"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "HPS_v2.1_compressed.pt" in done.stdout
