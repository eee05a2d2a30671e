import dataclasses
import subprocess
import sys
from pathlib import Path

import journals
import pytest

from esengine.base.errors import ConfigError
from esengine.base.files import DATA
from esengine.base.settings_file import from_dict
from esengine.cli.flags import parse, parse_train
from esengine.cli.settings import EnvConfig, EvalConfig, RenderConfig
from esengine.es.rule import UpdateRule
from esengine.models.defaults import SETTINGS
from esengine.run.settings import (
    MAY_CHANGE,
    ESSettings,
    LoraSettings,
    TrainConfig,
    config_file,
    differences,
    load,
    to_dict,
    to_yaml,
)
from esengine.sampling.settings import ImageSettings


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str | bytes, name: str = "c.yaml") -> str:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def test_defaults_then_yaml_then_flags(yaml_file):
    path = yaml_file("steps: 7\npopulation: 8\nes: {sigma: 0.5, repeats: 3}\nimage:\n  chunk: 5\n")
    config = parse_train(["--population", "16", "--config", path, "--es.repeats", "2"])
    assert (config.steps, config.population, config.seed) == (7, 16, TrainConfig().seed)
    assert (config.es.sigma, config.es.repeats, config.es.noise_rank) == (0.5, 2, ESSettings().noise_rank)
    assert config.image == dataclasses.replace(load("nano").image, chunk=5)
    assert parse_train([f"--config={path}"]).steps == 7
    assert parse_train([]) == parse_train(["--model", "nano"]) == load("nano")
    assert parse_train(["--model", "tiny"]) == TrainConfig(model="tiny")


@pytest.mark.parametrize(
    "section",
    [
        pytest.param("update"),
        "es",
        "lora",
        "image",
    ],
)
def test_a_section_of_the_yaml_leaves_its_other_settings_at_the_models_defaults(yaml_file, section):
    name, value = {
        "update": ("optimizer", "adam"),
        "es": ("sigma", 0.5),
        "lora": ("rank", 3),
        "image": ("num_steps", 2),
    }[section]
    text = f"{section}: {{{name}: {value}}}\n"
    config = parse_train(["--config", yaml_file(f"model: tiny\n{text}")])
    expected = dataclasses.replace(getattr(TrainConfig(), section), **{name: value})
    assert getattr(config, section) == expected
    flags = [f"--{section}.{name.replace('_', '-')}", str(value)]
    assert getattr(parse_train(["--model", "tiny", *flags]), section) == expected
    expected = dataclasses.replace(
        load("nano"), **{section: dataclasses.replace(getattr(load("nano"), section), **{name: value})}
    )
    assert parse_train(flags) == expected
    for yaml, more in ((text, []), (f"model: nano\n{text}", []), (f"model: tiny\n{text}", ["--model", "nano"])):
        config = parse_train(["--config", yaml_file(yaml), *more])
        assert dataclasses.replace(config, config=None) == expected
    assert (
        parse_train(["--config", yaml_file(text), "--model", "tiny"]).update.lr_scale == TrainConfig().update.lr_scale
    )


def test_flags_of_every_kind():
    line = (
        "--run-dir runs/a --model m --prompts p.txt --reward a=1,b:c=0.5 --steps 3 --seed 18446744073709551615 "
        "--es.sigma 1e-3 --es.shaping centered_rank --lora.targets to_q to_k --update.max-norm None "
        "--update.max-step-norm 2 --image.no-instruction --image.height 64 --resume "
        "--heldout-reward clip_text,own:score --heldout-every 0 --heldout-prompts 3 --trackers wandb trackio "
        "--lora.alpha-pattern to_q 3 time_embed.linear 0.5"
    )
    config = parse_train(line.split())
    assert (config.run_dir, config.model, config.prompts) == (Path("runs/a"), "m", Path("p.txt"))
    assert (config.reward, config.steps, config.seed) == ("a=1,b:c=0.5", 3, 2**64 - 1)
    assert (config.es.sigma, config.es.shaping, config.lora.targets) == (1e-3, "centered_rank", ("to_q", "to_k"))
    assert (config.update.max_norm, config.update.max_step_norm) == (None, 2.0)
    assert (config.image.instruction, config.image.height, config.resume) == (False, 64, True)
    assert (config.heldout_reward, config.heldout_every, config.heldout_prompts) == ("clip_text,own:score", 0, 3)
    assert config.trackers == ("wandb", "trackio")
    assert config.lora.alpha_pattern == {"to_q": 3.0, "time_embed.linear": 0.5}


