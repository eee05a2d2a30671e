"""An evaluation's folder: what is damaged is told of or drawn again, what differs is refused, and shards meet."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from esengine.base.errors import ConfigError, RunError
from esengine.base.progress import Progress
from esengine.cli.eval import evaluate
from esengine.cli.settings import EvalConfig
from esengine.evaluation.draw import EVAL_STEP
from esengine.evaluation.folder import EvaluationFolder
from esengine.models import SanaSprint, tiny_model
from esengine.sampling.settings import ImageSettings


class Notes(Progress):
    def __init__(self):
        self.lines = []

    def note(self, text):
        self.lines.append(text)


def contents(folder: Path) -> dict[str, bytes]:
    """Everything but the locks."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".lock"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def adapter(trained):
    config, _ = trained
    return config.run_dir / "adapter"


@pytest.fixture(scope="module")
def small_evaluation(cache, adapter, tmp_path_factory):
    """Six prompts, two entries, chunks of two: its configuration and its folder. Nobody writes into it."""
    root = tmp_path_factory.mktemp("small")
    (root / "six.txt").write_text("".join(f"thing number {i}\n" for i in range(6)))
    config = EvalConfig(
        model="tiny",
        adapter=adapter,
        prompts=root / "six.txt",
        reward="jpeg_compressibility",
        repeats=1,
        out=root / "out",
        image=ImageSettings(chunk=2),
    )
    evaluate(config, Progress())
    return config


@pytest.fixture
def copy(small_evaluation, tmp_path):
    """A copy that a test may spoil."""
    shutil.copytree(small_evaluation.out, tmp_path / "out")
    return replace(small_evaluation, out=tmp_path / "out")


def images_of(folder: Path, entry: str) -> list[Path]:
    return sorted((folder / "images" / entry).iterdir())


def spoil_missing(folder):
    images_of(folder, "base@1")[3].unlink()
    return "00003", "the image is gone"


def spoil_folder(folder):
    shutil.rmtree(folder / "images" / "adapter@1")
    return "adapter@1", "the image is gone"


def spoil_pixel(folder):
    path = images_of(folder, "adapter@1")[5]
    pixels = np.asarray(Image.open(path)).copy()
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(path)
    return path.name, "not those of its name"


def spoil_grey(folder):
    path = images_of(folder, "base@1")[0]
    Image.open(path).convert("L").save(path)
    return path.name, "not those of its name"


def spoil_torn(folder):
    path = images_of(folder, "base@1")[1]
    path.write_bytes(path.read_bytes()[:200])
    return path.name, "cannot be read"


def spoil_empty(folder):
    images_of(folder, "base@1")[1].write_bytes(b"")
    return "00001", "cannot be read"


def spoil_line(folder):
    lines = (folder / "scores.jsonl").read_bytes().split(b"\n")
    lines[4] = b"{nonsense"
    (folder / "scores.jsonl").write_bytes(b"\n".join(lines))
    return "scores.jsonl", "line 5 is damaged"


def spoil_digit(folder):
    data = (folder / "scores.jsonl").read_bytes()
    at = data.index(b"compressibility") + len(b'compressibility": -')
    (folder / "scores.jsonl").write_bytes(data[:at] + (b"9" if data[at : at + 1] != b"9" else b"8") + data[at + 1 :])
    return "scores.jsonl", "line 1 is damaged"


def spoil_binary(folder):
    (folder / "scores.jsonl").write_bytes(b"\xff\x00\n[]\n1\nnull\n{}\n" + b"[" * 100_000)
    return "scores.jsonl", "damaged, 6 in all"


def spoil_scores(folder):
    (folder / "scores.jsonl").unlink()
    return "", "12 of 12 images to draw"


def spoil_reports(folder):
    for path in folder.glob("report.*"):
        path.unlink()
    return "", "0 of 12 images to draw"


SPOILS = [value for name, value in globals().items() if name.startswith("spoil_")]


@pytest.mark.parametrize("spoil", SPOILS, ids=lambda spoil: spoil.__name__)
def test_what_is_gone_or_damaged_is_named_and_drawn_again(copy, small_evaluation, spoil):
    words = spoil(copy.out)
    notes = Notes()
    evaluate(copy, notes)
    assert any(all(word in line for word in words) for line in notes.lines), notes.lines
    assert contents(copy.out) == contents(small_evaluation.out)


