"""The wheel and the sdist: the same files by both ways, and a wheel that works far from the repository."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import esengine

ROOT = Path(__file__).parents[1]
SHIPPED = ("CITATION.cff", "LICENSE", "README.md", "esengine", "kernels", "models", "pyproject.toml")


def build(source: Path, out: Path, *what: str) -> Path:
    """Build in the environment of the tests; returns the wheel."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), *what, str(source)]
    done = subprocess.run(command, cwd=out.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "absent from the `packages` configuration" not in done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the sdist and the wheel that was built from it, as `make wheel` makes them."""
    folder = tmp_path_factory.mktemp("built")
    (folder / "tree").mkdir()
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / "tree" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / "tree" / name)
    build(folder / "tree", folder / "dist")
    return folder


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_tree_and_the_sdist_make_the_same_wheel(built):
    (from_sdist,) = (built / "dist").glob("*.whl")
    assert contents(build(built / "tree", built / "direct", "--wheel")) == contents(from_sdist)


def test_every_file_of_the_package_is_in_the_wheel(built):
    (wheel,) = (built / "dist").glob("*.whl")
    listed = subprocess.run(
        ["git", "ls-files", "esengine", "kernels", "models"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode or not listed.stdout:
        pytest.skip("the tests run outside a clone, so git cannot list the package's files")
    ours = {re.sub(r"^(kernels|models)/", r"esengine/\1/", name) for name in listed.stdout.splitlines()}
    pages = {name for name in ours if name.endswith("README.md") and "-nano/" not in name}
    assert {name for name in contents(wheel) if ".dist-info/" not in name} == ours - pages


def test_the_wheel_says_its_version_and_what_it_needs(built):
    (wheel,) = (built / "dist").glob("*.whl")
    (metadata,) = (data.decode() for name, data in contents(wheel).items() if name.endswith(".dist-info/METADATA"))
    assert wheel.name == f"eggroll_esengine-{esengine.__version__}-py3-none-any.whl"
    for line in (
        f"Version: {esengine.__version__}",
        "License-Expression: Apache-2.0",
        "Requires-Dist: torch<2.14,>=2.11",
    ):
        assert f"\n{line}\n" in metadata


def test_the_sdist_has_the_licence_and_no_build(built):
    (sdist,) = (built / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "models/nano/clip-nano/model.safetensors"} <= names
    assert not any("__pycache__" in name or name.startswith(("build/", "dist/")) for name in names)


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """Runs a command of an environment that has the wheel, and elsewhere only what the wheel depends on.

    Its packages are read through a .pth file, so that nothing is downloaded. Our own is not among them: the tests'
    environment has it by an import hook, which a .pth file does not carry over.
    """
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    site = Path(
        subprocess.check_output([python, "-c", "import site; print(site.getsitepackages()[0])"], text=True).strip()
    )
    (site / "others.pth").write_text("".join(f"{path}\n" for path in sys.path if path.endswith("site-packages")))
    (wheel,) = (built / "dist").glob("*.whl")
    install = ["install", "--quiet", "--no-deps", "--no-index", "--ignore-installed", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", "--python", python, *install, wheel], check=True)
    empty = folder / "empty"
    empty.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "ESENGINE"))}
    environment |= {"ESENGINE_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}

    def run(program: str, *args: str) -> str:
        command = [str(python.with_name(program)), *args]
        done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run, empty, site


def test_the_installed_package_is_the_wheel(installed):
    run, _, site = installed
    where = run(
        "python", "-c", "import esengine, esengine.kernels; print(esengine.__file__, esengine.kernels.__file__)"
    )
    assert all(Path(each).is_relative_to(site) for each in where.split())
    assert run("esengine", "--version") == f"esengine {esengine.__version__}\n"
    assert json.loads(run("esengine", "env", "--json"))["esengine"] == esengine.__version__
    assert run("esengine", "train", "--help").startswith("usage: esengine train")
    assert "\ngain +" in run("python", "-m", "esengine.examples.text_model")
    assert "nano_train.txt" in run("python", "-m", "esengine", "train", "--help-all")


def test_the_installed_package_trains_and_renders_into_the_run(installed):
    run, empty, _ = installed
    (empty / "held.txt").write_text("a red circle\na small green cross\n")
    run(
        *("esengine", "train", "--steps", "2", "--population", "4", "--es.prompts-per-step", "1"),
        *("--heldout-every", "0", "--strip-every", "0", "--eval-prompts", "held.txt"),
    )
    (folder,) = (empty / "runs").iterdir()
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert "</html>" in (folder / "report.html").read_text()
    run("esengine", "render", "--run-dir", str(folder), "a red circle")
    assert {each.name for each in empty.iterdir()} == {"held.txt", "runs"}
    assert len(list((folder / "renders").glob("0000_a-red-circle_*.png"))) == 2


def test_the_version_stands_in_one_place():
    project = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in project
    assert 'attr = "esengine.__version__"' in project
    assert not re.search(r"^version = \"", project, flags=re.M)
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", esengine.__version__)


def test_the_citation_is_that_of_this_version():
    """The keys that the Citation File Format 1.2.0 requires, and the values that it allows."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert (citation["cff-version"], citation["type"], citation["license"]) == ("1.2.0", "software", "Apache-2.0")
    assert str(citation["version"]) == esengine.__version__
    for work in (citation, *citation["references"]):
        assert work["title"]
        assert work["authors"]
        for author in work["authors"]:
            assert set(author) in ({"name"}, {"family-names", "given-names"})
            assert all(isinstance(value, str) and value for value in author.values())
    assert all(work["type"] == "article" for work in citation["references"])


def test_the_release_check_says_what_is_missing(tmp_path):
    if subprocess.run(["git", "clone", "--quiet", "--depth", "1", f"file://{ROOT}", tmp_path / "clone"]).returncode:
        pytest.skip("the tests run outside a clone")
    bin_folder = Path(sys.executable).parent

    def check() -> str:
        done = subprocess.run([".ci/release-check", bin_folder], cwd=tmp_path / "clone", capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stdout == ""
        return done.stderr

    def git(*args: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false", "-c", "tag.gpgsign=false"]
        subprocess.run(["git", *who, *args], cwd=tmp_path / "clone", check=True, capture_output=True)

    changes = tmp_path / "clone" / "CHANGELOG.md"
    head = f"## {esengine.__version__} ("
    changes.write_text(re.sub(re.escape(head) + r"[^)]+\)", f"{head}unreleased)", changes.read_text(), count=1) + "\n")
    assert "clean tree" in check()
    git("commit", "--all", "--message", "x")
    assert "CHANGELOG.md" in check()
    changes.write_text(changes.read_text().replace(f"{head}unreleased)", f"{head}2026-12-01)"))
    citation = tmp_path / "clone" / "CITATION.cff"
    citation.write_text(citation.read_text().replace(f"version: {esengine.__version__}", "version: 0.0.1"))
    git("commit", "--all", "--message", "x")
    assert "CITATION.cff" in check()
    git("tag", f"v{esengine.__version__}")
    assert "__version__" in check()


def test_the_changelog_begins_with_this_version():
    heading = re.search(r"^## (\S+) \((unreleased|\d{4}-\d\d-\d\d)\)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    assert heading[1] == esengine.__version__
