"""Columns of prompt files on their way through a run, the trial of rewards, and what the run says of the prompts."""

import dataclasses
import json

import journals
import pytest
import torch

from esengine.base.errors import ConfigError, RewardError, RunError
from esengine.base.progress import Progress
from esengine.cli.eval import evaluate
from esengine.cli.settings import EvalConfig
from esengine.run import prepare as preparing
from esengine.run.replay import replay
from esengine.run.settings import ESSettings, ReplayConfig
from esengine.run.train import train

TRAIN = [("a cat", "CAT"), ("a cat", "DOG"), ("a sign", "é\n1")]
HELD = [("an owl", "OWL"), ("an owl", "EULE"), ("a lamp", None)]


def write(path, rows, column="target"):
    path.write_text("".join(json.dumps({"prompt": prompt, column: target}) + "\n" for prompt, target in rows))
    return path


@pytest.fixture
def files(tmp_path):
    return dict(
        prompts=write(tmp_path / "t.jsonl", TRAIN),
        eval_prompts=write(tmp_path / "h.jsonl", HELD),
        es=ESSettings(prompts_per_step=3, repeats=1),
    )


def brightness(images, prompts):
    return images.float().mean(dim=(1, 2, 3)) / 255


@pytest.fixture
def seeing(reward):
    """A reward that notes each (prompt, target) that it is given, and prefers some targets."""
    seen = []

    def score(images, prompts, metadata):
        seen.append([(prompt, columns.get("target")) for prompt, columns in zip(prompts, metadata, strict=True)])
        return brightness(images, prompts) * torch.tensor([len(each.get("target") or "") for each in metadata])

    return reward(score, trial=True), seen


def test_each_image_comes_with_the_columns_of_its_prompt(small, files, tmp_path, seeing):
    name, seen = seeing
    config = small(tmp_path / "run", steps=1, reward=name, **files)
    train(config)
    pairs = [pair for batch in seen for pair in batch]
    assert seen[:2] == [TRAIN[:2], HELD[:2]]  # the trial
    assert seen[2] == HELD  # the first measure
    in_the_step = [pair for batch in seen[3:7] for pair in batch]
    assert sorted(in_the_step, key=str) == sorted(TRAIN * 4, key=str)  # 4 members
    assert [pair for pair in pairs if pair not in TRAIN + HELD] == []
    assert pairs[-6:] == HELD * 2  # the comparison
    (measured, _) = journals.measured(config.run_dir)
    assert len(measured["scores"][name]["each"]) == 3


def test_one_prompt_with_two_targets_is_two_prompts(small, files, tmp_path, reward):
    def score(images, prompts, metadata):
        return [len(prompt) + ord(each["target"][0]) for prompt, each in zip(prompts, metadata, strict=True)]

    config = small(tmp_path / "run", steps=1, reward=reward(score), heldout_every=0, strip_every=0, **files)
    write(config.eval_prompts, HELD[:2])
    train(config)
    (step,) = journals.steps(config.run_dir)
    assert step["reward"] == pytest.approx(sum(len(prompt) + ord(target[0]) for prompt, target in TRAIN) / 3)


def test_a_changed_target_is_a_changed_prompt_on_resume(small, files, tmp_path, seeing):
    config = small(tmp_path / "run", steps=1, reward=seeing[0], heldout_every=0, strip_every=0, **files)
    train(config)
    again = dataclasses.replace(config, resume=True, steps=2)
    for rows, column in ((TRAIN[::-1], "target"), ([*TRAIN[:2], ("a sign", "2")], "target"), (TRAIN, "other")):
        write(config.prompts, rows, column)
        with pytest.raises(RunError, match="prompts: the file's") as caught:
            train(again)
        assert "--allow-change" in str(caught.value)
    write(config.prompts, TRAIN)
    train(again)
    assert replay(ReplayConfig(config.run_dir), Progress()).agreed == 2


def test_a_run_of_an_older_version_goes_on(small, files, tmp_path, seeing):
    config = small(tmp_path / "run", steps=1, reward=seeing[0], heldout_every=0, strip_every=0, **files)
    train(config)
    path = config.run_dir / "journal.jsonl"
    first, *rest = path.read_text().splitlines(keepends=True)
    record = json.loads(first)
    (holder,) = [each for each in (record, *record.values()) if isinstance(each, dict) and "identity" in each]
    del holder["identity"]["metadata_sha256"]
    path.write_text(json.dumps(record) + "\n" + "".join(rest))
    train(dataclasses.replace(config, resume=True, steps=2))


def test_changed_held_out_columns_begin_a_new_series(small, files, tmp_path, seeing, notes):
    config = small(tmp_path / "run", steps=1, reward=seeing[0], strip_every=0, **files)
    train(config)
    write(config.eval_prompts, [*HELD[:2], ("a lamp", "LAMP")])
    train(dataclasses.replace(config, resume=True, steps=2), notes)
    assert any("held-out prompts or rewards have changed" in line for line in notes.said)


def test_an_evaluation_has_the_columns_too(small, files, tmp_path, seeing, notes):
    name, seen = seeing
    config = small(tmp_path / "run", steps=1, reward=name, heldout_every=0, strip_every=0, **files)
    train(config)
    del seen[:]
    out = tmp_path / "out"
    evaluate(EvalConfig(run_dir=config.run_dir, out=out, repeats=1), notes)
    assert seen[0] == HELD[:2]
    assert [pair for batch in seen[1:] for pair in batch] == HELD * 2
    write(config.eval_prompts, [*HELD[:2], ("a lamp", "LAMP")])
    with pytest.raises(RunError, match="prompts_sha256"):
        evaluate(EvalConfig(run_dir=config.run_dir, out=out, repeats=1), notes)


