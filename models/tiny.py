"""A complete, untrained, tiny SANA-Sprint pipeline for tests and quick trials.

It has every part of the 1.6B model: guidance embedding, q/k norm across heads, linear and cross attention, GLU
convolutions, DC-AE, Gemma-2 with its tokenizer. The random weights are scaled so that the images use the range of a
byte and depend on the prompt, the latent and every linear layer. So ES can train it, but its images show nothing.
"""

import atexit
import functools
import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderDC, SanaSprintPipeline, SanaTransformer2DModel, SCMScheduler
from transformers import Gemma2Config, Gemma2Model

from esengine.base.errors import ConfigError
from esengine.base.files import cache_root, warn_no_cache
from esengine.models.quiet import no_progress_bars
from esengine.models.tokenizer import SPECIAL, save_tokenizer

NAME = "tiny-sana-sprint-v1"
_LATENT_CHANNELS = 8
_TEXT_WIDTH = 64

# chosen by trial: x0 / sigma_data has a standard deviation near 1, and under 1 % of the pixel values are clipped
_FF_GAIN, _TEXT_GAIN, _EMBED_GAIN, _CONTENT, _CANCEL, _CONTRAST = 10.0, 2.0, 2.5, 1.5, 0.15, 0.45

_SUBJECTS = ("a red fox", "an old lighthouse", "two green apples", "a paper boat", "a blue bicycle", "a snowy mountain")
_PLACES = ("in a quiet forest", "at sunset", "under a starry sky", "on a wooden table", "by the sea", "in the rain")
_STYLES = ("watercolor", "oil painting", "photo", "pencil drawing", "pixel art", "soft light, detailed")


def tiny_model(root: Path | None = None) -> Path:
    """The tiny pipeline in this user's cache, built at the first call.

    Several processes may call this at once. One of their builds is kept, complete.

    Args:
        root: Parent folder. Default: `cache_root()`.

    Returns:
        The pipeline folder.

    Raises:
        ConfigError: The folder cannot be written.
    """
    return in_cache(NAME, build_tiny, root)


def in_cache(name: str, build: Callable[[Path], object], root: Path | None = None) -> Path:
    """The folder `name` in this user's cache, or in `root`, built at the first call.

    Without a cache that can be written, it is built in a temporary folder of this process.

    Raises:
        ConfigError: the folder cannot be written.
    """
    cache = cache_root() if root is None else Path(root)
    for parent in (cache, None) if root is None else (cache,):
        try:
            path = (_temporary() if parent is None else parent) / name
            try:
                if not (path / "model_index.json").is_file():
                    build(path)
            except OSError:
                if not (path / "model_index.json").is_file():  # else another process finished first
                    raise
            return path
        except Exception as error:
            if not isinstance(error, OSError) and "os error" not in str(error):  # as safetensors says of a full disk
                raise
            if parent is None or root is not None:
                raise ConfigError(f"cannot build the default model {name}: {error}") from error
            warn_no_cache(str(error))


