"""One command from nothing to the pipeline folder of sana-sprint-nano.

    python -m esengine.models.nano.train --out sana-sprint-nano --work nano-training

Stages, each of which goes on where it was stopped: the autoencoder; latents of a fixed set of images; the teacher with
its text encoder; the student; the folder. `--stage` runs one of them alone, on what the earlier ones left.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

STAGES = ("autoencoder", "latents", "teacher", "student", "save")


@dataclass(frozen=True)
class TrainConfig:
    """Train sana-sprint-nano: autoencoder, teacher, student, pipeline folder."""

    out: Path = Path("sana-sprint-nano")
    """The pipeline folder to write."""
    work: Path = Path("nano-training")
    """Checkpoints, curves and latents. A run that was stopped goes on from there."""
    stage: Literal["all", "autoencoder", "latents", "teacher", "student", "save"] = "all"
    """One stage alone, or all in order."""
    seed: int = 0
    """Of weights, images, batches and noise."""
    processes: int = 2
    """They share each batch. Their number changes the order of sums, and the autoencoder's m and d are of a share."""
    autoencoder_steps: int = 3200
    """Of 32 images."""
    images: int = 98304
    """Drawn and encoded for the teacher and the student."""
    teacher_steps: int = 5000
    """Of 128 images."""
    student_steps: int = 1200
    """Of 128 images."""


def main(args: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    config = tyro.cli(TrainConfig, args=args, prog="python -m esengine.models.nano.train")
    config.work.mkdir(parents=True, exist_ok=True)
    if config.processes == 1:
        _run(0, config, "")
    else:
        # glibc gives large blocks back at once and asks for them again in every step; read when a process starts
        os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2 << 30))
        os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(8 << 30))
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(_run, (config, f"file://{folder}/meet"), config.processes)
    return 0


def _run(rank: int, config: TrainConfig, meet: str) -> None:
    """All stages in one of the processes."""
    torch.set_num_threads(1)
    if meet:
        torch.distributed.init_process_group("gloo", meet, rank=rank, world_size=config.processes)
    try:
        _stages(rank, config)
    finally:
        if meet:
            torch.distributed.destroy_process_group()


def _stages(rank: int, config: TrainConfig) -> None:
    from esengine.models.nano import autoencoder, build, dataset, distill, teacher
    from esengine.models.tokenizer import load_tokenizer

    stages = STAGES if config.stage == "all" else (config.stage,)
    if "autoencoder" in stages:
        autoencoder.train_autoencoder(config.work, steps=config.autoencoder_steps, seed=config.seed, report=_show)
        _meet()
    if config.stage == "autoencoder":
        return
    vae = autoencoder.read_autoencoder(config.work)
    if rank == 0:
        tokenizer = build.save_tokenizer(config.work / "tokenizer")
        dataset.latent_dataset(config.work, vae, count=config.images, seed=config.seed, report=_show)
    _meet()
    tokenizer = load_tokenizer(config.work / "tokenizer")
    data = tokenizer, *dataset.latent_dataset(config.work, vae, count=config.images, seed=config.seed)
    if "teacher" in stages:
        teacher.train_teacher(config.work, *data, steps=config.teacher_steps, seed=config.seed, report=_show)
        _meet()
    if "student" in stages:
        teaches = teacher.read_teacher(config.work, tokenizer)
        distill.distill(config.work, teaches, *data, steps=config.student_steps, seed=config.seed, report=_show)
        _meet()
    if "save" in stages and rank == 0:
        teaches = teacher.read_teacher(config.work, tokenizer)
        student = distill.read_student(config.work, teaches)
        build.save_pipeline(config.out, vae=vae, text_encoder=teaches.text_encoder, transformer=student)
        (config.out / "training.json").write_text(json.dumps(_record(config), indent=1) + "\n")
        print(f"written to {config.out}")  # noqa: T201


def _record(config: TrainConfig) -> dict[str, Any]:
    """What was trained, from the curves: steps, images in each, seconds on the clock, and the last values."""
    from esengine.models.nano import autoencoder, distill, teacher
    from esengine.models.nano.loop import last_values

    batches = {"autoencoder": autoencoder.BATCH, "teacher": teacher.BATCH, "student": distill.BATCH}
    stages = {stage: {"images": images, **last_values(config.work, stage)} for stage, images in batches.items()}
    return {"seed": config.seed, "images": config.images, "torch": torch.__version__, **stages}


def _meet() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def _show(stage: str, done: int, steps: int, measured: dict[str, float]) -> None:
    values = "  ".join(f"{name} {value:.4g}" for name, value in measured.items())
    print(f"{time.strftime('%H:%M:%S')}  {stage} {done}/{steps}  {values}", flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
