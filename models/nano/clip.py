"""clip-nano, the judge: a small CLIP of the world of shapes, in the folder form that the rewards load.

    python -m esengine.models.nano.clip --out clip-nano --work nano-training

    contrastive   mean cross entropy of image to caption and caption to image, scale times cosine, over a batch. Each
                  scene is there as drawn and damaged; a caption's right image is the one that is drawn
    quality       binary cross entropy on whether an image is as drawn, three times: of SCALE (cos(image, FINE) - t), of
                  -SCALE (cos(image, POOR) - t') with learned thresholds t and t', and of APART cos(image, u) with a
                  fixed u, along which images part first: both texts begin at nearly the same place, from where the
                  other two hardly lead away
    facts         what one linear probe reads of each colour off the features of an image, and off those of a caption:
                  is an object of it there, where, how large, of which shape; and the background. In training alone:
                  without it a few thousand steps see colours and no places

Half of the captions differ from one of the other half in one fact, of any kind, with a scene of their own. FINE and
POOR are the texts of the rewards `aesthetic` and `no_artifacts`.
"""

import copy
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from tokenizers import pre_tokenizers
from transformers import CLIPConfig, CLIPModel

from esengine.models.nano import world
from esengine.models.nano.loop import Report, average, descend, last_values, load, rate, train
from esengine.models.nano.muon import optimizers

FINE = "a high quality, professional, beautiful, aesthetically pleasing image"
POOR = "blurry, low resolution, noisy, pixelated, washed out colors, oversaturated "
"""As the rewards write them; a test holds them together."""
LENGTH = 77
BATCH, WIDTH, PATCH = 128, 128, 8
SCALE, APART, FACTS = 100.0, 10.0, 1.0
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
_SEED_STRIDE = 1 << 24
_BEGIN, _END = "<|startoftext|>", "<|endoftext|>"


def save_processor(folder: Path) -> None:
    """CLIP's tokenizer files, whose merges make each word of the world one token, and its preprocessor config."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _merges(sorted({*world.WORDS, *FINE.replace(",", " ").split(), *POOR.replace(",", " ").split()}))
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(merge) for merge in merges), _BEGIN, _END]
    tokens = list(dict.fromkeys(tokens))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    names = {"bos_token": _BEGIN, "eos_token": _END, "unk_token": _END, "pad_token": _END}
    about = {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=1) + "\n")
    side = {"height": world.SIDE, "width": world.SIDE}
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True, "size": {"shortest_edge": world.SIDE}, "resample": 3, "do_center_crop": True,
        "crop_size": side, "do_rescale": True, "do_normalize": True, "image_mean": MEAN, "image_std": STD,
        "do_convert_rgb": True,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def _merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Merges of a byte-pair encoding that make each word one token: those of a word come after all that it needs.

    tokenizers' own trainer breaks ties differently in every process.
    """
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pairs = list(pairwise(parts))
            pair = min(pairs, key=lambda each: ranks.get(each, len(ranks)))
            ranks.setdefault(pair, len(ranks))
            at = pairs.index(pair)
            parts[at : at + 2] = ["".join(pair)]
    return list(ranks)


