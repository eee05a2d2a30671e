"""Evolution Strategies on LoRA weights or a model's own, for black-box rewards. The parts load when first used."""

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "attach": "esengine.population",
    "Direct": "esengine.direct",
    "Noise": "esengine.population",
    "Population": "esengine.population",
    "UpdateRule": "esengine.population",
    "Engine": "esengine.engine",
}

__all__ = ["Direct", "Engine", "Noise", "Population", "UpdateRule", "attach"]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'esengine' has no attribute '{name}'")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
