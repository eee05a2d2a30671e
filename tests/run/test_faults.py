"""Memory that runs out, rewards that fail, a full disk: what a run does then."""

import dataclasses
import errno
import functools
import io
import os
import pickle
import pkgutil
import random
import types

import journals
import pytest
import torch

from esengine.base import files
from esengine.base.errors import ConfigError, OutOfMemory, RenderError, RewardError, RunError, UpdateError
from esengine.es.engine import Engine
from esengine.es.rule import UpdateRule
from esengine.es.update import Updater
from esengine.models import SanaSprint
from esengine.rewards import Weighted
from esengine.run import checkpoint
from esengine.run.folder import checkpoint_folders, path_step
from esengine.run.settings import ESSettings
from esengine.run.train import train
from esengine.sampling.settings import ImageSettings

PAIRED = ESSettings(prompts_per_step=2, repeats=2)


def lines(run):
    return journals.steps(run)


def brightness(images, prompts):
    return images.float().mean(dim=(1, 2, 3)) / 255


# ---- memory


@pytest.fixture
def room(monkeypatch):
    """`room(images, first)`: from forward number `first` on, so many images fit. Gives the sizes that were drawn."""

    def limit(images, first=0):
        drawn, velocity = [], SanaSprint._velocity

        def narrow(self, x, *args):
            drawn.append(len(x))
            if len(drawn) > first and len(x) > images:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return velocity(self, x, *args)

        monkeypatch.setattr(SanaSprint, "_velocity", narrow)
        return drawn

    return limit


@pytest.mark.parametrize("first", [0, 3, 8])
def test_the_chunk_halves_and_the_same_members_are_drawn_again(small, outcome, tmp_path, notes, room, first):
    settings = dict(es=PAIRED, image=ImageSettings(chunk=8), heldout_every=0, steps=3)
    train(small(tmp_path / "whole", **settings))
    drawn = room(3, first)
    train(small(tmp_path / "run", **settings), notes)
    said = [line for line in notes.said if "do not fit into memory" in line]
    assert [line.rsplit("from here on ", 1)[1] for line in said] == ["4 in one forward", "2 in one forward"]
    assert [size for size in drawn[first:] if size in (8, 4)] == [8, 4]
    for ours, theirs in zip(lines(tmp_path / "run"), lines(tmp_path / "whole"), strict=True):
        assert ours["reward"] == pytest.approx(theirs["reward"], rel=1e-3)
    assert outcome(tmp_path / "run")["metrics"][0].keys() == outcome(tmp_path / "whole")["metrics"][0].keys()


def test_a_resumed_run_keeps_the_smaller_forward(small, tmp_path, notes, room):
    drawn = room(3)
    config = small(tmp_path / "run", es=PAIRED, image=ImageSettings(chunk=8), heldout_every=0, steps=1)
    train(config)
    drawn.clear()
    train(dataclasses.replace(config, steps=2, resume=True), notes)
    assert max(drawn[:4]) == 2
    assert not [line for line in notes.said if "do not fit" in line]


PLACES = {
    "forward": ("esengine.models.SanaSprint", "_velocity", lambda args, keys: len(args[1])),
    "decoder": ("esengine.models.decoder.Decoder", "_pixels", lambda args, keys: len(args[1])),
    "latents": ("esengine.models.sana.sana_sprint", "latents", lambda args, keys: len(keys["prompts"])),
    "noise": ("esengine.es.population.Population", "_chunk", lambda args, keys: len(args[2])),
    "texts": ("esengine.models.TextEmbeddings", "batch", lambda args, keys: len(args[1])),
}
"""Where memory may run out while images are drawn, and how many are drawn there."""


class Scarce:
    """Memory that runs out once: at call number `at` that is for several images, in drawing or in scoring.

    Attributes:
        calls: how many such calls there were.
        images: what was scored, in order.
    """

    def __init__(self, patch, at=None):
        self.at, self.calls, self.images = at, 0, []
        for place, name, rows in PLACES.values():
            owner = pkgutil.resolve_name(place)
            patch.setattr(owner, name, self.counted(getattr(owner, name), rows))

    def counted(self, function, rows):
        def call(*args, **keys):
            self.spend(rows(args, keys))
            return function(*args, **keys)

        return call

    def spend(self, rows):
        self.calls += rows > 1
        if rows > 1 and self.calls == self.at:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def score(self, images, prompts):
        self.spend(len(images))
        self.images.append(images.clone())
        return brightness(images, prompts)


