"""Experiments on the nano world, a module each. `python bench/nano --help` lists them."""
