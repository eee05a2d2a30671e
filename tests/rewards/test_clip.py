import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPTokenizerFast

from esengine import rewards
from esengine.base.errors import ConfigError, RewardError
from esengine.rewards import encoder as encoder_module

try:  # transformers 5 keeps Pillow's path under a name of its own
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as CLIPImageProcessor
except ImportError:
    from transformers import CLIPImageProcessor

NAMES = ["pickscore", "hpsv2", "clip_text", "aesthetic", "no_artifacts"]
PROMPTS = ["a cat", "a dog and the owl", "", "the red cat " * 9, "Ein Öl-Bild, 3 ✓"]
TEXTS = {
    "aesthetic": "a high quality, professional, beautiful, aesthetically pleasing image",
    "no_artifacts": "blurry, low resolution, noisy, pixelated, washed out colors, oversaturated ",
}


def reference(folder, name, pixels, prompts):
    """transformers' own CLIP, one image and one padded text at a time, and the issue's formulas in fp64."""
    clip, tokenizer = CLIPModel.from_pretrained(folder).float().eval(), CLIPTokenizerFast.from_pretrained(folder)
    scores = []
    for pixel, prompt in zip(pixels, prompts, strict=True):
        text = tokenizer(
            TEXTS.get(name, prompt), padding="max_length", max_length=16, truncation=True, return_tensors="pt"
        )
        with torch.no_grad():
            out = clip(**text, pixel_values=pixel[None])
        cosine = torch.nn.functional.cosine_similarity(out.text_embeds.double(), out.image_embeds.double()).item()
        scores.append(
            {
                "pickscore": math.exp(clip.logit_scale.item()) * cosine,
                "hpsv2": cosine,
                "no_artifacts": 1 - (cosine + 1) / 2,
            }.get(name, (cosine + 1) / 2)
        )
    return torch.tensor(scores)


def pil_pixels(folder, images):
    processor = CLIPImageProcessor.from_pretrained(folder)
    pictures = [Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy())) for image in images]
    settings = dict(return_tensors="pt", input_data_format="channels_last")  # 4.x cannot tell one row from one channel
    return torch.stack([processor(images=picture, **settings)["pixel_values"][0] for picture in pictures])


class Counted:
    """How often each tower of an encoder is called, and on how many rows."""

    def __init__(self, encoder, monkeypatch):
        self.images, self.texts = [], []
        for name, rows in (("get_image_features", self.images), ("get_text_features", self.texts)):
            monkeypatch.setattr(encoder.clip, name, self.wrap(getattr(encoder.clip, name), rows))

    def wrap(self, method, rows):
        def call(**kwargs):
            rows.append(len(next(iter(kwargs.values()))))
            return method(**kwargs)

        return call


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_those_of_transformers(clip_folder, images, name):
    reward = rewards.load(name, model=str(clip_folder))
    scores = reward(images(), PROMPTS)
    assert scores.dtype == torch.float32
    expected = reference(clip_folder, name, reward.encoder.preprocess(images()), PROMPTS)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=0)
    assert expected.std() > 1e-3 * expected.abs().mean()
    # end to end, from Pillow images: the same bound, because the pixel values are the same
    torch.testing.assert_close(
        scores, reference(clip_folder, name, pil_pixels(clip_folder, images()), PROMPTS), rtol=1e-4, atol=0
    )


def test_the_fixed_texts_to_the_last_space():
    assert {"aesthetic": rewards.Aesthetic.text, "no_artifacts": rewards.NoArtifacts.text} == TEXTS


def test_the_end_of_text_of_openais_configs(write_clip, tmp_path, images):
    folder = write_clip(tmp_path / "clip", legacy_eos=True)
    reward = rewards.load("pickscore", model=str(folder))
    expected = reference(folder, "pickscore", reward.encoder.preprocess(images()), PROMPTS)
    torch.testing.assert_close(reward(images(), PROMPTS), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 32, 32), (3, 31, 33), (2, 7, 500), (2, 500, 7), (1, 1, 4000)])
def test_any_shape_of_image(clip_folder, images, shape):
    batch = images(*shape)
    scores = rewards.load("pickscore", model=str(clip_folder))(batch, PROMPTS[: shape[0]])
    assert torch.isfinite(scores).all()
    if shape[1] <= 2 * shape[2]:
        pixels = pil_pixels(clip_folder, batch)
        expected = reference(clip_folder, "pickscore", pixels, PROMPTS[: shape[0]])
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=0)


