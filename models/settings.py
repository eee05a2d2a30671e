"""How an image is sampled and decoded."""

from dataclasses import dataclass

from esengine.errors import ConfigError

PIPELINE_MULTIPLE = 32
"""`SanaSprintPipeline.check_inputs` takes no other height or width."""

MOST_GUIDANCE = 1e4
"""Far beyond any use, and finite in half precision."""

FIRST_ANGLE, SECOND_ANGLE = 1.57080, 1.3
"""Trigflow angles of the schedule: the first, and the second where there are two steps. The pipeline's own."""

GRAPHS = ("auto", "always", "never")
DECODES = ("eager", "compiled", "graphed")


@dataclass(frozen=True)
class RenderSettings:
    """How an image is made. The sampler's defaults are `SanaSprintPipeline.__call__`'s, with one step.

    Attributes:
        height: Of the image in pixels. None: the model's own size.
        width: Of the image in pixels. None: the model's own size.
        num_steps: Denoising steps.
        guidance_scale: Embedded guidance.
        x0_angle: One step only. The angle at which x0 is read off the velocity, while the model is still called at
            `FIRST_ANGLE`. None: the scheduler's own. The reference run used 1.3.
        decode_chunk: Images in one VAE call.
        graphs: Replay a population's forward from CUDA graphs: `auto` where its blocks run fused on a GPU, `always`
            (an error elsewhere) or `never`. Text is then padded to a multiple of `graphs.TEXT_MULTIPLE` tokens.
        decode: The VAE as it stands, through torch.compile, or replayed from a CUDA graph (GPU only).
        overlap: `SanaSprint.render_chunks` decodes a chunk on a second stream while the next is denoised. It needs
            memory for both, and a CPU has no streams: there it changes nothing.
    """

    height: int | None = None
    width: int | None = None
    num_steps: int = 1
    guidance_scale: float = 4.5
    x0_angle: float | None = None
    decode_chunk: int = 8
    graphs: str = "auto"
    decode: str = "eager"
    overlap: bool = False

    def __post_init__(self):
        for name in ("height", "width"):
            size = getattr(self, name)
            if size is not None and (size <= 0 or size % PIPELINE_MULTIPLE):
                raise ConfigError(f"{name}: expected a positive multiple of {PIPELINE_MULTIPLE}, got {size}")
        for name in ("num_steps", "decode_chunk"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not abs(self.guidance_scale) <= MOST_GUIDANCE:  # nor NaN
            raise ConfigError(f"guidance_scale: expected at most ±{MOST_GUIDANCE:g}, got {self.guidance_scale}")
        if self.x0_angle is not None and self.num_steps != 1:
            raise ConfigError(
                f"x0_angle: expected None unless num_steps is 1, got {self.x0_angle} for {self.num_steps}"
            )
        if self.x0_angle is not None and not 0 < self.x0_angle <= 1.5708:
            raise ConfigError(f"x0_angle: expected an angle in (0, 1.5708], got {self.x0_angle}")
        for name, known in (("graphs", GRAPHS), ("decode", DECODES)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)}")
