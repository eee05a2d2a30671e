"""How well does sana-sprint-nano draw? Five judges on held-out captions, by sampling steps, against true pictures.

    python bench/nano base --count 1000 --json bench/results/nano_base.json
    python bench/nano base --count 1000 --model sana-sprint-nano --json bench/results/nano_again.json   # trained again

"drawn" is another picture of the same caption, drawn by the world. "decoded" is that picture through the autoencoder.
All models draw from the same noise. Differences are paired by caption.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import record
import torch

from esengine.models import RenderSettings, SanaSprint
from esengine.models.defaults import defaults
from esengine.models.nano import world
from esengine.models.nano.autoencoder import encode
from esengine.rewards import Weighted, parse

CHUNK, SCALE = 64, 4.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, default=record.ROOT / "models/nano/sana-sprint-nano")
    parser.add_argument("--count", type=int, default=500, help="captions")
    parser.add_argument("--repeats", type=int, default=1, help="images of each caption")
    parser.add_argument("--split", choices=world.SPLITS, default="test")
    parser.add_argument("--seed", type=int, default=0, help="of captions, scenes and noise")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument(
        "--scales", type=float, nargs="*", default=[2.0, 3.0, 6.0, 8.0], help="of guidance, first steps"
    )
    parser.add_argument("--json", type=Path, help="store the record there")
    options = parser.parse_args()
    judges, environment = parse(defaults("nano").benchmark("nano")), record.environment()
    training = json.loads((options.model / "training.json").read_text())
    captions = world.captions(options.split, options.count, options.seed)
    rows = [caption for caption in captions for _ in range(options.repeats)]
    model = SanaSprint.from_pretrained(options.model)
    texts = model.encode(captions)
    rng = np.random.default_rng(options.seed)
    drawn = world.draw_all([world.sample_scene(caption, rng) for caption in rows])
    with torch.no_grad():
        z_bchw = encode(model.vae, drawn) * model.vae.config.scaling_factor
    images = {
        "drawn": torch.from_numpy(drawn).permute(0, 3, 1, 2),
        "decoded": model.decode(z_bchw, chunk=CHUNK),
    }
    named = {f"{steps} step" + "s" * (steps > 1): (steps, SCALE) for steps in options.steps}
    first = next(iter(named))
    named |= {f"{first}, w = {scale:g}": (options.steps[0], scale) for scale in options.scales}
    rates = {}
    for name, (steps, scale) in named.items():
        start = time.perf_counter()
        images[name] = render(model, texts, options, steps, scale)
        rates[name] = len(rows) / (time.perf_counter() - start)
    found = {}
    for name, each in images.items():
        # a caption is a sample
        scored = {
            judge: s.double().numpy().reshape(-1, options.repeats).mean(1) for judge, s in score(judges, each, rows)
        }
        found[name] = scored
    scores = {}
    for judge in judges.names:
        print(judge)
        for name, scored in found.items():
            mean, above = summary(scored[judge]), summary(scored[judge] - found[first][judge])
            scores.setdefault(judge, {})[name] = {**mean, "above_first": above}
            print(f"  {name:14}  {mean['mean']:.4f} +- {mean['standard_error']:.4f}", end="   ")
            print(f"above {first}: {above['mean']:+.4f} +- {above['standard_error']:.4f}")
    if options.json:
        what = {
            "what": "judges of sana-sprint-nano",
            "model": model.identity(),
            "training": training,
            "settings": {key: value for key, value in vars(options).items() if key not in ("json", "model")},
            "rewards": judges.settings(),
        }
        record.write(options.json, {**what, "scores": scores, "images_per_second": rates, **environment})


def score(judges: Weighted, images: torch.Tensor, captions: list[str]) -> list[tuple[str, torch.Tensor]]:
    """(judge, float32 [B]) of each judge."""
    parts = [
        judges.score(images[start : start + CHUNK], captions[start : start + CHUNK])
        for start in range(0, len(captions), CHUNK)
    ]
    return [(judge, torch.cat([part[judge] for part in parts])) for judge in judges.names]


def render(model: SanaSprint, texts, options: argparse.Namespace, steps: int, scale: float) -> torch.Tensor:
    """uint8 [captions * repeats, 3, 64, 64]."""
    settings = RenderSettings(num_steps=steps, guidance_scale=scale, decode_chunk=CHUNK)
    prompts = torch.arange(options.count).repeat_interleave(options.repeats)
    repeats = torch.arange(options.repeats).repeat(options.count)
    length = texts.trimmed_length(prompts)
    chunks = zip(prompts.split(CHUNK), repeats.split(CHUNK), strict=True)
    return torch.cat(
        [
            model.render(texts, seed=options.seed, step=0, prompts=p, repeats=r, settings=settings, text_length=length)
            for p, r in chunks
        ]
    )


def summary(values: np.ndarray) -> dict[str, float]:
    return {"mean": float(values.mean()), "standard_error": float(values.std(ddof=1) / len(values) ** 0.5)}
