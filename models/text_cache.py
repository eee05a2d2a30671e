"""A cache of text embeddings: encoded once, trimmed to their real tokens, stored as safetensors with a JSON index.

One cache is an index `<key>.json` and its shards `<key>-<random>.safetensors`. The key is a hash of the model's
identity and of every setting that changes an embedding. New prompts are written to a new shard. The index is renamed
into place last, so a crash at any moment leaves the cache valid. Any of the files may be deleted. safetensors detects a
truncated file but not a flipped byte, so the index holds a sha256 of each tensor, which is checked at every read.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from esengine.base.errors import ConfigError
from esengine.base.files import read_regular, replace_file, warn_no_cache
from esengine.base.transfer import upload
from esengine.models.text_limits import Limits

FORMAT = 1
SHARD_PROMPTS = 1024
BLOCK = 1 << 22
HASHERS = min(8, os.cpu_count() or 1)

Progress = Callable[[int, int], None]
"""Called with (prompts encoded so far, prompts to encode)."""


class TextEmbeddings:
    """Embeddings of an ordered list of prompts, each trimmed to its real tokens.

    Attributes:
        prompts: tuple[str, ...] of length P. `batch` and the latents use a prompt's index in it.
        lengths: int64 [P], number of real tokens of each prompt.
        dtype: Data type of the stored embeddings, which is the text encoder's.
        limits: the tokenizers that cut each prompt, see `text_limits`. Empty: none does, or it is not known.
    """

    def __init__(self, prompts: Sequence[str], embeddings: Sequence[torch.Tensor], limits: Sequence[Limits] = ()):
        """`embeddings`: one [L, C] tensor on the CPU for each of the P >= 1 prompts."""
        if not prompts or len(prompts) != len(embeddings):
            raise ValueError(f"embeddings: expected one for each of {len(prompts)} prompts, got {len(embeddings)}")
        self.prompts = tuple(prompts)
        self.lengths = torch.tensor([embedding.shape[0] for embedding in embeddings])
        self.dtype = embeddings[0].dtype
        self.limits = tuple(limits) or ((),) * len(prompts)
        self._embeddings = tuple(embeddings)

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> torch.Tensor:
        """One prompt's embedding [L, C]."""
        return self._embeddings[index]

    def select(self, prompts: Sequence[str]) -> "TextEmbeddings":
        """The conditioning of some of the prompts."""
        place = {prompt: index for index, prompt in enumerate(self.prompts)}
        places = [place[prompt] for prompt in prompts]
        return TextEmbeddings(prompts, [self._embeddings[i] for i in places], [self.limits[i] for i in places])

    def trimmed_length(self, indices: torch.Tensor) -> int:
        """Number of tokens of the longest prompt among `indices` int64 [B]. All chunks of a step are padded to it."""
        return int(self.lengths[check_indices(indices, len(self))].max())

    def batch(
        self,
        indices: torch.Tensor,
        *,
        length: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Right-padded embeddings of a batch of prompts.

        Args:
            indices: int64 [B] on the CPU, an index into `prompts` for each row; an index may repeat.
            length: Number of tokens to pad to. Default: `trimmed_length(indices)`.
            device: Device of the result.
            dtype: Data type of the embeddings. Default: as stored.

        Returns:
            Embeddings [B, length, C], zero in the padding, and the attention mask int64 [B, length].

        Raises:
            ValueError: An index is out of range, or a prompt is longer than `length`.
        """
        indices = check_indices(indices, len(self))
        longest = int(self.lengths[indices].max())
        length = longest if length is None else length
        if longest > length:
            raise ValueError(f"length: expected at least {longest}, the longest prompt asked for, got {length}")
        unique, rows = indices.unique(return_inverse=True)
        padded = torch.zeros(len(unique), length, self._embeddings[0].shape[-1], dtype=self.dtype)
        for row, index in enumerate(unique.tolist()):
            padded[row, : self.lengths[index]] = self._embeddings[index]
        mask = (torch.arange(length) < self.lengths[unique][:, None]).long()
        rows = upload(rows, device)
        return upload(padded, device, dtype)[rows], upload(mask, device)[rows]


def check_indices(indices: torch.Tensor, count: int) -> torch.Tensor:
    """The indices on the CPU. Raises ValueError unless they are int64 [B], B >= 1, with values in [0, count)."""
    if indices.dtype != torch.int64 or indices.ndim != 1 or len(indices) == 0:
        raise ValueError(f"indices: expected int64 [B] with B >= 1, got {indices.dtype} {[*indices.shape]}")
    indices = indices.cpu()
    if indices.min() < 0 or indices.max() >= count:
        raise ValueError(f"indices: expected values in [0, {count}), got {indices.min()}..{indices.max()}")
    return indices


def fingerprint(folder: Path, parts: Sequence[str] = ("tokenizer", "text_encoder")) -> str:
    """Identity of a local model: a sha256 over the names, sizes and contents of all files in the subfolders `parts`.

    Every byte is read, several files at once.
    """
    files = [file for part in parts for file in sorted((folder / part).rglob("*")) if file.is_file()]
    total = hashlib.sha256()
    with ThreadPoolExecutor(HASHERS) as pool:  # hashlib releases the GIL while it hashes
        for file, (size, digest) in zip(files, pool.map(_size_and_digest, files), strict=True):
            total.update(f"{file.relative_to(folder).as_posix()}\0{size}\0{digest}\n".encode())
    return f"sha256:{total.hexdigest()}"


def _size_and_digest(file: Path) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    with open(file, "rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()


def embed_prompts(
    prompts: Sequence[str],
    encode: Callable[[list[str]], Iterable[torch.Tensor]],
    *,
    key: dict,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
    channels: int | None = None,
    dtype: torch.dtype | None = None,
) -> TextEmbeddings:
    """Embeddings of `prompts`: read from the cache, and encoded if the cache lacks them.

    Args:
        prompts: At least one; duplicates are encoded once.
        encode: Yields one [L, C] embedding for each prompt of a list, in order. Not called if no prompt is missing.
        key: Everything besides the prompt that affects the embeddings: JSON values only.
        cache_dir: Folder of the caches. None: no cache is used.
        progress: Called after each encoded prompt.
        channels, dtype: C and the data type that cached embeddings must have. None: any.

    Returns:
        The embeddings, in the order of `prompts`.

    Raises:
        ConfigError: A cache file is damaged, belongs to another key, or holds embeddings of another shape or data type.
            The message names it. A cache that cannot be read or written is not used, which is logged once.
    """
    if not prompts:
        raise ConfigError("prompts: expected at least one, got an empty list")
    cache = None if cache_dir is None else Cache(Path(cache_dir), key)
    wanted = list(dict.fromkeys(prompts))
    found = {} if cache is None else cache.read(wanted)
    for embedding in found.values():
        with cache.fitting():
            require_embeddings(embedding, channels, dtype)
    missing = [prompt for prompt in wanted if prompt not in found]
    shard = {}
    for done, (prompt, embedding) in enumerate(zip(missing, encode(missing) if missing else (), strict=True), 1):
        found[prompt] = shard[prompt] = embedding
        if cache is not None and (len(shard) == SHARD_PROMPTS or done == len(missing)):
            cache.append(shard)
            shard = {}
        if progress is not None:
            progress(done, len(missing))
    return TextEmbeddings(prompts, [found[prompt] for prompt in prompts])


def require_embeddings(tensor: torch.Tensor, channels: int | None = None, dtype: torch.dtype | None = None) -> None:
    """Raise ValueError unless a tensor is finite floating-point [L, C] with L >= 1, and of these channels and dtype."""
    if tensor.ndim != 2 or not len(tensor) or tensor.dtype not in _FLOATS or dtype not in (None, tensor.dtype):
        raise ValueError(f"expected embeddings [L, C] of {dtype or 'floats'}, got {tensor.dtype} {[*tensor.shape]}")
    if channels is not None and tensor.shape[1] != channels:
        raise ValueError(f"expected embeddings of {channels} channels, got {[*tensor.shape]}")
    if not tensor.isfinite().all():
        raise ValueError("expected finite embeddings")


_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Cache:
    """One cache: tensors [L, C] by text, in shards with an index. See the module's docstring.

    A cache that cannot be read or written, such as in a read-only folder or on a full disk, is not used any more.
    """

    def __init__(self, folder: Path, key: dict):
        self.key = {"format": FORMAT, **key}
        self.stem = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = folder
        self.index = folder / f"{self.stem}.json"
        self._usable = True

    @contextmanager
    def fitting(self) -> Iterator[None]:
        """Turn a ValueError about a cached tensor into a ConfigError that names the index."""
        try:
            yield
        except ValueError as error:
            raise _damaged(self.index, error) from error

    def read(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """The cached embeddings among `prompts`, checked against their sha256."""
        by_shard: dict[str, list[str]] = {}
        try:
            entries = self._entries()
            for prompt in prompts:
                if prompt in entries:
                    by_shard.setdefault(entries[prompt]["shard"], []).append(prompt)
            return {p: t for shard, members in by_shard.items() for p, t in self._shard(shard, members, entries)}
        except OSError as error:
            self._give_up(error)
            return {}

    def append(self, embeddings: dict[str, torch.Tensor]) -> None:
        """Add embeddings by text."""
        try:
            if self._usable:
                self._append(embeddings)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._usable = False
        warn_no_cache(f"{error.filename or self.folder}: {error.strerror or error}")

    def _append(self, embeddings: dict[str, torch.Tensor]) -> None:
        shard = f"{self.stem}-{secrets.token_hex(8)}.safetensors"
        tensors = {_sha256(prompt.encode()): embedding.contiguous() for prompt, embedding in embeddings.items()}
        new = {
            prompt: {"shard": shard, "tensor": name, "sha256": _tensor_sha256(tensor)}
            for (prompt, tensor), name in zip(embeddings.items(), tensors, strict=True)
        }
        replace_file(self.folder / shard, save(tensors))
        text = json.dumps({"key": self.key, "prompts": {**self._entries(), **new}}, indent=1)
        replace_file(self.index, text.encode())

    def _entries(self) -> dict[str, dict[str, str]]:
        try:
            content = json.loads(read_regular(self.index))
            if content["key"] != self.key:
                raise ValueError("it belongs to another model or other settings")
            for entry in content["prompts"].values():
                named = all(isinstance(entry.get(name), str) for name in ("shard", "tensor", "sha256"))
                if not named or Path(entry["shard"]).name != entry["shard"] or "\0" in entry["shard"]:
                    raise ValueError("an entry is not complete")
            return content["prompts"]
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _damaged(self.index, error) from error

    def _shard(self, shard: str, prompts: list[str], entries: dict) -> Iterator[tuple[str, torch.Tensor]]:
        path = self.folder / shard
        try:
            if path.exists() and not path.is_file():
                raise ValueError("expected a regular file")
            with safe_open(path, framework="pt") as file:
                for prompt in prompts:
                    tensor = file.get_tensor(entries[prompt]["tensor"])
                    if _tensor_sha256(tensor) != entries[prompt]["sha256"]:
                        raise ValueError("the checksum of an embedding does not match")
                    yield prompt, tensor
        except FileNotFoundError:
            return  # a deleted shard: its prompts are not cached
        except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ConfigError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ConfigError(f"text cache: cannot use {path}: {reason}; deleting it is safe, its prompts are encoded again")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _tensor_sha256(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes."""
    header = f"{tensor.dtype} {[*tensor.shape]}\n".encode()
    return _sha256(header + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
