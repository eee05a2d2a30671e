import torch


def pytest_configure():
    torch.backends.cudnn.allow_tf32 = False  # fp32 tolerances are of fp32 convolutions
