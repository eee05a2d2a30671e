"""Models compared on the same prompts and latents: benchmarks, drawing, statistics."""
