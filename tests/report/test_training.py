"""The page of a run: finished, going on, interrupted, damaged; and the command that finds out what a folder is."""

import json
import re
import shutil

import journals
import pytest

from esengine.base.errors import RunError
from esengine.report import write_training_page
from esengine.report.words import NONE, TIMES, count, figure, signed


@pytest.fixture
def finished(run_folder, tmp_path):
    return run_folder(tmp_path / "run")


def words(folder) -> str:
    found = write_training_page(folder).read_text(encoding="utf-8")
    return " ".join(re.sub("<[^>]*>", " ", found.replace("<wbr>", "")).split())


def tiles(folder) -> list[list[str]]:
    found = write_training_page(folder).read_text(encoding="utf-8")
    return re.findall(r"<div><dt>(.*?)</dt><dd>(.*?)</dd><dd class=\"aside\">(.*?)</dd></div>", found)


def gain_of(folder, score) -> tuple[str, str]:
    """Difference ± standard error of eval.json, and how many prompts it is of."""
    (group,) = (each for each in json.loads((folder / "eval.json").read_text())["groups"] if each["by"] == "overall")
    row = group["rows"][-1]
    paired = row["against_first"][score]
    prompts = count(row["count"], "held-out prompt")
    return f"{signed(paired['difference'])} ± {figure(paired['standard_error'])}", prompts


def titles(folder) -> list[str]:
    found = write_training_page(folder).read_text(encoding="utf-8")
    return re.findall(r'<figure class="chart">\s*<h3>(.*?)</h3>', found)


def test_a_finished_run(finished):
    text = words(finished)
    assert "12 of 12 steps. Model tiny, reward pickscore." in text
    assert "21.0000 +0.5000 ± 0.1000 wins 75%" in text
    assert f"8 members {TIMES} 2 prompts {TIMES} 3 repeats" in text
    assert "The rewards diverge at step 8: on held-out prompts pickscore is up and clip_text down" in text
    assert text.count("diverges") == 1
    assert "seed 7 default 0" in text
    assert "es.sigma 0.01 es" not in text
    assert "es.sigma 0.01 default" not in text
    assert "setting_of_another_version yes" in text
    assert "versions.torch 2.13.0" in text
    assert titles(finished) == [
        *("Reward", "Spread of the population", "pickscore", "clip_text", "pickscore (optimised)", "clip_text"),
        *("gradient norm", "step norm", "adapter norm", "images per second", "Seconds a step, by part", "own figure"),
    ]


def with_settings(record, **changes):
    return {**record, "settings": record["settings"] | changes} if record["kind"] == "start" else record


def test_the_first_tile_is_the_held_out_gain_of_the_comparison(finished):
    gain, prompts = gain_of(finished, "pickscore")
    assert gain == "+0.5000 ± 0.1000"
    assert tiles(finished)[0] == ("held-out gain", gain, f"pickscore, adapter over base, on {prompts}")
    assert "since the first step" not in words(finished)


@pytest.mark.parametrize(
    ("reward", "scores", "optimised"),
    [
        ("clip_text=0,pickscore", ["clip_text", "pickscore"], "pickscore"),
        ("pickscore,clip_text=0.5", ["pickscore", "clip_text", "combined"], "combined"),
        ("combined(pickscore=2)", ["pickscore", "combined"], "combined"),
        ("not) a reward", ["pickscore"], None),
    ],
)
def test_the_gain_is_of_the_optimised_score(finished, reward, scores, optimised):
    journals.rewrite(finished, lambda records: [with_settings(each, reward=reward) for each in records])
    record = json.loads((finished / "eval.json").read_text())
    base, adapter = record["groups"][0]["rows"]
    for at, score in enumerate(scores):
        base["mean"][score] = adapter["mean"][score] = 20
        paired = {"difference": 0.01 * (at + 1), "standard_error": 0.001, "win_rate": 0.5}
        adapter["against_first"][score] = paired
    (finished / "eval.json").write_text(json.dumps({**record, "scores": scores}))
    what, shown, aside = tiles(finished)[0]
    if optimised is None:
        assert what != "held-out gain"
        assert "The held-out gain is not measured yet." in words(finished)
    else:
        assert (what, shown) == ("held-out gain", gain_of(finished, optimised)[0])
        assert aside.startswith(f"{optimised}, ")


