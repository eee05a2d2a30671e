"""Both reference loops: the same scores for the same weights, and the update of the formula."""

import copy
import sys

import peer_ratio
import pytest
import torch
from peers import checkout, published, reference_loop
from peers.reference_loop import LR_SCALE, MAX_NORM, REPEATS, SIGMA, SharedLoop
from PIL import Image
from suite import standin

from esengine.es.fitness import shape
from esengine.models import RenderSettings, latents

PIXELS, LENGTH = 32, 12


@pytest.fixture(scope="module")
def scorers():
    """PickScore on a stand-in: ours in batches, and the published code's of one image."""
    from suite import pickscore

    texts, clip = standin.text_embeddings("tiny", tokens=8), standin.clip("tiny")
    ours = pickscore.Scorer(clip, texts.prompts)
    tokenize = lambda text: ours.encoder.tokenize(text if text in texts.prompts else texts.prompts[0])  # noqa: E731
    judge = published.made_up_judge(clip, tokenize)
    return texts, ours, published.Scorer(judge, judge)


def shared_loop(scorers, seed=0):
    texts, reward, _ = scorers
    settings = RenderSettings(height=PIXELS, width=PIXELS, x0_angle=reference_loop.X0_ANGLE)
    return SharedLoop(standin.sana_sprint("tiny"), texts, reward, settings=settings, seed=seed, text_length=LENGTH)


def published_loop(scorers, seed=0):
    texts, _, scorer = scorers
    model = standin.sana_sprint("tiny")
    options = dict(pixels=PIXELS, seed=seed, text_length=LENGTH)
    vae = copy.deepcopy(model.vae).to(memory_format=torch.contiguous_format)
    return published.PublishedLoop(model.transformer, vae, texts, scorer, **options)


@pytest.fixture(params=[shared_loop, published_loop], ids=["shared", "as published"])
def loop(request, scorers):
    return request.param(scorers)


def test_noise_is_low_rank_antithetic_and_of_the_step(loop):
    noise = loop.noise(1, 6)
    assert noise.shape == (6, len(loop.theta))
    assert torch.equal(noise[:3], -noise[3:])
    assert not torch.equal(noise, loop.noise(2, 6))
    assert torch.equal(noise, loop.noise(1, 6))
    first = next(iter(loop.parameters.values()))
    matrix = noise[0, : first.numel()].view_as(first)
    assert torch.linalg.matrix_rank(matrix) == 1
    assert noise.mean().abs() < 0.05
    assert noise.std() == pytest.approx(1, abs=0.1)
    with pytest.raises(ValueError, match="members: expected an even number of at least 2, got 3"):
        loop.noise(1, 3)


def test_a_member_is_theta_and_its_noise_in_pefts_modules(loop):
    noise = loop.noise(0, 2)[1]
    scores = loop.evaluate(0, noise, torch.tensor([0, 1]))
    assert scores.shape == (2, REPEATS)
    assert scores.isfinite().all()
    assert torch.allclose(loop.joined(loop.parameters), loop.theta + SIGMA * noise)
    assert {name.rpartition(".lora_")[2] for name in loop.parameters} == {"A.weight", "B.weight"}


def test_the_update_is_the_formula(loop):
    before, noise = loop.theta.clone(), loop.noise(0, 4)
    scores = torch.randn(4, 3, REPEATS, generator=torch.Generator().manual_seed(0))
    loop.update(noise, scores)
    f = reference_loop.fitness(scores)
    expected = before + LR_SCALE * SIGMA * sum(f[i] * noise[i] for i in range(4)) / 4
    assert torch.allclose(loop.theta, expected, atol=1e-7)
    loop.theta = torch.full_like(loop.theta, 10.0)
    loop.update(noise, scores)
    assert loop.theta.norm().item() == pytest.approx(MAX_NORM, rel=1e-5)


def test_fitness_is_ours_but_for_the_standard_deviation():
    scores = torch.randn(6, 3, 1, generator=torch.Generator().manual_seed(1))
    ours = shape(scores, "zscore")
    assert torch.allclose(reference_loop.fitness(scores), ours * (5 / 6) ** 0.5, atol=1e-5)  # unbiased there
    assert torch.equal(reference_loop.fitness(torch.ones(4, 2, 2)), torch.zeros(4))


