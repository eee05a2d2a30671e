"""Latents to bytes: by every mode the same images, another VAE of the same latents, and no wait for the device."""

import json
from contextlib import contextmanager

import pytest
import torch
from diffusers import AutoencoderDC

from esengine.base.errors import ConfigError, RenderError
from esengine.models import RenderSettings, Rows, SanaSprint, latents
from esengine.models.decoder import Decoder
from esengine.models.loading import load_vae
from esengine.models.sana.checks import FiniteChecks


@pytest.fixture
def x0():
    """float32 [5, 8, 8, 8]."""
    rows = torch.arange(5)
    return latents(seed=0, step=0, prompts=rows, repeats=rows, shape=(8, 8, 8))


@pytest.fixture
def vae(tiny_folder):
    """One that the test may change."""
    return AutoencoderDC.from_pretrained(tiny_folder / "vae").eval().requires_grad_(False)


def changed(folder, path, **settings):
    """Another VAE of the pipeline's size, with other settings and weights, saved to `path`."""
    config = json.loads((folder / "vae" / "config.json").read_text())
    torch.manual_seed(1)
    AutoencoderDC.from_config(config | settings).save_pretrained(path)
    return path


@pytest.mark.parametrize("chunk", [1, 2, 5, 8])
def test_chunks_decode_as_the_whole(vae, x0, chunk):
    whole, good = Decoder(vae)(x0, chunk=5)
    images, each = Decoder(vae)(x0, chunk=chunk)
    assert images.dtype == torch.uint8
    assert images.shape == (5, 3, 64, 64)
    assert images.is_contiguous()
    assert (images.int() - whole.int()).abs().max() <= 1
    assert good.tolist() == each.tolist() == [True] * 5


