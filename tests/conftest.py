import contextlib
import json
import os
import sys
import types
from dataclasses import replace
from pathlib import Path

import journals
import pytest
import torch
from safetensors import safe_open

from esengine.run.settings import ESSettings, LoraSettings, TrainConfig
from esengine.sampling.settings import ImageSettings

CLOCKS = ("images_per_second", "seconds", "seconds_render", "seconds_score", "seconds_update")


def pytest_configure():
    torch.backends.cudnn.allow_tf32 = False  # fp32 tolerances are of fp32 convolutions


def pytest_collection_modifyitems(config, items):
    if "slow" not in config.getoption("-m"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="minutes of repetition: run with -m slow"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A cache of this session's own, and one thread, so that a run repeats bit for bit in another process."""
    folder, threads = tmp_path_factory.mktemp("cache"), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ESENGINE_CACHE", str(folder))
        patch.setenv("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
        yield folder
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def prompt_files(tmp_path_factory):
    """Four prompts to train on and three held out, with what an editor leaves in such files."""
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "train.txt").write_text("# four\na red fox\n\ntwo green apples\nthe sea at night\n  a paper boat  \n")
    (folder / "held.txt").write_text("an owl\na tall tree\na lamp\n")
    return folder / "train.txt", folder / "held.txt"


@pytest.fixture(scope="session")
def small(cache, prompt_files):
    """A run of about a second: population 4, two prompts a step, three chunks a step."""
    config = TrainConfig(
        model="tiny",
        reward="jpeg_compressibility",
        prompts=prompt_files[0],
        eval_prompts=prompt_files[1],
        steps=4,
        population=4,
        checkpoint_every=2,
        strip_every=3,
        heldout_every=2,
        lora=LoraSettings(targets=("to_q", "to_k", "to_v", "linear_2")),
        es=ESSettings(prompts_per_step=2, repeats=1),
        image=ImageSettings(chunk=3),
    )

    def make(run_dir: Path, **changes) -> TrainConfig:
        return replace(config, run_dir=Path(run_dir), **changes)

    return make


@pytest.fixture(scope="session")
def trained(small, tmp_path_factory):
    """A finished run: its configuration and what `train` returned. Nobody writes into it."""
    from esengine.run.train import train

    config = small(tmp_path_factory.mktemp("trained") / "run")
    return config, train(config)


@pytest.fixture(scope="session")
def outcome():
    """What must be equal between two runs of the same settings, as bytes or values by name."""

    def read(run_dir: Path) -> dict:
        found = {}
        found["adapter"] = (run_dir / "adapter" / "adapter_model.safetensors").read_bytes()
        peft = json.loads((run_dir / "adapter" / "adapter_config.json").read_text())
        found["peft"] = peft | {"target_modules": sorted(peft["target_modules"])}
        with safe_open(run_dir / "adapter" / "pytorch_lora_weights.safetensors", framework="np") as lora:
            found["lora"] = lora.metadata(), {key: lora.get_tensor(key).tobytes() for key in sorted(lora.keys())}
        newest = sorted((run_dir / "checkpoints").iterdir())[-1]
        found["checkpoint"] = newest.name, (newest / "state.safetensors").read_bytes()
        found["metrics"] = [{k: v for k, v in step.items() if k not in CLOCKS} for step in journals.steps(run_dir)]
        found["fitness"] = journals.fitness(run_dir)
        found["heldout"] = journals.measured(run_dir)
        found["grids"] = {path.name: path.read_bytes() for path in sorted(run_dir.glob("heldout/*"))}
        found["eval"] = json.loads((run_dir / "eval.json").read_text())
        return found

    return read


@pytest.fixture
def reward(monkeypatch):
    """Installs functions as rewards of the module `own`; returns the name of the first.

    They have no trial unless it is asked for, because many tests count their calls.
    """

    def install(score, trial=False, **others) -> str:
        module = types.ModuleType("own")
        for each in (score, *others.values()):
            if not trial and callable(each):
                with contextlib.suppress(AttributeError):  # a method
                    each.no_trial = True
        vars(module).update(others, score=score)
        monkeypatch.setitem(sys.modules, "own", module)
        return "own:score"

    return install


@pytest.fixture
def notes():
    """Progress that keeps what it is told: `notes.said` is a list of lines."""
    from esengine.base.progress import Progress

    class Notes(Progress):
        def __init__(self):
            self.said = []

        def note(self, text):
            self.said.append(text)

    return Notes()


@pytest.fixture
def workspace(cache, tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def esengine(workspace, capsys):
    """The command line in this process: (exit code, stdout, stderr) of `esengine ARGS`."""
    from esengine.cli import main

    def call(*args) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([os.fspath(arg) for arg in args])
        except SystemExit as leave:
            code = leave.code
        return code, *capsys.readouterr()

    return call
