"""The stored curves are of the packaged model's training, and a training that parts from them is told."""

import json
from pathlib import Path

import pytest
from nano import training

from esengine.models import nano

PACKAGED = Path(nano.__file__).parent / "sana-sprint-nano"
STORED = json.loads(training.STORED.read_text(encoding="utf-8"))["curves"]


def work(folder, curves):
    for stage, rows in curves.items():
        lines = [json.dumps({**row, "seconds": 1.5}) for row in rows]
        (folder / f"{stage}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_the_stored_curves_end_as_the_packaged_model_says():
    packaged = json.loads((PACKAGED / "training.json").read_text(encoding="utf-8"))
    assert list(STORED) == list(training.STAGES)
    for stage, rows in STORED.items():
        last = {name: value for name, value in rows[-1].items() if name != "step"}
        assert (rows[-1]["step"], last) == (packaged[stage]["steps"], packaged[stage]["last"])


def test_the_card_says_how_far_a_second_training_went_and_agreed():
    again = json.loads((training.STORED.parent / "nano_training_again.json").read_text(encoding="utf-8"))
    assert all(stage["agree_up_to"] == stage["steps"] for stage in again["stages"].values())
    card = " ".join((PACKAGED / "README.md").read_text(encoding="utf-8").split())
    autoencoder, teacher, student = (again["stages"][stage]["steps"] for stage in training.STAGES)
    assert f"{autoencoder} steps of the autoencoder" in card
    assert f"{teacher} of the teacher and {student} of the student" in card


def test_a_training_is_compared_as_far_as_it_has_come(tmp_path, monkeypatch, capsys):
    begun = {"autoencoder": STORED["autoencoder"], "teacher": STORED["teacher"][:3]}
    monkeypatch.setattr("sys.argv", ["nano_training.py", str(work(tmp_path, begun)), "--json", str(tmp_path / "j")])
    assert training.main() == 0
    assert "teacher: 150 of 5000 steps, equal up to step 150\n" in capsys.readouterr().out
    stages = json.loads((tmp_path / "j").read_text())["stages"]
    assert stages["autoencoder"] == {"steps": 3200, "of": 3200, "agree_up_to": 3200}


@pytest.mark.parametrize(("at", "agree"), [(0, 0), (2, 100)])
def test_a_training_that_parts_is_told_with_the_step(tmp_path, monkeypatch, capsys, at, agree):
    rows = [dict(row) for row in STORED["student"][:4]]
    rows[at]["loss"] += 1e-12
    monkeypatch.setattr("sys.argv", ["nano_training.py", str(work(tmp_path, {"student": rows}))])
    assert training.main() == 1
    assert f"student: 200 of 1200 steps, equal up to step {agree}\n" in capsys.readouterr().out


def test_a_folder_without_a_curve_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["nano_training.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="found no curve in it"):
        training.main()
