"""Pipelines from disk and from the hub, with one clear line when there is none."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import SanaSprintPipeline
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from esengine.errors import ConfigError, RenderError

READ_ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError)


def locate(model: str, revision: str | None, local_files_only: bool) -> tuple[Path, dict[str, str]]:
    """The local folder of a model, and its identity: a hub id with its commit, or empty for a plain folder."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder, {}
    if folder.is_absolute() or model.startswith(("~", ".")) or model.count("/") != 1:
        raise ConfigError(f"model: {model} is neither a folder nor a hub id")
    snapshot = download(model, revision, local_files_only, text_encoder=None, tokenizer=None)
    return snapshot, {"model": model, "commit": snapshot.name}


def download(model: str, revision: str | None, local_files_only: bool, **without: None) -> Path:
    """The snapshot folder of a hub id, without the components named in `without`. Its name is the commit."""
    try:
        return Path(
            SanaSprintPipeline.download(
                model, revision=revision, local_files_only=local_files_only, use_safetensors=True, **without
            )
        )
    except (*READ_ERRORS, RuntimeError) as error:
        raise ConfigError(
            f"model: {model} is not a folder, and no complete copy of a hub model of that name was found or fetched "
            "(offline, misspelt, private, or not a pipeline)"
        ) from error


def load(folder: Path, dtype: torch.dtype, **without: None) -> SanaSprintPipeline:
    """The pipeline in a local folder, without the components named in `without`."""
    index = folder / "model_index.json"
    try:
        kind = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
        if kind != SanaSprintPipeline.__name__:
            raise ValueError(f"expected a SanaSprintPipeline, got {kind}")
        with no_progress_bars():
            return SanaSprintPipeline.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, local_files_only=True, **without
            )
    except READ_ERRORS as error:
        raise ConfigError(f"model: cannot load {folder}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def fits(images: int, what: str, setting: str) -> Iterator[None]:
    """Out of memory inside becomes a RenderError that names the setting to lower."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise RenderError(f"{images} images in one {what} do not fit into memory: give a smaller {setting}") from error


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Loading bars are the caller's to draw; what was switched on is switched on again."""
    loggers = [each for each in (diffusers_logging, transformers_logging) if each.is_progress_bar_enabled()]
    for each in loggers:
        each.disable_progress_bar()
    try:
        yield
    finally:
        for each in loggers:
            each.enable_progress_bar()