def test_channels_last_is_the_same_image(vae, x0):
    plain, _ = Decoder(vae)(x0, chunk=2)
    plain = plain.clone()
    seen = []
    decoder = Decoder(vae, channels_last=True)
    vae.decoder.conv_out.register_forward_hook(
        lambda module, args, y: seen.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    images, _ = decoder(x0, chunk=2)
    assert vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert seen == [True] * 3
    assert images.is_contiguous()
    assert (images.int() - plain.int()).abs().max() <= 1


def test_compiled_is_the_same_image_and_is_kept(vae, x0):
    decoder = Decoder(vae, compile_backend="eager")
    plain, _ = decoder(x0, chunk=2)
    first = decoder(x0, chunk=2, mode="compiled")[0]
    assert torch.equal(first, plain)
    assert decoder._compiled is decoder._compiled


def test_graphed_replays_other_latents(vae, x0, recorded):
    decoder = Decoder(vae)
    for latent in (x0, x0.flip(0), -x0):
        images, good = decoder(latent, chunk=2, mode="graphed")
        plain, _ = decoder(latent, chunk=2)
        assert torch.equal(images, plain)
        assert good.all()
    assert len(recorded) == 2  # two images, and the one left over
    vae.decoder.conv_in.weight.data = vae.decoder.conv_in.weight.data * 1.5
    for _ in range(2):
        assert torch.equal(decoder(x0, chunk=2, mode="graphed")[0], decoder(x0, chunk=2)[0])
    assert len(recorded) == 4


def test_graphed_needs_a_gpu(vae, x0):
    with pytest.raises(ConfigError, match="decode: graphed needs a CUDA device, the model is on cpu"):
        Decoder(vae)(x0, chunk=2, mode="graphed")


def test_images_that_are_not_finite_are_known_by_row(vae, x0):
    x0[3] = float("nan")
    _, good = Decoder(vae)(x0, chunk=2)
    assert good.tolist() == [True, True, True, False, True]


@pytest.fixture
def broken(fresh_model, texts):
    """A model whose images of member 5 are not finite."""
    own = fresh_model.denoise

    def denoise(*args, members, **kwargs):
        x0_bchw = own(*args, **kwargs)
        x0_bchw[members == 5] = float("inf")
        return x0_bchw

    fresh_model.denoise = denoise
    rows = dict(seed=0, step=7, prompts=torch.tensor([0, 1]), repeats=torch.tensor([0, 0]))
    return lambda members: fresh_model.render(texts, **rows, members=torch.tensor(members)), fresh_model


def test_an_error_names_step_member_and_prompt(broken, texts):
    render, _ = broken
    with pytest.raises(RenderError) as error:
        render([4, 5])
    assert str(error.value).startswith(f"step 7, member 5, prompt {texts.prompts[1]!r}: the image is not finite")


def test_deferred_checks_name_the_same_image_at_the_end(broken, texts):
    render, model = broken
    drawn = []

    def step():
        with model.deferred_checks():
            drawn.extend(render(members) for members in ([4, 6], [8, 9], [5, 7], [5, 5]))

    with pytest.raises(RenderError, match="step 7, member 5, prompt") as error:
        step()
    assert len(drawn) == 4
    assert repr(texts.prompts[0]) in str(error.value)
    with pytest.raises(RenderError):  # at once again
        render([5, 5])
    with model.deferred_checks():
        render([1, 2])


def test_deferred_checks_hide_no_other_error(broken):
    render, model = broken

    def step():
        with model.deferred_checks():
            render([5, 5])
            raise KeyError("reward")

    with pytest.raises(KeyError):
        step()
    with pytest.raises(RuntimeError, match="do not nest"), model.deferred_checks(), model.deferred_checks():
        pass
    with model.deferred_checks():
        pass


def test_checks_count_rows_over_chunks():
    checks = FiniteChecks()
    good = torch.ones(3, dtype=torch.bool)
    bad = torch.tensor([True, True, False])

    def step():
        with checks.deferred():
            for flags, name in ((good, "first"), (bad, "second"), (~good, "third")):
                checks(flags, f"{name} row {{}}".format)

    with pytest.raises(RenderError, match="second row 2: the image"):
        step()


def test_nothing_in_render_reads_from_the_device(tiny_folder, texts, rows):
    """A tensor on `meta` has no values: whatever asked for one would fail here, as it would wait on a GPU."""
    model = SanaSprint.from_pretrained(tiny_folder)
    for part in (model.transformer, model.vae):
        part.to("meta")
    settings = RenderSettings(num_steps=2, decode_chunk=2)
    keys = dict(seed=0, step=0, prompts=rows[0], repeats=rows[1], settings=settings)
    drawn = []

    def step():
        with model.deferred_checks():
            drawn.append(model.render(texts, **keys))
            drawn.extend(model.render_chunks(texts, [Rows(None, *rows)], seed=0, step=0, settings=settings))

    with pytest.raises(NotImplementedError, match="meta"):  # the one look at the end
        step()
    assert [(images.device.type, images.dtype, images.shape) for images in drawn] == [
        ("meta", torch.uint8, (5, 3, 64, 64))
    ] * 2


def test_chunks_render_as_one_by_one(model, texts, rows):
    prompts, repeats = rows
    keys = dict(seed=0, step=3, settings=RenderSettings(overlap=True), text_length=texts.trimmed_length(prompts))
    chunks = Rows(None, prompts, repeats).split(2)
    images = list(model.render_chunks(texts, chunks, **keys))
    for got, (_, words, draws) in zip(images, chunks, strict=True):
        assert torch.equal(got, model.render(texts, prompts=words, repeats=draws, **keys))
    assert list(model.render_chunks(texts, [], **keys)) == []


def test_overlapped_chunks_wait_for_what_they_need(fresh_model, texts, rows, monkeypatch):
    """The order in which work is handed to two streams; what a stream is handed runs in that order."""
    model, log, current = fresh_model, [], []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            log.append(f"{self.name} waits for {other.name}")

        def wait_event(self, event):
            log.append(f"{self.name} waits for {event}")

        def record_event(self):
            return f"decode {sum(entry.startswith('side: decode') for entry in log)}"

    main, side, made_streams = Stream("main"), Stream("side"), []

    @contextmanager
    def stream(which):
        current.append(which.name)
        yield
        current.pop()

    current.append("main")
    monkeypatch.setattr("esengine.models.graphs.supported", lambda device: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made_streams.append(device) or side)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, to: log.append(f"{self.dtype} kept for {to.name}"))
    denoise, decoder = model.denoise, model.decoder
    monkeypatch.setattr(model, "denoise", lambda *a, **k: log.append(f"{current[-1]}: denoise") or denoise(*a, **k))
    monkeypatch.setattr(model, "decoder", lambda *a, **k: log.append(f"{current[-1]}: decode") or decoder(*a, **k))
    prompts, repeats = rows
    keys = dict(seed=0, step=3, text_length=texts.trimmed_length(prompts))
    chunks = [Rows(None, prompts[i : i + 2], repeats[i : i + 2]) for i in (0, 2)]
    images, overlapped = [], dict(keys, settings=RenderSettings(overlap=True))
    for each in model.render_chunks(texts, chunks, **overlapped):
        log.append("score")
        images.append(each)
    made = ["main: denoise", "side waits for main", "side: decode", "torch.float32 kept for side"]
    taken = ["torch.uint8 kept for main", "torch.bool kept for main", "score"]
    end = "main waits for side"
    assert log == made * 2 + ["main waits for decode 1", *taken, "main waits for decode 2", *taken, end]
    log.clear()
    drawn = model.render_chunks(texts, chunks, **overlapped)
    next(drawn)
    drawn.close()  # as a reward that raises does: what is drawn next waits for the decode that is left
    assert log == made * 2 + ["main waits for decode 1", *taken[:2], end]
    assert made_streams == [model.device]  # one for good
    for got, (_, words, draws) in zip(images, chunks, strict=True):
        assert torch.equal(got, model.render(texts, prompts=words, repeats=draws, **keys))


