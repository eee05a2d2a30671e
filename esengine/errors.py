"""Errors a user can act on. The command line prints each as one line and leaves with a code that is not 0."""


class EsengineError(Exception):
    """Base of the errors below."""


class ConfigError(EsengineError, ValueError):
    """A setting, file or flag is not usable."""


class RewardError(EsengineError, RuntimeError):
    """A reward raised, or returned something that is not a finite float32 score per image."""


class RunError(EsengineError, RuntimeError):
    """A run folder or a checkpoint cannot be used."""
