"""What a configuration's names become."""

from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch

from esengine.base.errors import ConfigError
from esengine.models import RenderSettings, tiny_model
from esengine.run.prepare import _resolved
from esengine.run.settings import TrainConfig
from esengine.sampling.build import load_model, render_settings, settled
from esengine.sampling.device import take_device
from esengine.sampling.settings import ImageSettings

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
    for cls, setting in ((ImageSettings, f"image.{name}"), (RenderSettings, name)):
        with pytest.raises(ConfigError) as caught:
            cls(**{name: value})
        assert caught.value.setting == setting
        assert "one of" in caught.value.problem
        assert value in caught.value.problem


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


@pytest.mark.parametrize("name", ["auto", "cuda"])
@pytest.mark.parametrize("rank", [None, "0", "1", "2"])
def test_under_torchrun_each_process_has_a_gpu_of_its_own(monkeypatch, name, rank):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    if rank == "2":
        with pytest.raises(ConfigError, match=r"device: 'cuda:2' is not there; torch .* sees 2 GPUs"):
            take_device(name)
        return
    own = torch.device("cuda" if rank is None else f"cuda:{rank}")
    assert take_device(name) == own
    assert taken == [own] * (rank is not None)
    assert take_device("cuda:1") == taken[-1] == torch.device("cuda:1")
    assert take_device("cpu") == torch.device("cpu")


def test_a_run_does_not_keep_the_number_of_its_gpu():
    model = SimpleNamespace(device=torch.device("cuda:1"), dtype=torch.bfloat16)
    kept = _resolved(TrainConfig(device="cuda:1", image=ImageSettings(chunk=4)), model)
    assert (kept.device, kept.dtype) == ("cuda", "bfloat16")
