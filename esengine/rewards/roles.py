"""The rewards that a run optimises, and those that it only measures on held-out prompts."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from types import MethodType
from typing import Any

from esengine.base.errors import ConfigError, RewardError, of_setting
from esengine.models.defaults import Defaults
from esengine.rewards.base import Reward, settings_of
from esengine.rewards.human import Human
from esengine.rewards.registry import BUILTIN, build, light_first, target
from esengine.rewards.spec import COMBINED, OPTIMISED, WATCHED, Term, read, require_no_secrets
from esengine.rewards.weighted import Weighted

AUTO, NONE = "auto", "none"
HUMAN = "human"
"""The reward that is a person. A person sees no held-out images, so other rewards score those."""
CHECKS = ("pickscore", "clip_text", "aesthetic", "no_artifacts")
"""Built-in rewards that score an image and its prompt with a model. Each is a check on the others."""
CLIP_FAMILY = (*CHECKS, "hpsv2")
"""If one of these or `human` is optimised, `auto` watches the rest of `CHECKS`. hpsv2 is not there: it has no default
model."""


@dataclass(frozen=True)
class Rewards:
    """The loaded rewards of a run.

    Attributes:
        optimised: the rewards that score the population.
        everything: the same, and the watched rewards with a weight of 0. Models that both use are loaded once. If a
            person is the reward: the watched rewards alone, the first with a weight of 1.
    """

    optimised: Weighted
    everything: Weighted

    @property
    def watched(self) -> list[Term]:
        """The rewards that score held-out prompts only."""
        return [term for term in self.everything.terms if term.role == WATCHED]

    @property
    def person(self) -> Human | None:
        """The person, if that is the reward."""
        first = self.optimised.terms[0].reward
        return first if isinstance(first, Human) else None

    @property
    def held_out(self) -> list[str]:
        """Names of the rewards with a weight of 0, which are not in the sum. None are compared with a person."""
        if self.person:
            return []
        return [term.name for term in self.everything.terms if not term.weight]

    @property
    def objective(self) -> str:
        """The name of the score that the search maximises. With a person, the first score that is watched."""
        weighed = [term for term in self.everything.terms if term.weight]
        return weighed[0].name if len(weighed) == 1 and weighed[0].weight > 0 else COMBINED

    @staticmethod
    def identity(reward: Weighted) -> dict[str, Any]:
        """Weights, models and revisions as JSON values, to compare with a record."""
        return json.loads(json.dumps(reward.settings(), default=str))


def read_terms(reward: str, held_out: str, of_model: Defaults, *, own_prompts: bool = False) -> list[Term]:
    """Read the rewards of a run, and check them without loading anything.

    Args:
        reward: the optimised rewards, in the grammar of `esengine.rewards.spec`.
        held_out: the watched rewards, in the same grammar with weights ignored; `none`; or `auto`. For a model that
            watches its judges, `auto` selects `judges`. For another model, if a reward of `CLIP_FAMILY` is optimised,
            it selects the rest of `CHECKS`. What `auto` selects is optional.
        of_model: the model's defaults.
        own_prompts: whether the user gave the prompts.

    Raises:
        ConfigError: see `esengine.rewards.parse`; also if a reward is both optimised and watched, or if a person is one
            of several rewards.
    """
    with of_setting("reward"):
        optimised = read(reward)
        require_no_secrets(optimised)
        Weighted.check(optimised)
        _require_one_person(optimised)
    names = {term.name for term in optimised}
    if held_out == AUTO and of_model.watches:
        watched = judges(of_model, optimised, own_prompts)
    elif held_out == AUTO:
        watched = [Term(name) for name in CHECKS if name not in names] if names & {*CLIP_FAMILY, HUMAN} else []
    else:
        with of_setting("heldout_reward"):
            watched = [] if held_out == NONE else read(held_out)
            require_no_secrets(watched)
    if both := sorted(names & {term.name for term in watched}):
        problem = f"expected rewards that are not in reward, got {both[0]}; give it a weight of 0 there instead"
        raise ConfigError(problem, setting="heldout_reward")
    with of_setting("heldout_reward"):
        if HUMAN in {term.name for term in watched}:
            raise ConfigError(f"expected rewards that score one image, got {HUMAN}, which compares two")
        if HUMAN in names and not watched:
            raise ConfigError(f"{HUMAN} needs a reward for the held-out images, got none: name one that scores them")
        Weighted.check([replace(term, weight=1.0) for term in watched or optimised])
    return optimised + [replace(term, weight=0.0, role=WATCHED, optional=held_out == AUTO) for term in watched]


def _require_one_person(terms: Sequence[Term]) -> None:
    if HUMAN in {term.name for term in terms} and (len(terms) > 1 or terms[0].weight != 1):
        others = [f"{term.name}={term.weight:g}" for term in terms]
        raise ConfigError(f"expected {HUMAN} alone and with a weight of 1, got {', '.join(others)}")


def judges(of_model: Defaults, optimised: Sequence[Term], own_prompts: bool) -> list[Term]:
    """The model's judges that are not optimised, with a weight of 0; none for a model that does not watch them."""
    if not of_model.watches:
        return []
    names = {term.name for term in optimised}
    specs = of_model.judges_of(own_captions=not own_prompts).items()
    return [replace(term, weight=0.0) for name, spec in specs if name not in names for term in read(spec)]


