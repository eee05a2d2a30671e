"""What the suite's microbenchmarks share: a block's ops and their references, their operands, the model's sizes."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from esengine.kernels import (
    Lora,
    MemberNoise,
    depthwise_gate,
    depthwise_gate_ref,
    fused_linear,
    fused_linear_ref,
    linear_attention,
    linear_attention_ref,
    member_factors,
    member_factors_ref,
    mix,
    mix_ref,
    noise,
    shrink,
    shrink_ref,
    takes_partial_sums,
)
from suite import roofline, standin
from suite.context import Context

R, K, SCALE, SIGMA = 2, 1, 4.0, 1e-2
NOISE = {"seed": 0, "step": 1}
FP32_BOUND = 1e-5


class Ops(NamedTuple):
    """The launches of a block, or their references."""

    shrink: Callable
    mix: Callable
    linear: Callable
    factors: Callable
    attention: Callable
    gate: Callable
    cross: Callable
    norm: Callable


@functools.lru_cache(maxsize=8)
def text_mask(batch: int, text: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What the model adds to a row's scores: 0 for a word, -10000 for padding; [B, 1, 1, L] in the model's dtype.

    Row i has L - i % 4 words, as the stand-in's prompts have. It is made once for each shape, because the model makes
    it once a forward and not in every block.
    """
    lengths = text - torch.arange(batch, device=device) % standin.LENGTHS
    padding = torch.arange(text, device=device) >= lengths[:, None]
    return (padding.to(dtype) * -10000.0)[:, None, None]


def cross_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    """Attention on padded text between its projections, as the block calls torch: [B, T, C] and twice [B, L, C]."""
    mask = text_mask(len(k), k.shape[1], q.dtype, q.device)
    q, k, v = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def cross_attention_ref(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    """The same in fp32, rounded once."""
    return cross_attention(q.float(), k.float(), v.float(), heads).to(q.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Of the cross-attention's q and k, over all heads, as the block calls torch."""
    return F.rms_norm(x, weight.shape, weight, 1e-5)


def rms_norm_ref(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The same in fp32, rounded once."""
    return rms_norm(x.float(), weight.float()).to(x.dtype)


TRITON = Ops(shrink, mix, fused_linear, member_factors, linear_attention, depthwise_gate, cross_attention, rms_norm)
REFERENCE = Ops(
    shrink_ref,
    mix_ref,
    fused_linear_ref,
    member_factors_ref,
    linear_attention_ref,
    depthwise_gate_ref,
    cross_attention_ref,
    rms_norm_ref,
)


def ops(device: torch.device) -> Ops:
    """What runs on a device."""
    return TRITON if noise.uses_triton(device) else REFERENCE


class Sizes(NamedTuple):
    """Of a transformer: columns of tokens, text and a Mix-FFN's gated half; heads of both attentions; blocks."""

    width: int
    text_width: int
    channels: int
    heads: int
    cross_heads: int
    blocks: int

    @classmethod
    def of(cls, config) -> "Sizes":
        """Of the published configuration, a mapping."""
        width = config["num_attention_heads"] * config["attention_head_dim"]
        channels, cross = int(config["mlp_ratio"] * width), config["num_cross_attention_heads"]
        return cls(
            width, config["caption_channels"], channels, config["num_attention_heads"], cross, config["num_layers"]
        )


def sizes_of(scale: str) -> Sizes:
    """Of the stand-in of that name."""
    return Sizes.of(standin.CONFIGS[scale]["transformer"])


def leaves_partial_sums(dtype: torch.dtype) -> bool:
    """Whether the op that makes x in this dtype makes partial sums for the linear that reads x."""
    return takes_partial_sums(Lora(torch.empty(R, 1), torch.empty(1, R), 1.0, torch.empty(1, 4)), K, dtype)


def drawn(device: torch.device, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """draw(*shape, to=dtype): standard normal, the same numbers for the same shapes in the same order."""
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)

    def draw(*shape: int, to: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=to)

    return draw


def adapted(draw: Callable, members: int, targets: int, k: int, n: int) -> tuple[Lora, MemberNoise]:
    """Lora of `targets` linears [n, k], and the noise of as many members; the step lies on the device."""
    a, b = (
        draw(targets * R, k, to=torch.float32) * k**-0.5,
        draw(targets * n, R, to=torch.float32),
    )
    ids, streams = (torch.arange(size, device=a.device) for size in (members, 4 * targets))
    step = torch.full((1,), NOISE["step"], dtype=torch.int64, device=a.device)
    return Lora(a, b, SCALE, streams.view(targets, 4)), MemberNoise(ids, NOISE["seed"], step, SIGMA, K)


def roofline_share(context: Context, seconds: dict, work: roofline.Work, dtype: torch.dtype) -> float | None:
    """None where the device's ceiling for the dtype is not known."""
    if context.ceilings is None or dtype not in context.ceilings.flops:
        return None
    return roofline.share(seconds["median"], work, context.ceilings, dtype)
