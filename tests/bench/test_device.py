"""`bench/device.sh` from an empty environment, under a Python that lacks diffusers, on a CPU."""

import importlib.metadata
import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "device.sh"
ABSENT = ("diffusers", "tyro", "docstring_parser", "typeguard")

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="rehearsed once, in the run without interpreter"
)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A Python with what a GPU machine has, and a folder of wheels of what it lacks."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder / "python", symlinks=True)
    own = folder / "python" / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    for each in Path(sysconfig.get_paths()["purelib"]).iterdir():
        name = each.name.partition("-")[0].partition(".")[0]
        if name not in ABSENT and not each.name.startswith(("__editable__", "eggroll_esengine")):
            (own / each.name).symlink_to(each)
    (folder / "wheels").mkdir()
    for name in ABSENT:
        found = importlib.metadata.distribution(name)
        with zipfile.ZipFile(folder / "wheels" / f"{name}-{found.version}-py3-none-any.whl", "w") as wheel:
            for file in found.files:
                if ".." not in file.parts and "__pycache__" not in file.parts:
                    wheel.write(found.locate_file(file), str(file))
    return folder


def device(bare, out, *words, **settings):
    settings = {
        "PATH": os.defpath,
        "HOME": bare,
        "PYTHON": bare / "python" / "bin" / "python",
        "WHEELS": bare / "wheels",
        "CACHE": bare / "cache",
        "DEVICE": "cpu",
        "ESENGINE_COMMIT": "0123abc",
    } | settings
    given = [f"{name}={value}" for name, value in settings.items()]
    return subprocess.run(["env", "-i", *given, SCRIPT, *words, out], capture_output=True, text=True, timeout=600)


def test_smoke_on_a_bare_machine(bare, tmp_path):
    hidden = subprocess.run([bare / "python" / "bin" / "python", "-c", "import torch, diffusers"], capture_output=True)
    assert b"No module named 'diffusers'" in hidden.stderr
    done = device(bare, tmp_path / "out", "smoke", TESTS="tests/kernels/test_operands.py", WORKERS=1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("device.sh: smoke is done")
    assert {each.name for each in (tmp_path / "out").iterdir()} == {
        "smoke.log",
        "smoke.json",
        "smoke.xml",
        "cache.tgz",
    }
    found = json.loads((tmp_path / "out" / "smoke.json").read_text())
    assert found["environment"]["commit"] == "0123abc"
    assert found["environment"]["versions"]["diffusers"] == importlib.metadata.version("diffusers")
    assert min(found["ceilings"].values()) > 0
    suite = ElementTree.parse(tmp_path / "out" / "smoke.xml").getroot()[0]
    assert int(suite.get("tests")) > 50
    assert suite.get("failures") == suite.get("errors") == "0"


def test_a_failing_test_is_told_and_its_log_is_kept(bare, tmp_path):
    done = device(bare, tmp_path / "out", "smoke", TESTS="tests/nosuch.py", WORKERS=1)
    assert done.returncode != 0
    assert "device.sh: smoke failed" in done.stdout
    assert (tmp_path / "out" / "smoke.log").read_text() == done.stdout


@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), (["sm0ke", "out"], 2), (["smoke"], 2), ([], 2)])
def test_usage(words, code):
    done = subprocess.run([SCRIPT, *words], capture_output=True, text=True)
    assert done.returncode == code
    assert "usage: bench/device.sh smoke|suite|tune|cache OUT" in done.stdout + done.stderr
