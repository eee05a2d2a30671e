"""The tables of the results: the suite's figures with and without a record, and what the page is made of."""

import json

import pytest
import suite.run
import table


def test_without_a_record_every_figure_of_the_suite_is_not_measured(tmp_path):
    rows = table.suite_rows(tmp_path)
    assert len(rows) == len(table.FIGURES)
    assert all(figure.startswith("not measured") for _, figure, _, _ in rows)
    bars = [f"(bar {sign} {value:g})" for sign, value in table.BARS.values()]
    assert sorted(bars) == sorted(
        figure.removeprefix("not measured").strip() for _, figure, *_ in rows if "bar" in figure
    )


def record(device):
    def entry(value, verdict="pass"):
        return {"value": value, "verdict": verdict, "bar": None, "detail": None}

    summary = {name: entry(0.98765) for name in table.FIGURES}
    summary["step_vs_inference"] = entry(None, "failed check")
    summary["images_per_second"] = {"512": entry(150.0), "1024": entry(41.0)}
    return {"summary": summary, "settings": {"pixels": [512, 1024]}, "environment": {"device": device}}


def test_a_record_fills_the_rows(tmp_path):
    for name in ("gpu_suite_a_device.json", "other.json"):
        (tmp_path / name).write_text(json.dumps(record("A device")))
    rows = table.suite_rows(tmp_path)
    assert {(device, file) for _, _, device, file in rows} == {("A device", "gpu_suite_a_device.json")}
    figures = {what: figure for what, figure, *_ in rows}
    assert figures[table.FIGURES["linear_vs_gemm"]] == "0.9877 (bar >= 0.97)"
    assert figures[table.FIGURES["linear_in_block_vs_gemm"]] == "0.9877"
    assert figures[table.FIGURES["step_vs_inference"]] == "failed check (bar >= 0.98)"
    assert figures["images/s of a whole step, 1024 px"] == "41 (bar >= 40)"


def test_every_record_of_the_suite_is_a_section(tmp_path, monkeypatch):
    for name in ("first", "second"):
        (tmp_path / f"gpu_suite_{name}.json").write_text(json.dumps(record(name)))
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    sections = table._suite()
    assert [(each.device, each.files) for each in sections] == [
        ("first", ["gpu_suite_first.json"]),
        ("second", ["gpu_suite_second.json"]),
    ]
    assert all("`bench/results/gpu_suite_" in "\n".join(each.lines()) for each in sections)


def test_the_suite_writes_the_file_that_the_table_reads(monkeypatch, tmp_path):
    kept = []
    monkeypatch.setattr(suite.run, "RESULTS", tmp_path)
    monkeypatch.setattr(suite.run.record, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(
        suite.run, "run", lambda *a, json_path, **k: kept.append(json_path) or {"summary": {}, "parts": {}}
    )
    monkeypatch.setattr(suite.run, "table", lambda summary: "")
    monkeypatch.setattr(suite.run, "rows", lambda summary: [])
    assert suite.run.main(["--device", "cpu"]) == 0
    assert kept[0].name == "gpu_suite_nvidia_h100_80gb_hbm3.json"
    assert kept[0].match(table.FILES)


def test_highlights_are_six_rows_of_three_cells():
    rows = table.highlights()
    assert len(rows) == 6
    for row in rows:
        what, figure, file = (cell.strip() for cell in row.strip("|").split("|"))
        assert what
        assert any(c.isdigit() for c in figure)
        assert (table.RESULTS / file.strip("`")).is_file()
        assert len(row) <= 120


def test_a_changed_file_changes_the_page(tmp_path, monkeypatch):
    for file in table.RESULTS.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    stored = json.loads((tmp_path / "cpu_demo.json").read_text())
    stored["runs"]["1"]["groups"][0]["rows"][1]["against_first"]["combined"]["difference"] = 0.12345
    (tmp_path / "cpu_demo.json").write_text(json.dumps(stored))
    before = table.generated(), table.highlights()
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    after = table.generated(), table.highlights()
    changed = [new for old, new in zip(before[0], after[0], strict=True) if old != new]
    assert len(changed) == 1
    assert "+0.1235 ± " in changed[0]
    assert [old == new for old, new in zip(before[1], after[1], strict=True)] == [False, *[True] * 5]


def test_writing_replaces_what_stands_between_the_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"above\n{table.BEGIN}\nold\n{table.END}\nbelow\n")
    table.write(page)
    first = page.read_text()
    assert first.startswith(f"above\n{table.BEGIN}\n\n### ")
    assert first.endswith(f"\n{table.END}\nbelow\n")
    assert "\nold\n" not in first
    table.write(page)
    assert page.read_text() == first
    page.write_text("no markers\n")
    with pytest.raises(ValueError, match="expected the lines"):
        table.write(page)
