"""Loads a CLIP or an image-text model from a folder or the hub: safetensors only, no code, errors of one line."""

import hashlib
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from esengine.base.errors import ConfigError
from esengine.models.defaults import defaults
from esengine.rewards.preprocess import Preprocess

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTextConfig, CLIPTokenizerFast, PreTrainedModel, ProcessorMixin

_PREPROCESSOR = ("preprocessor_config.json", "processor_config.json")
_TOKENIZER = ("tokenizer.json", "vocab.json")
_TOKENIZER_TOO = ("merges.txt", "tokenizer_config.json", "special_tokens_map.json")
_OF_IMAGE_TEXT = (
    *(*_PREPROCESSOR, *_TOKENIZER, *_TOKENIZER_TOO, "added_tokens.json", "chat_template.jinja", "chat_template.json"),
    *("video_preprocessor_config.json", "generation_config.json"),
)
"""Files of an image-text model besides its config and weights. A model may lack some of them."""
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"

CONVERTED = {"openai/clip-vit-base-patch32": "c237dc49a33fc61debc9276459120b7eac67e7ef"}
"""Default commits of models whose main branch has no safetensors. This one is refs/pr/66, by the hub's converter."""


def locate(model: str | os.PathLike[str], revision: str | None) -> str:
    """The safetensors folder or the hub id that `model` names. The name of a packaged model stands for its own CLIP.

    Raises:
        ConfigError: `model` is neither, or `revision` does not apply to it.
    """
    model = os.fspath(model) if isinstance(model, os.PathLike) else model
    for argument, value in (("model", model), ("revision", revision)):
        if (value is not None or argument == "model") and (not isinstance(value, str) or not value):
            raise ConfigError(f"{argument}: expected text, got {value!r}; text that looks like a number needs quotes")
    folder = defaults(model).clip or Path(os.path.expanduser(model))
    if folder.is_dir():
        if revision is not None:
            raise ConfigError(f"revision: {model} is a folder and has none, got {revision}")
        if not any(folder.glob("*.safetensors")):
            raise ConfigError(f"model: {model} has no *.safetensors; weights in another format are not read")
        if (folder / "adapter_config.json").exists():  # transformers would read the base model that it names
            raise ConfigError(f"model: {model} is an adapter of another model; merge it into a model first")
        return str(folder)
    if folder.is_absolute() or model.startswith(("~", ".")) or model.count("/") != 1:
        raise ConfigError(f"model: {model} is neither a folder nor a hub id")
    return model


def has_processor(model: str, revision: str | None) -> bool:
    """Whether a model comes with a tokenizer and a preprocessor config. Raises as `locate`."""
    model = locate(model, revision)
    return all(any(_file(model, name, revision) for name in names) for names in (_PREPROCESSOR, _TOKENIZER))


def processor_files(source: str) -> list[Path]:
    """Files of the tokenizer and the preprocessor of a folder or hub id.

    Raises:
        ConfigError: there is no tokenizer, or no preprocessor config.
    """
    if not has_processor(source, None):
        raise ConfigError(f"processor: no tokenizer with a {_PREPROCESSOR[0]} was found in {source}")
    found = (_file(source, name, None) for name in (*_PREPROCESSOR, *_TOKENIZER, *_TOKENIZER_TOO))
    return [Path(path) for path in found if path]


def load_model(model: str, revision: str | None) -> tuple["CLIPModel", str | None]:
    """The model on the CPU, in its file's dtype or float32, and the commit of its weights (None for a folder).

    A hub model is read from the cache folder of that commit, so that no other weights can replace these.
    """
    from transformers import CLIPConfig, CLIPModel

    from esengine.models.model_files import naming_keys, require_own_files

    with _one_line(model), _no_progress_bars(), torch.random.fork_rng(devices=[]):  # 4.x first draws random weights
        config_file = _file(model, "config.json", revision)
        if config_file is None:
            raise ValueError("no config.json was found")
        folder = _weights(model, revision)
        require_own_files(folder)
        settings = CLIPConfig.get_config_dict(Path(config_file).parent)[0]
        if settings.get("model_type") != "clip":
            raise ValueError(f"expected the config of a CLIPModel, got model_type {settings.get('model_type')}")
        files = dict(use_safetensors=True, trust_remote_code=False, local_files_only=True, output_loading_info=True)
        with naming_keys(folder):
            clip, report = CLIPModel.from_pretrained(folder, config=CLIPConfig.from_dict(settings), **files)
        _require_whole(report)
    return clip, None if Path(model).is_dir() else folder.name  # snapshots/<commit>


def load_image_text(model: str, revision: str | None) -> tuple["PreTrainedModel", "ProcessorMixin", str | None]:
    """An image-text model on the CPU, in its file's dtype, its processor, and the commit of its weights.

    No code of the folder is run: the classes are those of transformers for the config's `model_type`.

    Raises:
        ConfigError: it cannot be loaded, a weight is missing, or it is not a decoder of one sequence.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    with _one_line(model), _no_progress_bars(), torch.random.fork_rng(devices=[]):
        if _file(model, "config.json", revision) is None:
            raise ValueError("no config.json was found")
        folder = _weights(model, revision)
        commit = None if Path(model).is_dir() else folder.name
        for name in _OF_IMAGE_TEXT if commit else ():
            _file(model, name, commit)
        closed = dict(trust_remote_code=False, local_files_only=True)
        config = AutoConfig.from_pretrained(folder, **closed)
        if any(getattr(each, "is_encoder_decoder", False) for each in (config, config.get_text_config())):
            raise ValueError(f"expected a model that only decodes, got {config.model_type}")
        processor = AutoProcessor.from_pretrained(folder, **closed)
        if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
            raise ValueError("no processor of images and texts was found")
        loaded, report = AutoModelForImageTextToText.from_pretrained(
            folder, config=config, use_safetensors=True, output_loading_info=True, **closed
        )
        _require_whole(report)
    return loaded, processor, commit


def _require_whole(report: dict[str, Any]) -> None:
    """Raise ValueError if transformers' loading report lists weights that were not loaded."""
    absent = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if absent:
        raise ValueError(f"{len(absent)} of its weights are missing or of another shape, such as {absent[0]}")


