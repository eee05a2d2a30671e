"""Errors a user can act on. The command line prints each as one line and exits with a nonzero code."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from esengine.base.printable import printable, without_secrets


class EsengineError(Exception):
    """Base of the errors below. The message has no control codes and no secrets of URLs, wherever it comes from."""

    def __init__(self, message: str = ""):
        super().__init__(_safe(message))


class ConfigError(EsengineError):
    """A setting, file or flag is not usable. It is not a ValueError, because flag parsers catch and reword those.

    Attributes:
        setting: what is not usable: `es.sigma`, or `prompts file p.txt`. Without the argument it is the text before the
            first colon of `problem`.
        problem: what was expected, and what came.
        others: further settings that the problem depends on.
        source: the file that has the setting, as `config run.yaml`; None if no file has it or it is not known.
    """

    def __init__(
        self, problem: str, *, setting: str | None = None, others: Sequence[str] = (), source: str | None = None
    ):
        if setting is None:
            setting, _, problem = problem.partition(": ")
        setting, problem, source = _safe(setting), _safe(problem), source and _safe(source)
        self.setting, self.problem, self.others, self.source = setting, problem, tuple(others), source
        super().__init__(": ".join(part for part in (source, setting, problem) if part))


def _safe(message: object) -> str:
    return printable(without_secrets(str(message)))


@contextmanager
def of_setting(name: str, *others: str) -> Iterator[None]:
    """Attribute a ConfigError to the setting `name`, such as `es.sigma`, unless it is of `name` or one of the others.

    The message then begins with `name`.
    """
    try:
        yield
    except ConfigError as error:
        if error.setting in (name, *others):
            raise
        raise ConfigError(str(error), setting=name) from error


class RewardError(EsengineError):
    """A reward raised, or did not return one finite float32 score per image.

    Attributes:
        reward: the reward's name; None if it is not known.
        step: the step; None outside a run.
        images: the members that drew the images at fault, each once; without members the images' places in the batch.
        prompt: the prompt of the first of them; None if it is not known.
    """

    def __init__(
        self,
        message: str,
        *,
        reward: str | None = None,
        step: int | None = None,
        images: Sequence[int] = (),
        prompt: str | None = None,
    ):
        self.reward, self.step, self.images, self.prompt = reward, step, tuple(images), prompt
        super().__init__(message)


class RenderError(EsengineError):
    """A member's image is not finite, or does not fit into memory."""


class UnperturbedError(EsengineError):
    """Layers that should have been perturbed were not, so every member computed the same there.

    Attributes:
        layers: the reason for each layer, by layer name.
    """

    def __init__(self, layers: dict[str, str]):
        self.layers = dict(layers)
        name, why = next(iter(self.layers.items()))
        more = f" (and {len(self.layers) - 1} more, such as '{list(self.layers)[1]}')" if len(self.layers) > 1 else ""
        super().__init__(
            f"perturbed: target '{name}'{more} had no noise: {why}. Have it called, or leave it out by exclude_modules"
        )


class OutOfMemory(RenderError):
    """A batch of images or an update does not fit into memory."""


class UpdateError(EsengineError):
    """An update would make the adapter not finite. It was not applied.

    Attributes:
        norms: the norms that were found, by name; one of them is not finite.
    """

    def __init__(self, message: str, norms: dict[str, float]):
        self.norms = dict(norms)
        super().__init__(message)


class Stopped(EsengineError):
    """A run was stopped on request. It can be resumed."""


class RunError(EsengineError):
    """A run folder or a checkpoint cannot be used.

    Attributes:
        path: the folder or file; None if the error is of no file.
        step: the step; None if the error is of no step.
    """

    def __init__(self, message: str, *, path: Path | None = None, step: int | None = None):
        self.path, self.step = path, step
        super().__init__(message)
