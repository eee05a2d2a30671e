"""Every Triton kernel compiles for sm_90 with the Triton that is installed; no GPU is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

SCRIPT = Path(__file__).parents[2] / "bench" / "aot.py"


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiled once, in the run without interpreter")
def test_every_kernel_compiles_without_spills(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    done = subprocess.run(
        [sys.executable, SCRIPT, "--arch", "90", "--json", tmp_path / "aot.json"],
        capture_output=True, text=True, env=environment, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "aot.json").read_text())["rows"]
    assert {row["kernel"] for row in rows} == {"shrink_kernel", "expand_kernel", "update_kernel", "normals_kernel"}
    assert all("error" not in row and row["spills"] == 0 for row in rows)
    half = [row for row in rows if row["kernel"] == "expand_kernel" and "float16" in row["shape"]]
    assert half
    assert all(row["mma"] for row in half)  # on the tensor cores
