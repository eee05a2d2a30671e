"""The API reference is made from the docstrings, and whatever is wrong with it is found."""

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import esengine

SCRIPT = Path(__file__).parents[1] / ".ci" / "docs.py"


@pytest.fixture(scope="module")
def docs():
    spec = importlib.util.spec_from_file_location("docs", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    done = subprocess.run([sys.executable, SCRIPT, folder], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_it_has_a_page_for_each_room_and_an_entry_for_each_public_name(reference):
    rooms = ("base", "kernels", "es", "models", "rewards", "sampling", "evaluation", "run", "report", "cli", "examples")
    assert [room for room in rooms if not (reference / "esengine" / f"{room}.html").is_file()] == []
    page = (reference / "esengine.html").read_text()
    assert [name for name in esengine.__all__ if f'id="{name}"' not in page] == []
    assert "int64 [B], one in [0, 2^33) for each batch row" in page  # arguments of Population.perturbed
    for room in ("models", "rewards", "kernels"):
        page = (reference / "esengine" / f"{room}.html").read_text()
        public = importlib.import_module(f"esengine.{room}").__all__
        assert len(public) > 5
        assert [name for name in public if f'id="{name}"' not in page] == []


def test_a_type_is_written_as_one_reads_it(reference):
    page = (reference / "esengine" / "run" / "settings.html").read_text().partition('id="TrainConfig"')[2]
    assert 'id="TrainConfig.population"' in page
    assert "BeforeValidator" not in page
    assert " at 0x" not in page


def test_a_link_that_leads_nowhere_is_found(docs, tmp_path):
    (tmp_path / "a.html").write_text(
        '<p id="Here"></p><p id="Here.it"></p><a href="#Here">1</a><a href="b.html#There">2</a><a href="https://x.y">3</a>'
        "<code>Here.it</code><code>config.yaml</code><script>'href=\"${url}\"'</script>"
    )
    (tmp_path / "b.html").write_text('<p id="There"></p><a href="a.html#Here.it">1</a><a href="a.html">2</a>')
    assert docs.broken(tmp_path) == []
    (tmp_path / "b.html").write_text(
        '<p id="Their"></p><a href="a.html#Here.them">1</a><a href="c.html">2</a><a href="#Nobody">3</a>'
        "<code>Here.them()</code><code>esengine.nothing</code>"
    )
    found = docs.broken(tmp_path)
    for words in ("a.html: link to b.html#There", "link to a.html#Here.them", "link to c.html", "link to #Nobody"):
        assert len([line for line in found if words in line]) == 1
    assert len([line for line in found if "`Here.them`" in line]) == 1
    assert len([line for line in found if "`esengine.nothing`" in line]) == 1
    assert len(found) == 6


def test_a_public_name_without_a_docstring_is_found(docs, monkeypatch):
    assert docs.undocumented(["esengine"]) == []
    monkeypatch.setattr(esengine.Engine.ask, "__doc__", None)
    assert docs.undocumented(["esengine"]) == ["esengine.Engine.ask has no docstring"]
