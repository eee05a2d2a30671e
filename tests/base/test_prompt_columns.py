"""The columns of prompt files besides the prompt: every form, odd cells, and what is refused."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esengine.base.errors import ConfigError
from esengine.base.prompt_files import metadata_sha256, read_prompt_file, read_with_metadata

BOM = b"\xef\xbb\xbf"
TWO = [{"Target": "CAT", "n": "1"}, {"Target": None, "n": "2"}]
FORMS = {
    "p.tsv": "Target\tPrompt\tn\nCAT\ta cat\t1\n\ta dog\t2\n",
    "p.csv": "n,PROMPT,Target\n1,a cat,CAT\n2,a dog\n",  # the last row is shorter
    "quoted.csv": '"n","prompt","Target"\n"1","a cat","CAT"\n"2","a dog",""\n',
    "table.txt": "prompt\tTarget\tn\na cat\tCAT\t1\na dog\t\t2\n",
    "unnamed.csv": ",prompt,Target,n,\n0,a cat,CAT,1,\n1,a dog,,2,\n",
    "p.json": json.dumps([{"prompt": "a cat"} | TWO[0], TWO[1] | {"Prompt": "a dog"}]),
    "p.jsonl": '{"Target": "CAT", "n": "1", "prompts": "a cat"}\n{"prompt": "a dog", "Target": null, "n": "2"}\n',
}


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_columns(write, name):
    path = write(name, BOM + FORMS[name].replace("\n", "\r\n").encode())
    assert read_with_metadata(path) == (["a cat", "a dog"], tuple(TWO))


@pytest.mark.parametrize(("name", "content"), [("p.txt", "a cat\na dog\n"), ("p.json", '["a cat", "a dog"]')])
def test_a_list_of_prompts_has_no_columns(write, name, content):
    assert read_with_metadata(write(name, content)) == (["a cat", "a dog"], ({}, {}))


def test_names_keep_their_case_and_groups_are_columns_too(write):
    path = write("p.tsv", "Prompt\tCategory\ttext\tText\ta name\na\tx\tone\ttwo\tthree\n")
    found = read_prompt_file(path)
    assert found["metadata"] == ({"Category": "x", "text": "one", "Text": "two", "a name": "three"},)
    assert found["category"] == ("x",)


def test_json_values_are_of_any_type_and_absent_keys_stay_absent(write):
    values = {"a": [1, {"b": None}], "c": True, "d": 1.5, "e": 10**30, "f": "ö", "": {}}
    lines = [{"prompt": "a", **values}, {"prompt": "a"}, "a", {"Prompt": "a", "a": None}]
    path = write("p.jsonl", "\n".join(map(json.dumps, lines)))
    assert read_with_metadata(path) == (["a"] * 4, (values, {}, {}, {"a": None}))


def test_a_cell_of_a_csv_table_may_hold_line_breaks_commas_and_quotes(write):
    path = write("p.csv", 'prompt,target\na sign,"two\nlines, ""quoted"""\n')
    assert read_with_metadata(path)[1] == ({"target": 'two\nlines, "quoted"'},)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.tsv", "Prompt\ttarget\ttarget\na\tb\tc\n", "one column target, got several"),
        ("p.csv", "prompt,target\na,b,c\n", "line 2: expected 2 cells, got 3"),
        ("p.jsonl", '{"prompt": "a", "n": NaN}', "line 1: expected JSON, got NaN is no number in JSON"),
        ("p.jsonl", '{"prompt": "a", "n": [{"x": -1e999}]}', "line 1: expected a finite number or null as its n"),
        ("p.jsonl", '{"prompt": "a", "n": "\\ud800"}', "line 1: expected text without NUL or surrogates as its n"),
        ("p.jsonl", '{"prompt": "a", "n": {"\\u0000": 1}}', "line 1: expected text without NUL or surrogates as its n"),
        ("p.jsonl", '{"prompt": "a", "\\ud800": 1}', "line 1: expected a column's name without NUL or surrogates"),
        ("p.jsonl", '{"prompt": "a", "n": 1, "n": 2}', "line 1: expected JSON, got expected each key once"),
        ("p.jsonl", '{"prompt": "a", "n": ' + "[" * 66 + "]" * 66 + "}", "at most 64 levels"),
        ("p.jsonl", '{"prompt": "a", "n": ' + "[" * 99999 + "]" * 99999 + "}", "expected JSON"),
        ("p.jsonl", '{"prompt": "a", "n": 1' + "0" * 5000 + "}", "line 1: expected JSON"),
    ],
)
def test_what_cannot_be_stored_or_sent_is_refused_with_its_line(write, name, content, words):
    path = write(name, content)
    with pytest.raises(ConfigError, match=words) as caught:
        read_with_metadata(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 400


def test_the_hash_is_of_prompts_and_columns_in_their_order():
    one = metadata_sha256(["a", "a"], [{"x": 1, "y": 2}, {}])
    assert one == metadata_sha256(["a", "a"], [{"y": 2, "x": 1}, {}])
    for prompts, metadata in [
        (["a", "a"], [{}, {"x": 1, "y": 2}]),
        (["a", "a"], [{"x": 1, "y": "2"}, {}]),
        (["a", "b"], [{"x": 1, "y": 2}, {}]),
    ]:
        assert metadata_sha256(prompts, metadata) != one


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
LINES = st.lists(st.dictionaries(st.sampled_from(["prompt", "a", "", "ö", "Category"]), VALUES, max_size=4), max_size=4)
TABLES = st.lists(st.lists(st.text(st.sampled_from("ab \",\t\n\r'#ö\ufeff\0"), max_size=5), max_size=4), max_size=4)


def read_or_refuse(folder, lines, table, raw):
    contents = {
        "f.jsonl": "\n".join(map(json.dumps, lines)).encode(),
        "f.json": json.dumps(lines).encode(),
        "f.csv": b"prompt,a\n" + "\n".join(map(",".join, table)).encode(),
        "f.tsv": b"a\tprompt\n" + "\n".join(map("\t".join, table)).encode(),
        "g.csv": raw,
        "g.jsonl": raw,
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        try:
            prompts, metadata = read_with_metadata(folder / name)
        except ConfigError as error:
            assert "\n" not in str(error)  # noqa: PT017  most draws are read
            continue
        assert len(prompts) == len(metadata) > 0
        assert json.loads(json.dumps(metadata, allow_nan=False)) == list(metadata)
        assert len(metadata_sha256(prompts, metadata)) == 64


@given(lines=LINES, table=TABLES, raw=st.binary(max_size=40))
@settings(max_examples=500, deadline=None)
def test_any_table_is_read_or_refused(tmp_path_factory, lines, table, raw):
    read_or_refuse(tmp_path_factory.getbasetemp(), lines, table, raw)


@pytest.mark.slow
@given(lines=LINES, table=TABLES, raw=st.binary(max_size=40))
@settings(max_examples=10_000, deadline=None)
def test_ten_thousand_tables(tmp_path_factory, lines, table, raw):
    read_or_refuse(tmp_path_factory.getbasetemp(), lines, table, raw)
