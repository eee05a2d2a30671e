"""Encodes prompts by a pipeline's own `encode_prompt`, each once and alone.

The text encoders are in memory only while prompts are encoded.
"""

import contextlib
import gc
import inspect
import json
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from transformers import PreTrainedModel

from esengine.base.errors import ConfigError
from esengine.base.memory import give_back
from esengine.models.conditioning import (
    NEGATIVE,
    Conditioning,
    Parts,
    cached_parts,
    channels_of,
    require_one_length,
    require_parts,
    trimmed,
)
from esengine.models.families import UNUSED, Family
from esengine.models.loading import download, load_pipeline, reading
from esengine.models.text_cache import Progress, fingerprint
from esengine.models.text_limits import LIMITS, as_tensor, from_tensor, limits_of, watched


class Source(NamedTuple):
    """Where a pipeline was loaded from: a local folder, and a hub id with its commit or nothing."""

    folder: Path
    identity: dict[str, str]
    local_files_only: bool


def options_of(pipe: DiffusionPipeline) -> dict[str, Any]:
    """The pipeline's own settings besides its components, as JSON values. Some affect how a prompt is encoded."""
    plain = (str, int, float, bool, type(None))
    return {k: v for k, v in sorted(pipe.config.items()) if not k.startswith("_") and isinstance(v, plain)}


class PromptEncoder:
    """The text side of a pipeline.

    Args:
        pipe: the pipeline.
        family: its family.
        source: where it was loaded from. Its text encoders are then loaded while prompts are encoded. None: `pipe` has
            them, until `drop`.
    """

    def __init__(self, pipe: DiffusionPipeline, family: Family, source: Source | None):
        self.pipeline, self.family, self._source = pipe, family, source
        self._memo: dict[tuple[str, str, str], Parts] = {}
        self._dropped = False

    @property
    def device(self) -> torch.device:
        return next(self._module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return self._module.dtype

    @property
    def _module(self) -> torch.nn.Module:
        return getattr(self.pipeline, self.family.denoiser)

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the text encoders of a local folder."""
        return fingerprint(self._source.folder, self.family.encoders)

    def encode(
        self, prompts: Sequence[str], *, cache_dir: str | Path | None, instruction: bool, progress: Progress | None
    ) -> Conditioning:
        """See `DiffusersPipeline.encode`."""
        names = [name for name in self.family.texts if name is not None and not name.startswith(NEGATIVE)]
        arguments = self._encode_arguments(instruction)
        rest = json.dumps(arguments, sort_keys=True)
        key = {"family": self.family.name, "arguments": json.loads(rest), "dtype": str(self.dtype)}
        key["options"] = options_of(self.pipeline)
        if self._source is not None:
            key |= self._source.identity or {"fingerprint": self.fingerprint}
        roles = [("", prompt) for prompt in prompts]
        if self.family.guided_above is not None:
            roles.append((NEGATIVE, self.family.negative))
        wanted = [role for role in dict.fromkeys(roles) if (*role, rest) not in self._memo]
        if wanted or not prompts:
            found = cached_parts(
                wanted if prompts else (),
                [*names, LIMITS],
                lambda missing: self._encode(missing, arguments),
                key=key,
                cache_dir=cache_dir if self._source is not None else None,
                progress=progress,
                check=partial(require_parts, family=self.family, channels=channels_of(self._module.config)),
                together=partial(require_one_length, family=self.family),
            )
            self._memo |= {(*role, rest): parts for role, parts in zip(wanted, found, strict=True)}
        parts = [dict(self._memo[(*role, rest)]) for role in roles]
        limits = [from_tensor(each.pop(LIMITS), self._tokenizers) for each in parts][: len(prompts)]
        negative = parts.pop() if self.family.guided_above is not None else None
        return Conditioning(prompts, parts, self.family, negative, limits)

    @property
    def _tokenizers(self) -> list[str]:
        """Names of the pipeline's tokenizers, in their order."""
        return sorted(name for name in self.pipeline.components if name.startswith("tokenizer"))

    def _encode_arguments(self, instruction: bool) -> dict[str, Any]:
        """Arguments of `encode_prompt` besides the prompt: those that the pipeline's call passes on by default."""
        takes = inspect.signature(type(self.pipeline).encode_prompt).parameters
        gives = inspect.signature(type(self.pipeline).__call__).parameters
        found = {}
        for name in takes:
            text = name in ("self", "prompt") or name.startswith(NEGATIVE) or "embeds" in name or "mask" in name
            if text or name not in gives or gives[name].default is inspect.Parameter.empty:
                continue
            found[name] = self.family.call.get(name, gives[name].default)
        if "complex_human_instruction" in found and not instruction:
            found["complex_human_instruction"] = None
        return found

    def _encode(self, entries: list[tuple[str, str]], arguments: dict[str, Any]) -> Iterator[Parts]:
        """Yield the tensors of each (role, prompt), with the text encoders in memory."""
        with self._encoders() as pipe, watched(self._tokenizers_of(pipe)) as calls:
            takes = inspect.signature(type(pipe).encode_prompt).parameters
            for role, prompt in entries:
                given, from_guidance = dict(arguments, device=self.device), False
                if "do_classifier_free_guidance" in takes:
                    given["do_classifier_free_guidance"] = from_guidance = bool(role)
                with torch.no_grad(), reading(f"model: cannot encode {prompt!r:.60}", "a prompt's tokens"):
                    parts = trimmed(pipe.encode_prompt(prompt=prompt, **given), self.family, from_guidance)
                skipped = getattr(pipe, "prompt_template_encode_start_idx", 0)
                limits = limits_of(calls(), skipped, arguments.get("max_sequence_length"))
                yield parts | {LIMITS: as_tensor(limits, self._tokenizers)}

    def _tokenizers_of(self, pipe: DiffusionPipeline) -> dict[str, Any]:
        return {name: part for name in self._tokenizers if (part := getattr(pipe, name)) is not None}

    @contextlib.contextmanager
    def _encoders(self) -> Iterator[DiffusionPipeline]:
        """The pipeline with its text encoders, which are loaded and freed if it was loaded without them."""
        if self._source is None:
            if self._dropped:
                what = "the text encoders were dropped before the first image; encode all prompts before it"
                raise ConfigError(f"prompts: {what}")
            yield self.pipeline
            return
        folder, identity, local_files_only = self._source
        kept = {name: part for name, part in self.pipeline.components.items() if name not in self.family.encoders}
        if "commit" in identity:
            without = dict.fromkeys((self.family.denoiser, "vae", *UNUSED))
            folder = download(identity["model"], identity["commit"], local_files_only, self.family, **without)
        pipe = load_pipeline(folder, self.dtype, self.device, self.family, **kept)
        try:
            for name in self.family.encoders:
                if isinstance(part := getattr(pipe, name), torch.nn.Module):
                    part.eval().requires_grad_(False)
            yield pipe
        finally:
            del pipe
            gc.collect()
            give_back(self.device)

    def drop(self) -> None:
        """Free the text encoders before the first image. Raises RuntimeError if one is still there."""
        if self._dropped:
            return
        pipe = self.pipeline
        names = [name for name in pipe.components if name.startswith(("text_encoder", "tokenizer")) or name in UNUSED]
        pipe.register_modules(**dict.fromkeys(name for name in names if getattr(pipe, name) is not None))
        if left := [name for name, part in pipe.components.items() if isinstance(part, PreTrainedModel)]:
            raise RuntimeError(f"text encoders: expected none in memory while images are rendered, got {left}")
        self._dropped = True
        give_back(self.device)
