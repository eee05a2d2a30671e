"""The parts of `sana-sprint-nano`, untrained, and the pipeline folder that they become.

Every feature of the 1.6B model is there: linear attention with q/k norm across heads, cross-attention to the states of
a Gemma-2, GLU convolutions, the guidance embedding, a deep-compression autoencoder, the trigflow scheduler. One image
of 64 x 64 pixels is 4 x 4 latents of 32 channels, so that the transformer sees 16 tokens.

All layers of the text encoder have sliding windows. The instruction that the pipeline puts before each prompt then
reaches a caption only with its last `LAYERS * (WINDOW - 1)` tokens, and training need not compute the others.
"""

import inspect
import json
import shutil
from functools import cache
from pathlib import Path

import torch
from diffusers import AutoencoderDC, SanaSprintPipeline, SanaTransformer2DModel, SCMScheduler
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizerFast

from esengine.models.nano.world import WORDS
from esengine.models.quiet import no_progress_bars
from esengine.models.tokenizer import SPECIAL
from esengine.models.tokenizer import save_tokenizer as learn_tokenizer

SIGMA_DATA = 0.5
LATENT = (32, 4, 4)
"""Channels, height and width of one image's latent."""
TEXT_WIDTH, LAYERS, WINDOW = 96, 2, 12
WIDTH, BLOCKS = 160, 6


@cache
def instruction() -> str:
    """What the pipeline's call puts before each prompt by default."""
    return "\n".join(inspect.signature(SanaSprintPipeline.__call__).parameters["complex_human_instruction"].default)


def save_tokenizer(path: Path) -> GemmaTokenizerFast:
    """A byte-fallback BPE in Gemma's form, in which each word of the world behind a space is one token.

    Args:
        path: Folder to write; one that is there is replaced.

    Returns:
        The tokenizer as transformers loads it from there.
    """
    corpus = [*(f" {word}" for word in WORDS for _ in range(1000)), instruction()]
    return learn_tokenizer(path, corpus)


def text_encoder(vocab_size: int) -> Gemma2Model:
    """An untrained Gemma-2 whose layers all attend to the last `WINDOW` tokens."""
    config = Gemma2Config(
        vocab_size=vocab_size,
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        query_pre_attn_scalar=24,
        sliding_window=WINDOW,
        layer_types=["sliding_attention"] * LAYERS,
        initializer_range=TEXT_WIDTH**-0.5,
        attn_implementation="eager",  # the one that has Gemma-2's soft cap
        pad_token_id=SPECIAL.index("<pad>"),
        eos_token_id=SPECIAL.index("<eos>"),
        bos_token_id=SPECIAL.index("<bos>"),
    )
    return Gemma2Model(config)


def autoencoder() -> AutoencoderDC:
    """An untrained autoencoder, 16 pixels to a latent. No block works at 64 x 64, where most of the time would go."""
    channels, layers = (32, 32, 64, 128, 128), (0, 1, 1, 1, 1)
    return AutoencoderDC(
        latent_channels=LATENT[0],
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        encoder_layers_per_block=layers,
        decoder_layers_per_block=layers,
        encoder_qkv_multiscales=((),) * len(channels),
        decoder_qkv_multiscales=((),) * len(channels),
        upsample_block_type="interpolate",
        scaling_factor=1.0,
    )


def transformer() -> SanaTransformer2DModel:
    """An untrained transformer. Its output starts at zero, so that training starts from the mean velocity."""
    model = SanaTransformer2DModel(
        in_channels=LATENT[0],
        out_channels=LATENT[0],
        num_attention_heads=WIDTH // 32,
        attention_head_dim=32,
        num_layers=BLOCKS,
        num_cross_attention_heads=4,
        cross_attention_head_dim=WIDTH // 4,
        cross_attention_dim=WIDTH,
        caption_channels=TEXT_WIDTH,
        mlp_ratio=2.5,
        attention_bias=False,
        sample_size=LATENT[1],
        patch_size=1,
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        interpolation_scale=1.0,  # positions are added to the tokens, as in SANA's 4K model: it learns places sooner
        guidance_embeds=True,
        guidance_embeds_scale=0.1,
        qk_norm="rms_norm_across_heads",
    )
    torch.nn.init.zeros_(model.proj_out.weight)
    torch.nn.init.zeros_(model.proj_out.bias)
    return model


def save_pipeline(
    path: Path, *, vae: AutoencoderDC, text_encoder: Gemma2Model, transformer: SanaTransformer2DModel
) -> None:
    """Writes the pipeline folder, safetensors; what is there of it is replaced.

    The transformer and the autoencoder are stored in float16, which diffusers reads as float32; the text encoder, which
    transformers would keep in the stored type, in float32.
    """
    path = Path(path)
    for part in ("tokenizer", "text_encoder", "transformer", "vae", "scheduler"):
        shutil.rmtree(path / part, ignore_errors=True)
    pipeline = SanaSprintPipeline(
        tokenizer=save_tokenizer(path / "tokenizer"),
        text_encoder=text_encoder.float(),
        vae=vae.to(torch.float16),
        transformer=transformer.to(torch.float16),
        scheduler=SCMScheduler(sigma_data=SIGMA_DATA),
    )
    with no_progress_bars():
        pipeline.save_pretrained(path, safe_serialization=True)
    for weights in path.rglob("*.safetensors"):  # written for their owner alone
        weights.chmod(0o644)
    # transformers 5 drops "Fast" from the name; 4.57 would then look for a sentencepiece file
    save_tokenizer(path / "tokenizer")
    index = json.loads((path / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "GemmaTokenizerFast"]
    (path / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
