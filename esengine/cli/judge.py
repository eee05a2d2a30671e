"""`esengine judge`: a person compares images blindly on a local page."""

from collections.abc import Callable
from pathlib import Path

from esengine.base.errors import ConfigError
from esengine.base.progress import Progress
from esengine.cli.eval import evaluate
from esengine.cli.settings import EvalConfig, JudgeConfig
from esengine.evaluation.blind import Verdict, judge, pairs_of
from esengine.judging import Asker
from esengine.report import write_evaluation_page
from esengine.run import journal

HELD_OUT = "held-out"


def judge_images(config: JudgeConfig, progress: Progress, stopped: Callable[[], bool]) -> Verdict:
    """Ask about the images of an evaluation. For a run's folder, its held-out prompts are drawn first if need be.

    Raises:
        ConfigError: the folder is neither a run's nor an evaluation's, or has no such entries.
        RunError: a file of the folder is damaged.
    """
    folder = _evaluation(config.folder, progress)
    entries, pairs = pairs_of(folder, config.entries)
    with Asker(config.host, config.port) as asker:
        count = min(len(pairs), config.limit or len(pairs))
        progress.note(f"{count} pairs of images from {entries[0]} and {entries[1]}, at {asker.url}")
        found = judge(folder, asker, config.entries, limit=config.limit, stopped=stopped)
    if (folder / "report.json").is_file():
        write_evaluation_page(folder)
    return found


def _evaluation(folder: Path, progress: Progress) -> Path:
    if not (folder / journal.NAME).is_file():
        return folder
    found = sorted(path.parent for path in folder.glob("evaluations/*/evaluation.json"))
    if len(found) > 1:
        names = ", ".join(str(path) for path in found)
        raise ConfigError(f"folder {folder}: expected a run with one evaluation; name one of {names}")
    if found:
        return found[0]
    out = folder / "evaluations" / HELD_OUT
    evaluate(EvalConfig(run_dir=folder, out=out), progress)
    return out
