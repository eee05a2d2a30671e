"""ReLU linear attention beside diffusers' own formula, on slices of one stacked projection."""

import pytest
import torch
import torch.nn.functional as F
from suite.roofline import linear_attention_work

from esengine.kernels import linear_attention, linear_attention_ref

CPU = [
    # heads, width, tokens, batch: tiny SANA's own, then SANA-Sprint's on fewer rows
    *[(4, 32, 64, 64), (70, 32, 256, 2), (70, 32, 1024, 1)],
]
GPU = [(70, 32, 256, 64), (70, 32, 1024, 64), (70, 32, 1024, 1)]


def diffusers_formula(q, k, v, *, heads, norm_q, norm_k, eps=1e-5):
    """What SanaLinearAttnProcessor2_0 computes between the projections, in its order and with its roundings."""

    def norm(x, weight):
        variance = x.float().square().mean(-1, keepdim=True)
        return (x * torch.rsqrt(variance + eps)).to(weight.dtype) * weight

    query, key = (x.transpose(1, 2).unflatten(1, (heads, -1)).relu() for x in (norm(q, norm_q), norm(k, norm_k)))
    value = v.transpose(1, 2).unflatten(1, (heads, -1))
    query, key, value = query.float(), key.transpose(2, 3).float(), F.pad(value.float(), (0, 0, 0, 1), value=1.0)
    y = value @ key @ query
    return (y[:, :, :-1] / (y[:, :, -1:] + 1e-15)).flatten(1, 2).transpose(1, 2).to(q.dtype)


def case(shape, device):
    marks = pytest.mark.gpu if device == "cuda" else ()
    return pytest.param(*shape, device, id=f"{device}-{'x'.join(map(str, shape))}", marks=marks)


@pytest.mark.parametrize("peer", ["linear_attention", "diffusers"])
@pytest.mark.parametrize(
    ("heads", "width", "tokens", "batch", "device"),
    [case(shape, "cpu") for shape in CPU] + [case(shape, "cuda") for shape in GPU],
)
def test_linear_attention(clock, device_at_hand, heads, width, tokens, batch, device, peer):
    device_at_hand(device)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(batch, tokens, 3 * heads * width, generator=generator).to(device, dtype).chunk(3, -1)
    norms = (1 + 0.3 * torch.randn(2, heads * width, generator=generator)).to(device, dtype)
    settings = dict(heads=heads, norm_q=norms[0], norm_k=norms[1])

    op = {"linear_attention": linear_attention, "diffusers": diffusers_formula}[peer]
    some = slice(0, batch, max(1, batch // 4))
    exact = linear_attention_ref(
        *(x[some].float() for x in (q, k, v)), heads=heads, norm_q=norms[0].float(), norm_k=norms[1].float()
    ).double()
    error = ((op(q, k, v, **settings)[some].double() - exact).norm() / exact.norm()).item()
    # bf16 rounds the result once, 2^-9 at most; diffusers rounds the normed q and k too
    assert error < (2e-6 if dtype == torch.float32 else 4e-3)

    work = linear_attention_work(batch=batch, tokens=tokens, heads=heads, width=width, itemsize=q.element_size())
    facts = dict(op="linear_attention", peer=peer, heads=heads, width=width, tokens=tokens, batch=batch)
    clock(lambda: op(q, k, v, **settings), work, device=device, dtype=dtype, relative_error=error, **facts)
