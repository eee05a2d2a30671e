"""sana-sprint-nano: a procedural world of captioned images, its reward, and the small models trained on it."""

from pathlib import Path

PIPELINE = Path(__file__).parent / "sana-sprint-nano"
"""The trained pipeline's folder, part of the package."""
CLIP = Path(__file__).parent / "clip-nano"
"""The trained CLIP's folder."""
DATA = Path(__file__).parent / "data"
"""Captions of the world, and the settings of `esengine train` for this model."""