def load_tokenize(folder: Path):
    """texts -> int64 [B, L] and mask [B, L], padded to the longest."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)

    def tokenize(texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        found = tokenizer(list(texts), padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
        return found["input_ids"], found["attention_mask"]

    return tokenize


def clip(folder: Path) -> CLIPModel:
    """The untrained model for the processor in a folder; with sin-cos positions it sees places sooner."""
    ids = json.loads((folder / "vocab.json").read_text())
    common = dict(hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_attention_heads=4, hidden_act="gelu")
    special = dict(bos_token_id=ids[_BEGIN], eos_token_id=ids[_END], pad_token_id=ids[_END])
    text = dict(vocab_size=len(ids), max_position_embeddings=LENGTH, num_hidden_layers=3, **common, **special)
    vision = dict(image_size=world.SIDE, patch_size=PATCH, num_hidden_layers=4, **common)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))
    positions = get_2d_sincos_pos_embed(WIDTH, world.SIDE // PATCH, output_type="pt")
    with torch.no_grad():
        model.vision_model.embeddings.position_embedding.weight[1:] = 0.2 * positions.float()
    return model


class Probe(torch.nn.Module):
    """What training alone has: a scene's facts as a linear function of features, and the thresholds t and t'."""

    def __init__(self):
        super().__init__()
        self.read = torch.nn.Linear(WIDTH, len(world.COLOURS) * (5 + len(world.SHAPES)))
        self.thresholds = torch.nn.Parameter(torch.zeros(2))

    def loss(self, features_bd: torch.Tensor, scenes: Sequence[world.Scene]) -> torch.Tensor:
        """How wrong the facts are that are read off features [B, D] of these scenes or of their captions."""
        there, where, shape, background = facts(scenes)
        found = self.read(features_bd).unflatten(1, (len(world.COLOURS), -1))
        return (
            4 * F.binary_cross_entropy_with_logits(found[..., 0], there.float())
            + F.mse_loss(found[..., 1:4][there], where[there])
            + F.cross_entropy(found[..., 5:][there], shape[there])
            + F.cross_entropy(found[..., 4], background)
        )


def facts(scenes: Sequence[world.Scene]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """By scene and colour: whether an object has it, bool [B, C]; its x, y and radius, each about -1 to 1, float32
    [B, C, 3]; its shape, int64 [B, C]; and by scene the colour of the background, int64 [B]."""
    colours, size = list(world.COLOURS), (len(scenes), len(world.COLOURS))
    there, where, shape = (
        torch.zeros(size, dtype=torch.bool),
        torch.zeros(*size, 3),
        torch.zeros(size, dtype=torch.long),
    )
    for row, scene in enumerate(scenes):
        for each in scene.objects:
            at = row, colours.index(each.colour)
            there[at], shape[at] = True, world.SHAPES.index(each.shape)
            where[at] = torch.tensor([(each.x - 32) / 16, (each.y - 32) / 16, (each.radius - 10) / 3])
    return there, where, shape, torch.tensor([colours.index(scene.background) for scene in scenes])


def damaged(images_bchw: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each image, float from 0 to 1, with one of five faults, at a random strength."""
    kinds = torch.randint(5, (len(images_bchw),), generator=generator)
    strength = torch.rand(len(images_bchw), generator=generator)
    noise = torch.randn(images_bchw.shape, generator=generator)
    out = []
    for image, kind, amount, grain in zip(images_bchw, kinds.tolist(), strength.tolist(), noise, strict=True):
        if kind == 0:  # blurry
            taps = torch.exp(-torch.arange(-9.0, 10).square() / (2 * (0.7 + 2.8 * amount) ** 2))
            taps = (taps / taps.sum()).expand(3, 1, -1)
            padded = F.pad(image[None], (9, 9, 9, 9), mode="replicate")
            fault = F.conv2d(F.conv2d(padded, taps[:, :, None], groups=3), taps[..., None], groups=3)[0]
        elif kind == 1:  # low resolution, pixelated
            side = world.SIDE // (2, 4, 8)[int(3 * amount)]
            fault = F.interpolate(F.adaptive_avg_pool2d(image, side)[None], size=image.shape[-2:])[0]
        elif kind == 2:  # noisy
            fault = image + (0.04 + 0.26 * amount) * grain
        elif kind == 3:  # washed out
            fault = 0.5 + (image - 0.5) * (0.8 - 0.6 * amount)
        else:  # oversaturated
            fault = image.mean(0) + (image - image.mean(0)) * (1.4 + 2.6 * amount)
        out.append(fault.clamp(0, 1))
    return torch.stack(out)


def neighbour(caption: str, scene: world.Scene, rng: np.random.Generator) -> str:
    """A caption of the training split that is wrong in one fact of the scene, or the caption where there is none."""
    wrong = [each for each in world.wrong_captions(caption, scene, rng).values() if world.parse(each).split == "train"]
    return str(rng.choice(wrong)) if wrong else caption


