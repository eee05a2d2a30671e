"""Many steps, and nothing grows."""

import gc
import os

import pytest

from esengine.base.progress import Progress
from esengine.run.settings import LoraSettings
from esengine.run.train import train

STEPS, SETTLED = 2000, 400


class Watch(Progress):
    """Resident bytes and open files, every hundredth step."""

    def __init__(self):
        self.seen = []

    def step(self, step, steps, metrics):
        if step % 100 == 0:
            gc.collect()
            with open("/proc/self/statm") as statm:
                resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE")
            self.seen.append((step, resident, len(os.listdir("/proc/self/fd"))))


@pytest.mark.slow
def test_memory_and_files_stay_as_they_are(small, tmp_path):
    watch = Watch()
    settings = dict(steps=STEPS, checkpoint_every=50, strip_every=100, heldout_every=100)
    train(small(tmp_path / "run", lora=LoraSettings(targets=("linear_2",)), **settings), watch)
    settled = [(resident, files) for step, resident, files in watch.seen if step >= SETTLED]
    assert len(settled) == (STEPS - SETTLED) // 100 + 1
    resident, files = zip(*settled, strict=True)
    assert max(resident) <= 1.02 * resident[0], watch.seen
    assert max(files) <= files[0], watch.seen
