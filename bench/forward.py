"""The cost of a population: one batched forward in which every row is its own member, over the plain forward.

    python bench/forward.py [--json bench/results/cpu_forward.json]

The transformer of tiny SANA-Sprint in fp32, with the eight targets of the reference run, LoRA r = 2 and noise rank 1.
All variants run in turns, in one process:

    plain       the same batch through the transformer without an adapter
    adapter     the same batch through PEFT's unperturbed adapter
    population  every row is its own member (`SanaSprint.perturbed`), noise generation included
    noise       only entering `perturbed`
    loop        one member after the other: its LoRA is copied into PEFT's, its rows are rendered; all weights are ready
    loop_noise  the same, but `member_state_dict` computes the member's weights in the loop,
                in four separate rounds with population

First, population must equal loop to 1e-5. Otherwise nothing is timed. Last comes the peak memory of a step at a fixed
chunk, for N from 64 to 65536 members.
"""

import argparse
import copy
import itertools
import tempfile
import weakref
from pathlib import Path

import torch
from peft import LoraConfig
from record import environment, interleaved, ratio, write
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import esengine
from esengine.es.population import PEFT_PREFIX
from esengine.models import SanaSprint, build_tiny
from esengine.models.tiny import NAME

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "linear_1", "linear_2", "proj_out", "linear"]
LAYOUTS = {"64 members x 1 image": (64, 1), "8 members x 8 images": (8, 8)}
MEMORY_MEMBERS = (64, 1024, 16384, 65536)
CHUNK = 64
SLOW_ROUNDS = 4
TEXT_TOKENS = 40
TOLERANCE = 1e-5
STEP = 3


def load(folder: Path) -> SanaSprint:
    """Tiny SANA-Sprint, frozen, fp32."""
    return SanaSprint.from_pretrained(folder / NAME)


def attach(transformer: torch.nn.Module) -> esengine.Population:
    """A population with the reference run's settings, whose B is no longer zero."""
    config = LoraConfig(r=2, lora_alpha=8, target_modules=TARGETS)
    population = esengine.attach(transformer, config, esengine.Noise(sigma=1e-2, rank=1, seed=0))
    population.update(step=0, fitness=torch.linspace(-1, 1, 64))
    return population


def inputs(transformer: torch.nn.Module, batch: int) -> dict:
    """One denoising step's arguments for `batch` rows."""
    config, generator = transformer.config, torch.Generator().manual_seed(0)
    size, text = config.sample_size, config.caption_channels
    return {
        "hidden_states": torch.randn(batch, config.in_channels, size, size, generator=generator),
        "encoder_hidden_states": torch.randn(batch, TEXT_TOKENS, text, generator=generator),
        "encoder_attention_mask": torch.ones(batch, TEXT_TOKENS, dtype=torch.int64),
        "guidance": torch.full((batch,), 0.45),
        "timestep": torch.full((batch,), 1.0),
        "return_dict": False,
    }


def rows(arguments: dict, chosen: slice) -> dict:
    return {name: value[chosen] if torch.is_tensor(value) else value for name, value in arguments.items()}


