"""The processes of one run: each renders its share of a step, and they exchange scores, nothing else.

Every process makes the same update from the same scores, so none has to send weights to another.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed

from esengine.errors import ConfigError, RunError

PATIENCE = timedelta(hours=1)
"""How long a process waits for the others: a step of theirs, or the text encoder of the first."""


def place() -> tuple[int, int]:
    """This process's rank and how many there are, by torchrun's environment; (0, 1) without it.

    Raises:
        ConfigError: the environment is of no torchrun.
    """
    found = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE")]
    if found == [None, None]:
        return 0, 1
    if all(each is not None and each.isdecimal() for each in found):
        rank, size = map(int, found)
        if rank < size:
            return rank, size
    raise ConfigError(f"RANK, WORLD_SIZE: expected both as torchrun sets them, with RANK < WORLD_SIZE, got {found}")


class Group:
    """The processes that torchrun has started, or this one alone.

    Attributes:
        rank: of this process, from 0. Process 0 writes the run folder and talks.
        size: how many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size = rank, size

    @classmethod
    def join(cls) -> "Group":
        """This process's group by torchrun's environment. Call `leave` at the end.

        Raises:
            ConfigError: see `place`.
            RunError: the others cannot be met.
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
    def leads(self) -> bool:
        return self.rank == 0

    def leave(self) -> None:
        if self.size > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def wait(self) -> None:
        """Go on when every process is here."""
        if self.size > 1:
            torch.distributed.barrier()

    @contextmanager
    def first(self) -> Iterator[None]:
        """The leading process goes first, alone; then the others, who find in the caches what it has left."""
        if not self.leads:
            self.wait()
        yield
        if self.leads:
            self.wait()

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Every process's tensor, in the order of ranks; all on the CPU, of one dtype, and of any length.

        Args:
            tensor: [L] or [L, ...]; all but L alike on every process.
        """
        if self.size == 1:
            return [tensor]
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        torch.distributed.all_gather(lengths, torch.tensor([len(tensor)]))
        longest = max(int(each) for each in lengths)
        padded = torch.cat((tensor, tensor.new_zeros(longest - len(tensor), *tensor.shape[1:])))
        found = [torch.empty_like(padded) for _ in range(self.size)]
        torch.distributed.all_gather(found, padded)
        return [each[: int(length)] for each, length in zip(found, lengths, strict=True)]

    def any(self, flag: bool) -> bool:
        """Whether it is true of any process."""
        return any(bool(each) for each in self.gather(torch.tensor([int(flag)])))


ALONE = Group()
