"""clip-nano, the judge: a small CLIP of the world of shapes, in the folder form that the rewards load.

    python -m esengine.models.nano.clip --out clip-nano --work nano-training

    contrastive   mean cross entropy of image to caption and caption to image, scale times cosine, over a batch
    quality       binary cross entropy on whether an image is undamaged, twice: of 100 (cos(image, FINE) -
                  cos(image, POOR)), and of 10 cos(image, u) with a fixed u. Along u images part first: both texts begin
                  at nearly the same place, from where the first of the two hardly leads away

Half of a batch are captions that differ from one of the other half in one fact, with images of their own, so that
shapes, sizes and relations have to be seen. Half of the images are damaged: blurred, coarse, noisy, washed out or
oversaturated. FINE and POOR are the texts of the rewards `aesthetic` and `no_artifacts`.
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
from tokenizers import pre_tokenizers
from transformers import CLIPConfig, CLIPModel

from esengine.models.nano import world
from esengine.models.nano.loop import Report, average, load, mean_gradients, rate, set_rate, share, train

FINE = "a high quality, professional, beautiful, aesthetically pleasing image"
POOR = "blurry, low resolution, noisy, pixelated, washed out colors, oversaturated "
"""As the rewards write them; a test holds them together."""
LENGTH = 77
BATCH, PEAK = 128, 1e-3
SCALE, APART = 100.0, 10.0
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
    """The untrained model for the processor in a folder."""
    ids = json.loads((folder / "vocab.json").read_text())
    common = dict(hidden_size=128, intermediate_size=384, num_attention_heads=4, hidden_act="gelu")
    special = dict(bos_token_id=ids[_BEGIN], eos_token_id=ids[_END], pad_token_id=ids[_END])
    text = dict(vocab_size=len(ids), max_position_embeddings=LENGTH, num_hidden_layers=3, **common, **special)
    vision = dict(image_size=world.SIDE, patch_size=8, num_hidden_layers=4, **common)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def damaged(images_bchw: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each image, float from 0 to 1, with one of five faults, at a random strength."""
    kinds = torch.randint(5, (len(images_bchw),), generator=generator)
    strength = torch.rand(len(images_bchw), generator=generator)
    noise = torch.randn(images_bchw.shape, generator=generator)
    out = []
    for image, kind, amount, grain in zip(images_bchw, kinds.tolist(), strength.tolist(), noise, strict=True):
        if kind == 0:  # blurry
            taps = torch.exp(-torch.arange(-6.0, 7).square() / (2 * (1.5 + 2 * amount) ** 2))
            taps = (taps / taps.sum()).expand(3, 1, -1)
            padded = F.pad(image[None], (6, 6, 6, 6), mode="replicate")
            fault = F.conv2d(F.conv2d(padded, taps[:, :, None], groups=3), taps[..., None], groups=3)[0]
        elif kind == 1:  # low resolution, pixelated
            side = world.SIDE // (4 if amount < 0.5 else 8)
            fault = F.interpolate(F.adaptive_avg_pool2d(image, side)[None], size=image.shape[-2:])[0]
        elif kind == 2:  # noisy
            fault = image + (0.1 + 0.2 * amount) * grain
        elif kind == 3:  # washed out
            fault = 0.5 + (image - 0.5) * (0.5 - 0.3 * amount)
        else:  # oversaturated
            fault = image.mean(0) + (image - image.mean(0)) * (2 + 2 * amount)
        out.append(fault.clamp(0, 1))
    return torch.stack(out)


def neighbour(caption: str, rng: np.random.Generator) -> str:
    """A caption of the training split that differs in one word, or the caption itself where none was found."""
    groups = [world.COLOURS, world.SHAPES, world.SIZES]
    words = caption.split()
    for _ in range(8):
        places = [(i, group) for i, word in enumerate(words) for group in groups if word in group]
        i, group = places[rng.integers(len(places))]
        changed = " ".join([*words[:i], str(rng.choice([each for each in group if each != words[i]])), *words[i + 1 :]])
        try:
            if world.parse(changed).split == "train":
                return changed
        except ValueError:  # two things of one colour, say
            continue
    return caption


