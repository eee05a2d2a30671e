import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ENTRIES = ("base@1", "adapter@1", "base@2")
SCORES = ("pickscore", "clip_text")


@pytest.fixture(scope="session")
def hostile_prompts():
    """What a benchmark's file may hold."""
    return [
        "<script>window.injected = true</script>",
        "</title><img src=x onerror='window.injected = true'>\"quoted\" & 'apostrophes'",
        "\U0001f98a a fox \U0001f308 \U0001f469\u200d\U0001f680",
        "x" * 10_000,
        "قطة تشرب القهوة في الصباح \u202e reversed",
        "half a pair \ud800",
        "{{ 7 * 7 }} {% raw %}",
        "two\nlines",
    ]


def noise(seed: int, size: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


@pytest.fixture(scope="session")
def evaluation_folder(hostile_prompts):
    """Makes what `esengine eval` leaves, with random scores and images, before its page is drawn."""

    def make(folder: Path, prompts: int = 12, *, entries=ENTRIES, size: int = 48, one_image: bool = False) -> Path:
        folder.mkdir(parents=True)
        rng = np.random.default_rng(0)
        first = rng.normal(22, 1, (len(SCORES), prompts))
        values = {entry: first + at * rng.normal(0.2, 0.3, first.shape) for at, entry in enumerate(entries)}
        texts = [hostile_prompts[i] if i < len(hostile_prompts) else f"prompt {i}" for i in range(prompts)]
        lines = []
        for at, entry in enumerate(entries):
            (folder / "images" / entry).mkdir(parents=True)
            for i in range(prompts):
                name = f"images/{entry}/{0 if one_image else i:05d}_0123abcd.png"
                if not (folder / name).exists():
                    noise(at * prompts + i, size).save(folder / name, compress_level=1)
                labels = {"category": ("Animals", "Arts")[i % 2], "challenge": "Quantity" if i % 3 else None}
                scores = {score: values[entry][j][i] for j, score in enumerate(SCORES)}
                record = {"entry": entry, "index": i, "repeat": 0, "prompt": texts[i], **labels, "image": name}
                lines.append(json.dumps({**record, "scores": scores, "crc32": "0"}))
        (folder / "scores.jsonl").write_text("\n".join(lines) + "\n")

        def group(by: str, name: str, members: list[int]) -> dict:
            rows = []
            for entry in entries:
                row = {"entry": entry, "count": len(members), "mean": {}, "against_first": None}
                for j, score in enumerate(SCORES):
                    d = (values[entry] - first)[j, members]
                    row["mean"][score] = values[entry][j, members].mean()
                    if entry != entries[0]:
                        error = d.std(ddof=1) / math.sqrt(len(d)) if len(d) > 1 else None
                        paired = {"difference": d.mean(), "standard_error": error, "win_rate": (d > 0).mean()}
                        row["against_first"] = {**(row["against_first"] or {}), score: paired}
                rows.append(row)
            return {"by": by, "name": name, "rows": rows}

        shared = {"benchmark": "partiprompts", "entries": list(entries), "scores": list(SCORES)}
        shared["settings"] = {"seed": 3, "dtype": "float32", "versions": {"torch": "2.13.0"}}
        groups = [group("overall", "all", list(range(prompts)))]
        names = ("Animals", "Arts")[:prompts]
        groups += [group("category", name, list(range(at, prompts, 2))) for at, name in enumerate(names)]
        closed = {"pickscore": {"from": "base@1", "to": "base@2", "gap": 0.4, "share": {"adapter@1": 0.37}}}
        closed["clip_text"] = {"from": "base@1", "to": "base@2", "gap": -0.1, "share": {"adapter@1": None}}
        report = {**shared, "prompts": prompts, "repeats": 1, "groups": groups}
        report["gap_closed"] = closed if len(entries) == 3 else {}
        (folder / "evaluation.json").write_text(json.dumps({**shared, "prompts_sha256": "ab" * 32}))
        (folder / "report.json").write_text(json.dumps(report, default=float))
        return folder

    return make


@pytest.fixture(scope="session")
def run_folder():
    """Makes what `esengine train` leaves: `finished` or still going on after `logged` steps."""

    def make(folder: Path, logged: int = 12, *, finished: bool = True) -> Path:
        folder.mkdir(parents=True)
        settings = {"steps": logged if finished else 40, "population": 8, "model": "tiny", "reward": "pickscore"}
        settings |= {"seed": 7, "es": {"prompts_per_step": 2, "repeats": 3, "sigma": 0.01}}
        settings |= {"setting_of_another_version": True}
        identity = {"prompts_sha256": "ab", "model": "tiny", "rewards": {}, "contract": 1, "environment": {}}
        lines = [{"kind": "start", "step": 0, "settings": settings, "identity": identity}]

        def held_out(step):
            if step % 4:
                return
            scores = {
                "pickscore": {"mean": 20 + step / 10, "change": step / 10, "standard_error": 0.02 if step else None},
                "clip_text": {"mean": 0.5, "change": -step / 100, "standard_error": 0.01 if step else None},
            }
            parted = ["clip_text"] if step >= 8 else []
            record = {"kind": "held_out", "step": step, "scores": scores, "optimised": "pickscore", "parted": parted}
            lines.append(record | ({} if step else {"of": {"prompts": ["a"], "rewards": {}}}))

        for step in range(logged):
            reward = 20 + math.sqrt(step)
            spread = {"reward": reward, "reward_best": reward + 1, "reward_worst": reward - 1, "reward_std": 0.5}
            spread |= {"reward/pickscore": reward, "reward/clip_text": 0.5 + step / 100}
            norms = {"gradient_norm": 70.0, "step_norm": 0.7 if step else None, "adapter_norm": 5 + step / 10}
            clocks = {"images_per_second": 200.0 + step, "seconds": 0.6, "seconds_render": 0.5, "seconds_score": 0.1}
            metrics = {**spread, **norms, **clocks, "own_figure": step**2}
            held_out(step)
            lines.append({"kind": "step", "step": step, "fitness": [0.5, -0.5] * 4, "metrics": metrics})
        held_out(logged)
        (folder / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        for part, count in (("strips", 6), ("heldout", 3)):
            (folder / part).mkdir()
            for at in range(count):
                noise(at, 96).save(folder / part / f"step_{at * 4:08d}.png")
        if finished:
            paired = {"difference": 0.5, "standard_error": 0.1, "win_rate": 0.75, "more": 1}
            base = {"entry": "base@1", "count": 4, "mean": {"pickscore": 20.5}, "against_first": None}
            adapter = {"entry": "adapter@1", "count": 4, "mean": {"pickscore": 21.0}}
            adapter["against_first"] = {"pickscore": paired}
            record = {
                "benchmark": "prompts", "prompts": 4, "repeats": 2, "entries": ["base@1", "adapter@1"],
                "scores": ["pickscore"], "settings": {"seed": 7, "versions": {"torch": "2.13.0"}}, "more": [],
                "groups": [{"by": "overall", "name": "all", "rows": [base, adapter]}], "gap_closed": {},
            }  # fmt: skip
            (folder / "eval.json").write_text(json.dumps(record))
            noise(9, 96).save(folder / "comparison.png")
        return folder

    return make


@pytest.fixture(scope="session")
def gallery_folder(tmp_path_factory):
    """A gallery of the eight prompts in random images."""
    from esengine.base.prompt_files import read_prompts
    from esengine.cli.render import GALLERY
    from esengine.report import write_gallery

    folder = tmp_path_factory.mktemp("gallery")
    generator = torch.Generator().manual_seed(0)
    rows = {label: torch.randint(0, 256, (8, 3, 64, 64), generator=generator).byte() for label in ("base", "adapter")}
    write_gallery(folder, read_prompts(GALLERY), rows, {"seed": 0, "versions": {"torch": "2.13.0"}})
    return folder