def batch(seed: int) -> tuple[list[str], list[world.Scene], torch.Tensor]:
    """Captions [B/2], a scene of each, and images float [B, 3, H, W] from 0 to 1: all as drawn, then all damaged."""
    rng = np.random.default_rng(seed)
    captions = [world.sample_caption(rng, "train") for _ in range(BATCH // 4)]
    scenes = [world.sample_scene(caption, rng) for caption in captions]
    others = [neighbour(caption, scene, rng) for caption, scene in zip(captions, scenes, strict=True)]
    captions, scenes = captions + others, scenes + [world.sample_scene(other, rng) for other in others]
    drawn = torch.from_numpy(world.draw_all(scenes)).permute(0, 3, 1, 2).float() / 255
    return captions, scenes, torch.cat([drawn, damaged(drawn, torch.Generator().manual_seed(seed))])


def losses(
    model: CLIPModel, probe: Probe, tokenize, captions: list[str], scenes: list[world.Scene], images: torch.Tensor
) -> dict[str, torch.Tensor]:
    """All losses; how often a drawn image's own caption is the nearest, and is nearer to it than to its twin."""
    ids, mask = tokenize([*captions, FINE, POOR])
    read = _features(model.get_text_features(input_ids=ids, attention_mask=mask))
    seen = _features(model.get_image_features(pixel_values=(images - MEAN[0]) / STD[0]))
    texts, shown, half = F.normalize(read, dim=-1), F.normalize(seen, dim=-1), len(captions)
    logits = model.logit_scale.exp().clamp(max=100) * shown @ texts[:-2].T
    same = torch.tensor([[a == b for b in captions] for a in captions]).float()
    same = same / same.sum(1, keepdim=True)  # a caption that comes twice has two right images
    own, twins = logits[:half], logits[half:]
    images_to_captions = F.cross_entropy(logits, torch.cat([same, same]))
    captions_to_images = F.cross_entropy(logits.T, torch.cat([same, torch.zeros_like(same)], 1))
    found = {"contrastive": (images_to_captions + captions_to_images) / 2}
    u = F.normalize(1.0 - 2.0 * (torch.arange(WIDTH) % 2), dim=0)
    fine, poor = (shown @ texts[-2:].T - probe.thresholds).unbind(1)
    whole = (torch.arange(len(images)) < half).float()
    of_quality = SCALE * fine, -SCALE * poor, APART * shown @ u
    found["quality"] = sum(F.binary_cross_entropy_with_logits(each, whole) for each in of_quality) / 3
    found["facts"] = (probe.loss(seen, [*scenes, *scenes]) + probe.loss(read[:-2], scenes)) / 2
    found["loss"] = found["contrastive"] + found["quality"] + FACTS * found["facts"]
    found["right"] = (same[torch.arange(half), own.argmax(1)] > 0).float().mean()
    found["before"] = (own.diagonal() > twins.diagonal()).float().mean()
    return found


def train_clip(folder: Path, *, steps: int, seed: int, report: Report | None = None) -> CLIPModel:
    """Trains, or goes on. Returns the average of the weights."""
    processor = folder / "clip-processor"
    save_processor(processor)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, probe = clip(processor), Probe()
    mean, tokenize = copy.deepcopy(model).requires_grad_(False), load_tokenize(processor)
    muon, adamw = optimizers(model, probe, lr=1e-3)

    def step(i: int) -> dict[str, torch.Tensor]:
        found = losses(model, probe, tokenize, *batch(seed * _SEED_STRIDE + i))
        descend((muon, adamw), found["loss"], rate(i, steps))
        average(mean, model, i, half_life=100)
        return {name: value.detach() for name, value in found.items()}

    state = {"model": model, "probe": probe, "mean": mean, "muon": muon, "adamw": adamw}
    train("clip", folder, step, steps=steps, state=state, seed=seed, report=report)
    return mean


def save_clip(folder: Path, model: CLIPModel) -> None:
    """The folder that `pickscore(model=...)` and its companions load; float16, as it does for cosines."""
    save_processor(folder)
    copy.deepcopy(model).half().save_pretrained(folder, safe_serialization=True)


def read_clip(folder: Path) -> CLIPModel:
    """The averaged weights of a training folder. Raises FileNotFoundError where there are none."""
    model = clip(folder / "clip-processor")
    if not load(folder / "clip.safetensors", {"mean": model}):
        raise FileNotFoundError(f"folder: expected clip.safetensors, got none in {folder}")
    return model


def _features(found) -> torch.Tensor:
    """Rows; transformers 5 gives an output where 4 gave a tensor."""
    return found if isinstance(found, torch.Tensor) else found.pooler_output


@dataclass(frozen=True)
class ClipTrainConfig:
    """Train clip-nano, the judge of the world of shapes."""

    out: Path = Path("clip-nano")
    """The folder to write."""
    work: Path = Path("nano-training")
    """Checkpoint and curve. A run that was stopped goes on from there."""
    steps: int = 3000
    """Of 128 images."""
    seed: int = 0
    """Of weights, images and batches."""


def main(args: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    config = tyro.cli(ClipTrainConfig, args=args, prog="python -m esengine.models.nano.clip")
    config.work.mkdir(parents=True, exist_ok=True)

    def show(stage: str, done: int, steps: int, measured: dict[str, float]) -> None:
        values = "  ".join(f"{name} {value:.4g}" for name, value in measured.items())
        print(f"{stage} {done}/{steps}  {values}", flush=True)  # noqa: T201

    save_clip(config.out, train_clip(config.work, steps=config.steps, seed=config.seed, report=show))
    record = {
        "seed": config.seed,
        "torch": torch.__version__,
        "clip": {"images": BATCH, **last_values(config.work, "clip")},
    }
    (config.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
