"""Rewards from the cosine between a CLIP's text and image features.

    cos = <T, I> / (|T| |I|), in fp32 for any dtype of the model

Rewards with the same encoder share its image pass, see `esengine.rewards.base.FeatureReward`.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch

from esengine.base.errors import ConfigError
from esengine.models.text_limits import Cut
from esengine.rewards.encoder import ClipEncoder
from esengine.rewards.loading import has_processor

CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
CLIP_B = "openai/clip-vit-base-patch32"


class ClipScore:
    """Scores each image's features against those of its prompt, or of one fixed text.

    Args:
        encoder: the CLIP.
    """

    model: str | None
    """Hub id of the default weights."""
    processor: str
    """Hub id of the tokenizer and preprocessor for models that have none."""
    text: str | None = None
    """Text that every image is compared with. None: its prompt."""
    reads_only = True

    def __init__(self, encoder: ClipEncoder):
        self.encoder = encoder
        self._text = None if self.text is None else encoder.text_features([self.text])  # float32 [1, D]

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device = "cpu",
        batch: int = 32,
        encoders: dict[tuple, ClipEncoder] | None = None,
    ) -> "ClipScore":
        """Build the score on a CLIPModel with safetensors weights.

        Args:
            model: a folder, a hub id, or `nano` for clip-nano. Its own tokenizer and preprocessor config are used if it
                has both.
            revision: commit, branch or tag of a hub id. Default: main, or the commit in `loading.CONVERTED`.
            dtype: float32, bfloat16 or float16. Default: float32 on a CPU, bfloat16 elsewhere.
            batch: images in one call of the image tower.
            encoders: encoders already loaded, by their settings. A new one is added.

        Raises:
            ConfigError: see `ClipEncoder.from_pretrained`.
        """
        model = cls.model if model is None else model
        if model is None:
            raise ConfigError(
                "model: expected a folder or hub id of a CLIPModel with safetensors weights, got none; "
                "python -m esengine.rewards.convert_hpsv2 HPS_v2.1_compressed.pt FOLDER makes one from xswu/HPSv2"
            )
        model = os.fspath(model) if isinstance(model, os.PathLike) else model
        encoders = {} if encoders is None else encoders
        processor = None if model != cls.model and has_processor(model, revision) else cls.processor
        key = (model, revision, processor, str(dtype), str(device), batch)
        if key not in encoders:
            encoders[key] = ClipEncoder.from_pretrained(
                model, processor=processor, revision=revision, dtype=dtype, device=device, batch=batch
            )
        return cls(encoders[key])

    def __call__(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Score images, uint8 [B, 3, H, W] on any device. Returns float32 [B] on the model's device."""
        return self.score_features(self.encoder.image_features(images), prompts)

    def score_features(self, features: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Score unit image features, float32 [B, D]. Returns float32 [B].

        Raises:
            ValueError: the number of prompts differs from B.
        """
        if len(prompts) != len(features):
            raise ValueError(f"prompts: expected {len(features)}, one for each image, got {len(prompts)}")
        texts = self.encoder.text_features(prompts) if self._text is None else self._text
        return self.from_cosine((features * texts).sum(-1))

    def from_cosine(self, cosine: torch.Tensor) -> torch.Tensor:
        """The score, float32 [B], from cosines, float32 [B]."""
        raise NotImplementedError

    def cut_prompts(self, prompts: Sequence[str]) -> Cut | None:
        """How many of the prompts the text tower cuts. None: none, or the prompts do not matter."""
        return self.encoder.cut_texts(prompts) if self.text is None else None

    def settings(self) -> dict[str, Any]:
        """What was loaded: model, its commit or the fingerprint of its folder, and dtype."""
        return dict(self.encoder.identity)


class PickScore(ClipScore):
    """exp(logit_scale) cos(text, image).

    Source: Kirstain et al., "Pick-a-Pic", arXiv 2305.01569, eq. 1.
    """

    model, processor = "yuvalkirstain/PickScore_v1", CLIP_H

    def from_cosine(self, cosine: torch.Tensor) -> torch.Tensor:
        return self.encoder.scale * cosine


class HPSv2(ClipScore):
    """cos(text, image) of a Human Preference Score v2 or v2.1.

    The authors publish pickles, which are not read here. `esengine.rewards.convert_hpsv2` converts them to a folder.

    Source: Wu et al., "Human Preference Score v2", arXiv 2306.09341. Scores differ from theirs in two ways. Their
    resize keeps floats, while this one rounds to levels as Pillow does. Theirs pads an image that is not square, while
    this one crops it to its centre.
    """

    model, processor = None, CLIP_H

    def from_cosine(self, cosine: torch.Tensor) -> torch.Tensor:
        return cosine


class ClipText(ClipScore):
    """(cos(image, prompt) + 1) / 2."""

    model, processor = CLIP_B, CLIP_B

    def from_cosine(self, cosine: torch.Tensor) -> torch.Tensor:
        return (cosine + 1) / 2


class Aesthetic(ClipText):
    """(cos(image, text) + 1) / 2 with a text that describes a good image."""

    text = "a high quality, professional, beautiful, aesthetically pleasing image"


class NoArtifacts(ClipText):
    """1 - (cos(image, text) + 1) / 2 with a text that names flaws. Its trailing space is part of the definition."""

    text = "blurry, low resolution, noisy, pixelated, washed out colors, oversaturated "

    def from_cosine(self, cosine: torch.Tensor) -> torch.Tensor:
        return 1 - super().from_cosine(cosine)
