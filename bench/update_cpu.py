"""CPU time of the update of a large adapter: LoRA of rank 2 on the 168 linears of SANA-Sprint 1.6B, 336 tensors.

    python bench/update_cpu.py [--against PYTHON] [--rounds 5] [--json bench/results/cpu_update.json]

Only `Population.update`, with N = 64, noise computed again, SGD and the caps of the reference run. The frozen weights
have the published shapes and no storage. Versions are compared as in `drop_in.py`: in turns, each round in a fresh
process of one thread.
"""

import statistics
import time

import drop_in
import torch
from peft import LoraConfig
from suite import standin
from torch import nn

import esengine

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "linear_1", "linear_2", "proj_out", "linear"]
MEMBERS = 64
STEPS = 6
"""Updates in one round. The first is not counted."""


def transformer() -> nn.Module:
    """SANA-Sprint's, each parameter one number that is repeated."""
    module = standin.transformer(device="meta")
    for each in module.modules():
        for name, parameter in list(each.named_parameters(recurse=False)):
            setattr(each, name, nn.Parameter(torch.zeros(()).expand(parameter.shape), requires_grad=False))
    return module


def measure() -> dict[str, dict[str, float]]:
    """Median seconds of an update, and the number of tensors."""
    torch.set_num_threads(1)
    population = esengine.attach(transformer(), LoraConfig(r=2, lora_alpha=8, target_modules=TARGETS))
    fitness, seconds = torch.linspace(-1, 1, MEMBERS), []
    for step in range(STEPS):
        start = time.process_time()
        population.update(step=step, fitness=fitness)
        seconds.append(time.process_time() - start)
    return {f"{len(population.parameters())} tensors": {"update": statistics.median(seconds[1:])}}


if __name__ == "__main__":
    drop_in.main(__file__, __doc__, measure, "update of 336 tensors at N = 64, one thread, seconds of CPU time")
