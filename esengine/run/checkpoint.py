"""Checkpoints that are written atomically and verified by checksum.

A checkpoint is a folder `step_00000012/` with two files, neither of them a pickle:

    state.safetensors   the tensors
    meta.json           format, step, the caller's meta, and a SHA-256 of each of the two contents

It is written under a temporary name, synced and renamed. After a crash it is either complete or absent. The same step,
tensors and meta give the same bytes.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

from esengine.base.errors import RunError
from esengine.base.files import read_regular, sync_folder, write_synced
from esengine.base.records import parse_json
from esengine.run.folder import TEMPORARY, checkpoint_folders, path_step

FORMAT = 1
_STATE, _META = "state.safetensors", "meta.json"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that passed its checksums.

    Attributes:
        step: the step it was saved at.
        path: its folder.
        tensors: name -> tensor on the CPU.
        meta: the caller's JSON values.
        skipped: newer checkpoints that failed verification, newest first, as (path, why). Only `load_latest` fills it.
    """

    step: int
    path: Path
    tensors: dict[str, torch.Tensor]
    meta: dict
    skipped: tuple[tuple[Path, str], ...] = ()


def save(root: str | Path, step: int, tensors: dict[str, torch.Tensor], meta: dict, keep: int = 2) -> Path:
    """Write a checkpoint under root, then remove all but the newest `keep` up to this step.

    Checkpoints of later steps are removed too: they could not be read, so the run resumed from an earlier one. An
    existing checkpoint of the same step is kept if its bytes are equal and replaced otherwise. Left-over temporary
    folders are removed, so only the process that holds the run folder may call this.

    Args:
        root: the folder of checkpoints, made if missing.
        step: 0 or more.
        tensors: any dtype, device and layout.
        meta: JSON values with finite numbers. `load` returns tuples as lists and keys as strings.
        keep: 1 or more.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: step, keep or meta is not as described above.
        TypeError: meta holds a value that JSON cannot store.
        OSError: the disk is full, or the folder cannot be written.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"expected step >= 0 and keep >= 1, got step {step} and keep {keep}")
    root = Path(root)
    target = root / _name(step)
    state = safetensors.torch.save(
        {name: tensors[name].detach().cpu().clone(memory_format=torch.contiguous_format) for name in sorted(tensors)}
    )
    record = {"format": FORMAT, "step": step, "meta": json.loads(_json(meta))}
    record |= {"meta_sha256": _sha256(_json(record)), "sha256": _sha256(state)}
    files = {_STATE: state, _META: _json(record) + b"\n"}

    if not root.exists():
        root.mkdir(parents=True)
        sync_folder(root.parent)
    remove_temporaries(root)
    if not all((target / name).is_file() and (target / name).read_bytes() == data for name, data in files.items()):
        temporary = root / f"{TEMPORARY}{target.name}"
        temporary.mkdir()
        for name, data in files.items():
            write_synced(temporary / name, data)
        sync_folder(temporary)
        if target.exists():
            target.rename(root / f"{TEMPORARY}replaced-{target.name}")
        temporary.rename(target)
        sync_folder(root)
        remove_temporaries(root)
    kept = [path for path in checkpoint_folders(root) if path_step(path) <= step][:keep]
    for path in checkpoint_folders(root):
        if path not in kept:
            shutil.rmtree(path)
    return target


def load(path: str | Path) -> Checkpoint:
    """Read one checkpoint and verify it.

    Raises:
        RunError: a file is missing, unreadable, of another format, or does not match its checksum.
    """
    path = Path(path)
    try:
        raw, state = read_regular(path / _META), read_regular(path / _STATE)
    except OSError as e:
        raise RunError(f"checkpoint {e.filename or path}: {e.strerror or e}") from e
    try:
        record = parse_json(raw)
        version = record["format"]
        signed = _json({key: record[key] for key in ("format", "step", "meta")})
        sums = record["meta_sha256"], record["sha256"]
        if _json(record) + b"\n" != raw or not isinstance(record["meta"], dict):
            raise ValueError("other spaces, or no mapping")
    except (ValueError, TypeError, KeyError) as e:
        raise RunError(f"checkpoint {path / _META}: corrupt, not the JSON that was written") from e
    if version != FORMAT:
        raise RunError(f"checkpoint {path / _META}: expected format {FORMAT}, got {version!r}")
    for name, data, expected in ((_META, signed, sums[0]), (_STATE, state, sums[1])):
        if _sha256(data) != expected:
            raise RunError(f"checkpoint {path / name}: corrupt, its SHA-256 is not the one in {path / _META}")
    step = record["step"]
    if type(step) is not int or path.name != _name(step):
        raise RunError(f"checkpoint {path / _META}: expected the step of its folder, got {step!r}")
    try:
        tensors = safetensors.torch.load(state)
    except SafetensorError as e:
        raise RunError(f"checkpoint {path / _STATE}: {e}") from e
    return Checkpoint(step, path, tensors, record["meta"])


def load_latest(root: str | Path, check: Callable[[Checkpoint], None] | None = None) -> Checkpoint:
    """Return the newest checkpoint that passes verification. Newer ones that fail are logged and listed in `skipped`.

    Args:
        root: the folder of checkpoints.
        check: raises RunError for an intact checkpoint that cannot be used; such a checkpoint fails verification.

    Raises:
        RunError: there is no checkpoint, or none passes verification.
    """
    skipped: list[tuple[Path, str]] = []
    for path in checkpoint_folders(Path(root)):
        try:
            found = load(path)
            if check is not None:
                check(found)
        except RunError as e:
            _log.warning("skipped: %s", e)
            skipped.append((path, str(e)))
        else:
            return Checkpoint(found.step, found.path, found.tensors, found.meta, tuple(skipped))
    if skipped:
        raise RunError(f"no checkpoint under {root} can be read; the newest: {skipped[0][1]}")
    raise RunError(f"no checkpoint under {root}")


def set_aside(damaged: Iterable[Path]) -> None:
    """Rename skipped checkpoints so that they are ignored from now on. `remove_temporaries` deletes them."""
    for path in damaged:
        path.rename(path.with_name(f"{TEMPORARY}damaged-{path.name}"))


def remove_temporaries(root: Path) -> None:
    """Delete partly written and set-aside checkpoints. Only the process that holds the run folder may call this."""
    for path in root.glob(f"{TEMPORARY}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, allow_nan=False, indent=1).encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
