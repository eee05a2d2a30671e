"""Calls each reward once on two dummy images, before anything large is loaded, so that a mistake in it costs seconds.

The scores are not recorded, and they may be missing or infinite: noise is no image of a prompt. What is checked is that
the reward does not raise, and that its answer can be converted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from esengine.base.errors import OutOfMemory, RewardError, of_setting
from esengine.base.prompt_files import METADATA, Metadata
from esengine.rewards.spec import Term
from esengine.rewards.weighted import Weighted

IMAGES = 2
"""With two images, a reward that returns one number for a batch is noticed."""


@dataclass(frozen=True)
class Trial:
    """The call of a reward before a run or an evaluation.

    Attributes:
        size: height and width of an image.
        prompts: prompts of the run. The first two are used, or the only one twice.
        metadata: their columns.
        tolerant: whether a failure is a warning, as in a run that goes on when a reward fails.
        note: called with that warning.
        setting: the setting that gives the prompts, for an error about them.
    """

    size: tuple[int, int]
    prompts: Sequence[str]
    metadata: Sequence[Metadata]
    tolerant: bool
    note: Callable[[str], None]
    setting: str = "prompts"

    def __call__(self, term: Term) -> None:
        """Call a loaded reward, unless it has `no_trial`.

        Raises:
            RewardError: the reward raised, or its answer is not a number for each image. The message names the reward.
        """
        if getattr(term.reward, "no_trial", False) is True:
            return
        with of_setting(self.setting):  # a prompt that it cannot score is no fault of the reward
            Weighted([Term(term.name, reward=term.reward)]).check_prompts(self.prompts, self.metadata)
        images = torch.randint(256, (IMAGES, 3, *self.size), dtype=torch.uint8, generator=torch.Generator())
        prompts, metadata = (list((*each[:IMAGES], *each[:1])[:IMAGES]) for each in (self.prompts, self.metadata))
        given = {METADATA: metadata} if any(metadata) else {}
        try:
            Weighted([Term(term.name, reward=term.reward)]).score(images, prompts, **given)
        except OutOfMemory:
            return  # the run scores fewer images together, or says how many bytes are missing
        except RewardError as error:
            if error.__cause__ is None:  # a score that is missing or infinite
                return
            problem = f"reward {term.name}: its trial on two dummy images failed: {error}"
            if not self.tolerant:
                raise RewardError(problem, reward=term.name) from error
            self.note(f"warning: {problem}; the run goes on, as on_bad_reward says")
