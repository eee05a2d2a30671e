"""How often is a judge right? It judges pictures of the nano world with their captions and with wrong ones.

    python bench/nano checker [--count 2000] [--json bench/results/nano_checker.json]
    python bench/nano checker --reward "pickscore(model=nano)" --json bench/results/nano_clip.json

A wrong caption differs from the right one in a single fact that both name. There is one for each kind of fact in
the caption. "binding" exchanges the colours of two objects. The same pictures are scored as drawn, blurred, with noise,
with both, and enlarged.
"""

import argparse
import statistics
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import record
import torch
import torch.nn.functional as F

from esengine.models.nano import world
from esengine.rewards import Reward, parse

SIGMA, NOISE = 1.0, 8.0
KINDS = ("colour", "shape", "size", "place", "relation", "background", "binding")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--reward", default="checker", help="the judge, as `esengine train --reward` takes it")
    parser.add_argument("--count", type=int, default=2000, help="captions of the split")
    parser.add_argument("--split", choices=world.SPLITS, default="validation")
    parser.add_argument("--seed", type=int, default=0, help="of captions, scenes, wrong captions and noise")
    parser.add_argument("--json", type=Path, help="store the record there")
    options = parser.parse_args()
    judges, environment = parse(options.reward), record.environment()
    ((name, judge),) = [(term.name, term.reward) for term in judges.terms]
    rng = np.random.default_rng(options.seed)
    captions = world.captions(options.split, options.count, options.seed)
    scenes = [world.sample_scene(caption, rng) for caption in captions]
    drawn = torch.from_numpy(world.draw_all(scenes)).permute(0, 3, 1, 2).contiguous()
    wrong = [
        (row, kind, caption)
        for row, scene in enumerate(scenes)
        for kind, caption in world.wrong_captions(captions[row], scene, rng).items()
    ]
    start = time.perf_counter()
    judge(drawn, captions)
    speed = options.count / (time.perf_counter() - start)
    conditions = {view: measure(judge, images, captions, wrong) for view, images in views(drawn, options.seed).items()}
    for view, found in conditions.items():
        print(f"{view}: mean {found['mean']:.4f}, at least 0.95: {found['share_at_least_0.95']:.4f}")
        for kind, each in found["wrong"].items():
            print(
                f"  {kind:10} {each['pairs']:5} pairs, right caption higher {each['right_is_higher']:.4f}, "
                f"mean loss {each['mean_loss']:.3f}"
            )
    print(f"{speed:.0f} images/s")
    if options.json:
        settings = {"count": options.count, "split": options.split, "seed": options.seed, **judges.settings()[name]}
        found = {"settings": settings, "conditions": conditions, "images_per_second": speed}
        record.write(options.json, {"what": f"{name} on the nano world", **found, **environment})


def views(images: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
    """The same pictures, uint8 [B, 3, H, W], under each condition."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed)) * NOISE
    blurred = blur(images.float(), SIGMA)
    made = {
        "as drawn": images.float(),
        f"blur of sigma {SIGMA:g}": blurred,
        f"noise of deviation {NOISE:g}": images + noise,
        "blur and noise": blurred + noise,
        "256 x 256": F.interpolate(images.float(), (256, 256), mode="bicubic"),
    }
    return {name: each.round().clamp(0, 255).to(torch.uint8) for name, each in made.items()}


def blur(images: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur of float32 [B, 3, H, W], the border repeated outwards."""
    reach = int(4 * sigma + 0.5)
    kernel = torch.exp(-(torch.arange(-reach, reach + 1.0) ** 2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    images = F.pad(images, (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(images, kernel, groups=3), kernel.transpose(2, 3), groups=3)


def measure(judge: Reward, images: torch.Tensor, captions: list[str], wrong: list[tuple[int, str, str]]) -> dict:
    """Scores of the own captions, and by kind how often and by how much they beat the wrong ones."""
    right = judge(images, captions).tolist()
    others = judge(images.roll(1, 0), captions).tolist()
    losses = defaultdict(list)
    scores = judge(images[[row for row, _, _ in wrong]], [caption for _, _, caption in wrong]).tolist()
    for (row, kind, _), score in zip(wrong, scores, strict=True):
        losses[kind].append(right[row] - score)
    return {
        "mean": statistics.mean(right),
        "standard_error": statistics.stdev(right) / len(right) ** 0.5,
        "least": min(right),
        "share_at_least_0.95": sum(score >= 0.95 for score in right) / len(right),
        "mean_of_another_captions_picture": statistics.mean(others),
        "wrong": {
            kind: {
                "pairs": len(losses[kind]),
                "right_is_higher": sum(loss > 0 for loss in losses[kind]) / len(losses[kind]),
                "mean_loss": statistics.mean(losses[kind]),
                "least_loss": min(losses[kind]),
            }
            for kind in KINDS
            if losses[kind]
        },
    }
