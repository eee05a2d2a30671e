"""An evaluation killed anywhere, and resumed, ends with the same bytes: 64 prompts, 3 entries, 12 chunks."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from esengine.cli.settings import EvalConfig
from esengine.models import tiny_model
from esengine.run.settings import to_dict
from esengine.sampling.settings import ImageSettings

KILLER = """
import io, os, signal
from esengine.evaluation.folder import EvaluationFolder
armed, calls = (None, 0), {}
replace, append = os.replace, EvaluationFolder._append


def arm(kind, at):
    global armed
    armed = kind, at
    calls.update(score=0, replace=0, append=0)


def reach(kind):
    calls[kind] += 1
    return armed == (kind, calls[kind] - 1)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def score(images, prompts):
    if reach("score"):
        die()
    return images.float().mean(dim=(1, 2, 3)) / 255


score.no_trial = True


def replacing(source, target):
    if reach("replace"):
        die()
    replace(source, target)


def appending(self, lines, waiting):
    if not reach("append"):
        return append(self, lines, waiting)
    whole = io.BytesIO()
    append(self, whole, waiting)
    lines.write(whole.getvalue()[: len(whole.getvalue()) * 2 // 3])
    lines.flush()
    die()


os.replace, EvaluationFolder._append = replacing, appending
"""

DRIVER = """
import json, os, sys
from pathlib import Path
import torch
import killer
from esengine.cli.settings import EvalConfig
from esengine.sampling.settings import ImageSettings
from esengine.base.settings_file import from_dict
from esengine.cli.eval import evaluate
from esengine.base.progress import Progress

torch.set_num_threads(1)


def fork(config, kind, at):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            killer.arm(kind, at)
            evaluate(config, Progress())
            os.write(write, json.dumps(killer.calls).encode())
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(4)
    os.close(write)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    calls = os.read(read, 1000)
    os.close(read)
    return [code, json.loads(calls) if calls else None]


found = {}
for case in json.loads(Path(sys.argv[1]).read_text()):
    config = from_dict(EvalConfig(image=ImageSettings()), case["config"], "case")
    found[case["name"]] = [fork(config, *kill) for kill in [*case["kills"], [None, 0]]]
Path(sys.argv[2]).write_text(json.dumps(found))
"""

# replaces: evaluation.json and curves.json, 2 to 193 images, 194 scores.jsonl, then report.json, .md, .csv, .html
KILLS = {
    "before the first score": [["score", 0]],
    "before there is a record": [["replace", 0]],
    "before the curves are kept": [["replace", 1]],
    "between images": [["replace", 3]],
    "a torn line in the first chunk": [["append", 1]],
    "a torn line in the middle, and again": [["append", 6], ["append", 3]],
    "in the second entry": [["score", 5]],
    "three times": [["replace", 40], ["score", 2], ["replace", 60]],
    "a torn line at the end": [["append", 12]],
    "before the merge": [["replace", 196]],
    "before report.json": [["replace", 197]],
    "before report.html": [["replace", 200]],
}
LEFT = {  # chunks that the last process drew
    "a torn line in the first chunk": 12,
    "a torn line in the middle, and again": 5,
    "a torn line at the end": 1,
    "before the merge": 0,
    "before report.html": 0,
}


def contents(folder: Path) -> dict[str, bytes]:
    """Everything but the locks."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".lock"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def killed(trained, tmp_path_factory):
    """Every case in one process that forks a child for each run: (root, [exit code, calls] of each child by case)."""
    root = tmp_path_factory.mktemp("killed")
    (root / "killer.py").write_text(KILLER)
    (root / "driver.py").write_text(DRIVER)
    rows = [f'a "{i}" of {i % 7} things\t{("Arts", "People", "")[i % 3]}\t{"AB"[i % 2]}' for i in range(64)]
    (root / "parti.tsv").write_text("\n".join(["Prompt\tCategory\tChallenge", *rows]))
    tiny_model()
    cases = []
    for name, kills in {"whole": [], **KILLS}.items():
        config = EvalConfig(
            model="tiny",
            benchmark="partiprompts",
            prompts=root / "parti.tsv",
            adapter=trained[0].run_dir / "adapter",
            reward="killer:score=1,jpeg_compressibility=0",
            out=root / name,
            image=ImageSettings(chunk=16, height=32, width=32),
        )
        saved = {key: value for key, value in to_dict(config).items() if key != "entries"}
        cases.append({"name": name, "kills": kills, "config": saved})
    (root / "cases.json").write_text(json.dumps(cases))
    done = subprocess.run(
        [sys.executable, "driver.py", "cases.json", "found.json"], cwd=root, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    return root, json.loads((root / "found.json").read_text()), done.stderr


@pytest.mark.parametrize("name", KILLS)
def test_killed_and_resumed_it_ends_with_the_same_bytes(killed, name):
    root, found, errors = killed
    codes = [code for code, _ in found[name]]
    assert codes == [-9] * len(KILLS[name]) + [0], errors
    if name in LEFT:
        assert found[name][-1][1]["score"] == LEFT[name]
    ours, whole = contents(root / name), contents(root / "whole")
    assert sorted(ours) == sorted(whole)
    assert [file for file in whole if ours[file] != whole[file]] == []


def test_what_an_evaluation_leaves(killed):
    root, found, _ = killed
    assert found["whole"][0][1]["score"] == 12
    files = contents(root / "whole")
    images = {name for name in files if name.startswith("images/")}
    assert files.keys() - images == {
        "curves.json", "evaluation.json", "scores.jsonl", "report.json", "report.md", "report.csv", "report.html",
    }  # fmt: skip
    lines = [json.loads(line) for line in files["scores.jsonl"].decode().splitlines()]
    entries = ["base@1", "adapter@1", "base@2"]
    assert [(x["entry"], x["index"], x["repeat"]) for x in lines] == [(e, i, 0) for e in entries for i in range(64)]
    assert {line["image"] for line in lines} == images
    for line in lines:
        with Image.open(root / "whole" / line["image"]) as image:
            pixels = np.asarray(image)
        assert pixels.shape == (32, 32, 3)
        name = f"{line['index']:05d}_{hashlib.sha256(pixels.tobytes()).hexdigest()[:8]}.png"
        assert line["image"] == f"images/{line['entry']}/{name}"
        assert line["prompt"] == f'a "{line["index"]}" of {line["index"] % 7} things'
        assert line["category"] == ("Arts", "People", None)[line["index"] % 3]
        assert list(line["scores"]) == ["killer:score", "jpeg_compressibility"]
        assert line["scores"]["killer:score"] == pytest.approx(pixels.mean() / 255, rel=1e-5)
    report = json.loads(files["report.json"])
    assert (report["benchmark"], report["prompts"], report["entries"]) == ("partiprompts", 64, entries)
    assert [(g["by"], g["name"]) for g in report["groups"]] == [
        ("overall", "all"), ("category", "Arts"), ("category", "People"), ("challenge", "A"), ("challenge", "B"),
    ]  # fmt: skip
    mean = np.mean([line["scores"]["killer:score"] for line in lines if line["entry"] == "base@2"])
    assert report["groups"][0]["rows"][2]["mean"]["killer:score"] == pytest.approx(mean, rel=1e-12)
    record = json.loads(files["evaluation.json"])
    assert record["settings"]["adapters"].keys() == {"adapter@1"}
    assert record["settings"]["versions"]["torch"] == torch.__version__
    assert report["settings"] == record["settings"]
