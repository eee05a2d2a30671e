"""Loads pipelines from disk or from the hub. Errors are one line long."""

import contextlib
import dataclasses
import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderDC, DiffusionPipeline, ModelMixin, SanaSprintPipeline
from huggingface_hub import hf_hub_download, snapshot_download
from safetensors import SafetensorError
from transformers import PreTrainedModel

from esengine.base.errors import ConfigError, EsengineError
from esengine.base.memory import oom_guard
from esengine.models import nano, tiny, tiny_pipelines
from esengine.models.families import FAMILIES, FAST, UNUSED, Family, family_of
from esengine.models.model_files import naming_keys, read_mapping, require_own_files
from esengine.models.quiet import no_progress_bars
from esengine.models.text_cache import fingerprint

LATENT_FACTS = {
    "latent channels": lambda config: config["latent_channels"],
    "scaling factor": lambda config: config["scaling_factor"],
    "compression": lambda config: 2 ** (len(config["encoder_block_out_channels"]) - 1),
}
"""Properties of an AutoencoderDC's latents, from its configuration."""

NAMED = ("nano", "tiny")
"""Models with a name: `nano` is small, trained and part of this package; `tiny` is untrained and built in the cache."""

TINY_PREFIX = "tiny:"
"""`tiny:FAMILY` is the tiny untrained pipeline of a family."""

INDEX = "model_index.json"

READ_ERRORS = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError, ImportError),
    *(AssertionError, EOFError, SafetensorError),
)
"""Exceptions that the libraries raise for a missing, damaged or wrong file."""


def is_packaged(model: str) -> bool:
    """Whether a model's name is that of one in this package: `nano`, `tiny` or `tiny:FAMILY`."""
    return model in NAMED or model.startswith(TINY_PREFIX)


def locate(model: str, revision: str | None, local_files_only: bool) -> tuple[Path, dict[str, str]]:
    """The local folder of a model, and its identity: a hub id with its commit, or empty for a local folder.

    A name in `NAMED` always means the named model. A folder of the same name is given as ./nano.
    """
    if is_packaged(model):
        if revision is not None:
            raise ConfigError(f"revision: {model} is part of this package and has none, got {revision}")
        if model == "nano":
            return nano.PIPELINE, {}
        family = model.removeprefix(TINY_PREFIX)
        return tiny.tiny_model() if family == "tiny" else tiny_pipelines.tiny_pipeline(family), {}
    folder = Path(os.path.expanduser(model))
    if folder.is_dir():
        if revision is not None:
            raise ConfigError(f"revision: {model} is a folder and has none, got {revision}")
        return folder, {}
    if folder.is_absolute() or model.startswith(("~", ".")) or model.count("/") != 1:
        raise ConfigError(f"model: {model} is neither a folder nor a hub id")
    family = _family_on_hub(model, revision, local_files_only)
    snapshot = download(model, revision, local_files_only, family, **dict.fromkeys((*family.encoders, *UNUSED)))
    return snapshot, {"model": model, "commit": snapshot.name}


def require_pipeline(
    model: str,
    revision: str | None,
    vae: str | None = None,
    local_files_only: bool = False,
    *,
    reward_vae: str | None = None,
) -> Family:
    """Check that the pipeline, and the decoders if given, exist. No weights are loaded.

    Args:
        model, revision: see `esengine.models.load`.
        vae, reward_vae: decoders, see `esengine.models.load`.
        local_files_only: take hub ids from the local cache only.

    Returns:
        The pipeline's family.

    Raises:
        ConfigError: there is no such folder or hub model, its pipeline or one of its components is of no family, or
            a decoder does not decode its latents.
    """
    from esengine.models.reward_vae import locate_reward_vae

    folder, _ = locate(model, revision, local_files_only)
    family = family_at(folder, model)
    if vae is not None and not family.fast:
        raise ConfigError(
            f"vae: {vae} does not apply to {family.pipeline}, which renders by its own call; leave it out"
        )
    if vae is not None:
        _locate_vae(vae, folder, local_files_only)
    if reward_vae is not None:
        locate_reward_vae(reward_vae, model, folder, family, local_files_only)
    return family


def family_at(folder: Path, model: str = "") -> Family:
    """The family of a model folder. Every component's library and class are checked, and nothing is imported.

    Args:
        folder: the folder.
        model: the model as the user named it.

    Raises:
        ConfigError: the folder is not a pipeline of a family, see `families.family_of`.
    """
    with reading(f"model: cannot load {folder}"):
        family = _checked(folder / INDEX)
    if model.startswith(TINY_PREFIX):
        family = dataclasses.replace(family, size=tiny_pipelines.SIZE)
    return family