def test_before_the_comparison_the_gain_is_of_the_last_held_out_measure(run_folder, tmp_path):
    folder = run_folder(tmp_path / "run", 9, finished=False)
    assert tiles(folder)[0] == ("held-out gain", "+0.8000 ± 0.0200", "pickscore, from step 0 to step 8")

    def each(records):
        for record in records:
            if record["kind"] == "held_out":
                record["scores"]["pickscore"]["each"] = [20.0, None, 21.0, 22.0]
                record["scores"]["clip_text"]["each"] = [0.5] * 4
                if "of" in record:
                    record["of"]["prompts"] = list("abcd")
        return records

    journals.rewrite(folder, each)
    aside = f"pickscore, on {count(3, 'held-out prompt')} from step 0 to step 8"
    assert tiles(folder)[0] == ("held-out gain", "+0.8000 ± 0.0200", aside)
    journals.rewrite(folder, lambda records: [r for r in records if r["kind"] != "held_out" or r["step"] == 0])
    assert tiles(folder)[0][0] == "images a step"
    assert "The held-out gain is not measured yet." in words(folder)


def test_base_beside_adapter(finished):
    found = write_training_page(finished).read_text(encoding="utf-8")
    assert re.findall(r'<section id="(\w+)">', found)[:3] == ["table", "beside", "rewards"]
    (finished / "comparison.png").unlink()
    assert "Base beside adapter" not in words(finished)


@pytest.mark.parametrize("value", [b"1e308", b"-1e308", b"1" + b"0" * 400, b"1e-320", b"1e999", b"3.4e38"])
def test_numbers_at_the_end_of_what_there_is(finished, value):
    """Python's JSON reads them all; no float32 holds most."""
    data = (finished / "journal.jsonl").read_bytes()
    opposite = value[1:] if value.startswith(b"-") else b"-" + value
    for step, own in ((2, value), (3, opposite)):
        for name in (b'"own_figure": ', b'"reward": '):
            old = next(line for line in data.splitlines() if b'"step", "step": %d,' % step in line)
            data = data.replace(old, re.sub(name + rb"[^,}]+", name + own, old))
    (finished / "journal.jsonl").write_bytes(data)
    assert "own figure" in words(finished)
    found = (finished / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"[ML ,]-?(nan|inf)\b", found)


def test_images_over_time(finished):
    text = words(finished)
    assert [f"step {step}" for step in (0, 4, 8, 12, 16, 20)] == re.findall(r"step \d+(?= step| Held)", text)[:6]
    found = write_training_page(finished).read_text(encoding="utf-8")
    assert found.count("data:image/webp") == 10
    for at in range(6, 50):
        (finished / "strips" / f"step_{at * 4:08d}.png").write_bytes(
            (finished / "strips" / "step_00000000.png").read_bytes()
        )
    (finished / "strips" / "step_00000000.png").write_bytes(b"")
    (finished / "strips" / "notes.png").write_bytes(b"")
    text = words(finished)
    assert "16 of 50, evenly; all are in strips/." in text
    assert "image damaged" in text
    assert "step 196" in text


def test_a_run_that_goes_on(run_folder, tmp_path):
    folder = run_folder(tmp_path / "run", 5, finished=False)
    with open(folder / "journal.jsonl", "a") as journal:
        journal.write('{"kind": "step", "step": 5, "fit')  # being written
    text = words(folder)
    assert "5 of 40 steps: it goes on, or was interrupted." in text
    assert "Base against adapter" not in text


def test_a_run_that_has_only_begun(run_folder, tmp_path):
    folder = run_folder(tmp_path / "run", 0, finished=False)
    journals.rewrite(folder, lambda records: records[:1])
    text = words(folder)
    assert "0 of 40 steps" in text
    assert "No step is logged yet." in text
    assert titles(folder) == []


def test_figures_that_are_not_finite_leave_gaps(finished):

    def gaps(records):
        for record in records:
            if record["kind"] == "step":
                reward = None if record["step"] % 2 else record["metrics"]["reward"]
                record["metrics"] |= {"reward": reward, "step_norm": None}
        return records

    journals.rewrite(finished, gaps)
    assert "step norm" not in titles(finished)
    assert not re.search(r"\bnan\b", words(finished).lower())
    assert f"step 11 · mean {NONE} · best" in words(finished)