@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        ("", {"time_embed.linear": 800.0, "proj_out": 96.0}),
        ("--lora.rank 8", {"time_embed.linear": 800.0, "proj_out": 96.0}),
        ("--lora.alpha 40", {}),
        ("--lora.alpha=40", {}),
        ("--lora.alpha 40 --lora.alpha-pattern proj_out 2", {"proj_out": 2.0}),
        ("--lora.alpha=40 --lora.alpha_pattern proj_out 2", {"proj_out": 2.0}),
        ("--lora.alpha 480", {}),
        ("--lora.alpha-pattern", {}),
    ],
)
def test_an_alpha_from_the_command_line_is_that_of_all_layers(flags, pattern):
    assert parse_train(flags.split()).lora.alpha_pattern == pattern


def test_the_packaged_file_is_found_by_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [path.stem for path in DATA.glob("*.yaml")] == ["reference"]
    assert config_file("nano") == SETTINGS["nano"]
    config = parse_train(["--config", "reference", "--steps", "2"])
    assert (config.population, config.steps, config.es.sigma, config.update.lr_scale) == (128, 2, 1e-2, 0.1)
    assert (config.image.x0_angle, config.es.prompts_per_step, config.es.repeats) == (1.3, 4, 4)
    (tmp_path / "reference").write_text("steps: 9\n")  # a file of one's own comes first
    assert load("reference").steps == 9


def test_resume_takes_the_runs_own_settings_below_the_flags(tmp_path):
    saved = TrainConfig(steps=5, population=6, es=ESSettings(sigma=0.5))
    journals.begin(tmp_path, **to_dict(saved))
    for flags in (["--run-dir", str(tmp_path)], [f"--run-dir={tmp_path}"], ["--run_dir", str(tmp_path)]):
        config = parse_train([*flags, "--resume", "--steps", "9"])
        assert (config.steps, config.population, config.es.sigma) == (9, 6, 0.5)
    assert parse_train(["--run-dir", str(tmp_path)]).population == load("nano").population


@pytest.mark.parametrize(
    ("text", "value"), [("1e-2", 0.01), ("1.0e-2", 0.01), (".01", 0.01), ("1", 1.0), ("'2e3'", 2e3)]
)
def test_a_number_is_a_number_however_it_is_written(yaml_file, text, value):
    sigma = load(yaml_file(f"es:\n  sigma: {text}\n")).es.sigma
    assert (sigma, type(sigma)) == (value, float)


