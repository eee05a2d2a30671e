"""The parts of a CLIP from a folder or the hub: safetensors only, none of their code, one clear line when absent."""

import hashlib
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from esengine.errors import ConfigError
from esengine.rewards.preprocess import Preprocess

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTextConfig

_PREPROCESSOR = ("preprocessor_config.json", "processor_config.json")
_TOKENIZER = ("tokenizer.json", "vocab.json")


def locate(model: str, revision: str | None) -> str:
    """The folder with safetensors, or the hub id, that `model` names.

    Raises:
        ConfigError: neither, or a revision that does not go with it.
    """
    for argument, value in (("model", model), ("revision", revision)):
        if (value is not None or argument == "model") and (not isinstance(value, str) or not value):
            raise ConfigError(f"{argument}: expected text, got {value!r}; text that looks like a number needs quotes")
    folder = Path(model).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ConfigError(f"revision: {model} is a folder and has none, got {revision}")
        if not any(folder.glob("*.safetensors")):
            raise ConfigError(f"model: {model} has no *.safetensors; weights in another format are not read")
        return str(folder)
    if folder.is_absolute() or model.startswith(("~", ".")) or model.count("/") != 1:
        raise ConfigError(f"model: {model} is neither a folder nor a hub id")
    return model


def has_processor(model: str, revision: str | None) -> bool:
    """Whether a model comes with a tokenizer and a preprocessor config. Raises as `locate`."""
    model = locate(model, revision)
    return all(any(_file(model, name, revision) for name in names) for names in (_PREPROCESSOR, _TOKENIZER))


def load_model(model: str, revision: str | None) -> "CLIPModel":
    """The model on the CPU, in its file's dtype or float32."""
    from transformers import CLIPConfig, CLIPModel

    with _one_line(model), _no_progress_bars(), torch.random.fork_rng(devices=[]):  # 4.x draws weights it then reads
        pinned = {} if revision is None else {"revision": revision}
        kind = CLIPConfig.get_config_dict(model, **pinned)[0].get("model_type")
        if kind != "clip":
            raise ValueError(f"expected the config of a CLIPModel, got model_type {kind}")
        clip, report = CLIPModel.from_pretrained(
            model, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **pinned
        )
        absent = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
        if absent:
            raise ValueError(f"{len(absent)} of its weights are missing or of another shape, such as {absent[0]}")
    return clip


def load_preprocess(source: str, revision: str | None) -> Preprocess:
    """What the preprocessor config of a folder or hub id says."""
    found = [path for path in (_file(source, name, revision) for name in _PREPROCESSOR) if path]
    if not found:
        raise ConfigError(f"model: no {_PREPROCESSOR[0]} was found in {source} (offline, misspelt or private)")
    return Preprocess.read(found[0])


def load_tokenizer(source: str, revision: str | None, config: "CLIPTextConfig") -> Callable[[str], torch.Tensor]:
    """From a text to its token ids, int64 [1, T] with T at most what the text tower takes; longer texts are cut."""
    from transformers import CLIPTokenizerFast

    with _one_line(source):
        tokenizer = CLIPTokenizerFast.from_pretrained(source, **({} if revision is None else {"revision": revision}))
        end = config.eos_token_id
        if len(tokenizer) > config.vocab_size or end not in (2, tokenizer.eos_token_id):  # 2: OpenAI's, by position
            raise ValueError("its tokenizer is of another model")
    length = config.max_position_embeddings

    def tokenize(text: str) -> torch.Tensor:
        return tokenizer(text, truncation=True, max_length=length, return_tensors="pt")["input_ids"]

    return tokenize


def _file(model: str, name: str, revision: str | None) -> str | None:
    from transformers.utils import cached_file

    try:
        return cached_file(model, name, revision=revision)
    except OSError:
        return None


def identify(model: str, revision: str | None) -> dict[str, str]:
    """The commit of a hub id; of a folder a sha256 over every file that may have been read."""
    folder = Path(model)
    if not folder.is_dir():
        return {"commit": Path(_file(model, "config.json", revision)).parent.name}  # snapshots/<commit>/config.json
    total = hashlib.sha256()
    for path in sorted(path for kind in ("safetensors", "json", "txt") for path in folder.glob(f"*.{kind}")):
        total.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with open(path, "rb") as stream:
            while part := stream.read(1 << 24):
                total.update(part)
    return {"fingerprint": f"sha256:{total.hexdigest()}"}


@contextmanager
def _one_line(model: str):
    try:
        yield
    except Exception as e:  # what a file can make the libraries raise is not listed anywhere
        lines = str(e).strip().splitlines() or [type(e).__name__]
        where = f"cannot load {model}"
        if not Path(model).is_dir():
            where = f"{model} is not a folder, and no complete hub model of that name with safetensors was found"
        raise ConfigError(f"model: {where} ({lines[0]})") from e


@contextmanager
def _no_progress_bars():
    """Loading bars are the caller's to draw."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