def load_rewards(
    terms: Sequence[Term], *, device: str, note: Callable[[str], None], trial: Callable[[Term], None] | None = None
) -> Rewards:
    """Load the rewards of a run.

    Args:
        terms: from `read_terms`.
        device: for rewards that take one.
        note: called with what is left out, and why.
        trial: called with each term when its reward is loaded.

    Raises:
        ConfigError: a reward cannot be loaded; or a watched reward is an optimised one under another name.
        RewardError: of `trial`.
    """
    found: dict[str, Term] = {}
    encoders = {}
    watched_first = sorted(terms, key=lambda term: term.role != WATCHED)
    for term in light_first(watched_first):  # so that a mistake is reported before anything large is loaded
        try:
            with of_setting("heldout_reward" if term.role == WATCHED else "reward", "prompts", "eval_prompts"):
                found |= {each.name: each for each in build([term], device=device, encoders=encoders, trial=trial)}
        except (ConfigError, RewardError) as error:
            if not term.optional:
                raise
            note(f"held-out {getattr(error, 'problem', error)}; left out")
    loaded = [found[term.name] for term in terms if term.name in found]
    optimised, kept = [term for term in loaded if term.role == OPTIMISED], []
    for term in loaded:
        if term.role != WATCHED:
            continue
        same = next((other for other in optimised if _alike(term, other) or _same(term.reward, other.reward)), None)
        if same is None:
            kept.append(term)
        elif not term.optional:
            problem = f"{term.name} is the same as {same.name} in reward; give it a weight of 0 there instead"
            raise ConfigError(problem, setting="heldout_reward")
    if optimised[0].name == HUMAN:
        if not kept:
            problem = f"{HUMAN} needs a reward for the held-out images, and none could be loaded: name one"
            raise ConfigError(problem, setting="heldout_reward")
        return Rewards(Weighted(optimised, note), Weighted([replace(kept[0], weight=1.0), *kept[1:]], note))
    return Rewards(Weighted(optimised, note), Weighted([*optimised, *kept], note))


def _alike(one: Term, other: Term) -> bool:
    """Whether two names, not both built in, refer to one object. A bound method is a new object each time."""
    if (one.name in BUILTIN and other.name in BUILTIN) or one.options != other.options:
        return False
    first, second = target(one.name), target(other.name)
    return first is second or (isinstance(first, MethodType) and first == second)


def _same(one: Reward, other: Reward) -> bool:
    """Whether two rewards are one object, share class and settings, or one is a weighted sum with the other in it."""
    if isinstance(one, Weighted) or isinstance(other, Weighted):
        parts = [[t.reward for t in each.terms] if isinstance(each, Weighted) else [each] for each in (one, other)]
        return any(_same(*pair) for pair in product(*parts))
    facts = settings_of(one)
    return one is other or (type(one) is type(other) and bool(facts) and facts == settings_of(other))
