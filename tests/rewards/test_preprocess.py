import json

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from esengine.base.errors import ConfigError
from esengine.rewards.preprocess import Preprocess, resize, resize_ref

try:  # transformers 5 keeps Pillow's path under a name of its own
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as CLIPImageProcessor
except ImportError:
    from transformers import CLIPImageProcessor

HEIGHT_MAY_GO_FIRST = int(PIL.__version__.split(".")[0]) >= 13
SETTINGS = {
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def hard(height, width, batch=1, seed=0):
    """Black and white: every overshoot of the filter is clipped."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(batch, 3, height, width, generator=generator) > 0.5).to(torch.uint8) * 255


def saved(folder, **settings):
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((64, 64), (224, 224)),
        ((512, 512), (224, 224)),
        ((1024, 1024), (224, 224)),
        ((100, 321), (31, 99)),
        ((321, 200), (99, 61)),
        ((1, 1), (32, 32)),
        ((1, 40), (3, 7)),
        ((37, 53), (37, 20)),
        ((37, 53), (20, 53)),
        ((37, 53), (37, 53)),
        ((6, 1024), (224, 77)),
        ((223, 225), (224, 226)),
    ],
)
def test_levels_are_pillows_bit_for_bit(before, after):
    for images in (hard(*before), torch.randint(256, (2, 3, *before), dtype=torch.uint8)):
        assert torch.equal(resize(images, *after), resize_ref(images, *after))


@pytest.mark.parametrize(("before", "after"), [((1000, 30), (333, 10)), ((500, 100), (40, 60)), ((300, 9), (7, 300))])
def test_tall_images_take_the_same_order_whatever_pillow_does(before, after):
    images = hard(*before)
    width_first = resize_ref(resize_ref(images, before[0], after[1]), *after)
    assert torch.equal(resize(images, *after), width_first)
    if not HEIGHT_MAY_GO_FIRST:
        assert torch.equal(width_first, resize_ref(images, *after))


def test_a_window_is_a_part_of_the_whole():
    images = hard(61, 83, batch=2)
    window = slice(5, 30), slice(11, 97)
    assert torch.equal(resize(images, 40, 120, window), resize(images, 40, 120)[:, :, window[0], window[1]])
    assert torch.equal(resize(images, 61, 83, window), images[:, :, window[0], 11:83])


def test_torchs_own_resize_of_bytes_is_within_a_level():
    images = hard(512, 384)
    torchs = torch.nn.functional.interpolate(images, (224, 168), mode="bicubic", antialias=True)
    apart = (resize(images, 224, 168).int() - torchs.int()).abs()
    assert apart.max() <= 1
    assert (apart > 0).float().mean() < 0.01


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"size": 224, "crop_size": 224},
        {"size": {"height": 64, "width": 48}, "crop_size": {"height": 40, "width": 48}},
        {"size": {"height": 64, "width": 48}, "do_center_crop": False},
        {"rescale_factor": 1 / 127.5, "image_mean": [1, 1, 1], "image_std": [1, 1, 1]},
    ],
)
@pytest.mark.parametrize("shape", [(64, 64), (300, 201), (97, 640), (224, 224), (17, 31)])
def test_pixel_values_are_those_of_transformers(tmp_path, changes, shape):
    path = saved(tmp_path, **{**SETTINGS, **changes})
    images = hard(*shape, batch=2)
    ours = Preprocess.read(path)(images)
    processor = CLIPImageProcessor.from_pretrained(tmp_path)
    pictures = [Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0))) for image in images]
    assert ours.dtype == torch.float32
    assert torch.equal(ours, processor(images=pictures, return_tensors="pt")["pixel_values"])


def test_a_processor_config_is_read_too(tmp_path):
    path = tmp_path / "processor_config.json"
    path.write_text(json.dumps({"image_processor": SETTINGS, "processor_class": "CLIPProcessor"}))
    assert Preprocess.read(path) == Preprocess.read(saved(tmp_path, **SETTINGS))
    assert Preprocess.read(path).shape == (224, 224)


def test_batch_mates_and_layout_change_nothing():
    preprocess = Preprocess(32, (32, 32), (0.5,) * 3, (0.5,) * 3)
    images = hard(50, 70, batch=5)
    whole = preprocess(images)
    assert torch.equal(whole, torch.cat([preprocess(image[None]) for image in images]))
    assert torch.equal(whole, preprocess(images.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)))
    assert preprocess(images[:0]).shape == (0, 3, 32, 32)
    assert torch.equal(images, hard(50, 70, batch=5))


def test_many_images_are_resized_in_parts(monkeypatch):
    preprocess = Preprocess(32, (32, 32), (0.5,) * 3, (0.5,) * 3)
    images = hard(50, 70, batch=5)
    whole = preprocess(images)
    monkeypatch.setattr("esengine.rewards.preprocess._VALUES_AT_ONCE", 2 * 3 * 50 * 70)
    assert torch.equal(whole, preprocess(images))


def test_a_very_long_image_costs_no_more_than_its_middle():
    # its resized whole would be 224 x 448000 x 3 float64 values, 2.4 GB
    pixels = Preprocess(224, (224, 224), (0.5,) * 3, (0.5,) * 3)(hard(2, 4000))
    assert pixels.shape == (1, 3, 224, 224)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_numbers():
    preprocess = Preprocess(224, (224, 224), tuple(SETTINGS["image_mean"]), tuple(SETTINGS["image_std"]))
    for shape in ((1024, 1024), (97, 640), (640, 97), (64, 64)):
        images = hard(*shape, batch=3)
        assert torch.equal(preprocess(images), preprocess(images.cuda()).cpu()), shape


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"size": 3}', '{"image_processor": 3}'])
def test_a_file_that_is_none(tmp_path, text):
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"preprocessor_config.json"):
        Preprocess.read(tmp_path / "preprocessor_config.json")


@pytest.mark.parametrize(
    "changes", [{"size": True}, {"size": -4}, {"size": {"longest_edge": 3}}, {"image_mean": [0, 0]}]
)
def test_settings_that_cannot_be(tmp_path, changes):
    with pytest.raises(ConfigError, match=r"preprocessor_config.json"):
        Preprocess.read(saved(tmp_path, **{**SETTINGS, **changes}))
