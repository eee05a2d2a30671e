"""The headline's adapters taken apart: without a layer, scaled, and averaged, on validation captions.

    python bench/nano headline run --work runs/nano-headline
    python bench/nano dissect runs/nano-headline/seed* --json bench/results/nano_dissect.json

The change that an adapter makes to the weights is scaled, or the change of one layer is left out. The average is taken
of the changes, layer by layer. It keeps what the seeds have in common, and the noise of each seed becomes smaller.
"""

import argparse
import json
import tempfile
from pathlib import Path

import record
import torch
from safetensors.torch import load_file

from esengine.base.progress import Progress
from esengine.cli.eval import evaluate
from esengine.cli.settings import EvalConfig
from esengine.models.defaults import defaults
from esengine.models.lora_file import write_diffusers_lora
from esengine.run.settings import load

PREFIX = "transformer."
LENGTHS = (0.5, 1.5)
State = dict[str, torch.Tensor]


def read(adapter: Path) -> State:
    """`<layer>.lora_A.weight` and `.lora_B.weight` of an adapter's folder, whose product is the change of the layer."""
    tensors = load_file(adapter / "pytorch_lora_weights.safetensors")
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def layers(state: State) -> list[str]:
    return sorted({name.rpartition(".lora_")[0] for name in state})


def scaled(state: State, by: float, only: str = "") -> State:
    """The change of all layers, or of one, times `by`."""
    return {
        name: tensor * by if name.endswith("lora_B.weight") and name.startswith(only) else tensor
        for name, tensor in state.items()
    }


def averaged(states: list[State]) -> State:
    """The average of the changes: ranks add up."""
    share = [scaled(state, 1 / len(states)) for state in states]
    return {name: torch.cat([s[name] for s in share], dim=int(name.endswith("lora_B.weight"))) for name in share[0]}


def variants(adapters: dict[str, State]) -> dict[str, State]:
    """Every adapter whole, shorter, longer and without each of its layers; and the average, as long and longer."""
    found = {}
    for name, state in adapters.items():
        found[name] = state
        found |= {f"{name}-times-{by:g}": scaled(state, by) for by in LENGTHS}
        found |= {f"{name}-without-{layer}": scaled(state, 0.0, f"{layer}.") for layer in layers(state)}
    average = averaged(list(adapters.values()))
    found["average"] = average
    return found | {f"average-times-{by:g}": scaled(average, by) for by in LENGTHS}


def table(report: dict) -> list[str]:
    """Markdown rows of a report: how far each entry is above the base, with standard errors."""
    judges = ("combined", "checker", "pickscore")
    rows = [f"| {' | '.join(['adapter', *judges])} |", "|---" * (1 + len(judges)) + "|"]
    (group,) = (group for group in report["groups"] if group["by"] == "overall")
    for row in group["rows"][1:]:
        gains = (row["against_first"][judge] for judge in judges)
        cells = (f"{gain['difference']:+.4f} ± {gain['standard_error']:.4f}" for gain in gains)
        rows.append(f"| {row['entry'].removesuffix('@1')} | {' | '.join(cells)} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders of several seeds")
    parser.add_argument("--limit", type=int, help="so many captions; by default all")
    parser.add_argument("--json", type=Path, help="store the record there")
    options = parser.parse_args()
    if len({run.name for run in options.runs}) < len(options.runs):
        raise SystemExit(f"runs: expected folders of different names, got {', '.join(map(str, options.runs))}")
    environment = record.environment()
    with tempfile.TemporaryDirectory() as folder:
        entries = ["base@1"]
        for name, state in variants({run.name: read(run / "adapter") for run in options.runs}).items():
            write_diffusers_lora(Path(folder) / name, state, dict.fromkeys(layers(state), 1.0))
            entries.append(f"{name}={Path(folder) / name}@1")
        config = EvalConfig(
            model="nano",
            prompts=defaults("nano").heldout,
            limit=options.limit,
            reward=load("nano").reward,
            repeats=1,
            seed=1,
            entries=(*entries, "base@2"),
        )
        report = evaluate(config, Progress()).report
    print(report.table())
    if options.json:
        what = {"what": "bench/nano dissect", "report": json.loads(report.to_json())}
        record.write(options.json, {**what, **environment})
