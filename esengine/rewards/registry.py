"""Finds a reward by its name: a built-in one, or the user's own as "module:attr"."""

import contextlib
import importlib
import inspect
import operator
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from esengine.base.errors import ConfigError
from esengine.models.defaults import REWARDS
from esengine.rewards.base import Reward, reason
from esengine.rewards.clip import Aesthetic, ClipText, HPSv2, NoArtifacts, PickScore
from esengine.rewards.human import Human
from esengine.rewards.jpeg import JpegCompressibility, JpegIncompressibility
from esengine.rewards.remote import Remote
from esengine.rewards.spec import COMBINED, Term, group, read
from esengine.rewards.vqa import Vqa
from esengine.rewards.weighted import Weighted


def _of_model(path: str) -> Callable[[], Reward]:
    """Builds a reward that belongs to a model, from module:class. The module is imported at first use."""
    return lambda: pkgutil.resolve_name(path)()


BUILTIN = {
    "pickscore": PickScore.from_pretrained,
    "clip_text": ClipText.from_pretrained,
    "aesthetic": Aesthetic.from_pretrained,
    "no_artifacts": NoArtifacts.from_pretrained,
    "hpsv2": HPSv2.from_pretrained,
    "vqa": Vqa.from_pretrained,
    "remote": Remote,
    "human": Human,
    "jpeg_compressibility": JpegCompressibility,
    "jpeg_incompressibility": JpegIncompressibility,
    **{name: _of_model(path) for name, path in REWARDS.items()},
}
"""Maps a name to the callable that builds the reward. "combined" is another name: see `load`."""


def load(name: str, **options) -> Reward:
    """Find a reward by name.

    Args:
        name: a key of `BUILTIN`, "combined" or "module:attr". The module is searched where Python searches, then in the
            current folder, which is importable only during the import. A class is instantiated with the options; any
            other callable is the reward itself.
        options: keyword arguments of the reward. For "combined": each reward's weight by name, and `device`.

    Raises:
        ConfigError: unknown name, failed import, no such attribute, not callable, or unsuitable options.
    """
    if name == COMBINED:
        return load_terms(group(options))
    return _build(Term(name, options), {})


def parse(spec: str, *, device: str = "cpu") -> Weighted:
    """Load rewards from text: "pickscore(model=weights/pickscore,dtype=bfloat16)=1.0,clip_text=0,my.module:score".

    Args:
        spec: in the grammar of `esengine.rewards.spec`.
        device: passed as `device` to each reward that takes one, unless the spec gives another.

    Raises:
        ConfigError: as `spec.read`, `load` and `Weighted`.
    """
    return load_terms(read(spec), device=device)


def load_terms(terms: Sequence[Term], *, device: str = "cpu", trial: Callable[[Term], None] | None = None) -> Weighted:
    """Load rewards that are read already. Arguments and errors as `parse` and `build`."""
    Weighted.check(terms)
    return Weighted(build(terms, device=device, trial=trial))


def light_first(terms: Sequence[Term]) -> list[Term]:
    """The terms, those that load a model last. Otherwise in their order."""
    return sorted(terms, key=lambda term: "model" in _parameters(BUILTIN.get(term.name)))


def build(
    terms: Sequence[Term],
    *,
    device: str = "cpu",
    encoders: dict[Any, Any] | None = None,
    trial: Callable[[Term], None] | None = None,
) -> list[Term]:
    """The same terms with their rewards loaded. A model that several rewards use is loaded once.

    Args:
        terms: from `spec.read`.
        device: for each reward that takes one, unless its term has another.
        encoders: models that are already loaded. Models loaded here are added.
        trial: called with each term when its reward is loaded. Rewards that load a model come last.

    Raises:
        ConfigError: as `load`.
    """
    shared = {"device": device, "encoders": {} if encoders is None else encoders}
    found = {}
    for term in light_first(terms):
        found[term.name] = replace(term, reward=_build(term, shared))
        if trial is not None:
            trial(found[term.name])
    return [found[term.name] for term in terms]


def target(name: str) -> object:
    """What a reward's name refers to: a class, a function or an object. Raises ConfigError as `load`."""
    return BUILTIN.get(name) or _import(name)


def _build(term: Term, shared: dict[str, Any]) -> Reward:
    """The reward of a term, built with the term's options and with those of `shared` that it takes."""
    name, options = term.name, term.options
    shared = shared | ({} if term.device is None else {"device": term.device})
    found = target(name)
    if name in BUILTIN or isinstance(found, type):
        parameters = _parameters(found)
        known = [each for each in parameters if each != "encoders"]  # internal, not a user's option
        unknown = sorted(set(options) - set(known))
        if unknown and name in BUILTIN:
            raise ConfigError(
                f"reward {name}: unknown options {', '.join(unknown)}; expected some of {', '.join(known) or 'none'}"
            )
        if name not in BUILTIN:
            shared = {key: value for key, value in shared.items() if key == "device"}
        try:
            found = found(**{key: value for key, value in shared.items() if key in parameters} | options)
        except (Exception, SystemExit) as e:
            given = f"options {', '.join(options)}" if options else "no options"  # a value may be a secret
            raise ConfigError(f"reward {name}: cannot be built with {given}: {reason(e)}") from e
    elif options:
        raise ConfigError(f"reward {name}: takes no options because it is not a class, got {sorted(options)}")
    if not callable(found):
        raise ConfigError(f"reward {name}: expected a callable, got {type(found).__name__}")
    return found


def _parameters(target: Any) -> list[str]:
    try:
        return list(inspect.signature(target).parameters)
    except (TypeError, ValueError):  # a class written in C may have no signature
        return []


def _import(name: str) -> object:
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        known = ", ".join([*BUILTIN, COMBINED])
        raise ConfigError(f"unknown reward {name!r}: expected one of {known}, or your own as module:attr")
    try:
        with _current_folder_importable():
            module = importlib.import_module(module_name)
    except (Exception, SystemExit) as e:  # importing the user's module may raise anything
        raise ConfigError(f"reward {name}: cannot import {module_name}: {reason(e)}") from e
    try:
        return operator.attrgetter(attribute)(module)
    except AttributeError as e:
        where = getattr(module, "__file__", None) or "built in"
        raise ConfigError(f"reward {name}: module {module_name} ({where}) has no attribute {attribute}") from e


@contextlib.contextmanager
def _current_folder_importable() -> Iterator[None]:
    # Last, so that a folder with the name of an installed package (such as kernels/) does not hide that package.
    folder = os.getcwd()
    importlib.invalidate_caches()
    sys.path.append(folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            del sys.path[len(sys.path) - 1 - sys.path[::-1].index(folder)]
