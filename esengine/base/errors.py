"""Errors a user can act on. The command line prints each as one line and leaves with a code that is not 0."""

from collections.abc import Iterator
from contextlib import contextmanager


class EsengineError(Exception):
    """Base of the errors below."""


class ConfigError(EsengineError):
    """A setting, file or flag is not usable. No ValueError, which flag parsers catch and explain in their own words.

    Attributes:
        setting: what is not usable, with which the message begins: `es.sigma`, `config run.yaml`.
        problem: the rest of the message.
    """

    def __init__(self, message: str):
        super().__init__(message)
        self.setting, _, self.problem = message.partition(": ")


@contextmanager
def of_setting(name: str, *others: str) -> Iterator[None]:
    """A ConfigError inside begins with the name of this setting, such as `es.sigma`, or of one of the others."""
    try:
        yield
    except ConfigError as error:
        if error.setting in (name, *others):
            raise
        raise ConfigError(f"{name}: {error}") from error


class RewardError(EsengineError):
    """A reward raised, or returned something that is not a finite float32 score per image."""


class RenderError(EsengineError):
    """A member's image is not finite, or does not fit into memory."""


class UnperturbedError(EsengineError):
    """Layers that should have been perturbed were not: every member computed the same there.

    Attributes:
        layers: the reason for each layer, by its name.
    """

    def __init__(self, layers: dict[str, str]):
        self.layers = dict(layers)
        name, why = next(iter(self.layers.items()))
        more = f" (and {len(self.layers) - 1} more, such as '{list(self.layers)[1]}')" if len(self.layers) > 1 else ""
        super().__init__(
            f"perturbed: target '{name}'{more} had no noise: {why}. Have it called, or leave it out by exclude_modules"
        )


class OutOfMemory(RenderError):
    """So many images, or an update, do not fit into memory at once."""


class UpdateError(EsengineError):
    """An update would make the adapter not finite; it was not made."""


class Stopped(EsengineError):
    """A run was asked to end, and can be resumed."""


class RunError(EsengineError):
    """A run folder or a checkpoint cannot be used."""
