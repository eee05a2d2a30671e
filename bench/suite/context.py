"""What the parts of the suite share: sizes, stand-in models, and the reference in higher precision."""

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from peers import linears
from peers.reference_loop import ALPHA, RANK, SIGMA, TARGETS, X0_ANGLE
from peft import LoraConfig

import esengine
from esengine.base.errors import RenderError
from esengine.es.population import PEFT_PREFIX
from esengine.es.prompts import PromptSampler
from esengine.models import RenderSettings, Rows, SanaSprint, graphs
from suite import pickscore, roofline, standin
from suite.checks import CheckFailed, Checks, bounded, full_precision, worst_error
from suite.summary import PIXELS

STEP = 3
FLOOR = {torch.bfloat16: 0.0, torch.float16: 0.0, torch.float32: 1e-5}
"""Least tolerance: fp32 against fp64 leaves so little error that the order of a sum is most of it."""


OVERLAP_MARGIN = 0.01


PART_SECONDS = {
    "linear": 60,
    "update": 10,
    "forward_small": 50,
    "step_small": 25,
    "memory": 25,
    "forward_large": 55,
    "step_large": 60,
    "decode_small": 25,
    "overlap": 20,
    "reference_loop": 75,
    "decode_large": 40,
    "kernels": 60,
}
"""What each part is assumed to take with empty caches, in seconds, in the order in which parts are measured.

Nobody has measured one on a GPU. The first record has `wall_seconds` to put in their place. A forward has the making of
the models, the capture of a graph and two compilations of a block in it; a whole model takes 100 to 200 s to compile.
"""

COLD = ("linear", "update", "forward_small", "step_small", "memory", "forward_large", "step_large")
"""The parts that a first run on a new machine is for, in the order of what they are worth."""

COLD_SECONDS = 300
"""What they may be assumed to take together."""


@dataclass(frozen=True)
class Scale:
    """Sizes of a run of the suite.

    Attributes:
        name: `full` or `tiny`, of the stand-in.
        pixels: sides of the images, the smaller first.
        shapes: (in, out) of the linears that `linear_vs_gemm` is the worst of.
        tokens: rows a member of those.
        other_linears: (in, out, rows a member) of the rest of the model's.
        members: of a linear's and of a forward's batch, one row or image each.
        population, prompts, repeats: of the timed step.
        chunk: images in one forward.
        decode_chunk: images in one call of the decoder.
        text_tokens: of a prompt.
        rounds: samples of a microbenchmark, of a forward and of a step.
        update_members: N of the timed update.
        memory_members: N of the peaks.
        reference_population: N of the reference run.
        reference_text: tokens that it pads to.
        compile_seconds: what a torch.compile is taken to need: with less of the budget left none is begun.
        part_seconds: what each part is assumed to take, see `PART_SECONDS`: with less left it is skipped.
        bars: whether the bars of the issue are meant for it.
    """

    name: str = "full"
    pixels: tuple[int, int] = PIXELS
    shapes: tuple[tuple[int, int], ...] = ((2240, 2240), (2240, 6720), (2304, 2240))
    tokens: tuple[int, ...] = (256, 1024)
    other_linears: tuple[tuple[int, int, int], ...] = (
        *((2240, 32, 256), (2240, 32, 1024)),  # proj_out
        *((256, 2240, 1), (2240, 2240, 1), (2240, 13440, 1)),  # embeddings of time and guidance
    )
    members: int = 64
    population: int = 64
    prompts: int = 4
    repeats: int = 1
    chunk: int = 64
    decode_chunk: int = 8
    text_tokens: int = 40
    rounds: tuple[int, int, int] = (24, 12, 4)
    update_members: int = 1024
    memory_members: tuple[int, ...] = (64, 1024, 16384, 65536)
    reference_population: int = 128
    reference_text: int = 300
    compile_seconds: float = 60
    part_seconds: Mapping[str, float] = field(default_factory=lambda: PART_SECONDS)
    bars: bool = True


