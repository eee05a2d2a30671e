"""The published ES-LoRA run's algorithm, reimplemented: one member after the other.

    E_i [D]                         of each tensor [m, n] of the adapter sign_i U V^T, U [m] and V [n] standard normal
    for each member i:              PEFT's weights <- theta + sigma E_i
                                    s_i: images of P prompts, R times each, and their scores
    f                               z-scores of the mean of prompt-normalised scores
    theta <- theta + lr_scale sigma mean_i(f_i E_i), its norm capped

The E_i of all members are drawn at once and stored. The first half of them has sign +1, the second is its negative.
There are two loops. They differ in how a member's images are made and scored:

    `published.PublishedLoop`       as it was published: float32 model and decoder, PIL images, one scored at a time
    `SharedLoop`                    our dtype, decoder and scorer: all images of a member are scored in one batch

Legend: N members, D numbers of the adapter, P prompts, R repeats.

Source: the public repository amit154154/HyperscaleES_T2I, its `unifed_es.py` with the one-step backend.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from peft import LoraConfig
from torch import nn

from esengine.models import RenderSettings, SanaSprint, TextEmbeddings

POPULATION, PROMPTS, REPEATS = 128, 4, 4
SIGMA, LR_SCALE, MAX_NORM, RANK, ALPHA = 1e-2, 0.1, 40.0, 2, 8
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "linear_1", "linear_2", "proj_out", "linear")
TEXT_LENGTH = 300
"""Tokens that the pipeline pads every prompt to."""

X0_ANGLE = 1.3

LEAST_STD = 1e-8
"""Scores that vary by less make no fitness."""

Reward = Callable[[torch.Tensor, list[str]], torch.Tensor]


class ReferenceLoop(ABC):
    """PEFT's adapter on a transformer, and theta, its tensors as one vector.

    Args:
        transformer: frozen; gets the adapter.
        seed: of the adapter, the noise and the latents.

    Attributes:
        parameters: the adapter's tensors by name, `<layer>.lora_A.weight`, as a population names them.
        theta: float32 [D], the tensors one after the other.
    """

    def __init__(self, transformer: nn.Module, *, seed: int = 0):
        self.transformer, self.seed = transformer, seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS)))
        transformer.eval().requires_grad_(False)
        self.parameters = {
            name.replace(".default.", "."): parameter
            for name, parameter in transformer.named_parameters()
            if ".lora_" in name
        }
        self.theta = self.joined(self.parameters)

    @property
    def device(self) -> torch.device:
        return self.theta.device

    def joined(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """float32 [D] of tensors by the names of `parameters`, which may come in any order."""
        return torch.cat([tensors[name].float().flatten().to(self.parameters[name].device) for name in self.parameters])

    @torch.no_grad()
    def noise(self, step: int, members: int) -> torch.Tensor:
        """E of N members, an even number: float32 [N, D], rank 1."""
        if members < 2 or members % 2:
            raise ValueError(f"members: expected an even number of at least 2, got {members}")
        generator = torch.Generator(self.device).manual_seed(self.seed * 1_000_003 + step)
        half, parts = members // 2, []
        for parameter in self.parameters.values():
            rows, columns = parameter.shape
            u = torch.randn(half, rows, 1, generator=generator, device=self.device)
            v = torch.randn(half, columns, 1, generator=generator, device=self.device)
            parts.append((u @ v.mT).view(half, rows * columns))
        drawn = torch.cat(parts, dim=1)
        return torch.cat([drawn, -drawn])

    @torch.no_grad()
    def set_weights(self, weights: torch.Tensor) -> None:
        """Copies a member's weights, float32 [D], into PEFT's modules."""
        sizes = [parameter.numel() for parameter in self.parameters.values()]
        for parameter, values in zip(self.parameters.values(), weights.split(sizes), strict=True):
            parameter.copy_(values.view_as(parameter))

    @torch.no_grad()
    def evaluate(self, step: int, noise: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        """One member, of noise float32 [D]: its weights are set, its images drawn and scored. float32 [P, R]."""
        self.set_weights(self.theta + SIGMA * noise)
        return self.scores(step, prompts)

    @abstractmethod
    def scores(self, step: int, prompts: torch.Tensor) -> torch.Tensor:
        """Of R images of each prompt, int64 [P] on the CPU, by the weights that are set. float32 [P, R]."""

    @torch.no_grad()
    def update(self, noise: torch.Tensor, scores: torch.Tensor) -> None:
        """theta after a step, from noise float32 [N, D] and scores float32 [N, P, R]."""
        f = fitness(scores).to(noise.device)
        self.theta = self.theta + LR_SCALE * SIGMA * (f[:, None] * noise).mean(0)
        norm = self.theta.norm()
        if norm > MAX_NORM:
            self.theta = self.theta * (MAX_NORM / norm)

    def step(self, step: int, prompts: torch.Tensor, members: int) -> torch.Tensor:
        """A whole step of N members on prompts, int64 [P]. Returns the scores, float32 [N, P, R]."""
        noise = self.noise(step, members)
        scores = torch.stack([self.evaluate(step, each, prompts) for each in noise])
        self.update(noise, scores)
        return scores


def fitness(scores: torch.Tensor) -> torch.Tensor:
    """float32 [N] from scores float32 [N, P, R].

    c = s - its prompt's mean, over one standard deviation of all (biased); averaged over prompts; then z-scored by the
    unbiased standard deviation. s is a member's mean over its repeats of a prompt.
    """
    means = scores.mean(2)
    centred = means - means.mean(0)
    normalised = (centred / centred.square().mean().sqrt().clamp_min(LEAST_STD)).mean(1)
    std = normalised.std()
    if std < LEAST_STD:
        return torch.zeros_like(normalised)
    return (normalised - normalised.mean()) / (std + LEAST_STD)


class SharedLoop(ReferenceLoop):
    """One member after the other with our sampler, dtype, decoder and batched scorer; prompts are encoded once.

    Args:
        model: its transformer gets the adapter.
        texts: embeddings of the prompts.
        reward: uint8 [B, 3, H, W], B prompts -> float32 [B].
        settings: how an image is sampled.
        seed: of the adapter, the noise and the latents.
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
        super().__init__(model.transformer, seed=seed)
        self.model, self.texts, self.reward, self.settings = model, texts, reward, settings
        self.text_length = text_length

    @torch.no_grad()
    def scores(self, step: int, prompts: torch.Tensor) -> torch.Tensor:
        rows, repeats = prompts.repeat_interleave(REPEATS), torch.arange(REPEATS).repeat(len(prompts))
        keys = dict(seed=self.seed, step=step, settings=self.settings, text_length=self.text_length)
        images = self.model.render(self.texts, prompts=rows, repeats=repeats, **keys)
        words = [self.texts.prompts[index] for index in rows.tolist()]
        return self.reward(images, words).float().cpu().view(len(prompts), REPEATS)
