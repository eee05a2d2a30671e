"""The statistics of an evaluation against plain loops, and what the tables show of them."""

import csv
import html
import io
import json
import math
import re

import numpy as np
import pytest

from esengine.base.printable import shown
from esengine.evaluation.benchmarks import Benchmark
from esengine.evaluation.statistics import flatten, summarise

SCORES = ["sharp", "soft"]


def made_up(entries, prompts=7, repeats=3, seed=0):
    """A benchmark of two categories and one challenge with holes, and scores with ties: (benchmark, records, array)."""
    draw = np.random.default_rng(seed)
    values = draw.normal(20, 2, (len(entries), 2, prompts, repeats)).astype(np.float32)
    values[-1, :, 2:3] = values[0, :, 2:3]  # a tie
    categories = tuple(("Animals", "Arts | Crafts", None)[i % 3] for i in range(prompts))
    challenges = tuple("Quantity" if i == prompts - 1 else None for i in range(prompts))
    benchmark = Benchmark("mine", tuple(f"prompt {i}" for i in range(prompts)), categories, challenges)
    records = [
        {"entry": e, "index": i, "repeat": r, "scores": {n: float(values[k, s, i, r]) for s, n in enumerate(SCORES)}}
        for k, e in enumerate(entries)
        for i in range(prompts)
        for r in range(repeats)
    ]
    draw.shuffle(records)
    return benchmark, records, values


ENTRIES = ["base@1", "mine@1", "base@2", "mine@2"]


@pytest.mark.parametrize("seed", range(3))
def test_every_number_by_plain_loops(seed):
    benchmark, records, values = made_up(ENTRIES, seed=seed)
    report = summarise(benchmark, ENTRIES, SCORES, records, {})
    expected = {
        ("overall", "all"): range(7),
        ("category", "Animals"): (0, 3, 6),
        ("category", "Arts | Crafts"): (1, 4),
        ("challenge", "Quantity"): (6,),
    }
    assert [(g["by"], g["name"]) for g in report.groups] == list(expected)
    for group in report.groups:
        members = expected[group["by"], group["name"]]
        assert [row["entry"] for row in group["rows"]] == ENTRIES
        for k, row in enumerate(group["rows"]):
            assert row["count"] == len(members)
            assert (row["against_first"] is None) == (k == 0)
            for s, name in enumerate(SCORES):
                own = [sum(float(v) for v in values[k, s, i]) / 3 for i in members]
                first = [sum(float(v) for v in values[0, s, i]) / 3 for i in members]
                assert row["mean"][name] == pytest.approx(sum(own) / len(own), rel=1e-12)
                if k == 0:
                    continue
                paired = row["against_first"][name]
                d = [y - x for x, y in zip(first, own, strict=True)]
                mean = sum(d) / len(d)
                assert paired["difference"] == pytest.approx(mean, rel=1e-9)
                if len(d) == 1:
                    assert paired["standard_error"] is None
                else:
                    deviation = math.sqrt(sum((x - mean) ** 2 for x in d) / (len(d) - 1))
                    assert paired["standard_error"] == pytest.approx(deviation / math.sqrt(len(d)), rel=1e-9)
                won = sum(1.0 if x > 0 else 0.5 if x == 0 else 0.0 for x in d) / len(d)
                assert paired["win_rate"] == pytest.approx(won, rel=1e-12)


def test_the_gap_that_is_closed():
    benchmark, records, _ = made_up(ENTRIES)
    lift = {"base@1": 0.0, "mine@1": 0.25, "base@2": 2.0, "mine@2": 3.0}
    for record in records:
        value = record["index"] + lift[record["entry"]]
        record["scores"] = {"sharp": value, "soft": -value}
    gap = summarise(benchmark, ENTRIES, SCORES, records, {}).gap_closed
    between, none = {"from": "base@1", "to": "base@2"}, {"mine@1": None}
    assert gap["sharp"] == {**between, "gap": 2.0, "share": {"mine@1": 0.125}, "standard_error": {"mine@1": 0.0}}
    assert gap["soft"] == {**between, "gap": -2.0, "share": none, "standard_error": none}
    assert summarise(benchmark, ENTRIES[::-1], SCORES, records, {}).gap_closed == gap
    some = [record for record in records if record["entry"] != "base@2"]
    assert summarise(benchmark, ["base@1", "mine@1", "mine@2"], SCORES, some, {}).gap_closed == {}


