"""The plans of the nano experiments, and that the notes hold their records."""

import argparse
import json
import statistics
from pathlib import Path

import journals
import pytest
from nano import dissect, es, headline

from esengine.base.settings_file import from_dict
from esengine.run.settings import TrainConfig, load, to_dict

RESULTS = Path(es.__file__).parents[1] / "results"
NOTES = (Path(es.__file__).parents[1] / "NANO.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def made_of():
    return json.loads(json.dumps(es.made_of()))


def read(file):
    return json.loads((RESULTS / file).read_text(encoding="utf-8"))


def test_a_change_reaches_its_setting_and_no_other():
    changed = es.merged(es.CENTRE, es.setting("es.sigma", 0.5))
    assert changed["es"] == es.CENTRE["es"] | {"sigma": 0.5}
    assert {**changed, "es": None} == {**es.CENTRE, "es": None}


@pytest.mark.parametrize("plan", [plan for plan, _ in es.TRIALS.values()])
def test_every_trial_of_a_plan_is_a_run_of_its_own(plan):
    trials = plan(argparse.Namespace(seeds=[0, 1]))
    assert len({(name, seed) for name, _, seed in trials}) == len(trials)
    made = [es.merged(es.CENTRE, change) | {"seed": seed} for _, change, seed in trials]
    runs = [from_dict(TrainConfig(), settings, "trial") for settings in made]
    assert len({json.dumps(to_dict(run), sort_keys=True) for run in runs}) == len(trials)


@pytest.mark.parametrize("file", [f"nano_{command}.json" for command in es.TRIALS])
def test_the_notes_have_the_stored_trials(file, made_of):
    record = es.made_from(read(file))
    assert {name: record[name] for name in made_of} == made_of  # the packaged model and judges, and today's centre
    rows = es.table(record["trials"])
    assert len(rows) > 10
    assert [row for row in rows if row not in NOTES.splitlines()] == []


def test_the_notes_have_what_a_makes_of_the_inputs_and_the_adapters_taken_apart():
    rows = es.reach_table(read("nano_reach.json")["squared_length"])
    taken_apart = read("nano_dissect.json")["report"]
    rows += dissect.table(taken_apart)
    assert len(rows) > 20
    assert [row for row in rows if row not in NOTES.splitlines()] == []
    assert len(taken_apart["settings"]["adapters"]) == len(taken_apart["entries"]) - 2
    headline = read("nano_headline.json")["report"]["settings"]["adapters"]
    assert headline.items() <= taken_apart["settings"]["adapters"].items()


def test_a_finished_run_of_the_headline_is_kept_and_another_is_refused(tmp_path):
    settings = es.merged(to_dict(load("nano")), headline.HEADLINE)
    chosen = {"device": "cpu", "dtype": "float32", "heldout_reward": "clip_text(model=nano)", "image": {"chunk": 64}}
    saved = from_dict(TrainConfig(), es.merged(settings, {**chosen, "seed": 2}), "run")
    journals.begin(tmp_path, **to_dict(saved))
    (tmp_path / "eval.json").touch()
    assert headline._seed(2, tmp_path, settings) is None
    with pytest.raises(SystemExit, match=r"other settings \(seed: 2 -> 1\)"):
        headline._seed(1, tmp_path, settings)


def test_a_trials_file_is_gone_on_with_at_any_number_of_images(tmp_path, monkeypatch, made_of, capsys):
    plan, (steps, images) = [("centre", {}, 0)], es.length({}, 1000)
    assert (steps, images) == (4, 1024)
    kept = {"change": {}, "seed": 0, "steps": steps, "images": images, "seconds": 1.0, "gain": {}}
    stored = tmp_path / "trials.json"
    stored.write_text(json.dumps({**made_of, "trials": {"centre, seed 0": kept}}))
    monkeypatch.setattr(es, "made_of", lambda: made_of)
    options = argparse.Namespace(json=stored, command="search", images=1000, processes=1)
    es.trials(plan, options)
    shown = capsys.readouterr().out
    assert "Images a trial: 1024.\n" in shown
    assert "| centre | 0 |" in shown
    with pytest.raises(SystemExit, match=r"expected .*'images': 2048.*, got .*'images': 1024"):
        es.trials(plan, argparse.Namespace(**{**vars(options), "images": 2000}))


def test_trials_of_another_model_are_not_gone_on_with(tmp_path, monkeypatch, made_of):
    stored = tmp_path / "trials.json"
    stored.write_text(json.dumps({**made_of, "model": "another", "trials": {"centre, seed 0": {}}}))
    monkeypatch.setattr(es, "made_of", lambda: made_of)
    options = argparse.Namespace(json=stored, command="search", images=1, processes=1)
    with pytest.raises(SystemExit, match=r"expected trials of this model"):
        es.trials([("centre", {}, 0)], options)


def above(row, judge):
    """By how many standard errors an entry is above the first."""
    return row["against_first"][judge]["difference"] / row["against_first"][judge]["standard_error"]


def test_every_seed_of_the_headline_gains_three_standard_errors_and_half_the_gap(made_of):
    record = read("nano_headline.json")
    report = record["report"]
    assert es.completed(record["config"]) == es.merged(to_dict(load("nano")), headline.HEADLINE)
    assert made_of["model"] in json.dumps(report["settings"])
    (rows,) = (group["rows"] for group in report["groups"] if group["by"] == "overall")
    seeds = [row for row in rows if row["entry"].startswith("seed")]
    assert len(seeds) == 3
    for row in seeds:
        assert above(row, "combined") > 3
        assert report["gap_closed"]["combined"]["share"][row["entry"]] > 0.5
    for row in rows:  # the stored scores are what the means are of
        for judge, mean in row["mean"].items():
            assert statistics.mean(record["scores"][row["entry"]][judge]) == pytest.approx(mean, rel=1e-5)


def test_the_adapters_of_the_headline_gain_on_fresh_captions_too():
    report = read("nano_fresh.json")["report"]
    assert report["settings"]["adapters"] == read("nano_headline.json")["report"]["settings"]["adapters"]
    (rows,) = (group["rows"] for group in report["groups"] if group["by"] == "overall")
    for row in rows[1:]:
        gain = row["against_first"]["combined"]
        assert above(row, "combined") > 3
        assert f"{gain['difference']:+.3f} ± {gain['standard_error']:.3f}".removeprefix("+") in NOTES


def test_two_steps_are_three_standard_errors_above_one_and_the_truth_above_both(made_of):
    record = read("nano_base.json")
    assert record["model"] == made_of["model"]
    for judge in ("checker", "pickscore"):
        found = record["scores"][judge]
        gap = found["2 steps"]["above_first"]
        assert gap["mean"] > 3 * gap["standard_error"]
        assert found["drawn"]["mean"] > found["2 steps"]["mean"]
    aesthetic, clean = (record["scores"][judge] for judge in ("aesthetic", "no_artifacts"))
    assert aesthetic["drawn"]["mean"] > aesthetic["1 step"]["mean"]
    assert clean["drawn"]["mean"] > clean["1 step"]["mean"]


def test_the_demo_gains_three_standard_errors_on_every_seed(made_of):
    record = read("cpu_demo.json")
    assert (record["model"], es.completed(record["config"])) == (made_of["model"], to_dict(load("nano")))
    assert len(record["runs"]) == 3
    for run in record["runs"].values():
        assert above(run["groups"][0]["rows"][1], "combined") > 3


def test_the_checker_does_not_fall_where_another_judge_is_optimised():
    trials = read("nano_settle.json")["trials"]
    gains = [found["gain"] for name, found in trials.items() if "reward pickscore" in name]
    assert len(gains) == 2
    for gain in gains:
        assert gain["pickscore"]["difference"] > 3 * gain["pickscore"]["standard_error"]
        assert gain["checker"]["difference"] > -2 * gain["checker"]["standard_error"]