def test_any_damaged_byte_of_an_image_is_seen(small_evaluation, tmp_path):
    """Every 97th byte of a file, flipped: no crash, and no pixel that is taken for another."""
    folder = EvaluationFolder(tmp_path, (0, 1))
    path = images_of(small_evaluation.out, "base@1")[0]
    whole = np.asarray(Image.open(path))
    data = path.read_bytes()
    for at in range(0, len(data), 97):
        (tmp_path / path.name).write_bytes(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :])
        if folder._problem({"image": path.name}) is None:
            assert (np.asarray(Image.open(tmp_path / path.name)) == whole).all()


def test_a_finished_evaluation_is_read_and_not_drawn(copy, small_evaluation, monkeypatch):
    monkeypatch.setattr(SanaSprint, "render", lambda *_, **__: pytest.fail("it drew"))
    found = evaluate(copy, Progress())
    assert found.report.to_json() == (small_evaluation.out / "report.json").read_text()
    assert contents(copy.out) == contents(small_evaluation.out)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 5}, ["settings.seed: 0 -> 5"]),
        ({"repeats": 2}, ["settings.repeats: 1 -> 2"]),
        ({"limit": 5}, ["prompts: 6 -> 5", "prompts_sha256"]),
        ({"image": ImageSettings(chunk=3)}, ["settings.chunk: 2 -> 3"]),
        ({"image": ImageSettings(chunk=2, guidance_scale=3.0)}, ["settings.guidance_scale: 4.5 -> 3.0"]),
        ({"dtype": "bfloat16"}, ["settings.dtype: float32 -> bfloat16"]),
        ({"entries": ("base@1", "base@2")}, ["entries"]),
        ({"reward": "jpeg_incompressibility"}, ["scores"]),
    ],
)
def test_other_settings_are_refused_with_what_differs(copy, changes, words):
    before = contents(copy.out)
    with pytest.raises(RunError) as caught:
        evaluate(replace(copy, **changes), Progress())
    assert all(word in str(caught.value) for word in [*words, "choose another --out"]), str(caught.value)
    assert contents(copy.out) == before


def test_other_weights_are_refused(copy, small, tmp_path):
    from esengine.run.train import train

    train(small(tmp_path / "other", steps=1))
    with pytest.raises(RunError, match=r"settings\.adapters\.adapter@1: sha256:.* -> sha256:"):
        evaluate(replace(copy, adapter=tmp_path / "other" / "adapter"), Progress())


def test_a_chunk_that_was_chosen_stays(copy, monkeypatch):
    monkeypatch.setattr("esengine.cli.eval.pick_chunk", lambda image, model: 99)
    before = contents(copy.out)
    evaluate(replace(copy, image=ImageSettings()), Progress())
    assert contents(copy.out) == before


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"settings": 3}', b"\xff", b"[" * 100_000])
def test_a_damaged_record_is_a_clear_line(copy, content):
    (copy.out / "evaluation.json").write_bytes(content)
    with pytest.raises(RunError, match=r"evaluation\.json is damaged") as caught:
        evaluate(replace(copy, image=ImageSettings()), Progress())
    assert str(copy.out) in str(caught.value)


def test_a_folder_of_something_else_is_left_alone(small_evaluation, tmp_path):
    (tmp_path / "diary.txt").write_text("dear diary")
    with pytest.raises(RunError, match=r"it holds diary\.txt"):
        evaluate(replace(small_evaluation, out=tmp_path), Progress())
    assert [path.name for path in tmp_path.iterdir()] == ["diary.txt"]
    with pytest.raises(RunError, match="there is a file"):
        evaluate(replace(small_evaluation, out=tmp_path / "diary.txt"), Progress())


@pytest.mark.parametrize("name", [".lock", "scores.jsonl", "report.html", "images", "images/base@1"])
def test_a_link_out_of_the_folder_is_refused_and_what_it_leads_to_is_untouched(copy, tmp_path, name):
    away, link = tmp_path / "away", copy.out / name
    if link.exists():
        link.rename(away)
    link.symlink_to(away)
    before = contents(tmp_path)
    with pytest.raises(RunError, match=rf"{name} is a symbolic link"):
        evaluate(copy, Progress())
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["evaluations", "evaluations/prompts"])
def test_a_link_in_a_run_is_not_evaluated_into(trained, tmp_path, name):
    run, away = tmp_path / "run", tmp_path / "away"
    shutil.copytree(trained[0].run_dir, run)
    (tmp_path / "prompts.txt").write_text("a fox\n")
    away.mkdir()
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).symlink_to(away)
    with pytest.raises(RunError, match=rf"run folder .*{name} is a symbolic link"):
        evaluate(EvalConfig(run_dir=run, benchmark=str(tmp_path / "prompts.txt")), Progress())
    assert list(away.iterdir()) == []


