"""The published code itself, from a checkout of it, on sana-sprint-nano: what the reimplemented loop is compared with.

    git clone https://github.com/amit154154/HyperscaleES_T2I
    python bench/peer_ratio.py --checkout HyperscaleES_T2I

Nothing of it is part of this repository. A step runs as it stands but for three things: the tracker, the printer of
tensors and the other models that it imports are empty modules; its printed lines go nowhere; and CLIP's features are
unwrapped, since transformers 5 gives them in an object that the code does not know.
"""

import contextlib
import importlib
import io
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import CLIPModel, CLIPProcessor

from esengine.models import TextEmbeddings
from esengine.models.nano import CLIP, PIPELINE
from peers.published import GUIDANCE
from peers.reference_loop import (
    ALPHA,
    LR_SCALE,
    MAX_NORM,
    PROMPTS,
    RANK,
    REPEATS,
    SIGMA,
    TARGETS,
    TEXT_LENGTH,
)

ABSENT = ("wandb", "lovely_tensors", "models.VAR", "models.zImageTurbo", "models.Infinity")
"""Modules that a step does not need."""

SIDE = 4
"""Of nano's latents."""


def step(folder: Path, texts: TextEmbeddings, members: int) -> Callable[[], None]:
    """A call that makes the published code's next step of N members, its update included.

    Args:
        folder: the checkout.
        texts: embeddings of the prompts that steps draw from.
        members: N.

    Raises:
        ValueError: `folder` is no checkout of it.
    """
    main, backends = _imported(folder)
    work = tempfile.TemporaryDirectory()
    backend = _backend(backends, texts, Path(work.name))
    parameters, shapes = backend.collect_lora_params()
    clip, process = _unwrapped(), CLIPProcessor.from_pretrained(CLIP, local_files_only=True)
    noiser = main.EggRollNoiser(shapes, sigma=SIGMA, lr_scale=LR_SCALE, rank=1, use_antithetic=True)
    state = {"theta": main.flatten_params(parameters).clone(), "epoch": 0}

    def call(work=work) -> None:  # the folder lives as long as the call
        with contextlib.redirect_stdout(io.StringIO()):
            state["theta"], *_ = main.es_step_unified(
                theta=state["theta"],
                backend=backend,
                lora_params=parameters,
                lora_shapes=shapes,
                clip_model=clip,
                clip_processor=process,
                pick_model=clip,
                pickscore_processor=process,
                noiser=noiser,
                mix_weights=(0.0, 0.0, 0.0, 1.0),
                seed=state["epoch"],
                guidance_scale=GUIDANCE,
                pop_size=members,
                promptnorm_enabled=True,
                theta_max_norm=MAX_NORM,
                max_step_norm=0.0,
                max_log_batches=1,
                save_dir=Path(work.name),
                epoch=state["epoch"],
            )
        state["epoch"] += 1

    return call


def _imported(folder: Path) -> tuple[types.ModuleType, types.ModuleType]:
    """The checkout's main script and its backends."""
    if not (folder / "unifed_es.py").exists():
        raise ValueError(f"--checkout: expected a folder with the published code's unifed_es.py, got {folder}")
    for name in ABSENT:
        empty = types.ModuleType(name)
        empty.__getattr__ = lambda name: _nothing(name)  # PEP 562
        sys.modules[name] = empty
    sys.path.insert(0, str(folder.resolve()))
    try:
        return importlib.import_module("unifed_es"), importlib.import_module("es_backend")
    finally:
        sys.path.pop(0)
        for name in ABSENT:
            del sys.modules[name]


def _nothing(name: str) -> Callable:
    if name.startswith("__"):
        raise AttributeError(name)
    return lambda *args, **kwargs: None


def _backend(backends: types.ModuleType, texts: TextEmbeddings, folder: Path):
    """The one-step backend with its defaults, on nano and on prompts that are encoded already."""
    embeds, mask = texts.batch(torch.arange(len(texts)), length=TEXT_LENGTH)
    encoded = folder / "encoded.pt"
    content = {"prompts": list(texts.prompts), "prompt_embeds": embeds.half(), "prompt_attention_mask": mask}
    torch.save(content, encoded)
    config = backends.SanaConfig(
        model_name=str(PIPELINE),
        backend_mode="one_step",
        prompts_txt_path="",
        encoded_prompt_path=str(encoded),
        auto_encode_if_missing=False,
        encode_batch_size=4,
        guidance_scale=GUIDANCE,
        width_latent=SIDE,
        height_latent=SIDE,
        batch_size=1,
        prompts_per_gen=PROMPTS,
        batches_per_gen=REPEATS,
        max_log_batches=1,
        torch_compile=True,
        compile_mode="max-autotune",
        compile_fullgraph=True,
        dtype_latents="float16",
        lora_r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        lora_target_modules=list(TARGETS),
    )
    backend = backends.SanaBackend("cpu", config)
    with contextlib.redirect_stdout(io.StringIO()):
        backend.init_and_attach_lora()
        backend.compile_if_requested()  # which it does on a GPU alone
    return backend


class _Unwrapped(CLIPModel):
    """Features as transformers 4 gave them."""

    def get_image_features(self, *args, **kwargs):
        found = super().get_image_features(*args, **kwargs)
        return getattr(found, "pooler_output", found)

    def get_text_features(self, *args, **kwargs):
        found = super().get_text_features(*args, **kwargs)
        return getattr(found, "pooler_output", found)


def _unwrapped() -> CLIPModel:
    return _Unwrapped.from_pretrained(CLIP, dtype=torch.float32, local_files_only=True).eval().requires_grad_(False)
