"""Evolution Strategies on LoRA weights or a model's own, for black-box rewards. The parts load when first used."""

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "attach": "esengine.es.population",
    "Direct": "esengine.es.direct",
    "Noise": "esengine.es.population",
    "Population": "esengine.es.population",
    "UpdateRule": "esengine.es.rule",
    "Engine": "esengine.es.engine",
    "PromptSampler": "esengine.es.prompts",
    "ConfigError": "esengine.base.errors",
}

__all__ = ["ConfigError", "Direct", "Engine", "Noise", "Population", "PromptSampler", "UpdateRule", "attach"]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'esengine' has no attribute '{name}'")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
