"""How images are sampled, in a run and in an evaluation. Plain Python, so that `--help` answers before torch is
imported."""

from esengine.base.settings import Count, Switch, settings
from esengine.models.settings import RenderSettings


@settings("image")
class ImageSettings(RenderSettings):
    """How an image is sampled."""

    chunk: Count | None = None
    """Images in one forward of the model. By default chosen from the device's memory."""
    vae: str | None = None
    """Another decoder of the same latents, such as DC-AE-Lite: a folder, or a hub id, optionally with @revision."""
    instruction: Switch = True
    """Prepend the pipeline's instruction for the text encoder to each prompt."""

    def __post_init__(self):
        """No check here. `render_settings` checks combinations, after flags have overridden the file."""