@pytest.mark.parametrize(
    ("text", "setting", "words"),
    [
        ("stepz: 3", "stepz", ("unknown setting", "steps")),
        ("es: {sigmo: 3}", "es.sigmo", ("unknown setting", "sigma")),
        ("1: 2", "1", ("unknown setting",)),
        ("steps: 3.5", "steps", ("an integer", "3.5")),
        ("steps: '3'", "steps", ("an integer", "'3'")),
        ("steps: true", "steps", ("an integer", "True")),
        ("steps:", "steps", ("an integer", "None")),
        ("resume: 1", "resume", ("true or false", "1")),
        ("model: 3", "model", ("text", "3")),
        ("prompts: [a]", "prompts", ("a path", "['a']")),
        ("prompts: ''", "prompts", ("a path", "''")),
        ("es: 3", "es", ("a mapping", "int")),
        ("es: {sigma: small}", "es.sigma", ("a number", "'small'")),
        ("es: {sigma: true}", "es.sigma", ("a number", "True")),
        ("es: {shaping: rank}", "es.shaping", ("zscore", "centered_rank", "'rank'")),
        ("lora: {targets: to_q}", "lora.targets", ("a list", "'to_q'")),
        ("lora: {targets: [1]}", "lora.targets", ("text", "1")),
        ("trackers: [aim]", "trackers", ("wandb", "trackio", "'aim'")),
        ("trackers: wandb", "trackers", ("a list", "'wandb'")),
        ("lora: {alpha_pattern: {to_q: much}}", "lora.alpha_pattern.to_q", ("a number", "'much'")),
        ("lora: {alpha_pattern: {1: 2}}", "lora.alpha_pattern", ("text", "1")),
        ("lora: {alpha_pattern: 3}", "lora.alpha_pattern", ("a mapping", "3")),
        ("population: 5", "population", ("even", "5")),
        ("image: {height: 0}", "image.height", ("at least 1", "0")),
        ("image: {x0_angle: 2}", "image.x0_angle", ("at most 1.5708", "2")),
        ("update: {lr_scale: 1e9}\nes: {sigma: 1}", "update.lr_scale", ("1e+06", "1e+09", "es.sigma")),
    ],
)
def test_what_is_wrong_with_a_setting_of_a_file_is_named(yaml_file, text, setting, words):
    with pytest.raises(ConfigError) as caught:
        load(yaml_file(text))
    error = caught.value
    assert (error.setting, error.source) == (setting, f"config {yaml_file(text)}")
    assert str(error) == f"{error.source}: {setting}: {error.problem}"
    assert all(word in error.problem for word in words), error.problem


@pytest.mark.parametrize(
    ("text", "place", "word"),
    [
        ("- steps", "", "mapping"),
        ("steps: 3\nlora:\n  rank: [\n", ", line 4", ""),
        ("steps: 3\n\tseed: 1\n", ", line 2", ""),
        ("a: b: c", ", line 1", ""),
        ("!!python/object:os.system {}", ", line 1", "tag"),
        (b"steps: \xff3", "", "utf-8"),
    ],
)
def test_what_is_no_file_of_settings_is_named_with_its_line(yaml_file, text, place, word):
    with pytest.raises(ConfigError) as caught:
        load(yaml_file(text))
    assert caught.value.source == f"config {yaml_file(text)}{place}"
    assert word in caught.value.problem


def test_an_empty_file_is_the_defaults_and_a_missing_one_an_error(yaml_file, tmp_path):
    assert load(yaml_file("# nothing\n")) == TrainConfig()
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError) as caught:
            load(path)
        assert caught.value.source == f"config {path}"
    with pytest.raises(ConfigError) as caught:
        parse_train(["--config", "nosuch"])
    assert caught.value.source == "config nosuch"


EXOTIC = TrainConfig(
    run_dir=Path("a b/ü"),
    model="#yes",
    revision="0012",
    prompts=Path("p: q.txt"),
    reward="a=1,b:c=.5",
    seed=2**64 - 1,
    resume=True,
    config="null",
    dtype="bfloat16",
    heldout_reward="none",
    trackers=("trackio",),
    lora=LoraSettings(rank=5, alpha=1e-9, targets=("to_q", "yes", "1"), alpha_pattern={"yes": 2.0, "a.b": 1e-3}),
    es=ESSettings(sigma=1e-2 / 3, shaping="none", prompt_std="own"),
    update=UpdateRule(optimizer="adam", lr_scale=1e-7, max_step_norm=1e22, max_norm=None),
    image=ImageSettings(height=64, x0_angle=1.3, chunk=7, instruction=False),
)