def run_out(times, seed, small, tmp_path, monkeypatch, reward):
    """Each run completes, and what it drew is within the bound of T2 (esengine/README.md) of what it draws at once."""
    settings = dict(es=PAIRED, image=ImageSettings(chunk=8), steps=2, strip_every=1)
    draw, whole = random.Random(seed), None
    for number in range(times + 1):
        with monkeypatch.context() as patch:
            scarce = Scarce(patch, draw.randint(1, whole.calls) if whole else None)
            train(small(tmp_path / str(number), reward=reward(scarce.score), **settings))
        whole = whole or scarce
        ours, theirs = (torch.cat(each.images).int() for each in (scarce, whole))
        assert (ours - theirs).abs().max() <= 1, f"at call {scarce.at} of {whole.calls}"
        assert [line["step"] for line in lines(tmp_path / str(number))] == [0, 1]


def test_memory_may_run_out_anywhere(small, tmp_path, monkeypatch, reward):
    run_out(5, 0, small, tmp_path, monkeypatch, reward)


@pytest.mark.slow
def test_memory_may_run_out_anywhere_a_hundred_times(small, tmp_path, monkeypatch, reward):
    run_out(100, 1, small, tmp_path, monkeypatch, reward)


def test_where_not_one_image_fits_the_error_has_the_numbers(small, tmp_path, room):
    room(0)
    with pytest.raises(OutOfMemory, match="1 images in one transformer forward do not fit into memory"):
        train(small(tmp_path / "run", heldout_every=0))


@pytest.mark.parametrize("place", PLACES)
def test_the_chunk_halves_wherever_memory_runs_out(small, tmp_path, monkeypatch, notes, place):
    owner, name, rows = PLACES[place]
    owner = pkgutil.resolve_name(owner)
    function = getattr(owner, name)

    def narrow(*args, **keys):
        if rows(args, keys) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return function(*args, **keys)

    monkeypatch.setattr(owner, name, narrow)
    train(small(tmp_path / "run", es=PAIRED, image=ImageSettings(chunk=8), heldout_every=0, steps=1), notes)
    said = [line.rsplit("from here on ", 1)[1] for line in notes.said if "do not fit into memory" in line]
    assert said[:2] == ["4 in one forward", "2 in one forward"]
    assert len(lines(tmp_path / "run")) == 1


def test_memory_that_runs_out_in_the_update_leaves_the_step_before(small, outcome, tmp_path, monkeypatch):
    train(small(tmp_path / "whole", heldout_every=0, steps=3))
    config, step = small(tmp_path / "run", heldout_every=0, steps=3, checkpoint_every=3), Updater.step

    def full(self, gradient):
        if len(journals.steps(tmp_path / "run")) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. 3.50 MiB is free.")
        return step(self, gradient)

    with monkeypatch.context() as patch:
        patch.setattr(Updater, "step", full)
        with pytest.raises(OutOfMemory, match=r"update .*asked for 20.00 MiB, free 3.50 MiB"):
            train(config)
    assert checkpoint.load_latest(tmp_path / "run" / "checkpoints").step == 1
    train(dataclasses.replace(config, resume=True))
    assert outcome(tmp_path / "run")["adapter"] == outcome(tmp_path / "whole")["adapter"]


def test_memory_that_runs_out_in_scoring_halves_what_is_scored(small, tmp_path, notes, reward):
    def narrow(images, prompts):
        if len(images) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return brightness(images, prompts)

    config = small(tmp_path / "run", es=PAIRED, image=ImageSettings(chunk=8), heldout_every=0, steps=2)
    train(dataclasses.replace(config, reward=reward(narrow)), notes)
    said = [line for line in notes.said if "scored together" in line]
    assert said[0] == (
        "warning: 8 images and reward own:score do not fit into memory: give it a smaller model, or a device of its "
        "own; from here on 4 are scored together"
    )
    assert len(said) == 2  # the comparison scores six images
    assert [line["step"] for line in lines(tmp_path / "run")] == [0, 1]


# ---- updates


