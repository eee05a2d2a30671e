"""How images are sampled, in a run and in an evaluation. Plain Python, so that `--help` answers before torch is
imported."""

from esengine.base.settings import Count, Interval, Switch, settings
from esengine.models.settings import RenderSettings


@settings("image")
class ImageSettings(RenderSettings):
    """How an image is sampled."""

    chunk: Count | None = None
    """Images in one forward of the model. By default chosen from the device's memory."""
    vae: str | None = None
    """Another decoder of the same latents, such as DC-AE-Lite: a folder, or a hub id, optionally with @revision."""
    reward_vae: str | None = None
    """In training, a cheaper decoder for the images that the reward scores: a folder, a hub id, or `tiny`, which is the
    family's AutoencoderTiny. Everything else is decoded by the model's own decoder, also in eval and render."""
    reward_vae_check: Interval = 10
    """Steps between checks of reward_vae. In a check the step's images are rendered and scored again with the model's
    own decoder; both fitnesses and ES gradients are compared in the log. 0: never."""
    instruction: Switch = True
    """Prepend the pipeline's instruction for the text encoder to each prompt."""

    def __post_init__(self):
        """No check here. `render_settings` checks combinations, after flags have overridden the file."""
