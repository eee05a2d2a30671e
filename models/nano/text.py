"""Captions to the states that the pipeline would compute for them, without its long instruction in front.

The pipeline encodes `<bos> instruction caption` and keeps `<bos>` and what follows the instruction. All windows slide,
so a kept state depends on the last `LAYERS * (WINDOW - 1)` tokens of the instruction and on none before them.
"""

from collections.abc import Sequence

import torch
from transformers import Gemma2Model, PreTrainedTokenizerBase

from esengine.models.nano.build import LAYERS, WINDOW, instruction


class Captions:
    """Token ids of captions, ready to be encoded in batches.

    Args:
        tokenizer: The pipeline's.
        captions: N of them; "" is what guidance calls no caption.

    Attributes:
        ids_nl: int64 [N, L], padded on the right.
        mask_nl: bool [N, L], False in the padding.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, captions: Sequence[str]):
        # the instruction's last space belongs to the caption's first word
        lead = tokenizer(instruction().rstrip(" ")).input_ids
        self._lead = torch.tensor([lead[0], *lead[-LAYERS * (WINDOW - 1) :]])
        rows = tokenizer([f" {caption.lower().strip()}" for caption in captions], add_special_tokens=False).input_ids
        lengths = torch.tensor([len(row) for row in rows])
        self.mask_nl = torch.arange(int(lengths.max())) < lengths[:, None]
        self.ids_nl = torch.full(self.mask_nl.shape, tokenizer.pad_token_id)
        self.ids_nl[self.mask_nl] = torch.tensor([token for row in rows for token in row])

    def __len__(self) -> int:
        return len(self.ids_nl)

    def encode(self, text_encoder: Gemma2Model, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """States of the captions `rows` int64 [B], as long as the longest of them and <bos>.

        Returns:
            float32 [B, 1 + L, C] and the attention mask bool [B, 1 + L].
        """
        mask_bl = self.mask_nl[rows]
        length = int(mask_bl.sum(1).max())
        mask_bl, ids_bl = mask_bl[:, :length], self.ids_nl[rows, :length]
        lead_bl = self._lead.expand(len(rows), -1)
        before = torch.ones_like(lead_bl, dtype=torch.bool)
        states = text_encoder(torch.cat([lead_bl, ids_bl], 1), attention_mask=torch.cat([before, mask_bl], 1).long())[0]
        states = torch.cat([states[:, :1], states[:, lead_bl.shape[1] :]], 1)
        return states, torch.cat([before[:, :1], mask_bl], 1)