@pytest.mark.parametrize("config", [TrainConfig(), EXOTIC])
def test_what_is_saved_is_read_back_equal(config, yaml_file):
    assert load(yaml_file(to_yaml(config))) == config
    assert from_dict(TrainConfig(), to_dict(config), "here") == config


def test_differences_name_what_may_not_change():
    old = to_dict(EXOTIC)
    assert differences(old, old) == []
    same = dataclasses.replace(
        EXOTIC,
        run_dir=None,
        resume=False,
        config=None,
        steps=1,
        checkpoint_every=1,
        strip_every=0,
        eval_prompts=Path("e"),
        heldout_reward="auto",
        heldout_every=3,
        heldout_prompts=1,
        trackers=(),
    )
    assert differences(old, to_dict(same)) == []
    lora = LoraSettings(rank=5, alpha=1e-9, alpha_pattern={"yes": 3.0, "a.b": 1e-3})
    other = dataclasses.replace(
        EXOTIC, population=64, es=ESSettings(sigma=0.5, shaping="none", prompt_std="own"), lora=lora
    )
    found = differences(old, to_dict(other))
    assert [line.split(":")[0] for line in found] == [
        "population",
        "lora.targets",
        "lora.alpha_pattern.yes",
        "es.sigma",
    ]
    assert found[0] == "population: 32 -> 64"
    assert differences({"a": 1}, {"b": None}) == ["a: 1 -> None"]
    assert set(MAY_CHANGE) <= {f.name for f in dataclasses.fields(TrainConfig)}


@pytest.mark.parametrize(
    ("build", "name"),
    [
        *((lambda n=n: TrainConfig(population=n), "population") for n in (0, 1, 5, -2)),
        (lambda: TrainConfig(steps=0), "steps"),
        (lambda: TrainConfig(steps=2**31 + 1), "steps"),
        (lambda: TrainConfig(checkpoint_every=0), "checkpoint_every"),
        (lambda: TrainConfig(strip_every=-1), "strip_every"),
        (lambda: TrainConfig(heldout_every=-1), "heldout_every"),
        (lambda: TrainConfig(heldout_prompts=0), "heldout_prompts"),
        (lambda: TrainConfig(trackers=("aim",)), "trackers"),
        (lambda: TrainConfig(trackers=("wandb", "wandb")), "trackers"),
        (lambda: TrainConfig(seed=-1), "seed"),
        (lambda: TrainConfig(seed=2**64), "seed"),
        *((lambda v=v: ESSettings(sigma=v), "es.sigma") for v in (0, -1.0, float("nan"), float("inf"))),
        (lambda: ESSettings(noise_rank=0), "es.noise_rank"),
        (lambda: ESSettings(prompts_per_step=0), "es.prompts_per_step"),
        (lambda: ESSettings(repeats=0), "es.repeats"),
        (lambda: ESSettings(shaping="x"), "es.shaping"),
        (lambda: ESSettings(prompt_std="x"), "es.prompt_std"),
        (lambda: LoraSettings(rank=-1), "lora.rank"),
        (lambda: LoraSettings(alpha=0.0), "lora.alpha"),
        (lambda: LoraSettings(alpha=float("nan")), "lora.alpha"),
        (lambda: LoraSettings(targets=()), "lora.targets"),
        (lambda: LoraSettings(alpha_pattern={"to_v": 0.0}), "lora.alpha_pattern.to_v"),
        (lambda: LoraSettings(alpha_pattern={"(to|v)+$": 1.0}), "lora.alpha_pattern"),
        (lambda: UpdateRule(optimizer="sdg"), "optimizer"),
        (lambda: UpdateRule(lr_scale=0), "lr_scale"),
        (lambda: UpdateRule(lr_scale=float("inf")), "lr_scale"),
        (lambda: UpdateRule(max_norm=0), "max_norm"),
        (lambda: UpdateRule(max_step_norm=-1.0), "max_step_norm"),
        (lambda: UpdateRule(momentum=1.0), "momentum"),
        (lambda: UpdateRule(beta2=-0.1), "beta2"),
        (lambda: TrainConfig(update=UpdateRule(lr_scale=1e9)), "update.lr_scale"),
        (lambda: EvalConfig(repeats=0), "repeats"),
        (lambda: EvalConfig(shard="2/2"), "shard"),
        (lambda: RenderConfig(limit=-1), "limit"),
        (lambda: RenderConfig(seed=2**64), "seed"),
        *(
            (lambda n=n: ImageSettings(**{n: 0}), f"image.{n}")
            for n in ("height", "width", "num_steps", "chunk", "decode_chunk")
        ),
    ],
)
def test_every_range_is_checked(build, name):
    with pytest.raises(ConfigError) as caught:
        build()
    assert caught.value.setting == name
    assert "expected" in caught.value.problem
    assert ", got " in caught.value.problem


