"""From a reward's name to the reward: a built-in one, or the user's own as "module:attr"."""

import contextlib
import importlib
import inspect
import operator
import os
import sys
from collections.abc import Iterator
from typing import Any

from esengine.errors import ConfigError
from esengine.rewards.base import Reward, reason
from esengine.rewards.clip import Aesthetic, ClipText, HPSv2, NoArtifacts, PickScore
from esengine.rewards.jpeg import JpegCompressibility, JpegIncompressibility
from esengine.rewards.remote import Remote
from esengine.rewards.spec import read
from esengine.rewards.weighted import COMBINED, Weighted


def _checker() -> Reward:
    from esengine.rewards.checker import Checker  # with it comes diffusers, which no other reward needs

    return Checker()


BUILTIN = {
    "pickscore": PickScore.from_pretrained,
    "clip_text": ClipText.from_pretrained,
    "aesthetic": Aesthetic.from_pretrained,
    "no_artifacts": NoArtifacts.from_pretrained,
    "hpsv2": HPSv2.from_pretrained,
    "remote": Remote,
    "checker": _checker,
    "jpeg_compressibility": JpegCompressibility,
    "jpeg_incompressibility": JpegIncompressibility,
}
"""Name to what builds the reward. "combined" is one more name: see `load`."""


def load(name: str, **options) -> Reward:
    """Find a reward by name.

    Args:
        name: a key of `BUILTIN`; or "combined"; or "module:attr". The module is looked for where Python looks, then in
            the current folder, which is importable only while the module is. A class is instantiated with the options;
            any other callable is the reward itself.
        options: keyword arguments of the reward. Of "combined": the weight of each reward by its name, and `device`.

    Raises:
        ConfigError: unknown name, failed import, no such attribute, not callable, or options that do not fit.
    """
    if name == COMBINED:
        return _combine([(each, {}, weight) for each, weight in _weights(options)], options.get("device", "cpu"))
    return _build(name, options, {})


def parse(spec: str, *, device: str = "cpu") -> Weighted:
    """Load rewards from text: "pickscore(model=weights/pickscore,dtype=bfloat16)=1.0,clip_text=0,my.module:score".

    A model that several rewards use is loaded once. "combined(a=1,b=0.5)=2" stands for "a=2,b=1".

    Args:
        spec: in the grammar of `esengine.rewards.spec`.
        device: given as `device` to each reward that takes one and is not told another.

    Raises:
        ConfigError: what `spec.read`, `load` and `Weighted` refuse.
    """
    terms = []
    for term in read(spec):
        if term.name == COMBINED:
            terms += [(name, {}, term.weight * weight) for name, weight in _weights(term.options)]
        else:
            terms.append((term.name, term.options, term.weight))
    return _combine(terms, device)


def _combine(terms: list[tuple[str, dict[str, Any], float]], device: str) -> Weighted:
    Weighted.check([(name, weight) for name, _, weight in terms])
    shared = {"device": device, "encoders": {}}
    return Weighted([(name, _build(name, options, shared), weight) for name, options, weight in terms])


def _weights(options: dict[str, Any]) -> list[tuple[str, float]]:
    weights = [(name, weight) for name, weight in options.items() if name != "device"]
    for name, weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise ConfigError(f"reward {COMBINED}: expected a number as the weight of {name}, got {weight!r}")
    return weights


def _build(name: str, options: dict[str, Any], shared: dict[str, Any]) -> Reward:
    """The reward `name` with its own options, and those of `shared` that it has parameters for."""
    target = BUILTIN.get(name) or _import(name)
    if name in BUILTIN or isinstance(target, type):
        parameters = _parameters(target)
        known = [each for each in parameters if each != "encoders"]  # that one is ours to share
        unknown = sorted(set(options) - set(known))
        if unknown and name in BUILTIN:
            raise ConfigError(
                f"reward {name}: unknown options {', '.join(unknown)}; expected some of {', '.join(known) or 'none'}"
            )
        if name not in BUILTIN:
            shared = {key: value for key, value in shared.items() if key == "device"}
        try:
            target = target(**{key: value for key, value in shared.items() if key in parameters} | options)
        except (Exception, SystemExit) as e:
            raise ConfigError(f"reward {name}: cannot be built with options {options}: {reason(e)}") from e
    elif options:
        raise ConfigError(f"reward {name}: takes no options because it is not a class, got {sorted(options)}")
    if not callable(target):
        raise ConfigError(f"reward {name}: expected a callable, got {type(target).__name__}")
    return target


def _parameters(target: Any) -> list[str]:
    try:
        return list(inspect.signature(target).parameters)
    except (TypeError, ValueError):  # a class written in C may not say
        return []


def _import(name: str) -> object:
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        known = ", ".join([*BUILTIN, COMBINED])
        raise ConfigError(f"unknown reward {name!r}: expected one of {known}, or your own as module:attr")
    try:
        with _current_folder_importable():
            module = importlib.import_module(module_name)
    except (Exception, SystemExit) as e:  # the user's module may do anything when it is imported
        raise ConfigError(f"reward {name}: cannot import {module_name}: {reason(e)}") from e
    try:
        return operator.attrgetter(attribute)(module)
    except AttributeError as e:
        where = getattr(module, "__file__", None) or "built in"
        raise ConfigError(f"reward {name}: module {module_name} ({where}) has no attribute {attribute}") from e


@contextlib.contextmanager
def _current_folder_importable() -> Iterator[None]:
    # Last, so that a folder named like an installed package (our own kernels/, say) does not hide that package.
    folder = os.getcwd()
    importlib.invalidate_caches()
    sys.path.append(folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            del sys.path[len(sys.path) - 1 - sys.path[::-1].index(folder)]