def _weights(model: str, revision: str | None) -> Path:
    """The folder that holds all weights of a model. They are fetched if necessary."""
    from esengine.models.model_files import read_mapping, require_plain_names

    first = _file(model, _WEIGHTS, revision) or _file(model, _INDEX, revision)
    if first is None and Path(model).is_dir():
        raise ValueError(f"no {_WEIGHTS} was found")
    if first is None:
        where = f"revision {revision}" if revision else "its main branch"
        snapshots = Path(_file(model, "config.json", revision)).parents[1]  # <cache>/snapshots/<commit>/config.json
        held = [path.parent.name for path in snapshots.glob(f"*/{_WEIGHTS}")]
        hint = f"the cache has them at revision={held[0]}" if held else "the hub's converter offers some as refs/pr/N"
        raise ConfigError(
            f"model: {model} has no {_WEIGHTS} at {where}, or it is neither cached nor can it be fetched; give the "
            f"revision= of a commit that has: {hint}"
        )
    if first.endswith(_INDEX):
        weight_map = read_mapping(Path(first)).get("weight_map")
        require_plain_names(weight_map, _INDEX)
        shards = set(weight_map.values())
        if absent := [name for name in sorted(shards) if _file(model, name, revision) is None]:
            raise ValueError(f"{absent[0]} was not found")
    return Path(first).parent


def load_preprocess(source: str, revision: str | None) -> Preprocess:
    """The preprocessing that the config of a folder or hub id describes."""
    found = [path for path in (_file(source, name, revision) for name in _PREPROCESSOR) if path]
    if not found:
        raise ConfigError(f"model: no {_PREPROCESSOR[0]} was found in {source} (offline, misspelt or private)")
    return Preprocess.read(found[0])


class Tokenize:
    """A text to its token ids, int64 [1, T]. T is at most `length`; longer texts are cut."""

    def __init__(self, tokenizer: "CLIPTokenizerFast", length: int):
        self.tokenizer, self.length = tokenizer, length

    def __call__(self, text: str) -> torch.Tensor:
        return self.tokenizer(text, truncation=True, max_length=self.length, return_tensors="pt")["input_ids"]

    def cuts(self, text: str) -> bool:
        """Whether a text has more tokens than are read."""
        return len(self.tokenizer(text, truncation=False, verbose=False)["input_ids"]) > self.length


def load_tokenizer(source: str, revision: str | None, config: "CLIPTextConfig") -> Tokenize:
    """The tokenizer of a folder or hub id, for a text tower."""
    from transformers import CLIPTokenizerFast

    with _one_line(source):
        found = [path for path in (_file(source, name, revision) for name in _TOKENIZER) if path]
        if not found:
            raise ValueError(f"no {_TOKENIZER[0]} was found")
        pinned = {} if Path(source).is_dir() else {"revision": Path(found[0]).parent.name}  # snapshots/<commit>
        tokenizer = CLIPTokenizerFast.from_pretrained(source, **pinned)
        end = config.eos_token_id
        if len(tokenizer) > config.vocab_size or end not in (2, tokenizer.eos_token_id):  # 2: OpenAI's, by position
            raise ValueError("its tokenizer is of another model")
    return Tokenize(tokenizer, config.max_position_embeddings)


def _file(model: str, name: str, revision: str | None) -> str | None:
    """Path of one file of a model, or None.

    For a model of `CONVERTED` it may come from main, because transformers caches all files but the weights from there.
    """
    from transformers.utils import cached_file

    converted = CONVERTED.get(model) if revision is None else None
    for place in (revision,) if converted is None else (converted, None):
        try:
            return cached_file(model, name, revision=place)
        except OSError:
            continue
    return None


def fingerprint(model: str) -> str:
    """A sha256 of all files of a folder that may have been read."""
    total, folder = hashlib.sha256(), Path(model)
    for path in sorted(path for kind in ("safetensors", "json", "txt", "jinja") for path in folder.glob(f"*.{kind}")):
        total.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with open(path, "rb") as stream:
            while part := stream.read(1 << 24):
                total.update(part)
    return f"sha256:{total.hexdigest()}"


@contextmanager
def _one_line(model: str):
    try:
        yield
    except ConfigError:
        raise
    except Exception as e:  # the libraries' errors are not documented
        lines = str(e).strip().splitlines() or [type(e).__name__]
        where = f"cannot load {model}"
        if not Path(model).is_dir():
            where = f"{model} is not a folder, and no complete hub model of that name was found"
        raise ConfigError(f"model: {where} ({lines[0]})") from e


@contextmanager
def _no_progress_bars():
    """Disable loading bars. The caller shows progress."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
