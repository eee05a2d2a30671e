"""A person as the reward of a run, by a scripted hand and in a real browser."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from browser import chromium, needs_browser

from esengine.base.errors import ConfigError, Stopped
from esengine.judging import FIRST, SAME, SECOND
from esengine.models.defaults import defaults
from esengine.rewards.roles import load_rewards, read_terms
from esengine.run import journal
from esengine.run import train as train_module
from esengine.run.journal import Judged, Step
from esengine.run.replay import replay
from esengine.run.settings import ReplayConfig
from esengine.run.train import train


class Hand:
    """Answers at once: the brighter image is better. After `limit` answers the run is stopped."""

    asked = 0
    limit = 10**6

    def __init__(self, host, port):
        self.url = "http://nowhere/"

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def ask(self, questions, keep, *, title, done, stopped):
        for index, question in enumerate(questions):
            if Hand.asked >= Hand.limit:
                raise Stopped("by hand")
            first, second = (image.astype(np.float64).mean() for image in question.images())
            keep(index, SAME if first == second else FIRST if first > second else SECOND)
            Hand.asked += 1
        return True


@pytest.fixture
def hand(monkeypatch):
    monkeypatch.setattr(train_module, "Asker", Hand)
    monkeypatch.setattr(Hand, "asked", 0)
    monkeypatch.setattr(Hand, "limit", 10**6)
    return Hand


def judged(small, run_dir, **changes):
    settings = dict(reward="human", heldout_reward="jpeg_compressibility", strip_every=0)
    return small(run_dir, **settings | changes)


def test_the_scores_are_the_answers(hand, small, tmp_path, notes):
    result = train(judged(small, tmp_path / "run"), notes)
    run = journal.read(tmp_path / "run" / journal.NAME)
    answers = run.of(Judged)
    assert hand.asked == len(answers) == 4 * 2 * 2  # steps, pairs, prompts
    assert any("http://nowhere/" in line for line in notes.said)
    for step in run.of(Step):
        wins = torch.zeros(4)
        for each in answers:
            if each.step == step.step and each.better is not None:
                wins[each.better] += 1
        if wins.std() > 0:
            order = sorted(range(4), key=lambda member: wins[member])
            assert step.fitness[order[-1]] > step.fitness[order[0]]
        assert step.numbers["reward"] == 0.5
        assert step.numbers["reward/human"] == 0.5
    assert result.parted == {}
    assert replay(ReplayConfig(tmp_path / "run"), notes).agreed == 4
    assert (tmp_path / "run" / "report.html").exists() is False or "jpeg" in (tmp_path / "run/report.html").read_text()


@pytest.mark.parametrize("limit", [1, 5, 6, 11])
def test_a_run_that_is_stopped_asks_only_what_has_no_answer(hand, small, tmp_path, outcome, limit):
    train(judged(small, tmp_path / "whole"))
    hand.asked, hand.limit = 0, limit
    with pytest.raises(Stopped):
        train(judged(small, tmp_path / "run"))
    assert hand.asked == limit
    hand.limit = 10**6
    train(judged(small, tmp_path / "run", resume=True))
    assert hand.asked == 16
    assert outcome(tmp_path / "run")["adapter"] == outcome(tmp_path / "whole")["adapter"]


def test_answers_behind_the_checkpoint_are_kept(hand, small, tmp_path):
    """As after a SIGKILL: the journal has steps and answers that no checkpoint has."""
    train(judged(small, tmp_path / "run"))
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    (tmp_path / "run" / "eval.json").unlink()
    hand.asked = 0
    train(judged(small, tmp_path / "run", resume=True))
    assert hand.asked == 0


def test_answers_about_other_images_are_asked_again(hand, small, tmp_path):
    hand.limit = 3
    with pytest.raises(Stopped):
        train(judged(small, tmp_path / "run"))
    path = tmp_path / "run" / journal.NAME
    path.write_text(re.sub(r'"images": "[0-9a-f]{16}"', '"images": "0123456789abcdef"', path.read_text(), count=2))
    hand.limit = 10**6
    train(judged(small, tmp_path / "run", resume=True))
    assert hand.asked == 3 + 15


@pytest.mark.parametrize(
    ("reward", "held_out", "setting"),
    [
        ("human,jpeg_compressibility", "auto", "reward"),
        ("human=0.5", "auto", "reward"),
        ("human(port=70000)", "jpeg_compressibility", "reward"),
        ("human(host=5)", "jpeg_compressibility", "reward"),
        ("human", "none", "heldout_reward"),
        ("jpeg_compressibility", "human", "heldout_reward"),
    ],
)
def test_where_a_person_cannot_judge(reward, held_out, setting):
    with pytest.raises(ConfigError) as caught:
        load_rewards(read_terms(reward, held_out, defaults("tiny")), device="cpu", note=print)
    assert caught.value.setting == setting
    assert "human" in str(caught.value)


def test_the_nano_model_watches_its_judges():
    names = {term.name for term in read_terms("human", "auto", defaults("nano"))}
    assert {"human", "checker", "pickscore"} <= names


# ---- in a real browser

BLUER = """() => {
  const blue = (image) => {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    const context = canvas.getContext("2d");
    context.drawImage(image, 0, 0);
    const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
    let sum = 0;
    for (let at = 0; at < data.length; at += 4) sum += 2 * data[at + 2] - data[at] - data[at + 1];
    return sum / data.length;
  };
  const [left, right] = ["left-image", "right-image"].map((id) => blue(document.getElementById(id)));
  return left > right ? "ArrowLeft" : left < right ? "ArrowRight" : "ArrowDown";
}"""


class Run:
    """`esengine train` in a process, with the address of its page."""

    def __init__(self, folder, log, *more):
        self.log = log
        command = [sys.executable, "-P", "-m", "esengine", "train", "--run-dir", str(folder), *more]
        with open(log, "wb") as file:
            self.process = subprocess.Popen(command, stderr=file, stdout=file, env={**os.environ, "COLUMNS": "200"})

    def url(self):
        for _ in range(600):
            if found := re.search(r"http://127\.0\.0\.1:\S+", self.log.read_text()):
                return found[0]
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.2)
        raise AssertionError(self.log.read_text())


def click(page, count):
    """Prefer blue `count` times."""
    done = set()
    while len(done) < count:
        page.wait_for_selector("#pair:not([hidden])", timeout=120_000)
        shown = page.evaluate("shown")
        if shown and shown not in done:
            page.keyboard.press(page.evaluate(BLUER))
            done.add(shown)
            page.wait_for_function(f"shown !== {json.dumps(shown)}", timeout=60_000)


@needs_browser
def test_clicks_that_prefer_blue_make_images_bluer(tmp_path):
    """Four steps of nano by clicks. The run is killed in the middle of the third and goes on with the clicks kept."""
    flags = [
        "--steps",
        "4",
        "--population",
        "8",
        "--es.prompts-per-step",
        "2",
        "--es.repeats",
        "1",
        "--reward",
        "human",
    ]
    flags += ["--strip-every", "0", "--heldout-every", "0", "--checkpoint-every", "2", "--update.lr-scale", "1.0"]
    held = tmp_path / "held.txt"
    held.write_text("a red circle on a white background\na large green square on a black background\n")
    flags += ["--eval-prompts", str(held), "--heldout-reward", "bluer:score"]
    (tmp_path / "bluer.py").write_text(
        "def score(images, prompts):\n"
        "    images = images.float() / 255\n"
        "    return (2 * images[:, 2] - images[:, 0] - images[:, 1]).mean((1, 2))\n"
    )
    os.environ["PYTHONPATH"], before = str(tmp_path), os.environ.get("PYTHONPATH")
    try:
        with chromium() as browser:
            page = browser.new_page(bypass_csp=True)
            run = Run(tmp_path / "run", tmp_path / "first.log", *flags)
            page.goto(run.url())
            click(page, 8 + 8 + 3)
            run.process.send_signal(signal.SIGKILL)
            run.process.wait()
            kept = len(journal.read(tmp_path / "run" / journal.NAME).of(Judged))
            assert kept == 19
            run = Run(tmp_path / "run", tmp_path / "second.log", *flags, "--resume")
            page.goto(run.url())
            page.wait_for_selector("#pair:not([hidden])", timeout=120_000)
            assert page.inner_text("#count").startswith("3 of 8")
            click(page, 5 + 8)
            assert run.process.wait(120) == 0
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    assert len(journal.read(tmp_path / "run" / journal.NAME).of(Judged)) == 32
    report = json.loads((tmp_path / "run" / "eval.json").read_text())
    (overall,) = (group for group in report["groups"] if group["by"] == "overall")
    assert overall["rows"][1]["against_first"]["bluer:score"]["difference"] > 0


def test_the_first_held_out_reward_chooses_the_best_adapter_and_a_guard_is_refused(hand, small, tmp_path):
    train(judged(small, tmp_path / "run", keep="best", steps=2))
    assert journal.read(tmp_path / "run" / journal.NAME).of(journal.Copied)[-1].by == "jpeg_compressibility"
    with pytest.raises(ConfigError, match="person") as caught:
        train(judged(small, tmp_path / "other", heldout_action="stop"))
    assert caught.value.setting == "heldout_action"
