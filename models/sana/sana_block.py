"""SANA's transformer block in about 12 kernel launches, for a batch whose rows belong to members of a population.

    x, h  = shrink(LayerNorm(z) (1 + scale) + shift)           low-rank columns of to_q, to_k, to_v
    q|k|v = x [W_q | W_k | W_v]^T + expand(h)                  one stacked GEMM
    z    += gate to_out(linear_attention(q, k, v))             gate and residual in the epilogue
    z    += to_out(softmax(rms(to_q(z)) rms(to_k(text))^T) to_v(text))   on trimmed text; torch's RMS norm, one launch
    z    += gate GLUMBConv(LayerNorm(z) (1 + scale) + shift)   SiLU in the first GEMM, gate and residual in the last

    text  = linear_2(GELU(linear_1(text)))                     before the first block, GELU in the epilogue

This is the path `epilogue`. In the path `consumer`, torch's GEMM computes the plain products. The kernel that reads a
product adds its low-rank part, h [B | U']^T, when it loads it:

    q|k|v = x [W_q | W_k | W_v]^T                              y = linear_attention(q, k, v, h)
    z, h  = z + gate (y W_out^T + low)                         residual_norm, with the low-rank columns of to_q
    q     = rms(z W_q^T + low)                                 rms_norm
    z, x  = z + (y W_out^T + low)                              residual_norm, with the modulation of the GLUMBConv
    z    += gate GLUMBConv(x)                                  SiLU in the first GEMM, a `fused_linear`; residual_norm

The device's launch settings choose the path (`sana_block` of `configs.PATHS`). In `consumer` the last bits of a row may
depend on the other rows of the batch, as they do in torch's GEMM.

The result equals that of diffusers' block up to rounding. It rounds less often, because sums and products stay in fp32
inside a launch. Without Triton only the GLUMBConv is replaced: it runs channels-last, which is faster for a CPU's
depthwise convolution, with SiLU and gate in place.

Legend: z_btd hidden states of B rows and T tokens, text_blc text states, table_b6d the block's shifts, scales, gates.

Source: Xie et al., SANA (arXiv 2410.10629); diffusers' `SanaTransformerBlock`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from diffusers import SanaTransformer2DModel
from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.sana_transformer import SanaAttnProcessor2_0
from torch import nn
from torch.nn.utils import parametrize

from esengine.es.layers import Target, changed
from esengine.kernels import (
    Lora,
    LowRank,
    MemberNoise,
    Modulation,
    configs,
    depthwise_gate,
    fused_linear,
    linear_attention,
    member_factors,
    mix,
    residual_norm,
    rms_norm,
    shrink,
    stream_table,
    takes_low,
    takes_partial_sums,
)
from esengine.kernels.factors import STORE_FROM


@torch.inference_mode(False)
def stacked(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """Concatenate tensors along dim 0 and make each of them a view of the result.

    So no second copy is kept, and in-place updates of a tensor change the result too.

    Args:
        tensors: Tensors of equal shape, dtype and device; or all None, which gives None.
    """
    first = tensors[0]
    if first is None:
        return None
    step, memory = first.numel() * first.element_size(), first.untyped_storage().data_ptr()

    def in_place(i: int, tensor: torch.Tensor) -> bool:
        # adjacent addresses alone are not enough: they may be separate allocations
        same = tensor.untyped_storage().data_ptr() == memory
        return same and tensor.is_contiguous() and tensor.data_ptr() == first.data_ptr() + i * step

    if not all(in_place(i, t) for i, t in enumerate(tensors)):
        joined = torch.cat([t.data for t in tensors])
        for tensor, piece in zip(tensors, joined.chunk(len(tensors)), strict=True):
            tensor.data = piece
    return first.data.as_strided((len(tensors) * len(first), *first.shape[1:]), first.stride())


class CannotFuse(ValueError):
    """A module has no fused form. The message says why."""


class Stack:
    """Linears that read the same x, run as one shrink and one GEMM."""

    def __init__(self, *layers: nn.Module):
        """Raises CannotFuse as `check`."""
        self.check(*layers)
        targets = [t for t in layers if isinstance(t, Target) and not t.disable_adapters]
        self.weight, self.bias = stacked(_weights(layers)), stacked([t.bias for t in layers])
        self.layers = targets
        self.adapters = None
        if targets:
            a, b = stacked([t.a for t in targets]), stacked([t.b for t in targets])
            table = stream_table(tuple(t.streams for t in targets), self.weight.device)
            self.adapters = Lora(a, b, targets[0].scale, table)

    @staticmethod
    def check(*layers: nn.Module) -> None:
        """Raise CannotFuse for linears that cannot be stacked.

        All must be plain linears, all or none of them targets, with equal ranks, scales and shapes.
        """
        for layer in layers:
            plain = isinstance(layer, nn.Linear) or (isinstance(layer, Target) and layer.dense)
            if not plain or changed(layer):
                raise CannotFuse(f"{type(layer).__name__} stands where a plain linear is expected")
        targets = [t for t in layers if isinstance(t, Target) and not t.disable_adapters]
        unlike = len({(t.lengths(), t.scale) for t in targets}) > 1 or len({w.shape for w in _weights(layers)}) > 1
        if unlike or len(targets) not in (0, len(layers)) or len({t.bias is None for t in layers}) > 1:
            raise CannotFuse(
                f"of {len(layers)} linears that read the same input, expected all targets or none, of equal rank, "
                "alpha and shape"
            )

    def as_next_lora(self, noise: MemberNoise, dtype: torch.dtype) -> Lora | None:
        """The targets, if the op that makes x in this dtype can also make partial sums of their shrink; else None."""
        return self.adapters if self.adapters and takes_partial_sums(self.adapters, noise.rank, dtype) else None

    def __call__(
        self,
        x: torch.Tensor,
        noise: MemberNoise,
        modulation: Modulation | None = None,
        partial_sums: torch.Tensor | None = None,
        next_stack: "Stack | None" = None,
        **epilogue,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """y, and the partial sums for `next_stack`, which reads y, or None. See `shrink`, `mix`, `fused_linear`."""
        # with partial sums no factors are stored: the GEMM rebuilds U' once for each of its tall tiles
        low = self.low_rank(noise, x.shape[1] if partial_sums is None else 0)
        x, low = self.columns(x, low, modulation, partial_sums)
        h, _, perturbation, factors = low or (None, None, None, None)
        options = dict(h=h, adapters=self.adapters, factors=factors, **epilogue)
        next_lora = None if next_stack is None else next_stack.as_next_lora(noise, x.dtype)
        if next_lora is None:
            return fused_linear(x, self.weight, self.bias, perturbation=perturbation, **options), None
        return fused_linear(x, self.weight, self.bias, perturbation=noise, next_lora=next_lora, **options)

    def low_rank(self, noise: MemberNoise, tokens: int) -> LowRank | None:
        """The low-rank part without h; None without targets. From `STORE_FROM` tokens on it has stored factors."""
        for layer in self.layers:
            layer.mark_called()
        if self.adapters is None:
            return None
        factors = None
        if tokens >= STORE_FROM:
            n, k = len(self.weight) // self.adapters.targets, self.weight.shape[1]
            factors = member_factors(self.adapters, noise, k=k, n=n)
        return LowRank(None, self.adapters, noise, factors)

    def columns(
        self,
        x: torch.Tensor,
        low: LowRank | None,
        modulation: Modulation | None = None,
        partial_sums: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, LowRank | None]:
        """x, modulated if asked, and `low` with its h, which comes from the partial sums or else from a pass over x."""
        if partial_sums is not None:
            return x, low._replace(h=mix(partial_sums, low.adapters, low.perturbation))
        if low is None:
            return shrink(x, None, None, modulation)
        x, h = shrink(x, low.adapters, low.perturbation, modulation, low.factors)
        return x, low._replace(h=h)

    def plain(
        self,
        x: torch.Tensor,
        noise: MemberNoise,
        modulation: Modulation | None = None,
        partial_sums: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, LowRank | None]:
        """torch's product without the low-rank part, and the low-rank part for the op that reads the product."""
        x, low = self.columns(x, self.low_rank(noise, x.shape[1]), modulation, partial_sums)
        return F.linear(x, self.weight, self.bias), low