PROMISED = {
    "train": "--run-dir --model --prompts --reward --steps --population --seed --resume --config --heldout-reward",
    "eval": "--run-dir --adapter --model --prompts --reward --seed --json",
    "render": "--run-dir --adapter --model --out --seed",
    "env": "--json",
}


@pytest.mark.parametrize("command", PROMISED)
def test_help_lists_the_flags_without_importing_torch(command):
    script = (
        "import sys\n"
        "from esengine.cli import main\n"
        "try:\n"
        "    code = main(sys.argv[1:])\n"
        "except SystemExit as leave:\n"
        "    code = leave.code\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'peft', 'numpy'} & set(sys.modules)\n"
        "sys.exit(str(sorted(heavy)) if heavy else code)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, command, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"usage: esengine {command}" in done.stdout
    words = done.stdout.replace(",", " ").split()
    assert [flag for flag in PROMISED[command].split() if flag not in words] == []


def test_the_others_parse_with_nothing():
    assert parse(EvalConfig, [], "esengine eval") == EvalConfig(image=ImageSettings())
    assert parse(RenderConfig, [], "esengine render") == RenderConfig(image=ImageSettings())
    assert parse(EnvConfig, [], "esengine env") == EnvConfig()
    assert parse(RenderConfig, ["a cat", "a dog", "--out", "o"], "esengine render").prompts == ("a cat", "a dog")


def test_of_a_flag_given_twice_the_last_counts_for_every_reader(tmp_path):
    nano, tiny = load("nano"), TrainConfig(model="tiny")
    assert parse_train(["--model", "tiny", "--model", "nano"]) == nano
    assert parse_train(["--model", "nano", "--model=tiny"]) == tiny
    for name, steps in (("a", 7), ("b", 8)):
        (tmp_path / f"{name}.yaml").write_text(f"model: tiny\nsteps: {steps}\n")
        journals.begin(tmp_path / name, model="tiny", steps=steps)
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    assert parse_train(["--config", f"{a}.yaml", f"--config={b}.yaml"]).steps == 8
    assert parse_train(["--run_dir", a, "--run-dir", b, "--resume"]).steps == 8
    assert parse_train(["--model", "tiny", "--run-dir", b, "--resume", "--no-resume"]).steps == tiny.steps
    assert parse_train(["--lora.alpha", "3", "--lora.alpha", "5"]).lora.alpha == 5


@pytest.mark.parametrize(("count", "expected"), [(1, 1), (4, 4), (8, 8), (9, 8)])
def test_prompts_a_step_adapt_to_a_short_list(tmp_path, count, expected):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(f'{{"prompt": "prompt {i}"}}\n' for i in range(count)))
    assert parse_train(["--prompts", str(prompts)]).es.prompts_per_step == expected
    assert parse_train(["--prompts", str(prompts), "--es.prompts_per_step", "5"]).es.prompts_per_step == 5
    (tmp_path / "own.yaml").write_text("es: {prompts_per_step: 6}\n")
    own = ["--config", str(tmp_path / "own.yaml"), "--prompts", str(prompts)]
    assert parse_train(own).es.prompts_per_step == 6
    reference = ["--config", "reference", "--prompts", str(prompts)]
    assert parse_train(reference).es.prompts_per_step == 4  # the published run, or an error
    assert parse_train(["--config", "nano", "--prompts", str(prompts)]).es.prompts_per_step == expected


