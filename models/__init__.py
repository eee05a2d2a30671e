"""Image generators: they render batches of (member, prompt, repeat) rows. Submodules are imported at first use."""

import importlib

_PUBLIC = {
    "Conditioning": "conditioning",
    "DiffusersPipeline": "pipeline",
    "FAMILIES": "families",
    "Family": "families",
    "Generator": "base",
    "NAMED": "loading",
    "WEIGHT_NAME": "lora_file",
    "RenderSettings": "settings",
    "Rows": "base",
    "SanaSprint": "sana.sana_sprint",
    "TextEmbeddings": "text_cache",
    "build_tiny": "tiny",
    "is_packaged": "loading",
    "latents": "sana.latents",
    "require_pipeline": "loading",
    "tiny_model": "tiny",
    "tiny_pipeline": "tiny_pipelines",
    "write_diffusers_lora": "lora_file",
}

__all__ = [
    "FAMILIES",
    "NAMED",
    "WEIGHT_NAME",
    "Conditioning",
    "DiffusersPipeline",
    "Family",
    "Generator",
    "RenderSettings",
    "Rows",
    "SanaSprint",
    "TextEmbeddings",
    "build_tiny",
    "is_packaged",
    "latents",
    "load",
    "require_pipeline",
    "tiny_model",
    "tiny_pipeline",
    "write_diffusers_lora",
]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'esengine.models' has no attribute '{name}'")
    return getattr(importlib.import_module(f"esengine.models.{_PUBLIC[name]}"), name)


def load(model, *, device="cpu", dtype=None, revision: str | None = None, vae=None, reward_vae=None) -> "Generator":  # noqa: F821
    """Load a frozen image model.

    Args:
        model: a pipeline's folder or a hub id of one of `families.FAMILIES`, `nano`, or `tiny:FAMILY`.
        device: the device of the model.
        dtype: data type of the weights. None: float32.
        revision: branch, tag or commit of a hub id.
        vae: another decoder for a SANA-Sprint's latents: a folder or a hub id. A hub id may end in @revision.
        reward_vae: a cheaper decoder for the images inside `reward_decoding`: a folder, a hub id, or `tiny`, which is
            the family's AutoencoderTiny.

    Returns:
        A `Generator`: `SanaSprint` for a SANA-Sprint, `DiffusersPipeline` for every other family.

    Raises:
        ConfigError: there is no such model, or it cannot be used.
        OutOfMemory: the model does not fit into memory.
    """
    import torch

    from esengine.models.loading import locate, require_pipeline
    from esengine.models.reward_vae import load_reward_vae

    settings = dict(revision=revision, device=device, dtype=dtype or torch.float32)
    family = require_pipeline(str(model), revision, vae, reward_vae=None if reward_vae is None else str(reward_vae))
    if family.fast:
        from esengine.models.sana.sana_sprint import SanaSprint

        loaded = SanaSprint.from_pretrained(model, **settings, vae=vae)
    else:
        from esengine.models.pipeline import DiffusersPipeline

        loaded = DiffusersPipeline.from_pretrained(model, **settings)
    if reward_vae is not None:
        folder, _ = locate(str(model), revision, False)
        placed = dict(dtype=loaded.dtype, device=loaded.device)
        loaded.set_reward_vae(*load_reward_vae(str(reward_vae), str(model), folder, family, **placed))
    return loaded
