"""Help in two levels: one screen of a command, and every flag with the defaults of the model that is named."""

import dataclasses
import os
import subprocess
import sys

import journals
import pytest

from esengine import cli
from esengine.base.settings import fields_of
from esengine.cli.flags import COMMANDS, _settings, parse, parse_train, shown
from esengine.cli.help import asked, family_of_name, field_docs
from esengine.cli.help_pages import PAGES
from esengine.models.families import FAMILIES, TINY
from esengine.run.settings import TrainConfig, load


@pytest.fixture
def help_of(capsys, tmp_path, monkeypatch):
    """The lines that a command prints. They are all on standard output, and the exit code is 0."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def ask(*args: str) -> list[str]:
        code = cli.main(list(args))
        out, err = capsys.readouterr()
        assert (code, err) == (0, "")
        return out.splitlines()

    return ask


def default(lines: list[str], flag: str) -> str:
    """The default that --help-all shows of a flag; empty if it shows none."""
    start = next(i for i, line in enumerate(lines) if line.split()[:1] in ([flag], [f"{flag},"]))
    end = next(i for i in range(start + 1, len(lines)) if not lines[i].startswith("   "))
    text = " ".join(" ".join(lines[start:end]).split())
    return text.partition("(default: ")[2].removesuffix(")")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_the_first_level_is_one_screen(help_of, command, flag):
    lines = help_of(command, flag)
    assert len(lines) <= 23  # the prompt has the 24th
    assert max(map(len, lines)) <= 100
    assert lines[0].startswith(f"usage: esengine {command} ")
    assert lines.index("examples:") == len(lines) - (lines[::-1].index("") + 1 + 4)  # three of them
    assert f"All flags: esengine {command} --help-all" == lines[-1]
    flags = lines[
        next(i for i, line in enumerate(lines) if line in ("flags:", "arguments:")) + 1 : lines.index("examples:") - 1
    ]
    assert len(flags) == len(PAGES[command].flags) <= 10
    assert all(line.startswith("  ") and line[2] != " " for line in flags)  # each on a line of its own
    assert "Settings" in lines[lines.index("examples:") + 5]


def test_train_shows_ten_flags():
    assert len(PAGES["train"].flags) == len(PAGES["eval"].flags) == 10


@pytest.mark.parametrize("command", COMMANDS)
def test_every_example_is_one_that_the_command_line_takes(command, monkeypatch):
    monkeypatch.setattr("esengine.cli.flags.load_run", lambda folder: TrainConfig())
    assert len(PAGES[command].examples) == 3
    for line, what in PAGES[command].examples:
        words = line.replace('"', "").split()
        args = words[words.index("esengine") + 2 :]
        assert words[words.index("esengine") + 1] == command
        assert what
        parse_train(args) if command == "train" else parse(COMMANDS[command], args, command)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_second_level_has_every_setting_once_and_says_what_it_is(help_of, command):
    lines = [line for line in help_of(command, "--help-all") if line.startswith("  -")]
    positional = {"render": "prompts", "replay": "run_dir", "report": "folder", "judge": "folder"}.get(command)
    expected = [f"--{name}".replace("_", "-") for name in _settings(COMMANDS[command]) if name != positional]
    assert sorted(line.split()[0].rstrip(",") for line in lines) == sorted(expected)
    for name in _settings(COMMANDS[command]):
        cls, *sections = COMMANDS[command], *name.split(".")
        for section in sections[:-1]:
            cls = fields_of(cls)[section][1]
        assert field_docs(cls)[sections[-1]].endswith("."), name


def test_defaults_are_those_of_the_model_that_is_named(help_of):
    lines = help_of("train", "--help-all")
    assert lines == help_of("train", "--model", "nano", "--help-all")
    nano = load("nano")
    for flag, value in (
        ("--es.sigma", nano.es.sigma),
        ("--steps", nano.steps),
        ("--reward", nano.reward),
        ("--lora.targets", " ".join(nano.lora.targets)),
        ("--lora.alpha-pattern", "time_embed.linear 800 proj_out 96"),
        ("--image.guidance-scale", 4.5),
        ("--prompts", "nano_train.txt of this package"),
        ("--run-dir", ""),
        ("--image.instruction", "on"),
        ("--resume", ""),
    ):
        assert default(lines, flag) == str(value), flag
    lines = help_of("train", "--help-all", "--model=tiny")
    assert default(lines, "--steps") == str(TrainConfig().steps)
    assert default(lines, "--reward") == "jpeg_compressibility"
    assert lines[-1].endswith("of the model tiny.")


@pytest.mark.parametrize("name", TINY)
def test_a_family_gives_its_own_steps_guidance_and_targets(help_of, name):
    lines, family = help_of("train", "--help_all", "--model", f"tiny:{name}"), FAMILIES[name]
    assert default(lines, "--image.num-steps") == str(family.steps)
    assert default(lines, "--lora.targets") == " ".join(family.targets)
    if not family.embedded_guidance:
        assert default(lines, "--image.guidance-scale") == str(family.guidance)


@pytest.mark.parametrize("command", ["eval", "render"])
def test_other_commands_show_the_familys_defaults_too(help_of, command):
    lines = help_of(command, "--model", "tiny:qwen-image", "--help-all")
    assert default(lines, "--image.num-steps") == "8"


def test_a_folder_says_its_family_and_a_hub_id_that_is_not_here_none(tmp_path, monkeypatch):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    problem = pytest.raises(cli.EsengineError, match="tokenizer")
    with problem:
        family_of_name(str(tmp_path))
    assert family_of_name("nano").name == "sana-sprint"
    assert family_of_name("nobody-has/such-a-model") is None


def test_a_file_of_settings_is_shown_over_the_models_defaults(help_of, tmp_path):
    (tmp_path / "c.yaml").write_text("model: tiny:sdxl\nsteps: 7\nes: {sigma: 0.5}\n")
    lines = help_of("train", "--config", "c.yaml", "--help-all")
    assert [default(lines, flag) for flag in ("--steps", "--es.sigma", "--model")] == ["7", "0.5", "tiny:sdxl"]
    assert default(lines, "--image.num-steps") == "4"
    assert default(lines, "--config") == ""
    lines = help_of("train", "--config", "reference", "--model", "nano", "--help-all")
    assert [default(lines, flag) for flag in ("--population", "--model")] == ["128", "nano"]


def test_a_run_is_shown_where_the_command_takes_its_settings(help_of, tmp_path):
    journals.begin(tmp_path / "run", model="tiny:flux", steps=9, image={"num_steps": 3})
    assert default(help_of("train", "--run-dir", "run", "--resume", "--help-all"), "--steps") == "9"
    lines = help_of("render", "--run_dir=run", "--help-all")
    assert default(lines, "--image.num-steps") == "3"
    assert lines[-1].endswith("of the model tiny:flux.")


@pytest.mark.parametrize(
    ("args", "notes"),
    [
        (["train", "--config", "nosuch.yaml"], ["config nosuch.yaml"]),
        (["train", "--config", "bad.yaml", "--model", "tiny"], ["config bad.yaml"]),
        (["train", "--config", "wrong.yaml"], ["es.sigma"]),
        (["train", "--run-dir", "broken", "--resume"], ["journal"]),
        (["train", "--model", "tiny:nosuch"], ["tiny:nosuch"]),
        (["train", "--model", "empty"], ["empty"]),
        (["eval", "--run-dir", "nosuch"], ["nosuch"]),
        (["render", "--run-dir", "broken"], ["journal"]),
    ],
)
def test_help_answers_beside_what_cannot_be_used_and_says_so(help_of, tmp_path, args, notes):
    (tmp_path / "bad.yaml").write_text("[")
    (tmp_path / "wrong.yaml").write_text("es: {sigma: -1}\n")
    for name in ("broken", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "journal.jsonl").write_text("garbage\n")
    assert len(help_of(*args, "--help")) <= 23
    text = " ".join(help_of(*args, "--help-all"))
    assert text.count("Note: ") == len(notes)
    assert all(note in text.partition("Note: ")[2] for note in notes)


@pytest.mark.parametrize("flags", [["--steps", "x"], ["--nosuch"], ["--model="], ["--es.sigma", "-1"], ["--seed"]])
def test_help_answers_beside_a_wrong_flag(help_of, flags):
    assert default(help_of("train", "--config", "reference", *flags, "--help-all"), "--population") == "128"


@pytest.mark.parametrize("width", [50, 60, 80, 120, 200])
@pytest.mark.parametrize("command", COMMANDS)
def test_lines_are_as_wide_as_the_terminal(help_of, monkeypatch, command, width):
    monkeypatch.setenv("COLUMNS", str(width))
    for level in ("--help", "--help-all"):
        lines = help_of(command, level)
        assert [line for line in lines if len(line) > width and len(line.split()) > 1] == []
        assert all(line == line.rstrip() for line in lines)


def test_a_wide_terminal_is_used(help_of, monkeypatch):
    lengths = []
    for width in (60, 100, 160):
        monkeypatch.setenv("COLUMNS", str(width))
        lengths.append(len(help_of("train", "--help-all")))
    assert lengths[0] > lengths[1] > lengths[2]


@pytest.mark.parametrize(
    ("args", "level"),
    [
        ([], None),
        (["--steps", "3"], None),
        (["-h"], "short"),
        (["--steps", "3", "--help"], "short"),
        (["--help", "--help-all"], "all"),
        (["--help_all"], "all"),
        (["--", "--help"], None),
        (["a", "-h", "--", "--help-all"], "short"),
    ],
)
def test_which_help_is_asked_for(args, level):
    assert asked(args) == level


def test_without_a_command_it_says_what_to_do_first(capsys):
    assert cli.main([]) == 2
    out, err = capsys.readouterr()
    assert err == ""
    assert cli.main(["--help"]) == cli.main(["--help-all"]) == 0
    assert capsys.readouterr().out == out * 2
    assert max(map(len, out.splitlines())) <= 80
    assert len(out.splitlines()) <= 23
    first = out.partition("start here:\n")[2].splitlines()[0].split()
    assert first[:2] == ["esengine", "train"]
    assert all(f"\n  {command} " in out for command in COMMANDS)


@pytest.mark.parametrize("level", ["--help", "--help-all"])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_no_heavy_library(command, level):
    script = (
        "import sys\n"
        "from esengine.cli import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'peft', 'numpy', 'PIL', 'huggingface_hub'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, command, level], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "[]\n")


@pytest.mark.parametrize("args", [["train", "--help-all"], ["eval", "--help"], []])
def test_a_reader_that_has_read_enough_is_no_error(args):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "esengine", *args], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (0 if args else 2, "")


def test_what_is_shown_is_what_a_command_would_take(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("model: tiny\npopulation: 8\n")
    for args in ([], ["--model", "tiny"], ["--config", "c.yaml"], ["--config", "reference"]):
        assert shown("train", [*args, "--help-all"]).settings == parse_train(args)
    assert dataclasses.is_dataclass(shown("eval", []).settings)
