"""The cold-start race of oneMKL's vector math: resolved at import, and absent from many cold starts."""

import os
import subprocess
import sys

import pytest

AT_IMPORT = """
import torch
from torch.utils._python_dispatch import TorchDispatchMode

seen = set()

class Record(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if args and isinstance(args[0], torch.Tensor) and args[0].numel() < 2048:
            seen.add((op.overloadpacket.__name__, args[0].dtype))
        return op(*args, **(kwargs or {}))

with Record():
    import MODULE
for name in ("cos", "sin", "exp", "log", "sqrt", "tanh", "erf"):
    for dtype in (torch.float32, torch.float64):
        assert (name, dtype) in seen, f"{name} {dtype} is left for the threads to resolve"
"""

ENCODE = """
import hashlib
import torch

from esengine.models import SanaSprint, tiny_model

torch.set_num_threads(2)
model = SanaSprint.from_pretrained(tiny_model())
texts = model.encode(["a red fox asleep on a mossy log"])
print(hashlib.sha256(texts[0].numpy().tobytes()).hexdigest())
"""


def start(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.mark.parametrize(
    "module", ["esengine.kernels", "esengine.models.sana.sana_sprint", "esengine.es.population", "esengine.run.train"]
)
def test_every_entrance_resolves_vml_before_it_computes(module):
    start(AT_IMPORT.replace("MODULE", module))


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="the race needs two cores")
def test_cold_starts_encode_alike():
    """Without the resolution about 2 % of such starts differed; 150 starts would then agree by chance 1 time in 20."""
    assert len({start(ENCODE) for _ in range(150)}) == 1
