"""On a GPU: graphs, decoders and streams give the images of the plain path, and a step waits for the device once."""

import pytest
import torch
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode

import esengine
from esengine.models import RenderSettings, Rows, SanaSprint, graphs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "linear_1", "linear_2", "proj_out", "linear"]
ROWS = {"seed": 3, "prompts": torch.tensor([0, 1, 2, 1]), "repeats": torch.tensor([0, 0, 1, 1])}


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def model(tiny_folder, request):
    return SanaSprint.from_pretrained(tiny_folder, device="cuda", dtype=request.param)


@pytest.fixture
def population(model):
    config = LoraConfig(r=2, lora_alpha=8, target_modules=TARGETS)
    attached = esengine.attach(model.transformer, config, esengine.Noise(sigma=3e-2, rank=1, seed=1))
    attached.update(step=0, fitness=torch.linspace(-1, 1, 16, device="cuda"))
    yield attached
    attached.detach()


def denoise(model, texts, population, step, members, **settings):
    settings = RenderSettings(**settings)
    members = torch.tensor(members)
    keys = dict(step=step, members=members, population=population, settings=settings)
    return model.denoise(texts, **ROWS, **keys, text_length=3 * graphs.TEXT_MULTIPLE)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_replay_is_the_eager_forward_to_the_bit(model, texts, population, steps):
    seen = []
    for step, members in ((1, [0, 1, 2, 3]), (1, [0, 1, 2, 3]), (1, [0, 1, 2, 3]), (9, [7, 6, 0, 0]), (2, [1] * 4)):
        seen.append(denoise(model, texts, population, step, members, num_steps=steps, graphs="always"))
        plain = denoise(model, texts, population, step, members, num_steps=steps, graphs="never")
        assert torch.equal(seen[-1], plain)
    assert model._captured[1].captured == 1
    assert not torch.equal(seen[2], seen[3])


def test_a_replay_follows_an_update(model, texts, population):
    for _ in range(2):
        before = denoise(model, texts, population, 1, [0, 1, 2, 3])
    kept = model._captured[1]
    population.update(step=1, fitness=torch.linspace(-1, 1, 16, device="cuda"))
    after = denoise(model, texts, population, 1, [0, 1, 2, 3])
    assert model._captured[1] is kept
    assert not torch.equal(after, before)
    assert torch.equal(after, denoise(model, texts, population, 1, [0, 1, 2, 3], graphs="never"))


def test_many_shapes_share_memory_and_stay_right(model, texts, population):
    sizes = dict.fromkeys((32, 64, 96))
    for _ in range(3):
        for px in sizes:
            sizes[px] = denoise(model, texts, population, 4, [3, 2, 1, 0], height=px, width=px)
    for px, got in sizes.items():
        plain = denoise(model, texts, population, 4, [3, 2, 1, 0], height=px, width=px, graphs="never")
        assert torch.equal(got, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_cross_attention_is_one_launch(dtype):
    seen = []

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x, weight = torch.randn(2, 5, 64, device="cuda", dtype=dtype), torch.ones(64, device="cuda", dtype=dtype)
    with torch.no_grad(), Noted():
        torch.nn.functional.rms_norm(x, [64], weight, 1e-5)
    assert seen == ["aten._fused_rms_norm.default"]


def test_all_shapes_are_captured_on_one_stream(model, texts, population, monkeypatch):
    made, own = [], graphs.side_stream
    monkeypatch.setattr(graphs, "side_stream", lambda device: made.append(own(device)) or made[-1])
    model.release_graphs()
    for px in (32, 32, 64, 64):
        denoise(model, texts, population, 4, [3, 2, 1, 0], height=px, width=px)
    assert model._captured[1].captured == 2
    assert len(made) == 1


def test_decoders_agree(model, texts, population):
    x0_bchw = denoise(model, texts, population, 1, [0, 1, 2, 3])
    plain, good = model.decoder(x0_bchw, chunk=3)
    assert model.decoder.channels_last
    assert good.all()
    for _ in range(3):
        graphed, _ = model.decoder(x0_bchw, chunk=3, mode="graphed")
        assert torch.equal(graphed, plain)
    other = x0_bchw.flip(0)
    assert torch.equal(model.decoder(other, chunk=3, mode="graphed")[0], model.decoder(other, chunk=3)[0])


def test_overlapped_chunks_are_the_same_images(model, texts, population):
    members = torch.arange(12)
    chunks = [Rows(part, ROWS["prompts"], ROWS["repeats"]) for part in members.split(4)] * 2
    keys = dict(seed=3, step=5, population=population, text_length=48)
    plain = list(model.render_chunks(texts, chunks, **keys, settings=RenderSettings(graphs="never")))
    for decode in ("eager", "graphed"):
        settings = RenderSettings(overlap=True, decode=decode)
        for got, expected in zip(model.render_chunks(texts, chunks, **keys, settings=settings), plain, strict=True):
            assert torch.equal(got, expected)


def test_a_step_waits_for_the_device_once(model, texts, population):
    """Each wait inside is an error; the images are still on the device when it ends."""
    settings = RenderSettings(num_steps=2, decode="graphed")
    keys = dict(population=population, settings=settings, text_length=48)

    def step(number):
        drawn = [model.render(texts, **ROWS, step=number, members=m, **keys) for m in torch.arange(8).split(4)]
        return torch.cat(drawn)

    for number in range(2):
        step(number)
    with model.deferred_checks():
        torch.cuda.set_sync_debug_mode("error")
        try:
            images = step(2)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert images.is_cuda
    plain = [
        model.render(texts, **ROWS, step=2, members=m, **{**keys, "settings": RenderSettings(num_steps=2)})
        for m in torch.arange(8).split(4)
    ]
    assert torch.equal(images, torch.cat(plain))
