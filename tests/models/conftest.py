import pytest
import torch
from diffusers import SanaSprintPipeline

from esengine.models import SanaSprint, build_tiny

PROMPTS = ["a red fox in a quiet forest", "Two green apples on a wooden table, oil painting, soft light", "a cat"]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    return build_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def pipeline(tiny_folder):
    """diffusers' own, read with nothing of ours."""
    pipeline = SanaSprintPipeline.from_pretrained(tiny_folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def model(tiny_folder):
    return SanaSprint.from_pretrained(tiny_folder)


@pytest.fixture(scope="session")
def texts(model):
    return model.encode(PROMPTS)


@pytest.fixture
def fresh_model(tiny_folder):
    """One that the test may change."""
    return SanaSprint.from_pretrained(tiny_folder)


@pytest.fixture
def rows():
    """Mixed rows: prompts and repeats int64 [5]."""
    return torch.tensor([0, 1, 2, 1, 0]), torch.tensor([0, 0, 3, 1, 0])
