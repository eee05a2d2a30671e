"""Is the reimplemented published loop as slow as the published code? A check of the peer, on a CPU.

    python bench/peer_ratio.py --json bench/results/cpu_peer_ratio.json
    python bench/peer_ratio.py --checkout HyperscaleES_T2I      with the published code itself, see peers/checkout.py

It times a step of sana-sprint-nano with 16 members and 4 prompts of 4 images each, by this engine and by
`bench/peers/published.py`. Both make a whole step: noise, images, scores and update. Both compute the same four scores,
and PickScore is the reward. They take turns in one process.

With `--checkout` the published code takes turns with them. The peer matches if its ratio to our step is within a fifth
of the published code's ratio. Without `--checkout` the ratio is compared with 5.2, a measured ratio of the published
code.

Until a stored record says that the peer matches, the suite marks its figure against the published loop as one that does
not count. Nothing is timed before the peer's images and scores agree with ours.
"""

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import record
import torch
from peers import checkout, published, reference_loop
from peers.reference_loop import ALPHA, LR_SCALE, MAX_NORM, PROMPTS, RANK, REPEATS, SIGMA, TARGETS, X0_ANGLE
from peft import LoraConfig
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

import esengine
from esengine.es.population import PEFT_PREFIX
from esengine.es.prompts import PromptSampler
from esengine.es.rule import UpdateRule
from esengine.models import RenderSettings, SanaSprint, TextEmbeddings, latents
from esengine.models.nano import CLIP, world
from esengine.rewards import Weighted, parse
from esengine.sampling.rollout import Renderer, score_task

RESULTS = Path(__file__).parent / "results"
FILE = RESULTS / "cpu_peer_ratio.json"
"""Where the suite looks whether the peer matches."""

EXPECTED, TOLERANCE = 5.2, 0.2
"""The ratio that the published code was once found to have on a CPU, and the share that the peer may be off."""

MEMBERS, CHUNK = 16, 64
REWARD = "pickscore(model=nano),clip_text(model=nano)=0,aesthetic(model=nano)=0,no_artifacts(model=nano)=0"
SCORE_TOLERANCE = 1e-3
"""Relative: the peer's image processor and its batches are not ours."""


def matches(ratio: float, expected: float = EXPECTED) -> bool:
    """Whether the peer's ratio is within a fifth of the published code's."""
    return abs(ratio - expected) <= TOLERANCE * expected


def stored_verdict(file: Path = FILE) -> tuple[bool, str]:
    """Whether a stored record lets the suite's figure count, and why or why not, in a sentence."""
    if not file.exists():
        return False, f"bench/results/{file.name} is missing; bench/peer_ratio.py makes it"
    found = json.loads(file.read_text(encoding="utf-8"))
    peer, code = found["ratio"]["of_medians"], found["expected"]
    how = f"the peer takes {peer:.2f} times our step on a CPU, the published code {code:.2f}"
    return bool(found["matches"]), f"bench/results/{file.name}: {how}"


def settings() -> RenderSettings:
    """The published run's sampler, at nano's own size."""
    return RenderSettings(x0_angle=X0_ANGLE, decode_chunk=CHUNK)


def ours(prompts: list[str]) -> tuple[esengine.Engine, Renderer, Weighted]:
    """An engine at the published run's settings and `MEMBERS`, what renders for it, and its reward."""
    model = SanaSprint.from_pretrained("nano")
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS))
    rule = UpdateRule(optimizer="sgd", lr_scale=LR_SCALE, max_norm=MAX_NORM)
    noise = esengine.Noise(sigma=SIGMA, rank=1, seed=0)
    population = esengine.attach(model.transformer, config, noise, rule=rule)
    texts = model.encode(prompts, instruction=False)
    engine = esengine.Engine(population, PromptSampler(len(prompts), PROMPTS, seed=0), size=MEMBERS, repeats=REPEATS)
    return engine, Renderer(model, texts, settings(), seed=0, chunk=CHUNK), parse(REWARD)


def peer(texts: TextEmbeddings) -> published.PublishedLoop:
    """The published loop on nano. Both of its CLIPs are clip-nano."""
    model = SanaSprint.from_pretrained("nano")
    vae = copy.deepcopy(model.vae).to(memory_format=torch.contiguous_format)
    scorer = published.Scorer(nano_judge(), nano_judge())
    return published.PublishedLoop(model.transformer, vae, texts, scorer, pixels=model.image_size)


def nano_judge() -> published.Judge:
    """clip-nano in float32, with transformers' own processor."""
    clip = CLIPModel.from_pretrained(CLIP, dtype=torch.float32, local_files_only=True).eval().requires_grad_(False)
    process = CLIPProcessor.from_pretrained(CLIP, local_files_only=True)
    return published.Judge(
        clip,
        lambda image: process(images=[image], return_tensors="pt")["pixel_values"],
        lambda texts: dict(process(text=texts, padding=True, return_tensors="pt")),
    )