def test_a_folder_in_use_is_left_alone(copy):
    before = contents(copy.out)
    with open(copy.out / ".lock.0-of-1", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="another process draws it"):
            evaluate(copy, Progress())
    assert contents(copy.out) == before


def test_a_corrupt_text_cache_is_a_clear_line(copy, tmp_path, monkeypatch):
    monkeypatch.setenv("ESENGINE_CACHE", str(tmp_path / "cache"))
    fresh = replace(copy, out=tmp_path / "fresh")
    evaluate(fresh, Progress())
    before = contents(fresh.out)
    (shard,) = (tmp_path / "cache" / "text").glob("*.safetensors")
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ConfigError, match=f"{shard.name}: the checksum of an embedding does not match; deleting it"):
        evaluate(fresh, Progress())
    shard.unlink()
    evaluate(fresh, Progress())
    assert contents(fresh.out) == before == contents(copy.out)


def test_a_run_whose_curves_are_damaged_is_evaluated_without(trained, small_evaluation, tmp_path):
    run = shutil.copytree(trained[0].run_dir, tmp_path / "run")
    (run / "journal.jsonl").write_text("{}\n")
    notes = Notes()
    evaluate(replace(small_evaluation, adapter=run / "adapter", out=tmp_path / "out"), notes)
    assert any("no curves of training" in line and "journal.jsonl, line 1" in line for line in notes.lines)
    found = contents(tmp_path / "out")
    assert "curves.json" not in found
    assert found["scores.jsonl"] == contents(small_evaluation.out)["scores.jsonl"]


@pytest.mark.parametrize("chunk", ["0", "-1", "true", '"2"', "null", "[2]", "2.0"])
def test_a_chunk_that_is_none(copy, chunk):
    file = copy.out / "evaluation.json"
    file.write_text(file.read_text().replace('"chunk": 2', f'"chunk": {chunk}'))
    with pytest.raises(RunError, match=r"evaluation\.json is damaged"):
        evaluate(replace(copy, image=ImageSettings()), Progress())


# ---- several processes


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_shards_make_what_one_process_makes(small_evaluation, tmp_path, order):
    config = replace(small_evaluation, out=tmp_path / "out")
    calls = []
    for k in order:
        found = evaluate(replace(config, shard=f"{k}/3"), Progress())
        calls.append(found.report is not None)
        assert len(list(config.out.glob("scores.*-of-3.jsonl"))) == (0 if calls[-1] else len(calls))
    assert calls == [False, False, True]
    assert contents(config.out) == contents(small_evaluation.out)


def test_shards_may_be_taken_up_by_another_number(small_evaluation, tmp_path):
    config = replace(small_evaluation, out=tmp_path / "out")
    evaluate(replace(config, shard="1/3"), Progress())
    notes = Notes()
    evaluate(config, notes)
    assert any("8 of 12 images to draw" in line for line in notes.lines)
    assert contents(config.out) == contents(small_evaluation.out)
    evaluate(replace(config, shard="0/2"), Progress())
    assert contents(config.out) == contents(small_evaluation.out)


def test_a_shard_draws_its_own_damaged_image_again(copy, small_evaluation):
    spoil_pixel(copy.out)  # prompt 5 is in chunk 2
    evaluate(replace(copy, shard="1/3"), Progress())
    assert contents(copy.out) != contents(small_evaluation.out)
    evaluate(replace(copy, shard="2/3"), Progress())
    assert contents(copy.out) == contents(small_evaluation.out)


