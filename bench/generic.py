"""The cost of the generic way: `DiffusersPipeline` over `SanaSprint`, which is written by hand, on the same model.

    python bench/generic.py [--json bench/results/cpu_generic.json]

sana-sprint-nano in fp32, the eight targets of the reference run, LoRA r = 2, noise rank 1: 64 members draw one caption
each, from text to bytes. Both ways run in turns, in one process of one thread. CPU time is measured, since the machine
may be busy.

First, every row of the generic way must equal `SanaSprintPipeline` with the weights that the member has. Otherwise
nothing is timed.
"""

import argparse
import copy
import itertools
import time
from pathlib import Path

import torch
from forward import attach
from record import environment, interleaved, ratio, write

from esengine.es.population import PEFT_PREFIX
from esengine.models import DiffusersPipeline, RenderSettings, Rows, SanaSprint
from esengine.models.pipeline import row_generators

MEMBERS, STEP = 64, 3
CHECKED = (0, 1, 63)
"""Rows that are compared."""
TOLERANCE = 1e-4
"""Of the difference between two members."""
CAPTIONS = ("a small red circle left of a large blue square on a yellow background", "a green triangle on white")


def check(model: DiffusersPipeline, population, texts, rows: Rows, settings: RenderSettings) -> float:
    """The largest error of a row, over its difference to another member.

    Raises:
        RuntimeError: it is above the tolerance.
    """
    images, _ = model.draw(texts, seed=0, step=STEP, rows=rows, population=population, settings=settings)
    plain = copy.deepcopy(model.pipeline)
    draws, errors = row_generators(0, STEP, rows), []
    states = {row: population.member_state_dict(step=STEP, member=int(rows.members[row])) for row in CHECKED}
    scales = {name: layer.scale for name, layer in population.layers.items()}
    for row in CHECKED:
        module = copy.deepcopy(BASE[0])
        state = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in states[row].items()}
        for name, scale in scales.items():
            change = state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"]
            module.get_submodule(name).weight.data += scale * change
        plain.transformer = module
        words = texts.batch(rows.prompts[row : row + 1])
        alone = plain(
            **words,
            **model.family.call,
            guidance_scale=4.5,
            height=64,
            width=64,
            num_inference_steps=1,
            generator=draws[row],
            output_type="pt",
        ).images[0]
        other = images[(row + len(CAPTIONS)) % MEMBERS]  # the same caption and another member
        errors.append(float((images[row] - alone).norm() / (other - alone).norm()))
    if not max(errors) <= TOLERANCE:
        raise RuntimeError(f"generic: expected each member alone to {TOLERANCE:g}, got {max(errors):g}; nothing timed")
    return max(errors)


BASE: list[torch.nn.Module] = []
"""The frozen transformer, before a population is attached."""


def measure(rounds: int, num_steps: int) -> dict:
    """Seconds of CPU time of both ways, and their ratio."""
    generic, own = DiffusersPipeline.from_pretrained("nano"), SanaSprint.from_pretrained("nano")
    BASE[:] = [copy.deepcopy(generic.module)]
    texts, words = generic.encode(CAPTIONS), own.encode(CAPTIONS)
    populations = attach(generic.module), attach(own.module)
    members = torch.arange(MEMBERS)
    rows = Rows(members, members % len(CAPTIONS), torch.zeros_like(members))
    settings = RenderSettings(num_steps=num_steps)
    error = check(generic, populations[0], texts, rows, RenderSettings(num_steps=1))
    steps = itertools.count(STEP)

    def render(model, encoded, population):
        return lambda: model.render(
            encoded, seed=0, step=next(steps), rows=rows, population=population, settings=settings
        )

    variants = {"generic": render(generic, texts, populations[0]), "own": render(own, words, populations[1])}
    seconds = interleaved(variants, rounds, clock=time.process_time)
    return {
        "members": MEMBERS,
        "num_steps": num_steps,
        "relative_error": error,
        "seconds": seconds,
        "ratios": {"generic / own": ratio(seconds["generic"], seconds["own"])},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the record there")
    parser.add_argument("--rounds", type=int, default=20, help="samples of each way (default 20)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = {"benchmark": "generic", "model": "sana-sprint-nano, fp32", "environment": environment(), "layouts": {}}
    for num_steps in (1, 2):
        result = record["layouts"][f"{num_steps} steps"] = measure(options.rounds, num_steps)
        taken = result["ratios"]["generic / own"]
        print(f"{num_steps} denoising steps: every row equals its member alone to {result['relative_error']:.1e}")
        for name, each in result["seconds"].items():
            print(f"  {name:8}", "  ".join(f"{p} {1e3 * each[p]:7.1f} ms" for p in ("median", "p20", "p80")))
        low, high = taken["paired_p20"], taken["paired_p80"]
        print(f"  generic / own {taken['of_medians']:.3f} (by round {low:.3f} to {high:.3f})")
    record["load_average_after"] = environment()["load_average"]
    if options.json:
        write(options.json, record)
        print(f"wrote {options.json}")


if __name__ == "__main__":
    main()
