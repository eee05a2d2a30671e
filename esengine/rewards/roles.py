"""The rewards that a run optimises, and those that it only measures on held-out prompts."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from types import MethodType
from typing import Any

from esengine.base.errors import ConfigError, of_setting
from esengine.rewards.base import Reward, settings_of
from esengine.rewards.registry import BUILTIN, build, target
from esengine.rewards.spec import COMBINED, Term, read
from esengine.rewards.weighted import Weighted

WATCHED = ("pickscore", "clip_text", "aesthetic", "no_artifacts")
"""Built-in rewards that score an image and its prompt with a model. Each is a check on the others."""
CLIP_FAMILY = (*WATCHED, "hpsv2")
"""If one of these is optimised, `auto` holds out the rest of `WATCHED`. hpsv2 is not there: it has no default model."""


@dataclass(frozen=True)
class Rewards:
    """The rewards that a run optimises, and those that it only measures.

    Attributes:
        optimised: the rewards that score the population.
        everything: the same, and the held-out rewards with a weight of 0. Models that both use are loaded once.
    """

    optimised: Weighted
    everything: Weighted

    @property
    def watched(self) -> list[str]:
        """Names of the rewards that are not among the optimised ones."""
        optimised = set(self.optimised.names)
        return [name for name in self.everything.names if name not in optimised]

    @property
    def held_out(self) -> list[str]:
        """Names of the rewards with a weight of 0, which are not in the sum."""
        return [name for name, _, weight in self.everything.terms if not weight]

    @property
    def objective(self) -> str:
        """The name of the score that the search maximises."""
        weighed = [(name, weight) for name, _, weight in self.everything.terms if weight]
        return weighed[0][0] if len(weighed) == 1 and weighed[0][1] > 0 else COMBINED

    @staticmethod
    def identity(reward: Weighted) -> dict[str, Any]:
        """Weights, models and revisions as JSON values, to compare with a record."""
        return json.loads(json.dumps(reward.settings(), default=str))


def load_rewards(
    reward: str, held_out: str, *, device: str, note: Callable[[str], None], auto: bool = False
) -> Rewards:
    """Load the rewards of a run.

    Args:
        reward: the optimised rewards, in the grammar of `esengine.rewards.spec`.
        held_out: the held-out rewards, in the same grammar with weights ignored; `none`; or `auto`. If a reward of
            `CLIP_FAMILY` is optimised, `auto` selects the rest of `WATCHED` and leaves out those that cannot be loaded.
        device: for rewards that take one.
        note: called with what is left out, and why.
        auto: `held_out` is what `auto` stands for, not a user's choice. A reward in it that is optimised or cannot be
            loaded is left out.

    Raises:
        ConfigError: see `esengine.rewards.parse`; also if a reward is both optimised and held out.
    """
    chosen, watched = _terms(reward, held_out)
    auto |= held_out == "auto"
    held, encoders = [], {}
    for term in watched:  # first: what `auto` cannot load is reported before anything large is loaded
        try:
            with of_setting("heldout_reward"):
                held += build([replace(term, weight=0.0)], device=device, encoders=encoders)
        except ConfigError as error:
            if not auto:
                raise
            note(f"held-out {error.__cause__}; left out")
    with of_setting("reward"):
        kept = build(chosen, device=device, encoders=encoders)
    both = _in_both(held, kept, {term.name: term.options for term in [*watched, *chosen]})
    if both and not auto:
        ((name, _, _), other), *_ = both
        raise ConfigError(
            f"heldout_reward: {name} is {other}, which reward names too; a weight of 0 there holds it out"
        )
    held = [term for term in held if all(term is not each for each, _ in both)]
    return Rewards(Weighted(kept, note), Weighted([*kept, *held], note))


def _terms(reward: str, held_out: str) -> tuple[list[Term], list[Term]]:
    """The optimised and the held-out terms. Arguments and errors as in `load_rewards`."""
    with of_setting("reward"):
        chosen = read(reward)
    optimised = {term.name for term in chosen}
    if held_out == "auto":
        names = [name for name in WATCHED if name not in optimised] if optimised & set(CLIP_FAMILY) else []
        watched = [Term(name) for name in names]
    else:
        with of_setting("heldout_reward"):
            watched = [] if held_out == "none" else read(held_out)
    if both := sorted(optimised & {term.name for term in watched}):
        raise ConfigError(f"heldout_reward: {both[0]} is named in reward too; there, a weight of 0 holds it out")
    with of_setting("reward"):
        Weighted.check([(term.name, term.weight) for term in chosen])
    with of_setting("heldout_reward"):
        Weighted.check([(term.name, 1.0) for term in watched or chosen])
    return chosen, watched


def _in_both(held: list, kept: list, options: dict[str, Any]) -> list[tuple[tuple, str]]:
    """Each held-out (name, reward, weight) that is also among those kept, with its name there."""
    targets = {name: target(name) for name, _, _ in [*held, *kept]}

    def alike(one: str, other: str) -> bool:
        """Whether two names, not both built in, refer to one object. A bound method is a new object each time."""
        if (one in BUILTIN and other in BUILTIN) or options[one] != options[other]:
            return False
        first, second = targets[one], targets[other]
        return first is second or (isinstance(first, MethodType) and first == second)

    return [
        (term, other[0]) for term, other in product(held, kept) if alike(term[0], other[0]) or _same(term[1], other[1])
    ]


def _same(one: Reward, other: Reward) -> bool:
    """Whether two rewards are one object, share class and settings, or one is a weighted sum with the other in it."""
    if isinstance(one, Weighted) or isinstance(other, Weighted):
        parts = [[r for _, r, _ in each.terms] if isinstance(each, Weighted) else [each] for each in (one, other)]
        return any(_same(*pair) for pair in product(*parts))
    facts = settings_of(one)
    return one is other or (type(one) is type(other) and bool(facts) and facts == settings_of(other))


def reward_names(spec: str) -> set[str]:
    """Names of the rewards in a spec."""
    return {term.name for term in read(spec)}