def test_another_decoder_of_the_same_latents(tiny_folder, tmp_path, texts, rows):
    """As DC-AE-Lite: only residual blocks, no block at full size."""
    blocks = ("ResBlock",) * 4
    lite = changed(
        tiny_folder,
        tmp_path / "lite",
        decoder_block_types=blocks,
        decoder_layers_per_block=(0, 1, 1, 1),
        upsample_block_type="pixel_shuffle",
        decoder_conv_act_fn="silu",
    )
    own = SanaSprint.from_pretrained(tiny_folder)
    model = SanaSprint.from_pretrained(tiny_folder, vae=lite)
    keys = dict(seed=0, step=0, prompts=rows[0], repeats=rows[1])
    x0_bchw = model.denoise(texts, **keys, settings=RenderSettings())
    assert torch.equal(x0_bchw, own.denoise(texts, **keys, settings=RenderSettings()))
    images = model.render(texts, **keys)
    assert images.shape == (5, 3, 64, 64)
    assert not torch.equal(images, own.render(texts, **keys))
    assert torch.equal(images, Decoder(AutoencoderDC.from_pretrained(lite), channels_last=True)(x0_bchw, chunk=8)[0])
    assert not any(parameter.requires_grad for parameter in model.vae.parameters())
    assert SanaSprint.from_pretrained(tiny_folder, vae=lite, dtype=torch.bfloat16).vae.dtype == torch.bfloat16


def test_the_decoder_is_part_of_the_identity(tiny_folder, tmp_path):
    lite = changed(tiny_folder, tmp_path / "lite")
    own = SanaSprint.from_pretrained(tiny_folder).identity()
    named = SanaSprint.from_pretrained(tiny_folder, vae=lite).identity()
    assert named.startswith(f"{own} vae sha256:")
    weights = next(lite.glob("*.safetensors"))
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert SanaSprint.from_pretrained(tiny_folder, vae=lite).identity() != named


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"latent_channels": 4}, "expected latent channels 8, as the model's own, got 4"),
        ({"scaling_factor": 1.0}, r"expected scaling factor 0\.5, as the model's own, got 1\.0"),
    ],
)
def test_other_latents_are_refused(tiny_folder, tmp_path, settings, message):
    other = changed(tiny_folder, tmp_path / "other", **settings)
    with pytest.raises(ConfigError, match=message):
        SanaSprint.from_pretrained(tiny_folder, vae=other)


def test_another_compression_is_refused(tiny_folder, tmp_path):
    config = json.loads((tiny_folder / "vae" / "config.json").read_text())
    for name, value in config.items():
        if isinstance(value, list) and len(value) == 4:
            config[name] = value[:3]
    AutoencoderDC.from_config(config).save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match="expected compression 8, as the model's own, got 4"):
        load_vae(str(tmp_path / "other"), tiny_folder, torch.float32, True)


def test_what_is_no_decoder_is_refused(tiny_folder, tmp_path):
    with pytest.raises(ConfigError, match="none is neither a folder nor a hub id"):
        SanaSprint.from_pretrained(tiny_folder, vae=tmp_path / "none")
    with pytest.raises(ConfigError, match="vae: nobody/nothing@main is not a folder, and no hub model"):
        SanaSprint.from_pretrained(tiny_folder, vae="nobody/nothing@main", local_files_only=True)
    with pytest.raises(ConfigError, match=r"vae: cannot use .*config\.json"):
        SanaSprint.from_pretrained(tiny_folder, vae=tmp_path)
    with pytest.raises(ConfigError, match="expected an AutoencoderDC, got SanaTransformer2DModel"):
        SanaSprint.from_pretrained(tiny_folder, vae=tiny_folder / "transformer")
    lite = changed(tiny_folder, tmp_path / "lite")
    weights = next(lite.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="vae: cannot use"):
        SanaSprint.from_pretrained(tiny_folder, vae=lite)


def test_a_hub_decoder_is_named_by_its_commit(tiny_folder, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--nobody--lite"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    changed(tiny_folder, cached / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    for name in ("nobody/lite", "nobody/lite@main", f"nobody/lite@{commit}"):
        model = SanaSprint.from_pretrained(tiny_folder, vae=name, local_files_only=True)
        assert model.identity().endswith(f" vae nobody/lite@{commit}")
