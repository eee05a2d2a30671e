"""Families of diffusers pipelines: one row of data for each. Plain Python, so that `--help` answers before torch loads.

A row says which class a model folder must have, which classes its parts may have, and how its pipeline is called.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from esengine.base.errors import ConfigError
from esengine.models.settings import RenderSettings

Kinds = tuple[tuple[str, str], ...]
"""Allowed (library, class) pairs of one component, as `model_index.json` writes them."""

REFERENCE_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "linear_1", "linear_2", "proj_out", "linear")
"""Target layers of the published SANA-Sprint run."""


@dataclass(frozen=True)
class Family:
    """How one kind of diffusers pipeline is loaded, called and trained.

    Attributes:
        name: the name in messages and in `tiny:NAME`.
        pipeline: name of the pipeline's class in diffusers.
        denoiser: the pipeline's attribute that a population is attached to.
        components: allowed (library, class) pairs of each component. A component that is not listed is refused. A
            component whose pairs contain `ABSENT` may be missing.
        texts: arguments of the pipeline's call that take the results of its `encode_prompt`, in that order; None for
            a result that is not passed on. A mask belongs to the embeddings before it.
        ragged: whether the call takes embeddings as a list with one [L, C] for each row.
        trims: whether masked tokens have no effect, so that they can be cut off.
        steps: default number of denoising steps.
        guidance: default guidance scale.
        embedded_guidance: whether `guidance` is for a denoiser that takes it as an input. Without that input, which a
            folder's denoiser may lack, the default is 0.
        guidance_argument: the argument of the pipeline's call that takes it.
        guided_above: guidance scales above this use classifier-free guidance; None: the family never does.
        copies: rows of the denoiser's batch for each image while classifier-free guidance is on. Row i of the batch
            belongs to image i modulo the number of images.
        negative: the negative prompt.
        size: default height and width in pixels, if the denoiser's configuration has no `sample_size`.
        targets: default target layers, by the end of their names.
        call: further arguments of the pipeline's call.
        call_at: further arguments for a certain number of steps.
        options: arguments of the pipeline's constructor.
        tiny_vae: hub id of an AutoencoderTiny that decodes its latents; empty if none is known; None if the pipeline
            cannot decode by that class.
        licence: what the published weights may be used for.
    """

    name: str
    pipeline: str
    denoiser: str = "transformer"
    components: Mapping[str, Kinds] = field(default_factory=dict)
    texts: tuple[str | None, ...] = ("prompt_embeds",)
    ragged: bool = False
    trims: bool = True
    steps: int = 4
    guidance: float = 0.0
    embedded_guidance: bool = False
    guidance_argument: str = "guidance_scale"
    guided_above: float | None = 1.0
    copies: int = 1
    negative: str = ""
    size: int = 1024
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    call: Mapping[str, Any] = field(default_factory=dict)
    call_at: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    tiny_vae: str | None = ""
    licence: str = ""

    def __post_init__(self):
        if self.copies < 1:
            raise ValueError(f"copies: expected at least 1, got {self.copies}")
        if not self.texts or not any(self.texts):
            raise ValueError("texts: expected the name of at least one argument, got none")

    @property
    def fast(self) -> bool:
        """Whether `esengine.models.load` renders it by a class of its own, `SanaSprint`."""
        return self.pipeline == FAST

    @property
    def encoders(self) -> tuple[str, ...]:
        """Names of the components that only encode prompts."""
        return tuple(name for name in self.components if name.startswith(("text_encoder", "tokenizer")))

    def resolve(self, settings: RenderSettings, *, own_call: bool | None = None) -> RenderSettings:
        """The settings with this family's defaults in place of None.

        Args:
            settings: how images are made. A subclass stays one.
            own_call: whether the images come from the pipeline's own call, which lacks some of the settings. Default:
                unless the family is `fast`.

        Raises:
            ConfigError: a setting does not apply. The message begins with its name.
        """
        if not self.fast if own_call is None else own_call:
            for name, problem in self._not_applicable(settings):
                what = f"{problem} does not apply to {self.pipeline}, which renders by its own call"
                raise ConfigError(f"{name}: {what}; leave it out")
        steps = self.steps if settings.num_steps is None else settings.num_steps
        scale = settings.guidance_scale
        if scale is None and not self.embedded_guidance:  # else the loaded pipeline knows
            scale = self.guidance
        return dataclasses.replace(settings, num_steps=steps, guidance_scale=scale)

    def _not_applicable(self, settings: RenderSettings) -> Iterable[tuple[str, str]]:
        if settings.x0_angle is not None:
            yield "x0_angle", str(settings.x0_angle)
        if settings.graphs == "always":
            yield "graphs", settings.graphs
        if settings.decode != "eager":
            yield "decode", settings.decode
        if settings.overlap:
            yield "overlap", str(settings.overlap)
        if getattr(settings, "vae", None) is not None:
            yield "vae", settings.vae
        if not getattr(settings, "instruction", True) and self.pipeline not in INSTRUCTED:
            yield "instruction", "False"


FAST = "SanaSprintPipeline"
"""The pipeline that is rendered by `SanaSprint` when a model is loaded by name."""
INSTRUCTED = (FAST, "SanaPipeline")
"""Pipelines that put an instruction before each prompt."""
ABSENT = ("", "")
"""Marks a component that may be missing."""


def _diffusers(*names: str) -> Kinds:
    return tuple(("diffusers", name) for name in names)


def _transformers(*names: str) -> Kinds:
    return tuple(("transformers", name) for name in names)


_FLOW = _diffusers("FlowMatchEulerDiscreteScheduler")
_CLASSIC = _diffusers(
    *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"),
    *("DPMSolverSinglestepScheduler", "HeunDiscreteScheduler", "PNDMScheduler", "TCDScheduler"),
    "UniPCMultistepScheduler",
)
_LCM = _diffusers("LCMScheduler")
_KL = _diffusers("AutoencoderKL", "AutoencoderTiny")
_CLIP_TOKENIZER = _transformers("CLIPTokenizer", "CLIPTokenizerFast")
_T5_TOKENIZER = _transformers("T5Tokenizer", "T5TokenizerFast")
_T5 = _transformers("T5EncoderModel")
_GEMMA = {
    "tokenizer": _transformers("GemmaTokenizer", "GemmaTokenizerFast"),
    "text_encoder": _transformers("Gemma2Model"),
}
_QWEN_TOKENIZER = _transformers("Qwen2Tokenizer", "Qwen2TokenizerFast")
_QWEN_VL = {"tokenizer": _QWEN_TOKENIZER, "text_encoder": _transformers("Qwen2_5_VLForConditionalGeneration")}
_CLIP_T5 = {
    "tokenizer": _CLIP_TOKENIZER,
    "text_encoder": _transformers("CLIPTextModel"),
    "tokenizer_2": _T5_TOKENIZER,
    "text_encoder_2": _T5,
}
_IMAGE_PROMPTS = {
    "image_encoder": (ABSENT, *_transformers("CLIPVisionModelWithProjection", "SiglipVisionModel")),
    "feature_extractor": (ABSENT, *_transformers("CLIPImageProcessor", "CLIPFeatureExtractor", "SiglipImageProcessor")),
}
"""Parts for images as prompts. They are not loaded."""
_SAFETY = {
    "safety_checker": (ABSENT, ("stable_diffusion", "StableDiffusionSafetyChecker")),
    "feature_extractor": _IMAGE_PROMPTS["feature_extractor"],
    "image_encoder": _IMAGE_PROMPTS["image_encoder"],
}
"""The safety checker is not loaded."""
UNUSED = ("image_encoder", "feature_extractor", "safety_checker", "guider", "ocr_guider")
"""Components that are checked, but never loaded."""

_MASKED = (
    *("prompt_embeds", "prompt_attention_mask"),
    *("negative_prompt_embeds", "negative_prompt_attention_mask"),
)
_POOLED = (
    *("prompt_embeds", "negative_prompt_embeds"),
    *("pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
)
_JOINT = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

_ROWS = (
    Family(
        name="sana-sprint",
        pipeline=FAST,
        components={
            **_GEMMA,
            "vae": _diffusers("AutoencoderDC"),
            "transformer": _diffusers("SanaTransformer2DModel"),
            "scheduler": _diffusers("SCMScheduler"),
        },
        texts=("prompt_embeds", "prompt_attention_mask"),
        steps=1,
        guidance=4.5,
        guided_above=None,
        targets=REFERENCE_TARGETS,
        call={"use_resolution_binning": False, "intermediate_timesteps": None},
        call_at={2: {"intermediate_timesteps": 1.3}},
        licence="NVIDIA NSCL v2: non-commercial",
    ),
    Family(
        name="sana",
        pipeline="SanaPipeline",
        components={
            **_GEMMA,
            "vae": _diffusers("AutoencoderDC"),
            "transformer": _diffusers("SanaTransformer2DModel"),
            "scheduler": (*_FLOW, *_diffusers("DPMSolverMultistepScheduler")),
        },
        texts=_MASKED,
        guidance=1.0,
        copies=2,
        call={"use_resolution_binning": False, "negative_prompt": None},
        licence="NVIDIA NSCL v2: non-commercial",
    ),
    Family(
        name="z-image",
        pipeline="ZImagePipeline",
        components={
            "tokenizer": _QWEN_TOKENIZER,
            "text_encoder": _transformers("Qwen3Model", "Qwen3ForCausalLM"),
            "vae": _KL,
            "transformer": _diffusers("ZImageTransformer2DModel"),
            "scheduler": _FLOW,
        },
        texts=("prompt_embeds", "negative_prompt_embeds"),
        ragged=True,
        steps=8,
        guided_above=0.0,
        copies=2,
        tiny_vae="madebyollin/taef1",
        licence="Z-Image-Turbo: Apache-2.0",
    ),
    Family(
        name="flux2-klein",
        pipeline="Flux2KleinPipeline",
        components={
            "tokenizer": _QWEN_TOKENIZER,
            "text_encoder": _transformers("Qwen3ForCausalLM"),
            "vae": _diffusers("AutoencoderKLFlux2"),
            "transformer": _diffusers("Flux2Transformer2DModel"),
            "scheduler": _FLOW,
        },
        texts=("prompt_embeds", None),
        guidance=1.0,
        targets=(*_JOINT, "to_qkv_mlp_proj", "to_out"),
        tiny_vae=None,
        licence="4B: Apache-2.0; 9B: non-commercial",
    ),
    Family(
        name="flux",
        pipeline="FluxPipeline",
        components={
            **_CLIP_T5,
            **_IMAGE_PROMPTS,
            "vae": _KL,
            "transformer": _diffusers("FluxTransformer2DModel"),
            "scheduler": _FLOW,
        },
        texts=("prompt_embeds", "pooled_prompt_embeds", None),
        guided_above=None,
        targets=_JOINT,
        tiny_vae="madebyollin/taef1",
        licence="FLUX.1-schnell: Apache-2.0; dev: non-commercial",
    ),
    Family(
        name="sd3",
        pipeline="StableDiffusion3Pipeline",
        components={
            "tokenizer": _CLIP_TOKENIZER,
            "text_encoder": _transformers("CLIPTextModelWithProjection"),
            "tokenizer_2": _CLIP_TOKENIZER,
            "text_encoder_2": _transformers("CLIPTextModelWithProjection"),
            "tokenizer_3": (ABSENT, *_T5_TOKENIZER),
            "text_encoder_3": (ABSENT, *_T5),
            **_IMAGE_PROMPTS,
            "vae": _KL,
            "transformer": _diffusers("SD3Transformer2DModel"),
            "scheduler": _FLOW,
        },
        texts=_POOLED,
        copies=2,
        targets=_JOINT,
        tiny_vae="madebyollin/taesd3",
        licence="Stability AI Community: free below 1M USD a year",
    ),
    Family(
        name="sdxl",
        pipeline="StableDiffusionXLPipeline",
        denoiser="unet",
        components={
            "tokenizer": _CLIP_TOKENIZER,
            "text_encoder": _transformers("CLIPTextModel"),
            "tokenizer_2": _CLIP_TOKENIZER,
            "text_encoder_2": _transformers("CLIPTextModelWithProjection"),
            **_IMAGE_PROMPTS,
            "vae": _KL,
            "unet": _diffusers("UNet2DConditionModel"),
            "scheduler": _CLASSIC,
        },
        texts=_POOLED,
        copies=2,
        options={"add_watermarker": False},
        tiny_vae="madebyollin/taesdxl",
        licence="Lightning, Hyper: CreativeML OpenRAIL++-M; Turbo: non-commercial",
    ),
    Family(
        name="sd",
        pipeline="StableDiffusionPipeline",
        denoiser="unet",
        components={
            "tokenizer": _CLIP_TOKENIZER,
            "text_encoder": _transformers("CLIPTextModel"),
            **_SAFETY,
            "vae": _KL,
            "unet": _diffusers("UNet2DConditionModel"),
            "scheduler": (*_CLASSIC, *_LCM),
        },
        texts=("prompt_embeds", "negative_prompt_embeds"),
        steps=1,
        copies=2,
        size=512,
        options={"requires_safety_checker": False},
        tiny_vae="madebyollin/taesd",
        licence="SD-Turbo: non-commercial",
    ),
    Family(
        name="pixart",
        pipeline="PixArtAlphaPipeline",
        components={
            "tokenizer": _T5_TOKENIZER,
            "text_encoder": _T5,
            "vae": _KL,
            "transformer": _diffusers("PixArtTransformer2DModel"),
            "scheduler": (*_CLASSIC, *_LCM),
        },
        texts=_MASKED,
        copies=2,
        call={"use_resolution_binning": False, "negative_prompt": None, "clean_caption": False},
        tiny_vae="madebyollin/taesd",
        licence="CreativeML OpenRAIL++-M",
    ),
    Family(
        name="qwen-image",
        pipeline="QwenImagePipeline",
        components={
            **_QWEN_VL,
            "vae": _diffusers("AutoencoderKLQwenImage"),
            "transformer": _diffusers("QwenImageTransformer2DModel"),
            "scheduler": _FLOW,
        },
        texts=("prompt_embeds", "prompt_embeds_mask"),
        steps=8,
        guidance=1.0,
        guidance_argument="true_cfg_scale",
        negative=" ",
        targets=_JOINT,
        tiny_vae=None,
        licence="Apache-2.0; fuse a Lightning LoRA first",
    ),
    Family(
        name="hunyuan-image",
        pipeline="HunyuanImagePipeline",
        components={
            **_QWEN_VL,
            "tokenizer_2": _transformers("ByT5Tokenizer"),
            "text_encoder_2": _T5,
            "guider": (ABSENT, *_diffusers("AdaptiveProjectedMixGuidance")),
            "ocr_guider": (ABSENT, *_diffusers("AdaptiveProjectedMixGuidance")),
            "vae": _diffusers("AutoencoderKLHunyuanImage"),
            "transformer": _diffusers("HunyuanImageTransformer2DModel"),
            "scheduler": _FLOW,
        },
        texts=("prompt_embeds", "prompt_embeds_mask", "prompt_embeds_2", "prompt_embeds_mask_2"),
        steps=8,
        guidance=3.25,
        guidance_argument="distilled_guidance_scale",
        guided_above=None,
        size=2048,
        targets=_JOINT,
        licence="Tencent Hunyuan Community: not in the EU, UK and South Korea",
    ),
    Family(
        name="chroma",
        pipeline="ChromaPipeline",
        components={
            "tokenizer": _T5_TOKENIZER,
            "text_encoder": _T5,
            **_IMAGE_PROMPTS,
            "vae": _KL,
            "transformer": _diffusers("ChromaTransformer2DModel"),
            "scheduler": _FLOW,
        },
        texts=(*_MASKED[:1], None, *_MASKED[1:3], None, *_MASKED[3:]),
        trims=False,  # the pipeline adds the mask to the attention's logits as 0 or 1
        steps=8,
        guidance=1.0,
        targets=_JOINT,
        tiny_vae="madebyollin/taef1",
        licence="Apache-2.0",
    ),
    Family(
        name="lumina2",
        pipeline="Lumina2Pipeline",
        components={
            **_GEMMA,
            "vae": _KL,
            "transformer": _diffusers("Lumina2Transformer2DModel"),
            "scheduler": _FLOW,
        },
        texts=_MASKED,
        steps=8,
        guidance=1.0,
        tiny_vae="madebyollin/taef1",
        licence="Apache-2.0",
    ),
)


def _variant(name: str, of: str, scheduler: Kinds | None = None, **changes) -> Family:
    """A row that differs from another one in some fields, and in its scheduler if one is given."""
    row = next(each for each in _ROWS if each.name == of)
    parts = row.components if scheduler is None else {**row.components, "scheduler": scheduler}
    return dataclasses.replace(row, name=name, components=parts, **changes)


FAMILIES: dict[str, Family] = {
    row.name: row
    for row in (
        *_ROWS,
        _variant("sdxl-lcm", "sdxl", scheduler=_LCM, guidance=8.0, embedded_guidance=True,
                 licence="that of the SDXL weights"),
        _variant("sd-lcm", "sd", pipeline="LatentConsistencyModelPipeline", scheduler=_LCM, steps=4, guidance=8.5,
                 texts=("prompt_embeds", None), guided_above=None, copies=1, licence="that of the weights"),
        _variant("pixart-sigma", "pixart", pipeline="PixArtSigmaPipeline", tiny_vae="madebyollin/taesdxl"),
    )
}  # fmt: skip
"""Every family by name. Where two have the same pipeline, their schedulers tell them apart."""

TINY = (
    *("sana-sprint", "sana", "z-image", "flux2-klein", "flux", "sd3", "sdxl", "sdxl-lcm", "sd", "pixart"),
    *("qwen-image", "hunyuan-image", "chroma", "lumina2", "sd-lcm", "pixart-sigma"),
)
"""Families that have a tiny untrained pipeline, `tiny:NAME`."""


def family_of(index: Mapping[str, Any]) -> Family:
    """The family of a model folder, by its `model_index.json`.

    Nothing is imported. Library and class of every component are compared with the family's own.

    Args:
        index: the contents of `model_index.json`.

    Raises:
        ConfigError: the pipeline is of no family, or a component is of another class than its family's.
    """
    kind = index.get("_class_name") if isinstance(index, Mapping) else None
    rows = [row for row in FAMILIES.values() if isinstance(kind, str) and row.pipeline == kind]
    if not rows:
        known = ", ".join(dict.fromkeys(row.pipeline for row in FAMILIES.values()))
        what = f"expected one of {known}, got {kind!r:.100}"
        raise ConfigError(f"{what}; for another pipeline use esengine.models.DiffusersPipeline(pipe, family)")
    problems = [_problem(row, index) for row in rows]
    for row, problem in zip(rows, problems, strict=True):
        if problem is None:
            return row
    raise ConfigError(problems[0])


def _problem(row: Family, index: Mapping[str, Any]) -> str | None:
    """Why a `model_index.json` is not of a family; None if it is."""
    for name, value in index.items():
        if name in row.components:
            found = ABSENT if value is None or value == [None, None] else value
            found = tuple(found) if isinstance(found, list) else found
            if found not in row.components[name]:
                expected = " or ".join(".".join(pair) for pair in row.components[name] if pair != ABSENT)
                return f"component {name} of {row.pipeline}: expected {expected}, got {value!r:.100}"
        elif not (value is None or value == [None, None] or isinstance(value, (bool, int, float, str))):
            known = ", ".join(row.components)
            return f"component {name} of {row.pipeline}: expected one of {known}, got another, {value!r:.100}"
    for name, pairs in row.components.items():
        if name not in index and ABSENT not in pairs:
            expected = " or ".join(".".join(pair) for pair in pairs)
            return f"component {name} of {row.pipeline}: expected {expected}, got none"
    return None
