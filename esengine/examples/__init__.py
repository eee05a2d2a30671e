"""Examples that run in seconds on one CPU core: `python -m esengine.examples.own_reward`."""
