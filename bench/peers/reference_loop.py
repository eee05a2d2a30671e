"""The published ES-LoRA run's algorithm, reimplemented: one member after the other, one image scored at a time.

    for each member i:   E_i = sign_i U V^T / sqrt(k) for every tensor, from a seeded generator
                         PEFT's weights <- theta + sigma E_i
                         render 4 prompts x 4 repeats, score each image by itself
    f = z-scored mean of the prompt-normalised scores
    theta <- theta + lr_scale sigma mean_i(f_i E_i), its norm capped

Where the published code leaves open what is fast, this takes the faster way: prompts are encoded and their text
features computed once, noise is drawn on the device, and images never leave it.
"""

import math
from collections.abc import Callable

import torch
from peft import LoraConfig

from esengine.fitness import shape
from esengine.models import RenderSettings, SanaSprint, TextEmbeddings

POPULATION, PROMPTS, REPEATS = 128, 4, 4
SIGMA, LR_SCALE, MAX_NORM, RANK, ALPHA = 1e-2, 0.1, 40.0, 2, 8
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "linear_1", "linear_2", "proj_out", "linear")
TEXT_LENGTH = 300
"""Tokens that the pipeline pads every prompt to."""

X0_ANGLE = 1.3

Reward = Callable[[torch.Tensor, list[str]], torch.Tensor]


class ReferenceLoop:
    """A model with PEFT's adapter on it, and theta, the adapter's tensors in fp32.

    Args:
        model: its transformer gets the adapter.
        texts: embeddings of the prompts.
        reward: uint8 [B, 3, H, W], B prompts -> float32 [B].
        settings: how an image is sampled.
        seed: of the noise and the latents.
        text_length: tokens to pad to.
    """

    def __init__(
        self,
        model: SanaSprint,
        texts: TextEmbeddings,
        reward: Reward,
        *,
        settings: RenderSettings,
        seed: int = 0,
        text_length: int = TEXT_LENGTH,
    ):
        self.model, self.texts, self.reward, self.settings = model, texts, reward, settings
        self.seed, self.text_length = seed, text_length
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model.transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS)))
        model.transformer.requires_grad_(False)
        # `<layer>.lora_A.weight`, as a population names them
        self.parameters = {
            name.replace(".default.", "."): parameter
            for name, parameter in model.transformer.named_parameters()
            if ".lora_" in name
        }
        self.theta = {name: parameter.float().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def noise(self, step: int, member: int) -> dict[str, torch.Tensor]:
        """E_i of every tensor, fp32, rank 1."""
        key = (self.seed * 1_000_003 + step) * 65_537 + member // 2
        generator = torch.Generator(self.model.device).manual_seed(key)
        sign, drawn = 1 - 2 * (member % 2), {}
        for name, value in self.theta.items():
            rows, columns = value.shape
            uv = torch.randn(rows + columns, generator=generator, device=value.device)
            drawn[name] = sign * torch.outer(uv[:rows], uv[rows:])
        return drawn

    @torch.no_grad()
    def set_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Copies one member's tensors, named as theta's, into PEFT's modules."""
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])

    @torch.no_grad()
    def evaluate(self, step: int, member: int, prompts: torch.Tensor) -> torch.Tensor:
        """One member: build and set its weights, render P x R images, score one at a time. float32 [P, R]."""
        noise = self.noise(step, member)
        self.set_weights({name: value + SIGMA * noise[name] for name, value in self.theta.items()})
        repeats = torch.arange(REPEATS).repeat(len(prompts))
        rows = prompts.repeat_interleave(REPEATS)
        images = self.model.render(
            self.texts,
            seed=self.seed,
            step=step,
            prompts=rows,
            repeats=repeats,
            settings=self.settings,
            text_length=self.text_length,
        )
        words = [self.texts.prompts[index] for index in rows.tolist()]
        scores = [self.reward(image[None], [word]).item() for image, word in zip(images, words, strict=True)]
        return torch.tensor(scores).view(len(prompts), REPEATS)

    @torch.no_grad()
    def update(self, step: int, scores: torch.Tensor) -> None:
        """theta after a step. scores: float32 [N, P, R]."""
        fitness = shape(scores, "zscore").tolist()
        total = {name: torch.zeros_like(value) for name, value in self.theta.items()}
        for member, f in enumerate(fitness):
            for name, drawn in self.noise(step, member).items():
                total[name].add_(drawn, alpha=f)
        for name, value in self.theta.items():
            value.add_(total[name], alpha=LR_SCALE * SIGMA / len(fitness))
        norm = math.sqrt(sum(value.double().square().sum().item() for value in self.theta.values()))
        if norm > MAX_NORM:
            for value in self.theta.values():
                value.mul_(MAX_NORM / norm)
