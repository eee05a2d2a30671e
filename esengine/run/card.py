"""The model card of a run's adapter, from the run's journal alone. So a resumed or replayed run writes equal bytes."""

import json
from typing import Any

from esengine.es.model_card import escaped, fenced, front_matter, peft_example
from esengine.models import Family, is_packaged
from esengine.models.defaults import defaults
from esengine.run.journal import Journal, Start, Step

_SHOWN = ("revision", "dtype", "deterministic", "on_bad_reward", "population", "lora", "es", "update", "image")
"""Settings of the recipe. Those with an entry of their own, and those that affect no adapter, are left out."""


def run_card(run: Journal, family: Family | None, *, measured: bool = True) -> str:
    """The card of the adapter after the journal's last step.

    Args:
        run: the journal.
        family: the family of the run's model; None if it has none.
        measured: whether the journal's held-out scores are those of this adapter.
    """
    model = run.start.settings["model"]
    licence = defaults(model).licence or (family.licence if family else "") or None
    loads = family is not None and _has_loader(family)
    head = front_matter(
        base_model=model,
        library_name="diffusers" if loads else "peft",
        tags=("text-to-image", *(("peft",) if loads else ())),
        licence=licence,
        pipeline_tag="text-to-image",
    )
    parts = [
        f"{head}\n# LoRA of {escaped(model)}",
        "Trained by Evolution Strategies (EGGROLL, arXiv 2511.16652) with esengine.",
        f"## Recipe\n\n{_recipe(run)}",
        f"## Gains\n\n{_gains(run if measured else run.until(0))}",
        f"## Load\n\nFOLDER is this folder.\n\n{_loading(model, family, loads)}",
    ]
    if licence:
        parts.append(f"## Licence\n\nPublished weights of the base model: {licence}. Read the licence of your weights.")
    return "\n\n".join(parts) + "\n"


def _recipe(run: Journal) -> str:
    """What was trained on what, and the settings that the adapter depends on."""
    images, start, seeds, made = 0, run.start, [], 0
    for record in run.records:
        if isinstance(record, Start):
            start = record
        elif isinstance(record, Step):
            es, made = start.settings["es"], made + 1
            images += len(record.fitness) * es["prompts_per_step"] * es["repeats"]
            seeds.append(start.settings["seed"])
    rewards = [f"{name} times {of.get('weight', 1)}" for name, of in run.start.identity["rewards"].items()]
    rows = {
        "steps": made,
        "images": images,
        "seed": ", ".join(map(str, dict.fromkeys(seeds or [run.start.settings["seed"]]))),
        "reward": ", ".join(rewards),
        "prompts, SHA-256": run.start.identity["prompts_sha256"],
    }
    if first := run.start.settings.get("init_adapter"):
        rows["started from"] = first
    settings = {name: run.start.settings[name] for name in _SHOWN if name in run.start.settings}
    return f"{_table(('what', 'value'), rows.items())}\n\n{fenced(json.dumps(settings, indent=2), 'json')}"


def _gains(run: Journal) -> str:
    """The change of each score on held-out prompts, with its standard error."""
    series = run.held_out
    if len(series) < 2:
        return "On held-out prompts: not measured."
    first, last = series[0], series[-1]
    rows = []
    for name, score in last.scores.items():
        if score["change"] is not None:
            error = "unknown" if score["standard_error"] is None else f"{score['standard_error']:.2g}"
            rows.append((name, f"{score['mean']:.4g}", f"{score['change']:+.4g} ± {error}"))
    count = max((len(score["each"]) for score in last.scores.values()), default=0)
    text = f"On {count} held-out prompts, after {last.step} steps against {first.step} steps, with the same noise.\n"
    text += "The error is one standard error over the prompts. "
    text += f"The run maximised {escaped(last.optimised)}.\n\n"
    return text + _table(("score", "mean", "change"), rows)


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = [head, ("---",) * len(head), *([escaped(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _loading(model: str, family: Family | None, loads: bool) -> str:
    """Python that loads the adapter, by the pipeline's loader where it has one, and by PEFT."""
    if family is None:
        return peft_example("module")
    packaged = is_packaged(model)
    folder = f"locate({json.dumps(model)}, None, True)[0]" if packaged else json.dumps(model)
    imports = f"from diffusers import {family.pipeline}\n"
    imports += "from esengine.models.loading import locate  # it is part of esengine\n" if packaged else ""
    pipe = f"pipe = {family.pipeline}.from_pretrained({folder})"
    start = f"{imports}\n{pipe}"
    peft = peft_example(f"pipe.{family.denoiser}", f"{pipe}\n").replace(
        "import PeftModel\n", f"import PeftModel\n{imports}", 1
    )
    if not loads:
        return f"diffusers' {family.pipeline} has no load_lora_weights. By PEFT:\n\n{peft}"
    by_pipeline = fenced(f'{start}\npipe.load_lora_weights("FOLDER")', "python")
    return f"By the pipeline:\n\n{by_pipeline}\n\nBy PEFT:\n\n{peft}"


def _has_loader(family: Family) -> bool:
    import diffusers

    return hasattr(getattr(diffusers, family.pipeline, None), "load_lora_weights")
