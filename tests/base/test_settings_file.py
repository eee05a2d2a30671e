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
    ("text", "line", "word"),
    [
        (BOMB, 3, "alias"),
        ("steps: &a 3\nseed: *a\n", 2, "alias"),
        ("[" * 20_000, 1, "8 levels"),
        ("{a: " * 5_000, 1, "8 levels"),
        ("seed: 1\nsteps: 2001-02-31\n", 2, "day is out of range"),
        ("steps: !!float abc\n", 1, "tags"),
        ("steps: !!int ''\n", 1, "tags"),
        ("steps: !!timestamp abc\n", 1, "tags"),
        ("!!omap [a]\n", 1, "tags"),
        ("seed: " + "9" * 5_000, 1, "plain number"),
        ("seed: 0x" + "f" * 5_000, 1, "plain number"),
        ("steps: 1:30\n", 1, "plain number"),
        ("steps: 3\nseed: 1\nsteps: 4\n", 1, "'steps' is given twice"),
        ("es: {sigma: 1, sigma: 2}\n", 1, "'sigma' is given twice"),
        ('run_dir: "a\\0b"\n', 1, "NUL"),
        ('model: "\\ud800"\n', 1, "surrogates"),
        ('"\\0": 1\n', 1, "NUL"),
        ("<<: 5\n", 1, "a mapping"),
        ("? [a, b]\n: 3\n", 1, "unhashable key"),
        ("# " + "x" * (1 << 20), None, "1048576 bytes"),
    ],
)
def test_a_hostile_file_is_refused_with_its_line(tmp_path, text, line, word):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "c.yaml")
    assert caught.value.source == f"config {tmp_path / 'c.yaml'}" + (f", line {line}" if line else "")
    assert word in caught.value.problem
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


@pytest.mark.parametrize("value", ["2001-02-03", "x" * 100_000, f"[{'[], ' * 1000}]"])
def test_a_hostile_value_is_refused_in_one_short_line(tmp_path, value):
    (tmp_path / "c.yaml").write_text(f"steps: {value}\n")
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "c.yaml")
    assert (caught.value.setting, caught.value.source) == ("steps", f"config {tmp_path / 'c.yaml'}")
    assert len(str(caught.value)) < 200 + len(str(tmp_path))


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
            with pytest.raises(ConfigError) as caught:
                read(path)
            assert "regular file" in caught.value.problem


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
    with pytest.raises(ConfigError) as caught:
        build()
    assert caught.value.setting == name
    assert "at most" in caught.value.problem


def test_the_home_of_nobody_is_no_folder():
    with pytest.raises(ConfigError) as caught:
        SanaSprint.from_pretrained("~nobodyhere/x", revision=None, device="cpu", local_files_only=True)
    assert caught.value.setting == "model"
    assert "~nobodyhere/x" in caught.value.problem
