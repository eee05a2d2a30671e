"""How an image is sampled and decoded."""

from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

from esengine.base.errors import ConfigError

PIPELINE_MULTIPLE = 32
"""Heights and widths are multiples of it, as `SanaSprintPipeline` requires. All other pipelines take them too."""

MAX_GUIDANCE = 1e4
"""Far beyond any use, and finite in half precision."""

FIRST_ANGLE, SECOND_ANGLE = 1.57080, 1.3
"""Trigflow angles of the schedule: the first, and the second where there are two steps. The pipeline's own."""


@dataclass(frozen=True)
class RenderSettings:
    """How an image is made. What is None takes the default of the model's family, see `families.Family.resolve`."""

    height: int | None = None
    """Height in pixels. By default the model's own."""
    width: int | None = None
    """Width in pixels. By default the model's own."""
    num_steps: int | None = None
    """Denoising steps. By default the model family's number: 1 for SANA-Sprint."""
    guidance_scale: float | None = None
    """Guidance scale. By default the model family's: 4.5 for SANA-Sprint, which takes it as an input."""
    x0_angle: float | None = None
    """For one step only: the trigflow angle at which x0 is computed. The reference run used 1.3; the scheduler uses
    pi / 2."""
    decode_chunk: int = 16
    """Images in one decoder call."""
    graphs: Literal["auto", "always", "never"] = "auto"
    """Whether to replay a population's forward from CUDA graphs. auto: on a GPU, if the model's blocks run fused. Text
    is then padded to a multiple of 8 tokens."""
    decode: Literal["eager", "compiled", "graphed"] = "eager"
    """How to run the decoder: as it is, through torch.compile, or from a CUDA graph."""
    overlap: bool = False
    """On a GPU, decode a chunk while the next one is denoised. This needs memory for both."""

    def __post_init__(self):
        for name in ("height", "width"):
            size = getattr(self, name)
            if size is not None and (size <= 0 or size % PIPELINE_MULTIPLE):
                raise ConfigError(f"{name}: expected a positive multiple of {PIPELINE_MULTIPLE}, got {size}")
        for name in ("num_steps", "decode_chunk"):
            if (count := getattr(self, name)) is not None and count < 1:
                raise ConfigError(f"{name}: expected at least 1, got {count}")
        if self.guidance_scale is not None and not abs(self.guidance_scale) <= MAX_GUIDANCE:  # nor NaN
            raise ConfigError(f"guidance_scale: expected at most ±{MAX_GUIDANCE:g}, got {self.guidance_scale}")
        if self.x0_angle is not None and self.num_steps not in (None, 1):
            raise ConfigError(
                f"x0_angle: expected None unless num_steps is 1, got {self.x0_angle} for {self.num_steps}"
            )
        if self.x0_angle is not None and not 0 < self.x0_angle <= 1.5708:
            raise ConfigError(f"x0_angle: expected an angle in (0, 1.5708], got {self.x0_angle}")
        self.check_choices()

    def check_choices(self, section: str = "") -> None:
        """Raises ConfigError for a `graphs` or `decode` that there is not."""
        for name in ("graphs", "decode"):
            known = get_args(get_type_hints(RenderSettings)[name])
            if getattr(self, name) not in known:
                raise ConfigError(f"{section}{name}: expected one of {', '.join(known)}, got {getattr(self, name)}")
