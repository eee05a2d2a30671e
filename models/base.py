"""The interface of an image model to the engine."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch

from esengine.es.population import Population
from esengine.es.rows import Rows
from esengine.models.conditioning import Conditioning
from esengine.models.settings import RenderSettings
from esengine.models.text_cache import TextEmbeddings


class Generator(Protocol):
    """A frozen model that renders a batch of rows. Each row may belong to a different member.

    Attributes:
        module: the module to which a population is attached.
        denoiser: the pipeline's name of the module, `transformer` or `unet`.
        targets: default target layers, by the end of their names.
        device: the device of the model.
        dtype: the data type of the model.
        image_size: default height and width of an image, in pixels.
    """

    module: torch.nn.Module
    denoiser: str
    targets: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype
    image_size: int

    def identity(self) -> str:
        """A text that identifies the loaded weights. Equal weights give equal texts."""

    def resolve(self, settings: RenderSettings) -> RenderSettings:
        """The settings with the model's defaults in place of None. Raises ConfigError if one does not apply."""

    def encode(
        self,
        prompts: Sequence[str],
        *,
        cache_dir: str | Path | None = None,
        instruction: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> TextEmbeddings | Conditioning:
        """Embeddings of prompts, read from the cache if possible. `progress` is called with (encoded, to encode)."""

    def render(
        self,
        texts: TextEmbeddings | Conditioning,
        *,
        seed: int,
        step: int,
        rows: Rows,
        population: Population | None = None,
        settings: RenderSettings | None = None,
    ) -> torch.Tensor:
        """Render B rows: uint8 [B, 3, H, W]. Arguments and errors are those of `render_chunks`."""

    def render_chunks(
        self,
        texts: TextEmbeddings | Conditioning,
        chunks: Iterable[Rows],
        *,
        seed: int,
        step: int,
        population: Population | None = None,
        settings: RenderSettings | None = None,
        text_length: int | None = None,
    ) -> Iterator[torch.Tensor]:
        """Render the chunks of a step: uint8 [B, 3, H, W] for each chunk.

        A row's latents depend only on (seed, step, prompt, repeat), so all members of a population share them.

        Raises:
            RenderError: an image is not finite.
            OutOfMemory: a chunk does not fit into memory. It is a RenderError too.
        """

    def deferred_checks(self) -> AbstractContextManager:
        """A context that delays the check for images that are not finite. Its end raises the RenderError."""

    def reward_decoding(self) -> AbstractContextManager:
        """A context in which images are decoded for a reward, by a cheaper decoder if one was given."""

    def image_bytes(self, settings: RenderSettings) -> int:
        """Estimated memory for one more image in a forward, in bytes."""

    def plan(self, population: Population, settings: RenderSettings) -> str:
        """A text that says how a population is rendered on this device, for the log of a run."""

    def release_graphs(self) -> None:
        """Free memory that is kept between forwards. The next forward allocates it again."""

    def load_adapter(self, path: str | Path) -> None:
        """Load a LoRA folder. It replaces an adapter loaded before. Raises ConfigError if it cannot be used."""

    def unload_adapter(self) -> None:
        """Remove the loaded adapter, which leaves the base model."""

    def adapter_enabled(self, enabled: bool) -> None:
        """Switch the loaded adapter on or off."""
