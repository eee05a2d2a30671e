"""Base against adapter: `esengine eval` after `esengine train`, on a benchmark, and `esengine render`."""

import json
import shutil
from dataclasses import replace

import journals
import numpy as np
import pytest
import torch
from PIL import Image

from esengine.base.errors import ConfigError, OutOfMemory
from esengine.base.progress import Progress
from esengine.cli.eval import _scored, evaluate
from esengine.cli.render import render
from esengine.cli.settings import EvalConfig, RenderConfig
from esengine.evaluation.entries import Entry, parse_entries
from esengine.evaluation.statistics import Report
from esengine.models import SanaSprint
from esengine.models.defaults import defaults
from esengine.rewards import parse
from esengine.rewards.spec import read
from esengine.run.settings import ESSettings, load
from esengine.run.train import train
from esengine.sampling.settings import ImageSettings

# ---- after a run


def test_eval_reproduces_the_table_of_train(trained, esengine, workspace):
    config, result = trained
    code, out, _ = esengine("eval", "--run-dir", config.run_dir, "--json", "deep/er/e.json")
    assert code == 0
    report = Report(**json.loads((workspace / "deep/er/e.json").read_text()))
    assert report.entries == ["base@1", "adapter@1"]
    assert report.groups == result.comparison.groups
    assert report.table() in out
    assert "base@1, adapter@1 on 3 prompts of held, 1 image each:" in out
    assert "written to deep/er/e.json" in out
    assert [path.name for path in workspace.iterdir()] == ["deep"]


def test_eval_takes_flags_over_the_runs_settings(trained, esengine, workspace):
    config, _ = trained
    (workspace / "one.txt").write_text("a lamp\n")
    flags = ["--prompts", "one.txt", "--reward", "jpeg_incompressibility", "--repeats", "3", "--seed", "9"]
    code, out, _ = esengine("eval", "--run-dir", config.run_dir, "--json", "e.json", *flags)
    assert code == 0
    assert "on 1 prompts of one, 3 images each" in out
    data = json.loads((workspace / "e.json").read_text())
    assert (data["prompts"], data["repeats"], data["scores"]) == (1, 3, ["jpeg_incompressibility"])
    paired = data["groups"][0]["rows"][1]["against_first"]["jpeg_incompressibility"]
    assert paired["standard_error"] is None
    assert data["settings"]["seed"] == 9


def test_the_nano_benchmark_of_a_run_has_what_the_run_optimised(tmp_path, cache):
    config = replace(load("nano"), steps=1, population=2, heldout_every=0, strip_every=0, run_dir=tmp_path / "run")
    prompts = tmp_path / "p.txt"
    prompts.write_text("a small red circle\n")
    train(replace(config, eval_prompts=prompts, es=replace(config.es, prompts_per_step=1)))
    report = evaluate(EvalConfig(run_dir=config.run_dir, benchmark="nano", limit=3), Progress()).report
    assert set(report.scores) == {"checker", "pickscore", "clip_text", "aesthetic", "no_artifacts", "combined"}
    assert report.settings["rewards"] == parse(f"{config.reward},{OTHERS}").settings()
    assert "combined" in report.gap_closed
    alone = EvalConfig(adapter=config.run_dir / "adapter", model="nano", benchmark="nano", limit=3, out=tmp_path / "e")
    assert "combined" not in evaluate(alone, Progress()).report.scores


def test_a_run_of_another_model_does_not_change_the_nano_benchmark(trained):
    config = EvalConfig(run_dir=trained[0].run_dir, model="nano", benchmark="nano", reward=None)
    assert _scored(config, trained[0], defaults("nano")) == read(defaults("nano").benchmark("nano"))


OTHERS = ",".join(f"{name}(model=nano)=0" for name in ("clip_text", "aesthetic", "no_artifacts"))


def test_an_adapter_folder_is_enough(trained, prompt_files, cache):
    config, result = trained
    image = ImageSettings(chunk=3)
    found = evaluate(
        EvalConfig(model="tiny", adapter=config.run_dir / "adapter", prompts=prompt_files[1], repeats=1, image=image),
        Progress(),
    )
    assert found.report.groups == result.comparison.groups
    assert found.folder is None


def test_eval_computes_in_the_dtype_of_the_run(small, tmp_path):
    result = train(small(tmp_path / "run", steps=1, dtype="bfloat16"))
    found = evaluate(EvalConfig(run_dir=tmp_path / "run"), Progress()).report
    assert found.groups == result.comparison.groups
    assert found.settings["dtype"] == "bfloat16"