def test_equal_weights_have_equal_images_and_scores(scorers):
    ours, theirs = shared_loop(scorers), published_loop(scorers)
    weights = ours.theta + 5 * SIGMA * ours.noise(0, 2)[0]
    for loop in (ours, theirs):
        loop.set_weights(weights)
    prompts = torch.tensor([0, 1])
    rows, repeats = prompts.repeat_interleave(REPEATS), torch.arange(REPEATS).repeat(2)
    noise = latents(seed=0, step=0, prompts=rows, repeats=repeats, shape=theirs.latent_shape)
    images = theirs.images(0, rows, noise)
    rendered = ours.model.render(
        ours.texts, seed=0, step=0, prompts=rows, repeats=repeats, settings=ours.settings, text_length=LENGTH
    )
    levels = torch.stack([peer_ratio.levels(image) for image in images])
    assert (levels.int() - rendered.int()).abs().max() <= 1
    words, scores = theirs.words(rows), ours.scores(0, prompts).flatten()
    same = [
        theirs.scorer(Image.fromarray(each.permute(1, 2, 0).numpy()), word)
        for each, word in zip(rendered, words, strict=True)
    ]
    assert torch.allclose(torch.stack([each.pickscore for each in same]), scores, rtol=1e-4)
    # they draw all prompts, then all again
    theirs.images = lambda step, rows: [images[row * REPEATS + i // 2] for i, row in enumerate(rows.tolist())]
    assert torch.allclose(theirs.scores(0, prompts).flatten(), scores, rtol=5e-3)  # a level here and there


def test_scores_of_one_image_are_the_four_of_the_published_run(scorers):
    texts, ours, scorer = scorers
    image = Image.effect_mandelbrot((PIXELS, PIXELS), (-2, -1, 1, 1), 50).convert("RGB")
    scores = scorer(image, texts.prompts[1])
    assert all(each.shape == () for each in scores)
    assert all(0 <= each <= 1 for each in scores[1:])
    assert scores.pickscore.item() == pytest.approx(
        ours(peer_ratio.levels(image)[None], [texts.prompts[1]]).item(), rel=1e-4
    )
    # a stand-in gives both fixed texts the same token ids
    assert scores.aesthetic.item() == pytest.approx(1 - scores.no_artifacts.item(), abs=1e-6)


def test_the_published_loop_is_in_float32(scorers):
    model = standin.sana_sprint("tiny", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="transformer: expected float32, got bfloat16"):
        published.PublishedLoop(model.transformer, model.vae, scorers[0], scorers[2], pixels=PIXELS)


def test_a_step_draws_scores_and_moves(loop):
    before = loop.theta.clone()
    scores = loop.step(0, torch.tensor([0, 1]), 4)
    assert scores.shape == (4, 2, REPEATS)
    assert not torch.equal(loop.theta, before)


@pytest.mark.parametrize(("ratio", "fits"), [(4.15, False), (4.17, True), (5.2, True), (6.23, True), (6.25, False)])
def test_a_fifth_of_the_published_ratio(ratio, fits):
    assert peer_ratio.matches(ratio) is fits
    assert peer_ratio.matches(ratio / 2, 2.6) is fits


def test_the_peer_is_measured_on_nano_after_its_check(monkeypatch):
    found = peer_ratio.measure(rounds=2, members=2)
    assert found["check"]["levels"] <= 1
    assert found["check"]["score_difference"] <= peer_ratio.SCORE_TOLERANCE
    assert set(found["seconds"]) == {"published", "ours"}
    assert found["matches"] is peer_ratio.matches(found["ratio"]["of_medians"])
    monkeypatch.setattr(peer_ratio, "X0_ANGLE", 1.2)
    with pytest.raises(RuntimeError, match=r"expected images within 1 level .* nothing was timed"):
        peer_ratio.measure(rounds=2, members=2)


MAIN = """
import wandb, lovely_tensors
lovely_tensors.monkey_patch()
flatten_params = lambda parameters: parameters[0]
EggRollNoiser = lambda shapes, **settings: (shapes, settings)
def es_step_unified(*, theta, backend, pop_size, epoch, **given):
    print("a line that goes nowhere")
    assert given["mix_weights"] == (0.0, 0.0, 0.0, 1.0)
    return theta + pop_size + 100 * epoch, {}, {}, None, []
"""
BACKENDS = """
import torch
from models.VAR import VARClassGenerator
SanaConfig = dict
class SanaBackend:
    def __init__(self, device, config):
        self.config = config
    def init_and_attach_lora(self):
        print("nor this")
        self.encoded = torch.load(self.config["encoded_prompt_path"])
        assert self.encoded["prompt_embeds"].shape[1] == 300
    def compile_if_requested(self):
        pass
    def collect_lora_params(self):
        return [torch.zeros(1)], [(1,)]
"""


def test_a_checkout_is_run_as_it_stands(tmp_path, scorers, capsys):
    (tmp_path / "unifed_es.py").write_text(MAIN)
    (tmp_path / "es_backend.py").write_text(BACKENDS)
    (tmp_path / "models").mkdir()
    step = checkout.step(tmp_path, scorers[0], 4)
    step()
    step()
    assert capsys.readouterr().out == ""
    assert "wandb" not in sys.modules
    assert str(tmp_path) not in sys.path
    for name in ("unifed_es", "es_backend", "models"):
        sys.modules.pop(name, None)


def test_what_is_no_checkout_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"--checkout: expected a folder with the published code's unifed_es.py"):
        checkout.step(tmp_path, None, 4)
