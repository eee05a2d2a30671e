"""PickScore's formula on a CLIP tower, for the suite: text features once, images resized on their device, batched.

    score(image, prompt) = exp(logit_scale) <I / |I|, T / |T|>

Source: Kirstain et al., "Pick-a-Pic" (arXiv 2305.01569), eq. 1.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import CLIPModel

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class Scorer:
    """A reward as `esengine.rewards` has it: uint8 [B, 3, H, W] and B prompts -> float32 [B].

    Args:
        clip: both towers; the text tower is used here and never again.
        prompts: all that will be asked for. Their token ids are made up: there is no tokenizer.
        chunk: images in one call of the image tower.
        seed: of the token ids.
    """

    def __init__(self, clip: CLIPModel, prompts: Sequence[str], *, chunk: int = 64, seed: int = 0):
        self.clip, self.chunk, self.place = clip, chunk, {prompt: i for i, prompt in enumerate(prompts)}
        text = clip.config.text_config
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, text.vocab_size - 1, (len(prompts), 16), generator=generator)
        ids[:, -1] = text.eos_token_id if text.eos_token_id < text.vocab_size else text.vocab_size - 1
        with torch.no_grad():
            features = clip.get_text_features(ids.to(clip.device)).pooler_output
        self.text_pd = F.normalize(features.float(), dim=-1)  # [P, D]
        self.mean, self.std = (
            torch.tensor(values, device=clip.device).view(1, 3, 1, 1) * 255 for values in (MEAN, STD)
        )

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """float32 [B], higher is better."""
        text_bd = self.text_pd[torch.tensor([self.place[prompt] for prompt in prompts]).to(self.text_pd.device)]
        image_bd = torch.cat([self._features(part) for part in images.split(self.chunk)])
        return self.clip.logit_scale.float().exp() * (F.normalize(image_bd, dim=-1) * text_bd).sum(-1)

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        """float32 [B, D]. Resized in fp32 and rounded back to levels: CUDA has no antialiased resize of bytes."""
        size = self.clip.config.vision_config.image_size
        levels = F.interpolate(images.float(), (size, size), mode="bicubic", antialias=True).round().clamp(0, 255)
        pixels = ((levels - self.mean) / self.std).to(self.clip.dtype)
        return self.clip.get_image_features(pixels).pooler_output.float()
