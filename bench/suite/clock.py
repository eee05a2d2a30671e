"""Time of several callables in turns: CUDA events with a cold L2 on a GPU, `record.interleaved` on a CPU."""

import time
from collections.abc import Callable
from typing import Any

import record
import torch

FLUSH_BYTES = 1 << 28
"""Written between samples: five times an H100's L2."""

LEAD = 4
"""How often it is written: a third of a millisecond's lead for the host, so that no launch is waited for."""


def interleaved(
    variants: dict[str, Callable[[], object]], rounds: int, *, device: torch.device | str, cold: bool = False
) -> dict[str, dict[str, Any]]:
    """`record.interleaved`, measured by the device's clock.

    Args:
        variants: what to call, by name. Each is called once before the clock starts.
        rounds: samples of each, at least 2.
        device: on CUDA samples are event times, on a CPU the time of the process.
        cold: on CUDA, empty the L2 before each sample, for ops that take microseconds.

    Returns:
        `record.summary` of each, in seconds.
    """
    if torch.device(device).type != "cuda":
        return record.interleaved(variants, rounds)
    names, samples = list(variants), {name: [] for name in variants}
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if cold else None
    for call in variants.values():
        call()
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            torch.cuda.synchronize(device)
            for _ in range(LEAD if cold else 0):
                flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            variants[name]()
            end.record()
            end.synchronize()
            samples[name].append(start.elapsed_time(end) / 1e3)
    return {name: record.summary(taken) for name, taken in samples.items()}


class Laps:
    """Seconds of the stages of a computation, summed by name.

    On CUDA `lap` only records an event, so the stages stay asynchronous.
    """

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self._marks = [(None, self._now())]

    def lap(self, name: str) -> None:
        """End the current stage and call it `name`."""
        self._marks.append((name, self._now()))

    def seconds(self) -> dict[str, float]:
        """Seconds of each stage so far."""
        if self.device.type == "cuda":
            self._marks[-1][1].synchronize()
        totals: dict[str, float] = {}
        for (_, before), (name, after) in zip(self._marks, self._marks[1:], strict=False):
            passed = before.elapsed_time(after) / 1e3 if self.device.type == "cuda" else after - before
            totals[name] = totals.get(name, 0.0) + passed
        return totals

    def _now(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
