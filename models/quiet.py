"""Turns off the loading bars of diffusers and transformers."""

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Turn off loading bars inside the block. Afterwards those that were on are on again."""
    loggers = [each for each in (diffusers_logging, transformers_logging) if each.is_progress_bar_enabled()]
    for each in loggers:
        each.disable_progress_bar()
    try:
        yield
    finally:
        for each in loggers:
            each.enable_progress_bar()