def test_the_error_of_the_share_is_that_of_leaving_prompts_out():
    rng, entries = np.random.default_rng(0), ["base@1", "mine@1", "base@2"]
    one = rng.normal(size=80)
    values = one, one + rng.normal(0.3, 0.2, 80), one + rng.normal(0.6, 0.3, 80)
    records = [
        {"entry": entry, "index": i, "repeat": 0, "scores": {"sharp": value}}
        for entry, each in zip(entries, values, strict=True)
        for i, value in enumerate(each)
    ]
    found = summarise(Benchmark("b", ("p",) * 80, (None,) * 80, (None,) * 80), entries, ["sharp"], records, {})
    error = found.gap_closed["sharp"]["standard_error"]["mine@1"]
    gained, gap = values[1] - one, values[2] - one
    without = [np.delete(gained, i).mean() / np.delete(gap, i).mean() for i in range(80)]
    assert error == pytest.approx(math.sqrt(79 * np.var(without)), rel=0.02)
    share = found.gap_closed["sharp"]["share"]["mine@1"]
    assert f"{share:.0%} ± {error:.0%}" in found.table()
    assert f"{share:.0%} ± {error:.0%}" in found.to_markdown()


def test_the_order_of_the_records_changes_no_byte():
    benchmark, records, _ = made_up(ENTRIES)
    one = summarise(benchmark, ENTRIES, SCORES, records, {"seed": 1})
    other = summarise(benchmark, ENTRIES, SCORES, records[::-1], {"seed": 1})
    assert one.to_json() == other.to_json()
    assert one.to_csv() == other.to_csv()
    assert one.to_markdown() == other.to_markdown()


def test_an_image_that_is_missing_is_no_zero():
    benchmark, records, _ = made_up(ENTRIES)
    with pytest.raises(ValueError, match="missing"):
        summarise(benchmark, ENTRIES, SCORES, records[1:], {})


def test_json_and_csv_hold_every_number():
    benchmark, records, _ = made_up(ENTRIES)
    report = summarise(benchmark, ENTRIES, SCORES, records, {"seed": 1})
    data = json.loads(report.to_json())
    assert list(data) == [
        "benchmark", "prompts", "repeats", "entries", "scores", "settings", "groups", "gap_closed",
    ]  # fmt: skip
    assert (data["benchmark"], data["prompts"], data["repeats"]) == ("mine", 7, 3)
    rows = list(csv.DictReader(io.StringIO(report.to_csv())))
    assert len(rows) == 4 * len(ENTRIES) * len(SCORES)
    for row in rows:
        group = next(g for g in data["groups"] if (g["by"], g["name"]) == (row["by"], row["group"]))
        found = next(r for r in group["rows"] if r["entry"] == row["entry"])
        assert float(row["mean"]) == found["mean"][row["score"]]
        if row["entry"] == "base@1":
            assert row["difference"] == row["win_rate"] == ""
        else:
            assert float(row["difference"]) == found["against_first"][row["score"]]["difference"]


def test_markdown_tables_keep_their_columns():
    benchmark, records, _ = made_up(ENTRIES)
    text = summarise(benchmark, ENTRIES, SCORES, records, {"a": {"b": "x | y\nz"}}).to_markdown()
    assert text.startswith("# mine: 7 prompts, 3 images each\n")
    assert "## By category" in text
    assert "## By challenge" in text
    for table in text.split("\n\n"):
        if table.startswith("|"):
            lines = table.strip().replace(r"\|", "").split("\n")
            assert len({line.count("|") for line in lines}) == 1, table
    assert r"| a.b | x \| y z |" in text