def test_eval_works_from_another_folder(small, tmp_path, prompt_files, monkeypatch):
    monkeypatch.chdir(prompt_files[0].parent)
    relative = {"prompts": prompt_files[0], "eval_prompts": prompt_files[1]}
    train(small(tmp_path / "run", steps=1, **{name: type(path)(path.name) for name, path in relative.items()}))
    monkeypatch.chdir(tmp_path)
    try:
        evaluate(EvalConfig(run_dir=tmp_path / "run"), Progress())
    except ConfigError as error:
        raise AssertionError(str(error)) from error


def test_an_adapter_of_nothing_changes_nothing(small, tmp_path):
    """Fitness of a reward that cannot tell members apart is 0, so B stays 0: base and adapter tie on every prompt."""
    import sys
    import types

    module = types.ModuleType("flat")
    module.score = lambda images, prompts: torch.full((len(images),), 3.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "flat", module)
        result = train(small(tmp_path / "run", steps=1, reward="flat:score"))
        found = evaluate(EvalConfig(run_dir=tmp_path / "run", reward="jpeg_compressibility"), Progress())
    assert result.comparison.overall[1]["against_first"]["flat:score"]["difference"] == 0
    paired = found.report.overall[1]["against_first"]["jpeg_compressibility"]
    assert paired == {"difference": 0.0, "standard_error": 0.0, "win_rate": 0.5}


# ---- a benchmark


TABLE = "prompt\tCHALLENGE\tCategory\na cat\tBasic\tAnimals\na dog\tBasic\tAnimals\na pot\tHard\tArtifacts\n"


@pytest.fixture
def parti(workspace):
    (workspace / "parti.tsv").write_text(TABLE)
    return [
        "--benchmark",
        "partiprompts",
        "--prompts",
        "parti.tsv",
        "--reward",
        "jpeg_compressibility",
        "--model",
        "tiny",
    ]


def test_a_benchmark_of_a_run_is_three_entries_in_its_folder(trained, parti, esengine, workspace):
    shutil.copytree(trained[0].run_dir, workspace / "run")
    code, out, err = esengine("eval", "--run-dir", "run", *parti)
    assert code == 0, err
    assert "base@1, adapter@1, base@2 on 3 prompts of partiprompts, 1 image each:" in out
    assert "gap closed" in out
    folder = workspace / "run" / "evaluations" / "partiprompts"
    report = json.loads((folder / "report.json").read_text())
    assert report["entries"] == ["base@1", "adapter@1", "base@2"]
    assert list(report["gap_closed"]) == ["jpeg_compressibility"]
    assert [(g["by"], g["name"]) for g in report["groups"][1:]] == [
        ("category", "Animals"), ("category", "Artifacts"), ("challenge", "Basic"), ("challenge", "Hard"),
    ]  # fmt: skip
    assert "run/evaluations/partiprompts/report.html" in out
    kept = json.loads((folder / "curves.json").read_text())
    logged = journals.steps(workspace / "run")
    assert list(kept) == ["adapter@1"]
    assert [(line["step"], line["reward"]) for line in kept["adapter@1"]["metrics"]] == [
        (line["step"], line["reward"]) for line in logged
    ]
    assert [line["step"] for line in kept["adapter@1"]["heldout"]] == [0, 2, 4]
    assert '<section id="training">' in (folder / "report.html").read_text()
    before = out
    code, out, err = esengine("eval", "--run-dir", "run", *parti)
    assert (code, out) == (0, before)
    assert "0 of 9 images to draw" in err


def test_a_benchmark_without_an_adapter_and_a_limit(parti, esengine, workspace, cache):
    code, out, err = esengine("eval", *parti, "--limit", "2", "--out", "o")
    assert code == 0, err
    assert json.loads((workspace / "o" / "report.json").read_text())["entries"] == ["base@1", "base@2"]
    assert "on 2 prompts of partiprompts" in out


