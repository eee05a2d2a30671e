import os

import pytest
import yaml

from esengine.base.errors import ConfigError
from esengine.base.prompt_files import read_prompts
from esengine.base.settings_file import _Loader
from esengine.models import SanaSprint
from esengine.run.settings import ESSettings, LoraSettings, TrainConfig, load
from esengine.sampling.settings import ImageSettings

TEN = ",".join("x" * 10)
BOMB = f"reward:\n- &a0 [{TEN}]\n" + "".join(f"- &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "line 3: expected values as they are, got an alias"),
        ("steps: &a 3\nseed: *a\n", "line 2: .*alias"),
        ("[" * 20_000, "line 1: expected at most 8 levels"),
        ("{a: " * 5_000, "line 1: expected at most 8 levels"),
        ("seed: 1\nsteps: 2001-02-31\n", "line 2: day is out of range"),
        ("steps: 2001-02-03\n", "steps: expected int, got datetime"),
        ("steps: !!float abc\n", "line 1: expected values without tags"),
        ("steps: !!int ''\n", "line 1: expected values without tags"),
        ("steps: !!timestamp abc\n", "line 1: expected values without tags"),
        ("!!omap [a]\n", "line 1: expected values without tags"),
        ("seed: " + "9" * 5_000, "line 1: expected a plain number"),
        ("seed: 0x" + "f" * 5_000, "line 1: expected a plain number"),
        ("steps: 1:30\n", "line 1: expected a plain number"),
        ("steps: 3\nseed: 1\nsteps: 4\n", "line 1: 'steps' is given twice"),
        ("es: {sigma: 1, sigma: 2}\n", "line 1: 'sigma' is given twice"),
        ('run_dir: "a\\0b"\n', "line 1: expected text without NUL"),
        ('model: "\\ud800"\n', "line 1: expected text without NUL or surrogates"),
        ('"\\0": 1\n', "line 1: expected text without NUL"),
        ("<<: 5\n", "line 1: expected a mapping"),
        ("? [a, b]\n: 3\n", "line 1: found unhashable key"),
        ("steps: " + "x" * 100_000, "steps: expected int"),
        ("run_dir: ''", "run_dir: expected Path, got ''"),
        ("# " + "x" * (1 << 20), "expected at most 1048576 bytes"),
    ],
)
def test_a_hostile_file_is_refused_in_one_short_line(tmp_path, text, words):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"c\.yaml(, |: ){words}") as caught:
        load(tmp_path / "c.yaml")
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


class Counted(str):
    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other):
        Counted.compared += 1
        return str.__eq__(self, other)


def test_keys_are_not_each_compared_with_each():
    keys = [yaml.ScalarNode("tag:yaml.org,2002:str", Counted(f"key {i}")) for i in range(1000)]
    node = yaml.MappingNode("tag:yaml.org,2002:map", [(key, key) for key in keys])
    assert len(_Loader("").construct_document(node)) == 1000
    assert Counted.compared < 10_000


def test_what_may_never_end_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for read in (load, read_prompts):
        for path in (tmp_path / "pipe", "/dev/zero"):
            with pytest.raises(ConfigError, match="expected a regular file"):
                read(path)


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: TrainConfig(population=10**18), "population"),
        (lambda: TrainConfig(population=1 << 18, es=ESSettings(prompts_per_step=1 << 10)), "population"),
        (lambda: TrainConfig(heldout_prompts=10**18), "heldout_prompts"),
        (lambda: TrainConfig(strip_every=10**30), "strip_every"),
        (lambda: ESSettings(noise_rank=10**12), "es.noise_rank"),
        (lambda: ESSettings(repeats=10**12), "es.repeats"),
        (lambda: LoraSettings(rank=10**12), "lora.rank"),
        (lambda: LoraSettings(alpha=1e39), "lora.alpha"),
        (lambda: ImageSettings(height=10**9), "image.height"),
        (lambda: ImageSettings(chunk=10**23), "image.chunk"),
        (lambda: ImageSettings(num_steps=10**9), "image.num_steps"),
    ],
)
def test_what_no_machine_could_hold_is_refused(build, name):
    with pytest.raises(ConfigError, match=f"^{name}: expected .*at most .*, got "):
        build()


def test_the_home_of_nobody_is_no_folder():
    with pytest.raises(ConfigError, match="~nobodyhere/x is neither a folder nor a hub id"):
        SanaSprint.from_pretrained("~nobodyhere/x", revision=None, device="cpu", local_files_only=True)
