"""A run is not gone on with from a checkpoint or logs that no run leaves, and nothing in a checkpoint is run."""

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from esengine.base.errors import RunError
from esengine.base.progress import Progress
from esengine.cli import main
from esengine.run import checkpoint
from esengine.run.log import require_steps
from esengine.run.state import latest
from esengine.run.train import train


@pytest.fixture
def run(trained, tmp_path):
    """A copy of a run with checkpoints of steps 2 and 4."""
    return shutil.copytree(trained[1].folder, tmp_path / "run")


def rewrite(path, record=lambda record: None, tensors=lambda tensors: None):
    """A checkpoint whose checksums hold, with another content."""
    found = json.loads((path / "meta.json").read_text())
    state = safetensors.torch.load((path / "state.safetensors").read_bytes())
    tensors(state)
    record(found)
    data = safetensors.torch.save(state)
    signed = {key: found[key] for key in ("format", "step", "meta")}
    for name, content in (("meta_sha256", checkpoint._json(signed)), ("sha256", data)):
        found[name] = hashlib.sha256(content).hexdigest()
    (path / "state.safetensors").write_bytes(data)
    (path / "meta.json").write_bytes(checkpoint._json(found) + b"\n")


def nan(tensors):
    tensors[min(tensors)].view(-1)[0] = float("nan")


RECORDS = {
    "step of another folder": (lambda r: r.update(step=2), "expected the step of its folder, got 2"),
    "negative step": (lambda r: r.update(step=-5), "got -5"),
    "half a step": (lambda r: r.update(step=4.0), r"got 4\.0"),
    "step in words": (lambda r: r.update(step="4"), "got '4'"),
    "list of meta": (lambda r: r.update(meta=[]), "corrupt"),
    "no config": (lambda r: r["meta"].pop("config"), "config: expected dict, got NoneType"),
    "list of config": (lambda r: r["meta"].update(config=[]), "config: expected dict, got list"),
    "no contract": (lambda r: r["meta"].pop("contract"), "contract: expected int"),
    "no rewards": (lambda r: r["meta"].pop("rewards"), "rewards: expected dict"),
    "environment": (lambda r: r["meta"].update(environment=5), "environment: expected dict, got int"),
    "limit in words": (lambda r: r["meta"].update(limit="x"), "limit: expected None or an integer"),
    "negative limit": (lambda r: r["meta"].update(limit=-3), "limit: expected None or an integer"),
    "half a scoring limit": (lambda r: r["meta"].update(scoring_limit=0.5), "scoring_limit: expected None or an"),
}
TENSORS = {
    "NaN": (nan, "expected finite numbers"),
    "half": (lambda t: t.update({k: v.half() for k, v in t.items()}), "expected float32, got float16"),
    "integers": (lambda t: t.update({k: v.long() for k, v in t.items()}), "expected float32, got int64"),
    "no part": (lambda t: t.update(zzz=torch.ones(1)), "tensor zzz: expected a name that begins with adapter"),
    "other part": (lambda t: t.update({"evil/x": torch.ones(1)}), "tensor evil/x: expected a name"),
}


@pytest.mark.parametrize(
    ("changes", "why"),
    [(dict(record=change), why) for change, why in RECORDS.values()]
    + [(dict(tensors=change), why) for change, why in TENSORS.values()],
    ids=[*RECORDS, *TENSORS],
)
def test_a_checkpoint_that_no_run_writes_is_passed_over_and_named(run, changes, why):
    newest = run / "checkpoints" / "step_00000004"
    assert latest(run / "checkpoints").path == newest
    rewrite(newest, **changes)
    found = latest(run / "checkpoints")
    assert (found.step, [path for path, _ in found.skipped]) == (2, [newest])
    assert "step_00000004" in found.skipped[0][1]
    with pytest.raises(RunError, match=why):
        raise RunError(found.skipped[0][1])


def test_a_setting_that_is_newer_than_a_checkpoint_had_its_default(trained, run):
    def older(record):
        del record["meta"]["config"]["es"]["prompt_std"], record["meta"]["config"]["lora"]["alpha_pattern"]

    for path in (run / "checkpoints").iterdir():
        rewrite(path, older)
    config = dataclasses.replace(trained[0], run_dir=run, resume=True, steps=5)
    with pytest.raises(RunError, match=r"es\.prompt_std: global -> own"):
        train(dataclasses.replace(config, es=dataclasses.replace(config.es, prompt_std="own")))
    train(config)
    assert latest(run / "checkpoints").step == 5


