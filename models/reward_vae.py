"""A cheaper decoder of a pipeline's latents, for the images that a run's reward scores.

Everything else decodes by the pipeline's own VAE: held-out measures, evaluations, pictures, and every so many steps the
images of a step a second time, see `esengine.sampling.reward_decoder`.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from huggingface_hub import snapshot_download

from esengine.base.errors import ConfigError
from esengine.models.families import Family
from esengine.models.loading import NAMED, READ_ERRORS, TINY_PREFIX, _whole, reading
from esengine.models.model_files import read_mapping, require_own_files
from esengine.models.text_cache import fingerprint

TINY = "tiny"
"""The published AutoencoderTiny of a family; for `nano` and `tiny:FAMILY` an untrained one, for tests."""
_KIND = "AutoencoderTiny"
_UNTRAINED = "untrained"


class RewardVae:
    """What a generator needs for a reward's own decoder.

    Attributes:
        reward_vae: the decoder; None: images for a reward are decoded as all others.
        reward_vae_identity: what identifies its weights.
    """

    reward_vae: torch.nn.Module | None = None
    reward_vae_identity: str | None = None
    _for_reward = False

    def set_reward_vae(self, vae: torch.nn.Module, identity: str) -> None:
        """Take a decoder of the same latents. It is frozen, and its convolutions become channels-last."""
        self.reward_vae, self.reward_vae_identity = vae.eval().requires_grad_(False), identity
        channels_last(vae)

    @contextmanager
    def reward_decoding(self) -> Iterator[None]:
        """Inside, images are decoded by the reward's decoder, if there is one."""
        before, self._for_reward = self._for_reward, self.reward_vae is not None
        try:
            yield
        finally:
            self._for_reward = before


def channels_last(vae: torch.nn.Module) -> None:
    """Put the weights of the 2D convolutions into channels-last order, which is faster."""
    for each in vae.modules():
        if isinstance(each, (torch.nn.Conv2d, torch.nn.ConvTranspose2d)):
            each.to(memory_format=torch.channels_last)


def locate_reward_vae(
    name: str, model: str, pipeline: Path, family: Family, local_files_only: bool = False
) -> tuple[Path | None, str | None]:
    """The local folder of a reward's decoder, and its hub id and commit or None. Nothing is loaded.

    Args:
        name: `tiny`, a folder or a hub id. A hub id may end in @revision.
        model: the pipeline's model as the user named it.
        pipeline: the local pipeline folder.
        family: its family.
        local_files_only: take a hub id from the local cache only.

    Returns:
        None as the folder stands for the untrained decoder.

    Raises:
        ConfigError: there is no such decoder, or it does not decode the pipeline's latents.
    """
    if name == TINY:
        if family.tiny_vae is None:
            raise ConfigError(f"reward_vae: {family.pipeline} cannot decode by an {_KIND}; give a folder or a hub id")
        if model in NAMED or model.startswith(TINY_PREFIX):
            return None, None
        if not family.tiny_vae:
            raise ConfigError(f"reward_vae: no {_KIND} of {family.name} is known; give a folder or a hub id")
        name = family.tiny_vae
    folder, identity = Path(os.path.expanduser(name)), None
    if not folder.is_dir():
        repository, _, revision = name.partition("@")
        if folder.is_absolute() or name.startswith(("~", ".")) or repository.count("/") != 1:
            raise ConfigError(f"reward_vae: {name} is neither {TINY}, nor a folder, nor a hub id")
        files = [
            "config.json",
            "diffusion_pytorch_model*.safetensors",
            "diffusion_pytorch_model*.safetensors.index.json",
        ]
        keys = dict(revision=revision or None, local_files_only=local_files_only, allow_patterns=files)
        try:
            folder = Path(snapshot_download(repository, **keys))
        except READ_ERRORS as error:
            raise ConfigError(f"reward_vae: {name} is not a folder, and no such hub model was found") from error
        identity = f"{repository}@{folder.name}"
    with reading(f"reward_vae: cannot use {name}"):
        require_own_files(folder)
        _check_latents(_config(pipeline / "vae"), _config(folder), family)
    return folder, identity


def load_reward_vae(
    name: str,
    model: str,
    pipeline: Path,
    family: Family,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    local_files_only: bool = False,
) -> tuple[torch.nn.Module, str]:
    """Load a reward's decoder, with what identifies it: a hub id and commit, or a fingerprint.

    Arguments and errors are those of `locate_reward_vae`; also OutOfMemory if it does not fit into memory.
    """
    folder, identity = locate_reward_vae(name, model, pipeline, family, local_files_only)
    with reading(f"reward_vae: cannot use {name}"):
        if folder is None:
            facts = latent_facts(_config(pipeline / "vae"))
            vae, identity = _untrained(**facts), f"{_UNTRAINED} {json.dumps(facts)}"
            return torch.nn.Module.to(vae, device, dtype), identity  # `ModelMixin.to` warns of a cast
        vae = _whole(getattr(diffusers, _config(folder)["_class_name"]), folder, dtype)
        return vae.to(device), identity or fingerprint(folder, ("",))


def latent_facts(config: Mapping[str, Any]) -> dict[str, int]:
    """Channels of a VAE's latents, and pixels for each of their rows, from its configuration."""
    if config.get("_class_name") == _KIND:
        factor = config["upsampling_scaling_factor"] ** (len(config["decoder_block_out_channels"]) - 1)
        return {"channels": config["latent_channels"], "compression": factor}
    channels = config["z_dim"] if "z_dim" in config else config["latent_channels"]
    if "spatial_compression_ratio" in config:
        return {"channels": channels, "compression": config["spatial_compression_ratio"]}
    for name, more in (("encoder_block_out_channels", -1), ("block_out_channels", -1), ("temperal_downsample", 0)):
        if name in config:
            return {"channels": channels, "compression": 2 ** (len(config[name]) + more)}
    raise ValueError(f"expected a VAE's configuration, got one of {config.get('_class_name')}")


def _check_latents(own: Mapping[str, Any], given: Mapping[str, Any], family: Family) -> None:
    """Raises ValueError unless a decoder decodes the latents of the pipeline's own VAE."""
    kinds = [name for _, name in family.components["vae"] if family.tiny_vae is not None or name != _KIND]
    kinds = list(dict.fromkeys([*kinds, *([_KIND] if family.tiny_vae is not None else [])]))
    if given.get("_class_name") not in kinds:
        raise ValueError(f"expected {' or '.join(kinds)}, got {given.get('_class_name')!r:.100}")
    facts = [latent_facts(own), latent_facts(given)]
    if own.get("_class_name") == given["_class_name"]:  # an AutoencoderTiny has a scale of its own
        for each, config in zip(facts, (own, given), strict=True):
            each |= {name.replace("_", " "): config.get(name) for name in ("scaling_factor", "shift_factor")}
    for what, expected in facts[0].items():
        if what in facts[1] and facts[1][what] != expected:
            raise ValueError(f"expected {what} {expected}, as the model's own latents, got {facts[1][what]}")


def _config(folder: Path) -> dict[str, Any]:
    return read_mapping(folder / "config.json")


def _untrained(channels: int, compression: int) -> torch.nn.Module:
    """An AutoencoderTiny with random weights, which are always the same."""
    blocks = compression.bit_length()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8,) * blocks,
            decoder_block_out_channels=(8,) * blocks,
            num_encoder_blocks=(1,) * blocks,
            num_decoder_blocks=(1,) * blocks,
            latent_channels=channels,
        )
