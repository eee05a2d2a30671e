"""What a configuration's names become."""

from dataclasses import fields, replace

import pytest
import torch

from esengine.config import ImageSettings
from esengine.errors import ConfigError
from esengine.models import RenderSettings, tiny_model
from esengine.setup import load_model, render_settings, settled

OTHER = {
    "height": 64,
    "width": 96,
    "num_steps": 1,
    "guidance_scale": 3.0,
    "x0_angle": 1.2,
    "decode_chunk": 3,
    "graphs": "never",
    "decode": "compiled",
    "overlap": True,
}


def test_every_shared_setting_reaches_the_renderer():
    shared = {each.name for each in fields(RenderSettings)} & {each.name for each in fields(ImageSettings)}
    assert shared == set(OTHER)
    settings = render_settings(replace(ImageSettings(), **OTHER))
    assert {name: getattr(settings, name) for name in OTHER} == OTHER


@pytest.mark.parametrize(("name", "value"), [("graphs", "on"), ("decode", "fast")])
def test_unknown_ways_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"image.{name}: expected one of .*, got {value}"):
        ImageSettings(**{name: value})
    with pytest.raises(ConfigError, match=f"{name}: expected one of .*, got {value}"):
        RenderSettings(**{name: value})


def test_a_run_keeps_its_chunk_and_where_its_decoder_lies(monkeypatch):
    folder = tiny_model() / "vae"
    monkeypatch.chdir(folder.parent)
    model = load_model("tiny", None, torch.device("cpu"), torch.float32, "vae")
    assert " vae sha256:" in model.identity()
    image = settled(ImageSettings(vae="vae"), model)
    assert image.vae == str(folder.resolve())
    assert image.chunk == 64
    assert settled(ImageSettings(vae="someone/lite@main", chunk=5), model).vae == "someone/lite@main"
    assert settled(ImageSettings(), model).vae is None
