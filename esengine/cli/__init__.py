"""The command line. Errors a user can act on are one line; ESENGINE_DEBUG=1 shows their traceback."""

import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from esengine.base import files
from esengine.base.errors import EsengineError, Stopped
from esengine.base.printable import shown
from esengine.cli.output import lasting_output


def main(args: list[str] | None = None) -> int:
    """The console script. Returns the exit code: 0, 1 for a failed run, 2 for wrong usage, 130 for Ctrl-C."""
    args = sys.argv[1:] if args is None else args
    files.warned.clear()
    with lasting_output() as output:
        try:
            code = _main(args)
        except SystemExit as leave:  # of the flag parser: after help, or for a flag that it does not know
            code = leave.code
    if output is not None and output.error is not None:
        return _fail(f"stdout: {output.error.strerror or output.error}", 1)
    return code


def _main(args: list[str]) -> int:
    # libgomp's threads spin long at every barrier, which starves them all when other programs want the same cores
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    commands: dict[str, Callable[[Any], int]] = {
        "train": _train,
        "eval": _eval,
        "render": _render,
        "judge": _judge,
        "report": _report,
        "replay": _replay,
        "env": _env,
    }
    if not args or args[0] in ("-h", "--help", "--help-all"):
        from esengine.cli.help_pages import USAGE

        print(USAGE, end="")
        return 0 if args else 2
    if args[0] == "--version":
        import esengine

        print(f"esengine {esengine.__version__}")
        return 0
    if args[0] not in commands:
        return _fail(f"unknown command '{args[0]}': expected one of {', '.join(commands)}", 2)
    try:
        "".join(args).encode()
    except UnicodeEncodeError:
        return _fail("expected arguments in UTF-8, got bytes that are not", 2)
    from esengine.cli.flags import settings_of, shown
    from esengine.cli.help import asked, help_text

    if level := asked(args[1:]):
        print(help_text(args[0], level, shown(args[0], args[1:])), end="")
        return 0
    try:
        with settings_of(args[0], args[1:]) as config:
            return commands[args[0]](config)
    except Stopped as stopped:
        print(f"esengine: {stopped}", file=sys.stderr)
        return 0
    except EsengineError as error:
        if os.environ.get("ESENGINE_DEBUG"):
            raise
        return _fail(str(error), 1)
    except OSError as error:
        if os.environ.get("ESENGINE_DEBUG"):
            raise
        return _fail(f"{error.filename or 'system'}: {error.strerror or error}", 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except Exception as error:
        from esengine.base.memory import out_of_memory

        if os.environ.get("ESENGINE_DEBUG") or not out_of_memory(error):
            raise
        what = " ".join(str(error).split())[:200] or type(error).__name__
        return _fail(f"memory ran out ({what}): take a smaller model or a smaller --image.chunk", 1)


def _fail(message: str, code: int) -> int:
    print(f"esengine: error: {shown(message)}", file=sys.stderr)
    return code


def _quiet() -> None:
    """Loaders below us talk; what matters of it is in our own lines."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")


def _train(config: Any) -> int:
    from esengine.run.folder import KEPT, RunFolder

    if config.run_dir is not None and os.environ.get("RANK", "0") == "0":  # of several processes, the first holds it
        RunFolder.require_free(config.run_dir)  # before the seconds that the imports below take
    _quiet()
    from esengine.base.progress import Bar
    from esengine.run.stop import Stop
    from esengine.run.train import train

    if config.dry_run:
        return _dry_run(config)
    pages = []
    result = train(config, Bar(), Stop(), _LivePage(), lambda folder: pages.append(_page(folder)))
    if result is None:  # of several processes one reports
        return 0
    comparison = result.comparison
    each = "1 image" if comparison.repeats == 1 else f"{comparison.repeats} images"
    print(f"\nbase against adapter on {comparison.prompts} held-out prompts, {each} each:")
    print(comparison.table())
    print(f"\nrun folder  {result.folder}")
    print(f"adapter     {result.folder / 'adapter'}  (PEFT; the pipeline's load_lora_weights reads it too)")
    for kind, step in result.kept.items():
        print(f"{kind.ljust(10)}  {result.folder / KEPT[kind]}  (of step {step})")
    if page := pages[0]:
        print(f"page        {page}")
    print(f"curves      tensorboard --logdir {result.folder / 'tensorboard'}")
    return 0


def _dry_run(config: Any) -> int:
    from esengine.base.progress import Bar
    from esengine.report.words import duration, size
    from esengine.run.dry_run import dry_run

    found = dry_run(config, Bar())
    if os.environ.get("RANK", "0") != "0":  # of several processes one reports
        return 0
    worst = max(found.layers, key=found.layers.get, default=None)
    print(f"images   {found.images_per_step} a step, {found.images} in all with held-out prompts and the comparison")
    print(
        f"time     about {duration(found.seconds)}, by what one chunk took here: "
        f"{found.seconds_render:.3g} s to render one and {found.seconds_score:.2g} s to score it"
    )
    print(
        f"memory   {size(found.weight_bytes)} of weights in the denoiser, about {size(found.chunk_bytes)} for "
        f"{found.chunk} images in one forward"
    )
    if worst is not None:
        print(
            f"members  each row of a batch is its own member's: largest difference {found.layers[worst]:.1g} of that "
            f"between two members, in {worst}"
        )
    print(f"folder   {found.run_dir} would have")
    for each in found.files:
        print(f"         {each}")
    print(f"         a checkpoint takes {size(found.checkpoint_bytes)}")
    print("nothing was written")
    return 0


class _LivePage:
    """Draws the page of a run that goes on. It takes at most a twentieth of the run's time."""

    def __init__(self):
        self.due = 0.0

    def __call__(self, folder: Path) -> None:
        start = time.monotonic()
        if start < self.due:
            return
        self.due = start + 10.0
        from esengine.report import write_training_page

        write_training_page(folder, going=True)
        end = time.monotonic()
        self.due = end + max(10.0, 20 * (end - start))


def _page(folder: Path) -> Path | None:
    """The run as one HTML page; a finished run does not fail because of it."""
    from esengine.rewards.base import reason

    try:
        from esengine.report import write_training_page

        return write_training_page(folder)
    except (Exception, KeyboardInterrupt) as error:
        print(f"warning: no page of the run could be drawn: {reason(error)}", file=sys.stderr)
        return None


def _eval(config: Any) -> int:
    _quiet()
    from esengine.base.progress import Bar
    from esengine.cli.eval import evaluate

    found = evaluate(config, Bar())
    report = found.report
    if report is None:
        print(f"this shard's images are in {found.folder}; the report is made by the process that finishes last")
        return 0
    each = "1 image" if report.repeats == 1 else f"{report.repeats} images"
    print(f"{', '.join(report.entries)} on {report.prompts} prompts of {report.benchmark}, {each} each:")
    print(report.table())
    if config.json is not None:
        config.json.parent.mkdir(parents=True, exist_ok=True)
        config.json.write_text(report.to_json(), encoding="utf-8")
        print(f"written to {config.json}")
    if found.folder is not None:
        print(f"\nreport  {found.folder / 'report.html'}  (also .md, .csv, .json)")
        print(f"images  {found.folder / 'images'}")
    return 0


def _render(config: Any) -> int:
    _quiet()
    from esengine.base.progress import Bar
    from esengine.cli.render import render

    written = render(config, Bar())
    if written.page is not None:
        print(f"{written.sheet}\n{written.page}")
    else:
        print(f"{written.images} images and {written.sheet.name} in {written.folder}")
    return 0


def _judge(config: Any) -> int:
    _quiet()
    from esengine.base.progress import Bar
    from esengine.cli.judge import judge_images
    from esengine.run.stop import Stop

    with Stop() as stop, stop.gently(quiet=True):
        print(judge_images(config, Bar(), lambda: stop.requested))
    return 0


def _report(config: Any) -> int:
    from esengine.report import write_page

    print(write_page(config.folder))
    return 0


def _replay(config: Any) -> int:
    _quiet()
    from esengine.base.progress import Bar
    from esengine.run.replay import replay

    found = replay(config, Bar())
    for name, step in found.kept.items():
        if step is None:
            return _fail(f"{config.run_dir / name} is not the adapter of any step, or not the average of them", 1)
        print(f"{config.run_dir / name} equals the result of {step} steps bit for bit")
    print(f"{found.steps} steps made again, adapter sha256 {found.sha256}")
    if config.out is not None:
        print(f"written to {config.out}")
    adapter = config.run_dir / "adapter"
    if found.agreed is not None:
        beyond = found.steps - found.agreed
        if beyond:
            print(f"{adapter} equals the result of the first {found.agreed} steps bit for bit")
            print(f"the log has {beyond} more, because the run is still active or was killed after its last checkpoint")
        else:
            print(f"it equals {adapter} bit for bit")
    elif found.parted is None:
        print(f"{config.run_dir} has no adapter to compare with")
    else:
        return _fail(f"it differs from {adapter}, first in {found.parted[0]}", 1)
    return 0


def _cache(folder: Path) -> str:
    """The cache's folder, and whether it can be written."""
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return str(folder)
    return f"none: {folder} cannot be written; ESENGINE_CACHE sets another"


def _env(config: Any) -> int:
    from esengine.sampling.environment import describe, to_json

    cache = files.cache_root()
    facts = describe() | {"cache": "none: no home folder; ESENGINE_CACHE sets one" if cache is None else _cache(cache)}
    if config.json:
        print(to_json(facts))
        return 0
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name.ljust(width)}  {value}")
    return 0
