"""Pages of a stranger's folder: whatever is in it, there is a page or an error that names the file."""

import json
import os
from contextlib import nullcontext

import pytest
from hostile import no_hang, png_bomb

from esengine.base.errors import RunError
from esengine.report import write_page

RUN_FILES = ["journal.jsonl", "eval.json"]
EVALUATION_FILES = ["evaluation.json", "report.json", "scores.jsonl", "curves.json"]


@pytest.fixture
def folder(run_folder, evaluation_folder, tmp_path):
    """Makes the folder that a file belongs to."""

    def make(name: str):
        made = run_folder(tmp_path / "run") if name in RUN_FILES else evaluation_folder(tmp_path / "evaluation")
        if name == "curves.json":
            (made / name).write_text("{}")
        return made

    return make


@pytest.mark.parametrize("name", [*RUN_FILES, *EVALUATION_FILES])
@pytest.mark.parametrize("kind", ["pipe", "device", "link to a device", "folder"])
def test_what_is_no_file_is_an_error_or_left_out(folder, name, kind):
    made = folder(name)
    (made / name).unlink()
    if kind == "pipe":
        os.mkfifo(made / name)
    elif kind == "device":
        try:
            os.mknod(made / name, 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero
        except OSError:
            pytest.skip("this user may make no devices")
    elif kind == "link to a device":
        (made / name).symlink_to("/dev/zero")
    else:
        (made / name).mkdir()
    refused = name not in ("eval.json", "curves.json")  # a folder need not have these
    with no_hang(), pytest.raises(RunError, match=str(made)) if refused else nullcontext():
        write_page(made)


@pytest.mark.parametrize("name", [*RUN_FILES, *EVALUATION_FILES])
@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a": ' * 900 + "1" + "}" * 900,
        '{"steps": ' + "9" * 5_000 + "}",
        '{"a": [' + "[]," * 1_200_000 + "[]]}",
        " " * (1 << 25) + "{}",
        '{"a": 1e999}',
        '{"a": "\\ud800"}',
        "\0",
    ],
    ids=["deep", "less deep", "digits", "lists", "large", "infinite", "surrogate", "NUL"],
)
def test_a_bomb_is_an_error_that_names_the_file(folder, name, text):
    made = folder(name)
    (made / name).write_text(text + "\n")
    with no_hang(), pytest.raises(RunError, match=name) as caught:
        write_page(made)
    assert len(str(caught.value)) < 400 + len(str(made))


@pytest.mark.parametrize("name", [*RUN_FILES, *EVALUATION_FILES])
def test_a_link_out_of_the_folder_is_refused(folder, name, tmp_path):
    made = folder(name)
    (made / name).rename(tmp_path / "away")
    (made / name).symlink_to(tmp_path / "away")
    with pytest.raises(RunError, match="leads out of the folder"):
        write_page(made)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"steps": 10**900}, "whole number"),
        ({"steps": [1]}, "whole number"),
        ({"es.prompts_per_step": 10**900}, "whole number"),
        ({"es.repeats": "x"}, "whole number"),
        ({"es.repeats": None}, "whole number"),
        ({"model": 3}, "text"),
        ({f"s{i}": i for i in range(11_000)}, "settings"),
    ],
)
def test_settings_that_no_run_has(run_folder, tmp_path, settings, word):
    made = run_folder(tmp_path / "run")
    lines = (made / "journal.jsonl").read_text().splitlines()
    start = json.loads(lines[0])
    for name, value in settings.items():
        if name.startswith("es."):
            start["settings"]["es"][name[3:]] = value
        else:
            start["settings"][name] = value
    (made / "journal.jsonl").write_text("\n".join([json.dumps(start), *lines[1:], ""]))
    with pytest.raises(RunError, match=rf"journal.jsonl: settings.*{word}"):
        write_page(made)


