"""A run from prompts to adapter on the tiny model: what it leaves, and that stopping it anywhere changes nothing."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from PIL import Image
from safetensors.torch import load_file

from esengine import checkpoint
from esengine.config import ESSettings, ImageSettings, LoraSettings, TrainConfig, UpdateRule, load, load_run, to_dict
from esengine.errors import ConfigError, EsengineError, RewardError, RunError
from esengine.models import SanaSprint, build_tiny, default_model
from esengine.runlog import RunLog
from esengine.train import Progress, attach_population, save_adapter, train
from esengine.update import Updater

RULES = {
    "momentum": UpdateRule(optimizer="momentum", lr_scale=0.5),
    "adam": UpdateRule(optimizer="adam", lr_scale=0.5),
}


def brightness(images, prompts):
    return images.float().mean(dim=(1, 2, 3)) / 255


@pytest.fixture
def reward(monkeypatch):
    """Installs a function as the reward `own:score`."""

    def install(function) -> str:
        module = types.ModuleType("own")
        module.score = function
        monkeypatch.setitem(sys.modules, "own", module)
        return "own:score"

    return install


# ---- what a run leaves


def test_the_run_folder(trained):
    config, result = trained
    folder = result.folder
    assert folder == config.run_dir
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock", "adapter", "checkpoints", "config.yaml", "eval.json", "metrics.jsonl", "strips", "tensorboard",
    ]  # fmt: skip
    assert sorted(path.name for path in (folder / "adapter").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors",
    ]  # fmt: skip
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step_00000002", "step_00000004"]
    assert next((folder / "tensorboard").iterdir()).name.startswith("events.out.tfevents")


def test_the_resolved_configuration_is_saved(trained):
    config, result = trained
    saved = load(result.folder / "config.yaml")
    assert saved == dataclasses.replace(config, run_dir=None, device="cpu", dtype="float32")


def test_metrics_have_a_line_for_each_step(trained):
    config, result = trained
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
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
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert [(e.step, e.value) for e in events.Scalars("reward")] == [
        (line["step"], pytest.approx(line["reward"], rel=1e-6)) for line in lines
    ]
    assert [e.step for e in events.Images("strips")] == [0, 3]


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

    plain, peft, diffusers, by_hand = (SanaSprint.from_pretrained(default_model()) for _ in range(4))
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
    score = result.comparison.scores["jpeg_compressibility"]
    assert result.comparison.prompts == 3
    assert score.difference == pytest.approx(score.adapter - score.base)
    assert score.difference != 0


def test_a_run_repeats_bit_for_bit_without_the_text_encoder(trained, small, outcome, tmp_path, monkeypatch):
    _, result = trained

    def refuse(*_):
        raise AssertionError("the text encoder was loaded although every prompt is in the cache")

    monkeypatch.setattr(SanaSprint, "_encode", refuse)
    train(small(tmp_path / "again"))
    assert outcome(tmp_path / "again") == outcome(result.folder)


def test_the_same_adapter_is_the_same_bytes(tmp_path):
    """Every file of `adapter/`, sixteen times."""
    model = SanaSprint.from_pretrained(default_model())
    population = attach_population(model, TrainConfig(lora=LoraSettings(targets=("linear_2",))))
    found = set()
    for i in range(16):
        save_adapter(population, tmp_path / str(i))
        found.add(tuple((path.name, path.read_bytes()) for path in sorted((tmp_path / str(i)).iterdir())))
    assert len(found) == 1


def test_the_adapters_configuration_is_the_same_bytes_in_any_process(tmp_path):
    model = SanaSprint.from_pretrained(default_model())
    population = attach_population(model, TrainConfig())
    population.save_pretrained(tmp_path)
    targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets)


def test_a_member_that_diverges_stops_the_run(small, tmp_path):
    es = ESSettings(sigma=1e30, prompts_per_step=2, repeats=1)
    with pytest.raises(EsengineError, match=r"finite"):
        train(small(tmp_path / "run", steps=1, strip_every=0, es=es))


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
    a, b = (json.loads((f / "metrics.jsonl").read_text().splitlines()[0]) for f in (result.folder, tmp_path / "run"))
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
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert line["reward"] == pytest.approx(0.5 * line["reward/jpeg_compressibility"] - 2 * line[f"reward/{name}"])
    assert list(result.comparison.scores) == ["jpeg_compressibility", name, "combined"]


def test_two_steps_and_the_reference_angle(small, tmp_path):
    for name, image in (("two", ImageSettings(num_steps=2)), ("angle", ImageSettings(x0_angle=1.3))):
        train(small(tmp_path / name, steps=1, image=image))
    first = [json.loads((tmp_path / name / "metrics.jsonl").read_text())["reward"] for name in ("two", "angle")]
    assert first[0] != first[1]


# ---- killed by SIGKILL, then resumed

DRIVER = '''
import dataclasses, json, os, signal, sys
from pathlib import Path
import torch
import killer
from esengine.config import TrainConfig, from_dict
from esengine.errors import RunError
from esengine.train import train

torch.set_num_threads(1)


def fork(config, kind, at):
    """The code a child leaves with: 0 done, 2 nothing to resume, 3 another error, -9 killed."""
    child = os.fork()
    if child == 0:
        try:
            killer.arm(kind, at)
            train(config)
            os._exit(0)
        except RunError as error:
            os._exit(2 if "nothing to resume" in str(error) else 3)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(4)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


found = {}
for case in json.loads(Path(sys.argv[1]).read_text()):
    config = from_dict(TrainConfig(), case["config"], "case")
    codes = [fork(config, *case["kill"])]
    if codes[0] != 0:
        codes.append(fork(dataclasses.replace(config, resume=True), None, 0))
        if codes[1] == 2:
            codes.append(fork(config, None, 0))
    found[case["name"]] = codes
Path(sys.argv[2]).write_text(json.dumps(found))
'''

KILLER = """
import os, signal
armed, calls = (None, 0), {"reward": 0, "fsync": 0}
sync = os.fsync


