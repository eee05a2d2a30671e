"""SANA-Sprint: renders a batch of (member, prompt, repeat) rows with one transformer forward per denoising step.

The sampler is that of `SanaSprintPipeline.__call__` line for line, except that the noise is keyed (see `latents`).

Legend: x_bchw noisy latent times sigma_data, v trigflow velocity, s angle of this step, t angle of the next; B rows.

Source: Chen et al., "SANA-Sprint" (2025), the trigflow sampler; diffusers' `pipeline_sana_sprint.py`.
"""

import gc
import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import SanaSprintPipeline
from transformers import AutoTokenizer

from esengine.base.errors import ConfigError
from esengine.base.memory import oom_guard
from esengine.base.transfer import upload
from esengine.es.rows import Rows
from esengine.kernels import key_words
from esengine.models import adapters, graphs
from esengine.models.decoder import Decoder
from esengine.models.families import FAMILIES
from esengine.models.loading import download, load, load_vae, locate, reading
from esengine.models.reward_vae import RewardVae
from esengine.models.sana.checks import Describe, FiniteChecks
from esengine.models.sana.latents import latents
from esengine.models.sana.sana_block import Part, fused_parts, patched, why_not_fused
from esengine.models.settings import FIRST_ANGLE, SECOND_ANGLE, RenderSettings
from esengine.models.text_cache import Progress, TextEmbeddings, embed_prompts, fingerprint
from esengine.models.text_limits import Limits


