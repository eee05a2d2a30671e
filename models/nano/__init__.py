"""sana-sprint-nano: a procedural world of captioned images, and the small models that are trained on it."""

from pathlib import Path

PIPELINE = Path(__file__).parent / "sana-sprint-nano"
"""The trained pipeline's folder, part of the package."""
CLIP = Path(__file__).parent / "clip-nano"
"""The trained judge's."""
