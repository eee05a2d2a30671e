"""Tiny, complete, untrained pipelines of every family in `families.TINY`, for tests and for `--model tiny:FAMILY`.

Each has its family's own classes down to the tokenizers, and images of 64 x 64 pixels. Nothing is downloaded. Weights
that start at zero are drawn instead, so that every layer counts. The images show nothing, but ES can train them.
"""

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn

from esengine.base.errors import ConfigError
from esengine.models.families import FAMILIES, TINY
from esengine.models.quiet import no_progress_bars
from esengine.models.tiny import build_folder, corpus, in_cache, tiny_model
from esengine.models.tokenizer import SPECIAL, save_tokenizer

VERSION = "v1"
SIZE = 64
"""Height and width of an image, in pixels."""
WIDTH = 24
"""Channels of most text encoders."""
_CONTRAST = 0.45
_GAIN = {"sana": 1.0, "z-image": 1.0, "lumina2": 1.0, "flux": 1.5, "qwen-image": 3.0}
"""Chosen by trial: what the weights of a denoiser's linear layers are multiplied by, so that an adapter counts."""
_USUAL_GAIN = 2.0
_END = "<|endoftext|>"
_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

Parts = dict[str, Any]


def tiny_pipeline(name: str, root: Path | None = None) -> Path:
    """The tiny pipeline of a family in this user's cache, built at the first call.

    Args:
        name: one of `families.TINY`.
        root: parent folder. Default: `cache_root()`.

    Returns:
        The pipeline folder.

    Raises:
        ConfigError: there is no such family, or the folder cannot be written.
    """
    if name not in TINY:
        raise ConfigError(f"model: expected tiny:FAMILY with one of {', '.join(TINY)}, got 'tiny:{name:.100}'")
    if name == "sana-sprint":
        return tiny_model(root)
    return in_cache(f"tiny-{name}-{VERSION}", partial(build_tiny_pipeline, name), root)


def build_tiny_pipeline(name: str, path: str | Path, *, seed: int = 0) -> Path:
    """Build the tiny pipeline folder of a family.

    Args:
        name: one of `families.TINY` other than `sana-sprint`, which `build_tiny` builds.
        path: the folder to create; it must not exist. It is created atomically.
        seed: seed of the random weights. The global torch generator is not changed.

    Raises:
        FileExistsError: `path` exists already.
    """

    def save(folder: Path) -> None:
        pipe = tiny_components(name, seed=seed)
        with no_progress_bars():
            pipe.save_pretrained(folder, safe_serialization=True)

    return build_folder(path, save)


def tiny_components(name: str, *, seed: int = 0) -> diffusers.DiffusionPipeline:
    """The tiny pipeline of a family, in memory."""
    family = FAMILIES[name]
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as work:
        torch.manual_seed(seed)
        parts = _BUILD[name](Path(work))
        optional = {part: None for part, kinds in family.components.items() if part not in parts and ("", "") in kinds}
        pipe = getattr(diffusers, family.pipeline)(**parts, **optional, **family.options)
        _fill(getattr(pipe, family.denoiser), _GAIN.get(name, _USUAL_GAIN))
        _set_contrast(pipe.vae)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
    return pipe


@torch.no_grad()
def _fill(module: nn.Module, gain: float) -> None:
    """Draw the parameters that start at zero, such as gates, and scale the linear layers: all of them must count."""
    for parameter in module.parameters():
        if parameter.abs().max() == 0:
            nn.init.normal_(parameter, std=0.05)
    for each in module.modules():
        if isinstance(each, nn.Linear):
            each.weight.mul_(gain)


