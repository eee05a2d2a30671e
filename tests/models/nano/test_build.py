import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from diffusers import SanaSprintPipeline
from safetensors import safe_open

from esengine.models import RenderSettings, SanaSprint, latents
from esengine.models.nano import autoencoder, build, clip, dataset, distill, loop, muon, teacher, train, world
from esengine.models.nano.text import Captions
from esengine.rewards import load

PACKAGED = Path(build.__file__).parent / "sana-sprint-nano"
BENCH = Path(__file__).parents[3] / "bench" / "results"
ONE_STEP = 0.75
"""Less than the packaged model's score."""

CAPTIONS = [
    "a red circle",
    "a small red circle left of a large blue square on a yellow background",
    "a large orange cross on the left on an orange background",
    "",
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_transformer(seed):
    """One whose every branch has a say, the guidance embedding too."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build.transformer()
        torch.nn.init.normal_(model.proj_out.weight, std=0.05)
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline folder with random weights."""
    path = tmp_path_factory.mktemp("nano") / "pipeline"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae, text = build.autoencoder(), build.text_encoder(len(build.save_tokenizer(path.parent / "tokenizer")))
    build.save_pipeline(path, vae=vae, text_encoder=text, transformer=random_transformer(0))
    return path


@pytest.fixture(scope="module")
def plain(folder):
    pipeline = SanaSprintPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def model(folder):
    return SanaSprint.from_pretrained(folder)


@pytest.fixture
def small(monkeypatch):
    for module in (autoencoder, teacher, distill):
        monkeypatch.setattr(module, "BATCH", 4)


def trained(work, tokenizer, *, teacher_steps=3, student_steps=3):
    """All stages for a few steps of four images each."""
    work.mkdir(exist_ok=True)
    vae = autoencoder.train_autoencoder(work, steps=2, seed=1)
    data = dataset.latent_dataset(work, vae, count=16, seed=1)
    teaches = teacher.train_teacher(work, tokenizer, *data, steps=teacher_steps, seed=1)
    return vae, teaches, distill.distill(work, teaches, tokenizer, *data, steps=student_steps, seed=1)


def test_each_word_of_the_world_is_one_token(plain):
    for word in world.WORDS:
        assert len(plain.tokenizer(f" {word}", add_special_tokens=False).input_ids) == 1, word


def test_states_are_those_of_the_pipeline_with_its_instruction(plain):
    captions = Captions(plain.tokenizer, CAPTIONS)
    with torch.no_grad():
        states, mask = captions.encode(plain.text_encoder, torch.tensor([3, 1, 0, 2]))
        embeds, full = plain.encode_prompt(
            [CAPTIONS[i] for i in (3, 1, 0, 2)],
            complex_human_instruction=build.instruction().split("\n"),
        )
    assert mask.sum(1).tolist() == full.sum(1).tolist() == [2, 15, 4, 12]
    for own, own_mask, theirs, their_mask in zip(states, mask, embeds, full, strict=True):
        torch.testing.assert_close(own[own_mask], theirs[their_mask.bool()], atol=2e-5, rtol=0)
    assert (states[2, 1] - states[0, 1]).abs().max() > 0.1


def test_velocity_is_what_the_sampler_computes(model):
    torch.manual_seed(3)
    x, embeds = torch.randn(3, *build.LATENT), torch.randn(3, 6, build.TEXT_WIDTH)
    mask = torch.arange(6) < torch.tensor([[2], [6], [4]])
    for angle in (1.5708, 1.3, 0.4):
        guidance = torch.full([3], 0.45)
        ours = teacher.velocity(model.transformer, x, torch.full([3], angle), embeds, mask, guidance)
        theirs = model._velocity(x * build.SIGMA_DATA, torch.tensor(angle), embeds, mask, guidance)
        torch.testing.assert_close(ours * build.SIGMA_DATA, theirs, atol=1e-5, rtol=1e-5)
        assert ours.std() > 0.1


def test_plain_diffusers_draws_the_same_image(model, plain):
    texts = model.encode(CAPTIONS[:2])
    rows = torch.tensor([0, 1])
    image = model.render(texts, seed=5, step=0, prompts=rows, repeats=rows)
    noise = latents(seed=5, step=0, prompts=rows, repeats=rows, shape=build.LATENT, draw=0)
    theirs = plain(
        CAPTIONS[:2],
        latents=noise,
        num_inference_steps=1,
        intermediate_timesteps=None,
        height=64,
        width=64,
        use_resolution_binning=False,
        output_type="np",
    ).images
    difference = np.abs(image.permute(0, 2, 3, 1).numpy() - theirs * 255)
    assert difference.max() < 1.01
    assert difference.mean() < 0.3


def test_the_folder_is_safetensors_and_small(folder):
    weights = [file for file in folder.rglob("*") if file.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    assert not weights
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 12e6
    assert json.loads((folder / "model_index.json").read_text())["tokenizer"][1] == "GemmaTokenizerFast"
    for part, dtype in (("transformer", "F16"), ("vae", "F16")):
        with safe_open(folder / part / "diffusion_pytorch_model.safetensors", "pt") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} == {dtype}  # noqa: SIM118


def test_the_packaged_folder_is_whole_and_its_scores_are_its_own():
    files = [file for file in PACKAGED.rglob("*") if file.is_file()]
    assert not [file for file in files if file.suffix not in (".json", ".md", ".safetensors")]
    assert sum(file.stat().st_size for file in files) <= 12e6
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in files)
    stored = json.loads((BENCH / "nano_base.json").read_text())
    assert SanaSprint.from_pretrained(PACKAGED).identity().startswith(stored["model"])
    card = (PACKAGED / "README.md").read_text()
    for name, found in stored["scores"]["checker"].items():
        both = found, stored["scores"]["pickscore"][name]
        cells = [f"{each['mean']:.4f} ± {each['standard_error']:.4f}" for each in both]
        assert f"| {name} | {' | '.join(cells)} |" in card


