"""The README's Python runs as printed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import suite
import table

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)


@pytest.mark.parametrize("block", BLOCKS, ids=[block.strip().splitlines()[-1][:40] for block in BLOCKS])
def test_block_runs(block, tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_the_table_is_the_stored_results():
    lines = README.read_text(encoding="utf-8").splitlines()
    assert table.rows()
    assert [row for row in table.rows() if row not in lines] == []
    assert [line for line in lines if "`bench/results/" in line and line not in table.rows()] == []


def test_without_a_record_every_figure_of_the_suite_is_not_measured(tmp_path):
    rows = table.suite_rows(tmp_path)
    assert len(rows) == len(table.FIGURES)
    assert all(figure.startswith("not measured") for _, figure, _, _ in rows)
    bars = [f"(bar {sign} {value:g})" for sign, value in table.BARS.values()]
    assert sorted(bars) == sorted(
        figure.removeprefix("not measured").strip() for _, figure, *_ in rows if "bar" in figure
    )


def test_a_record_fills_the_rows(tmp_path):
    def entry(value, verdict="pass"):
        return {"value": value, "verdict": verdict, "bar": None, "detail": None}

    summary = {name: entry(0.98765) for name in table.FIGURES}
    summary["step_vs_inference"] = entry(None, "failed check")
    summary["images_per_second"] = {"512": entry(150.0), "1024": entry(41.0)}
    record = {"summary": summary, "settings": {"pixels": [512, 1024]}, "environment": {"device": "A device"}}
    for name in ("gpu_suite_a_device.json", "other.json"):
        (tmp_path / name).write_text(json.dumps(record))
    rows = table.suite_rows(tmp_path)
    assert {(device, file) for _, _, device, file in rows} == {("A device", "gpu_suite_a_device.json")}
    figures = {what: figure for what, figure, *_ in rows}
    assert figures[table.FIGURES["linear_vs_gemm"]] == "0.9877 (bar >= 0.97)"
    assert figures[table.FIGURES["linear_in_block_vs_gemm"]] == "0.9877"
    assert figures[table.FIGURES["step_vs_inference"]] == "failed check (bar >= 0.98)"
    assert figures["images/s of a whole step, 1024 px"] == "41 (bar >= 40)"


def test_the_suite_writes_the_file_that_the_table_reads(monkeypatch, tmp_path):
    kept = []
    monkeypatch.setattr(suite, "RESULTS", tmp_path)
    monkeypatch.setattr(suite.record, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(suite, "run", lambda *a, json_path, **k: kept.append(json_path) or {"summary": {}, "parts": {}})
    monkeypatch.setattr(suite, "table", lambda summary: "")
    monkeypatch.setattr(suite, "rows", lambda summary: [])
    assert suite.main(["--device", "cpu"]) == 0
    assert kept[0].name == "gpu_suite_nvidia_h100_80gb_hbm3.json"
    assert kept[0].match(table.FILES)