class SanaSprint(RewardVae):
    """A frozen SANA-Sprint. Its text encoder is loaded only while prompts are encoded.

    Attributes:
        pipeline: The `SanaSprintPipeline`. Its tokenizer and text encoder are None.
        transformer: Frozen `SanaTransformer2DModel`, to attach a population to.
        vae: Frozen `AutoencoderDC`.
        decoder: The `Decoder` of the VAE, channels-last.
        scheduler: `SCMScheduler`.
        image_size: Default height and width of an image, in pixels.
        device: Device of the transformer.
        dtype: Data type of the transformer.
    """

    denoiser = "transformer"
    """The pipeline's name of the module."""
    family = FAMILIES["sana-sprint"]

    def __init__(
        self,
        pipeline: SanaSprintPipeline,
        *,
        source: Path,
        identity: dict[str, str],
        local_files_only: bool = True,
        vae_identity: str | None = None,
    ):
        """Called by `from_pretrained`. `source`: the local folder. `identity`: a hub id and its commit, or empty."""
        self.pipeline = pipeline
        self.transformer = pipeline.transformer.eval().requires_grad_(False)
        self.vae = pipeline.vae.eval().requires_grad_(False)
        self.scheduler = pipeline.scheduler
        self.image_size = self.transformer.config.sample_size * pipeline.vae_scale_factor
        self.decoder = Decoder(self.vae, channels_last=True)
        self._source = source
        self._identity = identity
        self._local_files_only = local_files_only
        self._vae_identity = vae_identity
        self._captured: tuple[tuple, graphs.Graphs | None, graphs.Addresses] | None = None
        self._built: tuple[tuple, list[Part], graphs.Addresses] | None = None
        self._checks = FiniteChecks()

    @property
    def module(self) -> torch.nn.Module:
        """The transformer, to attach a population to."""
        return self.transformer

    @property
    def targets(self) -> tuple[str, ...]:
        """Default target layers: those of the published run."""
        return self.family.targets

    @property
    def device(self) -> torch.device:
        """The device of the transformer."""
        return self.transformer.device

    @property
    def dtype(self) -> torch.dtype:
        """The data type of the transformer."""
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
        vae: str | Path | None = None,
    ) -> "SanaSprint":
        """Load a pipeline folder or a hub id. Reads only safetensors and runs no remote code.

        Args:
            model: A folder that `SanaSprintPipeline.save_pretrained` wrote, a hub id, `nano` or `tiny`.
            revision: Branch, tag or commit of a hub id.
            device: Device of the transformer and the VAE.
            dtype: Data type of the transformer and the VAE.
            local_files_only: Take a hub id from the local cache only.
            vae: An `AutoencoderDC` that replaces the pipeline's, such as DC-AE-Lite: a folder or a hub id. A hub id
                may end in @revision. Its latents must be the same; its decoder may differ.

        Raises:
            ConfigError: There is no such model, it is not a readable SANA-Sprint pipeline, a weight is missing, or the
                VAE has other latents.
            OutOfMemory: It does not fit into memory.
        """
        source, identity = locate(str(model), revision, local_files_only)
        parts, vae_identity = {}, None
        if vae is not None:
            parts["vae"], vae_identity = load_vae(str(vae), source, dtype, local_files_only)
        pipeline = load(source, dtype, device, text_encoder=None, tokenizer=None, **parts)
        pipeline.transformer.base_model_name = str(model)  # for the adapters that are saved
        return cls(
            pipeline,
            source=source,
            identity=identity,
            local_files_only=local_files_only,
            vae_identity=vae_identity,
        )

    def identity(self) -> str:
        """A text that identifies the loaded weights: a hub id and its commit, or fingerprints of a folder's files.

        For a folder, the fingerprint of its text encoder follows. The identity of a replaced VAE comes last.
        """
        if "commit" in self._identity:
            name = f"{self._identity['model']}@{self._identity['commit']}"
        else:
            name = f"{self._fingerprint} text {self._text_fingerprint}"
        return name if self._vae_identity is None else f"{name} vae {self._vae_identity}"

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self._source, ("transformer", "vae", "scheduler"))

    @cached_property
    def _text_fingerprint(self) -> str:
        return fingerprint(self._source)

    def resolve(self, settings: RenderSettings) -> RenderSettings:
        """The settings with this model's defaults for open choices: one step, guidance 4.5."""
        return self.family.resolve(settings)

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
        """Text embeddings of `prompts`, as the pipeline's call computes them.

        The text encoder is loaded only if the cache lacks a prompt, and is freed before this returns. Prompts are
        encoded one at a time, so that an embedding does not depend on the other prompts.

        Args:
            prompts: At least one.
            cache_dir: Folder of the cache. None: encode everything and write nothing.
            max_sequence_length: Maximum number of tokens of a prompt, as in the pipeline's call.
            instruction: Put the pipeline's complex human instruction before each prompt, as its call does by default.
            dtype: Data type of the text encoder and the embeddings. Default: the transformer's.
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
            key["fingerprint"] = self._text_fingerprint

        def encoder(missing: list[str]) -> Iterator[torch.Tensor]:
            return self._encode(missing, words, max_sequence_length, dtype)

        fits = dict(channels=self.transformer.config.caption_channels, dtype=dtype)
        texts = embed_prompts(prompts, encoder, key=key, cache_dir=cache_dir, progress=progress, **fits)
        return TextEmbeddings(prompts, list(texts), self._limits(prompts, words, max_sequence_length))

    def _limits(self, prompts: Sequence[str], instruction: list[str] | None, most: int) -> list[Limits]:
        """The prompts that the pipeline's tokenizer cuts. It is loaded only if a prompt has enough bytes for that."""
        long = [prompt for prompt in dict.fromkeys(prompts) if _most_tokens(prompt) > most]
        if not long:
            return [()] * len(prompts)
        source = self._source
        if "commit" in self._identity:
            without = dict.fromkeys(("transformer", "vae", "text_encoder"))
            source = download(self._identity["model"], self._identity["commit"], self._local_files_only, **without)
        tokenizer = AutoTokenizer.from_pretrained(source / "tokenizer", local_files_only=True)
        before = "\n".join(instruction or ())
        kept = most + (len(tokenizer.encode(before)) - 2 if instruction else 0)  # as the pipeline has it
        cut = {p for p in long if len(tokenizer.encode(before + _preprocessed(p), verbose=False)) > kept}
        return [(("tokenizer", most),) if prompt in cut else () for prompt in prompts]

    @torch.no_grad()
    def render(
        self,
        texts: TextEmbeddings,
        *,
        seed: int,
        step: int,
        rows: Rows | None = None,
        population=None,
        settings: RenderSettings | None = None,
        text_length: int | None = None,
        **columns: torch.Tensor | None,
    ) -> torch.Tensor:
        """Render the images of B rows, each a (member, prompt, repeat).

        Every denoising step is one transformer forward over all B rows. All members share the noise of a (prompt,
        repeat). A row's latents do not depend on the other rows. Its image depends on them only through the reduction
        order of the matrix products and, without `text_length`, through the padding.

        Args:
            texts: Embeddings of the prompts.
            seed: The run's seed, which keys the latents.
            step: The ES step, which keys the latents and the population's noise.
            rows: B rows, on the CPU. Their members need `population`.
            population: The result of `esengine.attach(model.transformer, ...)`. None: the unperturbed transformer.
            settings: Default: `RenderSettings()`.
            text_length: Number of tokens to pad the text to. Default: the longest prompt of this batch. Pass
                `texts.trimmed_length(...)` of a whole step so that all its chunks are padded equally.
            columns: `prompts`, `repeats` and `members`, in place of `rows`.

        Returns:
            uint8 [B, 3, H, W] on the model's device, rounded as diffusers does for PIL.

        Raises:
            ValueError: The numbers of rows differ, only one of `members` and `population` is given, or the model cannot
                render this size.
            RenderError: An image is not finite; the message names its step, member and prompt. Inside
                `deferred_checks`, only its end raises this.
        """
        settings = settings or RenderSettings()
        if rows is None:
            rows = Rows(**{"members": None, **columns})
        elif columns:
            raise TypeError(f"rows: expected no {', '.join(columns)} beside it")
        keys = dict(seed=seed, step=step, population=population, settings=settings, text_length=text_length)
        x0_bchw = self.denoise(texts, **rows._asdict(), **keys)
        describe = _describe(texts, step, rows.prompts, rows.members)
        return self.decode(x0_bchw, chunk=settings.decode_chunk, mode=settings.decode, describe=describe)

    @torch.no_grad()
    def render_chunks(
        self,
        texts: TextEmbeddings,
        chunks: Iterable[Rows],
        *,
        seed: int,
        step: int,
        population=None,
        settings: RenderSettings | None = None,
        text_length: int | None = None,
    ) -> Iterator[torch.Tensor]:
        """Render several chunks of a step one after the other. The arguments are those of `render`.

        With `settings.overlap` on a GPU, a chunk is decoded on a second stream while the next chunk is denoised on the
        caller's stream. The images are the same, and they are ready for use on the caller's stream.

        Yields:
            uint8 [B, 3, H, W] of each chunk.
        """
        settings = settings or RenderSettings()
        keys = dict(seed=seed, step=step, population=population, settings=settings, text_length=text_length)
        if not settings.overlap or not graphs.supported(self.device):
            for rows in chunks:
                yield self.render(texts, **rows._asdict(), **keys)
            return
        main, side, waiting = torch.cuda.current_stream(self.device), self._side, None

        def ready(images: torch.Tensor, good: torch.Tensor, describe, decoded: torch.cuda.Event) -> torch.Tensor:
            main.wait_event(decoded)
            for tensor in (images, good):  # they are freed on this stream, but were allocated on the other
                tensor.record_stream(main)
            self._checks(good, describe)
            return images

        try:
            for rows in chunks:
                x0_bchw = self.denoise(texts, **rows._asdict(), **keys)
                side.wait_stream(main)
                with torch.cuda.stream(side):
                    images, good = self._decoder(x0_bchw, chunk=settings.decode_chunk, mode=settings.decode)
                    decoded = side.record_event()
                x0_bchw.record_stream(side)
                if waiting is not None:
                    yield ready(*waiting)
                waiting = images, good, _describe(texts, step, rows.prompts, rows.members), decoded
            if waiting is not None:
                yield ready(*waiting)
        finally:
            main.wait_stream(side)  # if the caller stops early, a decode may still run

    @property
    def _decoder(self) -> Decoder:
        return self._reward_decoder if self._for_reward else self.decoder

    @cached_property
    def _reward_decoder(self) -> Decoder:
        return Decoder(self.reward_vae, channels_last=True)

    @cached_property
    def _side(self) -> torch.cuda.Stream:
        return graphs.side_stream(self.device)

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
        settings = self.resolve(settings)
        if len(repeats) != batch or (members is not None and len(members) != batch):
            raise ValueError(f"repeats, members: expected one for each of {batch} rows")
        if (members is None) != (population is None):
            raise ValueError("members, population: expected both or neither")
        shape = self._latent_shape(settings)
        sigma_data = self.scheduler.config.sigma_data
        angles = self._angles(settings)  # float32 [num_steps + 1], the last is 0
        replayed = self._graphs(population, settings)
        if replayed is not None:
            length = texts.trimmed_length(prompts) if text_length is None else text_length
            text_length = -(-length // graphs.TEXT_MULTIPLE) * graphs.TEXT_MULTIPLE

        embeds_blc, mask_bl = texts.batch(prompts, length=text_length, device=self.device)
        guidance_b = torch.full([1], settings.guidance_scale, device=self.device, dtype=torch.float32)
        guidance_b = guidance_b.expand(batch).to(embeds_blc.dtype) * self.transformer.config.guidance_embeds_scale
        inputs = embeds_blc.to(self.dtype), mask_bl, guidance_b

        def noise(draw: int) -> torch.Tensor:
            keys = {"seed": seed, "step": step, "prompts": prompts, "repeats": repeats}
            return sigma_data * latents(**keys, shape=shape, draw=draw, device=self.device)

        x_bchw = noise(0)
        inside, velocity = nullcontext(), self._velocity
        if replayed is not None:
            velocity = replayed
            _check_keys(seed, step, members)
            inputs += (torch.full([1], step, device=self.device), upload(members, self.device))
        elif population is not None:
            inside = self.perturbed(population, step=step, members=members)
        with inside:
            for i, (s, t) in enumerate(pairwise(angles)):
                with oom_guard(f"{batch} images in one transformer forward", "give a smaller chunk"):
                    v_bchw = velocity(x_bchw, s, *inputs)
                if settings.x0_angle is not None:
                    s = torch.full_like(s, settings.x0_angle)
                x0_bchw = torch.cos(s) * x_bchw - torch.sin(s) * v_bchw
                if i + 1 < settings.num_steps:
                    x_bchw = torch.cos(t) * x0_bchw + torch.sin(t) * noise(i + 1)
        return x0_bchw / sigma_data

    @torch.no_grad()
    def decode(
        self,
        x0_bchw: torch.Tensor,
        *,
        chunk: int,
        mode: str = "eager",
        describe: Describe = "row {}".format,
    ) -> torch.Tensor:
        """The second half of `render`: uint8 [B, 3, H, W] from x0 / sigma_data, `chunk` images in one VAE call.

        Raises:
            RenderError: A decoded image is not finite; `describe` says of which row.
        """
        images, good = self._decoder(x0_bchw, chunk=chunk, mode=mode)
        self._checks(good, describe)
        return images

    @contextmanager
    def deferred_checks(self) -> Iterator[None]:
        """Delay the check for images that are not finite to the end of the block. It raises for the first of them.

        So a step of many chunks waits for the device only once. If the end raises, discard all results of the block.

        Raises:
            RenderError: At the end, naming the step, member and prompt.
        """
        with self._checks.deferred():
            yield

    @contextmanager
    def perturbed(self, population, *, step: int, members: torch.Tensor) -> Iterator[None]:
        """`population.perturbed`, with the transformer's fused form if it has one."""
        with population.perturbed(step=step, members=members):
            keys = population.perturbation if population.backend == "triton" else None
            with patched(self._parts(population), keys):
                yield

    def plan(self, population, settings: RenderSettings) -> str:
        """A text that says how a population is rendered on this device, for the log of a run."""
        forward = "fused blocks" if self.fuses(population) else "diffusers' blocks"
        if population.backend == "triton" and (reason := why_not_fused(self.transformer, True)):
            forward += f" ({reason})"
        captured = "CUDA graphs" if self._graphs(population, settings) is not None else "no CUDA graphs"
        overlapped = ", overlapped" if settings.overlap and self.device.type == "cuda" else ""
        return f"{forward}, {captured}, decode {settings.decode}{overlapped}"

    def image_bytes(self, settings: RenderSettings) -> int:
        """Estimated bytes for one more image in a forward: 16 of the widest tensors, those of a block's MLP."""
        config = self.transformer.config
        patch = self.image_size // config.sample_size * config.patch_size  # in pixels
        tokens = (settings.height or self.image_size) * (settings.width or self.image_size) // patch**2
        width = int(config.num_attention_heads * config.attention_head_dim * config.mlp_ratio)
        return tokens * width * self.dtype.itemsize * 16

    def release_graphs(self) -> None:
        """Free the memory of captured forwards. Later forwards are captured again."""
        self._captured = None

    def _graphs(self, population, settings: RenderSettings) -> graphs.Graphs | None:
        """The graphs of the transformer's forward for the population's present state; None if no graphs are used."""
        if self._captured is not None and not self._captured[0][0].layers:
            self._captured = self._built = None  # its population is detached
        if population is None or settings.graphs == "never":
            return None
        found = None
        if graphs.supported(self.device):
            state = population, population.noise, _switches(population), population.backend
            if self._captured is None or self._captured[0] != state or not self._captured[2].unchanged():
                found = graphs.Graphs(self._session(population)) if self.fuses(population) else None
                # record the addresses now: stacking q, k and v may have moved weights
                self._captured = state, found, graphs.Addresses(self.transformer)
            found = self._captured[1]
        if found is None and settings.graphs == "always":
            raise ConfigError(f"graphs: always needs fused blocks on a CUDA device, the model is on {self.device}")
        return found

    def _session(self, population) -> graphs.Session:
        @contextmanager
        def session(x_bchw, angle, embeds_blc, mask_bl, guidance_b, step, members_b):
            with self.perturbed(population, step=step, members=members_b):
                yield lambda: self._velocity(x_bchw, angle, embeds_blc, mask_bl, guidance_b)

        return session

    def fuses(self, population) -> bool:
        """Whether a population is rendered with fused blocks. It needs Triton, and a transformer that can be fused."""
        return population.backend == "triton" and why_not_fused(self.transformer, True) is None

    def _parts(self, population) -> list[Part]:
        """The fused parts. They are built once, and again after tensors were moved or adapters were switched."""
        if population.backend != "triton":
            return fused_parts(self.transformer, False)
        if why_not_fused(self.transformer, True) is not None:
            return []
        state = population, _switches(population)
        if self._built is None or self._built[0] != state or not self._built[2].unchanged():
            parts = fused_parts(self.transformer, True)
            self._built = state, parts, graphs.Addresses(self.transformer)  # after stacking, which moves weights
        return self._built[1]

    def load_adapter(self, path: str | Path) -> None:
        """Load a LoRA folder with the pipeline's loader. It replaces an adapter loaded before.

        Args:
            path: Folder with `pytorch_lora_weights.safetensors`.

        Raises:
            ConfigError: The file is missing, unreadable or incomplete, or the loader loaded only some of its layers.
        """
        adapters.load_adapter(self.pipeline, self.denoiser, path)

    def unload_adapter(self) -> None:
        """Remove the loaded adapter, which leaves the base model."""
        adapters.unload_adapter(self.pipeline, self.denoiser)

    def adapter_enabled(self, enabled: bool) -> None:
        """Switch the adapter that `load_adapter` loaded on or off.

        Raises:
            ValueError: No adapter is loaded.
        """
        adapters.enable_adapter(self.pipeline, self.denoiser, enabled)

    def _angles(self, settings: RenderSettings) -> torch.Tensor:
        """Angles float32 [num_steps + 1] on the device, computed on the CPU as the scheduler does."""
        self.scheduler.set_timesteps(
            settings.num_steps,
            max_timesteps=FIRST_ANGLE,
            intermediate_timesteps=SECOND_ANGLE if settings.num_steps == 2 else None,
        )
        return upload(self.scheduler.timesteps, self.device)

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
        """Load the text encoder, yield one trimmed [L, C] for each prompt, and free the encoder."""
        source = self._source
        if "commit" in self._identity:
            source = download(
                self._identity["model"], self._identity["commit"], self._local_files_only, transformer=None, vae=None
            )
        pipeline = load(source, dtype, self.device, transformer=None, vae=None, scheduler=None)
        try:
            pipeline.text_encoder.eval().requires_grad_(False)
            for prompt in prompts:
                with torch.no_grad(), reading(f"model: cannot encode {prompt!r:.60}", "a prompt's tokens"):
                    embeds, mask = pipeline.encode_prompt(
                        prompt,
                        device=self.device,
                        max_sequence_length=max_sequence_length,
                        complex_human_instruction=instruction,
                    )
                    embedding = embeds[0, mask[0].bool()].cpu()
                yield embedding
        finally:
            del pipeline
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()


def _preprocessed(prompt: str) -> str:
    """A prompt as the pipeline tokenizes it."""
    return prompt.lower().strip()


def _most_tokens(prompt: str) -> int:
    """At least the number of a prompt's tokens: a token is a byte or more, and a space may be three of them."""
    return len(_preprocessed(prompt).replace(" ", "\u2581").encode()) + 4  # special tokens, and the instruction's end


def _default_instruction() -> list[str]:
    return inspect.signature(SanaSprintPipeline.__call__).parameters["complex_human_instruction"].default


def _switches(population) -> tuple:
    """The state of a population's layers that affects how they are stacked, besides the addresses of their tensors."""
    return tuple((layer.disable_adapters, layer.scale) for layer in population.layers.values())


def _describe(texts: TextEmbeddings, step: int, prompts: torch.Tensor, members: torch.Tensor | None) -> Describe:
    """A function that names the image of a row of a chunk."""

    def describe(row: int) -> str:
        member = "" if members is None else f", member {int(members[row])}"
        return f"step {step}{member}, prompt {texts.prompts[int(prompts[row])]!r}"

    return describe


def _check_keys(seed: int, step: int, members: torch.Tensor) -> None:
    """The checks of `Population.perturbed`, for a graph replay, which does not call it."""
    key_words(seed, step)
    if members.dtype != torch.int64 or members.dim() != 1:
        raise ValueError(f"members: expected int64 [B], got {str(members.dtype)[6:]} {list(members.shape)}")
    if len(members) and (members.min() < 0 or members.max() >= 1 << 33):
        raise ValueError("members: expected values in [0, 2^33)")
