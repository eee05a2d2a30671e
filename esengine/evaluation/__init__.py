"""Compares models on the same prompts and latents: benchmarks, rendering, statistics."""
