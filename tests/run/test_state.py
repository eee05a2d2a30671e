"""A run is not resumed from a checkpoint or a journal that no run leaves, and nothing in a checkpoint is run."""

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

import journals
import pytest
import safetensors.torch
import torch

from esengine.base.errors import RunError
from esengine.run import checkpoint
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
    "no contract": (lambda r: r["meta"].pop("contract"), "contract: expected int"),
    "no hash of the steps": (lambda r: r["meta"].pop("steps_sha256"), "steps_sha256: expected str, got NoneType"),
    "no hash": (lambda r: r["meta"].pop("adapter_sha256"), "adapter_sha256: expected str, got NoneType"),
    "contract in words": (lambda r: r["meta"].update(contract="1"), "contract: expected int, got str"),
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


def test_a_setting_that_is_newer_than_a_run_had_its_default(trained, run):
    def older(records):
        del records[0]["settings"]["es"]["prompt_std"], records[0]["settings"]["lora"]["alpha_pattern"]
        return records

    journals.rewrite(run, older)
    config = dataclasses.replace(trained[0], run_dir=run, resume=True, steps=5)
    with pytest.raises(RunError, match=r"es\.prompt_std: global -> own"):
        train(dataclasses.replace(config, es=dataclasses.replace(config.es, prompt_std="own")))
    train(config)
    assert latest(run / "checkpoints").step == 5


def test_config_yaml_is_a_copy_that_a_run_can_do_without(trained, run):
    copy = (run / "config.yaml").read_bytes()
    (run / "config.yaml").write_bytes(b"evil: [")
    train(dataclasses.replace(trained[0], run_dir=run, resume=True))
    assert (run / "config.yaml").read_bytes() == copy
    (run / "config.yaml").unlink()
    train(dataclasses.replace(trained[0], run_dir=run, resume=True))
    assert (run / "config.yaml").read_bytes() == copy


def test_a_checkpoint_of_another_run_is_refused(trained, small, run, tmp_path):
    train(small(tmp_path / "other", seed=5))
    shutil.copytree(tmp_path / "other" / "checkpoints", run / "checkpoints", dirs_exist_ok=True)
    with pytest.raises(RunError, match=r"step_00000004: expected one of this run, .* steps in .*journal\.jsonl"):
        train(dataclasses.replace(trained[0], run_dir=run, resume=True, steps=5))
    journals.rewrite(run, lambda records: [record for record in records if record["kind"] != "saved"])
    with pytest.raises(RunError, match="step_00000004: expected one of this run"):
        train(dataclasses.replace(trained[0], run_dir=run, resume=True, steps=5))


@pytest.mark.parametrize("setting", ["reward", "heldout_reward"])
def test_no_code_is_imported_that_a_checkpoint_or_an_adapter_names(trained, run, tmp_path, monkeypatch, setting):
    """Only the journal's settings name code, and a folder of a run is trusted with that by --resume alone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evilmod.py").write_text("open('imported', 'w')\ndef score(images, prompts): pass\n")
    for path in (run / "checkpoints").iterdir():
        rewrite(path, lambda r: r["meta"].update({"config": {setting: "evilmod:score"}, setting: "evilmod:score"}))
    train(dataclasses.replace(trained[0], run_dir=run, resume=True, steps=5))
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda steps: steps[:1] + steps[2:], "expected step 1, got 2"),
        (lambda steps: steps[:2] + steps[1:], "expected step 2, got 1"),
        (lambda steps: steps[:3], "expected (4 steps, got 3|step 3, got 4)"),
        (lambda steps: [], "expected step 0, got 4"),
        (lambda steps: [*steps[:3], {**steps[3], "fitness": steps[3]["fitness"][:-1]}], "expected a fitness of 4"),
        (lambda steps: [*steps[:3], {**steps[3], "fitness": [1.0, None, 1.0, 1.0]}], "fitness: expected a list of fin"),
    ],
)
def test_a_run_with_a_gap_in_its_journal_is_not_resumed_and_left_alone(trained, run, change, where):
    def kinds(records, *which):
        return [record for record in records if record["kind"] in which]

    journals.rewrite(run, lambda records: [records[0], *change(kinds(records, "step")), *kinds(records, "saved")[-1:]])
    before = (run / "journal.jsonl").read_bytes()
    with pytest.raises(RunError, match=where):
        train(dataclasses.replace(trained[0], run_dir=run, resume=True, steps=5))
    assert (run / "journal.jsonl").read_bytes() == before


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
    assert "journal.jsonl" in order[meta[0] : order.index("checkpoint", meta[0])]
