import itertools

import pytest
import torch
from diffusers import SanaSprintPipeline
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from esengine.models import SanaSprint, build_tiny, graphs

PROMPTS = ["a red fox in a quiet forest", "Two green apples on a wooden table, oil painting, soft light", "a cat"]

WAITS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default, torch.ops.aten.nonzero.default)


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


class Tape(TorchDispatchMode):
    """Notes operations, refuses those that wait for a device, and repeats them into the same outputs.

    What comes of `torch.tensor(...)` alone is taken for the host's own, and may be read.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.host = [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        own = given and all(id(each) in self.host for each in given)
        if func in WAITS and not own:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        if own or func is torch.ops.aten.lift_fresh.default:
            self.host.update(id(each) for each in tree_leaves(out) if isinstance(each, torch.Tensor))
        return out

    def replay(self):
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def recorded(monkeypatch):
    """CUDA's part of it on tape; gives the list of captures, each with the `stream` it was made on."""
    tapes, streams = [], itertools.count()

    def record(compute, pool, stream):
        compute()
        with Tape() as tape:
            outputs = compute()
        tape.stream = stream
        tapes.append(tape)
        return outputs, tape.replay, pool or f"pool {len(tapes)}"

    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(graphs, "side_stream", lambda device: f"stream {next(streams)}")
    monkeypatch.setattr(graphs, "supported", lambda device: True)
    return tapes
