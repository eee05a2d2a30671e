import torch

from esengine.kernels import normals, stream_id
from esengine.models import latents

KEYS = {"seed": 5, "step": 2, "shape": (3, 4, 5)}


def test_a_row_is_its_key_alone():
    prompts, repeats = torch.tensor([4, 0, 4, 9, 0]), torch.tensor([0, 1, 0, 2, 0])
    together = latents(**KEYS, prompts=prompts, repeats=repeats)
    assert together.shape == (5, 3, 4, 5)
    assert together.dtype == torch.float32
    assert torch.equal(together[0], together[2])
    order = torch.tensor([3, 1, 4, 0, 2])
    assert torch.equal(latents(**KEYS, prompts=prompts[order], repeats=repeats[order]), together[order])
    for row in range(5):
        one = slice(row, row + 1)
        assert torch.equal(latents(**KEYS, prompts=prompts[one], repeats=repeats[one])[0], together[row])


def test_it_is_the_noise_contract():
    rows = latents(**KEYS, prompts=torch.tensor([4]), repeats=torch.tensor([3]), draw=1)
    stream = torch.tensor([stream_id("latent/1/3")])
    expected = normals(seed=5, step=2, streams=stream, pairs=torch.tensor([4]), count=60)
    assert torch.equal(rows.flatten(), expected.flatten())


def test_every_part_of_the_key_counts():
    prompts, repeats = torch.tensor([1]), torch.tensor([1])
    base = latents(**KEYS, prompts=prompts, repeats=repeats)
    others = [
        latents(**{**KEYS, "seed": 6}, prompts=prompts, repeats=repeats),
        latents(**{**KEYS, "step": 3}, prompts=prompts, repeats=repeats),
        latents(**KEYS, prompts=prompts + 1, repeats=repeats),
        latents(**KEYS, prompts=prompts, repeats=repeats + 1),
        latents(**KEYS, prompts=prompts, repeats=repeats, draw=1),
    ]
    assert all((base != other).float().mean() > 0.9 for other in others)


def test_standard_normal():
    many = latents(
        seed=0, step=0, prompts=torch.arange(64), repeats=torch.zeros(64, dtype=torch.int64), shape=(8, 8, 8)
    )
    assert abs(many.mean()) < 0.02
    assert abs(many.std() - 1) < 0.02
