"""A bar whose stderr goes away."""

import subprocess
import sys

import pytest

PROGRAM = """
import os, sys
from esengine.base.progress import Bar

bar = Bar()
bar.note("begun")
bar.count("images", 1, 4)
bar.start(8, 0)
bar.images(1)
if sys.argv[1] == "reader":
    read, write = os.pipe()
    os.dup2(write, 2)
    os.close(read)
elif sys.argv[1] == "closed":
    sys.stderr.close()
elif sys.argv[1] == "full":
    os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
for step in range(4):
    bar.images(2)
    bar.note(f"step {step}")
    bar.step(step, 4, {"reward": 1.0, "seconds": 0.1})
    bar.count("images", step, 4)
bar.count("images", 4, 4)
bar.stop()
bar.note("ended")
print("whole", flush=True)
os._exit(0)  # without the interpreter's last flush of stderr
"""


@pytest.mark.parametrize("way", ["none", "reader", "closed", "full"])
def test_a_bar_never_raises(way):
    done = subprocess.run([sys.executable, "-c", PROGRAM, way], capture_output=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, b"whole\n")
    assert b"begun" in done.stderr
    assert (b"ended" in done.stderr) == (way == "none")