def test_thousands_of_metrics_are_refused(run_folder, tmp_path):
    made = run_folder(tmp_path / "run")
    lines = (made / "journal.jsonl").read_text().splitlines()
    step = next(i for i, line in enumerate(lines) if json.loads(line)["kind"] == "step")
    record = json.loads(lines[step])
    record["metrics"] |= {f"m{i}_norm": 1.0 for i in range(300)}
    lines[step] = json.dumps(record)
    (made / "journal.jsonl").write_text("\n".join([*lines, ""]))
    with pytest.raises(RunError, match="256 names of metrics"):
        write_page(made)


@pytest.mark.parametrize(
    ("file", "change", "word"),
    [
        ("evaluation.json", {"entries": [f"e{i}@1" for i in range(300)]}, "entries"),
        ("evaluation.json", {"scores": [f"s{i}" for i in range(300)]}, "scores"),
        ("report.json", {"groups": [{"by": "category", "name": "a", "rows": []}] * 20_000}, "groups"),
        ("report.json", {"prompts": float("nan")}, "report.json"),
    ],
)
def test_an_evaluation_of_too_much_is_refused(evaluation_folder, tmp_path, file, change, word):
    made = evaluation_folder(tmp_path / "evaluation")
    (made / file).write_text(json.dumps(json.loads((made / file).read_text()) | change))
    with pytest.raises(RunError, match=word):
        write_page(made)


def pictures(page) -> int:
    return page.read_text().count("data:image/webp")


@pytest.mark.parametrize("name", ["strips", "heldout"])
def test_a_folder_of_pictures_that_is_a_link_is_not_embedded(run_folder, tmp_path, name):
    made = run_folder(tmp_path / "run")
    before = pictures(write_page(made))
    count = len(list((made / name).iterdir()))
    (made / name).rename(tmp_path / "away")
    (made / name).symlink_to(tmp_path / "away")
    page = write_page(made)
    assert pictures(page) == before - count
    assert "image outside the folder" in page.read_text()


@pytest.mark.parametrize("kind", ["link", "pipe", "bomb", "other format", "large"])
def test_a_picture_that_is_none_is_not_embedded(run_folder, tmp_path, kind):
    made = run_folder(tmp_path / "run")
    before = pictures(write_page(made))
    for file in (made / "comparison.png", min((made / "strips").iterdir())):
        content = file.read_bytes()
        file.unlink()
        if kind == "link":
            (tmp_path / f"away-{file.name}").write_bytes(content)
            file.symlink_to(tmp_path / f"away-{file.name}")
        elif kind == "pipe":
            os.mkfifo(file)
        elif kind == "bomb":
            png_bomb(file, 9_000)
        elif kind == "other format":
            file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
        else:
            with open(file, "wb") as stream:
                stream.write(content)
                stream.truncate(1 << 28)
    with no_hang():
        page = write_page(made)
    assert pictures(page) == before - 2


def test_pictures_of_an_evaluation_stay_in_its_folder(evaluation_folder, tmp_path):
    made = evaluation_folder(tmp_path / "evaluation")
    before = pictures(write_page(made))
    (made / "images" / "base@1").rename(tmp_path / "away")
    (made / "images" / "base@1").symlink_to(tmp_path / "away")
    page = write_page(made)
    assert 0 < pictures(page) < before
    assert "image outside the folder" in page.read_text()


@pytest.mark.parametrize("url", ["http://h/s?token=HUNTER2", "https://me:HUNTER2@h/s", "http://h/s#HUNTER2"])
def test_no_page_shows_the_secret_of_an_older_run(run_folder, evaluation_folder, tmp_path, url):
    made = run_folder(tmp_path / "run")
    journal = (made / "journal.jsonl").read_text()
    (made / "journal.jsonl").write_text(journal.replace('"pickscore"', f'"remote(url={url})"', 1))
    other = evaluation_folder(tmp_path / "evaluation")
    record = json.loads((other / "evaluation.json").read_text())
    record["settings"]["rewards"] = {"url": url}
    (other / "evaluation.json").write_text(json.dumps(record))
    for each in (made, other):
        page = write_page(each).read_text()
        assert "HUNTER2" not in page
        assert "..." in page
