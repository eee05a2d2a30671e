"""A run from prompts to adapter on the tiny model, and what it leaves."""

import dataclasses
import json
from pathlib import Path

import journals
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from PIL import Image
from safetensors.torch import load_file

from esengine.base.errors import ConfigError, EsengineError
from esengine.base.progress import Progress
from esengine.es.rule import UpdateRule
from esengine.evaluation.draw import Batch
from esengine.evaluation.entries import Entry
from esengine.models import SanaSprint, tiny_model
from esengine.run.prepare import attach_population
from esengine.run.saving import save_adapter
from esengine.run.settings import ESSettings, LoraSettings, TrainConfig, load
from esengine.run.train import _draw_comparison, _keep_images, train
from esengine.sampling.settings import ImageSettings


def brightness(images, prompts):
    return images.float().mean(dim=(1, 2, 3)) / 255


def test_the_run_folder(trained):
    config, result = trained
    folder = result.folder
    assert folder == config.run_dir
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock", "adapter", "checkpoints", "comparison.png", "config.yaml", "eval.json", "heldout", "journal.jsonl",
        "strips", "tensorboard",
    ]  # fmt: skip
    assert sorted(path.name for path in (folder / "adapter").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors",
    ]  # fmt: skip
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step_00000002", "step_00000004"]
    assert next((folder / "tensorboard").iterdir()).name.startswith("events.out.tfevents")


def test_the_first_image_of_the_first_eight_prompts_is_kept_from_each_entry(tmp_path):
    rows = [(prompt, repeat) for prompt in range(10) for repeat in range(2)]
    kept = {}
    for entry, shade in ((Entry("base", 1), 0), (Entry("adapter", 1), 100)):
        for start in range(0, len(rows), 3):
            part = rows[start : start + 3]
            images = [torch.full((3, 512, 512), shade + 10 * prompt + repeat).byte() for prompt, repeat in part]
            _keep_images(kept, Batch(entry, part, torch.stack(images), {}))
    assert {label: [image.unique().tolist() for image in images] for label, images in kept.items()} == {
        "base@1": [[10 * prompt] for prompt in range(8)],
        "adapter@1": [[100 + 10 * prompt] for prompt in range(8)],
    }
    _draw_comparison(tmp_path / "comparison.png", kept, [f"prompt {i}" for i in range(10)])
    picture = np.asarray(Image.open(tmp_path / "comparison.png"))
    left, tall = picture.shape[1] - 4 * 260, picture.shape[0] // 2
    tops = [(strip + 1) * tall - rows * 260 for strip in (0, 1) for rows in (2, 1)]
    shown = [picture[top + 128, left + column * 260 + 128, 0] for top in tops for column in range(4)]
    assert shown == [0, 10, 20, 30, 100, 110, 120, 130, 40, 50, 60, 70, 140, 150, 160, 170]


def test_the_resolved_configuration_is_saved(trained):
    config, result = trained
    saved = load(result.folder / "config.yaml")
    image = dataclasses.replace(config.image, num_steps=1, guidance_scale=4.5)  # SANA-Sprint's
    chosen = dict(
        device="cpu", dtype="float32", heldout_reward="none", image=image
    )  # auto watches nothing beside a JPEG reward
    assert saved == dataclasses.replace(config, run_dir=None, **chosen)


def test_metrics_have_a_line_for_each_step(trained):
    config, result = trained
    lines = journals.steps(result.folder)
    assert [line["step"] for line in lines] == list(range(config.steps))
    for line in lines:
        assert line["reward_worst"] < line["reward"] < line["reward_best"]
        assert line["reward"] == line["reward/jpeg_compressibility"]
        assert line["step_norm"] > 0
        assert line["adapter_norm"] > 0
        assert line["images_per_second"] * line["seconds"] == pytest.approx(8)
        assert line["seconds_render"] + line["seconds_score"] + line["seconds_update"] <= line["seconds"]