def arm(kind, at):
    global armed
    armed = kind, at


def reach(kind):
    if armed == (kind, calls[kind]):
        os.kill(os.getpid(), signal.SIGKILL)
    calls[kind] += 1


def fsync(file):
    reach("fsync")
    sync(file)


def score(images, prompts):
    reach("reward")
    return images.float().mean(dim=(1, 2, 3)) / 255


os.fsync = fsync
"""

# three chunks a step, five steps: calls 0 to 14 train, 15 and 16 compare
KILLS = [("reward", at, rule) for at, rule in zip((0, 1, 4, 8, 9, 11, 14, 16), 4 * list(RULES), strict=True)]
KILLS += [("reward", at, rule) for at, rule in ((2, "adam"), (10, "momentum"), (15, "momentum"))]
# syncs: 0 and 1 of the configuration, 2 to 5 of the first checkpoint, which is there from 5 on
KILLS += [("fsync", at, "adam") for at in range(9)] + [("fsync", 12, "momentum")]
EVERY = {"momentum": 1, "adam": 3}


@pytest.fixture(scope="module")
def killed(small, tmp_path_factory):
    """Every case in one process that forks a child for each run: (folder of a case, exit codes of its children)."""
    root = tmp_path_factory.mktemp("killed")
    (root / "killer.py").write_text(KILLER)
    (root / "driver.py").write_text(DRIVER)
    default_model()
    cases = []
    for kind, at, rule in [*KILLS, *((None, 0, rule) for rule in RULES)]:
        name = f"{kind}-{at}-{rule}"
        config = small(
            root / name, steps=5, reward="killer:score", update=RULES[rule], checkpoint_every=EVERY[rule], strip_every=0
        )
        cases.append({"name": name, "kill": [kind, at], "config": to_dict(config)})
    (root / "cases.json").write_text(json.dumps(cases))
    done = subprocess.run(
        [sys.executable, "driver.py", "cases.json", "codes.json"], cwd=root, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    return root, json.loads((root / "codes.json").read_text()), done.stderr


@pytest.mark.parametrize(
    ("kind", "at", "rule"),
    KILLS,
)
def test_killed_and_resumed_it_ends_with_the_same_bytes(killed, outcome, kind, at, rule):
    root, codes, errors = killed
    name = f"{kind}-{at}-{rule}"
    assert codes[f"None-0-{rule}"] == [0]
    assert codes[name][0] == -9, f"it was not killed: {codes[name]}"
    # resumed; or, killed before the first checkpoint, begun again
    assert codes[name][1:] in ([0], [2, 0]), f"{codes[name]} {errors}"
    assert codes[name][1:] == [0] or kind == "fsync"
    assert outcome(root / name) == outcome(root / f"None-0-{rule}")


def test_the_command_line_killed_and_resumed(killed, outcome, tmp_path):
    root, _, _ = killed
    config = load(root / "None-0-momentum" / "config.yaml")
    (tmp_path / "killer.py").write_text(KILLER + "\narm('reward', int(os.environ.get('KILL', -1)))\n")
    flags = [
        "--prompts", config.prompts, "--eval-prompts", config.eval_prompts, "--reward", config.reward,
        "--steps", config.steps, "--population", config.population, "--checkpoint-every", 1, "--strip-every", 0,
        "--lora.targets", *config.lora.targets, "--es.prompts-per-step", 2, "--es.repeats", 1, "--image.chunk", 3,
        "--update.optimizer", "momentum", "--update.lr-scale", 0.5,
    ]  # fmt: skip

    def call(*args, **env):
        command = [sys.executable, "-m", "esengine", "train", "--run-dir", "run", *map(str, args)]
        return subprocess.run(command, cwd=tmp_path, env=os.environ | env, capture_output=True, text=True, timeout=120)

    assert call(*flags, KILL="7").returncode == -9
    done = call("--resume")
    assert done.returncode == 0, done.stderr
    assert "resuming run after step 2 of 5" in done.stderr
    assert "base against adapter on 3 held-out prompts" in done.stdout
    assert outcome(tmp_path / "run") == outcome(root / "None-0-momentum")


# ---- interrupted by an exception, then resumed


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    """The adam run that is never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(small(folder, update=RULES["adam"], checkpoint_every=3))
    return folder