@pytest.mark.parametrize("part", ["image", "es", "lora", "dtype", "model", "heldout_reward"])
def test_settings_of_a_checkpoint_are_compared_with_and_never_used(trained, run, part, monkeypatch):
    rewrite(run / "checkpoints" / "step_00000004", lambda r: r["meta"]["config"].update({part: "zzz"}))
    settings = (run / "config.yaml").read_text()
    config = dataclasses.replace(trained[0], run_dir=run, resume=True, steps=5)
    if part not in ("model", "heldout_reward"):  # names: what a model holds is compared by hash
        (run / "config.yaml").unlink()
        with pytest.raises(RunError, match=f"was trained with other settings .*{part}"):
            train(config)
        (run / "config.yaml").write_text(settings)
    notes = []
    monkeypatch.setattr(Progress, "note", lambda self, text: notes.append(text))
    train(config)  # the run's own config.yaml has these settings: it was changed, and killed before a checkpoint
    warned = [note for note in notes if "other settings" in note and part in note]
    assert len(warned) == (part not in ("model", "heldout_reward"))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("setting", ["reward", "heldout_reward"])
def test_no_code_is_imported_that_a_checkpoint_names(trained, run, tmp_path, monkeypatch, capsys, setting, signed):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evilmod.py").write_text("open('imported', 'w')\ndef score(images, prompts): pass\n")
    (run / "config.yaml").unlink()
    for path in (run / "checkpoints").iterdir():
        if signed:
            rewrite(path, lambda r: r["meta"]["config"].update({setting: "evilmod:score"}))
        else:
            meta = path / "meta.json"
            old = json.loads(meta.read_text())["meta"]["config"][setting]
            meta.write_text(meta.read_text().replace(f'"{setting}": "{old}"', f'"{setting}": "evilmod:score"'))
    flags = ["--model", "tiny", "--prompts", str(trained[0].prompts), "--eval-prompts", str(trained[0].eval_prompts)]
    assert main(["train", "--resume", "--run-dir", str(run), "--steps", "5", "--es.prompts-per-step", "2", *flags]) == 1
    assert not (tmp_path / "imported").exists()
    expected = "its config.yaml is gone, give them again" if signed else "meta.json: corrupt"
    assert expected in capsys.readouterr().err


class Folder:
    def __init__(self, path):
        self.metrics, self.fitness = path / "metrics.jsonl", path / "fitness.jsonl"


@pytest.mark.parametrize("name", ["metrics.jsonl", "fitness.jsonl"])
@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda lines: lines[:1] + lines[2:], "line 2: expected step 1, got 2"),
        (lambda lines: lines[:2] + lines[1:], "line 3: expected step 2, got 1"),
        (lambda lines: lines[:3], "line 4: expected step 3, got the file's end"),
        (lambda lines: [], "line 1: expected step 0, got the file's end"),
        (lambda lines: None, "line 1: expected step 0, got the file's end"),
        (lambda lines: ["[" * 100_000 + "\n", *lines], "line 1: expected step 0, got no record"),
        (lambda lines: ['{"step": true}\n', *lines[1:]], "line 1: expected step 0, got no record"),
    ],
)
def test_logs_with_a_gap_or_a_step_twice_are_refused_and_left_alone(run, name, change, why):
    require_steps(Folder(run), 4)
    changed = change((run / name).read_text().splitlines(keepends=True))
    (run / name).unlink()
    if changed is not None:
        (run / name).write_text("".join(changed))
    with pytest.raises(RunError, match=f"{name}, {why}"):
        require_steps(Folder(run), 4)
    assert (run / name).exists() is (changed is not None)


@pytest.mark.parametrize("fitness", [None, {}, [1.0, None], [float("nan")], ["1"], [True]])
def test_a_step_without_its_fitness_is_refused(run, fitness):
    lines = (run / "fitness.jsonl").read_text().splitlines(keepends=True)
    (run / "fitness.jsonl").write_text("".join([*lines[:3], json.dumps({"step": 3, "fitness": fitness}) + "\n"]))
    with pytest.raises(RunError, match=r"fitness\.jsonl, line 4: expected step 3, got it without a fitness of finite"):
        require_steps(Folder(run), 4)


def test_a_run_with_a_gap_in_its_logs_is_not_gone_on_with(trained, run):
    lines = (run / "fitness.jsonl").read_text().splitlines(keepends=True)
    (run / "fitness.jsonl").write_text("".join(lines[:1] + lines[2:]))
    with pytest.raises(RunError, match=r"fitness\.jsonl, line 2: expected step 1, got 2"):
        train(dataclasses.replace(trained[0], run_dir=run, resume=True, steps=5))


def test_logs_are_on_the_disk_before_a_checkpoint_is(small, tmp_path, monkeypatch):
    order, sync, write = [], os.fsync, checkpoint.write_synced

    def fsync(descriptor):
        order.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        sync(descriptor)

    def write_synced(path, data):
        order.append("checkpoint")
        write(path, data)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(checkpoint, "write_synced", write_synced)
    train(small(tmp_path / "run", steps=1, heldout_every=0, strip_every=0))
    meta = [place for place, name in enumerate(order) if name == "meta.json"]
    assert len(meta) == 2
    assert {"metrics.jsonl", "fitness.jsonl"} <= set(order[meta[0] : order.index("checkpoint", meta[0])])