def _checked(index: Path) -> Family:
    try:
        return family_of(read_mapping(index))
    except ConfigError as error:
        raise ValueError(str(error)) from error


def _require_kind(folder: Path) -> None:
    """Raises ValueError unless the folder is a SANA-Sprint pipeline whose components are all of its family's."""
    index = read_mapping(folder / INDEX)
    if index.get("_class_name") != FAST:
        raise ValueError(f"expected a {FAST}, got {index.get('_class_name')}")
    _checked(folder / INDEX)


def _family_on_hub(model: str, revision: str | None, local_files_only: bool) -> Family:
    """The family of a hub model, from its index alone. Nothing else is downloaded before it is checked."""
    try:
        index = hf_hub_download(model, INDEX, revision=revision, local_files_only=local_files_only)
    except READ_ERRORS as error:
        raise _not_on_hub(model) from error
    with reading(f"model: cannot load {model}"):
        return _checked(Path(index))


def download(
    model: str, revision: str | None, local_files_only: bool, family: Family = FAMILIES["sana-sprint"], **without: None
) -> Path:
    """Download a hub id without the components in `without`. Returns the snapshot folder; its name is the commit."""
    try:
        return Path(
            getattr(diffusers, family.pipeline).download(
                model, revision=revision, local_files_only=local_files_only, use_safetensors=True, **without
            )
        )
    except READ_ERRORS as error:
        raise _not_on_hub(model) from error


def _not_on_hub(model: str) -> ConfigError:
    return ConfigError(
        f"model: {model} is not a folder, and no complete copy of a hub model of that name was found or fetched "
        "(offline, misspelt, private, or not a pipeline)"
    )


def load(
    folder: Path, dtype: torch.dtype, device: torch.device | str, **parts: torch.nn.Module | None
) -> SanaSprintPipeline:
    """Load the SANA-Sprint in a local folder. `parts` replace its components; None leaves a component out.

    Raises:
        ConfigError: It cannot be read, or a weight is missing or has another shape. The message names the weight.
        OutOfMemory: It does not fit into memory.
    """
    with reading(f"model: cannot load {folder}"):
        _require_kind(folder)
        require_own_files(folder, [name for name in FAMILIES["sana-sprint"].components if name not in parts])
        index = read_mapping(folder / INDEX)
        missing = [name for name in FAMILIES["sana-sprint"].components if name not in parts and index.get(name)]
        own = {name: _component(*index[name], folder / name, dtype) for name in missing}
        files = dict(use_safetensors=True, local_files_only=True)
        pipeline = SanaSprintPipeline.from_pretrained(folder, dtype=dtype, **files, **own, **parts)
        return pipeline.to(device)


def load_pipeline(
    folder: Path, dtype: torch.dtype, device: torch.device | str, family: Family, **parts: Any
) -> DiffusionPipeline:
    """Load the pipeline of any family in a local folder, by the classes of its family's row alone.

    Args:
        folder: the folder.
        dtype: data type of the weights.
        device: device of the weights.
        family: the folder's family, see `family_at`.
        parts: components that replace those of the folder; None leaves a component out.

    Raises:
        ConfigError: it cannot be read, or a weight is missing or has another shape. The message names the weight.
        OutOfMemory: it does not fit into memory.
    """
    with reading(f"model: cannot load {folder}"):
        kind = getattr(diffusers, family.pipeline)
        _checked(folder / INDEX)
        index = read_mapping(folder / INDEX)
        takes = inspect.signature(kind.__init__).parameters.keys() - family.components.keys()
        options = {name: index[name] for name in takes & index.keys() if not isinstance(index[name], list)}
        unused = {name: None for name in UNUSED if name in family.components}
        found = unused | parts
        require_own_files(folder, sorted(family.components.keys() - found.keys()))
        for name in family.components.keys() - found.keys():
            library, named = index.get(name) or (None, None)
            part = None if named is None else _component(library, named, folder / name, dtype)
            found[name] = part.to(device) if isinstance(part, torch.nn.Module) else part
        return kind(**found, **options | family.options)