def test_no_image(clip_folder):
    scores = rewards.parse(",".join(f"{name}(model={clip_folder})" for name in NAMES)).score(
        torch.zeros(0, 3, 8, 8, dtype=torch.uint8), []
    )
    assert {name: score.shape for name, score in scores.items()} == dict.fromkeys([*NAMES, "combined"], (0,))


def test_a_strided_batch_scores_the_same(clip_folder, images):
    reward = rewards.load("clip_text", model=str(clip_folder))
    strided = images().permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    assert torch.equal(reward(images(), PROMPTS), reward(strided, PROMPTS))


@pytest.mark.parametrize(
    "batch", [torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 8, 3, dtype=torch.uint8), torch.zeros(3, 8, 8).byte()]
)
def test_images_of_another_kind(clip_folder, batch):
    with pytest.raises(ValueError, match=r"images: expected uint8 \[B, 3, H, W\], got"):
        rewards.load("clip_text", model=str(clip_folder))(batch, ["a", "b"])


# ---- passes


def test_one_image_pass_for_all_and_one_text_pass_for_each_new_prompt(clip_folder, images, monkeypatch):
    reward = rewards.parse(",".join(f"{name}(model={clip_folder})" for name in NAMES))
    assert len({id(term.reward.encoder) for term in reward.terms}) == 1
    counted = Counted(reward.terms[0].reward.encoder, monkeypatch)
    first = reward.score(images(6), ["a", "b", "a", "b", "a", "a"])
    assert counted.images == [6]
    assert counted.texts == [1, 1]  # the fixed texts were encoded when they were loaded
    again = reward.score(images(6), ["a", "b", "a", "b", "c", "a"])
    assert counted.images == [6, 6]
    assert counted.texts == [1, 1, 1]
    assert torch.equal(first["clip_text"][:4], again["clip_text"][:4])


def test_shared_passes_give_what_each_reward_gives_alone(clip_folder, images):
    together = rewards.parse(",".join(f"{name}(model={clip_folder})" for name in NAMES)).score(images(), PROMPTS)
    for name in NAMES:
        assert torch.equal(together[name], rewards.load(name, model=str(clip_folder))(images(), PROMPTS)), name


def test_other_settings_are_other_encoders(clip_folder):
    reward = rewards.parse(f"clip_text(model={clip_folder}),aesthetic(model={clip_folder},dtype=bfloat16)")
    first, second = (term.reward.encoder for term in reward.terms)
    assert (first.clip.dtype, second.clip.dtype) == (torch.float32, torch.bfloat16)


def test_a_text_does_not_depend_on_what_else_is_asked_for(clip_folder):
    together = rewards.load("clip_text", model=str(clip_folder)).encoder.text_features([*PROMPTS, PROMPTS[0]])
    alone = [rewards.load("clip_text", model=str(clip_folder)).encoder.text_features([p])[0] for p in PROMPTS]
    assert torch.equal(together, torch.stack([*alone, alone[0]]))
    assert torch.allclose(together.norm(dim=-1), torch.ones(6))


def test_remembered_texts_are_bounded_and_the_last_used_are_kept(clip_folder, monkeypatch):
    monkeypatch.setattr(encoder_module, "PROMPTS_KEPT", 3)
    encoder = rewards.load("clip_text", model=str(clip_folder)).encoder
    counted = Counted(encoder, monkeypatch)
    encoder.text_features(["a", "b", "c", "a", "d"])
    assert len(counted.texts) == 4
    encoder.text_features(["a"])
    assert len(counted.texts) == 5  # first in, first out within one call
    encoder.text_features(["d", "c"])
    assert len(counted.texts) == 5
    assert list(encoder._texts) == ["a", "d", "c"]


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
def test_scores_do_not_depend_on_batch_size(clip_folder, images, batch, monkeypatch):
    whole = rewards.load("pickscore", model=str(clip_folder), batch=64)(images(7), ["a cat"] * 7)
    reward = rewards.load("pickscore", model=str(clip_folder), batch=batch)
    counted = Counted(reward.encoder, monkeypatch)
    parts = reward(images(7), ["a cat"] * 7)
    assert len(counted.images) == math.ceil(7 / batch)
    assert max(counted.images) == batch
    assert (parts - whole).abs().max() <= 1e-6 * reward.encoder.scale


