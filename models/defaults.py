"""What a model is trained and judged with where the flags are silent."""

from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

from esengine.base.files import DATA


@dataclass(frozen=True)
class Defaults:
    """Of one model.

    Attributes:
        train: file of prompts to train on.
        heldout: file of prompts that are never trained on.
        reward: what is optimised.
        judges: rewards of an evaluation by their names, the first of them with weight 1.
        watches: whether a run watches the judges that it does not optimise, whatever it optimises.
    """

    train: Path
    heldout: Path
    reward: str
    judges: dict[str, str]
    watches: bool = False

    def benchmark(self, name: str) -> str:
        """What a benchmark is scored with, as `esengine eval --reward` takes it. `checker` reads no other captions."""
        judges = [judge for judge in self.judges.values() if judge != "checker" or name == "nano"]
        return ",".join(f"{judge}=0" if i else judge for i, judge in enumerate(judges))

    def scored(self, reward: str, optimised: Set[str], prompts_given: bool) -> str:
        """What an evaluation of a run is scored with: the run's reward, and with weight 0 what it watched.

        Args: `reward` as `--reward` takes it, the others as of `watched`.
        """
        watched = self.watched(optimised, prompts_given)
        others = [] if watched in ("auto", "none") else [f"{judge}=0" for judge in watched.split(",")]
        return ",".join([reward, *others])

    def watched(self, optimised: Set[str], prompts_given: bool) -> str:
        """What `--heldout-reward auto` stands for; `auto` again where the rewards alone decide.

        Args:
            optimised: names of the rewards that are.
            prompts_given: prompts are the user's, which `checker` may not be able to read.
        """
        if not self.watches:
            return "auto"
        left_out = optimised | ({"checker"} if prompts_given else set())
        return ",".join(judge for name, judge in self.judges.items() if name not in left_out) or "none"


_CLIP = ("pickscore", "clip_text", "aesthetic", "no_artifacts")
_PLAIN = Defaults(DATA / "prompts_train.txt", DATA / "prompts_heldout.txt", "pickscore", {name: name for name in _CLIP})
_BY_NAME = {
    "tiny": Defaults(_PLAIN.train, _PLAIN.heldout, "jpeg_compressibility", _PLAIN.judges),
    "nano": Defaults(
        DATA / "nano_train.txt",
        DATA / "nano_validation.txt",
        "checker",
        {"checker": "checker"} | {name: f"{name}(model=nano)" for name in _CLIP},
        watches=True,
    ),
}


def defaults(model: str) -> Defaults:
    """Of a model as `--model` names it; of folders and hub ids, those of the real one."""
    return _BY_NAME.get(model, _PLAIN)