SCALES = {
    "full": Scale(),
    "tiny": Scale(
        name="tiny",
        pixels=(32, 64),
        shapes=((64, 64), (64, 192), (48, 64)),
        tokens=(16,),
        other_linears=((64, 8, 16), (64, 384, 1)),
        members=8,
        population=4,
        prompts=2,
        chunk=8,
        text_tokens=8,
        rounds=(3, 2, 2),
        update_members=32,
        memory_members=(8, 128, 256),
        reference_population=8,
        reference_text=12,
        compile_seconds=1,
        part_seconds={},
        bars=False,
    ),
}


class Context:
    """Models and settings of one run. Expensive objects are made when a part first needs them.

    Args:
        scale: sizes of the run.
        device: the device to measure.
        deadline: `time.monotonic()` after which no measurement starts.
        dtype: dtype of the models. Default: bf16 on CUDA, fp32 elsewhere.
        compile_backend: backend of torch.compile for the plain transformer.
        compile_modes: modes of torch.compile. Each is measured, and the fastest counts.
        compile_unit: `blocks` compiles each block of the plain transformer, `model` the whole transformer.
        compile_decoder: whether `decode_<pixels>` measures a compiled decoder too.
        peers: further linears, `module:function`, see `peers/linears.py`.
        decode: how a step decodes, a mode of `RenderSettings.decode`. auto: the fastest mode that `decode_<pixels>` of
            this run measured; eager before that.
        smoke: ceilings from a record of `device_smoke.py` on this device. They override the table's.
        overlap: whether a step decodes one chunk while the next is denoised. auto: if the part `overlap` measured it
            faster by `OVERLAP_MARGIN`.

    Attributes:
        decode_modes: the fastest mode, by pixels.
        overlap_pays: the result of the part `overlap`. None before it.
        graphs_failed: why graphs are no longer used. None if none failed.
        checks: the checks of the part that is being measured.
    """

    def __init__(
        self,
        scale: Scale,
        device: torch.device,
        *,
        deadline: float,
        dtype: torch.dtype | None = None,
        compile_backend: str = "inductor",
        compile_modes: tuple[str, ...] = ("default",),
        compile_unit: str = "blocks",
        compile_decoder: bool = False,
        peers: tuple[str, ...] = (),
        decode: str = "auto",
        overlap: str = "auto",
        smoke: Mapping[str, float] | None = None,
    ):
        self.scale, self.device, self.deadline = scale, device, deadline
        self.dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        self.exact_dtype = torch.float64 if self.dtype == torch.float32 else torch.float32
        self.compile_backend, self.compile_modes = compile_backend, compile_modes
        self.compile_unit, self.compile_decoder = compile_unit, compile_decoder
        self.checks = Checks()
        self.peers = {**linears.KNOWN, **{spec: linears.by_path(spec) for spec in peers}}
        self.decode, self.overlap, self.smoke = decode, overlap, smoke
        self.decode_modes: dict[int, str] = {}
        self.overlap_pays: bool | None = None
        self.graphs_failed: str | None = None
        self.compiled: dict[int, SanaSprint] = {}
        self._checked: dict[int, dict[str, float] | CheckFailed] = {}

    @cached_property
    def plain(self) -> SanaSprint:
        """The stand-in model without an adapter."""
        model = standin.sana_sprint(self.scale.name, device=self.device, dtype=self.dtype)
        model.decoder.compile_backend = self.compile_backend
        return model

    @cached_property
    def model(self) -> SanaSprint:
        """The same weights in a second transformer, for a population. The decoder is shared."""
        return self.copy_of_plain()

    @cached_property
    def population(self) -> esengine.Population:
        """A population with the settings of the reference run, and with B not zero."""
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS))
        noise = esengine.Noise(sigma=SIGMA, rank=1, seed=0)
        population = esengine.attach(self.model.transformer, config, noise)
        population.update(step=0, fitness=torch.linspace(-1, 1, 64, device=self.device))
        return population

    @cached_property
    def texts(self) -> esengine.models.TextEmbeddings:
        return standin.text_embeddings(self.scale.name, tokens=self.scale.text_tokens, dtype=self.dtype)

    @cached_property
    def scorer(self) -> pickscore.Scorer:
        clip = standin.clip(self.scale.name, device=self.device, dtype=self.dtype)
        return pickscore.Scorer(clip, self.texts.prompts, chunk=self.scale.chunk)

    @cached_property
    def limits(self) -> roofline.Chosen:
        """The device's ceilings and their source. Those of `smoke` override those by name."""
        if self.device.type != "cuda":
            return roofline.Chosen(roofline.ceilings(self.device), "this process's own product and copy")
        return roofline.choose(torch.cuda.get_device_name(self.device), self.smoke)

    @property
    def ceilings(self) -> roofline.Ceilings | None:
        return self.limits.ceilings

    def copy_of_plain(self) -> SanaSprint:
        """`plain` with a copy of its transformer."""
        model = copy.copy(self.plain)
        model.transformer = copy.deepcopy(self.plain.transformer)
        return model

    def settings(self, pixels: int, **changes) -> RenderSettings:
        settings = dict(height=pixels, width=pixels, x0_angle=X0_ANGLE, decode_chunk=self.scale.decode_chunk)
        settings |= {"decode": self.decode_mode(pixels), "graphs": "never" if self.graphs_failed else "auto"}
        return RenderSettings(**settings | changes)

    def decode_mode(self, pixels: int) -> str:
        """The mode in which a step decodes now."""
        return self.decode_modes.get(pixels, "eager") if self.decode == "auto" else self.decode

    def overlaps(self) -> bool:
        """Whether a step now decodes one chunk while the next is denoised. A CPU has no streams."""
        wanted = self.overlap == "always" or (self.overlap == "auto" and self.overlap_pays)
        return graphs.supported(self.device) and bool(wanted)

    def how(self, pixels: int) -> dict[str, str]:
        """For the record of a step: how it decodes, what chose that, and whether graphs were used."""
        decode_by = "the fastest in" if pixels in self.decode_modes else "no figure of"
        overlap_by = {None: "no figure of overlap", True: "faster in overlap", False: "no faster in overlap"}
        return {
            "decode": self.decode_mode(pixels),
            "decode_by": f"{decode_by} decode_{pixels}" if self.decode == "auto" else "--decode",
            "overlap": "yes" if self.overlaps() else "no",
            "overlap_by": (
                "no streams on this device"
                if not graphs.supported(self.device)
                else overlap_by[self.overlap_pays]
                if self.overlap == "auto"
                else "--overlap"
            ),
            "graphs": self.graphs(),
        }

    def graphs(self) -> str:
        """Whether a population's forward is replayed from a graph, in words."""
        if not graphs.supported(self.device):
            return "none without a CUDA device"
        return f"none: {self.graphs_failed}" if self.graphs_failed else "where the model captures one"

    def engine(self, **changes) -> esengine.Engine:
        """A new engine on the population, with the N, P and R of the timed step or others."""
        sizes = replace(self.scale, **changes)
        sampler = PromptSampler(len(self.texts), sizes.prompts, seed=0)
        return esengine.Engine(self.population, sampler, size=sizes.population, repeats=sizes.repeats)

    def rows(self) -> Rows:
        """Member, prompt and repeat of a forward's rows: each its own member, no latent twice."""
        members = torch.arange(self.scale.members)
        return Rows(members, members % len(self.texts), members // len(self.texts))

    def forward(
        self,
        model: SanaSprint,
        pixels: int,
        population: esengine.Population | None = None,
        rows: Sequence[int] | None = None,
        **changes,
    ) -> torch.Tensor:
        """One forward of `rows`, or of all, by `SanaSprint.denoise`: x0 / sigma_data, fp32 [B, C, h, w].

        `changes` are of its settings.
        """
        chosen = tuple(column if rows is None else column[list(rows)] for column in self.rows())
        return self.denoise(model, pixels, STEP, chosen, population, **changes)

    def denoise(
        self,
        model: SanaSprint,
        pixels: int,
        step: int,
        rows: Rows,
        population: esengine.Population | None = None,
        **changes,
    ) -> torch.Tensor:
        """`SanaSprint.denoise` of (members, prompts, repeats).

        The first time that a population's forward cannot be captured as a graph, the reason is kept in `graphs_failed`
        and from there on all is measured without graphs.
        """
        members, prompts, repeats = rows

        def call() -> torch.Tensor:
            return model.denoise(
                self.texts,
                seed=0,
                step=step,
                prompts=prompts,
                repeats=repeats,
                members=None if population is None else members,
                population=population,
                settings=self.settings(pixels, **changes),
                text_length=self.scale.text_tokens,
            )

        try:
            return call()
        except RenderError as error:
            replays = population is not None and "never" not in (changes.get("graphs"), self.settings(pixels).graphs)
            if not replays or not graphs.supported(self.device):
                raise
            self.graphs_failed = str(error)
        model.release_graphs()
        return call()

    def check_members(self, pixels: int) -> dict[str, float]:
        """The batched population forward against each of three members alone, its weights formed, in `exact_dtype`.

        Made once for each size, whether it passes or fails.

        Returns:
            relative `error`, its `bound`, and how far a member is from the plain model, `perturbation`.

        Raises:
            CheckFailed: beyond the bound, or the bound could not tell a member from the plain model.
        """
        if pixels not in self._checked:
            rows = [0, 1, self.scale.members - 1]
            exact = Exact(self)
            plain = exact.forward(pixels, rows)
            states = {row: self.population.member_state_dict(step=STEP, member=row) for row in rows}
            expected = torch.cat([exact.forward(pixels, [row], states[row]) for row in rows])
            own = worst_error(self.forward(self.plain, pixels, rows=rows), plain)
            for _ in range(3 if graphs.supported(self.device) else 1):  # the third is a graph's
                got = self.forward(self.model, pixels, self.population)[rows]
            try:
                self._checked[pixels] = bounded(
                    f"population forward at {pixels} px",
                    worst_error(got, expected),
                    max(2 * own, FLOOR[self.dtype]),
                    perturbation=worst_error(plain, expected),
                )
            except CheckFailed as failure:
                self._checked[pixels] = failure
        found = self._checked[pixels]
        if isinstance(found, CheckFailed):
            raise found
        return found

    def time_left(self) -> float:
        """Seconds left of the budget."""
        return self.deadline - time.monotonic()


class Exact:
    """The plain transformer in `exact_dtype`. One member's LoRA at a time is merged into its weights."""

    def __init__(self, context: Context):
        self.context, self.base = context, context.plain.transformer
        self.model = context.copy_of_plain()
        own = self.model.transformer
        self.model.transformer = own.double() if context.exact_dtype == torch.float64 else own.float()
        self.scale = {name: layer.scale for name, layer in context.population.layers.items()}

    @torch.no_grad()
    def forward(self, pixels: int, rows: list[int], state: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
        """`Context.forward` of some rows with the plain weights, or with those of one member's `member_state_dict`."""
        for name, scale in self.scale.items():
            linear = self.model.transformer.get_submodule(name)
            linear.weight.copy_(self.base.get_submodule(name).weight)
            if state is not None:
                a, b = (state[f"{PEFT_PREFIX}{name}.lora_{side}.weight"].to(linear.weight) for side in "AB")
                linear.weight += scale * b @ a
        with full_precision():
            return torch.cat([self.context.forward(self.model, pixels, rows=[row]) for row in rows])