def test_long_texts_are_cut_as_the_processor_cuts_them(clip_folder):
    encoder = rewards.load("clip_text", model=str(clip_folder)).encoder
    long = encoder.tokenize("the red cat " * 99)
    assert long.shape == (1, 16)
    assert long[0, -1] == encoder.clip.config.text_config.eos_token_id
    assert encoder.tokenize("").shape == (1, 2)


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 2e-2), ("float16", 2e-3)])
def test_half_precision_and_a_scale_that_is_not_rounded(clip_folder, images, dtype, bound):
    exact = rewards.load("pickscore", model=str(clip_folder))
    half = rewards.load("pickscore", model=str(clip_folder), dtype=dtype)
    assert half.encoder.clip.dtype == getattr(torch, dtype)
    assert half.encoder.scale == exact.encoder.scale == pytest.approx(math.exp(4.6052), rel=1e-6)
    scores = half(images(), PROMPTS)
    assert scores.dtype == torch.float32
    assert (scores - exact(images(), PROMPTS)).abs().max() < bound * exact.encoder.scale


def test_weights_are_not_trained_and_the_generator_is_untouched(clip_folder, images):
    state = torch.random.get_rng_state()
    reward = rewards.load("pickscore", model=str(clip_folder))
    scores = reward(images(), PROMPTS)
    assert not scores.requires_grad
    assert not any(p.requires_grad for p in reward.encoder.clip.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


# ---- combined


def test_combined_is_a_reward(clip_folder, images):
    spec = f"pickscore(model={clip_folder})=1.0,clip_text(model={clip_folder})=0.5"
    both = rewards.parse(spec)
    scores = both.score(images(), PROMPTS)
    torch.testing.assert_close(scores["combined"], scores["pickscore"] + 0.5 * scores["clip_text"])
    assert torch.equal(both(images(), PROMPTS), scores["combined"])
    assert torch.equal(rewards.checked("combined", both, images(), PROMPTS), scores["combined"])


def test_settings_tell_what_was_loaded(clip_folder):
    settings = rewards.parse(f"clip_text(model={clip_folder},dtype=bfloat16)=2,jpeg_compressibility=0").settings()
    fingerprint = settings["clip_text"].pop("fingerprint")
    assert fingerprint.startswith("sha256:")
    assert settings == {
        "clip_text": {"weight": 2.0, "model": str(clip_folder), "dtype": "bfloat16"},
        "jpeg_compressibility": {"weight": 0.0, "quality": 95},
    }
    json.dumps(settings)


def test_a_changed_folder_has_another_fingerprint(write_clip, tmp_path, clip_folder):
    other = write_clip(tmp_path / "other", seed=1)
    prints = {rewards.load("clip_text", model=str(f)).settings()["fingerprint"] for f in (clip_folder, other)}
    assert len(prints) == 2


# ---- what cannot be loaded


def copy(folder, to, *without):
    shutil.copytree(folder, to)
    for name in without:
        (to / name).unlink()
    return to


def test_a_pickle_is_refused(write_clip, clip_folder, tmp_path):
    folder = copy(clip_folder, tmp_path / "pickle", "model.safetensors")
    torch.save(CLIPModel.from_pretrained(clip_folder).state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="safetensors"):
        rewards.load("pickscore", model=str(folder))


def damaged(name, contents):
    def damage(folder):
        (folder / name).write_bytes(contents)

    return damage


def truncated(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def renamed(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["elsewhere"] = weights.pop("visual_projection.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def changed(name, **changes):
    def change(folder):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**settings, **changes}))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, "cannot load"),
        (renamed, "1 of its weights are missing or of another shape, such as visual_projection.weight"),
        (damaged("config.json", b"{"), "cannot load"),
        (changed("config.json", model_type="bert"), "expected the config of a CLIPModel, got model_type bert"),
        (damaged("preprocessor_config.json", b"[]"), "cannot use preprocessor_config.json"),
        (
            changed("preprocessor_config.json", size={"height": 8, "width": 8}, crop_size=8),
            r"images of 32 x 32, .*\(8, 8\)",
        ),
        (changed("preprocessor_config.json", resample=2), r"resample: expected 3 \(bicubic\), got 2"),
        (changed("preprocessor_config.json", crop_size=64), "crop_size: expected at most the size"),
        (changed("preprocessor_config.json", size=0), "size: expected lengths of at least 1"),
        (changed("preprocessor_config.json", image_std=[1, 1, 0]), "none of std 0"),
        (changed("preprocessor_config.json", do_normalize=False), "do_normalize: expected true"),
        (damaged("vocab.json", b"{}"), "cannot load"),
    ],
)
def test_a_damaged_folder_gives_one_line(clip_folder, tmp_path, damage, message):
    folder = copy(clip_folder, tmp_path / "damaged")
    damage(folder)
    with pytest.raises(ConfigError, match=message) as caught:
        rewards.load("pickscore", model=str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "/no/such/folder"}, "neither a folder nor a hub id"),
        ({"model": "name"}, "neither a folder nor a hub id"),
        ({"model": 3}, "model: expected text, got 3; .*quotes"),
        ({"dtype": "int8"}, "dtype: expected one of float32, bfloat16, float16, got int8"),
        ({"device": "nowhere"}, "device: cannot use 'nowhere'"),
        ({"batch": 0}, "batch: expected an int of at least 1, got 0"),
        ({"revision": "abc"}, "is a folder and has none, got abc"),
        ({"revision": 12345}, "revision: expected text, got 12345; .*quotes"),
        ({"encoders": 1}, "unknown options encoders; expected some of model, revision, dtype, device, batch$"),
        ({"quality": 3}, "unknown options quality; expected some of model, revision, dtype, device, batch$"),
    ],
)
def test_options_that_do_not_fit(clip_folder, options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        rewards.load("pickscore", **{"model": str(clip_folder), **options})
    assert caught.value.setting == "reward pickscore"


def test_a_folder_as_a_path(clip_folder):
    assert rewards.load("pickscore", model=clip_folder).settings()["model"] == str(clip_folder)


@pytest.mark.parametrize("name", NAMES)
def test_as_many_prompts_as_images(clip_folder, images, name):
    with pytest.raises(ValueError, match="prompts: expected 7"):
        rewards.load(name, model=str(clip_folder))(images(7), ["a cat"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there(clip_folder):
    with pytest.raises(ConfigError, match="device: cannot use 'cuda'"):
        rewards.parse(f"pickscore(model={clip_folder})", device="cuda")


def test_hpsv2_names_no_model_of_its_own():
    with pytest.raises(ConfigError, match="CLIPModel") as caught:
        rewards.load("hpsv2")
    assert caught.value.setting == "reward hpsv2"


def test_score_errors_name_the_reward(clip_folder, images):
    reward = rewards.parse(f"pickscore(model={clip_folder})")
    reward.terms[0].reward.encoder.clip.visual_projection.weight.data.fill_(float("nan"))
    with pytest.raises(RewardError, match="nan") as caught:
        reward.score(images(), PROMPTS, step=4, members=range(5))
    assert (caught.value.reward, caught.value.step) == ("pickscore", 4)


# ---- the hub, from a cache that looks like one


HUB = """
import json, sys
from esengine import rewards
from esengine.base.errors import ConfigError
for name, options in json.loads(sys.argv[1]):
    try:
        reward = rewards.load(name, **options)
        print(json.dumps([reward.settings(), reward.encoder.tokenize("a cat").tolist()]))
    except ConfigError as error:
        print(json.dumps(str(error)))
"""


def offline(home, *rewards_and_options):
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", HUB, json.dumps(rewards_and_options)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def cached(home, name, commit, source, ref="main"):
    folder = home / "hub" / ("models--" + name.replace("/", "--"))
    (folder / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
    (folder / "refs" / ref).write_text(commit)
    shutil.copytree(source, folder / "snapshots" / commit)


def test_hub_ids_are_read_from_the_cache(write_clip, tmp_path):
    commit, other = "a" * 40, "b" * 40
    cached(tmp_path, "yuvalkirstain/PickScore_v1", commit, write_clip(tmp_path / "w", processor=False))
    cached(tmp_path, "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", other, write_clip(tmp_path / "p", weights=False))
    cached(tmp_path, "me/mine", other, write_clip(tmp_path / "m", seed=1))
    whole, pinned, mine, absent, clip = offline(
        tmp_path,
        ("pickscore", {}),
        ("pickscore", {"revision": commit, "dtype": "bfloat16"}),
        ("hpsv2", {"model": "me/mine"}),
        ("pickscore", {"revision": "c" * 40}),
        ("clip_text", {}),
    )
    assert whole[0] == {
        "model": "yuvalkirstain/PickScore_v1",
        "commit": commit,
        "processor": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        "dtype": "float32",
    }
    assert pinned[0] == {**whole[0], "dtype": "bfloat16"}
    assert mine[0] == {"model": "me/mine", "dtype": "float32", "commit": other}
    assert whole[1] == mine[1]
    assert "no complete hub model of that name was found" in absent
    assert "openai/clip-vit-base-patch32" in clip
    assert "\n" not in clip + absent


CLIP_B, MAIN, CONVERTED = "openai/clip-vit-base-patch32", "3d" * 20, "c237dc49a33fc61debc9276459120b7eac67e7ef"


def test_the_default_clip_has_its_safetensors_elsewhere_than_on_main(write_clip, tmp_path):
    """As transformers leaves the cache: main without weights, and the converter's commit with nothing else."""
    whole = write_clip(tmp_path / "whole")
    cached(tmp_path, CLIP_B, MAIN, copy(whole, tmp_path / "main", "model.safetensors"))
    weights = tmp_path / "weights"
    weights.mkdir()
    shutil.copy(whole / "model.safetensors", weights)
    cached(tmp_path, CLIP_B, CONVERTED, weights, ref="refs/pr/66")
    found, pinned, main = offline(
        tmp_path, ("clip_text", {}), ("aesthetic", {"model": CLIP_B}), ("clip_text", {"revision": MAIN})
    )
    assert found[0] == {"model": CLIP_B, "processor": CLIP_B, "dtype": "float32", "commit": CONVERTED}
    assert pinned[0] == found[0]
    assert found[1] == [CLIPTokenizerFast.from_pretrained(whole)("a cat")["input_ids"]]
    assert f"no model.safetensors at revision {MAIN}" in main
    assert f"revision={CONVERTED}" in main
    assert "\n" not in main


def test_the_converters_commit_alone_is_enough(write_clip, tmp_path):
    cached(tmp_path, CLIP_B, CONVERTED, write_clip(tmp_path / "whole"), ref="refs/pr/66")
    default, commit, ref = offline(
        tmp_path, *(("clip_text", options) for options in ({}, {"revision": CONVERTED}, {"revision": "refs/pr/66"}))
    )
    assert default[0]["commit"] == commit[0]["commit"] == ref[0]["commit"] == CONVERTED


def test_a_hub_model_without_safetensors(write_clip, tmp_path):
    bare = copy(write_clip(tmp_path / "whole"), tmp_path / "bare", "model.safetensors")
    (bare / "pytorch_model.bin").write_bytes(b"a pickle")
    cached(tmp_path, "me/old", "e" * 40, bare)
    (said,) = offline(tmp_path, ("hpsv2", {"model": "me/old"}))
    assert "me/old has no model.safetensors at its main branch" in said
    assert "refs/pr/N" in said
    assert "\n" not in said


@pytest.mark.parametrize("whole", [True, False])
def test_weights_in_shards(write_clip, tmp_path, whole):
    folder = write_clip(tmp_path / "w")
    CLIPModel.from_pretrained(folder).save_pretrained(tmp_path / "w", max_shard_size="100KB")
    (folder / "model.safetensors").unlink()
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    if not whole:
        shards[-1].unlink()
    cached(tmp_path, "me/sharded", "f" * 40, folder)
    (found,) = offline(tmp_path, ("hpsv2", {"model": "me/sharded"}))
    if whole:
        assert found[0]["commit"] == "f" * 40
    else:
        assert f"{shards[-1].name} was not found" in found


def test_a_folder_without_a_processor_takes_the_named_one(write_clip, tmp_path):
    cached(tmp_path, "openai/clip-vit-base-patch32", "d" * 40, write_clip(tmp_path / "p", weights=False))
    bare = write_clip(tmp_path / "w", processor=False)
    found, absent = offline(tmp_path, ("clip_text", {"model": str(bare)}), ("pickscore", {"model": str(bare)}))
    assert (found[0]["model"], found[0]["processor"]) == (str(bare), "openai/clip-vit-base-patch32")
    assert "laion/CLIP-ViT-H-14-laion2B-s32B-b79K" in absent


def test_importing_the_rewards_loads_neither_transformers_nor_diffusers():
    code = "import sys, esengine.rewards; print([m for m in ('transformers', 'diffusers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
