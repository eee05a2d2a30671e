"""The CLIP encoder of rewards: image features in bounded batches, text features once for each prompt."""

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from esengine.base.errors import ConfigError
from esengine.base.transfer import upload
from esengine.models.text_limits import Cut
from esengine.rewards.loading import Tokenize, fingerprint, load_model, load_preprocess, load_tokenizer, locate

if TYPE_CHECKING:
    from transformers import CLIPModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PROMPTS_KEPT = 8192


class ClipEncoder:
    """Unit features of images and texts, float32 for any dtype of the model.

    Args:
        clip: transformers' CLIPModel, on its device and in its dtype, in eval mode.
        tokenize: one text to its token ids, int64 [1, T]. A `loading.Tokenize` can also count cut texts.
        preprocess: uint8 [B, 3, H, W] to pixel values.
        logit_scale: logarithm of the model's scale. Default: the model's parameter, in its current precision.
        batch: images in one call of the image tower.
        identity: what was loaded, for a result's record.

    A text is encoded alone and unpadded, so its features do not depend on other texts. The last `PROMPTS_KEPT` texts
    are cached. In fp32 a cosine changes with `batch` by at most 1e-6 in our tests.
    """

    def __init__(
        self,
        clip: "CLIPModel",
        tokenize: Callable[[str], torch.Tensor],
        preprocess: Callable[[torch.Tensor], torch.Tensor],
        *,
        logit_scale: float | None = None,
        batch: int = 32,
        identity: dict[str, Any] | None = None,
    ):
        self.clip, self.tokenize, self.preprocess, self.batch = clip, tokenize, preprocess, batch
        self.identity = dict(identity or {})
        scale = clip.logit_scale.detach().float() if logit_scale is None else torch.tensor(logit_scale)
        self.scale = scale.exp().item()
        self._texts: dict[str, torch.Tensor] = {}  # least recently used first

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        *,
        processor: str | None = None,
        revision: str | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device = "cpu",
        batch: int = 32,
    ) -> "ClipEncoder":
        """Load a CLIPModel from safetensors; no other file is executed or unpickled.

        Args:
            model: a folder or a hub id.
            processor: folder or hub id of the tokenizer and the preprocessor config. None: the model's own.
            revision: commit, branch or tag of a hub id. Default: main, or the commit in `loading.CONVERTED`.
            dtype: a key of `DTYPES`. Default: float32 on a CPU, bfloat16 elsewhere.
            batch: images in one call of the image tower.

        Raises:
            ConfigError: an argument that cannot be used, or no complete model or processor of that name.
        """
        device = pick_device(device)
        dtype = pick_dtype(dtype, device)
        if type(batch) is not int or batch < 1:
            raise ConfigError(f"batch: expected an int of at least 1, got {batch!r}")
        identity = {"model": str(model), "dtype": str(dtype).removeprefix("torch.")}
        identity |= {} if processor is None else {"processor": processor}
        model = locate(model, revision)
        clip, commit = load_model(model, revision)
        source = (model, revision) if processor is None else (processor, None)
        preprocess, tokenize = load_preprocess(*source), load_tokenizer(*source, clip.config.text_config)
        edge = clip.config.vision_config.image_size
        if preprocess.shape != (edge, edge):
            raise ConfigError(f"model: {model} takes images of {edge} x {edge}, its processor makes {preprocess.shape}")
        identity |= {"fingerprint": fingerprint(model)} if commit is None else {"commit": commit}
        logit_scale = float(clip.logit_scale.detach())  # before it is rounded: bfloat16 would turn 100 into 98.9
        clip = clip.to(device=device, dtype=dtype).eval().requires_grad_(False)
        return cls(clip, tokenize, preprocess, logit_scale=logit_scale, batch=batch, identity=identity)

    @property
    def device(self) -> torch.device:
        """The device of the CLIP."""
        return self.clip.logit_scale.device

    @torch.no_grad()
    def image_features(self, images: torch.Tensor) -> torch.Tensor:
        """Unit features of images, uint8 [B, 3, H, W] on any device. Returns float32 [B, D] on the model's device.

        Raises:
            ValueError: images have another dtype or shape.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
            got = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
            raise ValueError(f"images: expected uint8 [B, 3, H, W], got {got}")
        if not len(images):
            return torch.empty(0, self.clip.config.projection_dim, device=self.device)
        dtype = self.clip.logit_scale.dtype
        pixels = (self.preprocess(part.to(self.device)).to(dtype) for part in images.split(self.batch))
        return torch.cat([_unit(self.clip.get_image_features(pixel_values=part)) for part in pixels])

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> torch.Tensor:
        """Unit features of T texts, float32 [T, D]. A text that is not cached costs one pass."""
        if not len(texts):
            return torch.empty(0, self.clip.config.projection_dim, device=self.device)
        distinct = list(dict.fromkeys(texts))
        found = [self._text(text) for text in distinct]
        while len(self._texts) > PROMPTS_KEPT:
            del self._texts[next(iter(self._texts))]
        place = {text: i for i, text in enumerate(distinct)}
        return torch.stack(found)[upload(torch.tensor([place[text] for text in texts]), self.device)]

    def cut_texts(self, texts: Sequence[str]) -> Cut | None:
        """How many of the texts are longer than the text tower reads. None: none of them, or it is not known."""
        if not isinstance(self.tokenize, Tokenize):
            return None
        cut = {text: self.tokenize.cuts(text) for text in dict.fromkeys(texts)}
        count = sum(cut[text] for text in texts)
        return Cut(count, len(texts), self.tokenize.length) if count else None

    def _text(self, text: str) -> torch.Tensor:
        feature = self._texts.pop(text, None)
        if feature is None:
            feature = _unit(self.clip.get_text_features(input_ids=self.tokenize(text).to(self.device)))[0]
        self._texts[text] = feature
        return feature


def _unit(features: Any) -> torch.Tensor:
    """Features as float32 of length 1. transformers 5 wraps them in an output object; transformers 4 does not."""
    return F.normalize(getattr(features, "pooler_output", features).float(), dim=-1)


def pick_device(device: str | torch.device) -> torch.device:
    """A reward's device. Raises ConfigError if it is not there."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as e:
        raise ConfigError(f"device: cannot use {device!r}: {str(e).splitlines()[0] if str(e) else 'not there'}") from e


def pick_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """A reward's dtype. None: float32 on a CPU, bfloat16 elsewhere. Raises ConfigError for a name not in `DTYPES`."""
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    found = DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ConfigError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype}")
    return found
