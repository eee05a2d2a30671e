"""The OCR example as a process of its own, with a reader that is not OCR: it reads the colour of the first pixel."""

import os
import subprocess
import sys

import pytest
import torch

from esengine import rewards
from esengine.base.errors import RewardError
from esengine.examples.ocr_server import distance, similarity

READER = """
import io
from PIL import Image

WORDS = {0: "STOP", 1: "  open \\n", 2: "", 3: "Straße 9"}


def read(png):
    return WORDS[Image.open(io.BytesIO(png)).getpixel((0, 0))[0]]
"""


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [("", "", 0), ("a", "", 1), ("", "abc", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("ab", "ba", 2)],
)
def test_the_edit_distance(one, other, expected):
    assert distance(one, other) == distance(other, one) == expected


def test_the_score_ignores_case_and_white_space_and_is_normalised():
    assert similarity(" Stop\n now ", "STOP NOW") == 1
    assert similarity("", "") == 1
    assert similarity("", "abc") == 0
    assert similarity("abcd", "abxx") == 0.5


@pytest.fixture
def url(tmp_path):
    (tmp_path / "fake_ocr.py").write_text(READER)
    paths = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    command = [sys.executable, "-P", "-m", "esengine.examples.ocr_server", "--reader", "fake_ocr:read", "--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths}
    ) as process:
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def test_a_real_server_scores_the_target_of_each_prompt(url):
    images = torch.arange(6)[:, None, None, None].clamp(max=3).expand(-1, 3, 4, 4).to(torch.uint8).contiguous()
    targets = ["stop", "OPEN", "x", "STRASSE 8", None, "Straße 9"]
    metadata = [{"target": target, "other": 1} for target in targets]
    reward = rewards.load("remote", url=url, batch=4)
    scores = reward(images, [f"p{i}" for i in range(6)], metadata)
    assert scores[4].isnan()
    assert scores[[0, 1, 2, 3, 5]].tolist() == pytest.approx([1, 1, 0, 8 / 9, 1])


def test_a_request_that_does_not_follow_the_protocol_is_refused_and_the_server_lives_on(url):
    images = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    reward = rewards.load("remote", url=url)
    with pytest.raises(RewardError, match="400"):
        reward(images, ["no metadata"])
    assert reward(images, ["a"], [{"target": "stop"}]).tolist() == [1]
