"""The command line as a person meets it: one line for an error, and nothing left behind."""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import types

import journals
import pytest
import torch

from esengine import cli
from esengine.base.errors import RewardError


@pytest.fixture
def files(workspace):
    (workspace / "p.txt").write_text("a cat\na dog\nthe sea\n")
    (workspace / "empty.txt").write_text("# nothing\n\n")
    (workspace / "bad.yaml").write_text("steps: 3\nlora:\n  rank: 2 3: 4\n")
    (workspace / "odd.yaml").write_text("checkpoint_every: 0\n")
    (workspace / "unknown.yaml").write_text("stepz: 5\n")
    (workspace / "torn").mkdir()
    (workspace / "torn" / "model_index.json").write_text("{")
    (workspace / "other").mkdir()
    (workspace / "other" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    return {path.name for path in workspace.iterdir()}


@pytest.fixture
def run(trained, workspace):
    """A copy of a finished run, which a test may spoil."""
    config, _ = trained
    shutil.copytree(config.run_dir, workspace / "run")
    return workspace / "run"


def one_line(err: str) -> str:
    """The error: the last line on stderr, and the only one that is not a note or a bar."""
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("esengine: error:")]
    assert "Traceback" not in err
    assert errors == lines[-1:], err
    return errors[0]


def flags(*more):
    return [
        "train", "--run-dir", "new", "--model", "tiny", "--reward", "jpeg_compressibility", "--population", "4",
        "--prompts", "p.txt", "--eval-prompts", "p.txt",
        "--es.repeats", "1", "--es.prompts-per-step", "2", "--steps", "1", *more,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--prompts", "nosuch.txt"], ["prompts file nosuch.txt", "No such file"]),
        (["--prompts", "empty.txt"], ["prompts file empty.txt", "at least one prompt"]),
        (["--prompts", "torn"], ["prompts file torn", "directory"]),
        (["--eval-prompts", "nosuch.txt"], ["prompts file nosuch.txt"]),
        (["--reward", "nosuch"], ["unknown reward 'nosuch'", "jpeg_compressibility", "module:attr"]),
        (["--reward", "nosuch:score"], ["reward nosuch:score", "cannot import nosuch"]),
        (["--reward", "json:nosuch"], ["no attribute nosuch"]),
        (["--reward", "jpeg_compressibility=much"], ["weight", "'much'"]),
        (["--config", "nosuch.yaml"], ["nosuch.yaml", "No such file"]),
        (["--config", "bad.yaml"], ["bad.yaml", "line 3"]),
        (["--config", "odd.yaml"], ["config odd.yaml: checkpoint_every", "at least 1", "0"]),
        (["--config", "unknown.yaml"], ["config unknown.yaml: stepz: unknown setting", "steps"]),
        (["--es.prompts-per-step", "4"], ["--es.prompts-per-step", "prompts per step", "3", "4"]),
        (["--image.height", "100"], ["height", "multiple of 32", "100"]),
        (["--image.x0-angle", "1.3", "--image.num-steps", "2"], ["--image.x0-angle", "1.3", "2"]),
        (["--device", "wat"], ["device", "'wat'"]),
        (["--device", "cuda:99"], ["device", "'cuda:99'"]),
        (["--resume"], ["new", "nothing to resume"]),
        (["--run-dir", "p.txt"], ["p.txt"]),
        (["--population", "5"], ["population", "even", "5"]),
        (["--heldout-reward", "nosuch"], ["unknown reward 'nosuch'"]),
        (["--heldout-reward", "jpeg_compressibility"], ["--heldout-reward", "jpeg_compressibility", "weight of 0"]),
        (["--seed", "-1"], ["seed", "-1"]),
        (["--lora.targets", "nosuch"], ["lora", "nosuch"]),
        (["--model", "nosuch"], ["model", "nosuch"]),
        (["--model", "/nosuch"], ["model", "/nosuch"]),
        (["--model", "no/such"], ["model", "no/such", "offline"]),
        (["--image.guidance-scale", "1e39"], ["--image.guidance-scale: expected at most 10000, got 1e+39"]),
        (["--model", "torn"], ["model", "torn"]),
        (["--model", "other"], ["model", "FluxPipeline"]),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_left(files, esengine, workspace, monkeypatch, more, words):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, err = esengine(*flags(*more))
    assert code not in (0, None)
    assert out == ""
    line = one_line(err)
    assert all(word in line for word in words), line
    assert {path.name for path in workspace.iterdir()} == files


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--population", "many"], "--population"),
        (["--trackers", "aim"], "--trackers"),
        (["--stepz", "3"], "--stepz"),
        (["--image.height", "tall"], "'tall'"),
        (["--update.max-norm", "high"], "'high'"),
        (["extra"], "extra"),
        (["--run-dir", ""], "--run-dir: expected a value"),
        (["--run-dir="], "--run-dir: expected a value"),
        (["--prompts", "", "--steps", "1"], "--prompts: expected a value"),
    ],
)
def test_a_flag_that_is_not_one_is_explained(files, esengine, workspace, more, word):
    code, out, err = esengine(*flags(*more))
    assert code == 2
    assert word in out + err
    assert "Traceback" not in err
    assert "Annotated" not in err
    assert {path.name for path in workspace.iterdir()} == files


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["nosuch"], ["nosuch", "train", "eval", "render", "env"]),
        (["eval"], ["--run-dir", "--adapter"]),
        (["render", "a cat"], ["--run-dir", "--adapter"]),
        (["eval", "--run-dir", "torn"], ["torn", "journal.jsonl"]),
        (["eval", "--adapter", "torn"], ["torn", "does not exist"]),
        (["render", "--run-dir", "nosuch"], ["nosuch"]),
    ],
)
def test_other_commands_fail_in_one_line(files, esengine, workspace, args, words):
    code, out, err = esengine(*args)
    assert code not in (0, None)
    assert out == ""
    assert all(word in one_line(err) for word in words), err
    assert {path.name for path in workspace.iterdir()} == files


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["eval", "--repeats", "0"], ["repeats"]),
        (["eval", "--seed", "-1"], ["seed"]),
        (["render", "a cat", "--seed", "-1"], ["seed"]),
        (["render", "--limit", "-1", "--prompts-file", "p.txt"], ["limit"]),
    ],
)
def test_eval_and_render_check_their_ranges(run, files, esengine, args, words):
    code, _, err = esengine(*args, "--run-dir", run)
    assert code not in (0, None)
    assert all(word in one_line(err) for word in words), err


