"""SANA-Sprint 1.6B, DC-AE f32c32 and CLIP-H/14 with random weights: speed without a download.

The shapes are those of the published configurations and the time of a forward does not depend on the weights, which
are drawn on the device in the dtype they are used in. `scale="tiny"` gives the same objects at toy size for a CPU.

Source: the config.json of Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers (transformer), of
mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers (vae) and of laion/CLIP-ViT-H-14-laion2B-s32B-b79K, the tower of PickScore;
of openai/clip-vit-base-patch32, which the published run scores with too.
DC-AE-Lite from its authors' definition of dc-ae-lite-f32c32-sana-1.1 (dc-ai-projects/DC-Gen), in diffusers' terms.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, SanaSprintPipeline, SanaTransformer2DModel, SCMScheduler
from transformers import CLIPConfig, CLIPModel

from esengine.models import SanaSprint, TextEmbeddings

RES, EVIT = "ResBlock", "EfficientViTBlock"

FULL: dict[str, dict[str, Any]] = {
    "transformer": dict(
        in_channels=32,
        out_channels=32,
        num_attention_heads=70,
        attention_head_dim=32,
        num_layers=20,
        num_cross_attention_heads=20,
        cross_attention_head_dim=112,
        cross_attention_dim=2240,
        caption_channels=2304,
        mlp_ratio=2.5,
        dropout=0.0,
        attention_bias=False,
        sample_size=32,
        patch_size=1,
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        interpolation_scale=None,
        guidance_embeds=True,
        guidance_embeds_scale=0.1,
        qk_norm="rms_norm_across_heads",
        timestep_scale=1.0,
    ),
    "vae": dict(
        in_channels=3,
        latent_channels=32,
        attention_head_dim=32,
        encoder_block_types=(RES, RES, RES, EVIT, EVIT, EVIT),
        decoder_block_types=(RES, RES, RES, EVIT, EVIT, EVIT),
        encoder_block_out_channels=(128, 256, 512, 512, 1024, 1024),
        decoder_block_out_channels=(128, 256, 512, 512, 1024, 1024),
        encoder_layers_per_block=(2, 2, 2, 3, 3, 3),
        decoder_layers_per_block=(3, 3, 3, 3, 3, 3),
        encoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)),
        decoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)),
        upsample_block_type="interpolate",
        downsample_block_type="conv",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        encoder_out_shortcut=True,
        decoder_in_shortcut=True,
        scaling_factor=0.41407,
    ),
    "clip": dict(
        projection_dim=1024,
        logit_scale_init_value=2.6592,
        text_config=dict(
            vocab_size=49408,
            max_position_embeddings=77,
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            hidden_act="gelu",
            projection_dim=1024,
        ),
        vision_config=dict(
            image_size=224,
            patch_size=14,
            hidden_size=1280,
            intermediate_size=5120,
            num_hidden_layers=32,
            num_attention_heads=16,
            hidden_act="gelu",
            projection_dim=1024,
        ),
    ),
}

TINY: dict[str, dict[str, Any]] = {
    "transformer": FULL["transformer"]
    | dict(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=32,
        cross_attention_dim=64,
        caption_channels=48,
        sample_size=8,
    ),
    "vae": FULL["vae"]
    | dict(
        latent_channels=8,
        attention_head_dim=16,
        encoder_block_types=(RES, RES, EVIT),
        decoder_block_types=(RES, RES, EVIT),
        encoder_block_out_channels=(16, 16, 16),
        decoder_block_out_channels=(16, 16, 16),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
    ),
    "clip": dict(
        projection_dim=32,
        logit_scale_init_value=2.6592,
        text_config=dict(
            vocab_size=64,
            max_position_embeddings=77,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            hidden_act="gelu",
            projection_dim=32,
        ),
        vision_config=dict(
            image_size=32,
            patch_size=8,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            hidden_act="gelu",
            projection_dim=32,
        ),
    ),
}

FULL["vae-lite"] = FULL["vae"] | dict(
    decoder_block_types=(RES,) * 6,
    decoder_layers_per_block=(0, 3, 5, 4, 4, 4),
    decoder_qkv_multiscales=((),) * 6,
    upsample_block_type="pixel_shuffle",
    decoder_conv_act_fn="silu",
)
FULL["clip-small"] = dict(
    projection_dim=512,
    logit_scale_init_value=2.6592,
    text_config=dict(
        vocab_size=49408,
        max_position_embeddings=77,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=8,
        hidden_act="quick_gelu",
        projection_dim=512,
    ),
    vision_config=dict(
        image_size=224,
        patch_size=32,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        hidden_act="quick_gelu",
        projection_dim=512,
    ),
)
TINY["clip-small"] = TINY["clip"]
TINY["vae-lite"] = TINY["vae"] | dict(
    decoder_block_types=(RES,) * 3,
    decoder_layers_per_block=(0, 1, 1),
    decoder_qkv_multiscales=((),) * 3,
    upsample_block_type="pixel_shuffle",
    decoder_conv_act_fn="silu",
)
CONFIGS = {"full": FULL, "tiny": TINY}
LENGTHS = 4
"""Different numbers of tokens that made-up prompts have."""

CONTRAST = 0.45
"""Standard deviation of a decoded channel in [-1, 1]: the images use the range of a byte and clip little."""


def transformer(
    scale: str = "full", *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> SanaTransformer2DModel:
    """SANA-Sprint's transformer, 1.61 B parameters at full scale. `device="meta"` makes one without storage."""
    return _build(SanaTransformer2DModel, _config(scale)["transformer"], device, dtype, seed)