RATES = {
    "no cap": UpdateRule(lr_scale=3e39, max_norm=None),
    "the default": UpdateRule(lr_scale=3e39),
    "a cap on the step": UpdateRule(lr_scale=3e39, max_step_norm=1.0),
    "momentum": UpdateRule(optimizer="momentum", lr_scale=3e39),
}


@pytest.mark.parametrize("rate", RATES)
def test_the_adapter_is_never_not_finite(small, tmp_path, monkeypatch, rate):
    with pytest.raises(ConfigError, match=r"update.lr_scale: .* 1e\+06, got 3e\+37"):
        small(tmp_path / "run", update=RATES[rate])
    monkeypatch.setattr("esengine.run.settings.MAX_RATE", 1e40)
    patched = dataclasses.replace(RATES[rate], lr_scale=1e39 * 30)
    config = small(tmp_path / "run", update=patched, heldout_every=0, strip_every=0, steps=9)
    with pytest.raises((UpdateError, RenderError)):
        train(config)
    kept = checkpoint.load_latest(tmp_path / "run" / "checkpoints")
    assert all(tensor.isfinite().all() for tensor in kept.tensors.values())
    assert len(lines(tmp_path / "run")) == kept.step


# ---- rewards


class Failing:
    """Brightness, but for images of the given values, which `fail` answers for."""

    def __init__(self, fail, share):
        self.fail, self.share, self.seen = fail, share, 0

    def __call__(self, images, prompts):
        score = brightness(images, prompts)
        bad = (images.long().sum(dim=(1, 2, 3)) % 1000) < 1000 * self.share
        self.seen += int(bad.sum())
        return self.fail(score, bad)


def raises(score, bad):
    if bad.any():
        raise RuntimeError("lost")
    return score


def not_a_number(score, bad):
    return torch.where(bad, torch.nan, score)


def infinite(score, bad):
    return torch.where(bad, torch.inf, score)


def misshapen(score, bad):
    return score if not bad.any() else score[None]


KINDS = [raises, not_a_number, infinite, misshapen]


@pytest.mark.parametrize("fail", KINDS)
def test_bad_pairs_are_dropped(small, tmp_path, notes, reward, fail):
    failing = Failing(fail, 0.03)
    config = small(
        tmp_path / "run", population=16, es=PAIRED, image=ImageSettings(chunk=5), heldout_every=0, steps=3,
        reward=reward(failing), on_bad_reward="drop-pair", eval_prompts=None,
    )  # fmt: skip
    failing.share, failing.late = 0.03, True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("esengine.run.train.compare_entries", lambda *args, **kwargs: _Empty())
        train(config, notes)
    dropped = [line["dropped_pairs"] for line in lines(tmp_path / "run")]
    assert failing.seen
    assert sum(dropped) > 0
    fitness = journals.fitness(tmp_path / "run")
    for each, pairs in zip(fitness, dropped, strict=True):
        zeros = [member for member, value in enumerate(each) if value == 0]
        assert len(zeros) == 2 * pairs
        assert all(member ^ 1 in zeros for member in zeros)
    assert [line for line in notes.said if "are left out of the update" in line]
    saved = checkpoint.load_latest(tmp_path / "run" / "checkpoints")
    assert all(tensor.isfinite().all() for tensor in saved.tensors.values() if tensor.is_floating_point())


class _Empty:
    settings = types.MappingProxyType({})

    def to_json(self):
        return "{}"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fail", KINDS)
def test_whichever_member_is_bad_at_whichever_step_the_adapter_stays_finite(
    small, tmp_path, monkeypatch, reward, fail, seed
):
    """One of twelve in some of three steps: its pair is dropped, or the run stops at the first such step."""
    draw, whole = random.Random(seed), Weighted.score
    bad = {step: draw.randrange(12) for step in draw.sample(range(3), draw.randint(1, 3))}
    asked = None

    def score(self, images, prompts, *, step=None, members=None):
        nonlocal asked
        asked = step, members or [-1] * len(images)
        return whole(self, images, prompts, step=step, members=members)

    def failing(images, prompts):
        step, members = asked
        return fail(brightness(images, prompts), torch.tensor([bad.get(step) == member for member in members]))

    monkeypatch.setattr(Weighted, "score", score)
    monkeypatch.setattr("esengine.run.train.compare_entries", lambda *args, **kwargs: _Empty())
    settings = dict(population=12, es=PAIRED, heldout_every=0, strip_every=0, steps=3, image=ImageSettings(chunk=5))
    settings["reward"] = reward(failing)
    train(small(tmp_path / "dropped", on_bad_reward="drop-pair", **settings))
    for step, fitness in enumerate(journals.fitness(tmp_path / "dropped")):
        zeros = [member for member, value in enumerate(fitness) if value == 0]
        assert zeros == (sorted((bad[step], bad[step] ^ 1)) if step in bad else [])
    with pytest.raises(RewardError, match=rf"reward own:score, step {min(bad)}, members? .*\b{bad[min(bad)]}\b"):
        train(small(tmp_path / "stopped", **settings))
    for run, step in (("dropped", 3), ("stopped", min(bad))):
        saved = checkpoint.load_latest(tmp_path / run / "checkpoints")
        assert saved.step == step
        assert all(tensor.isfinite().all() for tensor in saved.tensors.values() if tensor.is_floating_point())