def _weights(layers: Sequence[nn.Module]) -> list[torch.Tensor]:
    return [layer.base_weight if isinstance(layer, Target) else layer.weight for layer in layers]


class FusedBlock:
    """The stacked weights of a block and its forward. The forward takes the noise first, then diffusers' arguments."""

    def __init__(self, block: nn.Module):
        """Raises CannotFuse as `check`."""
        self.check(block)
        attention, cross = block.attn1, block.attn2
        self.module = block
        self.qkv = Stack(attention.to_q, attention.to_k, attention.to_v)
        self.q, self.kv = Stack(cross.to_q), Stack(cross.to_k, cross.to_v)
        self.out, self.cross_out = Stack(attention.to_out[0]), Stack(cross.to_out[0])

    @staticmethod
    def check(block: nn.Module) -> None:
        """Raise CannotFuse for a block with parts that the kernels do not support."""
        attention, cross = block.attn1, block.attn2
        if cross is None:
            raise CannotFuse("it has no cross-attention")
        for name, each, processor in (
            ("attn1", attention, SanaLinearAttnProcessor2_0),
            ("attn2", cross, SanaAttnProcessor2_0),
        ):
            if type(each.processor) is not processor:
                raise CannotFuse(f"{name} has {type(each.processor).__name__} in place of {processor.__name__}")
            if not _alike(each):
                raise CannotFuse(f"the norms of {name} are not the RMS norms of SANA-Sprint")
        if attention.inner_dim // attention.heads > 64:
            raise CannotFuse(f"heads of attn1 are {attention.inner_dim // attention.heads} wide, more than 64")
        if block.norm2.elementwise_affine or block.norm1.elementwise_affine or cross.rescale_output_factor != 1:
            raise CannotFuse("a norm has weights, or attn2 rescales its output")
        TokenConv.check(block.ff)
        Stack.check(attention.to_q, attention.to_k, attention.to_v)
        Stack.check(cross.to_k, cross.to_v)
        for layer in (cross.to_q, attention.to_out[0], cross.to_out[0]):
            Stack.check(layer)
        _refuse_changed(block)

    def forward(
        self,
        noise: MemberNoise,
        z_btd: torch.Tensor,
        attention_mask: torch.Tensor | None,
        text_blc: torch.Tensor,
        text_mask: torch.Tensor | None,
        timestep: torch.Tensor,
        height: int,
        width: int,
    ) -> torch.Tensor:
        block, conv = self.module, self.module.ff
        _check(noise, z_btd, text_blc)
        z_btd = z_btd.contiguous()  # the first block's input has the layout of the patch embedding
        table_b6d = block.scale_shift_table[None] + timestep.reshape(len(z_btd), 6, -1)
        shift, scale, gate, shift_ff, scale_ff, gate_ff = table_b6d.unbind(1)
        modulation = Modulation(shift, scale, block.norm1.eps)
        modulation_ff = Modulation(shift_ff, scale_ff, block.norm2.eps)
        by_consumer = self._by_consumer(noise, z_btd)
        attend = self._attend_by_consumer if by_consumer else self._attend_by_epilogue
        z_btd, x_btd = attend(noise, z_btd, text_blc, text_mask, modulation, gate, modulation_ff)

        y = fused_linear(x_btd, conv.conv_inverted.weight.flatten(1), conv.conv_inverted.bias, activation="silu")
        y = depthwise_gate(y, conv.conv_depth.weight, conv.conv_depth.bias, height=height, width=width)
        point = conv.conv_point.weight.flatten(1)
        if by_consumer:
            return residual_norm(F.linear(y, point), z_btd, gate=gate_ff).z
        return fused_linear(y, point, residual=z_btd, gate=gate_ff)

    def _by_consumer(self, noise: MemberNoise, z_btd: torch.Tensor) -> bool:
        """Whether to take the path `consumer`.

        The launch settings must choose it for this shape, and the attention must be able to add the low-rank parts of
        q, k and v.
        """
        adapters, heads = self.qkv.adapters, self.module.attn1.heads
        if adapters is not None and not (
            takes_low(adapters, noise.rank) and self.module.attn1.inner_dim // heads % 4 == 0
        ):
            return False
        shape = dict(dtype=configs.dtype_name(z_btd.dtype), t=z_btd.shape[1])
        return configs.path("sana_block", z_btd.device, **shape) == "consumer"

    def _attend_by_epilogue(
        self, noise, z_btd, text_blc, text_mask, modulation, gate, modulation_ff
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """z after both attentions, and the GLUMBConv's x. `fused_linear` adds the low-rank parts in its epilogue."""
        cross = self.module.attn2
        y_btd, partial_sums = self._linear_attention(self.qkv(z_btd, noise, modulation)[0], noise)
        z_btd, partial_sums = self.out(
            y_btd, noise, partial_sums=partial_sums, next_stack=self.q, residual=z_btd, gate=gate
        )
        q = self.q(z_btd, noise, partial_sums=partial_sums)[0]
        if cross.norm_q is not None:
            q = F.rms_norm(q, cross.norm_q.dim, cross.norm_q.weight, cross.norm_q.eps)
        y_btd = self._cross_attention(q, text_blc, text_mask, noise)
        z_btd, _ = self.cross_out(y_btd, noise, residual=z_btd)
        return z_btd, shrink(z_btd, None, None, modulation_ff)[0]

    def _attend_by_consumer(
        self, noise, z_btd, text_blc, text_mask, modulation, gate, modulation_ff
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same result, but the op that reads a product adds its low-rank part."""
        norm, tokens = self.module.attn2.norm_q, z_btd.shape[1]
        qkv, low = self.qkv.plain(z_btd, noise, modulation)
        y_btd, partial_sums = self._linear_attention(qkv, noise, low)
        y_btd, low = self.out.plain(y_btd, noise, partial_sums=partial_sums)
        if norm is None:
            z_btd = residual_norm(y_btd, z_btd, gate=gate, low=low).z
            q = self.q(z_btd, noise)[0]
        else:
            z_btd, _, low = residual_norm(y_btd, z_btd, gate=gate, low=low, next_lora=self.q.low_rank(noise, tokens))
            q = rms_norm(F.linear(z_btd, self.q.weight, self.q.bias), norm.weight, norm.eps, low)
        y_btd, low = self.cross_out.plain(self._cross_attention(q, text_blc, text_mask, noise), noise)
        z_btd, x_btd, _ = residual_norm(y_btd, z_btd, low=low, modulation=modulation_ff)
        return z_btd, x_btd

    def _linear_attention(
        self, qkv: torch.Tensor, noise: MemberNoise, low: LowRank | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """y, and the partial sums for to_out, or None."""
        attention = self.module.attn1
        norms = {} if attention.norm_q is None else {"eps": attention.norm_q.eps}
        for name in ("norm_q", "norm_k") if norms else ():
            norms[name] = getattr(attention, name).weight
        heads, next_lora = attention.heads, self.out.as_next_lora(noise, qkv.dtype)
        next_lora = None if attention.inner_dim // heads % 4 else next_lora
        y = linear_attention(*qkv.chunk(3, -1), heads=heads, next_lora=next_lora, perturbation=noise, low=low, **norms)
        return (y, None) if next_lora is None else y

    def _cross_attention(
        self, q: torch.Tensor, text_blc: torch.Tensor, text_mask: torch.Tensor | None, noise: MemberNoise
    ) -> torch.Tensor:
        """The input of to_out: attention of the normalised q to the text."""
        cross, (k, v) = self.module.attn2, self.kv(text_blc, noise)[0].chunk(2, -1)
        if cross.norm_k is not None:
            k = F.rms_norm(k, cross.norm_k.dim, cross.norm_k.weight, cross.norm_k.eps)
        q, k, v = (y.unflatten(-1, (cross.heads, -1)).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=None if text_mask is None else text_mask[:, None])
        return y.transpose(1, 2).flatten(2)


class FusedCaption:
    """The projection of the text states: GELU between two linears. `forward` takes the noise first, as `FusedBlock`."""

    def __init__(self, projection: nn.Module):
        """Raises CannotFuse as `check`."""
        self.check(projection)
        self.module = projection
        self.first, self.second = Stack(projection.linear_1), Stack(projection.linear_2)

    @staticmethod
    def check(projection: nn.Module) -> None:
        """Raise CannotFuse for a projection with another activation or a hook."""
        act = getattr(projection, "act_1", None)
        if not isinstance(act, nn.GELU) or act.approximate != "tanh":
            raise CannotFuse(f"its activation is {act}, not GELU by tanh")
        _refuse_changed(projection)
        for layer in (projection.linear_1, projection.linear_2):
            Stack.check(layer)

    def forward(self, noise: MemberNoise, text_blc: torch.Tensor) -> torch.Tensor:
        _check(noise, text_blc)
        y_blc, partial_sums = self.first(text_blc, noise, next_stack=self.second, activation="gelu_tanh")
        return self.second(y_blc, noise, partial_sums=partial_sums)[0]


class TokenConv:
    """GLUMBConv in torch: channels-last, SiLU and gate in place. `forward` takes the noise first, as `FusedBlock`."""

    def __init__(self, conv: nn.Module):
        """Raises CannotFuse as `check`."""
        self.check(conv)
        self.module = conv

    @staticmethod
    def check(conv: nn.Module) -> None:
        """Raise CannotFuse for a GLUMBConv with a norm, a residual, a hook, or other layers than SANA's."""
        if conv.norm_type is not None or conv.residual_connection:
            raise CannotFuse("its GLUMBConv has a norm or a residual")
        _refuse_changed(conv)
        inverted, depth, point = conv.conv_inverted, conv.conv_depth, conv.conv_point
        plain = all(type(each) is nn.Conv2d for each in (inverted, depth, point)) and type(conv.nonlinearity) is nn.SiLU
        sizes = [each.kernel_size for each in (inverted, depth, point)] if plain else []
        if sizes != [(1, 1), (3, 3), (1, 1)] or depth.groups != len(depth.weight) or point.bias is not None:
            raise CannotFuse("its GLUMBConv has other convolutions or another activation than SANA's")

    def forward(self, noise: MemberNoise, x_bchw: torch.Tensor) -> torch.Tensor:
        inverted, depth, point = self.module.conv_inverted, self.module.conv_depth, self.module.conv_point
        x_bchw = x_bchw.contiguous(memory_format=torch.channels_last)
        y_bchw = F.silu(F.conv2d(x_bchw, inverted.weight, inverted.bias), inplace=True)
        y_bchw = F.conv2d(y_bchw, depth.weight, depth.bias, padding=1, groups=len(depth.weight))
        y_bhwc, gate_bhwc = y_bchw.movedim(1, 3).chunk(2, -1)
        y_bhwc = y_bhwc.mul_(F.silu(gate_bhwc, inplace=True))
        return F.linear(y_bhwc, point.weight.flatten(1)).movedim(3, 1)


def _refuse_changed(module: nn.Module) -> None:
    """Raise CannotFuse for a hook, a replaced forward or a parametrized weight, which the fused form would ignore."""
    for name, each in module.named_modules():
        if changed(each):
            raise CannotFuse(f"{name or type(each).__name__} has a forward of its own or a hook")
        if parametrize.is_parametrized(each):
            raise CannotFuse(f"{name or type(each).__name__} has a weight that is computed anew at each use")


def _check(noise: MemberNoise, *states: torch.Tensor) -> None:
    if len(noise.members) != len(states[0]):
        given = f"int64 [{len(states[0])}], got int64 [{len(noise.members)}]"
        raise ValueError(f"members: expected one for each batch row, {given}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in states):
        raise RuntimeError("hidden states: fused blocks have no gradient; call them under torch.no_grad")


def _alike(attention: nn.Module) -> bool:
    """Whether q and k both have RMS norms over all heads, with weights and equal eps, or both have no norm."""
    norms = attention.norm_q, attention.norm_k
    rms = all(isinstance(n, RMSNorm) and n.weight is not None and n.bias is None for n in norms)
    return norms == (None, None) or (rms and norms[0].eps == norms[1].eps)


Part = FusedBlock | FusedCaption | TokenConv


def why_not_fused(transformer: SanaTransformer2DModel, triton: bool) -> str | None:
    """The reason why a transformer has no fused form; None if it has one. The transformer is not changed.

    Args:
        transformer: the transformer to check.
        triton: check the blocks for Triton. If false, check only the convolutions.
    """
    blocks = {f"transformer_blocks.{i}": block for i, block in enumerate(transformer.transformer_blocks)}
    if not triton:
        checks = [(name, TokenConv, block.ff) for name, block in blocks.items()]
    elif transformer.dtype == torch.float16:
        return "in float16 diffusers clamps overflows, which the fused blocks do not"
    else:
        checks = [("caption_projection", FusedCaption, transformer.caption_projection)]
        checks += [(name, FusedBlock, block) for name, block in blocks.items()]
    for name, form, module in checks:
        try:
            form.check(module)
        except CannotFuse as reason:
            return f"{name}: {reason}"
    return None


def fused_parts(transformer: SanaTransformer2DModel, triton: bool) -> list[Part]:
    """The fused forms of the text projection and the blocks (Triton), or of the convolutions (torch).

    Empty if `why_not_fused` gives a reason. Stacked weights are moved next to each other in memory, so build the parts
    once. Build them again after the module's tensors were moved or its adapters were switched.
    """
    if why_not_fused(transformer, triton) is not None:
        return []
    blocks = transformer.transformer_blocks
    if not triton:
        return [TokenConv(block.ff) for block in blocks]
    return [FusedCaption(transformer.caption_projection), *(FusedBlock(block) for block in blocks)]


@contextmanager
def patched(parts: Sequence[Part], noise: MemberNoise | None) -> Iterator[None]:
    """Inside the block, the modules of the parts run in their fused form. `noise` is the noise of the batch.

    `TokenConv` does not use `noise`. Afterwards the modules run as before.
    """
    try:
        for each in parts:
            each.module.forward = partial(each.forward, noise)
        yield
    finally:
        for each in parts:
            each.module.__dict__.pop("forward", None)