def everything(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_that_holds_a_run_is_left_alone(run, files, esengine):
    before = everything(run)
    code, _, err = esengine(*flags("--run-dir", run))
    assert code == 1
    assert "already holds a run" in one_line(err)
    assert "--resume" in err
    assert {**everything(run), run.relative_to(run) / ".lock": b""} == {**before, run.relative_to(run) / ".lock": b""}


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_in_use_is_left_alone(run, files, esengine, resume):
    hold = (
        "import fcntl, os, sys\n"
        "lock = os.open(sys.argv[1], os.O_RDWR)\n"
        "fcntl.flock(lock, fcntl.LOCK_EX)\n"
        "os.ftruncate(lock, 0)\n"
        "os.write(lock, b'%d myhost' % os.getpid())\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, run / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        before = everything(run)
        code, _, err = esengine(*flags("--run-dir", run, *(["--resume"] if resume else [])))
        assert code == 1
        assert f"is in use by process {holder.pid} on myhost" in one_line(err)
        assert everything(run) == before
    finally:
        holder.communicate("")
    with open(run / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--es.sigma", "0.02"], "es.sigma: 0.01 -> 0.02"),
        (["--population", "8"], "population: 4 -> 8"),
        (["--prompts", "p.txt"], "prompts: the file's contents"),
    ],
)
def test_a_checkpoint_of_another_configuration(run, files, esengine, more, words):
    before = everything(run)
    code, _, err = esengine("train", "--run-dir", run, "--resume", "--steps", "9", *more)
    assert code == 1
    assert words in one_line(err)
    assert "resume without these flags" in err
    before.pop(run.relative_to(run) / ".lock")
    assert before.items() <= everything(run).items()


def test_a_checkpoint_that_cannot_be_read(run, esengine):
    for state in run.glob("checkpoints/*/state.safetensors"):
        state.write_bytes(state.read_bytes()[:-1])
    code, _, err = esengine("train", "--run-dir", run, "--resume", "--steps", "9")
    assert code == 1
    assert "step_00000004" in one_line(err)
    assert "SHA-256" in one_line(err)


def test_a_reward_that_fails_is_one_line(files, esengine, workspace, monkeypatch):
    def score(images, prompts):
        raise KeyError("first\nsecond")

    score.no_trial = True
    module = types.ModuleType("own")
    module.score = score
    monkeypatch.setitem(sys.modules, "own", module)
    code, _, err = esengine(*flags("--reward", "own:score", "--heldout-every", "0"))
    assert code == 1
    line = one_line(err)
    assert "reward own:score, step 0, members 0, 1, 2, 3" in line
    assert "KeyError" in line
    monkeypatch.setattr(module, "score", lambda images, prompts: images.float().mean((1, 2, 3)))
    code, out, _ = esengine("train", "--run-dir", "new", "--resume")
    assert code == 0
    assert "own:score" in out


def test_debug_shows_the_traceback(files, esengine, monkeypatch):
    monkeypatch.setenv("ESENGINE_DEBUG", "1")
    module = types.ModuleType("own")
    module.score = lambda images, prompts: None
    monkeypatch.setitem(sys.modules, "own", module)
    with pytest.raises(RewardError):
        esengine(*flags("--reward", "own:score"))


def test_ctrl_c_is_one_line_and_resumes(files, esengine, workspace, monkeypatch):
    calls = 0

    def score(images, prompts):
        nonlocal calls
        calls += 1
        if calls == 3:  # after the first measure and the first step
            raise KeyboardInterrupt
        return images.float().mean((1, 2, 3))

    score.no_trial = True
    module = types.ModuleType("own")
    module.score = score
    monkeypatch.setitem(sys.modules, "own", module)
    code, _, err = esengine(*flags("--reward", "own:score", "--steps", "2"))
    assert code == 130
    assert one_line(err) == "esengine: error: interrupted"
    code, _, err = esengine("train", "--run-dir", "new", "--resume")
    assert code == 0
    assert "resuming new after step 1 of 2" in err


def test_a_run_says_where_everything_is(files, esengine, workspace):
    code, out, err = esengine(*flags())
    assert code == 0
    for words in ("base against adapter on 3 held-out prompts", "std. error", "new/adapter", "tensorboard --logdir"):
        assert words in out
    for words in ("model tiny on cpu in float32", "step 1/1", "reward -", "s/step", "img/s"):
        assert words in err
    assert "Traceback" not in err
    assert {path.name for path in workspace.iterdir()} == files | {"new"}


def test_the_page_of_a_run_is_named(files, esengine, workspace, monkeypatch):
    code, out, _ = esengine(*flags())
    assert code == 0
    assert "page        new/report.html\n" in out
    assert (workspace / "new" / "report.html").is_file()


def test_a_page_that_cannot_be_drawn_is_a_warning(files, esengine, workspace, monkeypatch):
    monkeypatch.setattr("esengine.report.write_training_page", lambda folder: 1 / 0)
    code, out, err = esengine(*flags())
    assert code == 0
    assert "page" not in out
    (line,) = [line for line in err.splitlines() if "no page of the run" in line]
    assert line.startswith("warning: ")
    assert "ZeroDivisionError" in line
    assert (workspace / "new" / "adapter" / "adapter_model.safetensors").is_file()


def test_without_run_dir_the_run_is_named_by_its_date(files, esengine, workspace):
    args = flags()
    del args[1:3]
    code, out, _ = esengine(*args)
    assert code == 0
    (folder,) = (workspace / "runs").iterdir()
    assert f"runs/{folder.name}" in out
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()


def test_usage_and_version(esengine):
    import esengine as package

    code, out, err = esengine()
    assert (code, err) == (2, "")
    assert "usage: esengine COMMAND" in out
    code, out, _ = esengine("--help")
    assert code == 0
    assert all(f"\n  {command} " in out for command in ("train", "eval", "render", "env"))
    assert esengine("--version") == (0, f"esengine {package.__version__}\n", "")


@pytest.mark.parametrize(
    "flags", [["--config", "nosuch.yaml"], ["--config", "bad.yaml"], ["--run-dir", "nosuch", "--resume"]]
)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_answers_beside_what_cannot_be_used(esengine, workspace, flags, flag):
    (workspace / "bad.yaml").write_text("[")
    code, out, err = esengine("train", *flags, flag)
    assert (code, err) == (0, "")
    assert "--es.sigma" in out


@pytest.mark.parametrize("command", ["eval", "render"])
def test_help_answers_beside_a_run_that_is_not_there(esengine, workspace, command):
    code, out, err = esengine(command, "--run-dir", "nosuch", "--help")
    assert (code, err) == (0, "")
    assert "--run-dir" in out


@pytest.mark.parametrize("args", [["--help"], ["train", "--help"], ["env"], ["--version"]])
def test_a_reader_that_has_read_enough_is_no_error(workspace, args):
    """As `head` ends: the other end of the pipe is closed before anything is written."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "esengine", *args]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_run_goes_on_without_a_reader_of_its_progress(files, workspace, cache):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "esengine", *flags()]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=write, text=True)
    os.close(write)
    assert done.returncode == 0
    assert "std. error" in done.stdout
    assert (workspace / "new" / "eval.json").is_file()


def test_output_that_cannot_be_written_is_one_line(workspace):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "esengine", "env"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "esengine: error: stdout: No space left on device\n")


def test_a_command_without_an_output_ends_as_it_would(workspace):
    done = subprocess.run(["sh", "-c", f"{sys.executable} -m esengine env >&-"], stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_failure_is_one_though_nobody_reads(workspace):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "esengine", "replay", "nosuch"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 1
    assert "nosuch" in done.stderr


def test_env_names_versions_and_kernels(esengine):
    code, out, _ = esengine("env")
    assert code == 0
    lines = dict(re.split(r" {2,}", line, maxsplit=1) for line in out.splitlines())
    assert lines["torch"] == torch.__version__
    assert lines["kernels"] == "batched torch: there is no CUDA device" or torch.cuda.is_available()
    code, out, _ = esengine("env", "--json")
    facts = json.loads(out)
    assert code == 0
    assert {"esengine", "python", "torch", "diffusers", "device", "kernels", "noise contract"} <= facts.keys()
    assert all(isinstance(value, str) and value for value in facts.values())


def test_env_imports_torch_and_no_model_library(workspace):
    """torch and our kernels take about a second; diffusers, transformers and peft several more."""
    script = (
        "import sys\n"
        "from esengine.cli import main\n"
        "assert main(['env']) == 0\n"
        "heavy = {'diffusers', 'transformers', 'peft', 'accelerate', 'torch._dynamo'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert "noise contract" in done.stdout


def test_the_module_is_the_console_script(workspace, cache):
    command = [sys.executable, "-m", "esengine", "train", "--prompts", "nosuch.txt"]
    done = subprocess.run(command, cwd=workspace, env=os.environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "esengine: error: --prompts: prompts file nosuch.txt: No such file or directory\n"
    assert list(workspace.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "beginning"),
    [
        (["--es.noise_rank", "0"], "--es.noise_rank: expected at least 1, got 0"),
        (["--es.noise-rank=0"], "--es.noise-rank: expected at least 1, got 0"),
        (["--update.lr_scale", "0"], "--update.lr_scale: expected a positive number"),
        (["--population", "3"], "--population: expected an even number"),
        (["--image.vae", "./nope"], "--image.vae: ./nope is neither"),
        (["--reward", "a("], "--reward: rewards: expected"),
        (["--heldout-reward", "a("], "--heldout-reward: rewards: expected"),
        (["--resume"], "--resume: expected --run-dir"),
        (["--prompts", "nope.txt"], "--prompts: prompts file nope.txt: No such file"),
        (["--eval_prompts=nope.txt"], "--eval_prompts: prompts file nope.txt: No such file"),
        (["--reward", "nope"], "--reward: unknown reward 'nope'"),
        (["--heldout-reward", "nope"], "--heldout-reward: unknown reward 'nope'"),
        (["--update.lr-scale", "1e9", "--es.sigma=1"], "--update.lr-scale: expected a learning rate"),
        (["--config", "c.yaml"], "config c.yaml: es.prompts_per_step: expected prompts per step of 1 to"),
        (["--config", "c.yaml", "--es.prompts_per_step", "500"], "--es.prompts_per_step: expected prompts per step"),
        (["--config", "d.yaml"], "config d.yaml: prompts: prompts file nope.txt: No such file"),
        (["--config", "e.yaml"], "config e.yaml: model: ./nope is neither"),
        (["--config", "f.yaml"], "config f.yaml: config: expected no other file below this one, got 'reference'"),
        (["--config", "g.yaml"], "config g.yaml: lora.targets: 'nolayer' matches nothing"),
        (["--lora.targets", "nolayer"], "--lora.targets: 'nolayer' matches nothing"),
        (["--es.sigma", "1e8"], "--es.sigma: expected a learning rate"),
        (["--es.repeats", "1000000"], "--es.repeats: expected at most 2^24 images"),
        (["--es.repeats", "1000000", "--population", "64"], "--population: expected at most 2^24 images"),
        (["--config", "h.yaml"], "config h.yaml: es.sigma: expected a positive number, got -1"),
        (["--config", "h.yaml", "--es.sigma", "-2"], "--es.sigma: expected a positive number, got -2"),
        (["--config", "i.yaml"], "config i.yaml: es.sigmo: unknown setting; known: sigma"),
        (["--config", "i.yaml", "--es.sigma", "1"], "config i.yaml: es.sigmo: unknown setting; known: sigma"),
        (["--lora.alpha-pattern", "to_q", "0"], "--lora.alpha-pattern: expected a positive number"),
        (["--trackers", "wandb", "wandb"], "--trackers: expected each tracker once"),
        (["--heldout_every", "-1"], "--heldout_every: expected at least 0, got -1"),
        (["--es.sigma", "0", "--es.sigma=-1"], "--es.sigma: expected a positive number, got -1"),
        (["--update.lr-scale=1e10"], "--update.lr-scale: expected a learning rate"),
        (["--revision", "main"], "--revision: tiny is part of this package and has none, got main"),
        (["--reward", "checker", "--prompts", "p.txt"], "--prompts: expected captions of the nano world"),
        (["--reward", "checker", "--prompts", "n.txt", "--eval-prompts=p.txt"], "--eval-prompts: expected captions"),
    ],
)
def test_an_error_begins_with_the_flag_as_it_was_typed(flags, beginning, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("model: tiny\nes: {prompts_per_step: 400}\n")
    (tmp_path / "d.yaml").write_text("model: tiny\nprompts: nope.txt\n")
    (tmp_path / "e.yaml").write_text("model: ./nope\n")
    (tmp_path / "f.yaml").write_text("model: tiny\nconfig: reference\n")
    (tmp_path / "g.yaml").write_text("model: tiny\nlora: {targets: [nolayer]}\n")
    (tmp_path / "h.yaml").write_text("model: tiny\nes: {sigma: -1}\n")
    (tmp_path / "i.yaml").write_text("model: tiny\nes: {sigmo: 1}\n")
    (tmp_path / "p.txt").write_text("a submarine\n")
    (tmp_path / "n.txt").write_text("a small red circle on a blue background\n")
    model = [] if "e.yaml" in flags else ["--model", "tiny"]
    assert cli.main(["train", *model, *flags]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"esengine: error: {beginning}")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("args", "beginning"),
    [
        (["eval", "--run-dir", "run"], "run folder run: it has no adapter: run/adapter/pytorch_lora_weights"),
        (["render", "--run-dir", "run"], "run folder run: it has no adapter: run/adapter/pytorch_lora_weights"),
        (["eval", "--run-dir", "run", "--entries", "adapter@1"], "run folder run: it has no adapter"),
        (["eval", "--run-dir", "run", "--entries", "base@1", "run@1"], "--entries: 'run@1': run/pytorch_lora_weights"),
        (
            ["eval", "--run-dir", "run", "--adapter", "nope"],
            "--adapter: nope/pytorch_lora_weights.safetensors does not",
        ),
        (["eval", "--run-dir", "run", "--entries", "base@1", "--prompts", "no.txt"], "--prompts: prompts file no.txt"),
        (["eval", "--run-dir", "run", "--entries", "base@1"], "run folder run: eval_prompts: prompts file gone.txt"),
        (["eval", "--entries", "base@1", "--benchmark", "p.txt", "--model", "tiny"], "--benchmark: prompts file p.txt"),
        (
            ["eval", "--entries", "base@1", "--benchmark", "p.txt", "--prompts", "p.txt"],
            "--prompts: expected with parti",
        ),
        (
            ["eval", "--entries", "base@1", "--model", "nano", "--prompts", "c.csv"],
            "--prompts: expected captions of the",
        ),
        (
            ["eval", "--entries", "base@1", "--benchmark", "no", "--prompts", "p.txt"],
            "--benchmark: expected partiprompts",
        ),
        (["eval", "--entries", "base@1", "--run-dir", "run", "--prompts", "c.csv"], "run folder run: model: ./gone is"),
        (["render", "--prompts_file", "no.txt", "--adapter", "run"], "--prompts_file: prompts file no.txt"),
        (
            ["render", "a cat", "--prompts-file", "c.csv", "--adapter", "run"],
            "--prompts-file: expected no prompts beside",
        ),
    ],
)
def test_a_setting_of_a_run_is_named_with_its_folder(args, beginning, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    journals.begin(tmp_path / "run", model="./gone", eval_prompts="gone.txt")
    (tmp_path / "c.csv").write_text("Prompt\na cat\n")
    if "gone.txt" not in beginning:
        (tmp_path / "gone.txt").write_text("a cat\n")
    (tmp_path / "p.txt").write_text("# none\n")
    assert cli.main(args) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"esengine: error: {beginning}")


def test_a_model_that_is_not_there_is_told_before_rewards_are_built(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("esengine.run.prepare.load_rewards", lambda *a, **k: pytest.fail("rewards were built"))
    monkeypatch.setattr("esengine.cli.eval.load_terms", lambda *a, **k: pytest.fail("rewards were built"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "c.json").write_text('["a cat"]')
    for command in (["train"], ["eval", "--entries", "base@1", "--prompts", "c.json"]):
        assert cli.main([*command, "--model", "tiny", "--image.vae", "empty"]) == 1
        assert "--image.vae: cannot use empty" in capsys.readouterr().err
    (tmp_path / "c.json").unlink()
    for model, words in (("./nope", "neither a folder nor a hub id"), ("empty", "model_index.json")):
        for command in ("train", "eval"):
            flags = ["--benchmark", "nano"] if command == "eval" else []
            assert cli.main([command, "--model", model, "--reward", "pickscore", *flags]) == 1
            assert words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize("which", ["stdout", "stderr"])
@pytest.mark.parametrize("after", [1, 60, 250])
def test_a_reader_that_leaves_in_the_middle_ends_no_run(files, workspace, cache, which, after):
    read, write = os.pipe()
    keys = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} | {which: write}
    process = subprocess.Popen([sys.executable, "-m", "esengine", *flags()], **keys)
    os.close(write)
    os.read(read, after)
    os.close(read)
    assert process.wait(300) == 0
    assert (workspace / "new" / "report.html").is_file()


def test_a_terminal_that_is_hung_up_ends_no_run(files, workspace, cache):
    ours, theirs = os.openpty()
    keys = dict(stdout=theirs, stderr=theirs, start_new_session=True)
    process = subprocess.Popen([sys.executable, "-m", "esengine", *flags()], **keys)
    os.close(theirs)
    os.read(ours, 100)
    os.close(ours)
    assert process.wait(300) == 0
    assert (workspace / "new" / "eval.json").is_file()


def test_true_reads_nothing_of_a_whole_run(files, workspace, cache):
    command = " ".join([sys.executable, "-m", "esengine", *map(str, flags())])
    done = subprocess.run(["bash", "-c", f"{command} 2>&1 | true; exit ${{PIPESTATUS[0]}}"])
    assert done.returncode == 0
    assert (workspace / "new" / "report.html").is_file()
