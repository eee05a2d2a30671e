"""Black-box rewards: the protocol, the built-in ones, and how several combine."""

from esengine.rewards.jpeg import JpegCompressibility, JpegIncompressibility
from esengine.rewards.registry import BUILTIN, Reward, load
from esengine.rewards.weighted import Weighted, checked, parse

__all__ = [
    "BUILTIN",
    "JpegCompressibility",
    "JpegIncompressibility",
    "Reward",
    "Weighted",
    "checked",
    "load",
    "parse",
]
