"""The suite's parts after the transformer: the decoder in every mode, and two chunks at a time."""

import copy
from typing import Any

import record
import torch

from esengine.models import Rows, graphs
from esengine.models.decoder import Decoder
from suite import roofline, standin
from suite.checks import CheckFailed, attempt, bounded, full_precision, worst_error
from suite.clock import interleaved
from suite.context import OVERLAP_MARGIN, STEP, Context
from suite.ops import roofline_share

LEVEL = 2e-3
"""Relative error of images that differ by a level here and there."""

CHUNKS = 3


@torch.no_grad()
def decode(context: Context, pixels: int) -> dict[str, Any]:
    """Seconds of one decoder call by memory order and mode, and of DC-AE-Lite. Each is checked against high precision.

    Ratios are of throughput over `contiguous`, diffusers' way. A step at this size takes the fastest mode of the
    model's own decoder. A compiled decoder is measured only on request, because it takes minutes on a GPU.
    """
    images = min(context.scale.chunk, context.scale.decode_chunk)
    own, lite = (
        standin.autoencoder(context.scale.name, lite=lite, device=context.device, dtype=context.dtype, seed=1)
        for lite in (False, True)
    )
    generator = torch.Generator().manual_seed(0)
    side = pixels >> len(own.config.encoder_block_out_channels) - 1
    x0 = torch.randn(images, own.config.latent_channels, side, side, generator=generator).to(context.device)
    last = context.plain.decoder  # so that what is compiled or captured here serves the steps
    lite = Decoder(lite, channels_last=True, compile_backend=context.compile_backend)
    modes = {"contiguous": (Decoder(own), "eager"), "channels_last": (last, "eager")}
    if graphs.supported(context.device):
        modes["graphed"] = last, "graphed"
    if context.compile_decoder and context.time_left() > context.scale.compile_seconds:
        modes["compiled"] = last, "compiled"
    modes["lite"] = lite, "eager"

    facts, variants = {}, {}
    for name, (decoder, mode) in modes.items():
        facts[name] = attempt(lambda decoder=decoder, mode=mode: {"check": _check(context, decoder, mode, x0)})
        if "error" in facts[name] or "failed" in facts[name].get("check", {}):
            continue
        variants[name] = lambda decoder=decoder, mode=mode: decoder(x0, chunk=images, mode=mode)
    seconds = interleaved(variants, context.scale.rounds[2], device=context.device)
    by_mode = {"eager": "channels_last", "graphed": "graphed", "compiled": "compiled"}
    measured = {mode: seconds[name]["median"] for mode, name in by_mode.items() if name in seconds}
    if measured:
        context.decode_modes[pixels] = min(measured, key=measured.get)
    work = {lite: decode_work(context.scale.name, pixels, images, lite=lite) for lite in (False, True)}
    return {
        "pixels": pixels,
        "images": images,
        "chosen": context.decode_modes.get(pixels),
        "flops_per_image": {"lite" if lite else "dc-ae": done.flops / images for lite, done in work.items()},
        "compiled": (
            f"by {context.compile_backend}"
            if "compiled" in modes
            else "out of time"
            if context.compile_decoder
            else "not asked for, see --compile-decoder"
        ),
        "variants": facts,
        "seconds": seconds,
        "images_per_second": {name: images / taken["median"] for name, taken in seconds.items()},
        "ratios": {
            name: record.ratio(seconds["contiguous"], taken)
            for name, taken in seconds.items()
            if name != "contiguous" and "contiguous" in seconds
        },
        "roofline": {
            name: roofline_share(context, taken, work[name == "lite"], context.dtype) for name, taken in seconds.items()
        },
    }


def decode_work(scale: str, pixels: int, images: int, *, lite: bool = False) -> roofline.Work:
    """The decoder's products for images of `pixels` x `pixels`, in bf16, from the published configuration."""
    vae = standin.autoencoder(scale, lite=lite, device="meta", dtype=torch.bfloat16)
    side = pixels >> len(vae.config.encoder_block_out_channels) - 1
    z = torch.empty(images, vae.config.latent_channels, side, side, device="meta", dtype=torch.bfloat16)
    return roofline.products(lambda: vae.decode(z))


def score_work(scale: str, images: int) -> roofline.Work:
    """The image tower's products, in bf16, from the published configuration."""
    clip = standin.clip(scale, device="meta", dtype=torch.bfloat16)
    size = clip.config.vision_config.image_size
    pixels = torch.empty(images, 3, size, size, device="meta", dtype=torch.bfloat16)
    return roofline.products(lambda: clip.vision_model(pixel_values=pixels))


@torch.no_grad()
def overlap(context: Context) -> dict[str, Any]:
    """A population's chunks, rendered and scored: in turn, and decoded while the next chunk is denoised."""
    pixels = context.scale.pixels[0]
    check = context.checks(lambda: context.check_members(pixels))
    context.scorer  # noqa: B018
    settings = {name: context.settings(pixels, overlap=name == "overlapped") for name in ("in_turn", "overlapped")}

    def work(name: str) -> torch.Tensor:
        members, prompts, repeats = context.rows()
        chunks = [Rows(members + turn * len(members), prompts, repeats) for turn in range(CHUNKS)]
        keys = dict(seed=0, step=STEP, population=context.population, text_length=context.scale.text_tokens)
        words = [context.texts.prompts[index] for index in prompts.tolist()]
        drawn = context.model.render_chunks(context.texts, chunks, settings=settings[name], **keys)
        return torch.cat([context.scorer(images, words) for images in drawn])

    def same() -> None:
        if not torch.equal(work("in_turn"), work("overlapped")):
            raise CheckFailed(f"overlap at {pixels} px: expected the same scores either way")

    equal = context.checks(same)
    variants = {name: lambda name=name: work(name) for name in settings}
    seconds = interleaved(variants, context.scale.rounds[2], device=context.device)
    ratio = record.ratio(seconds["in_turn"], seconds["overlapped"])
    context.overlap_pays = ratio["of_medians"] > 1 + OVERLAP_MARGIN and not equal
    return {
        "pixels": pixels,
        "decode": context.decode_mode(pixels),
        "images": CHUNKS * context.scale.members,
        "streams": graphs.supported(context.device),
        "check": check,
        "check_equal": equal,
        "seconds": seconds,
        "ratio": ratio,
    }


def _check(context: Context, decoder: Decoder, mode: str, x0: torch.Tensor) -> dict[str, float]:
    """Two images of a second call (from a graph, if that is the mode), against twice torch's own error."""
    few = x0[:2]
    exact = Decoder(copy.deepcopy(decoder.vae).to(context.exact_dtype))
    with full_precision():
        expected, _ = exact(few.to(context.exact_dtype), chunk=1)
    plain, _ = Decoder(copy.deepcopy(decoder.vae))(few, chunk=1)
    for _ in range(3):
        got, finite = decoder(x0, chunk=len(x0), mode=mode)
    if not finite.all():
        raise CheckFailed(f"decode {mode}: expected finite images")
    own, blind = (worst_error(images.float(), expected.float()) for images in (plain, expected.flip(0)))
    return bounded(
        f"decode {mode}", worst_error(got[:2].float(), expected.float()), max(2 * own, LEVEL), perturbation=blind
    )
