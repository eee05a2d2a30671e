"""What the suite's summary should show on one GPU, by the roofline and assumptions: predictions, not results.

    python bench/suite --predict H100     the tables of bench/NOTES.md; a test compares them
    python bench/suite --predict H200     the same for another device

Every launch is assumed to run at the device's ceilings in `roofline.KNOWN`, one after the other, except for the two
efficiencies of a `Case`. Measured figures are only in bench/results.
"""

from typing import NamedTuple

import torch
from peers.reference_loop import PROMPTS, REPEATS

import suite.decode
import suite.kernels
from suite import roofline
from suite.context import SCALES
from suite.ops import K, R, Sizes, sizes_of

FULL, DTYPE = SCALES["full"], torch.bfloat16
MEMBERS, ITEMSIZE = FULL.members, DTYPE.itemsize

EXPAND_COLUMNS = 2 * 16
"""Of K, in bf16: the expand is a product of 16 columns in tf32, at half the rate."""

COMPILED_PASSES = {
    "residual and modulated norm before the attention, one kernel": 4,
    "linear attention: norms and casts to fp32, two products in fp32, quotient and cast back": 20,
    "gate and residual behind it": 3,
    "rms norm of the cross-attention's q": 2,
    "residual and modulated norm before the Mix-FFN": 4,
    "SiLU over 11200 channels": 10,
    "depthwise convolution": 10,
    "gate of its halves": 7.5,
}
"""What diffusers' compiled block reads and writes between its products, in rows of 2240 bf16 values a token."""


EAGER_PASSES = 2
"""Times as many in an eager model. Assumed."""


class Case(NamedTuple):
    """Assumed efficiencies: our GEMMs over cuBLAS's, and the decoder's products over the ceiling. And the device."""

    gemm: float
    decode: float
    device: str = "H100"

    @property
    def name(self) -> str:
        return f"GEMM {self.gemm:g}, decoder {self.decode:g}"

    def seconds(self, work: roofline.Work) -> float:
        """At the device's ceilings."""
        return roofline.floor(work, roofline.KNOWN[self.device], DTYPE)

    def gemm_seconds(self, n_in: int, n_out: int, tokens: int) -> float:
        """Of cuBLAS's plain product, of all members with so many rows each."""
        return self.seconds(roofline.linear_work(rows=MEMBERS * tokens, n_in=n_in, n_out=n_out, itemsize=ITEMSIZE))


CASES = (Case(1.0, 1.0), Case(0.9, 0.6), Case(0.8, 0.5))


