"""The GPU suite: every speed figure at full size, correctness first. `python bench/suite --help`."""
