"""How images are sampled, in a run and in an evaluation. Plain Python, so that `--help` answers before torch is
imported."""

from dataclasses import dataclass

from esengine.base.settings_file import MAX_COUNT, check_counts
from esengine.models.settings import RenderSettings


@dataclass(frozen=True)
class ImageSettings(RenderSettings):
    """How an image is sampled."""

    chunk: int | None = None
    """Images in one forward of the model. By default chosen from the device's memory."""
    vae: str | None = None
    """Another decoder of the same latents, such as DC-AE-Lite: a folder, or a hub id, optionally with @revision."""
    instruction: bool = True
    """Put the pipeline's instruction to the text encoder before each prompt."""

    def __post_init__(self):
        pixels, count = (1, 1 << 14), (1, MAX_COUNT)
        check_counts(self, "image.", height=pixels, width=pixels, num_steps=count, chunk=count, decode_chunk=count)
        self.check_choices("image.")  # `render_settings` checks the rest: a flag may still change what a file says
