"""Prompt tables as people have them: published files, spreadsheets' exports, and broken ones."""

import pytest

from esengine.base.errors import ConfigError
from esengine.evaluation import benchmarks
from esengine.evaluation.benchmarks import read_benchmark

PARTI = (
    "Prompt\tCategory\tChallenge\tNote\n"
    "bond\tAbstract\tBasic\tBiology-inspired concepts with multiple meanings\n"
    '"G I G G L E" painted in thick colorful lettering.\tIllustrations\tWriting & Symbols\t\n'
    'a sign that says "Very Deep Learning", at the edge.\tWorld Knowledge\tWriting & Symbols\t\n'
    " A sloth in a go kart. \tAnimals\tImagination\t\n"
)
PROMPTS = (
    "bond",
    '"G I G G L E" painted in thick colorful lettering.',
    'a sign that says "Very Deep Learning", at the edge.',
    "A sloth in a go kart.",
)


@pytest.fixture
def table(tmp_path):
    def write(content: str | bytes, name="table.tsv"):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def test_partiprompts_as_it_is_published(table):
    found = read_benchmark("partiprompts", table(PARTI))
    assert found.name == "partiprompts"
    assert found.prompts == PROMPTS
    assert found.categories == ("Abstract", "Illustrations", "World Knowledge", "Animals")
    assert found.challenges == ("Basic", "Writing & Symbols", "Writing & Symbols", "Imagination")


def by_column(text, order):
    rows = [line.split("\t") for line in text.splitlines()]
    return "".join("\t".join(row[i] for i in order) + "\n" for row in rows)


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + PARTI.encode(),
        PARTI.replace("\n", "\r\n"),
        PARTI.replace("\n", "\r\n").rstrip("\r\n"),
        PARTI.replace("Prompt\tCategory\tChallenge", "PROMPTS\tcategory\t chaLLenge "),
        PARTI.replace("\n", "\n\n\t\t\t\n"),
        by_column(PARTI, [3, 2, 1, 0]),
        by_column(PARTI, [2, 0, 1]),
        PARTI.replace("\t\n", "\n"),
    ],
)
def test_marks_line_endings_case_order_blank_lines_and_missing_tails(table, content):
    found = read_benchmark("partiprompts", table(content))
    assert found == read_benchmark("partiprompts", table(PARTI, "plain.tsv"))


def test_a_spreadsheets_quotes_are_its_own(table):
    saved_anew = 'Prompt\tCategory\tChallenge\n"He said ""hi"", twice"\tPeople\tBasic\n"a, b"\tArts\tBasic\n'
    assert read_benchmark("partiprompts", table(saved_anew)).prompts == ('He said "hi", twice', "a, b")


DRAWBENCH = 'Prompts,Category\r\nA red colored car.,Colors\r\n"A stack of 3 cubes, ""red"" on top.",DALL-E\r\n'


def test_drawbench_is_csv(table):
    found = read_benchmark("drawbench", table(DRAWBENCH, "DrawBench Prompts - Sheet1.csv"))
    assert found.prompts == ("A red colored car.", 'A stack of 3 cubes, "red" on top.')
    assert found.categories == ("Colors", "DALL-E")
    assert found.challenges == (None, None)


def test_files_of_ones_own(table):
    text = table("# mine\n a cat \n\na dog, brown\n", "mine.txt")
    assert read_benchmark(str(text)) == read_benchmark(None, text)
    assert (read_benchmark(str(text)).name, read_benchmark(str(text)).prompts) == ("mine", ("a cat", "a dog, brown"))
    assert read_benchmark(str(text)).categories == (None, None)
    only = table("prompt\na cat\n", "only.CSV")
    assert read_benchmark(str(only)).prompts == ("a cat",)
    some = table("id,challenge,prompt\n7,,a cat\n8,Hard,a dog\n", "some.csv")
    assert read_benchmark(None, some).challenges == (None, "Hard")
    assert read_benchmark(str(table(DRAWBENCH, "d.csv"))).categories == ("Colors", "DALL-E")