def test_processes_under_torchrun_share_the_work(small_evaluation, tmp_path):
    config = small_evaluation
    command = [
        sys.executable, "-m", "esengine", "eval", "--adapter", config.adapter, "--prompts", config.prompts,
        "--model", "tiny", "--repeats", "1", "--reward", "jpeg_compressibility", "--image.chunk", "2",
        "--out", tmp_path / "out",
    ]  # fmt: skip
    ranks = [os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"} for rank in range(2)]
    pipes = dict(cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    both = [subprocess.Popen(command, env=env, **pipes) for env in ranks]
    out = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], out
    assert sum("score" in text and "std. error" in text for text, _ in out) >= 1
    assert contents(tmp_path / "out") == contents(config.out)


# ---- who draws what


def pixels_of(folder: Path, entry: str) -> list[str]:
    return [path.name for path in images_of(folder, entry)]


def test_the_base_carries_no_adapter_and_the_order_changes_nothing(small_evaluation, tmp_path):
    model = SanaSprint.from_pretrained(tiny_model())
    texts = model.encode([f"thing number {i}" for i in range(6)])
    plain = model.render(
        texts,
        seed=0,
        step=EVAL_STEP,
        prompts=torch.tensor([2, 3]),
        repeats=torch.tensor([0, 0]),
        text_length=texts.trimmed_length(torch.arange(6)),
    )
    hashes = [hashlib.sha256(image.permute(1, 2, 0).numpy().tobytes()).hexdigest()[:8] for image in plain]
    assert pixels_of(small_evaluation.out, "base@1")[2:4] == [f"0000{2 + i}_{h}.png" for i, h in enumerate(hashes)]
    mine = f"mine={small_evaluation.adapter}@1"
    other = replace(small_evaluation, out=tmp_path / "out", entries=(mine, "base@2", "base@1"))
    evaluate(other, Progress())
    assert pixels_of(other.out, "mine@1") == pixels_of(small_evaluation.out, "adapter@1")
    assert pixels_of(other.out, "base@1") == pixels_of(small_evaluation.out, "base@1")
    assert not set(pixels_of(other.out, "base@2")) & set(pixels_of(other.out, "base@1"))
    assert not set(pixels_of(other.out, "mine@1")) & set(pixels_of(other.out, "base@1"))


def test_the_angle_counts_for_one_step_only(small_evaluation, tmp_path):
    entries = ("base@1", "base@2")
    for name, angle in (("plain", None), ("angle", 1.3)):
        image = ImageSettings(chunk=2, x0_angle=angle)
        evaluate(replace(small_evaluation, out=tmp_path / name, entries=entries, image=image), Progress())
    assert pixels_of(tmp_path / "plain", "base@2") == pixels_of(tmp_path / "angle", "base@2")
    assert not set(pixels_of(tmp_path / "plain", "base@1")) & set(pixels_of(tmp_path / "angle", "base@1"))


def test_repeats_are_other_images_of_the_same_prompt(small_evaluation, tmp_path):
    found = evaluate(replace(small_evaluation, out=tmp_path / "out", repeats=3, limit=2), Progress())
    assert (found.report.prompts, found.report.repeats) == (2, 3)
    names = pixels_of(tmp_path / "out", "base@1")
    assert len(names) == 6
    assert set(pixels_of(small_evaluation.out, "base@1")[:2]) <= set(names)


def test_a_reward_that_fails_keeps_what_was_done(small_evaluation, tmp_path, monkeypatch):
    calls = 0

    def score(images, prompts):
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return images.float().mean((1, 2, 3))

    score.no_trial = True
    module = types.ModuleType("own")
    module.score = score
    monkeypatch.setitem(sys.modules, "own", module)
    config = replace(small_evaluation, out=tmp_path / "out", reward="own:score")
    with pytest.raises(KeyboardInterrupt):
        evaluate(config, Progress())
    evaluate(config, Progress())
    assert calls <= 5 + 3
    assert len((tmp_path / "out" / "scores.jsonl").read_text().splitlines()) == 12


def test_what_is_written_follows_a_folder_that_is_renamed(copy, small_evaluation, tmp_path):
    """It is renamed while an image is written, and another evaluation begins under its name."""
    for image in images_of(copy.out, "adapter@1"):
        image.unlink()
    save, others = EvaluationFolder._save, []

    def renamed_first(self, record, pixels):
        if not others and self.path == copy.out:
            others.append(1)
            copy.out.rename(tmp_path / "moved")
            shutil.copytree(small_evaluation.out, copy.out)
        save(self, record, pixels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EvaluationFolder, "_save", renamed_first)
        evaluate(copy, Notes())
    other = {file: (copy.out / file).stat().st_ino for file in contents(copy.out)}
    assert contents(copy.out) == contents(small_evaluation.out) == contents(tmp_path / "moved")
    assert not set(other.values()) & {(tmp_path / "moved" / file).stat().st_ino for file in other}
    untouched = {file: (small_evaluation.out / file).stat().st_mtime_ns for file in other}
    assert {file: (copy.out / file).stat().st_mtime_ns for file in other} == untouched
