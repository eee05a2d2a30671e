"""A training run: settings, steps, checkpoints, logs, resume and replay."""