class Stop(Exception):
    """Raised by us in the middle of a run."""


def stop_at(function, call, after=False):
    """`function`, raising at its call number `call`, before or after doing its work."""
    count = -1

    def stopping(*args, **kwargs):
        nonlocal count
        count += 1
        if count == call and not after:
            raise Stop
        result = function(*args, **kwargs)
        if count == call:
            raise Stop
        return result

    return stopping


@pytest.mark.parametrize(
    ("target", "name", "call", "after"),
    [
        (Progress, "start", 0, False),
        (Progress, "images", 0, False),
        (Progress, "images", 7, False),
        (Progress, "step", 0, False),
        (Progress, "step", 2, False),
        (Progress, "step", 3, False),
        (Progress, "stop", 0, False),
        (SanaSprint, "render", 4, False),
        (RunLog, "strip", 0, True),
        (RunLog, "strip", 1, False),
        (checkpoint, "save", 1, False),
        (checkpoint, "save", 1, True),
        (Updater, "step", 1, False),
        pytest.param(
            Updater, "step", 1, True,
        ),
        pytest.param(
            RunLog, "log", 1, False,
        ),
        (RunLog, "log", 1, True),
    ],
)  # fmt: skip
def test_interrupted_and_resumed_it_ends_with_the_same_bytes(
    small, whole, outcome, tmp_path, monkeypatch, target, name, call, after
):
    config = small(tmp_path / "run", update=RULES["adam"], checkpoint_every=3)
    with monkeypatch.context() as patch:
        patch.setattr(target, name, stop_at(getattr(target, name), call, after))
        with pytest.raises(Stop):
            train(config)
    train(dataclasses.replace(config, resume=True))
    assert outcome(tmp_path / "run") == outcome(whole)


def test_a_longer_run_is_the_shorter_one_continued(small, whole, outcome, tmp_path):
    config = small(tmp_path / "run", update=RULES["adam"], checkpoint_every=3)
    train(dataclasses.replace(config, steps=2, strip_every=0))
    train(dataclasses.replace(config, resume=True))
    assert outcome(tmp_path / "run") == outcome(whole)


def test_a_finished_run_resumed_is_left_as_it_is(small, whole, outcome, tmp_path):
    config = small(tmp_path / "run", update=RULES["adam"], checkpoint_every=3)
    train(config)
    train(dataclasses.replace(config, resume=True))
    assert outcome(tmp_path / "run") == outcome(whole)


def test_a_damaged_newest_checkpoint_is_passed_over(small, whole, outcome, tmp_path):
    class Notes(Progress):
        def __init__(self):
            self.notes = []

        def note(self, text):
            self.notes.append(text)

    config = small(tmp_path / "run", update=RULES["adam"], checkpoint_every=3)
    train(config)
    newest = tmp_path / "run" / "checkpoints" / "step_00000004" / "state.safetensors"
    data = bytearray(newest.read_bytes())
    data[-5] ^= 1
    newest.write_bytes(data)
    heard = Notes()
    train(dataclasses.replace(config, resume=True), heard)
    assert any("step_00000004" in note and "SHA-256" in note for note in heard.notes), heard.notes
    assert any("after step 3 of 4" in note for note in heard.notes)
    assert outcome(tmp_path / "run") == outcome(whole)


def test_a_chunk_left_to_the_device_stays_as_it_was_chosen(small, tmp_path, monkeypatch):
    config = small(tmp_path / "run", steps=1, image=ImageSettings())
    train(config)
    monkeypatch.setattr("esengine.setup.CPU_CHUNK", 5)
    train(dataclasses.replace(config, resume=True, steps=2))
    assert load(tmp_path / "run" / "config.yaml").image.chunk == 64


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"es": ESSettings(sigma=0.02, prompts_per_step=2, repeats=1)}, "es.sigma: 0.01 -> 0.02"),
        ({"population": 6}, "population: 4 -> 6"),
        ({"seed": 3}, "seed: 0 -> 3"),
        ({"reward": "jpeg_incompressibility"}, "reward: jpeg_compressibility -> jpeg_incompressibility"),
        ({"lora": LoraSettings(targets=("to_q",))}, "lora.targets"),
        ({"dtype": "bfloat16"}, "dtype: float32 -> bfloat16"),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused(small, tmp_path, changes, words, outcome):
    config = small(tmp_path / "run", steps=1)
    train(config)
    before = outcome(tmp_path / "run")
    with pytest.raises(RunError) as caught:
        train(dataclasses.replace(config, resume=True, steps=2, **changes))
    assert words in str(caught.value)
    assert outcome(tmp_path / "run") == before


