"""What a reward is."""

from typing import Any, Protocol, runtime_checkable

import torch

from esengine.errors import EsengineError


class Reward(Protocol):
    """Any callable that scores finished images; higher is better. It sees no gradient and needs none.

    Optional attributes: `settings()`, a dict for the record of a result; `reads_only = True`, a promise never to write
    into `images`, for which it is given the batch itself and not a copy; `overlaps = True` for one that mostly waits,
    as for a service: in training it is asked from a thread of its own while the next chunk renders.
    """

    def __call__(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Score images, uint8 [B, 3, H, W], each drawn from the prompt beside it. Returns finite float32 [B]."""
        ...


class Encoder(Protocol):
    """What turns images into features, once for all rewards that hold the same one."""

    def image_features(self, images: torch.Tensor) -> torch.Tensor:
        """Features of images, uint8 [B, 3, H, W], which are not to be written into. Returns [B, D]."""
        ...


@runtime_checkable
class FeatureReward(Protocol):
    """A reward that scores an encoder's features. `Weighted.score` makes one image pass for each distinct encoder."""

    encoder: Encoder

    def score_features(self, features: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Score what `encoder.image_features` returned, [B, D]. Returns finite float32 [B]."""
        ...

    def __call__(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """As a reward on its own."""
        ...


def settings_of(reward: Reward) -> dict[str, Any]:
    """What a reward says of itself, or nothing."""
    settings = getattr(reward, "settings", None)
    return dict(settings()) if callable(settings) else {}


def plain(what: object) -> str:
    """Somebody else's text for a terminal: on one line, and without what would steer it."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(str(what).split()))


def reason(error: BaseException) -> str:
    """An exception as one short line: its type, unless it is ours, and the beginning of its message."""
    try:
        message = plain(error)[:300]
    except Exception:  # its own __str__ raises
        message = ""
    if isinstance(error, EsengineError) and message:
        return message
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
