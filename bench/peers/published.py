"""The published ES-LoRA run's loop as it was published, reimplemented; see `reference_loop`.

    model         transformer and decoder in float32; latents and guidance in float16
    text          encoded beforehand, float16, padded to 300 tokens, moved to the device for every member
    images        of a member in one forward and one decode, then PIL images
    scores        one image at a time, by two CLIPs: PickScore, and three scores of CLIP B/32 that have no weight. The
                  text of an image is tokenised and encoded again for each CLIP

Left out is what is no part of the algorithm: printed lines, a tracker, and pictures of the best and worst member.
The published script compiles transformer and decoder on a GPU by default. Here they run eager.

Legend: B images of a member, L tokens, C channels of a latent.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from diffusers.image_processor import PixArtImageProcessor
from PIL.Image import Image
from torch import nn
from transformers import CLIPImageProcessor, CLIPModel

from esengine.models import TextEmbeddings
from esengine.rewards.clip import Aesthetic, NoArtifacts
from peers.reference_loop import REPEATS, TEXT_LENGTH, X0_ANGLE, ReferenceLoop

ANGLE = math.pi / 2
"""The trigflow angle at which the model is called."""

GUIDANCE = 4.5
LATENT_DTYPE = torch.float16


class Judge(NamedTuple):
    """A CLIP and what goes before it.

    Attributes:
        clip: both towers.
        pixels: one PIL image -> float32 [1, 3, h, w] on the CPU.
        tokens: T texts -> `input_ids` and `attention_mask`, each int64 [T, L].
    """

    clip: CLIPModel
    pixels: Callable[[Image], torch.Tensor]
    tokens: Callable[[list[str]], dict[str, torch.Tensor]]

    def features(self, image: Image, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Unit features of an image [1, K] and of texts [T, K], computed anew."""
        device = self.clip.device
        seen = self.clip.get_image_features(pixel_values=self.pixels(image).to(device))
        read = self.clip.get_text_features(**{name: ids.to(device) for name, ids in self.tokens(texts).items()})
        return _unit(seen), _unit(read)


class Scores(NamedTuple):
    """Of one image, each a float32 scalar on the judges' device."""

    pickscore: torch.Tensor
    aesthetic: torch.Tensor
    text: torch.Tensor
    no_artifacts: torch.Tensor


class Scorer:
    """The four scores of the published run, of one image.

    Args:
        pick: PickScore's CLIP.
        clip: of the other three scores.
    """

    def __init__(self, pick: Judge, clip: Judge):
        self.pick, self.clip = pick, clip

    @torch.no_grad()
    def __call__(self, image: Image, prompt: str) -> Scores:
        seen, read = self.clip.features(image, [Aesthetic.text, prompt, NoArtifacts.text])
        aesthetic, text, artifacts = ((seen @ read.T + 1) / 2).mean(0)
        seen, read = self.pick.features(image, [prompt])
        pickscore = (self.pick.clip.logit_scale.exp() * (read @ seen.T)).mean()
        return Scores(pickscore, aesthetic, text, 1 - artifacts)


def made_up_judge(clip: CLIPModel, tokenize: Callable[[str], torch.Tensor]) -> Judge:
    """A stand-in CLIP with transformers' image processor, and token ids int64 [1, L] of a text that are made up."""

    def tokens(texts: list[str]) -> dict[str, torch.Tensor]:
        ids = torch.cat([tokenize(text) for text in texts])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return Judge(clip, image_processor(clip.config.vision_config.image_size), tokens)


def image_processor(size: int) -> Callable[[Image], torch.Tensor]:
    """transformers' own for a CLIP of images of `size` x `size`."""
    process = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return lambda image: process(images=[image], return_tensors="pt")["pixel_values"]