def test_entries_of_several_runs(trained, parti, esengine, workspace):
    shutil.copytree(trained[0].run_dir, workspace / "first")
    shutil.copytree(trained[0].run_dir / "adapter", workspace / "second one")
    entries = ["first@1", "second one@1", "third=first/adapter@2", "base@1"]
    code, _, err = esengine("eval", *parti, "--out", "o", "--entries", *entries)
    assert code == 0, err
    report = json.loads((workspace / "o" / "report.json").read_text())
    assert report["entries"] == ["first@1", "second-one@1", "third@2", "base@1"]
    first, second, third, base = report["groups"][0]["rows"]
    assert second["against_first"]["jpeg_compressibility"]["difference"] == 0
    assert third["against_first"]["jpeg_compressibility"]["difference"] != 0
    assert base["mean"] != first["mean"]
    assert report["gap_closed"] == {}
    assert {path.name for path in (workspace / "o" / "images").iterdir()} == set(report["entries"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--entries", "base"], ["'base'", "accepted are base@N", "FOLDER@N"]),
        (["--entries", "base@0"], ["'base@0'", "accepted are"]),
        (["--entries", "base@one"], ["'base@one'", "accepted are"]),
        (
            ["--entries", "nosuch@1"],
            ["'nosuch@1'", "nosuch/pytorch_lora_weights.safetensors does not exist", "accepted"],
        ),
        (["--entries", "adapter@1"], ["'adapter@1'", "--run-dir or --adapter"]),
        (["--entries", "base@1", "base@1"], ["'base@1' and 'base@1'", "base@1"]),
        (["--entries", "run@1", "run/adapter@1"], ["would both be called run@1", "other=run/adapter@1"]),
        (["--entries", "base=run@1"], ["would be called base", "mine=run@1"]),
        (["--entries", "torn@1"], ["torn/pytorch_lora_weights.safetensors", "cannot load"]),
        (["--shard", "4/4"], ["shard", "0 <= K < N", "4/4"]),
        (["--shard", "x"], ["shard", "x"]),
        (["--limit", "0"], ["limit"]),
        (["--out", "parti.tsv"], ["out parti.tsv", "there is a file"]),
        (["--benchmark", "nosuch"], ["'nosuch'"]),
        (["--image.num-steps", "2", "--image.x0-angle", "1.3"], ["--image.x0-angle"]),
        (["--device", "cuda:99"], ["cuda:99"]),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(trained, parti, esengine, workspace, flags, words):
    shutil.copytree(trained[0].run_dir, workspace / "run")
    (workspace / "torn").mkdir()
    (workspace / "torn" / "pytorch_lora_weights.safetensors").write_bytes(b"nonsense")
    before = {path.name for path in workspace.iterdir()}
    code, out, err = esengine("eval", *parti, *flags)
    assert code not in (0, None)
    assert out == ""
    line = err.strip().splitlines()[-1]
    assert line.startswith("esengine: error: ")
    assert all(word in line for word in words), line
    assert {path.name for path in workspace.iterdir()} == before


def test_several_processes_need_a_folder(trained, esengine):
    code, _, err = esengine("eval", "--run-dir", trained[0].run_dir, "--shard", "0/2")
    assert code == 1
    assert "give --out" in err


def test_folders_are_entries_by_name(trained, tmp_path):
    shutil.copytree(trained[0].run_dir / "adapter", tmp_path / "a=b")
    (found,) = parse_entries([f"{tmp_path / 'a=b'}@3"])
    assert (found.label, found.adapter, found.steps) == ("a-b@3", tmp_path / "a=b", 3)
    (found,) = parse_entries([f"mine={tmp_path / 'a=b'}@3"])
    assert (found.label, found.adapter) == ("mine@3", tmp_path / "a=b")
    assert parse_entries(["adapter@2", "base@12"], tmp_path / "a=b") == (
        Entry("adapter", 2, tmp_path / "a=b"),
        Entry("base", 12),
    )
    with pytest.raises(ConfigError, match="adapter@N with --run-dir"):
        parse_entries(["adapter@2"])


# ---- render


def test_render_draws_base_beside_adapter(trained, esengine, workspace):
    config, _ = trained
    code, out, _ = esengine("render", "a red fox", "an owl", "--run-dir", config.run_dir, "--out", "o/p", "--seed", "3")
    assert code == 0
    assert "4 images and base_and_adapter.png in o/p" in out
    names = {path.name for path in (workspace / "o/p").iterdir()}
    stems = ["0000_a-red-fox", "0001_an-owl"]
    assert names == {"base_and_adapter.png", *(f"{s}_{label}.png" for s in stems for label in ("base", "adapter"))}
    for stem in stems:
        base, adapter = (Image.open(workspace / "o/p" / f"{stem}_{label}.png") for label in ("base", "adapter"))
        assert base.size == adapter.size == (64, 64)
        assert base.tobytes() != adapter.tobytes()
    again = esengine("render", "a red fox", "an owl", "--run-dir", config.run_dir, "--out", "q", "--seed", "3")
    assert again[0] == 0
    assert all((workspace / "q" / name).read_bytes() == (workspace / "o/p" / name).read_bytes() for name in names)


HOSTILE = ("../../x", "/etc/passwd", "\U0001f600", "z" * 5000, "a/b\nc\\d: *?", ".", "CON", "")


def test_hostile_prompts_stay_in_the_folder(trained, tmp_path):
    config, _ = trained
    out = tmp_path / "deep" / "out"
    drawn = render(RenderConfig(prompts=HOSTILE, run_dir=config.run_dir, out=out), Progress())
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert {path.parent for path in files} == {out}
    assert drawn.images == len(files) - 1 == 2 * len(HOSTILE)
    assert drawn.sheet in files
    for path in files:
        assert path.name.isascii()
        assert len(path.name) < 64
        assert set(path.stem) <= set("abcdefghijklmnopqrstuvwxyz0123456789-_")


def test_render_takes_the_first_of_a_file(trained, tmp_path, prompt_files):
    config, _ = trained
    base = RenderConfig(run_dir=config.run_dir, prompts_file=prompt_files[0], limit=2, out=tmp_path)
    assert render(base, Progress()).images == 4
    assert (tmp_path / "0001_two-green-apples_base.png").is_file()


def test_render_halves_where_memory_runs_out(trained, tmp_path, notes, monkeypatch):
    config, _ = trained
    draw = dict(prompts=("a red fox", "an owl", "a lamp"), run_dir=config.run_dir)
    render(RenderConfig(**draw, out=tmp_path / "whole"), Progress())
    whole = SanaSprint.render_chunks

    def small_device(self, texts, rows, **keys):
        for row in rows:
            if row.count > 1:
                raise OutOfMemory("no room")
            yield from whole(self, texts, [row], **keys)

    monkeypatch.setattr(SanaSprint, "render_chunks", small_device)
    assert render(RenderConfig(**draw, out=tmp_path / "small"), notes).images == 6
    assert any("no room" in line for line in notes.said)
    drawn = {path.name: Image.open(path).tobytes() for path in (tmp_path / "whole").glob("0*_adapter.png")}
    assert len(drawn) == 3
    for name, pixels in drawn.items():
        small = np.frombuffer(Image.open(tmp_path / "small" / name).tobytes(), np.uint8).astype(int)
        assert abs(small - np.frombuffer(pixels, np.uint8)).max() <= 1


def test_a_second_call_leaves_only_its_own_images_and_no_link_is_written_through(trained, tmp_path):
    config, _ = trained
    out, victim = tmp_path / "out", tmp_path / "victim.png"
    draw = dict(run_dir=config.run_dir, out=out)
    render(RenderConfig(prompts=("a red fox", "an owl"), **draw), Progress())
    (out / "0000_mine.png").write_bytes(b"of somebody else")
    first = (out / "0001_an-owl_base.png").read_bytes()
    victim.write_bytes(b"kept")
    for name in ("0000_an-owl_base.png", "base_and_adapter.png"):
        (out / name).unlink(missing_ok=True)
        (out / name).symlink_to(victim)
    render(RenderConfig(prompts=("an owl",), **draw), Progress())
    assert victim.read_bytes() == b"kept"
    names = {"0000_an-owl_base.png", "0000_an-owl_adapter.png", "base_and_adapter.png", "0000_mine.png", "earlier"}
    assert {each.name for each in out.iterdir()} == names
    assert not any(each.is_symlink() for each in out.iterdir())
    stems = ("0000_a-red-fox", "0001_an-owl")
    assert {each.name for each in (out / "earlier").iterdir()} == {
        f"{stem}_{label}.png" for stem in stems for label in ("base", "adapter")
    }
    assert (out / "earlier" / "0001_an-owl_base.png").read_bytes() == first


@pytest.mark.parametrize("call", [evaluate, render])
def test_a_run_whose_adapter_is_gone(call, small, trained, tmp_path):
    config, _ = trained
    (tmp_path / "journal.jsonl").write_bytes((config.run_dir / "journal.jsonl").read_bytes())
    kind = EvalConfig if call is evaluate else RenderConfig
    with pytest.raises(ConfigError, match=r"pytorch_lora_weights.safetensors does not exist"):
        call(kind(run_dir=tmp_path), Progress())


@pytest.mark.parametrize("call", [evaluate, render])
def test_settings_of_the_run_are_the_defaults(call, small, tmp_path, monkeypatch):
    """Seed, image settings and repeats come from the folder."""
    image = ImageSettings(num_steps=2, height=32, width=96, chunk=2)
    config = small(tmp_path / "run", steps=1, seed=7, image=image, es=ESSettings(prompts_per_step=2, repeats=2))
    result = train(config)
    if call is evaluate:
        found = evaluate(EvalConfig(run_dir=config.run_dir), Progress()).report
        assert found.groups == result.comparison.groups
        assert (found.repeats, found.entries, found.settings["seed"]) == (2, ["base@2", "adapter@2"], 7)
        return
    render(RenderConfig(prompts=("an owl",), run_dir=config.run_dir, out=tmp_path / "o"), Progress())
    assert Image.open(tmp_path / "o" / "0000_an-owl_base.png").size == (96, 32)
