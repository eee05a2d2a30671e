"""Base against adapter: the numbers by hand, `esengine eval` after `esengine train`, and `esengine render`."""

import dataclasses
import json
import math

import pytest
import torch
from PIL import Image

from esengine.config import ESSettings, EvalConfig, ImageSettings, RenderConfig
from esengine.errors import ConfigError, RewardError
from esengine.evaluate import EVAL_STEP, compare
from esengine.inspect_run import evaluate, render
from esengine.models import RenderSettings, TextEmbeddings
from esengine.rewards import Weighted
from esengine.train import Progress, train

# ---- the numbers, with a model that draws numbers


class Stub:
    """Draws one pixel: 10 * prompt + repeat, and `lift[prompt]` more with the adapter."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, lift):
        self.lift, self.enabled, self.calls = torch.tensor(lift), None, []

    def adapter_enabled(self, enabled):
        self.enabled = enabled

    def render(self, texts, *, seed, step, prompts, repeats, settings, text_length):
        self.calls.append((self.enabled, seed, step, prompts.tolist(), repeats.tolist(), text_length))
        value = 10 * prompts + repeats + (self.lift[prompts] if self.enabled else 0)
        return value.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)


def pixel(images, prompts):
    return images[:, 0, 0, 0].float()


def halved(images, prompts):
    return images[:, 0, 0, 0].float() / 2


def stub_comparison(lift, repeats=2, chunk=3, terms=(("pixel", pixel, 1.0),)):
    texts = TextEmbeddings([f"prompt {i}" for i in range(len(lift))], [torch.zeros(2 + i, 4) for i in range(len(lift))])
    model = Stub(lift)
    done = []
    result = compare(
        model,
        texts,
        Weighted(terms),
        seed=5,
        repeats=repeats,
        settings=RenderSettings(),
        chunk=chunk,
        progress=lambda *at: done.append(at),
    )
    return result, model, done


def test_paired_numbers_by_hand():
    # base, averaged over repeats 0, 1: 0.5, 10.5, 20.5, 30.5; differences 4, 0, -1, 7
    result, _, _ = stub_comparison([4, 0, -1, 7])
    score = result.scores["pixel"]
    assert (result.prompts, result.repeats, list(result.scores)) == (4, 2, ["pixel"])
    assert (score.base, score.adapter, score.difference) == (15.5, 18.0, 2.5)
    deviation = math.sqrt(((4 - 2.5) ** 2 + 2.5**2 + 3.5**2 + 4.5**2) / 3)
    assert score.standard_error == pytest.approx(deviation / 2)
    assert score.won == (1 + 0.5 + 0 + 1) / 4


def test_both_sides_render_the_same_rows_at_the_step_no_run_reaches():
    result, model, done = stub_comparison([1, 2, 3], repeats=2, chunk=4)
    base, adapter = model.calls[:2], model.calls[2:]
    assert [call[0] for call in model.calls] == [False, False, True, True]
    assert [call[1:] for call in base] == [call[1:] for call in adapter]
    assert base[0][1:] == (5, EVAL_STEP, [0, 0, 1, 1], [0, 1, 0, 1], 4)
    assert base[1][1:] == (5, EVAL_STEP, [2, 2], [0, 1], 4)
    assert EVAL_STEP == 2**32 - 1
    assert done == [(4, 12), (6, 12), (10, 12), (12, 12)]
    assert result.settings["seed"] == 5


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_the_chunk_changes_no_number(chunk):
    assert stub_comparison([4, 0, 2, 7], chunk=chunk)[0].scores == stub_comparison([4, 0, 2, 7])[0].scores


def test_several_rewards_and_their_sum():
    terms = (("pixel", pixel, 1.0), ("halved", halved, -4.0))
    scores = stub_comparison([4, 0, 2, 7], terms=terms)[0].scores
    assert list(scores) == ["pixel", "halved", "combined"]
    assert scores["halved"].difference == scores["pixel"].difference / 2
    assert scores["combined"].difference == scores["pixel"].difference - 4 * scores["halved"].difference
    assert scores["combined"].won == 0.125


def test_one_prompt_has_no_standard_error():
    result, _, _ = stub_comparison([3], repeats=4)
    assert result.scores["pixel"].standard_error is None
    assert json.loads(result.to_json())["scores"]["pixel"]["standard_error"] is None
    assert result.table().splitlines()[1].split() == ["pixel", "1.5000", "4.5000", "+3.0000", "-", "100%"]


def test_the_table_is_aligned_and_the_json_complete():
    terms = (("pixel", pixel, 1.0), ("a_long_name:of.a.reward", halved, 1.0))
    result, _, _ = stub_comparison([4, 0, 2, 7], terms=terms)
    header, *rows = result.table().splitlines()
    assert len(rows) == 3
    assert {len(row) for row in rows} == {len(header)}
    data = json.loads(result.to_json())
    assert data["scores"] == {name: dataclasses.asdict(score) for name, score in result.scores.items()}
    assert (data["prompts"], data["repeats"]) == (4, 2)


def test_a_reward_that_fails_here_names_the_images():
    def broken(images, prompts):
        return images[:, 0, 0, 0].float() / 0 * 0

    with pytest.raises(RewardError, match=r"reward broken, images 0, 1, 2 \(prompt 'prompt 0'"):
        stub_comparison([1, 2], terms=(("broken", broken, 1.0),))


# ---- after a run


def test_eval_reproduces_the_table_of_train(trained, esengine, workspace):
    config, result = trained
    code, out, _ = esengine("eval", "--run-dir", config.run_dir, "--json", "deep/er/e.json")
    assert code == 0
    assert (workspace / "deep/er/e.json").read_bytes() == (config.run_dir / "eval.json").read_bytes()
    assert result.comparison.table() in out
    assert "written to deep/er/e.json" in out


def test_eval_takes_flags_over_the_runs_settings(trained, esengine, workspace):
    config, _ = trained
    (workspace / "one.txt").write_text("a lamp\n")
    flags = ["--prompts", "one.txt", "--reward", "jpeg_incompressibility", "--repeats", "3", "--seed", "9"]
    code, out, _ = esengine("eval", "--run-dir", config.run_dir, "--json", "e.json", *flags)
    assert code == 0
    assert "on 1 prompts, 3 images each" in out
    data = json.loads((workspace / "e.json").read_text())
    assert (data["prompts"], data["repeats"], list(data["scores"])) == (1, 3, ["jpeg_incompressibility"])
    assert data["scores"]["jpeg_incompressibility"]["standard_error"] is None
    assert data["settings"]["seed"] == 9


def test_an_adapter_folder_is_enough(trained, prompt_files, cache):
    config, result = trained
    image = ImageSettings(chunk=3)
    found = evaluate(
        EvalConfig(adapter=config.run_dir / "adapter", prompts=prompt_files[1], repeats=1, image=image), Progress()
    )
    assert found.scores == result.comparison.scores


def test_eval_computes_in_the_dtype_of_the_run(small, tmp_path):
    result = train(small(tmp_path / "run", steps=1, dtype="bfloat16"))
    assert evaluate(EvalConfig(run_dir=tmp_path / "run"), Progress()).to_json() == result.comparison.to_json()


def test_eval_works_from_another_folder(small, tmp_path, prompt_files, monkeypatch):
    monkeypatch.chdir(prompt_files[0].parent)
    relative = {"prompts": prompt_files[0], "eval_prompts": prompt_files[1]}
    train(small(tmp_path / "run", steps=1, **{name: type(path)(path.name) for name, path in relative.items()}))
    monkeypatch.chdir(tmp_path)
    try:
        evaluate(EvalConfig(run_dir=tmp_path / "run"), Progress())
    except ConfigError as error:
        raise AssertionError(str(error)) from error


def test_an_adapter_of_nothing_changes_nothing(small, tmp_path):
    """Fitness of a reward that cannot tell members apart is 0, so B stays 0: base and adapter tie on every prompt."""
    import sys
    import types

    module = types.ModuleType("flat")
    module.score = lambda images, prompts: torch.full((len(images),), 3.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "flat", module)
        result = train(small(tmp_path / "run", steps=1, reward="flat:score"))
        found = evaluate(EvalConfig(run_dir=tmp_path / "run", reward="jpeg_compressibility"), Progress())
    assert result.comparison.scores["flat:score"].difference == 0
    score = found.scores["jpeg_compressibility"]
    assert (score.difference, score.standard_error, score.won) == (0.0, 0.0, 0.5)


# ---- render


def test_render_draws_base_beside_adapter(trained, esengine, workspace):
    config, _ = trained
    code, out, _ = esengine("render", "a red fox", "an owl", "--run-dir", config.run_dir, "--out", "o/p", "--seed", "3")
    assert code == 0
    assert "4 images and base_and_adapter.png in o/p" in out
    names = {path.name for path in (workspace / "o/p").iterdir()}
    stems = ["0000_a-red-fox", "0001_an-owl"]
    assert names == {"base_and_adapter.png", *(f"{s}_{label}.png" for s in stems for label in ("base", "adapter"))}
    for stem in stems:
        base, adapter = (Image.open(workspace / "o/p" / f"{stem}_{label}.png") for label in ("base", "adapter"))
        assert base.size == adapter.size == (64, 64)
        assert base.tobytes() != adapter.tobytes()
    again = esengine("render", "a red fox", "an owl", "--run-dir", config.run_dir, "--out", "q", "--seed", "3")
    assert again[0] == 0
    assert all((workspace / "q" / name).read_bytes() == (workspace / "o/p" / name).read_bytes() for name in names)


HOSTILE = ("../../x", "/etc/passwd", "\U0001f600", "z" * 5000, "a/b\nc\\d: *?", ".", "CON", "")


def test_hostile_prompts_stay_in_the_folder(trained, tmp_path):
    config, _ = trained
    out = tmp_path / "deep" / "out"
    drawn = render(RenderConfig(prompts=HOSTILE, run_dir=config.run_dir, out=out), Progress())
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert {path.parent for path in files} == {out}
    assert drawn.images == len(files) - 1 == 2 * len(HOSTILE)
    assert drawn.sheet in files
    for path in files:
        assert path.name.isascii()
        assert len(path.name) < 64
        assert set(path.stem) <= set("abcdefghijklmnopqrstuvwxyz0123456789-_")


def test_render_takes_the_first_of_a_file(trained, tmp_path, prompt_files):
    config, _ = trained
    base = RenderConfig(run_dir=config.run_dir, prompts_file=prompt_files[0], limit=2, out=tmp_path)
    assert render(base, Progress()).images == 4
    assert (tmp_path / "0001_two-green-apples_base.png").is_file()


@pytest.mark.parametrize("call", [evaluate, render])
def test_a_run_whose_adapter_is_gone(call, small, trained, tmp_path):
    config, _ = trained
    (tmp_path / "config.yaml").write_bytes((config.run_dir / "config.yaml").read_bytes())
    kind = EvalConfig if call is evaluate else RenderConfig
    with pytest.raises(ConfigError, match=r"pytorch_lora_weights.safetensors does not exist"):
        call(kind(run_dir=tmp_path), Progress())


@pytest.mark.parametrize("call", [evaluate, render])
def test_settings_of_the_run_are_the_defaults(call, small, tmp_path, monkeypatch):
    """Seed, image settings and repeats come from the folder."""
    image = ImageSettings(num_steps=2, height=32, width=96, chunk=2)
    config = small(tmp_path / "run", steps=1, seed=7, image=image, es=ESSettings(prompts_per_step=2, repeats=2))
    result = train(config)
    if call is evaluate:
        assert evaluate(EvalConfig(run_dir=config.run_dir), Progress()) == result.comparison
        assert result.comparison.repeats == 2
        return
    render(RenderConfig(prompts=("an owl",), run_dir=config.run_dir, out=tmp_path / "o"), Progress())
    assert Image.open(tmp_path / "o" / "0000_an-owl_base.png").size == (96, 32)
