"""How an image is sampled and decoded."""

from typing import Annotated, Literal

from pydantic import Field

from esengine.base.errors import ConfigError
from esengine.base.settings import Count, Int, Number, Switch, settings

PIPELINE_MULTIPLE = 32
"""Heights and widths are multiples of it, as `SanaSprintPipeline` requires. All other pipelines take them too."""

MAX_GUIDANCE = 1e4
"""Far beyond any use, and finite in half precision."""

FIRST_ANGLE, SECOND_ANGLE = 1.57080, 1.3
"""Trigflow angles of the schedule: the first, and the second where there are two steps. The pipeline's own."""


Pixels = Annotated[Int, Field(ge=1, le=1 << 14)]


@settings()
class RenderSettings:
    """How an image is made. What is None takes the default of the model's family, see `families.Family.resolve`."""

    height: Pixels | None = None
    """Height in pixels. By default the model's own."""
    width: Pixels | None = None
    """Width in pixels. By default the model's own."""
    num_steps: Count | None = None
    """Denoising steps. By default the model family's number: 1 for SANA-Sprint."""
    guidance_scale: Annotated[Number, Field(ge=-MAX_GUIDANCE, le=MAX_GUIDANCE, allow_inf_nan=False)] | None = None
    """Guidance scale. By default the model family's: 4.5 for SANA-Sprint, which takes it as an input."""
    x0_angle: Annotated[Number, Field(gt=0, le=1.5708)] | None = None
    """For one step only: the trigflow angle at which x0 is computed. The reference run used 1.3; the scheduler uses
    pi / 2."""
    decode_chunk: Count = 16
    """Images in one decoder call."""
    graphs: Literal["auto", "always", "never"] = "auto"
    """Whether to replay a population's forward from CUDA graphs. auto: on a GPU, if the model's blocks run fused. Text
    is then padded to a multiple of 8 tokens."""
    decode: Literal["eager", "compiled", "graphed"] = "eager"
    """How to run the decoder: as it is, through torch.compile, or from a CUDA graph."""
    overlap: Switch = False
    """On a GPU, decode a chunk while the next one is denoised. This needs memory for both."""

    def __post_init__(self):
        for name in ("height", "width"):
            if (size := getattr(self, name)) is not None and size % PIPELINE_MULTIPLE:
                raise ConfigError(f"{name}: expected a positive multiple of {PIPELINE_MULTIPLE}, got {size}")
        if self.x0_angle is not None and self.num_steps not in (None, 1):
            problem = f"expected None unless num_steps is 1, got {self.x0_angle} for {self.num_steps}"
            raise ConfigError(problem, setting="x0_angle", others=("num_steps",))
