"""A person judges images: a local page shows two images side by side, and an answer is what the person prefers."""

from esengine.judging.server import FIRST, SAME, SECOND, Asker, Question

__all__ = ["FIRST", "SAME", "SECOND", "Asker", "Question"]