def test_a_long_run_stays_small(run_folder, tmp_path):
    folder = run_folder(tmp_path / "run", 5000)
    assert "Each point is the mean of 17 steps." in words(folder)
    assert (folder / "report.html").stat().st_size < 2_000_000


def test_the_page_is_a_function_of_the_folder(finished):
    assert write_training_page(finished).read_bytes() == write_training_page(finished).read_bytes()


def test_a_real_run(trained, tmp_path):
    shutil.copytree(trained[0].run_dir, tmp_path / "run")
    text = words(tmp_path / "run")
    assert "4 of 4 steps" in text
    gain, prompts = gain_of(tmp_path / "run", "jpeg_compressibility")
    aside = f"jpeg_compressibility, adapter over base, on {prompts}"
    assert tiles(tmp_path / "run")[0] == ("held-out gain", gain, aside)
    assert "Base beside adapter" in text
    assert "noise" in text or "contract 1" in text
    assert titles(tmp_path / "run")[0] == "Reward"


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("journal.jsonl", lambda data: data.replace(b'"step": 3,', b'"step" 3,'), r"journal\.jsonl, line 6: not.*JSON"),
        ("journal.jsonl", lambda data: data.replace(b'"step": 2,', b'"stop": 2,'), r"line 5: expected 'step'"),
        (
            "journal.jsonl",
            lambda data: data.replace(b'"step": 2,', b'"step": "a",'),
            "line 5: not as esengine writes it",
        ),
        (
            "journal.jsonl",
            lambda data: data.replace(b'"step": 2,', b'"step": 1' + b"0" * 400 + b","),
            r"line 5: not as esengine writes it: step: expected a whole number, got 10+$",
        ),
        (
            "journal.jsonl",
            lambda data: data.replace(b'"step": 2,', b'"step": 2, "own": 1' + b"0" * 5000 + b","),
            r"line 5: not.*JSON: Exceeds the limit",
        ),
        ("journal.jsonl", lambda data: data.replace(b'"step": 0', b'"step": 1e999', 1), "line 1: not as esengine"),
        ("journal.jsonl", lambda data: data.replace(b'"change"', b'"x"'), r"line 2: expected 'change'"),
        ("journal.jsonl", lambda data: data.replace(b"[]", b'"a"', 1), r"line 2: not as esengine"),
        ("journal.jsonl", lambda data: data + b"{}\n", r"journal\.jsonl, line 18: "),
        ("journal.jsonl", lambda data: data.replace(b'"steps":', b'"stops":'), r"settings: expected 'steps'"),
        ("journal.jsonl", lambda data: data.replace(b'"population": 8', b'"population": "many"'), "line 1: not as"),
        ("eval.json", lambda data: data.replace(b'"repeats": 2', b'"repeats": 1e999'), r"eval\.json: not as esengine"),
        ("eval.json", lambda data: data[:30], r"eval\.json, line 1: not JSON"),
        ("eval.json", lambda data: data.replace(b'"mean"', b'"x"'), r"eval\.json: expected 'mean'"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(finished, name, damage, said):
    file = finished / name
    before = file.read_bytes()
    file.write_bytes(damage(before))
    assert file.read_bytes() != before
    with pytest.raises(RunError, match=said) as caught:
        write_training_page(finished)
    assert "\n" not in str(caught.value)


def test_the_command_finds_out_what_a_folder_is(run_folder, evaluation_folder, esengine, workspace, monkeypatch):
    run_folder(workspace / "run")
    evaluation_folder(workspace / "evaluation")
    assert esengine("report", "run") == (0, "run/report.html\n", "")
    assert esengine("report", "evaluation") == (0, "evaluation/report.html\n", "")
    monkeypatch.chdir(workspace / "run")
    assert esengine("report") == (0, "report.html\n", "")


@pytest.mark.parametrize(("folder", "why"), [(".", "there is neither"), ("nosuch", "there is no such folder")])
def test_the_command_says_what_it_lacks(esengine, workspace, folder, why):
    code, out, err = esengine("report", folder)
    assert (code, out) == (1, "")
    expected = f"expected a run's journal.jsonl or an evaluation's evaluation.json in it, {why}"
    assert err == f"esengine: error: {folder}: {expected}\n"
    assert list(workspace.iterdir()) == []
