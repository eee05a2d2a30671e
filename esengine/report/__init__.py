"""HTML reports. Each is one file that opens from disk without a network, on a desktop or a phone."""

from pathlib import Path

from esengine.base.errors import RunError
from esengine.report.evaluation import write_evaluation_page
from esengine.report.gallery import write_gallery
from esengine.report.training import write_training_page
from esengine.run.journal import NAME

__all__ = ["write_evaluation_page", "write_gallery", "write_page", "write_training_page"]


def write_page(folder: Path) -> Path:
    """Write report.html into the folder of an evaluation or a run, and return its path.

    Raises:
        RunError: the folder is neither of the two, or a file in it is damaged. The message names the file and, for
            a file of lines, the line.
    """
    if (folder / "evaluation.json").is_file():
        return write_evaluation_page(folder)
    if (folder / NAME).is_file():
        return write_training_page(folder)
    what = "there is neither" if folder.is_dir() else "there is no such folder"
    raise RunError(f"{folder}: expected a run's {NAME} or an evaluation's evaluation.json in it, {what}")
