"""The pages: their Python runs as printed, their figures are the stored ones, and what they name exists."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import table
import tyro

from esengine.cli import settings
from esengine.cli.flags import parse, parse_train
from esengine.run.settings import ReplayConfig, TrainConfig

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
GUIDES = [README, *(ROOT / folder / "README.md" for folder in ("bench", "esengine", "kernels", "models"))]
ROOMS = ("bench", "esengine", "kernels", "models", "tests")
PAGES = sorted({*ROOT.glob("*.md"), *(page for room in ROOMS for page in (ROOT / room).rglob("*.md"))})
FILE = re.compile(r"[\w.-]+(/[\w.-]+)+/?")
SUFFIXES = (".ipynb", ".json", ".md", ".png", ".py", ".svg", ".toml", ".tsv", ".txt", ".yaml")


def name(page):
    return page.relative_to(ROOT).as_posix()


def read(page):
    return page.read_text(encoding="utf-8")


def blocks():
    for page in GUIDES:
        for i, block in enumerate(re.findall(r"```python\n(.*?)```", read(page), flags=re.S)):
            yield pytest.param(block, id=f"{name(page)}-{i}")


@pytest.mark.parametrize("block", blocks())
def test_a_block_runs(block, tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", ["bench", "esengine", "kernels", "models"])
def test_every_guide_is_linked_from_the_readme(page):
    assert f"({page}/README.md)" in read(README)


def test_the_results_are_the_stored_ones():
    _, begin, rest = read(table.PAGE).partition(table.BEGIN)
    made, end, _ = rest.partition(table.END)
    assert begin
    assert end
    assert made.strip().splitlines() == "\n".join(table.generated()).strip().splitlines()


def test_every_stored_file_stands_on_the_page_of_results():
    stored = {file.name for file in table.RESULTS.iterdir()}
    assert len(stored) > 20
    assert sorted(file for file in stored if file not in read(table.PAGE)) == []


def test_the_readme_has_the_highlights():
    lines = read(README).splitlines()
    assert [row for row in table.highlights() if row not in lines] == []


def test_the_readme_is_short_and_begins_with_a_picture():
    lines = read(README).splitlines()
    assert len(lines) <= 150
    assert any("![" in line for line in lines[:30])


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_line_is_long(page):
    assert [f"{i}: {len(line)}" for i, line in enumerate(read(page).splitlines(), 1) if len(line) > 120] == []


def found(page, path):
    """Whether a path that a page names is there, from the root or from the page's own folder."""
    return any((folder / path).exists() for folder in (ROOT, page.parent))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_relative_link_leads_somewhere(page):
    links = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", read(page)) if ":" not in target]
    assert [target for target in links if target and not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_file_that_is_named_exists(page):
    text = re.sub(r"```(?!sh).*?```", "", read(page), flags=re.S)
    spans = [word for span in re.findall(r"`([^`\n]+)`", text) for word in span.split()]
    spans += [word for block in re.findall(r"```sh\n(.*?)```", text, flags=re.S) for word in block.split()]
    paths = [word for word in spans if FILE.fullmatch(word)]
    ours = [path for path in paths if path.split("/")[0] in ROOMS or path.startswith("results/")]
    ours += [path for path in paths if path.endswith(SUFFIXES) and not path.startswith(("runs/", "renders/"))]
    ours += re.findall(r"\bbench/results/[\w.-]+\.(?:json|png)", read(page))
    assert sorted({path for path in ours if not found(page, path)}) == []


COMMANDS = [
    (name(page), line)
    for page in GUIDES
    for block in re.findall(r"```sh\n(.*?)```", read(page), flags=re.S)
    for line in block.replace("\\\n", " ").splitlines()
    if " ".join(line.split()).startswith(("esengine ", "torchrun "))
]


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[line.partition("#")[0].strip() for _, line in COMMANDS])
def test_a_command_is_one_that_the_command_line_takes(page, line, monkeypatch):
    monkeypatch.setattr("esengine.cli.flags.load_run", lambda folder: TrainConfig())
    words = shlex.split(line, comments=True)
    command, *flags = words[words.index("esengine") + 1 :]
    kinds = {"eval": settings.EvalConfig, "render": settings.RenderConfig, "report": settings.ReportConfig}
    kinds |= {"env": settings.EnvConfig}
    if command == "train":
        parse_train(flags)
    elif command == "replay":
        tyro.cli(ReplayConfig, args=flags)
    else:
        parse(kinds[command], flags, f"esengine {command}")


def test_the_published_recipe_is_the_one_in_the_readme():
    (line,) = (line for page, line in COMMANDS if page == "README.md" and "reference" in line)
    chosen = parse_train(shlex.split(line)[2:])
    images = chosen.population * chosen.es.prompts_per_step * chosen.es.repeats
    assert (chosen.update.lr_scale, chosen.image.height, chosen.image.x0_angle) == (0.1, 512, 1.3)
    assert f"{chosen.population} members x {chosen.es.prompts_per_step} prompts x" in read(README)
    assert f"= {images} a step;" in read(README)
    assert f"{chosen.steps} steps: {chosen.steps * images:,} |" in read(README)
