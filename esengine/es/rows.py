"""The rows of a batch: member, prompt and repeat of each image."""

from typing import NamedTuple

import torch


class Rows(NamedTuple):
    """B rows of a batch.

    Attributes:
        members: int64 [B]; None without a population.
        prompts: int64 [B], indices into a list of prompts.
        repeats: int64 [B]. Each repeat of a prompt has different latents.
    """

    members: torch.Tensor | None
    prompts: torch.Tensor
    repeats: torch.Tensor

    @property
    def count(self) -> int:
        """B."""
        return len(self.prompts)

    def split(self, size: int) -> list["Rows"]:
        """Split into parts of `size` rows, in order. The last may be smaller."""
        columns = [None if column is None else column.split(size) for column in self]
        return [Rows(*(None if column is None else column[at] for column in columns)) for at in range(len(columns[1]))]
