"""The folders of `bench/` that run as commands."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["nano", "--help"], "headline"),
        (["nano", "training", "--help"], "the folder that was given as --work"),
        (["suite", "--plan", "--parts", "update"], "in all"),
        (["suite", "--predict", "H200"], "`linear_vs_gemm`"),
    ],
)
def test_a_folder_runs_from_anywhere(words, shown, tmp_path):
    command = [sys.executable, "-P", BENCH / words[0], *words[1:]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout


def test_an_unknown_experiment_is_named_beside_the_known_ones(tmp_path):
    done = subprocess.run([sys.executable, BENCH / "nano", "nosuch"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "nosuch" in done.stderr
    assert "headline" in done.stderr