def autoencoder(
    scale: str = "full",
    *,
    lite: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> AutoencoderDC:
    """DC-AE f32c32, 312 M parameters at full scale, or DC-AE-Lite; its last convolution is scaled to `CONTRAST`."""
    vae = _build(AutoencoderDC, _config(scale)["vae-lite" if lite else "vae"], device, dtype, seed)
    if torch.device(device).type != "meta":
        _set_contrast(vae, seed)
    return vae


def clip(
    scale: str = "full",
    *,
    small: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> CLIPModel:
    """CLIP-H/14 with both towers, 986 M parameters at full scale; or CLIP B/32, 151 M."""
    config = _config(scale)["clip-small" if small else "clip"]
    return _build(lambda **config: CLIPModel(CLIPConfig(**config)), config, device, dtype, seed)


def sana_sprint(
    scale: str = "full", *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> SanaSprint:
    """Transformer, decoder and SCM scheduler as `esengine.models.SanaSprint`, to render, decode and train with.

    It has no text encoder. So `SanaSprint.encode` fails, and `text_embeddings` replaces it.

    Args:
        scale: `full` or `tiny`.
        device: device on which the weights are drawn.
        dtype: dtype of the weights.
        seed: seed of the weights. The global generators do not change.

    Raises:
        ValueError: there is no such scale.
    """
    parts = dict(device=device, dtype=dtype)
    pipeline = SanaSprintPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=autoencoder(scale, **parts, seed=seed + 1),
        transformer=transformer(scale, **parts, seed=seed),
        scheduler=SCMScheduler(),
    )
    identity = {"model": f"stand-in-{scale}", "commit": f"seed-{seed}"}
    return SanaSprint(pipeline, source=Path(f"stand-in-{scale}"), identity=identity)


def text_embeddings(
    scale: str = "full", *, prompts: int = 8, tokens: int = 40, dtype: torch.dtype = torch.float32, seed: int = 0
) -> TextEmbeddings:
    """Random embeddings of `prompts` prompts: tokens, tokens - 1, ... of them, `LENGTHS` lengths in turn.

    A prompt takes about 40 of the 300 tokens that the pipeline pads to.
    """
    if prompts < 1 or tokens < LENGTHS:
        raise ValueError(f"prompts, tokens: expected at least 1 and {LENGTHS}, got {prompts} and {tokens}")
    width, generator = _config(scale)["transformer"]["caption_channels"], torch.Generator().manual_seed(seed)
    embeddings = [torch.randn(tokens - i % LENGTHS, width, generator=generator).to(dtype) for i in range(prompts)]
    return TextEmbeddings([f"made-up prompt {i}" for i in range(prompts)], embeddings)


def _config(scale: str) -> dict[str, dict[str, Any]]:
    if scale not in CONFIGS:
        raise ValueError(f"scale: expected one of {', '.join(CONFIGS)}, got {scale!r}")
    return CONFIGS[scale]


def _build(make, config: dict[str, Any], device: torch.device | str, dtype: torch.dtype, seed: int):
    """The module with the initialisation of its class, frozen. No copy on another device or of another dtype."""
    with _drawing(device, dtype, seed):
        return make(**config).eval().requires_grad_(False)


@contextmanager
def _drawing(device: torch.device | str, dtype: torch.dtype, seed: int) -> Iterator[None]:
    """Inside, new tensors are on `device` in `dtype` and follow `seed`. Afterwards all is as before."""
    device, before = torch.device(device), torch.get_default_dtype()
    devices = [torch.cuda.current_device() if device.index is None else device.index] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


@torch.no_grad()
def _set_contrast(vae: AutoencoderDC, seed: int) -> None:
    """Shift and scale each channel of the decoded images of random latents to mean 0 and deviation `CONTRAST`."""
    last = vae.decoder.conv_out
    last = getattr(last, "conv", last)  # DC-AE-Lite's makes four pixels of each colour, one below the other
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(8, vae.config.latent_channels, 4, 4, generator=generator).to(last.weight)
    last.bias.zero_()
    pixels = vae.decode(z / vae.config.scaling_factor, return_dict=False)[0].float().transpose(0, 1).flatten(1)
    gain, shift = CONTRAST / pixels.std(1), CONTRAST * pixels.mean(1) / pixels.std(1)
    repeats = len(last.bias) // len(gain)
    last.weight.mul_(gain.repeat_interleave(repeats)[:, None, None, None])
    last.bias.sub_(shift.repeat_interleave(repeats))
