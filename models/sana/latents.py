"""The sampler's noise, keyed so that all members of a population render from the same noise."""

import torch

from esengine.base.transfer import upload
from esengine.kernels import normals, stream_id


def latents(
    *,
    seed: int,
    step: int,
    prompts: torch.Tensor,
    repeats: torch.Tensor,
    shape: tuple[int, int, int],
    draw: int = 0,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Standard normal latents, a pure function of (seed, step, draw, prompt, repeat).

    A row does not depend on the other rows, their order, or the member that renders it. The noise follows contract v1
    with stream = stream_id("latent/<draw>/<repeat>"), pair = prompt and e = the row-major element.

    Args:
        seed: The run's seed.
        step: The ES step.
        prompts: int64 [B] on the CPU, prompt index of each row.
        repeats: int64 [B] on the CPU, repeat index of each row.
        shape: (channels, height, width) of a latent.
        draw: 0 for the initial latent, j for the noise added after denoising step j.
        device: Device of the latents.

    Returns:
        float32 [B, C, H, W].
    """
    rows = list(zip(prompts.tolist(), repeats.tolist(), strict=True))
    slots = {row: slot for slot, row in enumerate(dict.fromkeys(rows))}  # one draw for all members
    streams = {repeat: stream_id(f"latent/{draw}/{repeat}") for _, repeat in slots}
    channels, height, width = shape
    unique = normals(
        seed=seed,
        step=step,
        streams=upload(torch.tensor([streams[repeat] for _, repeat in slots], dtype=torch.int64), device),
        pairs=upload(torch.tensor([prompt for prompt, _ in slots], dtype=torch.int64), device),
        count=channels * height * width,
        device=device,
    )
    index = upload(torch.tensor([slots[row] for row in rows], dtype=torch.int64), device)
    return unique.view(-1, channels, height, width)[index]
