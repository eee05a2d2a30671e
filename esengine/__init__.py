"""Evolution Strategies on LoRA weights, for frozen models and black-box rewards. The parts load when first used."""

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "attach": "esengine.population",
    "Noise": "esengine.population",
    "Population": "esengine.population",
    "UpdateRule": "esengine.population",
    "Engine": "esengine.engine",
}

__all__ = ["Engine", "Noise", "Population", "UpdateRule", "attach"]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'esengine' has no attribute '{name}'")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