@pytest.mark.parametrize("fail", KINDS)
def test_by_default_a_bad_reward_stops_the_run_and_it_resumes(small, outcome, tmp_path, reward, fail):
    whole = small(tmp_path / "whole", reward=reward(brightness), heldout_every=0)
    train(whole)
    calls = 0

    def third(images, prompts):
        nonlocal calls
        calls += 1
        return fail(brightness(images, prompts), torch.tensor([calls == 6] * len(images)))

    config = small(tmp_path / "run", reward=reward(third), heldout_every=0)
    with pytest.raises(RewardError, match=r"reward own:score, step 1, members? "):
        train(config)
    train(dataclasses.replace(config, resume=True))
    assert outcome(tmp_path / "run")["adapter"] == outcome(tmp_path / "whole")["adapter"]


def test_too_many_bad_images_stop_the_run_in_any_case(small, tmp_path, reward):
    config = small(
        tmp_path / "run", reward=reward(lambda images, prompts: torch.full((len(images),), torch.nan)),
        on_bad_reward="drop-pair", heldout_every=0,
    )  # fmt: skip
    with pytest.raises(RewardError, match=r"step 0: 1 of 8 images have no score, more than 10%; the first: reward own"):
        train(config)


def test_a_dead_reward_is_not_asked_for_every_image(small, tmp_path, reward):
    asked = []

    def dead(images, prompts):
        asked.append(len(images))
        raise RuntimeError("down")

    config = small(
        tmp_path / "run", population=16, es=ESSettings(prompts_per_step=3, repeats=4), image=ImageSettings(chunk=8),
        reward=reward(dead), on_bad_reward="drop-pair", heldout_every=0,
    )  # fmt: skip
    with pytest.raises(RewardError, match=r"step 0: 20 of 192 images have no score"):
        train(config)
    assert asked == ([8] + [1] * 8) * 2 + [8] + [1] * 4


def test_where_no_pair_is_whole_the_run_stops(small, tmp_path, reward):
    """Four bad images of 48 are few enough, but each member has one."""
    fresh = True

    def first_of_each(images, prompts):
        nonlocal fresh
        if len(images) > 1:
            fresh = True
            raise RuntimeError("not together")
        bad, fresh = fresh, False
        return brightness(images, prompts) * (torch.nan if bad else 1)

    config = small(
        tmp_path / "run", es=ESSettings(prompts_per_step=3, repeats=4), image=ImageSettings(chunk=12), strip_every=1,
        reward=reward(first_of_each), on_bad_reward="drop-pair", heldout_every=0,
    )  # fmt: skip
    with pytest.raises(RewardError, match="step 0: every antithetic pair has an image without a score"):
        train(config)
    assert checkpoint.load_latest(tmp_path / "run" / "checkpoints").step == 0
    assert lines(tmp_path / "run") == []


def test_held_out_and_compared_images_without_a_score_are_left_out_and_said(small, tmp_path, notes, reward):
    def no_owls(images, prompts):
        return brightness(images, prompts) / torch.tensor([prompt != "an owl" for prompt in prompts])

    config = small(tmp_path / "run", reward=reward(no_owls), on_bad_reward="drop-pair", steps=2)
    found = train(config, notes).comparison
    assert (found.prompts, found.settings["prompts_left_out"]) == (2, 1)
    measures = journals.measured(tmp_path / "run")
    for measure in measures:
        scores = measure["scores"]["own:score"]
        assert [score is None for score in scores["each"]] == [True, False, False]
        assert scores["mean"] == pytest.approx(sum(scores["each"][1:]) / 2)
    assert len(measures) == 2
    assert len([line for line in notes.said if "held out, 1 of 3 images are left out: reward own:score" in line]) == 2
    assert [line for line in notes.said if "1 prompts have an image without a score" in line]
    assert len(lines(tmp_path / "run")) == 2


