"""Any diffusers pipeline as a generator: a batch of (member, prompt, repeat) rows is one call of the pipeline itself.

The call runs inside `Population.perturbed`. Its text comes from `encode`, its noise from one generator for each row,
and its VAE decodes in chunks. Everything else is the pipeline's own: schedule, sampler, guidance, scale of the latents.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from esengine.base.errors import ConfigError
from esengine.base.memory import oom_guard
from esengine.es.population import Population
from esengine.es.rows import Rows
from esengine.models import adapters
from esengine.models.conditioning import Conditioning
from esengine.models.encoding import PromptEncoder, Source, options_of
from esengine.models.families import FAMILIES, Family
from esengine.models.loading import family_at, load_pipeline, locate
from esengine.models.reward_vae import RewardVae, channels_last
from esengine.models.sana.checks import Describe, FiniteChecks
from esengine.models.settings import RenderSettings
from esengine.models.text_cache import Progress, fingerprint


class DiffusersPipeline(RewardVae):
    """A frozen diffusers pipeline that renders by its own call.

    Its text encoders are in memory only while prompts are encoded. They are dropped before the first image.

    Attributes:
        pipeline: the pipeline. From the first image on, its tokenizers and text encoders are None.
        family: how it is called.
        module: the frozen denoiser, to attach a population to.
        denoiser: the pipeline's name of the module.
        targets: default target layers.
        image_size: default height and width of an image, in pixels.
        device: device of the denoiser.
        dtype: data type of the denoiser.
    """

    def __init__(self, pipe: DiffusionPipeline, family: Family | str, *, source: Source | None = None):
        """Freeze a pipeline.

        Args:
            pipe: a pipeline whose parts are on their device. Its text encoders may be None if `source` is given.
            family: a row, or the name of one of `families.FAMILIES`. For a pipeline that is not listed, give a row:
                `Family(name=..., pipeline=type(pipe).__name__, texts=(...), ...)`.
            source: where it was loaded from. None: prompts are encoded by the pipeline's own text encoders.

        Raises:
            ConfigError: there is no such family, or the pipeline is not of it.
        """
        if isinstance(family, str):
            if family not in FAMILIES:
                raise ConfigError(f"family: expected a Family or one of {', '.join(FAMILIES)}, got {family!r:.100}")
            family = FAMILIES[family]
        if type(pipe).__name__ != family.pipeline:
            raise ConfigError(f"family: expected a row for {type(pipe).__name__}, got one for {family.pipeline}")
        for name in (family.denoiser, "vae"):
            if not isinstance(part := getattr(pipe, name, None), torch.nn.Module):
                what = f"expected a module at {name} of {family.pipeline}, got {type(part).__name__}"
                raise ConfigError(f"family: {what}")
        self.pipeline, self.family, self._source = pipe, family, source
        self._module = getattr(pipe, family.denoiser)
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval().requires_grad_(False)
        channels_last(pipe.vae)
        pipe.set_progress_bar_config(disable=True)
        self._text = PromptEncoder(pipe, family, source)
        self._checks = FiniteChecks()

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        revision: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        local_files_only: bool = False,
    ) -> "DiffusersPipeline":
        """Load a pipeline folder, a hub id or `tiny:FAMILY`. Reads only safetensors and runs no remote code.

        Args:
            model: a folder that the pipeline's `save_pretrained` wrote, a hub id, or `tiny:FAMILY`.
            revision: branch, tag or commit of a hub id.
            device: device of the denoiser and the VAE.
            dtype: data type of the denoiser and the VAE.
            local_files_only: take a hub id from the local cache only.

        Raises:
            ConfigError: there is no such model, it is of no family, or it cannot be read.
            OutOfMemory: it does not fit into memory.
        """
        folder, identity = locate(str(model), revision, local_files_only)
        family = family_at(folder, str(model))
        pipe = load_pipeline(folder, dtype, device, family, **dict.fromkeys(family.encoders))
        getattr(pipe, family.denoiser).base_model_name = str(model)  # for the adapters that are saved
        return cls(pipe, family, source=Source(folder, identity, local_files_only))

    @property
    def module(self) -> torch.nn.Module:
        """The denoiser, to attach a population to."""
        return self._module

    @property
    def denoiser(self) -> str:
        """The pipeline's name of the module, `transformer` or `unet`."""
        return self.family.denoiser

    @property
    def targets(self) -> tuple[str, ...]:
        """Default target layers, by the end of their names: those of the family."""
        return self.family.targets

    @property
    def device(self) -> torch.device:
        """The device of the denoiser."""
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The data type of the denoiser."""
        return self.module.dtype

    @property
    def image_size(self) -> int:
        """Default height and width of an image, in pixels."""
        size = getattr(self.module.config, "sample_size", None)
        return size * self.pipeline.vae_scale_factor if isinstance(size, int) else self.family.size

    def identity(self) -> str:
        """A text that identifies the loaded weights: a hub id and its commit, or fingerprints of a folder's files.

        Without a folder it is a hash of the tensors of the denoiser and the VAE.
        """
        if self._source is None:
            return self._tensors_sha256
        if "commit" in self._source.identity:
            return f"{self._source.identity['model']}@{self._source.identity['commit']}"
        options = json.dumps(options_of(self.pipeline), sort_keys=True)
        return f"{self._fingerprint} text {self._text.fingerprint} options {options}"

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self._source.folder, (self.denoiser, "vae", "scheduler"))

    @cached_property
    def _tensors_sha256(self) -> str:
        total = hashlib.sha256(self.family.pipeline.encode())
        for part in (self.module, self.pipeline.vae):
            state = {name.replace(".base_layer.", "."): tensor for name, tensor in part.state_dict().items()}
            for name, tensor in sorted(state.items()):
                if ".lora_" not in name:
                    total.update(f"{name} {tensor.dtype} {[*tensor.shape]}\n".encode())
                    total.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return f"sha256:{total.hexdigest()}"

    def resolve(self, settings: RenderSettings) -> RenderSettings:
        """The settings with the family's defaults in place of None.

        Raises:
            ConfigError: a setting does not apply to this pipeline. The message begins with its name.
        """
        settings = self.family.resolve(settings, own_call=True)
        if settings.guidance_scale is None:
            embedded = self.module.config.get("time_cond_proj_dim")
            settings = dataclasses.replace(settings, guidance_scale=self.family.guidance if embedded else 0.0)
        if not self._takes_guidance and settings.guidance_scale != self.family.guidance:
            what = f"{settings.guidance_scale} does not apply to this {self.family.pipeline}, which takes no guidance"
            raise ConfigError(f"guidance_scale: {what}; leave it out")
        return settings

    @property
    def _takes_guidance(self) -> bool:
        """Whether the guidance scale has an effect in this pipeline."""
        config = self.module.config
        embedded = config.get("guidance_embeds") or config.get("time_cond_proj_dim")
        return bool(embedded) or (self.family.guided_above is not None and not self.pipeline.config.get("is_distilled"))

    def _guided(self, settings: RenderSettings) -> bool:
        """Whether the call uses classifier-free guidance."""
        above, config = self.family.guided_above, self.module.config
        if above is None or config.get("time_cond_proj_dim") or self.pipeline.config.get("is_distilled"):
            return False
        return settings.guidance_scale > above

    def encode(
        self,
        prompts: Sequence[str],
        *,
        cache_dir: str | Path | None = None,
        instruction: bool = True,
        progress: Progress | None = None,
    ) -> Conditioning:
        """Conditioning of `prompts`, as the pipeline's call computes it. Each prompt is encoded once, by itself.

        Args:
            prompts: at least one.
            cache_dir: folder of the cache. None: nothing is read or written. A pipeline that was not loaded from a
                folder or the hub has no identity for the cache, and uses none.
            instruction: put the pipeline's instruction before each prompt, if it has one.
            progress: called with (encoded, to encode).

        Raises:
            ConfigError: a cache file is damaged, the model has no readable text encoder, or the text encoders were
                dropped and cannot be loaded again.
        """
        return self._text.encode(prompts, cache_dir=cache_dir, instruction=instruction, progress=progress)

    def render(
        self,
        texts: Conditioning,
        *,
        seed: int,
        step: int,
        rows: Rows,
        population: Population | None = None,
        settings: RenderSettings | None = None,
        text_length: int | None = None,
    ) -> torch.Tensor:
        """Render the images of B rows in one call of the pipeline.

        A row's noise depends only on (seed, step, prompt, repeat), so all members of a population share it. Its image
        depends on the other rows only through the reduction order of the matrix products.

        Args:
            texts: conditioning of the prompts, from `encode`.
            seed: the run's seed.
            step: the ES step.
            rows: B rows, on the CPU. Their members need `population`.
            population: the result of `esengine.attach(model.module, ...)`. None: the unperturbed denoiser.
            settings: default: the family's.
            text_length: number of tokens to pad masked text to. Default: the longest prompt of this batch.

        Returns:
            uint8 [B, 3, H, W] on the model's device, rounded as diffusers does for PIL.

        Raises:
            ValueError: the numbers of rows differ, only one of members and population is given, or the pipeline
                cannot render this size.
            ConfigError: a setting does not apply to this pipeline.
            RenderError: an image is not finite; the message names its step, member and prompt. Inside
                `deferred_checks`, only its end raises this.
            OutOfMemory: the rows do not fit into memory.
        """
        keys = dict(seed=seed, step=step, rows=rows, population=population, text_length=text_length)
        images, good = self._drawn(texts, **keys, settings=settings)
        self._checks(good, _describe(texts, step, rows))
        return (images * 255).round().to(torch.uint8)

    def draw(
        self,
        texts: Conditioning,
        *,
        seed: int,
        step: int,
        rows: Rows,
        population: Population | None = None,
        settings: RenderSettings | None = None,
        text_length: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The images before rounding, float32 [B, 3, H, W] in [0, 1], and bool [B]: which are finite. See `render`."""
        keys = dict(seed=seed, step=step, rows=rows, population=population, settings=settings, text_length=text_length)
        images, good = self._drawn(texts, **keys)
        return images.clone(), good  # out of inference mode

    def _drawn(
        self,
        texts: Conditioning,
        *,
        seed: int,
        step: int,
        rows: Rows,
        population: Population | None,
        settings: RenderSettings | None,
        text_length: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `draw`. The images are of torch's inference mode, which saves bookkeeping on a CPU."""
        batch = rows.count
        if len(rows.repeats) != batch or (rows.members is not None and len(rows.members) != batch):
            raise ValueError(f"repeats, members: expected one for each of {batch} rows")
        if (rows.members is None) != (population is None):
            raise ValueError("members, population: expected both or neither")
        settings = self.resolve(settings or RenderSettings())
        guided = self._guided(settings)
        self._text.drop()
        words = dict(length=text_length, guided=guided, device=self.device, dtype=self.dtype)
        given = dict(self.family.call) | dict(self.family.call_at.get(settings.num_steps, {}))
        given |= {self.family.guidance_argument: settings.guidance_scale, **texts.batch(rows.prompts, **words)}
        inside = contextlib.nullcontext()
        if population is not None:
            inside = population.perturbed(step=step, members=rows.members, copies=self.family.copies if guided else 1)
        with (
            inside,
            _decoding(self.pipeline, self._vae, settings.decode_chunk) as good,
            oom_guard(f"{batch} images in one transformer forward", "give a smaller chunk"),
            torch.inference_mode(),
        ):
            images = self.pipeline(
                **given,
                height=settings.height or self.image_size,
                width=settings.width or self.image_size,
                num_inference_steps=settings.num_steps,
                generator=row_generators(seed, step, rows),
                output_type="pt",
            ).images
        return images.float(), torch.cat(good)

    @property
    def _vae(self) -> torch.nn.Module:
        return self.reward_vae if self._for_reward else self.pipeline.vae

    def render_chunks(
        self,
        texts: Conditioning,
        chunks: Iterable[Rows],
        *,
        seed: int,
        step: int,
        population: Population | None = None,
        settings: RenderSettings | None = None,
        text_length: int | None = None,
    ) -> Iterator[torch.Tensor]:
        """Render several chunks of a step one after the other. Yields uint8 [B, 3, H, W] for each. See `render`."""
        keys = dict(seed=seed, step=step, population=population, settings=settings, text_length=text_length)
        for rows in chunks:
            yield self.render(texts, rows=rows, **keys)

    @contextlib.contextmanager
    def deferred_checks(self) -> Iterator[None]:
        """Delay the check for images that are not finite to the end of the block, which raises for the first."""
        with self._checks.deferred():
            yield

    def plan(self, population: Population, settings: RenderSettings) -> str:
        """A text that says how a population is rendered on this device, for the log of a run."""
        settings = self.resolve(settings)
        copies = self.family.copies if self._guided(settings) else 1
        twice = f" with {copies} rows an image" if copies > 1 else ""
        sampled = f"{settings.num_steps} steps, guidance {settings.guidance_scale:g}{twice}"
        return f"{self.family.pipeline}'s own call, {sampled}"

    def image_bytes(self, settings: RenderSettings) -> int:
        """Estimated bytes for one more image in a forward: 16 of the widest tensors, those of a block's MLP."""
        sizes = settings.height or self.image_size, settings.width or self.image_size
        patch = self.pipeline.vae_scale_factor * 2
        linears = [m.out_features for m in self.module.modules() if isinstance(m, torch.nn.Linear)]
        tokens = max(1, sizes[0] // patch) * max(1, sizes[1] // patch)
        copies = self.family.copies if self._guided(self.resolve(settings)) else 1
        return copies * tokens * max(linears, default=1) * self.dtype.itemsize * 16

    def release_graphs(self) -> None:
        """Nothing is kept between forwards."""

    def load_adapter(self, path: str | Path) -> None:
        """Load a LoRA folder by the pipeline's loader. It replaces an adapter loaded before.

        Raises:
            ConfigError: the file is missing, unreadable or incomplete, or the loader loaded only some of its layers.
        """
        adapters.load_adapter(self.pipeline, self.denoiser, path)

    def unload_adapter(self) -> None:
        """Remove the loaded adapter, which leaves the base model."""
        adapters.unload_adapter(self.pipeline, self.denoiser)

    def adapter_enabled(self, enabled: bool) -> None:
        """Switch the loaded adapter on or off. Raises ValueError if none is loaded."""
        adapters.enable_adapter(self.pipeline, self.denoiser, enabled)


def row_generators(seed: int, step: int, rows: Rows) -> list[torch.Generator]:
    """One generator for each row, keyed by (seed, step, prompt, repeat).

    They are of the CPU, so that the numbers do not depend on the device. A sampler that draws noise at every step draws
    it from them too.
    """
    found = []
    for prompt, repeat in zip(rows.prompts.tolist(), rows.repeats.tolist(), strict=True):
        digest = hashlib.sha256(f"esengine row 1 {seed} {step} {prompt} {repeat}".encode()).digest()
        found.append(torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1))
    return found


@contextlib.contextmanager
def _decoding(pipe: DiffusionPipeline, vae: torch.nn.Module, chunk: int) -> Iterator[list[torch.Tensor]]:
    """Inside, the pipeline decodes by this VAE, `chunk` images at a time, channels-last.

    The list gets bool [b]: which images are finite.
    """
    own, decode, before, good = pipe.vae, vae.decode, vars(vae).get("decode"), []

    def chunked(z: torch.Tensor, *args, **kwargs):
        samples, result = [], None
        for part in z.split(chunk):
            if part.dim() == 4:
                part = part.contiguous(memory_format=torch.channels_last)
            with oom_guard(f"{len(part)} images in one VAE call", "give a smaller decode chunk"):
                result = decode(part, *args, **kwargs)
            samples.append(result[0])
            good.append(result[0].flatten(1).isfinite().all(1))
        sample = torch.cat(samples)
        return (sample,) if isinstance(result, tuple) else type(result)(sample=sample)

    vae.decode = chunked
    vars(pipe)["vae"] = vae  # past `__setattr__`, which would write it into the pipeline's configuration
    try:
        yield good
    finally:
        vars(pipe)["vae"] = own
        del vae.decode
        if before is not None:
            vae.decode = before


def _describe(texts: Conditioning, step: int, rows: Rows) -> Describe:
    """A function that names the image of a row of a chunk."""

    def describe(row: int) -> str:
        member = "" if rows.members is None else f", member {int(rows.members[row])}"
        return f"step {step}{member}, prompt {texts.prompts[int(rows.prompts[row])]!r}"

    return describe
