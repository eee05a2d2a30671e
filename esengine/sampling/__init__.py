"""Renders and scores images chunk by chunk, for runs and evaluations."""
