"""A command goes on without a cache: no home folder, a folder that cannot be written, a full disk. All are real."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from esengine.base import files

TRAIN = [
    *("train", "--model", "tiny", "--prompts", "p.txt", "--eval-prompts", "p.txt", "--reward", "jpeg_compressibility"),
    *("--steps", "1", "--population", "4", "--es.prompts-per-step", "1", "--es.repeats", "1", "--lora.targets", "to_q"),
    *("--heldout-every", "0", "--strip-every", "0", "--run-dir", "run"),
]
SCRIPT = "import sys; from esengine.cli import main; sys.exit(main(sys.argv[1:]))"


def namespace(*command: str) -> list[str]:
    """A command of a namespace of its own. Skips the test where this machine has none."""
    if (
        shutil.which("unshare") is None
        or subprocess.run([*command, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip(f"this machine does not allow {' '.join(command)}")
    return list(command)


@pytest.fixture
def call(tmp_path):
    """The result of a command in an empty folder: `call(arguments, before=(), cache=None, home=None)`."""
    (tmp_path / "p.txt").write_text("a fox\nan owl\n")

    def run(arguments, *, before=(), cache=None, home=None):
        names = ("HOME", "XDG_CACHE_HOME", "ESENGINE_CACHE")
        environment = {name: value for name, value in os.environ.items() if name not in names}
        environment |= {"ESENGINE_CACHE": str(cache)} if cache else {}
        environment |= {"HOME": str(home)} if home else {}
        environment["OMP_NUM_THREADS"] = "1"
        command = [*before, sys.executable, "-c", SCRIPT, *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    return run


def went_on(done, folder):
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning: no cache") == 1
    assert "ESENGINE_CACHE" in done.stderr
    assert "Traceback" not in done.stderr
    assert (folder / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_user_without_a_home_folder(call, tmp_path):
    nobody = namespace("unshare", "--user", "--map-user=54321")
    went_on(call(TRAIN, before=nobody), tmp_path)
    done = call(["env", "--json"], before=nobody)
    assert "no home folder" in json.loads(done.stdout)["cache"]


def test_a_cache_below_a_file(call, tmp_path):
    went_on(call(TRAIN, cache=tmp_path / "p.txt" / "cache"), tmp_path)
    assert "cannot be written" in json.loads(call(["env", "--json"], cache=tmp_path / "p.txt").stdout)["cache"]


def test_a_cache_on_a_full_disk(call, tmp_path):
    (tmp_path / "small").mkdir()
    mount = 'mount -t tmpfs -o size=64k none small && exec "$@"'
    namespace("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", f"cd {tmp_path}; {mount}", "sh")
    before = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]
    went_on(call(TRAIN, before=before, cache=tmp_path / "small" / "cache"), tmp_path)


def test_the_cache_that_is_used_is_shown(call, tmp_path):
    assert json.loads(call(["env", "--json"], cache=tmp_path).stdout)["cache"] == str(tmp_path)
    assert json.loads(call(["env", "--json"], home=tmp_path).stdout)["cache"] == str(tmp_path / ".cache" / "esengine")


def test_which_folder_is_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("ESENGINE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert files.cache_root() == tmp_path / ".cache" / "esengine"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert files.cache_root() == tmp_path / "x" / "esengine"
    monkeypatch.setenv("ESENGINE_CACHE", "~/e")
    assert files.cache_root() == tmp_path / "e"
