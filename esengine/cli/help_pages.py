"""What help says of each command: which flags first, examples, where settings come from, and titles for the rest.

A new command needs a page here. A new setting needs none: --help-all takes it from its class.
"""

from dataclasses import dataclass, field

USAGE = """usage: esengine COMMAND [flags]

Post-train a frozen text-to-image model from black-box rewards.

start here:
  esengine train         the demo: minutes on a laptop, and nothing to download
  esengine train --help  one screen: the flags for your own model, and examples
  esengine env           which device and which kernels will be used, and why

commands:
  train    run or resume a training run
  eval     compare base and adapters on prompts or a benchmark; write a report
  render   draw prompts with the base model and the adapter, side by side
  judge    compare two models blindly, with your own eyes, on a local page
  report   write the page of a run or of an evaluation: one HTML file
  replay   make a run's adapter again from its journal, and compare every bit
  env      show versions, devices, and which kernels are in use and why

`esengine COMMAND --help-all` explains every flag of a command.
"""

_SOURCES = "Settings come from the model's defaults, then --config FILE, then flags, such as --es.sigma 0.01."
_OF_A_RUN = "Settings that no flag gives come from the run in --run-dir, then from the model's defaults."
_NO_FILE = "Settings come from flags alone."


@dataclass(frozen=True)
class Page:
    """What help shows of one command.

    Attributes:
        flags: the settings of --help, by dotted name.
        examples: three commands, each with what it does.
        sources: where settings come from.
        groups: the settings of --help-all under a title. The others follow, each section under its name.
    """

    flags: tuple[str, ...]
    examples: tuple[tuple[str, str], ...]
    sources: str
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)


_MODEL = ("model", "revision", "device", "dtype")

PAGES = {
    "train": Page(
        flags=(
            *("model", "prompts", "reward", "heldout_reward", "population", "steps", "seed"),
            *("run_dir", "resume", "config"),
        ),
        examples=(
            ("esengine train", "the demo"),
            ("esengine train --model FOLDER --prompts FILE --dry-run", "what a run takes and writes"),
            ("esengine train --run-dir runs/mine --resume", "go on after the last checkpoint"),
        ),
        sources=_SOURCES,
        groups={
            "run": (
                *("run_dir", "config", "steps", "population", "seed", "resume", "allow_change", "dry_run"),
                *("checkpoint_every", "strip_every", "trackers"),
            ),
            "model": (*_MODEL, "init_adapter", "deterministic"),
            "prompts and rewards": ("prompts", "eval_prompts", "reward", "on_bad_reward"),
            "held-out prompts": (
                *("heldout_reward", "heldout_every", "heldout_prompts", "heldout_action", "keep", "keep_by", "ema"),
            ),
        },
    ),
    "eval": Page(
        flags=("run_dir", "benchmark", "entries", "adapter", "model", "prompts", "reward", "seed", "out", "json"),
        examples=(
            ("esengine eval --run-dir runs/mine", "base against adapter, as a table"),
            ("esengine eval --run-dir runs/mine --benchmark partiprompts", "the full report"),
            ("esengine eval --benchmark nano --entries base@1 mine=runs/mine@1", "any entries"),
        ),
        sources=_OF_A_RUN,
        groups={
            "what is compared": ("run_dir", "adapter", "entries"),
            "prompts and rewards": ("benchmark", "prompts", "limit", "reward", "seed", "repeats"),
            "results": ("out", "json", "shard"),
            "model": _MODEL,
        },
    ),
    "render": Page(
        flags=(
            *("prompts", "run_dir", "adapter", "model", "prompts_file", "limit", "gallery", "out", "seed"),
            "image.num_steps",
        ),
        examples=(
            ('esengine render --run-dir runs/mine "a submarine"', "into runs/mine/renders"),
            ("esengine render --run-dir runs/mine --prompts-file FILE", "the first prompts of a file"),
            ("esengine render --adapter FOLDER --model nano --gallery", "a page of eight prompts"),
        ),
        sources=_OF_A_RUN,
        groups={
            "prompts": ("prompts", "prompts_file", "limit", "gallery", "seed"),
            "adapter and folders": ("run_dir", "adapter", "out"),
            "model": _MODEL,
        },
    ),
    "judge": Page(
        flags=("folder", "entries", "limit", "host", "port"),
        examples=(
            ("esengine judge runs/mine", "base against adapter on held-out prompts"),
            ("esengine judge runs/mine/evaluations/nano --limit 50", "the images of an evaluation"),
            ("esengine judge FOLDER --entries base@2 adapter@1", "two of its entries"),
        ),
        sources=_NO_FILE,
    ),
    "report": Page(
        flags=("folder",),
        examples=(
            ("esengine report runs/mine", "of a run, also while it goes on"),
            ("esengine report runs/mine/evaluations/nano", "of an evaluation"),
            ("esengine report", "of the current folder"),
        ),
        sources=_NO_FILE,
    ),
    "replay": Page(
        flags=("run_dir", "out", "model", "device"),
        examples=(
            ("esengine replay runs/mine", "compare with runs/mine/adapter"),
            ("esengine replay runs/mine --out FOLDER", "also write the adapter"),
            ("esengine replay runs/mine --model FOLDER", "if the model has moved"),
        ),
        sources="Settings that no flag gives come from the run's journal.",
    ),
    "env": Page(
        flags=("json",),
        examples=(
            ("esengine env", "as a table"),
            ("esengine env --json", "for a program, or for a bug report"),
            ("CUDA_VISIBLE_DEVICES=1 esengine env", "as a process sees it that has one GPU"),
        ),
        sources=_NO_FILE,
    ),
}