class PublishedLoop(ReferenceLoop):
    """The published loop; the reward is PickScore.

    Args:
        transformer: float32; gets the adapter.
        vae: float32.
        texts: embeddings of the prompts.
        scorer: what an image is scored with.
        pixels: height and width of an image.
        seed: of the adapter, the noise and the latents.
        text_length: tokens to pad to.

    Raises:
        ValueError: transformer or vae of another dtype.
    """

    def __init__(
        self,
        transformer: nn.Module,
        vae: nn.Module,
        texts: TextEmbeddings,
        scorer: Scorer,
        *,
        pixels: int,
        seed: int = 0,
        text_length: int = TEXT_LENGTH,
    ):
        for name, module in (("transformer", transformer), ("vae", vae)):
            if module.dtype != torch.float32:
                raise ValueError(f"{name}: expected float32, got {str(module.dtype).removeprefix('torch.')}")
        super().__init__(transformer, seed=seed)
        self.vae, self.scorer, self.prompts = vae, scorer, texts.prompts
        embeds, self.mask_pl = texts.batch(torch.arange(len(texts)), length=text_length)
        self.embeds_plc = embeds.half()
        scale = 2 ** (len(vae.config.encoder_block_out_channels) - 1)
        self.latent_shape = transformer.config.in_channels, pixels // scale, pixels // scale
        self.to_pil = PixArtImageProcessor(vae_scale_factor=scale).postprocess

    @torch.no_grad()
    def scores(self, step: int, prompts: torch.Tensor) -> torch.Tensor:
        rows = prompts.repeat(REPEATS)  # all prompts, then all again
        found = [self.scorer(*each) for each in zip(self.images(step, rows), self.words(rows), strict=True)]
        by_name = Scores(*map(torch.stack, zip(*found, strict=True)))
        for each in by_name:
            each.mean().item()  # the published loop reads every mean, and so waits for the device
        return by_name.pickscore.float().cpu().view(REPEATS, len(prompts)).T

    def words(self, rows: torch.Tensor) -> list[str]:
        return [self.prompts[index] for index in rows.tolist()]

    @torch.no_grad()
    def images(self, step: int, rows: torch.Tensor, latents_bchw: torch.Tensor | None = None) -> list[Image]:
        """B images of prompts, int64 [B], by the weights that are set.

        Args:
            latents_bchw: standard normal. None: drawn from a generator that is seeded alike for every member.
        """
        if latents_bchw is None:
            generator = torch.Generator(self.device).manual_seed(self.seed * 1_000_003 + step)
            options = dict(generator=generator, device=self.device, dtype=LATENT_DTYPE)
            latents_bchw = torch.randn(len(rows), *self.latent_shape, **options)
        embeds_blc, mask_bl = self.embeds_plc[rows].to(self.device), self.mask_pl[rows].to(self.device)
        x0_bchw = self._x0(latents_bchw.to(LATENT_DTYPE), embeds_blc, mask_bl)
        decoded = self.vae.decode(x0_bchw / self.vae.config.scaling_factor, return_dict=False)[0]
        return self.to_pil(decoded, output_type="pil")

    def _x0(self, x_bchw: torch.Tensor, embeds_blc: torch.Tensor, mask_bl: torch.Tensor) -> torch.Tensor:
        """x0 / sigma_data, float32 [B, C, h, w], from x / sigma_data: the trigflow sampler's one step."""
        angle = torch.tensor(ANGLE, device=x_bchw.device).expand(len(x_bchw))
        time_b = angle.sin() / (angle.cos() + angle.sin())
        guidance_b = torch.full((len(x_bchw),), GUIDANCE, dtype=LATENT_DTYPE, device=x_bchw.device)
        output = self.transformer(
            x_bchw.float(),
            encoder_hidden_states=embeds_blc.float(),
            encoder_attention_mask=mask_bl,
            guidance=(guidance_b * self.transformer.config.guidance_embeds_scale).float(),
            timestep=time_b,
            return_dict=False,
        )[0].nan_to_num(0.0, 0.0, 0.0)
        time = time_b.view(-1, 1, 1, 1)
        v = ((1 - 2 * time) * x_bchw + (1 - 2 * time + 2 * time**2) * output.to(LATENT_DTYPE)).float()
        v = v / torch.sqrt(time**2 + (1 - time) ** 2)
        return math.cos(X0_ANGLE) * x_bchw.float() - math.sin(X0_ANGLE) * v


def _unit(features) -> torch.Tensor:
    """Features of length 1. transformers 5 wraps them in an output object, 4 does not."""
    features = getattr(features, "pooler_output", features)
    return features / features.norm(dim=-1, keepdim=True)
