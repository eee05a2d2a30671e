"""Distillation: a student that jumps to x0 from any angle, by discrete consistency along the guided teacher's ODE.

    f(x, t) = cos(t) x - sin(t) F(x, t, caption, w)
    x_t = cos(t) x0 + sin(t) n,  x_s = one step of the teacher from t to s = t - d, guided by g(w)
    loss = sqrt(|f(x_t, t) - stop(f(x_s, s))|^2 + c^2) - c, |.|^2 the mean over an image; f(x, 0) = x

The grid gets finer as training goes on: long steps spread x0 quickly to large angles, short ones are exact. The
student starts from the teacher; its guidance embedding learns what g(w) does. A share of the angles is pi / 2, where
sampling begins.

Source: Song et al., "Consistency Models" (2023); Song and Dhariwal (2023), the loss and the student as its own target;
Chen et al., "SANA-Sprint" (2025), the embedded guidance.
"""

import copy
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import SanaTransformer2DModel
from transformers import PreTrainedTokenizerBase

from esengine.models.nano.build import LATENT
from esengine.models.nano.loop import Report, average, descend, load, rate, share, train
from esengine.models.nano.muon import optimizers
from esengine.models.nano.teacher import Guided, Teacher, rotate, velocity
from esengine.models.nano.text import Captions

BATCH, PEAK = 128, 0.4
"""`PEAK` is of the teacher's learning rates."""
COARSE, FINE = 6, 16
"""Steps from pi / 2 to 0 at the start and at the end of training."""
FROM_NOISE = 0.15
SCALE, SCALES = 4.5, (2.0, 7.0)
"""The pipeline's guidance scale, of half the batch; the other half is uniform between these."""
HUBER = 0.03
HALF_LIFE = 200


def guidance(w: torch.Tensor) -> torch.Tensor:
    """The teacher's guidance g for the pipeline's scale w: 1 + (w - 1) / 1.75, so 3 at the pipeline's default."""
    return 1 + (w - 1) / 1.75


def distill(
    folder: Path,
    teacher: Teacher,
    tokenizer: PreTrainedTokenizerBase,
    latents: torch.Tensor,
    captions: Sequence[str],
    *,
    steps: int,
    seed: int,
    report: Report | None = None,
) -> SanaTransformer2DModel:
    """Distills, or goes on, or reads what is done. The arguments are those of `train_teacher`.

    Returns:
        The average of the student's weights.
    """
    student, mean = _start(teacher)
    scale = student.config.guidance_embeds_scale
    muon, adamw = optimizers(student)
    guided, texts = Guided(teacher, tokenizer), Captions(tokenizer, captions)

    def jump(x_bchw: torch.Tensor, t_b: torch.Tensor, text, w_b: torch.Tensor) -> torch.Tensor:
        return rotate(x_bchw, velocity(student, x_bchw, t_b, *text, w_b * scale), t_b)

    def step(i: int) -> dict[str, torch.Tensor]:
        drawn = (
            torch.randint(len(latents), (BATCH,)),
            torch.randn(BATCH, *LATENT),
            torch.where(torch.rand(BATCH) < FROM_NOISE, 1.0, torch.rand(BATCH)) * (math.pi / 2),
            torch.where(torch.rand(BATCH) < 0.5, SCALE, torch.empty(BATCH).uniform_(*SCALES)),
        )
        rows, n_bchw, t_b, w_b = map(share, drawn)
        d_b = torch.minimum(t_b, torch.tensor(math.pi / 2 / (COARSE * (FINE / COARSE) ** (i / steps))))
        t = t_b.view(-1, 1, 1, 1)
        x_bchw = torch.cos(t) * latents[rows].float() + torch.sin(t) * n_bchw
        with torch.no_grad():
            text = texts.encode(teacher.text_encoder, rows)
            before_bchw = rotate(x_bchw, guided(x_bchw, t_b, text, guidance(w_b)), d_b)
            target_bchw = jump(before_bchw, t_b - d_b, text, w_b)
        far = (jump(x_bchw, t_b, text, w_b) - target_bchw).square().mean((1, 2, 3))
        loss = ((far + HUBER**2).sqrt() - HUBER).mean()
        norm = descend((muon, adamw), loss, rate(i, steps, peak=PEAK))
        average(mean, student, i, half_life=HALF_LIFE)
        return {"loss": loss.detach(), "norm": norm}

    state = {"student": student, "mean": mean, "muon": muon, "adamw": adamw}
    train("student", folder, step, steps=steps, state=state, seed=seed, report=report)
    return mean


def read_student(folder: Path, teacher: Teacher) -> SanaTransformer2DModel:
    """The averaged weights of a checkpoint, finished or not.

    Raises:
        FileNotFoundError: There is none.
    """
    _, mean = _start(teacher)
    if not load(folder / "student.safetensors", {"mean": mean}):
        raise FileNotFoundError(f"folder: expected a student.safetensors, got none in {folder}")
    return mean


def _start(teacher: Teacher) -> tuple[SanaTransformer2DModel, SanaTransformer2DModel]:
    """The student and its average, both the teacher."""
    student = copy.deepcopy(teacher.transformer).requires_grad_(True).train()
    return student, copy.deepcopy(teacher.transformer).requires_grad_(False).eval()