def test_tensorboard_has_the_same_numbers(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, result = trained
    events = EventAccumulator(str(result.folder / "tensorboard"))
    events.Reload()
    lines = journals.steps(result.folder)
    assert [(e.step, e.value) for e in events.Scalars("reward")] == [
        (line["step"], pytest.approx(line["reward"], rel=1e-6)) for line in lines
    ]
    assert [e.step for e in events.Images("strips")] == [0, 3]
    assert [e.step for e in events.Images("heldout")] == [0, 2, 4]


def test_tensorboard_has_the_members_scores_and_the_settings(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config, result = trained
    events = EventAccumulator(str(result.folder / "tensorboard"), size_guidance={"histograms": 0})
    events.Reload()
    histograms = events.Histograms("members/jpeg_compressibility")
    assert [(e.step, e.histogram_value.num) for e in histograms] == [(0, config.population), (3, config.population)]
    (text,) = events.Tensors("settings/text_summary")
    words = text.tensor_proto.string_val[0].decode()
    for part in ("sigma: 0.01", "heldout_every: 2", "rewards:", "jpeg_compressibility:", "prompts_sha256:"):
        assert part in words


def test_strips_are_pictures_of_three_rows(trained):
    _, result = trained
    strips = sorted((result.folder / "strips").iterdir())
    assert [path.name for path in strips] == ["step_00000000.png", "step_00000003.png"]
    for path in strips:
        with Image.open(path) as picture:
            picture.load()
            assert picture.format == "PNG"
            assert picture.height > 3 * 128
            assert picture.width > 2 * 128
            assert len(picture.getcolors(1 << 24)) > 100


def test_both_loaders_apply_the_adapter_at_the_same_strength(trained):
    """PEFT on the bare transformer, diffusers' pipeline, and W + alpha / r B A set by hand: one forward."""
    config, result = trained
    draw = torch.Generator().manual_seed(0)
    inputs = dict(
        hidden_states=torch.randn(2, 8, 8, 8, generator=draw),
        encoder_hidden_states=torch.randn(2, 5, 64, generator=draw),
        timestep=torch.tensor([0.5, 0.9]),
        guidance=torch.tensor([0.4, 0.4]),
    )

    @torch.no_grad()
    def forward(transformer):
        return transformer(**inputs, return_dict=False)[0]

    plain, peft, diffusers, by_hand = (SanaSprint.from_pretrained(tiny_model()) for _ in range(4))
    wrapped = PeftModel.from_pretrained(peft.transformer, str(result.folder / "adapter"))
    loaded = wrapped.peft_config["default"]
    assert (loaded.r, loaded.lora_alpha) == (config.lora.rank, config.lora.alpha)
    diffusers.pipeline.load_lora_weights(str(result.folder / "adapter"), use_safetensors=True)
    state = load_file(result.folder / "adapter" / "adapter_model.safetensors")
    modules = {key.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for key in state}
    assert len(modules) == 4 * 6 + 3  # q, k, v of both attentions in 4 blocks, and linear_2 of three embedders
    for name in modules:
        a, b = (state[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        by_hand.transformer.get_submodule(name).weight += config.lora.alpha / config.lora.rank * b @ a
    base, expected = forward(plain.transformer), forward(by_hand.transformer)
    scale = expected.abs().max()
    assert (expected - base).abs().max() > 1e-3 * scale
    assert (forward(wrapped) - expected).abs().max() < 1e-5 * scale
    assert (forward(diffusers.transformer) - expected).abs().max() < 1e-5 * scale


def test_the_reported_difference_is_of_the_saved_adapter(trained):
    _, result = trained
    assert json.loads((result.folder / "eval.json").read_text()) == json.loads(result.comparison.to_json())
    base, adapter = result.comparison.overall
    assert (result.comparison.prompts, result.comparison.entries) == (3, ["base@1", "adapter@1"])
    difference = adapter["against_first"]["jpeg_compressibility"]["difference"]
    assert difference == pytest.approx(adapter["mean"]["jpeg_compressibility"] - base["mean"]["jpeg_compressibility"])
    assert difference != 0


def test_a_layer_may_have_an_alpha_of_its_own(small, tmp_path):
    lora = LoraSettings(
        alpha=8.0, targets=("to_q", "linear_2"), alpha_pattern={"to_q": 3, "caption_projection.linear_2": 5}
    )
    model = SanaSprint.from_pretrained(tiny_model())
    population = attach_population(model, small(tmp_path, lora=lora))
    scales = {name: layer.scale for name, layer in population.layers.items()}
    assert {scale for name, scale in scales.items() if name.endswith("to_q")} == {1.5}
    assert scales["caption_projection.linear_2"] == 2.5
    assert scales["time_embed.timestep_embedder.linear_2"] == 4.0
    draw = torch.Generator().manual_seed(0)
    for parameter in population.parameters().values():
        parameter.data = torch.randn(parameter.shape, generator=draw) / 10
    population.save_pretrained(tmp_path / "adapter")
    other = SanaSprint.from_pretrained(tiny_model()).transformer
    loaded = PeftModel.from_pretrained(other, str(tmp_path / "adapter"))
    inputs = dict(
        hidden_states=torch.randn(1, 8, 8, 8, generator=draw),
        encoder_hidden_states=torch.randn(1, 5, 64, generator=draw),
        timestep=torch.tensor([0.5]),
        guidance=torch.tensor([0.4]),
    )
    with torch.no_grad():
        expected = model.transformer(**inputs, return_dict=False)[0]
        torch.testing.assert_close(loaded(**inputs, return_dict=False)[0], expected, rtol=1e-4, atol=1e-5)
    population.detach()
    assert not torch.allclose(model.transformer(**inputs, return_dict=False)[0], expected, rtol=1e-2)
    wrong = LoraSettings(targets=("to_q",), alpha_pattern={"aption_projection.linear_2": 5})
    with pytest.raises(ConfigError, match=r"lora\.alpha_pattern: .*the model has no 'aption_projection\.linear_2'"):
        attach_population(model, small(tmp_path, lora=wrong))


def test_an_alpha_of_a_layer_that_is_no_target_is_told(small, tmp_path):
    told = []

    class Told(Progress):
        def note(self, line):
            told.append(line)

    train(small(tmp_path / "run", steps=1, lora=LoraSettings(targets=("to_q",), alpha_pattern={"to_v": 2})), Told())
    assert "lora.alpha_pattern: to_v matches no target; ignored" in told


def test_a_prompts_own_deviation_reaches_the_update(small, outcome, tmp_path):
    es = ESSettings(prompts_per_step=2, repeats=1)
    ends = []
    for prompt_std in ("global", "own"):
        folder = tmp_path / prompt_std
        train(small(folder, steps=1, es=dataclasses.replace(es, prompt_std=prompt_std)))
        ends.append(load_file(folder / "adapter" / "adapter_model.safetensors"))
    assert any(not torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_run_repeats_bit_for_bit_without_the_text_encoder(trained, small, outcome, tmp_path, monkeypatch):
    _, result = trained

    def refuse(*_):
        raise AssertionError("the text encoder was loaded although every prompt is in the cache")

    monkeypatch.setattr(SanaSprint, "_encode", refuse)
    train(small(tmp_path / "again"))
    assert outcome(tmp_path / "again") == outcome(result.folder)


def test_the_same_adapter_is_the_same_bytes(tmp_path):
    """Every file of `adapter/`, sixteen times."""
    model = SanaSprint.from_pretrained(tiny_model())
    population = attach_population(model, TrainConfig(lora=LoraSettings(targets=("linear_2",))))
    found = set()
    for i in range(16):
        save_adapter(population, tmp_path / str(i))
        found.add(tuple((path.name, path.read_bytes()) for path in sorted((tmp_path / str(i)).iterdir())))
    assert len(found) == 1


def test_the_adapters_configuration_is_the_same_bytes_in_any_process(tmp_path):
    model = SanaSprint.from_pretrained(tiny_model())
    population = attach_population(model, TrainConfig())
    population.save_pretrained(tmp_path)
    targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets)


def test_a_member_that_diverges_stops_the_run(small, tmp_path):
    es = ESSettings(sigma=1e30, prompts_per_step=2, repeats=1)
    with pytest.raises(EsengineError, match=r"finite"):
        train(small(tmp_path / "run", steps=1, strip_every=0, es=es, update=UpdateRule(lr_scale=1e-30)))


def test_no_forward_is_larger_than_the_chunk(small, tmp_path, monkeypatch):
    rows, render = [], SanaSprint.render

    def counting(self, *args, **kwargs):
        rows.append(len(kwargs["prompts"]))
        return render(self, *args, **kwargs)

    monkeypatch.setattr(SanaSprint, "render", counting)
    train(small(tmp_path / "run", steps=1, image=ImageSettings(chunk=1)))
    assert max(rows) == 1


def test_another_seed_is_another_run(trained, small, outcome, tmp_path):
    _, result = trained
    train(small(tmp_path / "run", seed=1, steps=1))
    assert outcome(tmp_path / "run")["metrics"][0] != outcome(result.folder)["metrics"][0]


def test_another_chunk_size_draws_the_same_images_up_to_rounding(trained, small, tmp_path):
    _, result = trained
    train(small(tmp_path / "run", steps=1, image=ImageSettings(chunk=64)))
    a, b = (journals.steps(folder)[0] for folder in (result.folder, tmp_path / "run"))
    assert a["reward"] == pytest.approx(b["reward"], rel=1e-3)


def test_progress_hears_every_image(small, tmp_path):
    class Ears(Progress):
        def __init__(self):
            self.heard, self.rendered = [], 0

        def start(self, total, done):
            self.heard.append(("start", total, done))

        def images(self, count):
            self.rendered += count

        def step(self, step, steps, metrics):
            self.heard.append(("step", step, steps))

        def stop(self):
            self.heard.append(("stop",))

    ears = Ears()
    train(small(tmp_path / "run", steps=2), ears)
    assert ears.heard == [("start", 16, 0), ("step", 1, 2), ("step", 2, 2), ("stop",)]
    assert ears.rendered == 16


def test_more_than_one_reward_is_weighed_and_logged(small, tmp_path, reward):
    name = reward(brightness)
    result = train(small(tmp_path / "run", steps=1, reward=f"jpeg_compressibility=0.5,{name}=-2"))
    line = journals.steps(tmp_path / "run")[0]
    assert line["reward"] == pytest.approx(0.5 * line["reward/jpeg_compressibility"] - 2 * line[f"reward/{name}"])
    assert result.comparison.scores == ["jpeg_compressibility", name, "combined"]


def test_two_steps_and_the_reference_angle(small, tmp_path):
    for name, image in (("two", ImageSettings(num_steps=2)), ("angle", ImageSettings(x0_angle=1.3))):
        train(small(tmp_path / name, steps=1, image=image))
    first = [journals.steps(tmp_path / name)[0]["reward"] for name in ("two", "angle")]
    assert first[0] != first[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"prompts": Path("nosuch.txt")},
        {"eval_prompts": Path("nosuch.txt")},
        {"reward": "nosuch"},
        {"es": ESSettings(prompts_per_step=5)},
        {"image": ImageSettings(height=100)},
        {"image": ImageSettings(x0_angle=1.3, num_steps=2)},
        {"device": "nosuch"},
        *(pytest.param(changes) for changes in ({"model": "nosuch"}, {"lora": LoraSettings(targets=("nosuch",))})),
    ],
)
def test_an_error_before_the_run_leaves_no_folder(small, tmp_path, changes):
    with pytest.raises(ConfigError):
        train(small(tmp_path / "a" / "run", **changes))
    assert list(tmp_path.iterdir()) == []


def test_the_adapters_configuration_is_pefts(trained):
    config, result = trained
    loaded = LoraConfig.from_pretrained(str(result.folder / "adapter"))
    assert set(loaded.target_modules) == set(config.lora.targets)
    assert loaded.inference_mode


def test_judges_that_have_no_say_are_compared_where_nothing_is_measured_on_the_way(tmp_path):
    few = tmp_path / "few.txt"
    few.write_text("a small red circle\na large blue square on a white background\n")
    config = dataclasses.replace(
        load("nano"), run_dir=tmp_path / "run", eval_prompts=few, steps=1, population=2, heldout_every=0, strip_every=0
    )
    config = dataclasses.replace(config, es=dataclasses.replace(config.es, prompts_per_step=1))
    report = train(config).comparison
    assert set(report.scores) == {"checker", "pickscore", "clip_text", "aesthetic", "no_artifacts", "combined"}
    assert journals.measured(tmp_path / "run") == []
