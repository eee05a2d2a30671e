"""The examples run as a user runs them, from another folder, and their score rises beyond its noise."""

import ast
import json
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from esengine.rewards import load

FOLDER = Path(__file__).parents[2] / "esengine" / "examples"
SCRIPTS = sorted(path for path in FOLDER.glob("*.py") if path.name != "__init__.py")
OURS = ("guidance", "own_pipeline", "own_reward", "reward_server", "text_model")
GAIN = re.compile(r"^gain ([+-]\d+\.\d+) \+- (\d+\.\d+) on \d+ held-out", flags=re.M)


def run(folder: Path, *command: str) -> str:
    """What a command prints. It writes no warning and no error."""
    done = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def require_gain(printed: str) -> None:
    gain, error = map(float, GAIN.search(printed).groups())
    assert error > 0
    assert gain > 4 * error


@pytest.mark.parametrize("name", OURS)
def test_a_script_learns(cache, tmp_path, name):
    printed = run(tmp_path, str(FOLDER / f"{name}.py"))
    require_gain(printed)
    assert printed.count("\nstep ") >= 7
    assert list(tmp_path.iterdir()) == []
    if name == "guidance":  # a member beside another, and alone
        assert float(re.search(r"largest difference (\S+)", printed)[1]) < 1e-5


def test_an_example_is_a_module_too(cache, tmp_path):
    require_gain(run(tmp_path, "-m", "esengine.examples.text_model"))


def test_the_command_line_takes_the_examples_reward(esengine):
    code, out, _ = esengine(
        *("train", "--model", "tiny", "--reward", "esengine.examples.own_reward:blueness", "--steps", "1"),
        *("--population", "2", "--es.prompts-per-step", "1", "--es.repeats", "1", "--heldout-every", "0"),
    )
    assert code == 0
    assert "esengine.examples.own_reward:blueness" in out


def test_the_server_serves_by_itself(tmp_path):
    """`python reward_server.py PORT`, asked by the HTTP reward and by hand."""
    import torch

    command = [sys.executable, str(FOLDER / "reward_server.py"), "0"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as server:
        try:
            url = server.stdout.readline().strip()
            images = torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1).expand(2, 3, 8, 8)
            assert load("remote", url=url)(images, ["a", "b"]).tolist() == [0.0, 1.0]
            body = json.dumps({"images": [], "prompts": []}).encode()
            assert json.load(urllib.request.urlopen(url, body, timeout=60)) == {"scores": []}
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def notebook():
    return json.loads((FOLDER / "first_steps.ipynb").read_text(encoding="utf-8"))


def cells(notebook, kind):
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_the_notebook_learns_and_shows_pictures(cache, tmp_path, notebook):
    """Its code cells in their order, each with the value of its last line, as a notebook shows it."""
    script = ["shown = []"]
    for source in cells(notebook, "code"):
        *_, last = ast.parse(source).body
        if isinstance(last, ast.Expr):
            lines = source.splitlines()
            lines[last.lineno - 1] = f"shown.append({lines[last.lineno - 1]}"
            source = "\n".join(lines) + ")"
        script.append(source)
    script.append("print([each.size for each in shown if isinstance(each, Image.Image)])")
    printed = run(tmp_path, "-c", "\n".join(script))
    require_gain(printed)
    assert printed.splitlines()[-1] == "[(256, 64), (256, 64)]"
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


def test_the_notebook_is_one_that_jupyter_reads(notebook):
    """Format 4.5: https://nbformat.readthedocs.io/en/latest/format_description.html"""
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    identities = [cell["id"] for cell in notebook["cells"]]
    assert len(set(identities)) == len(identities)
    assert all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", each) for each in identities)
    for cell in notebook["cells"]:
        assert cell.keys() == {"cell_type", "id", "metadata", "source"} | (
            {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        )
        assert cell.get("outputs", []) == []
    assert len(cells(notebook, "code")) > 5
    assert len(cells(notebook, "markdown")) > 5


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_is_short_and_uses_public_names_alone(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60 or path.stem not in OURS
    assert ast.get_docstring(ast.parse(text))
    assert re.search(r'^if __name__ == "__main__":$', text, flags=re.M)
    rooms = {"esengine", "esengine.models", "esengine.rewards", "esengine.examples"}
    for each in ast.walk(ast.parse(text)):
        if isinstance(each, ast.ImportFrom) and each.module.startswith("esengine"):
            assert each.module in rooms or each.module.startswith("esengine.examples."), each.module
            assert not any(alias.name.startswith("_") for alias in each.names)


def test_every_example_is_run_here():
    tested = "".join(page.read_text() for page in Path(__file__).parent.glob("test_*.py"))
    assert [path.stem for path in SCRIPTS if path.stem not in tested] == []
    assert [path.name for path in FOLDER.glob("*.ipynb")] == ["first_steps.ipynb"]
