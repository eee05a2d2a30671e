"""A blind comparison by a person: who wins, how sure that is, and what is kept."""

import json

import numpy as np
import pytest
from PIL import Image

from esengine.base.errors import ConfigError, RunError
from esengine.evaluation.blind import NAME, Verdict, answers, judge, pairs_of, verdicts
from esengine.judging import FIRST, SAME, SECOND


class Hand:
    """Prefers the brighter image. Answers at most `limit` questions."""

    def __init__(self, limit=10**6):
        self.limit, self.seen = limit, []

    def ask(self, questions, keep, *, title, done, stopped):
        for index, question in enumerate(questions[: self.limit]):
            first, second = (float(image.mean()) for image in question.images())
            self.seen.append(question.text)
            keep(index, SAME if first == second else FIRST if first > second else SECOND)
        return len(questions) <= self.limit


@pytest.fixture
def folder(tmp_path):
    """Ten prompts. The adapter's image is brighter for seven, darker for two, and the same for one."""
    entries, lines = ["base@1", "adapter@1", "base@2"], []
    for entry in entries:
        (tmp_path / "images" / entry).mkdir(parents=True)
        for index in range(10):
            shift = {"base@1": 0, "base@2": -50}.get(entry, 10 if index < 7 else -10 if index < 9 else 0)
            name = f"images/{entry}/{index:05d}.png"
            Image.fromarray(np.full((4, 4, 3), 100 + shift, dtype=np.uint8)).save(tmp_path / name)
            lines.append({"entry": entry, "index": index, "repeat": 0, "prompt": f"p{index}", "image": name})
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "evaluation.json").write_text(json.dumps({"entries": entries}))
    return tmp_path


def test_who_wins(folder):
    hand = Hand()
    found = judge(folder, hand)
    assert found == Verdict(("base@1", "adapter@1"), wins=7, losses=2, same=1)
    assert sorted(hand.seen) == [f"p{index}" for index in range(10)]
    assert hand.seen != sorted(hand.seen)
    assert "adapter@1 was preferred to base@1 in 7 of 9 pairs" in str(found)
    assert list(verdicts(folder)) == [found]
    other = judge(folder, Hand(), ["base@2", "base@1"])
    assert (other.wins, other.losses) == (10, 0)
    assert sorted(each.wins for each in verdicts(folder)) == [7, 10]


@pytest.mark.parametrize(
    ("wins", "losses", "low", "high"), [(7, 2, 0.4526, 0.9368), (0, 5, 0.0, 0.4345), (50, 50, 0.4038, 0.5962)]
)
def test_the_interval_is_wilsons(wins, losses, low, high):
    """Figures from the formula in Wilson's paper, computed by hand to four digits."""
    found = Verdict(("a", "b"), wins, losses, 0).interval
    assert found == pytest.approx((low, high), abs=5e-4)


def test_without_a_choice_nothing_is_known():
    found = Verdict(("a", "b"), 0, 0, 3)
    assert found.interval == (0, 1)
    assert "not known" in str(found)


def test_it_goes_on_where_it_was_left(folder):
    judge(folder, Hand(limit=4))
    assert len(answers(folder, ("base@1", "adapter@1"))) == 4
    with open(folder / NAME, "a") as file:
        file.write('{"index": 1, "rep')  # as after a kill
    hand = Hand()
    found = judge(folder, hand)
    assert len(hand.seen) == 6
    assert (found.wins, found.losses, found.same) == (7, 2, 1)


def test_at_most_so_many(folder):
    hand = Hand()
    found = judge(folder, hand, limit=3)
    assert len(hand.seen) == found.wins + found.losses + found.same == 3


@pytest.mark.parametrize("entries", [["base@1"], ["base@1", "base@1"], ["base@1", "adapter@9"], ["a", "b", "c"]])
def test_other_entries_are_refused(folder, entries):
    with pytest.raises(ConfigError, match="entries"):
        pairs_of(folder, entries)


def test_a_folder_without_an_evaluation_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"evaluation\.json"):
        pairs_of(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        '{"index": 0, "repeat": 0, "entries": ["base@1", "adapter@1"], "better": "other@1"}',
        '{"index": 0, "repeat": 0, "entries": ["base@1"], "better": null}',
        '{"index": "x", "repeat": 0, "entries": ["base@1", "adapter@1"], "better": null}',
        "[1]",
        "{",
    ],
)
def test_a_damaged_answer_is_refused_with_its_line(folder, line):
    (folder / NAME).write_text(line + "\n")
    with pytest.raises(RunError, match="line 1"):
        judge(folder, Hand())


def test_an_image_outside_the_folder_is_refused(folder):
    path = folder / "scores.jsonl"
    path.write_text(path.read_text().replace("images/base@1/00003.png", "../secret.png"))
    with pytest.raises(RunError, match="secret"):
        pairs_of(folder)
