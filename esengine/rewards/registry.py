"""From a reward's name to the reward: a built-in one, or the user's own as "module:attr"."""

import contextlib
import importlib
import operator
import os
import sys
from collections.abc import Iterator
from typing import Protocol

import torch

from esengine.errors import ConfigError
from esengine.rewards.jpeg import JpegCompressibility, JpegIncompressibility


class Reward(Protocol):
    """Any callable that scores finished images; higher is better. It sees no gradient and needs none."""

    def __call__(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Score images, uint8 [B, 3, H, W], each drawn from the prompt beside it. Returns finite float32 [B]."""
        ...


BUILTIN = {
    "jpeg_compressibility": JpegCompressibility,
    "jpeg_incompressibility": JpegIncompressibility,
}


def load(name: str, **options) -> Reward:
    """Find a reward by name.

    Args:
        name: a key of `BUILTIN`, or "module:attr". The module is looked for where Python looks, then in the current
            folder, which is importable only while the module is. A class is instantiated with the options; any other
            callable is the reward itself.
        options: keyword arguments for the class.

    Raises:
        ConfigError: unknown name, failed import, no such attribute, not callable, or options that do not fit.
    """
    if name in BUILTIN:
        target = BUILTIN[name]
    else:
        target = _import(name)
    if isinstance(target, type):
        try:
            target = target(**options)
        except (Exception, SystemExit) as e:
            raise ConfigError(f"reward {name}: cannot be built with options {options}: {reason(e)}") from e
    elif options:
        raise ConfigError(f"reward {name}: takes no options because it is not a class, got {sorted(options)}")
    if not callable(target):
        raise ConfigError(f"reward {name}: expected a callable, got {type(target).__name__}")
    return target


def reason(error: BaseException) -> str:
    """An exception as one short line: its type and the beginning of its message."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message[:300]}" if message else type(error).__name__


def _import(name: str) -> object:
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise ConfigError(f"unknown reward {name!r}: expected one of {', '.join(BUILTIN)}, or your own as module:attr")
    try:
        with _current_folder_importable():
            module = importlib.import_module(module_name)
    except (Exception, SystemExit) as e:  # the user's module may do anything when it is imported
        raise ConfigError(f"reward {name}: cannot import {module_name}: {reason(e)}") from e
    try:
        return operator.attrgetter(attribute)(module)
    except AttributeError as e:
        where = getattr(module, "__file__", None) or "built in"
        raise ConfigError(f"reward {name}: module {module_name} ({where}) has no attribute {attribute}") from e


@contextlib.contextmanager
def _current_folder_importable() -> Iterator[None]:
    # Last, so that a folder named like an installed package (our own kernels/, say) does not hide that package.
    folder = os.getcwd()
    importlib.invalidate_caches()
    sys.path.append(folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            del sys.path[len(sys.path) - 1 - sys.path[::-1].index(folder)]
