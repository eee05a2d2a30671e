"""The teacher: a trigflow velocity model of the latents, trained together with its text encoder.

    x_t = cos(t) x0 + sin(t) n,  v = cos(t) n - sin(t) x0,  loss = (F(x_t, t, caption) - v)^2

Everything is in units of sigma_data: x0 has a standard deviation of 1. `velocity` is what `SanaSprint` and diffusers
compute; the transformer itself sees the flow-matching angle a = sin(t) / (cos(t) + sin(t)), of which logit(a) is drawn
from a normal distribution. A tenth of the captions is "", for guidance. The guidance embedding is silent until
distillation.

Source: Lu and Song, "Simplifying, stabilizing and scaling continuous-time consistency models" (2024), trigflow.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import SanaTransformer2DModel
from transformers import Gemma2Model, PreTrainedTokenizerBase

from esengine.models.nano.build import LATENT, text_encoder, transformer
from esengine.models.nano.loop import Report, average, descend, load, rate, share, train
from esengine.models.nano.muon import optimizers
from esengine.models.nano.text import Captions

BATCH = 128
UNCAPTIONED = 0.1
LOGIT_MEAN, LOGIT_STD = 0.6, 1.2
HALF_LIFE = 400


@dataclass
class Teacher:
    """A velocity model and the text encoder that was trained with it."""

    transformer: SanaTransformer2DModel
    text_encoder: Gemma2Model


def velocity(
    model: SanaTransformer2DModel,
    x_bchw: torch.Tensor,
    t_b: torch.Tensor,
    embeds_blc: torch.Tensor,
    mask_bl: torch.Tensor,
    guidance_b: torch.Tensor,
) -> torch.Tensor:
    """Trigflow velocity in units of sigma_data.

    Args:
        model: The transformer.
        x_bchw: float32 [B, C, h, w], noisy latents in units of sigma_data.
        t_b: float32 [B], angles from 0 to pi / 2.
        embeds_blc: float32 [B, L, C], states of the captions.
        mask_bl: bool [B, L].
        guidance_b: float32 [B], guidance scales times the transformer's `guidance_embeds_scale`.

    Returns:
        float32 [B, C, h, w].
    """
    a_b = torch.sin(t_b) / (torch.cos(t_b) + torch.sin(t_b))
    a = a_b.view(-1, 1, 1, 1)
    norm = torch.sqrt(a**2 + (1 - a) ** 2)
    out_bchw = model(
        x_bchw * norm,
        encoder_hidden_states=embeds_blc,
        encoder_attention_mask=mask_bl,
        guidance=guidance_b,
        timestep=a_b,
        return_dict=False,
    )[0]
    return (1 - 2 * a) * x_bchw + norm * out_bchw


def angles(count: int) -> torch.Tensor:
    """float32 [count]: t whose flow-matching angle is logit-normal."""
    a_b = torch.sigmoid(LOGIT_MEAN + LOGIT_STD * torch.randn(count))
    return torch.atan2(a_b, 1 - a_b)


def build(vocabulary: int, seed: int) -> Teacher:
    """An untrained teacher for a tokenizer of so many tokens, its guidance embedding silent."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformer()
        for parameter in model.time_embed.guidance_embedder.linear_2.parameters():
            torch.nn.init.zeros_(parameter.requires_grad_(False))
        return Teacher(model, text_encoder(vocabulary))


