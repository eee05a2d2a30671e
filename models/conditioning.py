"""Conditioning of prompts: all that a pipeline's call takes of a text, which may be several tensors.

Legend: L tokens, C channels, P prompts, B rows.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from esengine.base.errors import ConfigError
from esengine.base.transfer import upload
from esengine.models.families import Family
from esengine.models.text_cache import SHARD_PROMPTS, Cache, Progress, check_indices, require_embeddings
from esengine.models.text_limits import LIMITS, Limits, require_limits

Parts = dict[str, torch.Tensor]
"""One prompt's tensors by name: embeddings [L, C], masks [1, L], pooled embeddings [1, C]."""

NEGATIVE = "negative_"
"""Arguments of a pipeline's call that begin with it take the negative prompt."""


class Conditioning:
    """The tensors of an ordered list of prompts, each encoded alone and trimmed to its real tokens.

    Attributes:
        prompts: tuple[str, ...] of length P. `batch` and the latents use a prompt's index in it.
        lengths: int64 [P], number of tokens of each prompt.
        limits: the tokenizers that cut each prompt, see `text_limits`.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        parts: Sequence[Parts],
        family: Family,
        negative: Parts | None = None,
        limits: Sequence[Limits] = (),
    ):
        """`parts`: the tensors of each of the P >= 1 prompts. `negative`: those of the negative prompt."""
        if not prompts or len(prompts) != len(parts):
            raise ValueError(f"parts: expected one for each of {len(prompts)} prompts, got {len(parts)}")
        self.prompts = tuple(prompts)
        self.lengths = torch.tensor([_length(each) for each in parts])
        self.limits = tuple(limits) or ((),) * len(prompts)
        self._parts, self._family, self._negative = tuple(parts), family, negative

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Parts:
        """One prompt's tensors."""
        return self._parts[index]

    def select(self, prompts: Sequence[str]) -> "Conditioning":
        """The conditioning of some of the prompts."""
        place = {prompt: index for index, prompt in enumerate(self.prompts)}
        parts, limits = ([each[place[prompt]] for prompt in prompts] for each in (self._parts, self.limits))
        return Conditioning(prompts, parts, self._family, self._negative, limits)

    def trimmed_length(self, indices: torch.Tensor) -> int:
        """Number of tokens of the longest prompt among `indices` int64 [B]. All chunks of a step are padded to it."""
        return int(self.lengths[check_indices(indices, len(self))].max())

    def batch(
        self,
        indices: torch.Tensor,
        *,
        length: int | None = None,
        guided: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> dict[str, Any]:
        """Arguments of the pipeline's call for a batch of prompts.

        Args:
            indices: int64 [B] on the CPU, an index into `prompts` for each row; an index may repeat.
            length: number of tokens to pad masked embeddings to. Default: `trimmed_length(indices)`.
            guided: whether the arguments of classifier-free guidance are needed too.
            device: device of the result.
            dtype: data type of the embeddings. Default: as stored.

        Returns:
            Embeddings [B, L, C] or a list of B [L, C], masks [B, L] and pooled embeddings [B, C], by argument.

        Raises:
            ValueError: an index is out of range, or a prompt is longer than `length`.
        """
        indices = check_indices(indices, len(self))
        longest = int(self.lengths[indices].max())
        length = longest if length is None else length
        if longest > length:
            raise ValueError(f"length: expected at least {longest}, the longest prompt asked for, got {length}")
        if guided and self._negative is not None:  # both halves of a doubled batch have one length
            length = max(length, _length(self._negative))
        unique, rows = indices.unique(return_inverse=True)
        given = self._arguments([self._parts[index] for index in unique.tolist()], rows, length, device, dtype)
        if guided and self._negative is not None:
            negative = self._arguments([self._negative], torch.zeros_like(rows), length, device, dtype)
            given |= {f"{NEGATIVE}{name}": value for name, value in negative.items()}
        return given

    def _arguments(self, parts: list[Parts], rows: torch.Tensor, length: int, device, dtype) -> dict[str, Any]:
        masked, found = masks(self._family), {}
        for name in parts[0]:
            tensors = [each[name] for each in parts]
            to = dtype if tensors[0].is_floating_point() and name not in masked.values() else None
            if self._family.ragged:
                sent = [upload(each, device, to) for each in tensors]
                found[name] = [sent[row] for row in rows.tolist()]
                continue
            if name in masked.values():
                tensors = [_padded(each, 1, length)[0] for each in tensors]
            elif name in masked:
                tensors = [_padded(each, 0, length) for each in tensors]
            elif "pooled" in name:
                tensors = [each[0] for each in tensors]
            found[name] = upload(torch.stack(tensors), device, to)[upload(rows, device)]
        return found


CHANNELS = ("caption_channels", "joint_attention_dim", "cap_feat_dim", "text_embed_dim", "cross_attention_dim")
"""What denoisers call the width of their text embeddings. The first that a configuration has is the one."""


def channels_of(config: Mapping[str, Any]) -> dict[str, int]:
    """The channels of a text's tensors that a denoiser's configuration gives, by the name of the tensor."""
    pooled = config.get("pooled_projection_dim")
    if {"projection_class_embeddings_input_dim", "addition_time_embed_dim"} <= config.keys():  # SDXL's six sizes
        pooled = (config["projection_class_embeddings_input_dim"] or 0) - 6 * (config["addition_time_embed_dim"] or 0)
    found = {
        "prompt_embeds": next((config[name] for name in CHANNELS if config.get(name) is not None), None),
        "prompt_embeds_2": config.get("text_embed_2_dim"),
        "pooled_prompt_embeds": pooled,
    }
    return {name: width for name, width in found.items() if type(width) is int and width > 0}


def require_parts(parts: Parts, family: Family, channels: Mapping[str, int]) -> None:
    """Raise ValueError for tensors that are not those of a text. `channels`: see `channels_of`."""
    masked = masks(family)
    for name, tensor in parts.items():
        if name == LIMITS:
            require_limits(tensor)
            continue
        if name in masked.values():
            if tensor.ndim != 2 or len(tensor) != 1 or tensor.is_complex():
                raise ValueError(f"{name}: expected a mask [1, L], got {tensor.dtype} {[*tensor.shape]}")
            continue
        require_embeddings(tensor, channels.get(name))
        if "pooled" in name and len(tensor) != 1:
            raise ValueError(f"{name}: expected [1, C], got {[*tensor.shape]}")
        if name in masked and parts[masked[name]].shape[-1:] != tensor.shape[:1]:
            raise ValueError(f"{name}: expected as many tokens as in its mask, got {len(tensor)}")


def require_one_length(parts: Sequence[Parts], family: Family) -> None:
    """Raise ValueError if texts differ in length where a family's call takes them without a mask."""
    padded = {LIMITS, *masks(family), *masks(family).values()}
    for name in () if family.ragged else set().union(*parts) - padded:
        if len(lengths := {len(each[name]) for each in parts}) > 1:
            raise ValueError(f"{name}: expected texts of one length, got {sorted(lengths)[:4]}")


def masks(family: Family) -> dict[str, str]:
    """The name of the mask of each embeddings that have one."""
    found, embeddings = {}, None
    for name in filter(None, family.texts):
        if name.startswith(NEGATIVE):
            continue
        if "mask" in name:
            found[embeddings] = name
        else:
            embeddings = name
    return found


def trimmed(results: Sequence[Any], family: Family, negative: bool = False) -> Parts:
    """One prompt's tensors on the CPU, from the results of `encode_prompt` for it alone.

    Tokens after the last unmasked one are cut off. A missing mask keeps everything.

    Args:
        results: what `encode_prompt` returned, in the order of `family.texts`.
        family: the family's row.
        negative: take the results for the negative prompt, which `texts` names.
    """
    named = {name: value for name, value in zip(family.texts, results, strict=True) if name is not None}
    prefix = NEGATIVE if negative else ""
    named = {n.removeprefix(NEGATIVE): v for n, v in named.items() if n.startswith(NEGATIVE) == bool(prefix)}
    found = {}
    for name, value in named.items():
        value = value[0] if isinstance(value, (list, tuple)) else value
        if value is not None:
            value = value.detach().cpu()
            value = value[0] if value.dim() == 3 else value
            found[name] = value.contiguous()
    for embeddings, mask in masks(family).items():
        kept = found.get(mask)
        if kept is None:
            kept = torch.ones(1, len(found[embeddings]), dtype=torch.int64)
        last = int((kept[0] != 0).nonzero().max()) + 1 if (kept != 0).any() else 1
        last = last if family.trims else len(kept[0])
        found[embeddings], found[mask] = found[embeddings][:last].clone(), kept[:, :last].clone()
    return found


def cached_parts(
    entries: Sequence[tuple[str, str]],
    names: Sequence[str],
    encode: Callable[[list[tuple[str, str]]], Iterable[Parts]],
    *,
    key: dict,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
    check: Callable[[Parts], None] = lambda parts: None,
    together: Callable[[list[Parts]], None] = lambda parts: None,
) -> list[Parts]:
    """The tensors of several texts: read from the cache, and encoded if the cache lacks one of them.

    Args:
        entries: (role, prompt) of each text; equal ones are encoded once.
        names: names of a text's tensors.
        encode: yields the tensors of each of some entries, in order. Not called if none is missing.
        key: everything besides the prompt that affects the tensors: JSON values only.
        cache_dir: folder of the caches. None: no cache is used.
        progress: called with (encoded, to encode).
        check: raises ValueError for cached tensors that the model cannot take.
        together: raises ValueError for texts whose tensors do not fit into one batch.

    Raises:
        ConfigError: there is no entry; or a cache file is damaged, belongs to another key, or holds tensors that
            `check` refuses. A cache that cannot be read or written is not used, which is logged once.
    """
    if not entries:
        raise ConfigError("prompts: expected at least one, got an empty list")
    cache = None if cache_dir is None else Cache(Path(cache_dir), key)

    def slot(entry: tuple[str, str], name: str) -> str:
        return f"{entry[0]}{name}: {entry[1]}"

    wanted = list(dict.fromkeys(entries))
    stored = {} if cache is None else cache.read([slot(entry, name) for entry in wanted for name in names])
    found = {}
    for entry in wanted:
        parts = {name: stored.get(slot(entry, name)) for name in names}
        if all(part is not None for part in parts.values()):
            with cache.fitting():
                check(parts)
            found[entry] = parts
    missing, shard = [entry for entry in wanted if entry not in found], {}
    for done, (entry, parts) in enumerate(zip(missing, encode(missing) if missing else (), strict=True), 1):
        found[entry] = parts
        shard |= {slot(entry, name): part for name, part in parts.items()}
        if cache is not None and (done % SHARD_PROMPTS == 0 or done == len(missing)):
            cache.append(shard)
            shard = {}
        if progress is not None:
            progress(done, len(missing))
    if cache is not None:
        with cache.fitting():
            together([found[entry] for entry in wanted])
    return [found[entry] for entry in entries]


def _length(parts: Parts) -> int:
    """Number of tokens of a text: of the longest of its embeddings."""
    return max((len(part) for name, part in parts.items() if "mask" not in name and "pooled" not in name), default=0)


def _padded(tensor: torch.Tensor, axis: int, length: int) -> torch.Tensor:
    """The tensor with zeros behind it, up to `length` along an axis."""
    shape = list(tensor.shape)
    shape[axis] = length - shape[axis]
    return torch.cat([tensor, tensor.new_zeros(shape)], axis)
