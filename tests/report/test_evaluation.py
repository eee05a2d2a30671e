"""The page of an evaluation: what it says, what it survives, what it refuses."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from PIL import Image

from esengine.base.errors import RunError
from esengine.evaluation.entries import Entry
from esengine.report import write_evaluation_page, write_training_page
from esengine.run.curves import kept_curves


@pytest.fixture
def folder(evaluation_folder, tmp_path):
    return evaluation_folder(tmp_path / "evaluation")


def page(folder) -> str:
    return write_evaluation_page(folder).read_text(encoding="utf-8")


def change(file, edit):
    data = json.loads(file.read_text())
    edit(data)
    file.write_text(json.dumps(data))


def words(text: str) -> str:
    return " ".join(re.sub("<[^>]*>", " ", text).replace("<wbr>", "").split())


def test_the_page_has_every_part_in_one_file(folder):
    report = json.loads((folder / "report.json").read_text())
    found = page(folder)
    text = words(found)
    for row in report["groups"][0]["rows"]:
        assert row["entry"] in text
        assert f"{row['mean']['pickscore']:.4f}" in text
    paired = report["groups"][0]["rows"][1]["against_first"]["pickscore"]
    assert f"{paired['difference']:+.4f} ± {paired['standard_error']:.4f}" in text
    assert f"wins {paired['win_rate']:.0%}" in text
    assert "adapter@1 closes 37% of the gap between base@1 and base@2 in pickscore, which is 0.4000." in text
    assert "clip_text: base@2 is not above base@1, so there is no gap to close." in text
    for part in ("By category", "Animals", "Best gains of adapter@1", "Worst losses of adapter@1", "Random prompts"):
        assert part in text
    assert "pickscore: adapter@1 minus base@1" in text
    assert "By challenge" not in text  # the report has no such groups
    assert "2.13.0" in text
    assert "abab" in text  # the hash of the prompts


def curves(folder, run_folder, tmp_path):
    run = run_folder(tmp_path / "first")
    (run / "adapter").mkdir()
    entries = [Entry("base", 1), Entry("adapter", 1, run / "adapter"), Entry("elsewhere", 1, tmp_path)]
    (folder / "curves.json").write_text(json.dumps(kept_curves(entries), allow_nan=False))
    return run


def test_the_curves_of_the_runs_that_the_adapters_are_of(folder, run_folder, tmp_path):
    assert "Training" not in words(page(folder))
    run = curves(folder, run_folder, tmp_path)
    kept = json.loads((folder / "curves.json").read_text())
    assert list(kept) == ["adapter@1"]
    assert [set(line) for line in kept["adapter@1"]["metrics"]] == [
        {"step", "reward", "reward_best", "reward_worst", "reward_std"}
    ] * 12
    alone = write_training_page(run).read_text(encoding="utf-8")
    shutil.rmtree(run)  # the page is a function of its folder
    found = page(folder)
    assert "adapter@1 : run first" in words(found)
    for title in ("Reward", "pickscore (optimised)"):
        figure = re.compile(rf"<h3>{re.escape(title)}</h3>.*?</figure>", re.S)
        there, here = (re.findall(r'<path[^>]* d="([^"]*)"', figure.search(text)[0]) for text in (alone, found))
        assert there == here != []


def test_curves_that_are_damaged(folder, run_folder, tmp_path):
    curves(folder, run_folder, tmp_path)
    for damage, said in (
        (lambda kept: kept["adapter@1"].pop("run"), "expected 'run'"),
        (lambda kept: kept["adapter@1"]["metrics"].append(3), "not as esengine writes it"),
        (lambda kept: kept.update({"adapter@1": []}), "not as esengine writes it"),
    ):
        before = (folder / "curves.json").read_bytes()
        change(folder / "curves.json", damage)
        with pytest.raises(RunError, match=rf"curves\.json: {said}"):
            write_evaluation_page(folder)
        (folder / "curves.json").write_bytes(before)


def test_nothing_is_loaded_from_elsewhere(folder):
    found = page(folder)
    sources = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            sources.extend(value for name, value in attributes if name in ("src", "href", "action", "srcset"))

    Reader().feed(found)
    assert sources
    assert all(source.startswith(("data:image/webp;base64,", "#")) for source in sources)
    assert not re.search(r"url\(|@import|https?://", found)
    assert "default-src 'none'" in found


def test_the_page_is_a_function_of_the_folder(folder):
    assert page(folder) == page(folder)


def test_prompts_are_text(folder):
    found = page(folder)
    assert "<script>window" not in found
    assert "<img src=x" not in found
    assert "&lt;script&gt;window.injected" in found
    assert "{{ 7 * 7 }}" in found
    assert "half a pair ?" in found


def test_an_image_that_is_missing_damaged_or_elsewhere_leaves_a_place(folder, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    lines = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    (folder / lines[0]["image"]).unlink()
    (folder / lines[1]["image"]).write_bytes((folder / lines[1]["image"]).read_bytes()[:200])
    (folder / lines[2]["image"]).write_bytes(b"no image")
    lines[3]["image"] = "../secret.png"
    lines[4]["image"] = "images/" + "n" * 5000
    (folder / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = words(page(folder))
    assert "5 images of this page cannot be shown:" in text
    assert f"{lines[0]['image']}: image missing" in text
    assert f"{lines[1]['image']}: image damaged" in text
    assert f"{lines[2]['image']}: image damaged" in text
    assert "../secret.png: image outside the folder" in text


def test_an_image_without_a_line_leaves_a_place(folder):
    lines = (folder / "scores.jsonl").read_text().splitlines()
    (folder / "scores.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    assert "base@2, prompt 11: not scored" in words(page(folder))


def test_the_share_has_its_error(folder):
    error = {"standard_error": {"adapter@1": 0.09}}
    change(folder / "report.json", lambda report: report["gap_closed"]["pickscore"].update(error))
    assert "closes 37% (± 9%) of the gap" in words(page(folder))


@pytest.mark.parametrize(
    ("share", "said"),
    [
        (
            -0.25,
            "closes none of the gap between base@1 and base@2 in pickscore, which is 0.4000: it lies 25% of it below",
        ),
        (1.5, "and goes beyond base@2 by 50% of it."),
        (0.0, "adapter@1 closes 0% of the gap"),
    ],
)
def test_the_gap_in_words(folder, share, said):
    change(
        folder / "report.json", lambda report: report["gap_closed"]["pickscore"]["share"].update({"adapter@1": share})
    )
    assert said in words(page(folder))


@pytest.mark.parametrize("entries", [("base@1",), ("base@1", "base@2"), ("base@1", "a@1", "b@1", "base@2")])
def test_any_entries(evaluation_folder, tmp_path, entries):
    text = words(page(evaluation_folder(tmp_path / "e", entries=entries)))
    assert ("Highest pickscore" in text) == (len(entries) == 1)
    for entry in entries:
        shown = entry in ("a@1", "b@1") or entries == ("base@1", entry)
        assert (f"Best gains of {entry}" in text) == shown


def test_one_prompt_has_no_standard_error(evaluation_folder, tmp_path):
    text = words(page(evaluation_folder(tmp_path / "e", prompts=1)))
    assert not re.search(r"\bnan\b", text.lower())
    assert re.search(r"\d\.\d{4} wins", text)


def test_a_benchmark_at_full_size_stays_small(evaluation_folder, tmp_path):
    folder = evaluation_folder(tmp_path / "e", prompts=1631, size=400, one_image=True)  # noise: the worst to compress
    found = write_evaluation_page(folder)
    assert found.stat().st_size < 6_000_000
    assert found.read_text(encoding="utf-8").count("data:image/webp") == 72


def test_an_unfinished_evaluation(folder):
    (folder / "report.json").unlink()
    with pytest.raises(RunError, match="not finished"):
        write_evaluation_page(folder)


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("evaluation.json", lambda data: data[:-20], r"evaluation\.json, line 1: not JSON"),
        ("evaluation.json", lambda data: b"[]", r"evaluation\.json: expected a JSON object, got list"),
        ("evaluation.json", lambda data: data.replace(b'"entries"', b'"x"'), r"evaluation\.json: expected 'entries'"),
        ("report.json", lambda data: data.replace(b'"mean"', b'"x"'), r"report\.json: expected 'mean'"),
        (
            "report.json",
            lambda data: data.replace(b'"groups": [', b'"groups": 3, "x": ['),
            r"report\.json: not as esengine",
        ),
        ("report.json", lambda data: b"[" * 100_000, r"report\.json"),
        ("scores.jsonl", lambda data: data.replace(b'"entry"', b"entry", 3)[:], r"scores\.jsonl, line 1: not JSON"),
        (
            "scores.jsonl",
            lambda data: _in_line(data, 2, b'"scores"', b'"x"'),
            r"scores\.jsonl, line 2: expected 'scores'",
        ),
        ("scores.jsonl", lambda data: _in_line(data, 5, b'pickscore": ', b'pickscore": "a'), r"scores\.jsonl, line 5"),
        ("scores.jsonl", lambda data: _in_line(data, 3, b"base@1", b"\xff"), r"scores\.jsonl, line 3: expected UTF-8"),
        (
            "scores.jsonl",
            lambda data: _in_line(data, 4, b'"prompt": "', b'"prompt": 3, "x": "'),
            r"line 4: not as esengine",
        ),
    ],
)
def test_a_damaged_file_is_named_with_its_line(folder, name, damage, said):
    file = folder / name
    before = file.read_bytes()
    file.write_bytes(damage(before))
    assert file.read_bytes() != before
    with pytest.raises(RunError, match=said) as caught:
        write_evaluation_page(folder)
    assert "\n" not in str(caught.value)
    assert not (folder / "report.html").exists()


def _in_line(data: bytes, number: int, old: bytes, new: bytes) -> bytes:
    lines = data.split(b"\n")
    lines[number - 1] = lines[number - 1].replace(old, new, 1)
    return b"\n".join(lines)