@torch.no_grad()
def _set_contrast(vae: nn.Module) -> None:
    """Scale the last convolution so that decoded noise uses the range of a byte."""
    vae.eval()
    channels, factor = _latent_channels(vae), getattr(vae.config, "scaling_factor", None) or 1.0
    z = torch.randn(16, channels, SIZE // 8, SIZE // 8) / factor
    z = z.unsqueeze(2) if isinstance(vae, diffusers.AutoencoderKLQwenImage) else z
    pixels = vae.decode(z, return_dict=False)[0].transpose(0, 1).flatten(1)
    last = next(m for name, m in reversed(list(vae.decoder.named_modules())) if getattr(m, "out_channels", 0) == 3)
    # rounded to hundredths, so that another summation order on another machine gives the same weights
    gain = (_CONTRAST / pixels.std(1)).round(decimals=2)
    last.weight.mul_(gain.view(-1, *[1] * (last.weight.dim() - 1)))
    last.bias.sub_(pixels.mean(1)).mul_(gain).copy_(last.bias.round(decimals=2))


def _latent_channels(vae: nn.Module) -> int:
    return vae.config.get("z_dim") or vae.config.latent_channels


def _words() -> list[str]:
    return list(dict.fromkeys(" ".join(corpus()).lower().replace(",", " ").split()))


def _byte_pairs(suffix: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a byte-level BPE for the words of the corpus. A `suffix` ends each word."""
    learner = Tokenizer(models.BPE(end_of_word_suffix=suffix))
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    texts = [word if suffix else f" {word}" for word in _words()]
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        show_progress=False,
        initial_alphabet=alphabet,
        end_of_word_suffix=suffix,
    )
    learner.train_from_iterator(texts, trainer)
    learned = learner.get_vocab()
    tokens = [*alphabet, *(f"{each}{suffix}" for each in alphabet if suffix)]
    tokens += sorted(learned.keys() - set(tokens), key=lambda token: (learned[token], token))
    merges = [tuple(each) for each in json.loads(learner.to_str())["model"]["merges"]]
    return {token: i for i, token in enumerate(tokens)}, merges


def _clip_tokenizer() -> transformers.CLIPTokenizer:
    vocab, merges = _byte_pairs("</w>")
    for token in ("<|startoftext|>", _END):
        vocab[token] = len(vocab)
    return transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def _qwen_tokenizer() -> transformers.Qwen2Tokenizer:
    vocab, merges = _byte_pairs("")
    for token in (_END, "<|im_start|>", "<|im_end|>"):
        vocab[token] = len(vocab)
    special = ["<|im_start|>", "<|im_end|>"]
    return transformers.Qwen2Tokenizer(
        vocab=vocab, merges=merges, chat_template=_CHAT, extra_special_tokens=special, model_max_length=131072
    )


def _t5_tokenizer() -> transformers.T5TokenizerFast:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [(chr(code), -8.0) for code in range(33, 127)]
    pieces += [(f"▁{word}", -5.0) for word in _words()]
    return transformers.T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)


def _clip(tokenizer, width: int, projection: int | None) -> nn.Module:
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=projection or width,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config)


def _t5(vocab: int, width: int) -> transformers.T5EncoderModel:
    config = transformers.T5Config(
        vocab_size=vocab,
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return transformers.T5EncoderModel(config)


def _qwen3(kind: type, vocab: int, width: int, layers: int) -> nn.Module:
    return kind(
        transformers.Qwen3Config(
            vocab_size=vocab,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def _qwen_vl(vocab: int) -> transformers.Qwen2_5_VLForConditionalGeneration:
    text = dict(
        vocab_size=vocab,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=1,
        rope_parameters={"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6},
        bos_token_id=None,
        eos_token_id=None,
    )
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=WIDTH)
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def _gemma(work: Path) -> Parts:
    tokenizer = save_tokenizer(work / "tokenizer", corpus())
    config = transformers.Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        initializer_range=WIDTH**-0.5,
        pad_token_id=SPECIAL.index("<pad>"),
        eos_token_id=SPECIAL.index("<eos>"),
        bos_token_id=SPECIAL.index("<bos>"),
    )
    return {"tokenizer": tokenizer, "text_encoder": transformers.Gemma2Model(config)}


def _kl(channels: int = 4, kind: type = diffusers.AutoencoderKL, **changes) -> nn.Module:
    return kind(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        **changes,
    )


def _sana(work: Path) -> Parts:
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=4,
        cross_attention_head_dim=8,
        cross_attention_dim=32,
        caption_channels=WIDTH,
        sample_size=SIZE // 8,
    )
    widths, ones = (8,) * 4, (1,) * 4
    vae = diffusers.AutoencoderDC(
        latent_channels=8,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=ones,
        decoder_layers_per_block=ones,
        encoder_qkv_multiscales=((),) * 4,
        decoder_qkv_multiscales=((),) * 4,
        upsample_block_type="interpolate",
        scaling_factor=0.4,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return {**_gemma(work), "vae": vae, "transformer": transformer, "scheduler": scheduler}


def _z_image(work: Path) -> Parts:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 4, 8],
        axes_lens=[1024, 64, 64],
    )
    for token in (transformer.x_pad_token, transformer.cap_pad_token):  # allocated, but not initialised
        nn.init.normal_(token, std=0.02)
    tokenizer = _qwen_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": _qwen3(transformers.Qwen3Model, len(tokenizer), WIDTH, 2),
        "vae": _kl(scaling_factor=0.36, shift_factor=0.11),
        "transformer": transformer,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


def _flux2_klein(work: Path) -> Parts:
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * 16,  # the states of three layers
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    tokenizer = _qwen_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": _qwen3(transformers.Qwen3ForCausalLM, len(tokenizer), 16, 28),  # the pipeline reads layer 27
        "vae": _kl(kind=diffusers.AutoencoderKLFlux2),
        "transformer": transformer,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "is_distilled": True,
    }


def _flux(work: Path) -> Parts:
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=16,
        guidance_embeds=False,
        axes_dims_rope=(4, 4, 8),
    )
    clip, t5 = _clip_tokenizer(), _t5_tokenizer()
    return {
        "tokenizer": clip,
        "text_encoder": _clip(clip, 16, None),
        "tokenizer_2": t5,
        "text_encoder_2": _t5(len(t5), WIDTH),
        "vae": _kl(scaling_factor=0.36, shift_factor=0.11),
        "transformer": transformer,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(),
    }


def _sd3(work: Path) -> Parts:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=SIZE // 8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=24,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    clip, t5 = _clip_tokenizer(), _t5_tokenizer()
    return {
        "tokenizer": clip,
        "text_encoder": _clip(clip, 16, 12),
        "tokenizer_2": _clip_tokenizer(),
        "text_encoder_2": _clip(clip, 16, 12),
        "tokenizer_3": t5,
        "text_encoder_3": _t5(len(t5), 32),
        "vae": _kl(scaling_factor=1.5, shift_factor=0.06),
        "transformer": transformer,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


def _unet(*, xl: bool, lcm: bool, cross: int) -> diffusers.UNet2DConditionModel:
    more, down, up = {}, ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    if xl:
        down, up = down[::-1], up[::-1]
        more = dict(
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24 + 6 * 8,
            transformer_layers_per_block=(1, 2),
        )
    if lcm:
        more["time_cond_proj_dim"] = 16
    return diffusers.UNet2DConditionModel(
        sample_size=SIZE // 8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=down,
        up_block_types=up,
        cross_attention_dim=cross,
        attention_head_dim=4,
        norm_num_groups=8,
        use_linear_projection=True,
        **more,
    )


def _sdxl(work: Path, lcm: bool = False) -> Parts:
    clip = _clip_tokenizer()
    euler = diffusers.EulerDiscreteScheduler(timestep_spacing="trailing", beta_schedule="scaled_linear", steps_offset=1)
    return {
        "tokenizer": clip,
        "text_encoder": _clip(clip, 16, None),
        "tokenizer_2": _clip_tokenizer(),
        "text_encoder_2": _clip(clip, 16, 24),
        "vae": _kl(),
        "unet": _unet(xl=True, lcm=lcm, cross=32),
        "scheduler": diffusers.LCMScheduler() if lcm else euler,
    }


def _sdxl_lcm(work: Path) -> Parts:
    return _sdxl(work, lcm=True)


def _sd(work: Path, lcm: bool = False) -> Parts:
    clip = _clip_tokenizer()
    euler = diffusers.EulerDiscreteScheduler(timestep_spacing="trailing", beta_schedule="scaled_linear", steps_offset=1)
    return {
        "tokenizer": clip,
        "text_encoder": _clip(clip, 32, None),
        "vae": _kl(),
        "unet": _unet(xl=False, lcm=lcm, cross=32),
        "scheduler": diffusers.LCMScheduler() if lcm else euler,
    }


def _sd_lcm(work: Path) -> Parts:
    return _sd(work, lcm=True)


def _pixart(work: Path) -> Parts:
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=SIZE // 8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=WIDTH,
        in_channels=4,
        cross_attention_dim=32,
        out_channels=8,
        attention_bias=True,
        num_embeds_ada_norm=1000,
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    )
    t5 = _t5_tokenizer()
    return {
        "tokenizer": t5,
        "text_encoder": _t5(len(t5), WIDTH),
        "vae": _kl(),
        "transformer": transformer,
        "scheduler": diffusers.LCMScheduler(),
    }


def _qwen_image(work: Path) -> Parts:
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1] * 4,
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        temperal_downsample=[False, True, True],
    )
    tokenizer = _qwen_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": _qwen_vl(len(tokenizer)),
        "vae": vae,
        "transformer": transformer,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(),
    }


def _hunyuan_image(work: Path) -> Parts:
    transformer = diffusers.HunyuanImageTransformer2DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        guidance_embeds=True,
        text_embed_dim=WIDTH,
        text_embed_2_dim=16,
        rope_axes_dim=(8, 8),
        use_meanflow=True,
    )
    vae = diffusers.AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        block_out_channels=(32,) * 4,
        layers_per_block=1,
        spatial_compression_ratio=8,
        sample_size=SIZE,
        scaling_factor=0.75,
    )
    tokenizer, glyphs = _qwen_tokenizer(), transformers.ByT5Tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": _qwen_vl(len(tokenizer)),
        "tokenizer_2": glyphs,
        "text_encoder_2": _t5(len(glyphs), 16),
        "vae": vae,
        "transformer": transformer,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=4.0),
    }


def _chroma(work: Path) -> Parts:
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=32,
        approximator_layers=1,
    )
    t5 = _t5_tokenizer()
    return {
        "tokenizer": t5,
        "text_encoder": _t5(len(t5), WIDTH),
        "vae": _kl(scaling_factor=0.36, shift_factor=0.11),
        "transformer": transformer,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(),
    }


def _lumina2(work: Path) -> Parts:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=SIZE // 8,
        patch_size=2,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=2,
        multiple_of=8,
        axes_dim_rope=(4, 4, 8),
        axes_lens=(320, 64, 64),
        cap_feat_dim=WIDTH,
    )
    return {
        **_gemma(work),
        "vae": _kl(scaling_factor=0.36, shift_factor=0.11),
        "transformer": transformer,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(),
    }


_BUILD: dict[str, Callable[[Path], Parts]] = {
    "sana": _sana,
    "z-image": _z_image,
    "flux2-klein": _flux2_klein,
    "flux": _flux,
    "sd3": _sd3,
    "sdxl": _sdxl,
    "sdxl-lcm": _sdxl_lcm,
    "sd": _sd,
    "sd-lcm": _sd_lcm,
    "pixart": _pixart,
    "pixart-sigma": _pixart,
    "qwen-image": _qwen_image,
    "hunyuan-image": _hunyuan_image,
    "chroma": _chroma,
    "lumina2": _lumina2,
}
