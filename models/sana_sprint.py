"""SANA-Sprint: renders a batch of (member, prompt, repeat) rows with one transformer forward a denoising step.

The sampler is `SanaSprintPipeline.__call__` line for line, except that the noise is keyed (see `latents`).

Legend: x_bchw noisy latent times sigma_data, v trigflow velocity, s angle of this step, t of the next; B rows.

Source: Chen et al., "SANA-Sprint" (2025), the trigflow sampler; diffusers' `pipeline_sana_sprint.py`.
"""

import gc
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import SanaSprintPipeline
from safetensors import safe_open

from esengine.errors import ConfigError, RenderError
from esengine.models.latents import latents
from esengine.models.loading import READ_ERRORS, download, first_line, fits, load, locate
from esengine.models.lora_file import WEIGHT_NAME
from esengine.models.sana_block import can_fuse, fused
from esengine.models.text_cache import Progress, TextEmbeddings, embed_prompts, fingerprint

PIPELINE_MULTIPLE = 32
"""`SanaSprintPipeline.check_inputs` takes no other height or width."""


@dataclass(frozen=True)
class RenderSettings:
    """How an image is sampled. The defaults are `SanaSprintPipeline.__call__`'s, with one step.

    Attributes:
        height: Of the image in pixels. None: the model's own size.
        width: Of the image in pixels. None: the model's own size.
        num_steps: Denoising steps.
        guidance_scale: Embedded guidance.
        x0_angle: One step only. The angle at which x0 is read off the velocity, while the model is still called at
            `max_timesteps`. None: the scheduler's own. The reference run used 1.3.
        decode_chunk: Images in one VAE call.
        max_timesteps: First angle of the schedule.
        intermediate_timesteps: Second angle of the two-step schedule. None: evenly spaced.
    """

    height: int | None = None
    width: int | None = None
    num_steps: int = 1
    guidance_scale: float = 4.5
    x0_angle: float | None = None
    decode_chunk: int = 8
    max_timesteps: float = 1.57080
    intermediate_timesteps: float | None = 1.3

    def __post_init__(self):
        for name in ("height", "width"):
            size = getattr(self, name)
            if size is not None and (size <= 0 or size % PIPELINE_MULTIPLE):
                raise ConfigError(f"{name}: expected a positive multiple of {PIPELINE_MULTIPLE}, got {size}")
        for name in ("num_steps", "decode_chunk"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not math.isfinite(self.guidance_scale):
            raise ConfigError(f"guidance_scale: expected a finite number, got {self.guidance_scale}")
        if not 0 < self.max_timesteps <= 1.5708:
            raise ConfigError(f"max_timesteps: expected an angle in (0, 1.5708], got {self.max_timesteps}")
        middle = self.intermediate_timesteps
        if self.num_steps == 2 and middle is not None and not 0 < middle < self.max_timesteps:
            raise ConfigError(f"intermediate_timesteps: expected between 0 and max_timesteps, got {middle}")
        if self.x0_angle is not None and self.num_steps != 1:
            raise ConfigError(
                f"x0_angle: expected None unless num_steps is 1, got {self.x0_angle} for {self.num_steps}"
            )
        if self.x0_angle is not None and not 0 < self.x0_angle <= 1.5708:
            raise ConfigError(f"x0_angle: expected an angle in (0, 1.5708], got {self.x0_angle}")


class SanaSprint:
    """A frozen SANA-Sprint without its text encoder, which is loaded only while prompts are encoded.

    Attributes:
        pipeline: The `SanaSprintPipeline`, whose tokenizer and text encoder are None.
        transformer: Frozen `SanaTransformer2DModel`, to attach a population to.
        vae: Frozen `AutoencoderDC`.
        scheduler: `SCMScheduler`.
        image_size: Height and width of the model's own images, in pixels.
        device: Where it lies.
        dtype: Its data type.
    """

    def __init__(
        self, pipeline: SanaSprintPipeline, *, source: Path, identity: dict[str, str], local_files_only: bool = True
    ):
        """`from_pretrained` calls this. `source` is the local folder; `identity` a hub id and its commit, or empty."""
        self.pipeline = pipeline
        self.transformer = pipeline.transformer.eval().requires_grad_(False)
        self.vae = pipeline.vae.eval().requires_grad_(False)
        self.scheduler = pipeline.scheduler
        self.image_size = self.transformer.config.sample_size * pipeline.vae_scale_factor
        self._source = source
        self._identity = identity
        self._local_files_only = local_files_only

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.dtype

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        revision: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        local_files_only: bool = False,
    ) -> "SanaSprint":
        """Loads a pipeline folder or a hub id; safetensors only, no remote code.

        Args:
            model: A folder that `SanaSprintPipeline.save_pretrained` wrote, or a hub id.
            revision: Branch, tag or commit of a hub id.
            device: Where the transformer and the VAE go.
            dtype: Of the transformer and the VAE.
            local_files_only: Take a hub id from the local cache alone.

        Raises:
            ConfigError: There is no such model, or it is not a SANA-Sprint pipeline that can be read.
        """
        source, identity = locate(str(model), revision, local_files_only)
        pipeline = load(source, dtype, text_encoder=None, tokenizer=None)
        return cls(pipeline.to(device), source=source, identity=identity, local_files_only=local_files_only)

    def identity(self) -> str:
        """What was loaded, for the record of a run: a hub id and its commit, or a fingerprint of a folder's weights."""
        if "commit" in self._identity:
            return f"{self._identity['model']}@{self._identity['commit']}"
        return fingerprint(self._source, ("transformer", "vae", "scheduler"))

    def encode(
        self,
        prompts: Sequence[str],
        *,
        cache_dir: str | Path | None = None,
        max_sequence_length: int = 300,
        instruction: bool = True,
        dtype: torch.dtype | None = None,
        progress: Progress | None = None,
    ) -> TextEmbeddings:
        """Text embeddings of `prompts`, as the pipeline's own call computes them.

        The text encoder is loaded only when the cache lacks a prompt, and dropped before this returns. Prompts go
        through it one at a time, so that an embedding does not depend on which others were missing.

        Args:
            prompts: At least one.
            cache_dir: Folder of the cache. None: encode everything, write nothing.
            max_sequence_length: Tokens a prompt may have, as in the pipeline's call.
            instruction: Put the pipeline's complex human instruction before each prompt, as its call does by default.
            dtype: Of the text encoder and the embeddings. Default: the transformer's.
            progress: Called with (encoded, to encode).

        Raises:
            ConfigError: A cache file is damaged, or the model has no readable text encoder.
        """
        dtype = dtype or self.dtype
        words = _default_instruction() if instruction else None
        key = {
            **self._identity,
            "max_sequence_length": max_sequence_length,
            "complex_human_instruction": words,
            "dtype": str(dtype).removeprefix("torch."),
        }
        if "commit" not in key:
            key["fingerprint"] = fingerprint(self._source)

        def encoder(missing: list[str]) -> Iterator[torch.Tensor]:
            return self._encode(missing, words, max_sequence_length, dtype)

        return embed_prompts(prompts, encoder, key=key, cache_dir=cache_dir, progress=progress)

    @torch.no_grad()
    def render(
        self,
        texts: TextEmbeddings,
        *,
        seed: int,
        step: int,
        prompts: torch.Tensor,
        repeats: torch.Tensor,
        members: torch.Tensor | None = None,
        population=None,
        settings: RenderSettings | None = None,
        text_length: int | None = None,
    ) -> torch.Tensor:
        """Images of B rows, each a (member, prompt, repeat).

        Every denoising step is one transformer forward over all B rows. Noise is shared by the members of a (prompt,
        repeat). A row's latents do not depend on its batch mates; its image does up to the reduction order of the
        matrix products, and up to the padding if `text_length` is left to the chunk.

        Args:
            texts: Embeddings of the prompts.
            seed: The run's seed, which keys the latents.
            step: The ES step, which keys the latents and the population's noise.
            prompts: int64 [B], index into `texts` for each row.
            repeats: int64 [B], repeat for each row.
            members: int64 [B], member for each row; needs `population`.
            population: What `esengine.attach(model.transformer, ...)` returned. None: the transformer as it stands.
            settings: Defaults to `RenderSettings()`.
            text_length: Tokens to pad the text to. Default: the longest of this batch. Give
                `texts.trimmed_length(...)` of a whole step so that all its chunks agree.

        Returns:
            uint8 [B, 3, H, W] on the model's device, rounded as diffusers does for PIL.

        Raises:
            ValueError: Rows that do not match, `members` without `population` or the reverse, or a size that the
                model cannot render.
            RenderError: An image is not finite; the message names its step, member and prompt.
        """
        settings = settings or RenderSettings()

        def describe(row: int) -> str:
            member = "" if members is None else f", member {int(members[row])}"
            return f"step {step}{member}, prompt {texts.prompts[int(prompts[row])]!r}"

        x0_bchw = self.denoise(
            texts,
            seed=seed,
            step=step,
            prompts=prompts,
            repeats=repeats,
            members=members,
            population=population,
            settings=settings,
            text_length=text_length,
        )
        return self.decode(x0_bchw, chunk=settings.decode_chunk, describe=describe)

    @torch.no_grad()
    def denoise(
        self,
        texts: TextEmbeddings,
        *,
        seed: int,
        step: int,
        prompts: torch.Tensor,
        repeats: torch.Tensor,
        members: torch.Tensor | None = None,
        population=None,
        settings: RenderSettings,
        text_length: int | None = None,
    ) -> torch.Tensor:
        """The first half of `render`: x0 / sigma_data, float32 [B, C, h, w]."""
        batch = len(prompts)
        if len(repeats) != batch or (members is not None and len(members) != batch):
            raise ValueError(f"repeats, members: expected one for each of {batch} rows")
        if (members is None) != (population is None):
            raise ValueError("members, population: expected both or neither")
        shape = self._latent_shape(settings)
        sigma_data = self.scheduler.config.sigma_data
        two_steps = settings.num_steps == 2
        self.scheduler.set_timesteps(
            settings.num_steps,
            device=self.device,
            max_timesteps=settings.max_timesteps,
            intermediate_timesteps=settings.intermediate_timesteps if two_steps else None,
        )
        angles = self.scheduler.timesteps  # float32 [num_steps + 1], the last is 0

        embeds_blc, mask_bl = texts.batch(prompts, length=text_length, device=self.device)
        guidance_b = torch.full([1], settings.guidance_scale, device=self.device, dtype=torch.float32)
        guidance_b = guidance_b.expand(batch).to(embeds_blc.dtype) * self.transformer.config.guidance_embeds_scale
        embeds_blc = embeds_blc.to(self.dtype)

        def noise(draw: int) -> torch.Tensor:
            keys = {"seed": seed, "step": step, "prompts": prompts, "repeats": repeats}
            return sigma_data * latents(**keys, shape=shape, draw=draw, device=self.device)

        x_bchw = noise(0)
        with ExitStack() as inside:
            if population is not None:
                inside.enter_context(population.perturbed(step=step, members=members.to(self.device)))
                if self.fuses(population):
                    inside.enter_context(fused(self.transformer, population.perturbation))
            for i, (s, t) in enumerate(pairwise(angles)):
                with fits(batch, "transformer forward", "chunk"):
                    v_bchw = self._velocity(x_bchw, s, embeds_blc, mask_bl, guidance_b)
                if settings.x0_angle is not None:
                    s = torch.full_like(s, settings.x0_angle)
                x0_bchw = torch.cos(s) * x_bchw - torch.sin(s) * v_bchw
                if i + 1 < settings.num_steps:
                    x_bchw = torch.cos(t) * x0_bchw + torch.sin(t) * noise(i + 1)
        return x0_bchw / sigma_data

    @torch.no_grad()
    def decode(
        self, x0_bchw: torch.Tensor, *, chunk: int, describe: Callable[[int], str] = "row {}".format
    ) -> torch.Tensor:
        """The second half of `render`: uint8 [B, 3, H, W] from x0 / sigma_data, `chunk` images in one VAE call.

        Raises:
            RenderError: A decoded image is not finite; `describe` says of which row.
        """
        scaled = x0_bchw.to(self.vae.dtype) / self.vae.config.scaling_factor
        images, finite = [], []
        for z in scaled.split(chunk):
            with fits(len(z), "VAE call", "decode chunk"):
                decoded = self.vae.decode(z, return_dict=False)[0]
            finite.append(decoded.isfinite().flatten(1).all(1))
            images.append(((decoded / 2 + 0.5).clamp(0, 1).float() * 255).round().to(torch.uint8))
        if not (good := torch.cat(finite)).all():
            raise RenderError(
                f"{describe(int((~good).nonzero()[0]))}: the image is not finite; lower the noise or the rate"
            )
        return torch.cat(images)

    def fuses(self, population) -> bool:
        """Whether a population's members render through fused blocks: on Triton, where the model has the parts."""
        return population.backend == "triton" and can_fuse(self.transformer)

    def load_adapter(self, path: str | Path) -> None:
        """Loads a LoRA folder with the pipeline's own loader, in place of one loaded before.

        Args:
            path: Folder with `pytorch_lora_weights.safetensors`.

        Raises:
            ConfigError: No such file, it cannot be read, or the loader took up only some of its layers.
        """
        file = Path(path) / WEIGHT_NAME
        if not file.is_file():
            raise ConfigError(f"adapter: {file} does not exist")
        self.pipeline.unload_lora_weights()
        try:
            with safe_open(file, framework="pt") as opened:
                stored = {key for key in opened.keys() if key.endswith(".lora_A.weight")}  # noqa: SIM118
            self.pipeline.load_lora_weights(str(path), weight_name=WEIGHT_NAME, use_safetensors=True)
        except (*READ_ERRORS, RuntimeError) as error:
            raise ConfigError(f"adapter: cannot load {file}: {first_line(error)}") from error
        layers = [name for name, module in self.transformer.named_modules() if len(getattr(module, "lora_A", ()))]
        taken = stored & {f"transformer.{name}.lora_A.weight" for name in layers}
        if not stored or taken != stored:
            self.pipeline.unload_lora_weights()
            raise ConfigError(f"adapter: {file}: the pipeline took {len(taken)} of its {len(stored)} LoRA layers")
        self.transformer.requires_grad_(False)

    def adapter_enabled(self, enabled: bool) -> None:
        """Turns the adapter that `load_adapter` loaded on or off."""
        if not getattr(self.transformer, "peft_config", None):
            raise ValueError("adapter_enabled: expected an adapter loaded by load_adapter, got none")
        if enabled:
            self.pipeline.enable_lora()
        else:
            self.pipeline.disable_lora()

    def _latent_shape(self, settings: RenderSettings) -> tuple[int, int, int]:
        scale = self.pipeline.vae_scale_factor
        multiple = scale * self.transformer.config.patch_size
        sizes = settings.height or self.image_size, settings.width or self.image_size
        for name, size in zip(("height", "width"), sizes, strict=True):
            if size % multiple:
                raise ValueError(f"{name}: expected a multiple of {multiple} for this model, got {size}")
        return self.transformer.config.in_channels, sizes[0] // scale, sizes[1] // scale

    def _velocity(
        self,
        x_bchw: torch.Tensor,
        angle: torch.Tensor,
        embeds_blc: torch.Tensor,
        mask_bl: torch.Tensor,
        guidance_b: torch.Tensor,
    ) -> torch.Tensor:
        """Trigflow velocity times sigma_data, float32 [B, C, h, w], from one forward of the transformer."""
        sigma_data = self.scheduler.config.sigma_data
        angle_b = angle.expand(len(x_bchw))
        time_b = torch.sin(angle_b) / (torch.cos(angle_b) + torch.sin(angle_b))
        time = time_b.view(-1, 1, 1, 1)
        input_bchw = x_bchw / sigma_data * torch.sqrt(time**2 + (1 - time) ** 2)
        output_bchw = self.transformer(
            input_bchw.to(self.dtype),
            encoder_hidden_states=embeds_blc,
            encoder_attention_mask=mask_bl,
            guidance=guidance_b,
            timestep=time_b,
            return_dict=False,
        )[0]
        v_bchw = (1 - 2 * time) * input_bchw + (1 - 2 * time + 2 * time**2) * output_bchw
        return (v_bchw / torch.sqrt(time**2 + (1 - time) ** 2)).float() * sigma_data

    def _encode(
        self, prompts: list[str], instruction: list[str] | None, max_sequence_length: int, dtype: torch.dtype
    ) -> Iterator[torch.Tensor]:
        """Loads the text encoder, yields one trimmed [L, C] for each prompt, and drops the encoder."""
        source = self._source
        if "commit" in self._identity:
            source = download(
                self._identity["model"], self._identity["commit"], self._local_files_only, transformer=None, vae=None
            )
        pipeline = load(source, dtype, transformer=None, vae=None, scheduler=None)
        try:
            pipeline.text_encoder.eval().requires_grad_(False).to(self.device)
            for prompt in prompts:
                with torch.no_grad():
                    embeds, mask = pipeline.encode_prompt(
                        prompt,
                        device=self.device,
                        max_sequence_length=max_sequence_length,
                        complex_human_instruction=instruction,
                    )
                yield embeds[0, mask[0].bool()].cpu()
        finally:
            del pipeline
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()


def _default_instruction() -> list[str]:
    return inspect.signature(SanaSprintPipeline.__call__).parameters["complex_human_instruction"].default
