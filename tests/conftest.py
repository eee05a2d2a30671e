import pytest
import torch


def pytest_configure():
    torch.backends.cudnn.allow_tf32 = False  # fp32 tolerances are of fp32 convolutions


def pytest_collection_modifyitems(config, items):
    if "slow" not in config.getoption("-m"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="minutes of repetition: run with -m slow"))