def train_teacher(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    latents: torch.Tensor,
    captions: Sequence[str],
    *,
    steps: int,
    seed: int,
    report: Report | None = None,
) -> Teacher:
    """Trains, or goes on, or reads what is done.

    Args:
        folder: Of the checkpoint.
        tokenizer: The pipeline's.
        latents: float16 [N, C, h, w], scaled.
        captions: N of them.
        steps: Of `BATCH` images each.
        seed: Of the weights, batches, angles and noise.
        report: Is told of the progress.

    Returns:
        The average of the weights.
    """
    teacher, mean = build(len(tokenizer), seed), build(len(tokenizer), seed)
    parts = torch.nn.ModuleList([teacher.transformer, teacher.text_encoder])
    means = torch.nn.ModuleList([mean.transformer, mean.text_encoder]).requires_grad_(False)
    muon, adamw = optimizers(teacher.transformer, teacher.text_encoder)
    texts = Captions(tokenizer, [*captions, ""])

    def step(i: int) -> dict[str, torch.Tensor]:
        rows, texted = torch.randint(len(latents), (BATCH,)), torch.rand(BATCH) >= UNCAPTIONED
        rows, texted, n_bchw, t_b = map(share, (rows, texted, torch.randn(BATCH, *LATENT), angles(BATCH)))
        x0_bchw, rows = latents[rows].float(), torch.where(texted, rows, len(latents))
        embeds_blc, mask_bl = texts.encode(teacher.text_encoder, rows)
        t = t_b.view(-1, 1, 1, 1)
        x_bchw = torch.cos(t) * x0_bchw + torch.sin(t) * n_bchw
        v_bchw = velocity(teacher.transformer, x_bchw, t_b, embeds_blc, mask_bl, torch.zeros(len(rows)))
        loss = (v_bchw - (torch.cos(t) * n_bchw - torch.sin(t) * x0_bchw)).square().mean()
        norm = descend((muon, adamw), loss, rate(i, steps))
        average(means, parts, i, half_life=HALF_LIFE)
        return {"loss": loss.detach(), "norm": norm}

    state = {"teacher": parts, "mean": means, "muon": muon, "adamw": adamw}
    train("teacher", folder, step, steps=steps, state=state, seed=seed, report=report)
    return _frozen(mean)


def read_teacher(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Teacher:
    """The averaged weights of a checkpoint, finished or not.

    Raises:
        FileNotFoundError: There is none.
    """
    mean = build(len(tokenizer), 0)
    if not load(folder / "teacher.safetensors", {"mean": torch.nn.ModuleList([mean.transformer, mean.text_encoder])}):
        raise FileNotFoundError(f"folder: expected a teacher.safetensors, got none in {folder}")
    return _frozen(mean)


class Guided:
    """A frozen teacher's velocity with classifier-free guidance, v = v_u + g (v_c - v_u), u without a caption."""

    def __init__(self, teacher: Teacher, tokenizer: PreTrainedTokenizerBase):
        self.model = teacher.transformer
        with torch.no_grad():
            self._embeds, self._mask = Captions(tokenizer, [""]).encode(teacher.text_encoder, torch.tensor([0]))

    @torch.no_grad()
    def __call__(
        self, x_bchw: torch.Tensor, t_b: torch.Tensor, text: tuple[torch.Tensor, torch.Tensor], g_b: torch.Tensor
    ) -> torch.Tensor:
        """float32 [B, C, h, w]; `text` is what `Captions.encode` returns, `g_b` float32 [B]."""
        none_b, count = torch.zeros(len(x_bchw)), len(x_bchw)
        with_text = velocity(self.model, x_bchw, t_b, *text, none_b)
        without = velocity(
            self.model, x_bchw, t_b, self._embeds.expand(count, -1, -1), self._mask.expand(count, -1), none_b
        )
        return torch.lerp(without, with_text, g_b.view(-1, 1, 1, 1))

    def sample(self, n_bchw: torch.Tensor, text: tuple[torch.Tensor, torch.Tensor], *, g: float, steps: int):
        """Clean latents float32 [B, C, h, w] from noise, along the ODE in equal steps of the angle."""
        x_bchw, g_b = n_bchw, torch.full([len(n_bchw)], g)
        for t_b in torch.linspace(math.pi / 2, 0, steps + 1)[:-1, None].expand(-1, len(n_bchw)):
            x_bchw = rotate(x_bchw, self(x_bchw, t_b, text, g_b), torch.full_like(t_b, math.pi / 2 / steps))
        return x_bchw


def rotate(x_bchw: torch.Tensor, v_bchw: torch.Tensor, by_b: torch.Tensor) -> torch.Tensor:
    """One step of the ODE to an angle that is smaller by `by_b`: exact while x0 and the noise stay the same."""
    by = by_b.view(-1, 1, 1, 1)
    return torch.cos(by) * x_bchw - torch.sin(by) * v_bchw


def _frozen(teacher: Teacher) -> Teacher:
    teacher.transformer.requires_grad_(False).eval()
    teacher.text_encoder.requires_grad_(False).eval()
    return teacher
