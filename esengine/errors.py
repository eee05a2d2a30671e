"""Errors a user can act on. The command line prints each as one line and leaves with a code that is not 0."""


class EsengineError(Exception):
    """Base of the errors below."""


class ConfigError(EsengineError):
    """A setting, file or flag is not usable. No ValueError, which flag parsers catch and explain in their own words."""


class RewardError(EsengineError):
    """A reward raised, or returned something that is not a finite float32 score per image."""


class RenderError(EsengineError):
    """A member's image is not finite, or does not fit into memory."""


class OutOfMemory(RenderError):
    """So many images, or an update, do not fit into memory at once."""


class UpdateError(EsengineError):
    """An update would make the adapter not finite; it was not made."""


class Stopped(EsengineError):
    """A run was asked to end, and can be resumed."""


class RunError(EsengineError):
    """A run folder or a checkpoint cannot be used."""