def test_the_printed_table_is_aligned():
    benchmark, records, _ = made_up(ENTRIES, repeats=1)
    report = summarise(benchmark, ENTRIES, SCORES, records, {})
    header, *lines = report.table().splitlines()
    assert header.split("  ")[0] == "score"
    assert header.endswith("gap closed")
    assert len(lines) == len(ENTRIES) * len(SCORES)
    for line in lines:
        assert line[header.index("entry") :].split()[0] in ENTRIES
    base, mine = lines[0].split(), lines[1].split()
    assert len(base) == 3
    paired = report.groups[0]["rows"][1]["against_first"]["sharp"]
    assert mine[3:6] == [
        f"{paired['difference']:+.4f}",
        f"{paired['standard_error']:.4f}",
        f"{paired['win_rate']:.0%}",
    ]


def test_one_prompt_and_one_entry():
    benchmark, records, _ = made_up(["base@1"], prompts=1, repeats=1)
    report = summarise(benchmark, ["base@1"], SCORES, records, {})
    assert report.groups[0]["rows"][0]["count"] == 1
    assert "In brackets" not in report.to_markdown()
    benchmark, records, _ = made_up(["base@1", "mine@1"], prompts=1, repeats=2)
    line = summarise(benchmark, ["base@1", "mine@1"], SCORES, records, {}).table().splitlines()[2]
    assert line.split()[4] == "-"


def test_flatten_joins_names():
    assert flatten({"a": 1, "b": {"c": [2], "d": {"e": None}}}) == {"a": 1, "b.c": [2], "b.d.e": None}


HOSTILE = [
    "=1+1",
    "+x",
    "-y",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "\n=1",
    " =1",
    "a\r=1",
    "a\n=1",
    "\N{FULLWIDTH EQUALS SIGN}1",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_spreadsheet_computes_nothing(text):
    entries, scores = ["base@1", f"{text}@1"], [text]
    records = [
        {"entry": entry, "index": 0, "repeat": 0, "scores": {text: -float(at)}} for at, entry in enumerate(entries)
    ]
    report = summarise(Benchmark(text, ("p",), (text,), (text,)), entries, scores, records, {text: text})
    rows = list(csv.reader(io.StringIO(report.to_csv(), newline="")))
    assert len(rows) == 1 + 3 * 2
    for row in rows[1:]:
        for cell in row:
            number = cell and cell.lstrip("+-").replace(".", "").isdigit()
            assert number or not cell.strip() or cell.strip()[0] not in "=+-@\N{FULLWIDTH EQUALS SIGN}"
    assert rows[2][5] == "-1.0"  # numbers stay numbers
    assert rows[1][3] == (text.replace("\r", " ").replace("\n", " ") if text[0] == "a" else f"'{text.strip()}")


@pytest.mark.parametrize(
    "text",
    ["<img src=x onerror=alert(1)>", "</td><script>x</script>", "[a](javascript:x)", "![a](http://h/x.png)", "**b**",
     "`c`", "a|b", "a\\|b", "~~d~~", "_e_", "&lt;", "two\nlines", "\x1b[31m\u202e"],
)  # fmt: skip
def test_markdown_shows_texts_as_they_are(text):
    markdown = pytest.importorskip("markdown_it")
    entries, scores = ["base@1", f"{text}@1"], [text]
    records = [{"entry": entry, "index": 0, "repeat": 0, "scores": {text: 1.0}} for entry in entries]
    made = summarise(Benchmark(text, ("p",), (text,), (text,)), entries, scores, records, {text: text}).to_markdown()
    assert not set(made) & set("\x1b\u202e")
    page = markdown.MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(made)
    bare = re.sub(r"</?(h1|h2|p|table|thead|tbody|tr|th|td)( [^>]*)?>", "", page)
    assert "<" not in bare
    assert html.unescape(bare).count(shown(text)) >= 6
