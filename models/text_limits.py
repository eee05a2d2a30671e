"""Counts the prompts that a text encoder cuts, because they have more tokens than it reads.

A pipeline's tokenizers are watched while it encodes a prompt. Each call that truncates is repeated without truncation,
and the number of tokens is compared with the limit. Tokens of a template that the pipeline does not skip count too.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

LIMITS = "limits"
"""Name in the text cache of the tokenizers that cut a prompt."""


class Cut(NamedTuple):
    """Prompts of a list that are cut.

    Attributes:
        count: number of prompts that are cut.
        total: number of prompts in the list.
        limit: number of tokens of a prompt that are read.
        by: which encoder cuts, if there are several: text to append.
    """

    count: int
    total: int
    limit: int
    by: str = ""

    def text(self, what: str = "prompts") -> str:
        by = f" {self.by}" if self.by else ""
        verb = "is longer than" if self.count == 1 else "are longer than"
        end = "is cut" if self.count == 1 else "are cut"
        return f"{self.count} of {self.total} {what} {verb} {self.limit} tokens and {end}{by}"


Limits = tuple[tuple[str, int], ...]
"""The tokenizers that cut a prompt, each with the number of tokens that it keeps."""


def cut_of(limits: Sequence[Limits]) -> list[Cut]:
    """How many prompts of a list are cut at each limit. `limits` has an entry for each prompt."""
    places: dict[tuple[str, int], list[int]] = {}
    for place, each in enumerate(limits):
        for limit in each:
            places.setdefault(limit, []).append(place)
    alike: dict[tuple[int, tuple[int, ...]], list[str]] = {}
    for (name, limit), cut in sorted(places.items()):
        alike.setdefault((limit, tuple(cut)), []).append(name)
    found = [Cut(len(cut), len(limits), limit, f"by {' and '.join(names)}") for (limit, cut), names in alike.items()]
    return found if len(found) > 1 else [each._replace(by="") for each in found]


class Call(NamedTuple):
    """A call of a tokenizer that truncates: its name, the tokens that it keeps, and those of the longest text."""

    tokenizer: str
    limit: int
    tokens: int


def limits_of(calls: Sequence[Call], skipped: int, longest: int | None) -> Limits:
    """The tokenizers that cut a prompt.

    Args:
        calls: the calls for this prompt.
        skipped: tokens of the pipeline's template before the prompt, which it leaves out afterwards.
        longest: tokens that the pipeline keeps of a prompt; None: those that its tokenizer keeps.
    """
    found = {}
    for name, limit, tokens in calls:
        kept = min(limit - skipped, longest or limit)
        if tokens > limit or (skipped and tokens - skipped > kept):
            found[name, kept] = None
    return tuple(found)


@contextmanager
def watched(tokenizers: dict[str, Any]) -> Iterator[Callable[[], list[Call]]]:
    """Watch tokenizers. The function that this yields returns the calls that truncate since its last call."""
    seen: list[Call] = []
    kinds = {name: type(each) for name, each in tokenizers.items()}

    def watch(name: str, kind: type) -> type:
        def call(self: Any, text: Any = None, *args: Any, **options: Any) -> Any:
            result = kind.__call__(self, text, *args, **options)
            if options.get("truncation") and text is not None:
                limit = options.get("max_length") or self.model_max_length
                seen.append(Call(name, int(limit), _longest(self, kind, text, options)))
            return result

        return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})

    def take() -> list[Call]:
        found = list(seen)
        seen.clear()
        return found

    for name, each in tokenizers.items():
        each.__class__ = watch(name, kinds[name])
    try:
        yield take
    finally:
        for name, each in tokenizers.items():
            each.__class__ = kinds[name]


def _longest(tokenizer: Any, kind: type, text: Any, options: dict[str, Any]) -> int:
    """Number of tokens of the longest text without truncation."""
    special = options.get("add_special_tokens", True)
    ids = kind.__call__(tokenizer, text, add_special_tokens=special, truncation=False, verbose=False)["input_ids"]
    return max(map(len, ids), default=0) if ids and isinstance(ids[0], list) else len(ids)


def as_tensor(limits: Limits, names: Sequence[str]) -> torch.Tensor:
    """Limits as int64 [K, 2] for the cache: (place of the tokenizer in `names`, tokens)."""
    return torch.tensor([[names.index(name), limit] for name, limit in limits], dtype=torch.int64).reshape(-1, 2)


def require_limits(table: torch.Tensor) -> None:
    """Raise ValueError for a tensor that `as_tensor` cannot have made."""
    if table.dtype != torch.int64 or table.ndim != 2 or table.shape[1] != 2 or (table < 0).any():
        raise ValueError(f"{LIMITS}: expected int64 [K, 2], got {table.dtype} {[*table.shape]}")


def from_tensor(table: torch.Tensor, names: Sequence[str]) -> Limits:
    """The limits that `as_tensor` wrote. Places that `names` does not have are left out."""
    return tuple((names[place], limit) for place, limit in table.tolist() if place < len(names))