@pytest.mark.parametrize(
    ("name", "config", "stages"),
    [
        ("sana-sprint-nano", train.TrainConfig, ("autoencoder", "teacher", "student")),
        ("clip-nano", clip.ClipTrainConfig, ("clip",)),
    ],
)
def test_the_command_of_a_card_is_the_training_that_was(name, config, stages):
    folder = PACKAGED.parent / name
    (line,) = (line for line in (folder / "README.md").read_text().splitlines() if line.startswith("    python -m "))
    _, _, module, *args = line.split()
    assert module == config.__module__
    asked, was = tyro.cli(config, args=args), json.loads((folder / "training.json").read_text())
    assert asked == config(out=Path(name))
    assert (asked.seed, getattr(asked, "images", None)) == (was["seed"], was.get("images"))
    for stage in stages:
        steps = asked.steps if stage == "clip" else getattr(asked, f"{stage}_steps")
        assert steps == was[stage]["steps"]


ALONE = """
import sys
import diffusers.schedulers.scheduling_scm as scm
import numpy as np
import torch
from diffusers import SanaSprintPipeline

folder, captions, given, out = sys.argv[1], sys.argv[2].split("|"), np.load(sys.argv[3]), sys.argv[4]
assert not [name for name in sys.modules if name.startswith("esengine")]
pipeline = SanaSprintPipeline.from_pretrained(folder)
scm.randn_tensor = lambda *_, **__: torch.from_numpy(given["between"])
found = {}
for steps in (1, 2):
    found[str(steps)] = pipeline(
        captions, latents=torch.from_numpy(given["first"]), num_inference_steps=steps, height=64, width=64,
        intermediate_timesteps=1.3 if steps == 2 else None, use_resolution_binning=False, output_type="np",
    ).images
np.savez(out, **found)
"""


def test_the_packaged_folder_draws_the_same_without_esengine(tmp_path):
    model, rows = SanaSprint.from_pretrained(PACKAGED), torch.arange(3)
    texts = model.encode(CAPTIONS[:3])
    key = dict(seed=7, step=2, prompts=rows, repeats=rows)
    first, between = (latents(**key, shape=build.LATENT, draw=draw).numpy() for draw in (0, 1))
    np.savez(tmp_path / "noise.npz", first=first, between=between)
    command = [
        sys.executable,
        "-c",
        ALONE,
        PACKAGED,
        "|".join(CAPTIONS[:3]),
        tmp_path / "noise.npz",
        tmp_path / "drawn",
    ]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    theirs = np.load(tmp_path / "drawn.npz")
    for steps in (1, 2):
        images = model.render(texts, **key, settings=RenderSettings(num_steps=steps))
        difference = np.abs(images.permute(0, 2, 3, 1).numpy() - theirs[str(steps)] * 255)
        assert difference.max() < 1.01
        assert difference.mean() < 0.3
    assert np.abs(theirs["1"] - theirs["2"]).max() > 0.1


def test_the_packaged_model_draws_better_in_two_steps_than_in_one():
    model, captions = SanaSprint.from_pretrained(PACKAGED), world.captions("test", 300, 1)
    texts, rows = model.encode(captions), torch.arange(len(captions))
    checker, scores = load("checker"), {}
    for steps in (1, 2):
        settings = RenderSettings(num_steps=steps, decode_chunk=100)
        images = model.render(texts, seed=1, step=0, prompts=rows, repeats=rows, settings=settings)
        scores[steps] = checker(images, captions)
    assert scores[1].mean() > ONE_STEP
    gain = scores[2] - scores[1]
    assert gain.mean() > 2 * gain.std() / len(gain) ** 0.5


def test_rotation_goes_along_the_exact_path():
    x0, n = torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2)
    t, s = torch.tensor([1.2, math.pi / 2]), torch.tensor([0.5, 0.0])
    at = lambda angle: torch.cos(angle).view(-1, 1, 1, 1) * x0 + torch.sin(angle).view(-1, 1, 1, 1) * n  # noqa: E731
    v = torch.cos(t).view(-1, 1, 1, 1) * n - torch.sin(t).view(-1, 1, 1, 1) * x0
    torch.testing.assert_close(teacher.rotate(at(t), v, t - s), at(s))


