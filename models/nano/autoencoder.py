"""Training of the autoencoder: 64 x 64 pixels to 4 x 4 latents of 32 channels, and back.

    z = E(y),  y' = D(z + s n),  n ~ N(0, 1)
    loss = |y' - y| + 4 (y' - y)^2 + |grad y' - grad y| + 0.05 (m^2 + (d - 1)^2)

y is an image from -1 to 1, m and d are mean and standard deviation of a latent channel over the batch. The noise s
teaches the decoder to read latents that a sampler got slightly wrong, and m and d make them fit trigflow, so that the
scaling factor is 1 but for what training left.
"""

import copy
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderDC

from esengine.models.nano import world
from esengine.models.nano.build import LATENT, autoencoder
from esengine.models.nano.loop import Report, average, load, mean_gradients, rate, set_rate, share, train

BATCH, PEAK, NOISE = 32, 2e-3, 0.1
_SEED_STRIDE = 1 << 24


def train_autoencoder(folder: Path, *, steps: int, seed: int, report: Report | None = None) -> AutoencoderDC:
    """Trains, or goes on, or reads what is done.

    Returns:
        The average of the weights, with its scaling factor, float32.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = autoencoder()
    vae = vae.to(memory_format=torch.channels_last)
    mean = copy.deepcopy(vae).requires_grad_(False)
    learned = list(vae.parameters())
    optimizer = torch.optim.AdamW(learned, lr=PEAK, betas=(0.9, 0.98), weight_decay=0.01, fused=True)

    def step(i: int) -> dict[str, torch.Tensor]:
        y_bchw = share(pixels(world.batch("train", BATCH, seed * _SEED_STRIDE + i)[1]))
        set_rate(optimizer, rate(i, steps, peak=PEAK, warmup=200))
        with torch.autocast("cpu", torch.bfloat16):
            z_bchw = vae.encode(y_bchw).latent.float()
            decoded = vae.decode(z_bchw + NOISE * share(torch.randn(BATCH, *LATENT))).sample.float()
        error = decoded - y_bchw
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        mean_c, std_c = z_bchw.mean((0, 2, 3)), z_bchw.std((0, 2, 3))
        spread = (mean_c.square() + (std_c - 1).square()).mean()
        loss = error.abs().mean() + 4 * error.square().mean() + edges + 0.05 * spread
        optimizer.zero_grad()
        loss.backward()
        mean_gradients(learned)
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        average(mean, vae, i, half_life=200)
        return {"loss": loss.detach(), "mse": error.detach().square().mean(), "spread": spread.detach()}

    state = {"vae": vae, "mean": mean, "optimizer": optimizer}
    train("autoencoder", folder, step, steps=steps, state=state, seed=seed, report=report)
    scale(mean)
    return mean


def read_autoencoder(folder: Path) -> AutoencoderDC:
    """The averaged weights of the checkpoint, finished or not.

    Raises:
        FileNotFoundError: There is none.
    """
    vae = autoencoder()
    if not load(folder / "autoencoder.safetensors", {"mean": vae}):
        raise FileNotFoundError(f"folder: expected autoencoder.safetensors, got none in {folder}")
    vae = vae.to(memory_format=torch.channels_last).requires_grad_(False)
    scale(vae)
    return vae


def pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 [B, H, W, 3] to float32 [B, 3, H, W] from -1 to 1, channels last."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def encode(vae: AutoencoderDC, images: np.ndarray, *, chunk: int = 64) -> torch.Tensor:
    """Unscaled latents float32 [B, C, h, w] of uint8 [B, H, W, 3]; the matrix products in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        return torch.cat([vae.encode(y_bchw).latent.float().contiguous() for y_bchw in pixels(images).split(chunk)])


def scale(vae: AutoencoderDC) -> None:
    """Sets the scaling factor with which validation images have latents of standard deviation 1.

    The sampler's x0 / sigma_data is the scaled latent.
    """
    z_bchw = encode(vae, world.batch("validation", 512, 0)[1])
    vae.register_to_config(scaling_factor=round(1 / float(z_bchw.std()), 4))
