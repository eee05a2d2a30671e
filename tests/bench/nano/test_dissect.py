"""The parts of an adapter: what is left out, scaled and averaged."""

import torch
from nano import dissect


def adapter(seed, rank=2):
    draw = torch.Generator().manual_seed(seed)
    shapes = {"one": (5, 4), "one_more": (3, 5)}
    sides = {"A": lambda out, into: (rank, into), "B": lambda out, into: (out, rank)}
    return {
        f"{layer}.lora_{side}.weight": torch.randn(shape(*shapes[layer]), generator=draw)
        for layer in shapes
        for side, shape in sides.items()
    }


def change(state, layer):
    return state[f"{layer}.lora_B.weight"] @ state[f"{layer}.lora_A.weight"]


def test_variants_of_two_adapters():
    first, second = adapter(0), adapter(1)
    found = dissect.variants({"a": first, "b": second})
    parts = ["", "-times-0.5", "-times-1.5", "-without-one", "-without-one_more"]
    assert list(found) == [f"{name}{part}" for name in "ab" for part in parts] + [
        "average",
        "average-times-0.5",
        "average-times-1.5",
    ]
    for layer in ("one", "one_more"):
        whole = change(first, layer)
        torch.testing.assert_close(change(found["a-times-1.5"], layer), 1.5 * whole)
        mean = (whole + change(second, layer)) / 2
        torch.testing.assert_close(change(found["average"], layer), mean)
        torch.testing.assert_close(change(found["average-times-1.5"], layer), 1.5 * mean)
    without = found["a-without-one"]
    assert change(without, "one").abs().max() == 0
    torch.testing.assert_close(change(without, "one_more"), change(first, "one_more"))