def test_a_checkpoint_of_another_noise_contract_is_refused(small, tmp_path, monkeypatch):
    config = small(tmp_path / "run", steps=1, strip_every=0)
    with monkeypatch.context() as patch:
        patch.setattr("esengine.train.CONTRACT", 99)
        train(config)
    try:
        train(dataclasses.replace(config, resume=True, steps=2))
    except Exception as error:
        assert isinstance(error, RunError), repr(error)  # noqa: PT017
        assert "contract" in str(error)  # noqa: PT017
    else:
        raise AssertionError("it was accepted")


def test_prompts_are_known_by_their_contents(small, tmp_path, prompt_files):
    own = tmp_path / "p.txt"
    own.write_bytes(prompt_files[0].read_bytes())
    config = small(tmp_path / "run", steps=1, prompts=own)
    train(config)
    own.write_text("# another comment\n" + prompt_files[0].read_text())
    train(dataclasses.replace(config, resume=True))
    own.write_text(own.read_text() + "one more\n")
    with pytest.raises(RunError, match="prompts: the file's contents"):
        train(dataclasses.replace(config, resume=True, steps=2))


def test_the_same_prompts_under_another_path_may_resume(small, tmp_path, prompt_files):
    config = small(tmp_path / "run", steps=1)
    train(config)
    moved = tmp_path / "moved.txt"
    moved.write_bytes(prompt_files[0].read_bytes())
    train(dataclasses.replace(config, resume=True, steps=2, prompts=moved))


def test_other_weights_in_the_models_folder_are_refused(small, tmp_path, monkeypatch):
    model = build_tiny(tmp_path / "model", seed=0)
    monkeypatch.chdir(tmp_path)
    config = small(tmp_path / "run", steps=1, model="./model", strip_every=0)
    train(config)
    monkeypatch.chdir("/")
    train(dataclasses.replace(load_run(tmp_path / "run"), run_dir=tmp_path / "run", resume=True, steps=2))
    shutil.rmtree(model)
    build_tiny(model, seed=1)
    with pytest.raises(RunError, match="model: its weights"):
        train(dataclasses.replace(load_run(tmp_path / "run"), run_dir=tmp_path / "run", resume=True, steps=3))


# ---- rewards that fail

FAILURES = {
    "raises": (lambda images: 1 / 0, "raised ZeroDivisionError"),
    "nan": (lambda images: torch.full((len(images),), float("nan")), "returned nan"),
    "shape": (lambda images: torch.zeros(len(images), 1), r"returned float32 \[3, 1\]"),
    "dtype": (lambda images: torch.zeros(len(images), dtype=torch.float64), r"returned float64 \[3\]"),
    "list": (lambda images: [0.0] * len(images), "returned list"),
}


@pytest.fixture(scope="module")
def bright(small, tmp_path_factory):
    """Runs with a reward that never fails, of one step and of three."""
    root = tmp_path_factory.mktemp("bright")
    with pytest.MonkeyPatch.context() as patch:
        module = types.ModuleType("own")
        module.score = brightness
        patch.setitem(sys.modules, "own", module)
        for steps in (1, 3):
            train(small(root / str(steps), steps=steps, reward="own:score", checkpoint_every=3, strip_every=0))
    return root


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failing_reward_leaves_the_step_before_it(small, bright, tmp_path, reward, outcome, failure):
    broken, words = FAILURES[failure]
    calls, failing = 0, True

    def score(images, prompts):
        nonlocal calls
        calls += 1
        # the second chunk of step 1: members 1, 2 of two prompts
        return broken(images) if failing and calls == 5 else brightness(images, prompts)

    config = small(tmp_path / "run", steps=3, reward=reward(score), checkpoint_every=3, strip_every=0)
    with pytest.raises(RewardError, match=rf"reward own:score, step 1, members 1, 2 .*{words}") as caught:
        train(config)
    assert "\n" not in str(caught.value)

    kept = checkpoint.load_latest(tmp_path / "run" / "checkpoints")
    assert kept.step == 1
    state = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    expected = load_file(bright / "1" / "adapter" / "adapter_model.safetensors")
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor)
        assert torch.equal(kept.tensors["adapter/" + name.removeprefix("base_model.model.")], tensor)

    failing = False
    train(dataclasses.replace(config, resume=True))
    assert outcome(tmp_path / "run") == outcome(bright / "3")


# ---- errors that come before the run


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
