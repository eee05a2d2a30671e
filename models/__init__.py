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


def load(model, *, device="cpu", dtype=None, revision: str | None = None, vae=None) -> "Generator":  # noqa: F821
    """Load a frozen image model.

    Args:
        model: a pipeline's folder or a hub id of one of `families.FAMILIES`, `nano`, or `tiny:FAMILY`.
        device: the device of the model.
        dtype: data type of the weights. None: float32.
        revision: branch, tag or commit of a hub id.
        vae: another decoder for a SANA-Sprint's latents: a folder or a hub id. A hub id may end in @revision.

    Returns:
        A `Generator`: `SanaSprint` for a SANA-Sprint, `DiffusersPipeline` for every other family.

    Raises:
        ConfigError: there is no such model, or it cannot be used.
        OutOfMemory: the model does not fit into memory.
    """
    import torch

    from esengine.models.loading import require_pipeline

    settings = dict(revision=revision, device=device, dtype=dtype or torch.float32)
    if require_pipeline(str(model), revision, vae).fast:
        from esengine.models.sana.sana_sprint import SanaSprint

        return SanaSprint.from_pretrained(model, **settings, vae=vae)
    from esengine.models.pipeline import DiffusersPipeline

    return DiffusersPipeline.from_pretrained(model, **settings)