def test_guidance_without_a_caption_is_none_and_one_is_the_caption(plain):
    whole = teacher.Teacher(random_transformer(1), plain.text_encoder)
    guided, captions = teacher.Guided(whole, plain.tokenizer), Captions(plain.tokenizer, CAPTIONS)
    x, t, rows = torch.randn(2, *build.LATENT), torch.tensor([1.4, 0.7]), torch.tensor([1, 3])
    with torch.no_grad():
        text = captions.encode(plain.text_encoder, rows)
        plainly = teacher.velocity(whole.transformer, x, t, *text, torch.zeros(2))
    torch.testing.assert_close(guided(x, t, text, torch.ones(2)), plainly, atol=1e-5, rtol=1e-5)
    by_scale = [guided(x, t, text, torch.full([2], g)) for g in (0.0, 1.0, 2.0)]
    torch.testing.assert_close(by_scale[2] - by_scale[1], by_scale[1] - by_scale[0], atol=1e-5, rtol=1e-5)
    assert (by_scale[1] - by_scale[0])[0].abs().max() > 1e-3  # a caption
    torch.testing.assert_close(by_scale[1][1], by_scale[0][1], atol=1e-5, rtol=1e-5)  # none
    assert distill.guidance(torch.tensor(1.0)) == 1


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 8, 40), (2, 40, 8)])
def test_orthogonal_steps_have_singular_values_near_one(shape):
    torch.manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    u = left * torch.linspace(0.05, 1.0, left.shape[2]) @ right
    step = muon.orthogonal(u).float()
    assert step.shape == u.shape
    values = torch.linalg.svdvals(step)
    assert values.min() > 0.4
    assert values.max() < 1.4
    # the same singular vectors: what is left of the step in their basis is diagonal
    inner = left.mT @ step @ right.mT
    assert (inner - torch.diag_embed(inner.diagonal(dim1=1, dim2=2))).abs().max() < 0.1


def test_each_trained_weight_has_one_optimizer(plain):
    whole = teacher.build(len(plain.tokenizer), 0)
    models = whole.transformer, whole.text_encoder
    by_muon, by_adamw = ({id(p) for p in each.param_groups[0]["params"]} for each in muon.optimizers(*models))
    trained = {id(p): name for model in models for name, p in model.named_parameters() if p.requires_grad}
    assert by_muon | by_adamw == set(trained)
    assert not by_muon & by_adamw
    names = {trained[each] for each in by_muon}
    assert {"transformer_blocks.0.attn1.to_q.weight", "transformer_blocks.5.ff.conv_inverted.weight"} <= names
    assert not any("norm" in name or "embed" in name or "conv_depth" in name or "table" in name for name in names)


def test_a_run_that_was_stopped_gives_the_same_weights(tmp_path, plain, small, monkeypatch):
    whole = trained(tmp_path / "whole", plain.tokenizer)
    step, calls = loop.rate, []

    def stops(i, *args, **kwargs):
        calls.append(i)
        if len(calls) in (2, 4, 9):
            raise KeyboardInterrupt
        return step(i, *args, **kwargs)

    for module in (teacher, distill, autoencoder):
        monkeypatch.setattr(module, "rate", stops)
    monkeypatch.setattr(loop.train, "__kwdefaults__", {**loop.train.__kwdefaults__, "save_seconds": -1.0})
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "parts", plain.tokenizer)
    parts = trained(tmp_path / "parts", plain.tokenizer)
    assert calls == [0, 1, 1, 0, 0, 1, 2, 0, 1, 1, 2]
    for one, other in ((whole[0], parts[0]), (whole[1].transformer, parts[1].transformer), (whole[2], parts[2])):
        for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
            assert torch.equal(a, b), name


def test_the_student_learns_a_guidance_embedding_and_leaves_the_text_encoder(tmp_path, plain, small):
    _, teaches, student = trained(tmp_path / "run", plain.tokenizer, student_steps=4)
    assert not teaches.transformer.time_embed.guidance_embedder.linear_2.weight.any()
    assert student.time_embed.guidance_embedder.linear_2.weight.any()
    again = teacher.read_teacher(tmp_path / "run", plain.tokenizer)
    assert torch.equal(again.text_encoder.embed_tokens.weight, teaches.text_encoder.embed_tokens.weight)
    assert not teaches.text_encoder.training


def test_missing_checkpoints_are_named(tmp_path, plain):
    with pytest.raises(FileNotFoundError, match=r"autoencoder\.safetensors"):
        autoencoder.read_autoencoder(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"teacher\.safetensors"):
        teacher.read_teacher(tmp_path, plain.tokenizer)


def test_a_value_that_is_not_finite_stops_the_run_before_it_is_saved(tmp_path):
    layer = torch.nn.Linear(1, 1)
    steps = lambda i: {"loss": torch.tensor(1.0 if i < 2 else math.nan)}  # noqa: E731
    with pytest.raises(FloatingPointError, match="step 2"):
        loop.train("x", tmp_path, steps, steps=4, state={"layer": layer}, seed=0, save_seconds=-1.0)
    assert loop.load(tmp_path / "x.safetensors", {"layer": layer}) == 2