@torch.no_grad()
def check(
    engine: esengine.Engine, render: Renderer, reward: Weighted, loop: published.PublishedLoop
) -> dict[str, float]:
    """A member's images by both, from the same weights and latents, and the scores of the same images.

    Returns:
        The most levels of 255 that an image differs by, and the worst relative difference of a score.

    Raises:
        RuntimeError: more than one level, or more than `SCORE_TOLERANCE`.
    """
    task, model, member = engine.ask(), render.model, 1
    rows, repeats = task.prompts.repeat(REPEATS), torch.arange(REPEATS).repeat_interleave(PROMPTS)
    state = engine.population.member_state_dict(step=task.step, member=member)
    loop.set_weights(loop.joined({name.removeprefix(PEFT_PREFIX): tensor for name, tensor in state.items()}))
    keys = dict(seed=0, step=task.step, prompts=rows, repeats=repeats)
    noise = latents(**keys, shape=loop.latent_shape)
    members = torch.full_like(rows, member)
    images = model.render(render.texts, **keys, members=members, population=engine.population, settings=settings())
    theirs = torch.stack([levels(image) for image in loop.images(task.step, rows, noise)])
    off = (images.int() - theirs.int()).abs().max().item()
    words = loop.words(rows)
    scores = reward.score(images, words)
    again = [
        loop.scorer(Image.fromarray(image.permute(1, 2, 0).numpy()), word)
        for image, word in zip(images, words, strict=True)
    ]
    named = {"pickscore": "pickscore", "aesthetic": "aesthetic", "text": "clip_text", "no_artifacts": "no_artifacts"}
    worst = 0.0
    for field, name in named.items():
        got = torch.stack([getattr(each, field) for each in again])
        worst = max(worst, ((got - scores[name]) / scores[name]).abs().max().item())
    if off > 1 or not worst <= SCORE_TOLERANCE:
        raise RuntimeError(
            f"peer: expected images within 1 level and scores within {SCORE_TOLERANCE:g} of ours, got {off} levels "
            f"and {worst:.1e}; nothing was timed"
        )
    return {"levels": off, "score_difference": worst}


def levels(image: Image.Image) -> torch.Tensor:
    """uint8 [3, H, W] of a PIL image."""
    return (
        torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        .view(image.height, image.width, 3)
        .permute(2, 0, 1)
    )


def measure(rounds: int, members: int = MEMBERS, folder: Path | None = None) -> dict[str, Any]:
    """The check, then seconds of a step of either loop, turn about; their ratio, and whether it matches.

    Args:
        rounds: samples of each.
        members: N.
        folder: a checkout of the published code, which is then measured beside them.
    """
    prompts = world.captions("train", 64, 0)
    engine, render, reward = ours(prompts)
    engine.size = members
    loop = peer(render.texts)
    agreement = check(engine, render, reward, loop)

    def our_step() -> None:
        task = engine.ask()
        scores, _ = score_task(render, reward, engine.population, task, lambda images: None)
        engine.tell(task, scores["combined"])

    steps = iter(range(1 << 30))
    sampler = PromptSampler(len(prompts), PROMPTS, seed=0)

    def published_step() -> None:
        step = next(steps)
        loop.step(step, sampler.draw(step), members)

    variants = {"published": published_step, "ours": our_step}
    if folder is not None:
        variants["published code"] = checkout.step(folder, render.texts, members)
    seconds = record.interleaved(variants, rounds)
    ratio = record.ratio(seconds["published"], seconds["ours"])
    itself, expected = {}, EXPECTED
    if folder is not None:
        itself["ratio"] = record.ratio(seconds["published code"], seconds["ours"])
        expected = itself["ratio"]["of_medians"]
        itself["peer_over_it"] = record.ratio(seconds["published"], seconds["published code"])
        itself["commit"] = record.commit_in(folder)
    return {
        "members": members,
        "prompts": PROMPTS,
        "repeats": REPEATS,
        "text_length": {"published": reference_loop.TEXT_LENGTH, "ours": "trimmed"},
        "reward": REWARD,
        "check": agreement,
        "seconds": seconds,
        "ratio": ratio,
        "published_code": itself or None,
        "expected": expected,
        "tolerance": TOLERANCE,
        "matches": matches(ratio["of_medians"], expected),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=int, default=7, help="steps of either loop that are timed (7); one more each warms up"
    )
    parser.add_argument("--threads", type=int, default=1, help="of torch (1)")
    parser.add_argument("--json", type=Path, help=f"store the record there; the suite reads bench/results/{FILE.name}")
    parser.add_argument(
        "--checkout", type=Path, help="a folder with the published code; it is run, so look at it first"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    environment = record.environment()
    try:
        found = measure(options.rounds, folder=options.checkout)
    except ValueError as error:
        parser.error(str(error))
    for name, taken in found["seconds"].items():
        print(f"{name:14}", "  ".join(f"{p} {taken[p]:.3f} s" for p in ("median", "p20", "p80")))
    ratio, expected = found["ratio"], found["expected"]
    print(f"ratio {ratio['of_medians']:.2f}, by round {ratio['paired_p20']:.2f} to {ratio['paired_p80']:.2f}")
    if found["published_code"]:
        itself = found["published_code"]
        print(f"the published code itself: ratio {itself['ratio']['of_medians']:.2f} on this machine;", end=" ")
        print(f"the peer takes {itself['peer_over_it']['of_medians']:.2f} of its time")
    verdict = "within" if found["matches"] else "NOT within"
    low, high = expected * (1 - TOLERANCE), expected * (1 + TOLERANCE)
    print(f"{verdict} a fifth of {expected:.2f}, which is {low:.2f} to {high:.2f}")
    print(f"the suite's figure against the published loop {'counts' if found['matches'] else 'does not count'}")
    if options.json is not None:
        what = {"benchmark": "peer_ratio", "model": "sana-sprint-nano", "environment": environment}
        record.write(options.json, {**what, **found, "load_average_after": record.environment()["load_average"]})
        print(f"wrote {options.json}")


if __name__ == "__main__":
    main()
