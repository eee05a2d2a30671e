"""Stopped by an exception anywhere, a run resumes to the same bytes; and what may not be resumed is not."""

import dataclasses
import shutil

import pytest

from esengine.base.errors import RunError
from esengine.base.progress import Progress
from esengine.es.rule import UpdateRule
from esengine.es.update import Updater
from esengine.models import SanaSprint, build_tiny
from esengine.run import checkpoint
from esengine.run.held_out import HeldOut
from esengine.run.hooks import Strips
from esengine.run.journal import Writer
from esengine.run.replay import replay
from esengine.run.settings import ESSettings, LoraSettings, ReplayConfig, load, load_run
from esengine.run.train import train
from esengine.sampling.environment import describe
from esengine.sampling.settings import ImageSettings

ADAM = UpdateRule(optimizer="adam", lr_scale=0.5)


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    """The adam run that is never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(small(folder, update=ADAM, checkpoint_every=3))
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
        (SanaSprint, "render", 5, False),
        (checkpoint, "save", 1, False),
        (checkpoint, "save", 1, True),
        (Updater, "step", 1, False),
        pytest.param(
            Updater, "step", 1, True,
        ),
        *[(Writer, "append", call, after) for call in range(10) for after in (False, True)],
        (HeldOut, "_draw", 1, False),
        (HeldOut, "measure", 0, True),
    ],
)  # fmt: skip
def test_interrupted_and_resumed_it_ends_with_the_same_bytes(
    small, whole, outcome, tmp_path, monkeypatch, target, name, call, after
):
    config = small(tmp_path / "run", update=ADAM, checkpoint_every=3)
    with monkeypatch.context() as patch:
        patch.setattr(target, name, stop_at(getattr(target, name), call, after))
        with pytest.raises(Stop):
            train(config)
    train(dataclasses.replace(config, resume=True))
    assert outcome(tmp_path / "run") == outcome(whole)


@pytest.mark.parametrize("after", [False, True])
def test_a_strip_that_cannot_be_drawn_is_a_warning(small, whole, outcome, tmp_path, monkeypatch, notes, after):
    monkeypatch.setattr(Strips, "draw", stop_at(Strips.draw, 0, after))
    train(small(tmp_path / "run", update=ADAM, checkpoint_every=3), notes)
    assert [line for line in notes.said if line.startswith("warning: no strip of step 0")]
    assert outcome(tmp_path / "run") == outcome(whole)


def test_a_longer_run_is_the_shorter_one_continued(small, whole, outcome, tmp_path):
    config = small(tmp_path / "run", update=ADAM, checkpoint_every=3)
    train(dataclasses.replace(config, steps=2, strip_every=0))
    train(dataclasses.replace(config, resume=True))
    assert outcome(tmp_path / "run") == outcome(whole)


def test_a_finished_run_resumed_is_left_as_it_is(small, whole, outcome, tmp_path):
    config = small(tmp_path / "run", update=ADAM, checkpoint_every=3)
    train(config)
    train(dataclasses.replace(config, resume=True))
    assert outcome(tmp_path / "run") == outcome(whole)


def test_fewer_steps_than_are_done_are_refused_and_nothing_is_lost(small, outcome, tmp_path):
    config = small(tmp_path / "run", steps=2, strip_every=0)
    train(config)
    before = outcome(tmp_path / "run")
    with pytest.raises(RunError, match="2 steps are done, --steps 1 is less"):
        train(dataclasses.replace(config, resume=True, steps=1))
    assert outcome(tmp_path / "run") == before


def test_a_damaged_newest_checkpoint_is_passed_over(small, whole, outcome, tmp_path, notes):
    config = small(tmp_path / "run", update=ADAM, checkpoint_every=3)
    train(config)
    newest = tmp_path / "run" / "checkpoints" / "step_00000004" / "state.safetensors"
    data = bytearray(newest.read_bytes())
    data[-5] ^= 1
    newest.write_bytes(data)
    train(dataclasses.replace(config, resume=True), notes)
    assert any("step_00000004" in line and "SHA-256" in line for line in notes.said), notes.said
    assert any("after step 3 of 4" in line for line in notes.said)
    assert outcome(tmp_path / "run") == outcome(whole)


def test_a_damaged_checkpoint_is_none_of_the_two_that_are_kept(small, tmp_path):
    config = small(tmp_path / "run", heldout_every=0, strip_every=0)
    train(config)
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "step_00000004" / "state.safetensors").write_bytes(b"")
    train(dataclasses.replace(config, resume=True, steps=5, checkpoint_every=5))
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_00000002", "step_00000005"]


def test_a_damaged_checkpoint_is_gone_where_no_step_was_left_to_take(small, tmp_path):
    config = small(tmp_path / "run", heldout_every=0, strip_every=0)
    train(config)
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "step_00000004" / "state.safetensors").write_bytes(b"")
    train(dataclasses.replace(config, resume=True, steps=2))
    assert [path.name for path in checkpoints.iterdir()] == ["step_00000002"]


CHANGES = {
    "a setting": lambda folder: {"es": ESSettings(sigma=0.02, prompts_per_step=2, repeats=1)},
    "the prompts": lambda folder: {"prompts": folder / "other.txt"},
    "the reward": lambda folder: {"reward": "jpeg_incompressibility"},
}


@pytest.fixture(params=CHANGES)
def changed(request, small, tmp_path):
    """A run of four steps, and settings for it to go on with to step six that need --allow-change."""
    (tmp_path / "other.txt").write_text("one\ntwo\nthree\nfour\n")
    config = small(tmp_path / "run", heldout_every=0, strip_every=0)
    train(config)
    return dataclasses.replace(config, resume=True, allow_change=True, steps=6, **CHANGES[request.param](tmp_path))


def goes_on(run, notes):
    """By `--resume` alone, to step seven, and is replayed."""
    train(dataclasses.replace(load_run(run), run_dir=run, resume=True, steps=7), notes)
    assert replay(ReplayConfig(run_dir=run), Progress()).agreed == 7


def test_a_change_that_was_allowed_stays_so_where_the_run_is_killed_before_a_checkpoint(changed, monkeypatch, notes):
    def save(root, step, *rest):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save)
        with pytest.raises(KeyboardInterrupt):
            train(changed)
    goes_on(changed.run_dir, notes)


def test_a_change_that_was_allowed_stays_so_where_the_checkpoint_that_says_so_is_damaged(changed, notes):
    train(changed)
    (changed.run_dir / "checkpoints" / "step_00000006" / "state.safetensors").write_bytes(b"")
    goes_on(changed.run_dir, notes)


def test_a_change_by_hand_in_config_yaml_is_no_setting_and_is_told(small, tmp_path, notes):
    train(small(tmp_path / "run", steps=1))
    file = tmp_path / "run" / "config.yaml"
    file.write_text(file.read_text().replace("sigma: 0.01\n", "sigma: 0.02\n"))
    train(dataclasses.replace(load_run(tmp_path / "run"), run_dir=tmp_path / "run", resume=True, steps=2), notes)
    assert any("config.yaml is a copy" in line for line in notes.said)
    assert load(file).es.sigma == 0.01


def test_a_chunk_left_to_the_device_stays_as_it_was_chosen(small, tmp_path, monkeypatch):
    config = small(tmp_path / "run", steps=1, image=ImageSettings())
    train(config)
    monkeypatch.setattr("esengine.sampling.build.CPU_CHUNK", 5)
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
        patch.setattr("esengine.run.prepare.CONTRACT", 99)
        train(config)
    try:
        train(dataclasses.replace(config, resume=True, steps=2))
    except Exception as error:
        assert isinstance(error, RunError), repr(error)  # noqa: PT017
        assert "contract" in str(error)  # noqa: PT017
    else:
        raise AssertionError("it was accepted")


class Identified:
    """A reward whose weights are known by a revision."""

    revision = "a1"

    def settings(self):
        return {"revision": self.revision}

    def __call__(self, images, prompts):
        return images.float().mean(dim=(1, 2, 3))


def test_another_revision_of_a_reward_is_refused(small, tmp_path, reward, monkeypatch):
    config = small(tmp_path / "run", steps=1, strip_every=0, reward=reward(Identified))
    train(config)
    train(dataclasses.replace(config, resume=True, steps=2))
    monkeypatch.setattr(Identified, "revision", "b2")
    with pytest.raises(RunError, match=r"reward\.own:score\.revision: a1 -> b2"):
        train(dataclasses.replace(config, resume=True, steps=3))


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


def test_a_run_that_goes_on_with_other_versions_says_so(small, tmp_path, notes, monkeypatch):
    train(small(tmp_path / "run", steps=1), notes)
    assert not [line for line in notes.said if "bits may differ" in line]
    facts = describe()
    monkeypatch.setattr("esengine.run.prepare.describe", lambda: facts | {"torch": "0.0"})
    train(small(tmp_path / "run", steps=2, resume=True), notes)
    (line,) = [line for line in notes.said if "bits may differ" in line]
    assert line == f"warning: bits may differ from before, torch: {facts['torch']} -> 0.0"
