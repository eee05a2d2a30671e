"""The MLP of `bench/drop_in.py` in shardes, for an interpreter that has it and JAX, and none of this package.

    python bench/peers/shardes_mlp.py

Antithetic rank-1 noise on the three weights, SGD, N members, one thread. All members see the same row, as shardes has
it, so that the first product with the weights is one of a single row. Compiling is not timed. Prints JSON.

Source: shardes 0.1.1 on PyPI.
"""

import json
import os
import statistics
import time

SIZES = (64, 256, 1024)
WIDTHS = (256, 1024, 1024, 10)
STEPS = 6
"""As in `drop_in.py`: steps of a case. The first compiles and is not counted."""


def main() -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # XLA has a thread for each core that it sees
    import jax
    import jax.numpy as jnp
    import numpy as np
    import shardes
    from shardes import nn

    draw = np.random.default_rng(0)
    weights = [
        jnp.asarray(draw.standard_normal(shape, np.float32) / shape[1] ** 0.5)
        for shape in zip(WIDTHS[1:], WIDTHS[:-1], strict=True)
    ]
    biases = [jnp.zeros(width) for width in WIDTHS[1:]]
    x = jnp.asarray(draw.standard_normal((1, WIDTHS[0]), np.float32))

    def network(weights, x):
        for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            x = nn.dense(jax.nn.relu(x) if i else x, weight) + bias
        return x

    found = {}
    for n in SIZES:
        strategy = shardes.Mirrored(shardes.LowRank(r=1))
        population = shardes.ShardedES(
            strategy, n=n, sigma=0.02, lr=1e-3, mesh=shardes.make_mesh(1), shaping=lambda fitness: fitness
        )

        @jax.jit
        def forward(state, x, population=population):
            noise, _ = population.ask(state)
            return population.apply(network, state, noise)(x)

        @jax.jit
        def update(state, fitness, population=population):
            noise, after = population.ask(state)
            return population.tell(after, noise, fitness)

        state, fitness = population.init(jax.random.key(0), weights), jnp.asarray(draw.standard_normal(n, np.float32))
        times = {"forward": [], "update": []}
        for _ in range(STEPS):
            marks = [time.process_time()]
            jax.block_until_ready(forward(state, x))
            marks.append(time.process_time())
            state = jax.block_until_ready(update(state, fitness))
            marks.append(time.process_time())
            for name, start, end in zip(times, marks[:-1], marks[1:], strict=True):
                times[name].append(end - start)
        found[f"direct {n}"] = {name: statistics.median(each[1:]) for name, each in times.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
