"""Generators of images: how a batch of (member, prompt, repeat) rows is rendered."""

from esengine.models.latents import latents
from esengine.models.loading import NAMED, require_pipeline
from esengine.models.lora_file import WEIGHT_NAME, write_diffusers_lora
from esengine.models.sana_sprint import SanaSprint
from esengine.models.settings import RenderSettings
from esengine.models.text_cache import TextEmbeddings
from esengine.models.tiny import build_tiny, tiny_model

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