# ---- the trial of a reward

WRONG = {
    "raises": (lambda images, prompts: 1 / 0, "raised ZeroDivisionError"),
    "one number": (lambda images, prompts: images.float().mean(), r"float32 \[\]"),
    "text": (lambda images, prompts: ["0.5", "0.5"], "'0.5' for image 0"),
    "column": (lambda images, prompts, metadata: [each["nosuch"] for each in metadata], "raised KeyError: 'nosuch'"),
}


@pytest.fixture
def nothing_large(monkeypatch):
    """Loading the model is an error."""

    def load(*args, **options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(preparing, "load_model", load)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_reward_is_told_before_the_model_loads(small, files, tmp_path, reward, nothing_large, name):
    score, words = WRONG[name]
    config = small(tmp_path / "run", reward=f"{reward(score, trial=True)},jpeg_compressibility=0", **files)
    with pytest.raises(RewardError, match=words) as caught:
        train(config)
    assert caught.value.reward == "own:score"
    assert "two dummy images" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (config.run_dir / "journal.jsonl").exists()


def test_the_trial_has_the_size_of_the_run_and_records_nothing(small, files, tmp_path, reward):
    shapes = []

    def score(images, prompts):
        shapes.append(tuple(images.shape))
        images.zero_()
        return [None, float("inf")] if len(shapes) == 1 else brightness(images, prompts) + len(shapes)

    image = dataclasses.replace(small(tmp_path).image, height=32, width=64)
    options = dict(image=image, steps=1, heldout_every=0, strip_every=0, **files)
    train(small(tmp_path / "run", reward=reward(score, trial=True), **options))
    assert shapes[0] == (2, 3, 32, 64)
    assert {shape[2:] for shape in shapes} == {(32, 64)}
    (step,) = journals.steps(tmp_path / "run")
    assert step["reward"] >= 2


def test_a_light_reward_is_tried_before_one_that_loads_a_model_is_built(small, files, tmp_path, reward, nothing_large):
    name = reward(WRONG["raises"][0], trial=True)
    with pytest.raises(RewardError, match="own:score"):
        train(small(tmp_path / "run", reward=f"pickscore(model=/nosuch),{name}", **files))
    with pytest.raises(ConfigError, match="nosuch"):
        train(small(tmp_path / "run", reward="pickscore(model=/nosuch)", **files))


def test_the_models_path_is_looked_at_before_rewards_are_built(small, files, tmp_path):
    with pytest.raises(ConfigError, match="/nosuch/model"):
        train(small(tmp_path / "run", model="/nosuch/model", reward="nosuch_module:score", **files))


def test_where_a_reward_may_fail_so_may_its_trial(small, files, tmp_path, reward, notes):
    calls = []

    def score(images, prompts):
        calls.append(len(images))
        if len(calls) == 1:
            raise OSError("the service is down")
        return brightness(images, prompts)

    options = dict(on_bad_reward="drop-pair", steps=1, heldout_every=0, strip_every=0, **files)
    train(small(tmp_path / "run", reward=reward(score, trial=True), **options), notes)
    assert len([line for line in notes.said if "own:score" in line and "the service is down" in line]) == 1


def test_a_reward_can_do_without_a_trial(small, files, tmp_path, reward):
    sizes = []

    def score(images, prompts):
        sizes.append(len(images))
        return brightness(images, prompts)

    train(small(tmp_path / "run", reward=reward(score), steps=1, heldout_every=0, strip_every=0, **files))
    assert sizes[0] == 3  # a chunk


# ---- prompts


def test_prompts_that_are_cut_are_told_once_for_each_list(small, tmp_path, notes):
    (tmp_path / "t.txt").write_text("a cat\n" + "long words " * 300 + "\n" + "b" * 900 + "\na dog\n")
    (tmp_path / "h.txt").write_text("long words " * 300 + "\nan owl\n")
    config = small(tmp_path / "run", steps=1, heldout_every=0, strip_every=0)
    config = dataclasses.replace(config, prompts=tmp_path / "t.txt", eval_prompts=tmp_path / "h.txt")
    for again in (config, dataclasses.replace(config, run_dir=tmp_path / "again")):  # then from the cache
        del notes.said[:]
        train(again, notes)
        assert [line for line in notes.said if "tokens" in line] == [
            "warning: 2 of 4 prompts are longer than 300 tokens and are cut",
            "warning: 1 of 2 held-out prompts is longer than 300 tokens and is cut",
        ]


def test_more_prompts_a_step_than_there_are_names_the_file(small, files, tmp_path):
    with pytest.raises(ConfigError, match=r"prompts, 3, got 4; .*t\.jsonl") as caught:
        train(small(tmp_path / "run", **(files | {"es": ESSettings(prompts_per_step=4)})))
    assert caught.value.setting == "es.prompts_per_step"


def test_three_prompts_and_no_other_flag_train(esengine, tmp_path):
    (tmp_path / "three.txt").write_text("a red circle\na green cross\na blue square\n")
    flags = ("--heldout-every", 0, "--strip-every", 0, "--steps", 1, "--population", 4, "--eval-prompts", "three.txt")
    code, _, told = esengine("train", "--prompts", "three.txt", "--run-dir", "run", *map(str, flags))
    assert code == 0
    assert "3 a step (all of them; the default of es.prompts_per_step is 8)" in told
    assert "prompts_per_step: 3" in (tmp_path / "run" / "config.yaml").read_text()
    code, _, told = esengine("train", "--prompts", "three.txt", "--run-dir", "b", "--es.prompts_per_step", "5")
    assert code != 0
    assert "--es.prompts_per_step: " in told
    assert "three.txt" in told
