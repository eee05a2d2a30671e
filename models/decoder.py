"""Decodes latents to uint8 images: runs the VAE in chunks, and rounds and checks its images on the device.

Legend: x0_bchw is x0 / sigma_data, the output of the sampler; B images.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
from diffusers import AutoencoderDC, AutoencoderTiny

from esengine.base.errors import ConfigError
from esengine.base.memory import oom_guard
from esengine.models import graphs


class Decoder:
    """The decoder of a frozen VAE.

    Args:
        vae: `AutoencoderDC`, or `AutoencoderTiny`.
        channels_last: Keep the convolutions' weights, and so all activations, in channels-last order. Convolutions are
            faster in this order on a GPU in half precision and on a CPU in single precision.
        compile_backend: Backend of torch.compile, for `mode="compiled"`.
    """

    def __init__(
        self, vae: AutoencoderDC | AutoencoderTiny, *, channels_last: bool = False, compile_backend: str = "inductor"
    ):
        self.channels_last, self.compile_backend = channels_last, compile_backend
        self.vae = vae.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        self._captured: tuple[graphs.Addresses, graphs.Graphs] | None = None

    @torch.no_grad()
    def __call__(self, x0_bchw: torch.Tensor, *, chunk: int, mode: str = "eager") -> tuple[torch.Tensor, torch.Tensor]:
        """Decode to images, rounded as diffusers does for PIL, and mark the finite ones. Does not wait for the device.

        Args:
            x0_bchw: float [B, C, h, w].
            chunk: Images in one VAE call.
            mode: `eager`, `compiled` or `graphed`.

        Returns:
            uint8 [B, 3, H, W] and bool [B], on the device of x0.

        Raises:
            ConfigError: `mode` is `graphed` and the device is not a CUDA device.
            RenderError: A chunk does not fit into memory.
        """
        if mode == "graphed" and not graphs.supported(x0_bchw.device):
            raise ConfigError(f"decode: graphed needs a CUDA device, the model is on {x0_bchw.device}")
        decode = {"eager": self._pixels, "compiled": self._compiled, "graphed": self._graphed}[mode]
        scaled = x0_bchw.to(self.vae.dtype) / self.vae.config.scaling_factor
        images, finite = None, torch.empty(len(scaled), dtype=torch.bool, device=scaled.device)
        for first, z in zip(range(0, max(1, len(scaled)), chunk), scaled.split(chunk), strict=True):
            with oom_guard(f"{len(z)} images in one VAE call", "give a smaller decode chunk"):
                pixels, good = decode(z)
            if images is None:
                images = torch.empty(len(scaled), *pixels.shape[1:], dtype=torch.uint8, device=scaled.device)
            images[first : first + chunk], finite[first : first + chunk] = pixels, good
        return images, finite

    def _pixels(self, z_bchw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.channels_last:
            z_bchw = z_bchw.contiguous(memory_format=torch.channels_last)
        decoded = self.vae.decode(z_bchw, return_dict=False)[0]
        finite = decoded.isfinite().all(3).all(2).all(1)
        return ((decoded / 2 + 0.5).clamp(0, 1).float() * 255).round().to(torch.uint8), finite

    @cached_property
    def _compiled(self):
        return torch.compile(self._pixels, backend=self.compile_backend, dynamic=False)

    def _graphed(self, z_bchw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self._captured is None or not self._captured[0].unchanged():  # weights were moved or cast
            self._captured = graphs.Addresses(self.vae), graphs.Graphs(self._session)
        return self._captured[1](z_bchw)

    @contextmanager
    def _session(self, z_bchw: torch.Tensor) -> Iterator[graphs.Compute]:
        yield lambda: self._pixels(z_bchw)
