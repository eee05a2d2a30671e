import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esengine.base.errors import ConfigError
from esengine.base.prompt_files import read_prompts
from esengine.es.prompts import PromptSampler
from esengine.evaluation.benchmarks import read_benchmark
from esengine.models.defaults import defaults


@pytest.fixture
def write(tmp_path):
    def write(data):
        path = tmp_path / "p.txt"
        path.write_bytes(data)
        return path

    return write


def test_lines_comments_blanks_duplicates(write):
    path = write(b"# head\na cat\n\n   \n  a dog # not a comment  \n  # indented comment\na cat")
    assert read_prompts(path) == ["a cat", "a dog # not a comment", "a cat"]


def test_byte_order_mark_line_endings_and_other_scripts(write):
    path = write("\ufeff# head\r\nein Kätzchen\r\n猫\r\nlast\r".encode())
    assert read_prompts(str(path)) == ["ein Kätzchen", "猫", "last"]


def test_a_byte_order_mark_does_not_hide_a_comment(write):
    assert read_prompts(write(b"\xef\xbb\xbf# comment\na")) == ["a"]


@pytest.mark.parametrize("data", [b"", b"\n\n", b"# only\n#comments", b"\xef\xbb\xbf"])
def test_no_prompt(write, data):
    with pytest.raises(ConfigError, match=r"p\.txt: expected at least one prompt"):
        read_prompts(write(data))


def test_bad_bytes_name_their_line(write):
    with pytest.raises(ConfigError, match=r"p\.txt, line 3: expected UTF-8"):
        read_prompts(write(b"a\n# b\nc\xff\n"))
    with pytest.raises(ConfigError, match=r"p\.txt, line 2: .*NUL"):
        read_prompts(write(b"a\nb\0\n"))
    with pytest.raises(ConfigError, match=r"p\.txt, line 1"):
        read_prompts(write("a cat".encode("utf-16")))


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.txt: No such file"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(ConfigError, match="Is a directory"):
        read_prompts(tmp_path)
    with pytest.raises(ConfigError, match="null"):
        read_prompts("a\0b")


PIECES = [b"\xef\xbb\xbf", b"\r\n", b"\n", b"\r", b"\0", b"\xff", b"#", b" ", b"a cat", b"x" * 2**20]
FILES = st.one_of(
    st.binary(max_size=60), st.text(max_size=40).map(str.encode), st.lists(st.sampled_from(PIECES)).map(b"".join)
)


def refused(path):
    """What is said of the file, or None for prompts."""
    try:
        prompts = read_prompts(path)
    except ConfigError as error:
        return str(error)
    assert prompts
    assert all(p and p == p.strip() and not p.startswith("#") and "\n" not in p for p in prompts)
    return None


def first_bad_line(data):
    """Its number from 1, or None."""
    for number, line in enumerate(re.split(rb"\r\n|\r|\n", data.removeprefix(b"\xef\xbb\xbf")), start=1):
        try:
            if "\0" in line.decode():
                return number
        except UnicodeDecodeError:
            return number
    return None


def read_or_refuse(path, data):
    path.write_bytes(data)
    said, bad = refused(path), first_bad_line(data)
    if bad is not None:
        assert said.startswith(f"prompts file {path}, line {bad}: ")
        assert "\n" not in said
    elif said is not None:
        assert said == f"prompts file {path}: expected at least one prompt, got none"


@given(data=FILES)
@settings(max_examples=500, deadline=None)
def test_any_bytes_are_prompts_or_a_config_error(tmp_path_factory, data):
    read_or_refuse(tmp_path_factory.getbasetemp() / "fuzz.txt", data)


@pytest.mark.slow
@given(data=FILES)
@settings(max_examples=10_000, deadline=None)
def test_ten_thousand_files(tmp_path_factory, data):
    read_or_refuse(tmp_path_factory.getbasetemp() / "fuzz.txt", data)


def test_the_files_that_come_with_the_package():
    train, heldout = read_prompts(defaults("tiny").train), read_prompts(defaults("tiny").heldout)
    assert len(set(train)) == len(train) == 64
    assert len(set(heldout)) == len(heldout) == 48
    assert not set(train) & set(heldout)


