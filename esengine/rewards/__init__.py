"""Black-box rewards: the protocol, the built-in rewards, and their weighted sum."""

from esengine.rewards.base import Encoder, FeatureReward, Reward
from esengine.rewards.clip import Aesthetic, ClipScore, ClipText, HPSv2, NoArtifacts, PickScore
from esengine.rewards.encoder import ClipEncoder
from esengine.rewards.jpeg import JpegCompressibility, JpegIncompressibility
from esengine.rewards.preprocess import Preprocess
from esengine.rewards.registry import BUILTIN, load, parse
from esengine.rewards.remote import Remote
from esengine.rewards.spec import COMBINED
from esengine.rewards.vqa import Vqa
from esengine.rewards.weighted import Weighted, checked

__all__ = [
    "BUILTIN",
    "COMBINED",
    "Aesthetic",
    "ClipEncoder",
    "ClipScore",
    "ClipText",
    "Encoder",
    "FeatureReward",
    "HPSv2",
    "JpegCompressibility",
    "JpegIncompressibility",
    "NoArtifacts",
    "PickScore",
    "Preprocess",
    "Remote",
    "Reward",
    "Vqa",
    "Weighted",
    "checked",
    "load",
    "parse",
]