@pytest.mark.parametrize("prompt_std", ["global", "own"])
def test_the_fitness_of_the_others_is_as_if_there_were_no_others(prompt_std):
    engine = object.__new__(Engine)
    engine.shaping, engine.prompt_std, engine.drop_pairs = "zscore", prompt_std, True
    scores = torch.randn(8, 3, 2, generator=torch.Generator().manual_seed(0))
    task = type("Task", (), {"shape": scores.shape, "images": scores.numel()})
    scores[5, 1, 0] = torch.nan
    kept = [0, 1, 2, 3, 6, 7]
    fitness = engine.fitness(task, scores)
    engine.drop_pairs = False
    with pytest.raises(ValueError, match="finite"):
        engine.fitness(task, scores)
    task.shape, task.images = (6, 3, 2), 36
    assert torch.equal(fitness[kept], engine.fitness(task, scores[kept]))
    assert fitness[[4, 5]].tolist() == [0, 0]


# ---- settings


def test_other_settings_are_refused_or_allowed_and_told(small, tmp_path, notes):
    config = small(tmp_path / "run", steps=2, heldout_every=0)
    train(config)
    other = dataclasses.replace(config, steps=3, resume=True, es=dataclasses.replace(config.es, sigma=0.02))
    with pytest.raises(RunError, match=r"es\.sigma: 0\.01 -> 0\.02.*--allow-change"):
        train(other)
    train(dataclasses.replace(other, allow_change=True), notes)
    assert [line for line in notes.said if "continues with other settings (es.sigma: 0.01 -> 0.02)" in line]
    rank = dataclasses.replace(other, steps=4, allow_change=True, lora=dataclasses.replace(other.lora, rank=3))
    with pytest.raises(RunError, match=r"layers differ.*; lora\.rank, .* cannot change, even with --allow-change"):
        train(rank)
    adam = dataclasses.replace(other, steps=4, allow_change=True, update=UpdateRule(optimizer="adam"))
    assert [line["step"] for line in lines(tmp_path / "run")] == [0, 1, 2]
    train(adam)


def test_one_image_at_a_time_no_bit_depends_on_the_chunk(small, outcome, tmp_path):
    for chunk in (2, 5):
        train(small(tmp_path / str(chunk), deterministic=True, image=ImageSettings(chunk=chunk), steps=2))
    assert outcome(tmp_path / "2") == outcome(tmp_path / "5")


# ---- a full disk


@pytest.mark.parametrize("at", range(0, 60, 6))
def test_on_a_full_disk_what_was_there_still_loads(small, tmp_path, monkeypatch, at):
    config = small(tmp_path / "run", steps=1, heldout_every=0, strip_every=0)
    train(config)
    before = checkpoint.load_latest(tmp_path / "run" / "checkpoints")
    sync, calls = os.fsync, 0

    def full(file):
        nonlocal calls
        calls += 1
        if calls > at // 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        train(dataclasses.replace(config, steps=3, resume=True, checkpoint_every=1))
    monkeypatch.undo()
    after = checkpoint.load_latest(tmp_path / "run" / "checkpoints")
    assert after.step >= before.step
    assert after.skipped == ()
    train(dataclasses.replace(config, steps=3, resume=True))


def test_a_full_disk_is_told_with_the_file(small, esengine, workspace, monkeypatch, prompt_files):
    train(small(workspace / "run", steps=1, heldout_every=0, strip_every=0))

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, _, err = esengine("train", "--run-dir", "run", "--resume", "--steps", "2")
    assert code == 1
    assert err.strip().splitlines()[-1] == ("esengine: error: run/journal.jsonl: No space left on device")