@given(count=st.integers(1, 20), data=st.data(), seed=st.integers(-(2**63), 2**64 - 1))
@settings(max_examples=100, deadline=None)
def test_each_epoch_draws_every_prompt_once(count, data, seed):
    per_step = data.draw(st.integers(1, count))
    sampler = PromptSampler(count, per_step, seed)
    drawn = torch.cat([sampler.draw(step) for step in range(3 * count)])
    assert drawn.dtype == torch.int64
    assert drawn.shape == (3 * count * per_step,)
    for epoch in range(len(drawn) // count):
        assert sorted(drawn[epoch * count : (epoch + 1) * count].tolist()) == list(range(count))


def test_a_step_depends_on_nothing_before_it():
    one, other = PromptSampler(50, 4, seed=7), PromptSampler(50, 4, seed=7)
    forwards = [one.draw(step).tolist() for step in range(40)]
    backwards = [other.draw(step).tolist() for step in reversed(range(40))]
    assert forwards == backwards[::-1]


def test_epochs_and_seeds_differ():
    sampler = PromptSampler(30, 30, seed=0)
    assert sampler.draw(0).tolist() != sampler.draw(1).tolist()
    assert sampler.draw(0).tolist() != PromptSampler(30, 30, seed=1).draw(0).tolist()


def test_the_order_is_frozen():
    # Resumed runs depend on these values: a change here breaks every run in progress.
    sampler = PromptSampler(10, 4, seed=0)
    assert [sampler.draw(step).tolist() for step in (0, 1, 2)] == [[0, 2, 9, 1], [8, 5, 4, 3], [6, 7, 5, 3]]
    assert sampler.draw(10**6).tolist() == [9, 8, 6, 2]


def test_a_far_step_is_cheap_and_large():
    assert PromptSampler(5, 2, seed=3).draw(10**15).shape == (2,)


@pytest.mark.parametrize(("count", "per_step"), [(3, 4), (0, 1), (3, 0), (3, -1)])
def test_too_many_or_too_few_a_step(count, per_step):
    with pytest.raises(ConfigError, match=rf"prompts, {count}, got {per_step}"):
        PromptSampler(count, per_step, seed=0)


def test_negative_step():
    with pytest.raises(ValueError, match="step"):
        PromptSampler(3, 1, seed=0).draw(-1)


ROWS = ("a cat", "a dog, brown", 'he said "hi"')
FORMS = {
    "p.txt": 'a cat\n# no\na dog, brown\nhe said "hi"\n',
    "p.tsv": 'Category\tPrompt\nAnimals\ta cat\n\ta dog, brown\nPeople\the said "hi"\n',
    "P.TSV": 'PROMPTS\na cat\na dog, brown\nhe said "hi"\n',
    "p.csv": 'id,prompt\n1,a cat\n2,"a dog, brown"\n3,"he said ""hi"""\n',
    "table.txt": 'Prompt\tCategory\tChallenge\na cat\tx\ty\na dog, brown\t\t\nhe said "hi"\t\t\n',
    "table": 'prompt,category\na cat,x\n"a dog, brown",\n"he said ""hi""",y\n',
    "p.jsonl": '{"Prompt": "a cat", "tag": "x", "n": 3}\n\n{"prompt": " a dog, brown "}\n"he said \\"hi\\""\n',
    "p.ndjson": '"a cat"\n"a dog, brown"\n"he said \\"hi\\""\n',
    "lines.txt": '{"prompt": "a cat"}\n{"prompt": "a dog, brown"}\n{"prompt": "he said \\"hi\\""}\n',
    "names.txt": 'Image ID,Prompt,Source URL\n1,a cat,u\n2,"a dog, brown",u\n3,"he said ""hi""",u\n',
    "quoted.txt": '"Prompt","My Category"\na cat,x\n"a dog, brown",y\n"he said ""hi""",z\n',
    "note.txt": 'Prompt,Note 1\na cat,x\n"a dog, brown",y\n"he said ""hi""",z\n',
    "dash.txt": 'image-id,prompt\n1,a cat\n2,"a dog, brown"\n3,"he said ""hi"""\n',
    "spaced.txt": '"prompt", "style"\n"a cat", x\n"a dog, brown", y\n"he said ""hi""", z\n'.replace('", ', '",'),
    "long.txt": 'prompt,the name of a column that goes on for long\na cat,\n"a dog, brown",\n"he said ""hi""",\n',
    "pandas.txt": ',prompt\n0,a cat\n1,"a dog, brown"\n2,"he said ""hi"""\n',
    "single.txt": 'Prompt\na cat\n"a dog, brown"\nhe said "hi"\n',
    "below.txt": '# mine\n\nPrompt\tCategory\n# some\na cat\tx\na dog, brown\ty\nhe said "hi"\t\n',
    "below.csv": '# mine, all\nid,prompt\n1,a cat\n2,"a dog, brown"\n3,"he said ""hi"""\n',
    "list.txt": '["a cat", "a dog, brown", "he said \\"hi\\""]\n',
    "pretty.txt": '[\n  "a cat",\n  "a dog, brown",\n  "he said \\"hi\\""\n]\n',
    "p.json": '["a cat", {"prompt": "a dog, brown"}, {"prompt": "he said \\"hi\\"", "category": null}]',
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_prompts(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"\xef\xbb\xbf" + FORMS[name].replace("\n", "\r\n").encode())
    assert read_prompts(path) == list(ROWS)
    assert read_benchmark(None, path).prompts == ROWS


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.tsv", "a cat\na dog\n", "columns Prompt or Prompts, got the columns a cat"),
        ("p.csv", "", "got the columns none"),
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', "line 2: expected a key prompt, got the keys text"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": 3}\n', "line 2: expected text as its prompt, got 3"),
        ("p.jsonl", '{"prompt": ""}\n', "line 1: expected a prompt"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt"\n', "line 2: expected JSON"),
        ("p.jsonl", '{"prompt": "a\\u0000"}\n', "line 1: expected text without NUL"),
        ("p.jsonl", '{"prompt": "\\ud800"}\n', "line 1: expected text without NUL or surrogates"),
        ("p.jsonl", '{"prompt": "a", "Prompts": "b"}\n', "line 1: expected one key prompt"),
        ("p.jsonl", "[1]\n", "line 1: expected an object"),
        ("p.json", '{"prompt": "a"}', "expected a JSON list"),
        ("p.json", '["a", 7]', "item 2: expected an object"),
        ("p.json", "[]", "at least one prompt"),
        ("p.yaml", "- a cat\n", r"expected \.txt .* got \.yaml"),
        ("p.txt", "Prompt;Category\na cat;x\n", "got the columns Prompt;Category; columns stand between"),
        ("p.txt", "prompt|id\na cat|1\n", "got the columns prompt.id"),
        ("p.txt", "text\tid\na cat\t1\n", "got the columns text, id"),
        ("p.txt", "id,caption\n1,a cat\n", "got the columns id, caption"),
        ("p.txt", "Caption\na cat\n", "got the columns Caption"),
        ("p.txt", "1\ta cat\n2\ta dog\n", "got the columns 1, a cat"),
        ("p.txt", "a cat\tx\na dog\t\n", "got the columns a cat, x"),
        ("p.txt", "Text Prompt\tCategory\tNote\na cat\tx\t\n", "got the columns Text Prompt, Category, Note"),
        ("p.txt", "My prompts v1\nPrompt\tCategory\na cat\tx\n", "got the columns My prompts v1"),
        ("p.txt", "Prompt (English),Category\na cat,x\n", "got the columns Prompt .English., Category"),
        ("p.txt", "prompt_en,prompt_zh\na cat,x\n", "got the columns prompt_en, prompt_zh"),
        ("p.txt", "file_name,text prompt\n1,a cat\n", "got the columns file_name, text prompt"),
        ("p.txt", "- prompt: a cat\n- prompt: a dog\n", r"looks like \.yaml"),
        ("p.txt", "---\nprompts:\n- a cat\n", r"looks like \.yaml"),
        ("p.txt", "prompts: [a cat, a dog]\n", r"looks like \.yaml"),
        ("p.txt", "train:\n  prompts:\n  - a cat\n", r"looks like \.yaml"),
        ("p.txt", 'prompts = [\n"a cat",\n]\n', r"looks like \.toml"),
        ("p.txt", '<?xml version="1.0"?>\n<a/>\n', r"looks like \.xml"),
        ("p.txt", '{ "prompt" : "a cat" \n{ "prompt" : "a dog" }\n', "expected JSON"),
        ("p.txt", '[ "a cat",\n"a dog"\n', "expected JSON"),
        ("p.txt", "userPrompt,id\na cat,1\n", "got the columns userPrompt, id"),
        ("p.txt", "promptText,seedValue\na cat,1\n", "got the columns promptText, seedValue"),
        ("p.txt", "image_path,text\n1,a cat\n", "got the columns image_path, text"),
        ("p.txt", "caption,style\na cat,photo\n", "got the columns caption, style"),
        ("p.txt", "id,description\n1,a cat\n", "got the columns id, description"),
        ("p.txt", "id\tdescription\n1\ta cat\nfoot\n", "got the columns id, description"),
        ("p.txt", "prompts:\n- a cat\n", r"expected \.txt .* got what looks like \.yaml"),
        ("p.txt", "| prompt | category |\n|---|---|\n| a cat | x |\n", "got the columns"),
        ("p.txt", '{"prompt": "a cat"},\n{"prompt": "a dog"},\n', "expected JSON"),
        ("p.txt", "{'prompt': 'a cat'}\n{'prompt': 'a dog'}\n", "expected JSON"),
        ("p.txt", '[{"prompt": "a"},\n {"prompt": "b"},]\n', "expected JSON"),
        ("p.txt", '[["a cat", "x"], ["a dog", "y"]]\n', "item 1: expected an object"),
        ("p.txt", '["a cat", "x"]\n["a dog", "y"]\n', "expected JSON"),
        ("p.txt", '[\n"a cat",\n"a dog",\n]\n', "expected JSON"),
        ("p.txt", '{"prompts": [\n"a cat"\n]}', "expected a JSON list"),
        ("p.tsv", 'Prompt\n"a\nb"\n', "line 2: expected each prompt on one line, got a quoted cell .* to line 3"),
        ("p.tsv", 'Id\tPrompt\n1\t"a\n\nb"\n', "line 2: expected each prompt on one line"),
        ("p.parquet", "PAR1", r"got \.parquet"),
    ],
)
def test_what_is_no_file_of_prompts_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    for read in (read_prompts, lambda path: read_benchmark(None, path)):
        with pytest.raises(ConfigError, match=words) as caught:
            read(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize(
    "prompts",
    [
        ["a city, prompt, 4k", "a dog"],
        ["poster, text, typography", "a dog; a cat"],
        ["text", "a dog"],
        ["cat,dog,text", "a dog"],
        ["prompt, city, night", "a cat"],
        ["a prompt, handwritten, on paper", "a cat"],
        ["[[masterpiece]] a cat", "a dog"],
        ['["Hello"] written on a wall', '["Bye"] on a door'],
        ["['quoted'] text", '{"neon"} sign over a door'],
        ["a computer with a command prompt,green text", "a cat"],
        ["a screen,dos prompt", "text with an id, image"],
        ["text, label", "a cat"],
        ["[oil painting] a cat", "{a dog}"],
        ["prompt: a cat", "a dog | a cat"],
        ['"GIGGLE" in thick lettering', 'a 6" ruler', '"BE EXCELLENT"'],
        ["Prompt"],
        ["a\ttab", "none"],
    ],
)
def test_prompts_that_only_remind_of_a_table_or_of_json_are_text(tmp_path, prompts):
    path = tmp_path / "p.txt"
    path.write_text("\n".join(prompts))
    assert read_prompts(path) == prompts


def test_a_quote_that_a_prompt_leaves_open_joins_no_lines(tmp_path):
    path = tmp_path / "p.tsv"
    path.write_text('Prompt\tCategory\n"open\tx\nclosed"\ty\n')
    assert read_prompts(path) == ['"open', 'closed"']
