"""Evolution Strategies: a population of low-rank perturbations on any torch module, fitness, and the update."""