@functools.cache
def _temporary() -> Path:
    """A folder that is removed when this process ends."""
    folder = Path(tempfile.mkdtemp(prefix="esengine-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def build_tiny(path: str | Path, *, seed: int = 0) -> Path:
    """Build the tiny SANA-Sprint pipeline folder: 64 x 64 images from 8 x 8 latents of 8 channels.

    Args:
        path: The folder to create; it must not exist. It is created atomically.
        seed: Seed of the random weights. The global torch generator is not changed.

    Returns:
        `path`, which `SanaSprintPipeline.from_pretrained` and `SanaSprint.from_pretrained` can load.

    Raises:
        FileExistsError: `path` exists already.
    """
    return build_folder(path, lambda work: _save_pipeline(work, seed))


def build_folder(path: str | Path, save: Callable[[Path], None]) -> Path:
    """Create a folder atomically: `save` fills a temporary one, which is renamed. Returns its path.

    Raises:
        FileExistsError: `path` exists already.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"path: expected a folder that does not exist, got {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        save(work)
        os.chmod(work, 0o755)
        try:
            os.rename(work, path)
        except OSError as error:
            if path.exists():
                raise FileExistsError(f"path: expected a folder that does not exist, got {path}") from error
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return path


def _save_pipeline(path: Path, seed: int) -> None:
    tokenizer = save_tokenizer(path / "tokenizer", corpus())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = SanaSprintPipeline(
            tokenizer=tokenizer,
            text_encoder=_text_encoder(len(tokenizer)),
            vae=_vae(),
            transformer=_transformer(),
            scheduler=SCMScheduler(),
        )
    with no_progress_bars():
        pipeline.save_pretrained(path, safe_serialization=True)
    # transformers 5 drops "Fast" from the name; 4.57 would then look for a sentencepiece file
    save_tokenizer(path / "tokenizer", corpus())
    index = json.loads((path / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "GemmaTokenizerFast"]
    (path / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def corpus() -> list[str]:
    """The pipeline's instruction, which precedes every prompt, and a few generated prompts."""
    instruction = inspect.signature(SanaSprintPipeline.__call__).parameters["complex_human_instruction"].default
    prompts = [f"{s} {p}, {style}" for s in _SUBJECTS for p in _PLACES for style in _STYLES]
    return ["\n".join(instruction), *prompts]


def _text_encoder(vocab_size: int) -> Gemma2Model:
    config = Gemma2Config(
        vocab_size=vocab_size,
        hidden_size=_TEXT_WIDTH,
        intermediate_size=2 * _TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
        initializer_range=_TEXT_WIDTH**-0.5,
        pad_token_id=SPECIAL.index("<pad>"),
        eos_token_id=SPECIAL.index("<eos>"),
        bos_token_id=SPECIAL.index("<bos>"),
    )
    return Gemma2Model(config).eval()


def _vae() -> AutoencoderDC:
    # all blocks have one width, so that the decoder's shortcut repeats pixels and makes no stripes
    channels, layers = (16,) * 4, (1,) * 4
    blocks = ("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock")
    multiscales = ((), (), (), (5,))
    vae = AutoencoderDC(
        latent_channels=_LATENT_CHANNELS,
        attention_head_dim=16,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        encoder_layers_per_block=layers,
        decoder_layers_per_block=layers,
        encoder_qkv_multiscales=multiscales,
        decoder_qkv_multiscales=multiscales,
        upsample_block_type="interpolate",
        scaling_factor=0.5,
    ).eval()
    with torch.no_grad():
        last = vae.decoder.conv_out
        last.bias.zero_()
        pixels = vae.decode(2 * torch.randn(32, _LATENT_CHANNELS, 8, 8)).sample.transpose(0, 1).flatten(1)
        # rounded to hundredths, so that another summation order on another machine gives the same weights
        last.weight *= (_CONTRAST / pixels.std(1)).round(decimals=2)[:, None, None, None]
        last.bias -= (_CONTRAST * pixels.mean(1) / pixels.std(1)).round(decimals=2)
    return vae


def _transformer() -> SanaTransformer2DModel:
    transformer = SanaTransformer2DModel(
        in_channels=_LATENT_CHANNELS,
        out_channels=_LATENT_CHANNELS,
        num_attention_heads=4,
        attention_head_dim=32,
        num_layers=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=64,
        cross_attention_dim=128,
        caption_channels=_TEXT_WIDTH,
        mlp_ratio=2.5,
        attention_bias=False,
        sample_size=8,
        patch_size=1,
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        interpolation_scale=None,
        guidance_embeds=True,
        guidance_embeds_scale=0.1,
        qk_norm="rms_norm_across_heads",
    ).eval()
    _balance(transformer)
    return transformer


@torch.no_grad()
def _balance(transformer: SanaTransformer2DModel) -> None:
    """Scale the weights so that every branch affects the residual stream and the output cancels most of the latent.

    At the first angle x0 / sigma_data = latent - output. With plain random weights the image is almost pure noise.
    """
    for block in transformer.transformer_blocks:
        block.scale_shift_table[[2, 5]] += 1.0  # the two gates
        block.ff.conv_point.weight *= _FF_GAIN
        block.attn2.to_out[0].weight *= _TEXT_GAIN
    into = transformer.patch_embed.proj.weight  # [inner, C, 1, 1]
    torch.nn.init.orthogonal_(into.flatten(1), gain=_EMBED_GAIN)
    out = transformer.proj_out.weight  # [C, inner]
    out.mul_(_CONTENT).add_(into.flatten(1).T, alpha=_CANCEL)