def test_the_first_so_many(table):
    found = read_benchmark("partiprompts", table(PARTI))
    assert found.first(2).prompts == PROMPTS[:2]
    assert found.first(2).challenges == ("Basic", "Writing & Symbols")
    assert found.first(None) == found.first(99) == found
    assert found.first(3).sha256() != found.sha256()
    assert found.sha256() == read_benchmark("partiprompts", table(PARTI, "again.tsv")).sha256()
    assert found.sha256() != read_benchmark("partiprompts", table(PARTI.replace("Basic", "basic"))).sha256()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["columns Prompt or Prompts, Category, Challenge", "got the columns none"]),
        ("Text\tCategory\n a\tb\n", ["Prompt or Prompts, Challenge", "got the columns Text, Category"]),
        ("a cat\na dog\n", ["Prompt or Prompts", "a cat"]),
        ("Prompt;Category;Challenge\na;b;c\n", ["Prompt;Category;Challenge"]),
        ("Prompt\tCategory\tChallenge\n", ["at least one prompt"]),
        ("Prompt\tCategory\tChallenge\n\n\t\t\n", ["at least one prompt"]),
        ("Prompt\tCategory\tChallenge\na\tb\tc\n\tb\tc\n", ["line 3", "expected a prompt"]),
        ("Prompt\tCategory\tChallenge\na\tb\tc\td\n", ["line 2", "3 cells, got 4"]),
        ("Prompt,Category,Challenge\na, b,c,d\n", ["line 2", "3 cells, got 4"]),
        ('Prompt,Category,Challenge\na,b,c\n"a,b,c\nd,e,f\n', ["line 4", "expected a table"]),
        ('Prompt,Category,Challenge\n"a"b,c,d\n', ["line 2", "expected a table"]),
        ("Prompt\tPrompts\tCategory\tChallenge\n", ["one column Prompt"]),
        ("Prompt\tCategory\tChallenge\tcategory\n", ["one column Category"]),
        (b"Prompt\tCategory\tChallenge\nok\tb\tc\nna\xefve\tb\tc\n", ["line 3", "UTF-8"]),
        ("Prompt\tCategory\tChallenge\nok\tb\tc\n".encode("utf-16"), ["line 1", "NUL"]),
        (b"Prompt\tCategory\tChallenge\nok\tb\tc\na\0\tb\tc\n", ["line 3", "NUL"]),
        ("Prompt\tCategory\tChallenge\n" + "x" * 200_000 + "\tb\tc\n", ["line 2", "field limit"]),
    ],
)
def test_what_is_wrong_is_named_with_its_line(table, content, words):
    path = table(content)
    with pytest.raises(ConfigError) as caught:
        read_benchmark("partiprompts", path)
    assert str(path) in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_what_is_not_a_benchmark(table, tmp_path):
    with pytest.raises(ConfigError, match="partiprompts, drawbench, nano or a file, got 'nosuch'"):
        read_benchmark("nosuch")
    with pytest.raises(ConfigError, match="No such file"):
        read_benchmark("partiprompts", tmp_path / "nosuch.tsv")
    with pytest.raises(ConfigError, match="directory"):
        read_benchmark("drawbench", tmp_path)
    with pytest.raises(ConfigError, match="beside benchmark"):
        read_benchmark(str(table(PARTI)), table(PARTI))
    with pytest.raises(ConfigError, match="line 2: expected UTF-8"):
        read_benchmark(None, table(b"a\n\xff\n", "bad.txt"))


def test_the_hubs_file(table, monkeypatch):
    import huggingface_hub

    asked = []

    def hub(dataset, file, repo_type):
        asked.append((dataset, file, repo_type))
        return str(table(PARTI, "from_hub.tsv"))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub)
    assert read_benchmark("partiprompts").prompts == PROMPTS
    assert asked == [("nateraw/parti-prompts", "PartiPrompts.tsv", "dataset")]


@pytest.mark.parametrize("name", benchmarks.PUBLISHED)
def test_without_the_hub_the_error_says_what_to_do(name, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        read_benchmark(name)
    published = benchmarks.PUBLISHED[name]
    assert all(word in str(caught.value) for word in (published.file, published.dataset, "--prompts FILE"))
