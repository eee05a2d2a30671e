"""The PickScore reward on a stand-in CLIP, for the suite: real computation, random token ids."""

from collections.abc import Sequence

import torch
from transformers import CLIPModel

from esengine.rewards import ClipEncoder, PickScore, Preprocess

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
TOKENS = 16


class Scorer(PickScore):
    """`esengine.rewards.PickScore`: uint8 [B, 3, H, W] and B prompts -> float32 [B].

    Args:
        clip: both towers.
        prompts: all that will be asked for; encoded here, so the text tower is never used again.
        chunk: images in one call of the image tower.
        seed: of the token ids, which stand in for a tokenizer's.
    """

    def __init__(self, clip: CLIPModel, prompts: Sequence[str], *, chunk: int = 64, seed: int = 0):
        text, size = clip.config.text_config, clip.config.vision_config.image_size
        ids = torch.randint(
            3, text.vocab_size - 1, (len(prompts), TOKENS), generator=torch.Generator().manual_seed(seed)
        )
        ids[:, -1] = min(text.eos_token_id, text.vocab_size - 1)
        place = {prompt: i for i, prompt in enumerate(prompts)}
        super().__init__(
            ClipEncoder(
                clip,
                lambda prompt: ids[place[prompt], None],
                Preprocess((size, size), None, MEAN, STD),
                batch=chunk,
            )
        )
        self.encoder.text_features(prompts)