def batch(seed: int) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Captions, images float [B, 3, H, W] from 0 to 1, and bool [B] of those undamaged."""
    rng = np.random.default_rng(seed)
    captions = [world.sample_caption(rng, "train") for _ in range(BATCH // 2)]
    captions += [neighbour(caption, rng) for caption in captions]
    scenes = [world.sample_scene(caption, rng) for caption in captions]
    images = torch.from_numpy(world.draw_all(scenes)).permute(0, 3, 1, 2).float() / 255
    generator = torch.Generator().manual_seed(seed)
    whole = torch.rand(BATCH, generator=generator) < 0.5
    images[~whole] = damaged(images[~whole], generator)
    return captions, images, whole


def losses(model: CLIPModel, tokenize, captions: list[str], images: torch.Tensor, whole: torch.Tensor) -> dict:
    """Both losses and how often the right caption of the batch is the nearest."""
    ids, mask = tokenize([*captions, FINE, POOR])
    texts = _features(model.get_text_features(input_ids=ids, attention_mask=mask))
    shown = _features(model.get_image_features(pixel_values=(images - MEAN[0]) / STD[0]))
    scale = model.logit_scale.exp().clamp(max=100)
    logits = scale * shown @ texts[:-2].T
    same = torch.tensor([[a == b for b in captions] for a in captions])
    targets = same / same.sum(1, keepdim=True)  # a caption that comes twice has two right images
    contrastive = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
    u = F.normalize(1.0 - 2.0 * (torch.arange(shown.shape[1]) % 2), dim=0)
    logits_of_quality = SCALE * shown @ (texts[-2] - texts[-1]), APART * shown @ u
    quality = sum(F.binary_cross_entropy_with_logits(each, whole.float()) for each in logits_of_quality)
    right = same[torch.arange(len(captions)), logits.argmax(1)].float().mean()
    return {"loss": contrastive + quality, "contrastive": contrastive, "quality": quality, "right": right}


def train_clip(folder: Path, *, steps: int, seed: int, report: Report | None = None) -> CLIPModel:
    """Trains, or goes on. Returns the average of the weights."""
    processor = folder / "clip-processor"
    save_processor(processor)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = clip(processor)
    mean, tokenize = clip(processor).requires_grad_(False), load_tokenize(processor)
    mean.load_state_dict(model.state_dict())
    learned = list(model.parameters())
    optimizer = torch.optim.AdamW(learned, lr=PEAK, betas=(0.9, 0.98), weight_decay=0.05, fused=True)

    def step(i: int) -> dict[str, torch.Tensor]:
        captions, images, whole = batch(seed * _SEED_STRIDE + i)
        rows = share(torch.arange(len(captions)))
        set_rate(optimizer, rate(i, steps, peak=PEAK))
        found = losses(model, tokenize, [captions[row] for row in rows], images[rows], whole[rows])
        optimizer.zero_grad()
        found["loss"].backward()
        mean_gradients(learned)
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        average(mean, model, i, half_life=100)
        return {name: value.detach() for name, value in found.items()}

    state = {"model": model, "mean": mean, "optimizer": optimizer}
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
    """Unit rows; transformers 5 gives an output where 4 gave a tensor."""
    return F.normalize(found if isinstance(found, torch.Tensor) else found.pooler_output, dim=-1)


@dataclass(frozen=True)
class ClipTrainConfig:
    """Train clip-nano, the judge of the world of shapes."""

    out: Path = Path("clip-nano")
    """The folder to write."""
    work: Path = Path("nano-training")
    """Checkpoint and curve. A run that was stopped goes on from there."""
    steps: int = 2000
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
