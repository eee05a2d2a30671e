"""The plans of the nano experiments, and that the notes hold their records."""

import argparse
import json
from pathlib import Path

import nano_es
import pytest

from esengine.config import TrainConfig, from_dict, load, to_dict

RESULTS = Path(nano_es.__file__).parent / "results"
NOTES = (Path(nano_es.__file__).parent / "NANO.md").read_text(encoding="utf-8")


def test_a_change_reaches_its_setting_and_no_other():
    changed = nano_es.merged(nano_es.CENTRE, nano_es.setting("es.sigma", 0.5))
    assert changed["es"] == nano_es.CENTRE["es"] | {"sigma": 0.5}
    assert {**changed, "es": None} == {**nano_es.CENTRE, "es": None}
    assert to_dict(load("nano")) == nano_es.CENTRE


@pytest.mark.parametrize("plan", [nano_es.search_plan, nano_es.compare_plan])
def test_every_trial_of_a_plan_is_a_run_of_its_own(plan):
    trials = plan(argparse.Namespace(seeds=[0, 1]))
    assert len({(name, seed) for name, _, seed in trials}) == len(trials)
    runs = [from_dict(TrainConfig(), nano_es.merged(nano_es.CENTRE, change), name) for name, change, _ in trials]
    assert len({json.dumps(to_dict(run), sort_keys=True) for run in runs}) == len(trials) // 2


@pytest.mark.parametrize("file", ["nano_search.json", "nano_compare.json"])
def test_the_notes_have_the_stored_trials(file):
    record = json.loads((RESULTS / file).read_text(encoding="utf-8"))
    assert record["centre"] == nano_es.CENTRE
    rows = nano_es.table(record["trials"])
    assert len(rows) > 10
    assert [row for row in rows if row not in NOTES.splitlines()] == []


def test_every_seed_of_the_headline_gains_three_standard_errors_and_half_the_gap():
    report = json.loads((RESULTS / "nano_headline.json").read_text(encoding="utf-8"))["report"]
    (rows,) = (group["rows"] for group in report["groups"] if group["by"] == "overall")
    seeds = [row for row in rows if row["entry"].startswith("seed")]
    assert len(seeds) == 3
    for row in seeds:
        paired = row["against_first"]["checker"]
        assert paired["difference"] > 3 * paired["standard_error"]
        assert report["gap_closed"]["checker"]["share"][row["entry"]] > 0.5