def test_an_alpha_of_a_yaml_file_is_that_of_all_layers(yaml_file):
    assert parse_train(["--config", yaml_file("lora: {alpha: 3}\n")]).lora == dataclasses.replace(
        load("nano").lora, alpha=3.0, alpha_pattern={}
    )
    kept = parse_train(["--config", yaml_file("lora: {alpha: 3, alpha_pattern: {proj_out: 5}}\n")]).lora
    assert kept.alpha_pattern == {"proj_out": 5.0}


def test_a_run_resumes_with_its_own_settings_and_none_of_nanos(tmp_path):
    journals.begin(tmp_path, model="nano", steps=7)
    config = parse_train(["--run-dir", str(tmp_path), "--resume"])
    assert (config.update, config.lora) == (TrainConfig().update, TrainConfig().lora)


@pytest.mark.parametrize("section", ["lora: hello", "lora:", "image: 5", "update: [1]", "es: 5"])
def test_a_section_that_is_no_mapping_is_named(yaml_file, section):
    with pytest.raises(ConfigError) as caught:
        parse_train(["--config", yaml_file(f"{section}\n")])
    assert caught.value.setting == section.partition(":")[0]
    assert "expected a mapping" in caught.value.problem


def test_a_damaged_end_of_a_journal_does_not_keep_the_settings_from_the_command_line(tmp_path):
    journals.begin(tmp_path, model="tiny", steps=7)
    with open(tmp_path / "journal.jsonl", "a") as journal:
        journal.write("garbage\n")
    assert parse_train(["--run-dir", str(tmp_path), "--resume"]).steps == 7


@pytest.mark.parametrize("model", ["nano", "tiny"])
def test_a_chosen_number_of_prompts_a_step_is_kept(tmp_path, model):
    (tmp_path / "p.txt").write_text("a\nb\nc\nd\n")
    flags = ["--model", model, "--prompts", str(tmp_path / "p.txt")]
    assert parse_train([*flags, "--es.prompts-per-step", "8"]).es.prompts_per_step == 8
    assert parse_train(flags).es.prompts_per_step == 4


def test_a_flag_may_mend_a_pair_of_settings_of_a_file(yaml_file):
    file = yaml_file("image:\n  num_steps: 2\n  x0_angle: 1.3\n")
    assert parse_train(["--config", file, "--image.num-steps", "1"]).image.x0_angle == 1.3


def test_a_value_of_a_file_may_be_replaced_by_a_flag_before_it_is_checked(yaml_file):
    file = yaml_file("population: 5\nes: {prompts_per_step: 1048576}\n")
    config = parse_train(["--config", file, "--population", "6", "--es.prompts-per-step", "2"])
    assert (config.population, config.es.prompts_per_step) == (6, 2)


def test_a_setting_of_a_files_section_stays_beside_a_flag_of_that_section(yaml_file):
    file = yaml_file("lora: {alpha: 3, alpha_pattern: {proj_out: 5}}\nupdate: {max_norm: null}\n")
    config = parse_train(["--config", file, "--lora.rank", "7", "--update.optimizer=adam"])
    assert (config.lora.rank, config.lora.alpha, config.lora.alpha_pattern) == (7, 3.0, {"proj_out": 5.0})
    assert (config.update.max_norm, config.update.optimizer) == (None, "adam")


def test_a_prompt_may_look_like_a_flag():
    assert parse(RenderConfig, ["--out", "o", "--", "--run-dir", "nosuch"], "esengine render").prompts == (
        "--run-dir",
        "nosuch",
    )
