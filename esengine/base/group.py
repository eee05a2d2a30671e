"""The processes of one run. Each renders a part of a step, and they exchange only scores.

Every process makes the same update from the same scores, so no weights are sent.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed

from esengine.base.errors import ConfigError, RunError

PATIENCE = timedelta(hours=1)
"""Longest wait for the other processes, such as for their step or for text encoding on the first."""


def place() -> tuple[int, int]:
    """This process's rank and the number of processes, from torchrun's environment; (0, 1) without it.

    Raises:
        ConfigError: the environment is not as torchrun sets it.
    """
    found = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE")]
    if found == [None, None]:
        return 0, 1
    if all(each is not None and each.isdecimal() for each in found):
        rank, size = map(int, found)
        if rank < size:
            return rank, size
    raise ConfigError(f"RANK, WORLD_SIZE: expected both as torchrun sets them, with RANK < WORLD_SIZE, got {found}")


LONGEST_PAUSE = 0.02
"""Longest pause between checks whether the other processes are ready, in seconds."""


class Group:
    """The processes that torchrun has started, or this one alone.

    Attributes:
        rank: rank of this process, from 0. Process 0 writes the run folder and shows progress.
        size: number of processes.
    """

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size = rank, size

    @classmethod
    def join(cls) -> "Group":
        """This process's group, from torchrun's environment. Call `leave` at the end.

        Raises:
            ConfigError: see `place`.
            RunError: the other processes cannot be reached.
        """
        rank, size = place()
        if size > 1:
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            try:
                torch.distributed.init_process_group(backend, timeout=PATIENCE)
            except (RuntimeError, ValueError) as error:
                raise RunError(f"process {rank} of {size}: cannot meet the others: {str(error)[:200]}") from error
        return cls(rank, size)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def leave(self) -> None:
        if self.size > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def wait(self) -> None:
        """Wait until every process has called this."""
        self._all_gather(torch.zeros(1))

    @contextmanager
    def first(self) -> Iterator[None]:
        """Run the block on process 0 first, then on the others, which find its results in the cache."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Every process's tensor, in the order of ranks. All are on the CPU, of one dtype, and of any length.

        Args:
            tensor: [L] or [L, ...]; every process has the same dimensions except L.

        Raises:
            RunError: another process has ended.
        """
        if self.size == 1:
            return [tensor]
        lengths = self._all_gather(torch.tensor([len(tensor)]))
        longest = max(int(each) for each in lengths)
        found = self._all_gather(torch.cat((tensor, tensor.new_zeros(longest - len(tensor), *tensor.shape[1:]))))
        return [each[: int(length)] for each, length in zip(found, lengths, strict=True)]

    def _all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Every process's tensor, all of one shape. Waits in short sleeps, so that signals are handled."""
        if self.size == 1:
            return [tensor]
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        try:
            work = torch.distributed.all_gather(found, tensor, async_op=True)
            pause = 1e-4
            while not work.is_completed():
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
            work.wait()
        except RuntimeError as error:
            why = (str(error).strip().splitlines() or [""])[0][:200]
            raise RunError(
                f"process {self.rank} of {self.size}: another process of the group has ended or is out of reach; the "
                f"first to fail says why ({why})"
            ) from error
        return found

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any process."""
        return any(bool(each) for each in self.gather(torch.tensor([int(flag)])))


ALONE = Group()