def _component(library: str, name: str, folder: Path, dtype: torch.dtype) -> Any:
    """Load a component of a class that its family's row allows."""
    for file in folder.glob("*config.json"):
        read_mapping(file)
    kind = getattr({"diffusers": diffusers, "transformers": transformers}[library], name)
    if issubclass(kind, (ModelMixin, PreTrainedModel)):
        return _whole(kind, folder, dtype)
    with naming_keys(folder):
        return kind.from_pretrained(folder, local_files_only=True)


def _whole(kind: type[ModelMixin | PreTrainedModel], folder: Path, dtype: torch.dtype) -> ModelMixin | PreTrainedModel:
    """Load a component and check that its files hold every weight: transformers initialises missing ones randomly."""
    files = dict(use_safetensors=True, local_files_only=True)
    name = "dtype" if issubclass(kind, PreTrainedModel) else "torch_dtype"
    with naming_keys(folder):
        component, found = kind.from_pretrained(folder, **{name: dtype}, **files, output_loading_info=True)
    if absent := sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]])):
        raise ValueError(f"{folder.name} lacks {len(absent)} of its weights, such as {absent[0]}")
    return component


def image_size(folder: Path, family: Family) -> int:
    """Default height and width of a model's images in pixels, from its configuration files, without loading it."""
    found = {}
    for part in (family.denoiser, "vae"):
        with contextlib.suppress(OSError, ValueError, RecursionError):
            found[part] = read_mapping(folder / part / "config.json")
    size, vae = (config if isinstance(config, dict) else {} for config in map(found.get, (family.denoiser, "vae")))
    size, widths = size.get("sample_size"), vae.get("encoder_block_out_channels") or vae.get("block_out_channels")
    if type(size) is int and isinstance(widths, list):
        return size * 2 ** (len(widths) - 1)
    return family.size


def load_vae(vae: str, pipeline: Path, dtype: torch.dtype, local_files_only: bool) -> tuple[AutoencoderDC, str]:
    """Load another decoder for a pipeline's latents, with its identity: a hub id and commit, or a fingerprint.

    Args:
        vae: A folder or a hub id. A hub id may end in @revision.
        pipeline: The local pipeline folder. The latents of its own VAE are the ones to decode.
        dtype: Data type of the weights.
        local_files_only: Take a hub id from the local cache only.

    Raises:
        ConfigError: There is no such VAE, it cannot be read, or its latents have other channels, scale or compression.
    """
    folder, identity = _locate_vae(vae, pipeline, local_files_only)
    with reading(f"vae: cannot use {vae}"):
        require_own_files(folder)
        loaded = _whole(AutoencoderDC, folder, dtype)
    return loaded, identity or fingerprint(folder, ("",))


def _locate_vae(vae: str, pipeline: Path, local_files_only: bool) -> tuple[Path, str | None]:
    """The local folder of a decoder, and its hub id and commit or None. Arguments and errors as in `load_vae`."""
    folder, identity = Path(os.path.expanduser(vae)), None
    if not folder.is_dir():
        name, _, revision = vae.partition("@")
        if folder.is_absolute() or vae.startswith(("~", ".")) or name.count("/") != 1:
            raise ConfigError(f"vae: {vae} is neither a folder nor a hub id")
        weights = "diffusion_pytorch_model*.safetensors"
        files = dict(allow_patterns=["config.json", weights, f"{weights}.index.json"])
        try:
            folder = Path(
                snapshot_download(name, revision=revision or None, local_files_only=local_files_only, **files)
            )
        except READ_ERRORS as error:
            raise ConfigError(f"vae: {vae} is not a folder, and no hub model of that name was found") from error
        identity = f"{name}@{folder.name}"
    with reading(f"vae: cannot use {vae}"):
        own, given = (read_mapping(each / "config.json") for each in (pipeline / "vae", folder))
        if given.get("_class_name") != AutoencoderDC.__name__:
            raise ValueError(f"expected an AutoencoderDC, got {given.get('_class_name')}")
        for what, fact in LATENT_FACTS.items():
            if fact(own) != fact(given):
                raise ValueError(f"expected {what} {fact(own)}, as the model's own, got {fact(given)}")
    return folder, identity


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def reading(cannot: str, what: str = "the model's weights") -> Iterator[None]:
    """Replace errors by a ConfigError of one line that begins with `cannot`; without memory for `what`, OutOfMemory."""
    try:
        with no_progress_bars(), oom_guard(what, "take a smaller model or --dtype bfloat16"):
            yield
    except (EsengineError, MemoryError):
        raise
    except Exception as error:  # the libraries' errors are not documented
        raise ConfigError(f"{cannot}: {first_line(error)}") from error