def floors(text: int = FULL.text_tokens) -> list[tuple[str, int, list[roofline.Work]]]:
    """(launch, times a forward, its work at each size of image) of every launch of a forward, decoder and scorer."""
    sides = [pixels // 32 for pixels in FULL.pixels]
    columns = [suite.kernels.launches(sizes_of("full"), side, text, partial_sums=True) for side in sides]
    found = []
    for launches in zip(*columns, strict=True):
        name = launches[0].name.removesuffix(f" x{sides[0] ** 2}")
        works = [launch.work(members=MEMBERS, itemsize=ITEMSIZE) for launch in launches]
        found.append((name, launches[0].times, works))
    found.append(("DC-AE decode", 1, [suite.decode.decode_work("full", pixels, MEMBERS) for pixels in FULL.pixels]))
    found.append(("CLIP-H image tower", 1, [suite.decode.score_work("full", MEMBERS)] * len(FULL.pixels)))
    return found


def linear_alone(n_in: int, n_out: int, tokens: int, case: Case) -> float:
    """Throughput of shrink and expanding GEMM over the plain GEMM."""
    rows, plain = _rows(tokens), case.gemm_seconds(n_in, n_out, tokens)
    shrink = roofline.shrink_work(**rows, n_in=n_in, targets=1, r=R, k=K, itemsize=ITEMSIZE)
    return plain / (case.seconds(shrink) + plain * (1 + EXPAND_COLUMNS / n_in) / case.gemm)


def linear_in_block(producer: str, tokens: int, case: Case) -> float:
    """The same for the GEMM, the mix and what the producer does for it."""
    sizes, targets = sizes_of("full"), 3 if producer == "behind the modulation" else 1
    width, rows = sizes.width, _rows(tokens)
    plain, extra = case.gemm_seconds(width, targets * width, tokens), 0.0
    if producer == "behind the modulation":
        options = dict(**rows, n_in=width, itemsize=ITEMSIZE, modulated=True)
        extra += case.seconds(roofline.shrink_work(**options, targets=3, r=R, k=K))
        extra -= case.seconds(roofline.shrink_work(**options, targets=0))
    elif producer == "behind to_out":
        options = dict(**rows, n_in=width, n_out=width, itemsize=ITEMSIZE, targets=1, r=R, k=K)
        options |= dict(residual=True, gated=True)
        parts = -(-width // suite.kernels.TILE)
        extra += case.seconds(roofline.fused_linear_work(**options, next_columns=R + K, parts=parts)) / case.gemm
        extra -= case.seconds(roofline.fused_linear_work(**options)) / case.gemm
        extra += case.seconds(roofline.mix_work(rows=rows["rows"], parts=parts, r=R, k=K))
    else:
        shape = dict(batch=MEMBERS, tokens=tokens, heads=sizes.heads, width=width // sizes.heads, itemsize=ITEMSIZE)
        extra += case.seconds(roofline.linear_attention_work(**shape, next_columns=R + K))
        extra -= case.seconds(roofline.linear_attention_work(**shape))
        extra += case.seconds(roofline.mix_work(rows=rows["rows"], parts=sizes.heads, r=R, k=K))
    return plain / (plain * (1 + EXPAND_COLUMNS / width) / case.gemm + extra)


def forwards(side: int, case: Case) -> tuple[float, float]:
    """Seconds of the population's forward and of the plain compiled one, for `MEMBERS` images."""
    sizes, ours = sizes_of("full"), 0.0
    for launch in suite.kernels.launches(sizes, side, FULL.text_tokens, partial_sums=True):
        spent = launch.times * case.seconds(launch.work(members=MEMBERS, itemsize=ITEMSIZE))
        if launch.name.startswith("linear "):
            perturbed = not launch.name.startswith(("linear inverted", "linear point"))
            spent *= (1 + perturbed * EXPAND_COLUMNS / sizes.width) / case.gemm
        ours += spent
    return ours, plain_forward(sizes, side, case)


def plain_forward(sizes: Sizes, side: int, case: Case, *, text: int = FULL.text_tokens, passes: float = 1) -> float:
    """The products of our launches without their low-rank columns, at cuBLAS's speed, and `COMPILED_PASSES`."""
    t, w, c = side * side, sizes.width, sizes.channels
    block = (
        case.gemm_seconds(w, 3 * w, t)
        + 3 * case.gemm_seconds(w, w, t)
        + case.gemm_seconds(w, 2 * w, text)
        + case.gemm_seconds(w, 2 * c, t)
        + case.gemm_seconds(c, w, t)
    )
    cross = dict(batch=MEMBERS, tokens=t, text=text, heads=sizes.cross_heads, width=w // sizes.cross_heads)
    block += case.seconds(roofline.cross_attention_work(**cross, itemsize=ITEMSIZE))
    block += passes * sum(COMPILED_PASSES.values()) * MEMBERS * t * w * ITEMSIZE / roofline.KNOWN[case.device].bytes
    return sizes.blocks * block + case.gemm_seconds(sizes.text_width, w, text) + case.gemm_seconds(w, w, text)


def stages(pixels: int, case: Case) -> dict[str, float]:
    """Seconds an image of each stage of a step and of plain inference."""
    ours, plain = forwards(pixels // 32, case)
    work = {"decode": suite.decode.decode_work("full", pixels, MEMBERS)}
    work["score"] = suite.decode.score_work("full", MEMBERS)
    spent = {name: case.seconds(done) / MEMBERS / case.decode for name, done in work.items()}
    return {"ours": ours / MEMBERS, "plain": plain / MEMBERS} | spent


def reference_loops(pixels: int, case: Case) -> dict[str, float]:
    """Seconds of an image of each reference loop, over ours. Launches, noise, PIL and setting weights cost nothing.

    shared          300 tokens of text, the passes of an eager model, the scorer's weights read for 16 images; the same
                    decoder
    as published    the same in fp32 and TF32, so twice the bytes at half the rate, and the scorer's weights read for
                    each image; nothing for the second CLIP
    """
    spent, passes, images = stages(pixels, case), EAGER_PASSES, PROMPTS * REPEATS
    options = dict(text=FULL.reference_text, passes=passes)
    theirs = plain_forward(sizes_of("full"), pixels // 32, case, **options) / MEMBERS + spent["decode"]
    ours = spent["ours"] + spent["decode"] + spent["score"]
    many, one = (case.seconds(suite.decode.score_work("full", each)) / each / case.decode for each in (images, 1))
    return {"shared": (theirs + many) / ours, "as published": 2 * (theirs + one) / ours}


def update_share(pixels: int, case: Case) -> float:
    """Share of the update in a step at N = `update_members`, with one image for each of `prompts`."""
    sizes, members = sizes_of("full"), FULL.update_members
    w, t = sizes.width, sizes.text_width
    shapes = [(w, w)] * (8 * sizes.blocks) + [(t, w), (w, w), (w, 6 * w), (w, 32)] + [(256, w), (w, w)] * 2
    update = sum(
        case.seconds(roofline.es_update_work(shape=shape, pairs=members // 2, k=K))
        for n_in, n_out in shapes
        for shape in ((R, n_in), (n_out, R))
    )
    spent = stages(pixels, case)
    rest = members * FULL.prompts * (spent["ours"] + spent["decode"] + spent["score"])
    return update / (update + rest)


def predictions(case: Case) -> dict[str, float]:
    """The predicted figures, by the names of the summary."""
    found = {}
    shapes = [(n_in, n_out, tokens) for n_in, n_out in FULL.shapes for tokens in FULL.tokens]
    found["`linear_vs_gemm`"] = min(linear_alone(*shape, case) for shape in shapes)
    for producer in ("behind linear_attention", "behind to_out", "behind the modulation"):
        least = min(linear_in_block(producer, tokens, case) for tokens in FULL.tokens)
        found[f"`linear_in_block_vs_gemm`, {producer}"] = least
    for pixels in FULL.pixels:
        ours, plain = forwards(pixels // 32, case)
        found[f"`forward_vs_compiled`, {pixels} px"] = plain / ours
    for pixels in FULL.pixels:
        spent = stages(pixels, case)
        after = spent["decode"] + spent["score"]
        found[f"`step_vs_inference`, {pixels} px"] = (spent["plain"] + after) / (spent["ours"] + after)
        found[f"images/s of a whole step, {pixels} px"] = 1 / (spent["ours"] + after)
    for name, ratio in reference_loops(FULL.pixels[0], case).items():
        found[f"`step_vs_reference_loop`, {name}, {FULL.pixels[0]} px"] = ratio
    found["share of the update, N 1024, 512 px"] = update_share(FULL.pixels[0], case)
    return found


def tables(device: str = "H100") -> list[str]:
    """Lines of Markdown: the floors, then the predictions, of a device in `roofline.KNOWN`."""
    limits = roofline.KNOWN[device]
    head, ceilings = " / ".join(map(str, FULL.pixels)), (limits.flops[DTYPE], limits.operations, limits.bytes)
    lines = [f"| {MEMBERS} images, {head} px | a forward | products | vector | bytes |", "|---|---|---|---|---|"]
    for name, times, works in floors():
        cells = [name.replace("|", r"\|"), str(times)]
        for i, ceiling in enumerate(ceilings):
            cells.append(" / ".join(f"{1e6 * work[i] / ceiling:.0f}" for work in works))
        lines.append(f"| {' | '.join(cells)} |")
    cases = [case._replace(device=device) for case in CASES]
    columns = [predictions(case) for case in cases]
    lines += ["", f"| figure | {' | '.join(case.name for case in cases)} |", "|---|" + "---|" * len(cases)]
    for name in columns[0]:
        lines.append(f"| {name} | {' | '.join(f'{column[name]:.3g}' for column in columns)} |")
    return lines


def _rows(tokens: int) -> dict[str, int]:
    return dict(rows=MEMBERS * tokens, members=MEMBERS)
