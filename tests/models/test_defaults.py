"""What a run does where the flags are silent, by its model."""

import ast
import pkgutil
import re
from pathlib import Path

import pytest

import esengine
from esengine.base.errors import ConfigError
from esengine.base.prompt_files import read_prompts
from esengine.evaluation.benchmarks import read_benchmark
from esengine.models.defaults import BENCHMARKS, REWARDS, defaults
from esengine.models.nano import world
from esengine.rewards import load, parse
from esengine.rewards.loading import locate
from esengine.rewards.roles import judges, read_terms
from esengine.rewards.spec import read


def test_the_nano_prompts_are_the_worlds_and_of_three_splits():
    of = defaults("nano")
    train, heldout, test = read_prompts(of.train), read_prompts(of.heldout), read_benchmark("nano")
    assert train == world.captions("train", len(train), 0)
    assert heldout == world.captions("validation", len(heldout), 0)
    assert list(test.prompts) == world.captions("test", len(test), 0)
    assert (len(train), len(heldout), len(test)) == (1000, 1024, 1000)
    for caption, category, challenge in zip(test.prompts, test.categories, test.challenges, strict=True):
        spec = world.parse(caption)
        assert category == ("one object", "two objects")[len(spec.objects) - 1]
        sized = any(each.size for each in spec.objects)
        assert challenge == ("relation" if spec.relation else "place" if spec.place else "size" if sized else "plain")


def test_a_model_has_its_own_prompts_and_reward():
    assert defaults("tiny").reward == "jpeg_compressibility"
    assert defaults("somebody/model") == defaults("/a/folder")
    assert defaults("somebody/model").reward == "pickscore"
    assert defaults("tiny").train == defaults("somebody/model").train != defaults("nano").train
    assert BENCHMARKS["nano"].is_file()


@pytest.mark.parametrize(
    ("model", "of", "names"),
    [
        ("nano", "nano", ["checker", "pickscore", "clip_text", "aesthetic", "no_artifacts"]),
        ("nano", "partiprompts", ["pickscore", "clip_text", "aesthetic", "no_artifacts"]),
        ("somebody/model", "partiprompts", ["pickscore", "clip_text", "aesthetic", "no_artifacts"]),
    ],
)
def test_a_benchmark_has_one_reward_of_weight_one(model, of, names):
    terms = read(defaults(model).benchmark(of))
    assert [term.name for term in terms] == names
    assert [term.weight for term in terms] == [1.0] + [0.0] * (len(names) - 1)
    assert {term.options.get("model") for term in terms if term.name != "checker"} == (
        {"nano"} if model == "nano" else {None}
    )


@pytest.mark.parametrize(
    ("optimised", "own_prompts", "expected"),
    [
        ("pickscore", False, ["checker", "clip_text", "aesthetic", "no_artifacts"]),
        ("pickscore", True, ["clip_text", "aesthetic", "no_artifacts"]),
        ("jpeg_compressibility", True, ["pickscore", "clip_text", "aesthetic", "no_artifacts"]),
        ("checker=1,pickscore(model=nano)=0.02", False, ["clip_text", "aesthetic", "no_artifacts"]),
        ("combined(pickscore=1,clip_text=1,aesthetic=1,no_artifacts=1,checker=1)", False, []),
    ],
)
def test_on_nano_every_judge_that_is_not_optimised_is_watched(optimised, own_prompts, expected):
    terms = read_terms(optimised, "auto", defaults("nano"), own_prompts=own_prompts)
    watched = [term for term in terms if term.role == "watched"]
    assert [term.name for term in watched] == expected
    assert all(term.weight == 0 and term.optional for term in watched)
    assert {term.options.get("model") for term in watched if term.name != "checker"} <= {"nano"}
    assert [term.text() for term in watched if term.name == "clip_text"] in ([], ["clip_text(model=nano)"])


def test_the_judges_of_nano_load_from_the_package():
    judges = parse(defaults("nano").benchmark("nano"))
    assert judges.settings()["pickscore"]["model"] == "nano"
    assert judges.settings()["pickscore"]["fingerprint"].startswith("sha256:")


def test_the_engine_names_no_packaged_world():
    """Help texts may name it. Code and data of the engine find it by the defaults of a model."""
    files = [path for path in Path(esengine.__file__).parent.rglob("*.py") if path.parent.name != "examples"]
    files = [path for path in files if path.name != "help_pages.py"]
    assert len(files) > 50
    found = []
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        texts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            words = [node.value] if isinstance(node, ast.Constant) and id(node) not in texts else []
            words += [getattr(node, field, None) for field in ("id", "attr", "name", "module", "arg")]
            if any(isinstance(word, str) and re.search("nano|checker", word, re.I) for word in words):
                found.append(f"{file.name}:{node.lineno}")
    assert found == []


def test_the_rewards_of_a_model_are_found_by_name_like_the_others():
    assert defaults("nano").rewards == REWARDS
    assert defaults("tiny").rewards == {}
    for name, where in REWARDS.items():
        assert isinstance(load(name), pkgutil.resolve_name(where))
        assert name in defaults("nano").judges


def test_the_clip_of_a_model_is_found_by_the_models_name():
    assert locate("nano", None) == str(defaults("nano").clip)
    with pytest.raises(ConfigError, match="neither a folder nor a hub id"):
        locate("tiny", None)


def test_the_judges_beside_a_reward_have_no_weight():
    found = judges(defaults("nano"), read("checker"), own_prompts=True)
    assert [term.name for term in found] == ["pickscore", "clip_text", "aesthetic", "no_artifacts"]
    assert {term.weight for term in found} == {0.0}
    assert judges(defaults("tiny"), read("pickscore"), own_prompts=False) == []
