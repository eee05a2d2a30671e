"""Generators of images: how a batch of (member, prompt, repeat) rows is rendered. The parts load when first used."""

import importlib

_PUBLIC = {
    "NAMED": "loading",
    "WEIGHT_NAME": "lora_file",
    "RenderSettings": "settings",
    "SanaSprint": "sana.sana_sprint",
    "TextEmbeddings": "text_cache",
    "build_tiny": "tiny",
    "latents": "sana.latents",
    "require_pipeline": "loading",
    "tiny_model": "tiny",
    "write_diffusers_lora": "lora_file",
}

__all__ = [
    "NAMED",
    "WEIGHT_NAME",
    "RenderSettings",
    "SanaSprint",
    "TextEmbeddings",
    "build_tiny",
    "latents",
    "require_pipeline",
    "tiny_model",
    "write_diffusers_lora",
]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'esengine.models' has no attribute '{name}'")
    return getattr(importlib.import_module(f"esengine.models.{_PUBLIC[name]}"), name)