@torch.no_grad()
def measure(folder: Path, members: int, images: int, rounds: int) -> dict:
    """One layout: the correctness check, then every variant turn about.

    Returns:
        `error` of population against loop, seconds of each variant, and their ratios.

    Raises:
        RuntimeError: population and loop differ by more than the tolerance.
    """
    model = load(folder)
    transformer = model.transformer
    plain, looped = copy.deepcopy(transformer), copy.deepcopy(transformer)
    population, loop_parameters = attach(transformer), attach(looped).parameters()
    arguments = inputs(plain, members * images)
    ids = torch.arange(members).repeat_interleave(images)

    steps = itertools.count(STEP)  # each call makes its noise: that of the last step is kept

    def render_population():
        with model.perturbed(population, step=next(steps), members=ids):
            return transformer(**arguments)[0]

    def noise_alone():
        with population.perturbed(step=next(steps), members=ids):
            pass

    def render_member(member: int, state: dict):
        for name, parameter in loop_parameters.items():
            parameter.copy_(state[PEFT_PREFIX + name])
        return looped(**rows(arguments, slice(member * images, (member + 1) * images)))[0]

    def member_state(member: int):
        return population.member_state_dict(step=STEP, member=member)

    states = [member_state(member) for member in range(members)]
    variants = {
        "plain": lambda: plain(**arguments)[0],
        "adapter": lambda: transformer(**arguments)[0],
        "population": render_population,
        "noise": noise_alone,
        "loop": lambda: torch.cat([render_member(member, state) for member, state in enumerate(states)]),
        "loop_noise": lambda: torch.cat([render_member(member, member_state(member)) for member in range(members)]),
    }
    got, expected = variants["population"](), variants["loop"]()
    error = ((got - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).max().item()
    if not error <= TOLERANCE:
        raise RuntimeError(f"population: expected loop to {TOLERANCE:g} relative, got {error:g}; nothing was timed")
    signal = ((got - variants["adapter"]()).norm() / expected.norm()).item()

    slow = {name: variants.pop(name) for name in ("loop_noise",)}
    seconds = interleaved(variants, rounds)
    beside = interleaved({"population": render_population, **slow}, SLOW_ROUNDS)
    pairs = {
        "population / plain": ("population", "plain"),
        "population / adapter": ("population", "adapter"),
        "adapter / plain": ("adapter", "plain"),
        "loop / population": ("loop", "population"),
    }
    return {
        "members": members,
        "images_per_member": images,
        "relative_error": error,
        "relative_perturbation": signal,
        "seconds": {**seconds, "loop_noise": beside["loop_noise"]},
        "ratios": {
            **{name: ratio(seconds[over], seconds[under]) for name, (over, under) in pairs.items()},
            "loop_noise / population": ratio(beside["loop_noise"], beside["population"]),
        },
    }


class LiveBytes(TorchDispatchMode):
    """Inside, counts the bytes of the tensors that ops return and that are still referred to; `peak` is the most."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self._seen = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._note, out)
        return out

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            weakref.finalize(storage, self._drop, key, size)
            self.live += size
            self.peak = max(self.peak, self.live)

    def _drop(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


@torch.no_grad()
def step_peaks(folder: Path, members: int) -> dict[str, int]:
    """Peak bytes of live tensors while chunks of N members render, and through the update from all N.

    The chunks are the first, the last and two between, so that a render is the same work for every N. Counted, not
    read off the process, whose resident size moves by tens of MiB from run to run with the allocator's mood.
    """
    model = load(folder)
    population, arguments = attach(model.transformer), inputs(model.transformer, CHUNK)
    with LiveBytes() as rendering:
        for first in (0, members // 3 // CHUNK * CHUNK, members // 2 // CHUNK * CHUNK, members - CHUNK):
            with model.perturbed(population, step=STEP, members=torch.arange(first, first + CHUNK)):
                model.transformer(**arguments)
    with LiveBytes() as updating:
        population.update(step=STEP, fitness=torch.linspace(-1, 1, members))
    return {"forward": rendering.peak, "update": updating.peak}


def measure_memory(folder: Path) -> dict:
    """`step_peaks` for each N, what each further member costs, and what one member's weights would, if stored."""
    peaks = {members: step_peaks(folder, members) for members in MEMORY_MEMBERS}
    *_, few, many = MEMORY_MEMBERS
    stored = attach(load(folder).transformer).parameters().values()
    return {
        "chunk": CHUNK,
        "peak_bytes": peaks,
        "bytes_per_further_member": {
            name: (peaks[many][name] - peaks[few][name]) / (many - few) for name in ("forward", "update")
        },
        "stored_member_bytes": sum(parameter.nbytes for parameter in stored),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the record there")
    parser.add_argument("--rounds", type=int, default=40, help="samples of each variant (default 40)")
    parser.add_argument("--no-memory", action="store_true", help="leave out the memory of a step")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        build_tiny(folder / NAME)
        record = {
            "benchmark": "forward",
            "model": f"{NAME} transformer, fp32, 8 x 8 latents, {TEXT_TOKENS} text tokens",
            "adapter": {"r": 2, "lora_alpha": 8, "noise_rank": 1, "sigma": 1e-2, "targets": TARGETS},
            "environment": environment(),
            "layouts": {},
        }
        for name, (members, images) in LAYOUTS.items():
            result = record["layouts"][name] = measure(folder, members, images, options.rounds)
            print(f"{name}: population equals loop to {result['relative_error']:.1e}")
            for variant, taken in result["seconds"].items():
                print(f"  {variant:11}", "  ".join(f"{p} {1e3 * taken[p]:7.1f} ms" for p in ("median", "p20", "p80")))
            for pair, taken in result["ratios"].items():
                low, high = taken["paired_p20"], taken["paired_p80"]
                print(f"  {pair:24} {taken['of_medians']:.3f}  (by round {low:.3f} to {high:.3f})")
        if not options.no_memory:
            memory = record["memory"] = measure_memory(folder)
            for members, peak in memory["peak_bytes"].items():
                print(
                    f"N {members:6}: {peak['forward'] / 2**20:.2f} MiB forward, {peak['update'] / 2**20:.2f} MiB update"
                )
            more, stored = memory["bytes_per_further_member"], memory["stored_member_bytes"]
            print(
                f"bytes per further member: {more['forward']:.1f} forward, {more['update']:.1f} update, {stored} stored"
            )
        record["load_average_after"] = environment()["load_average"]
    if options.json:
        write(options.json, record)
        print(f"wrote {options.json}")


if __name__ == "__main__":
    main()