class Full:
    """Calls of the system that fail after so many; a write is made by half before it does."""

    def __init__(self, patch, left, names):
        self.left, self.calls = left, 0
        for name in names:
            patch.setattr(os, name, functools.partial(self.call, getattr(os, name)))
        patch.setattr(files, "open", functools.partial(Half, self), raising=False)

    def call(self, function, *args, **kwargs):
        self.calls += 1
        if self.calls > self.left:
            raise OSError(errno.ENOSPC, "No space left on device")
        return function(*args, **kwargs)


class Half(io.FileIO):
    def __init__(self, full, *args):
        super().__init__(*args)
        self.full = full

    def write(self, data):
        super().write(data[: len(data) // 2])
        return self.full.call(super().write, data[len(data) // 2 :])


WRITING = ("mkdir", "fsync", "rename")
"""Besides a write itself: a save calls each of them equally often, whatever was left by one before."""


@pytest.mark.parametrize(
    ("names", "least"), [(WRITING, 100), ((*WRITING, "open", "unlink", "rmdir"), 90)], ids=["writing", "pruning too"]
)
def test_a_hundred_times_the_disk_is_full_at_any_call(tmp_path, monkeypatch, names, least):
    """Of saving a checkpoint and pruning: whatever fails, two that are whole are there, and the next save works."""
    draw, failed, tensors = random.Random(0), 0, {"w": torch.arange(1000.0)}
    for step in (0, 1):
        checkpoint.save(tmp_path, step, tensors, {})
    with monkeypatch.context() as patch:
        all_calls = Full(patch, 10**6, names)
        checkpoint.save(tmp_path, 2, tensors, {})
    assert all_calls.calls == 8 if names == WRITING else all_calls.calls > 12
    for step in range(3, 103):
        old = checkpoint_folders(tmp_path)[0]
        with monkeypatch.context() as patch:
            Full(patch, draw.randrange(all_calls.calls), names)
            try:
                checkpoint.save(tmp_path, step, tensors | {"step": torch.tensor(step)}, {})
            except OSError:
                failed += 1
        assert checkpoint.load(old).step == path_step(old)
        found = checkpoint.load_latest(tmp_path)
        assert found.skipped == ()
        assert found.step in (path_step(old), step)
        assert checkpoint.load(checkpoint_folders(tmp_path)[1]).step < found.step
    assert failed >= least
    checkpoint.save(tmp_path, 103, tensors, {})
    assert len(list(tmp_path.iterdir())) == 2


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced, sync, rename = [], os.fsync, os.rename

    def fsync(descriptor):
        synced.append(os.fstat(descriptor).st_ino)
        sync(descriptor)

    def named(source, target):
        for path in (source, *source.iterdir()):
            assert path.stat().st_ino in synced
        rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", named)
    path = checkpoint.save(tmp_path, 1, {"w": torch.arange(9.0)}, {})
    assert len(list(path.iterdir())) == 2
    assert synced[-1] == tmp_path.stat().st_ino


# ---- hostile files


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("name", ["pytorch_lora_weights.bin", "pytorch_lora_weights.safetensors", "adapter_model.bin"])
def test_a_pickle_in_an_adapters_folder_is_not_executed(trained, esengine, workspace, name):
    (workspace / "bad").mkdir()
    (workspace / "bad" / name).write_bytes(pickle.dumps(Bomb()))
    code, _, err = esengine("eval", "--run-dir", trained[0].run_dir, "--adapter", "bad")
    assert code == 1
    assert err.strip().splitlines()[-1].startswith("esengine: error: ")
    assert not (workspace / "exploded").exists()


@pytest.mark.parametrize(
    "text",
    [
        "reward: !!python/object/apply:os.mkdir [exploded]\n",
        "!!python/object/new:os.mkdir [exploded]\n",
        "steps: &a [*a]\n",
        "a: &a [x, x]\nb: &b [*a, *a]\n",
        "steps: .inf\n",
        "es: {sigma: -1}\n",
        "steps: 0x\n",
        "? [a]\n: b\n",
        "\0",
        "reward: os:system\nsteps: [",
    ],
)
def test_a_hostile_configuration_is_refused_and_nothing_is_executed(esengine, workspace, text):
    (workspace / "bad.yaml").write_text(text)
    code, _, err = esengine("train", "--config", "bad.yaml", "--run-dir", "run")
    assert code in (1, 2)
    assert "Traceback" not in err
    assert sorted(path.name for path in workspace.iterdir()) == ["bad.yaml"]
