"""Default prompts and rewards of a model, for flags that are not given."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from esengine.base.files import DATA
from esengine.models import nano


@dataclass(frozen=True)
class Defaults:
    """The defaults of one model.

    Attributes:
        train: file of prompts to train on.
        heldout: file of prompts that are never trained on.
        reward: the reward to optimise.
        judges: rewards of an evaluation, by name. The first has weight 1, the others weight 0.
        watches: whether a run watches, on held-out prompts, the judges that it does not optimise.
        settings: packaged YAML file of the model's own settings.
        benchmark_name: name of the packaged benchmark of the model's own captions.
        test: file of that benchmark.
        clip: folder of the model's own CLIP, which a reward finds by the model's name.
        rewards: the model's own rewards: where the class of each is, as module:class. They read only captions of the
            model's own world.
        licence: licence of a model that is part of this package.
    """

    train: Path
    heldout: Path
    reward: str
    judges: dict[str, str]
    watches: bool = False
    settings: Path | None = None
    benchmark_name: str | None = None
    test: Path | None = None
    clip: Path | None = None
    rewards: Mapping[str, str] = field(default_factory=dict)
    licence: str = ""

    def judges_of(self, *, own_captions: bool) -> dict[str, str]:
        """The judges, as for `esengine eval --reward`, that can score the model's own captions or any prompts."""
        return {name: each for name, each in self.judges.items() if own_captions or name not in self.rewards}

    def benchmark(self, name: str) -> str:
        """The rewards of a benchmark, as for `esengine eval --reward`."""
        judges = self.judges_of(own_captions=name == self.benchmark_name).values()
        return ",".join(f"{judge}=0" if i else judge for i, judge in enumerate(judges))


_CLIP = ("pickscore", "clip_text", "aesthetic", "no_artifacts")
_PLAIN = Defaults(DATA / "prompts_train.txt", DATA / "prompts_heldout.txt", "pickscore", {name: name for name in _CLIP})
_BY_NAME = {
    "tiny": Defaults(_PLAIN.train, _PLAIN.heldout, "jpeg_compressibility", _PLAIN.judges),
    "nano": Defaults(
        nano.DATA / "nano_train.txt",
        nano.DATA / "nano_validation.txt",
        "checker",
        {"checker": "checker"} | {name: f"{name}(model=nano)" for name in _CLIP},
        watches=True,
        licence="Apache-2.0",
        settings=nano.DATA / "nano.yaml",
        benchmark_name="nano",
        test=nano.DATA / "nano_test.tsv",
        clip=nano.CLIP,
        rewards={"checker": "esengine.models.nano.checker:Checker"},
    ),
}

DEMO = "nano"
"""The model of a run without flags."""
BENCHMARKS = {each.benchmark_name: each.test for each in _BY_NAME.values() if each.benchmark_name}
"""Packaged benchmarks: file by name."""
SETTINGS = {name: each.settings for name, each in _BY_NAME.items() if each.settings}
"""Packaged settings of models: YAML file by the model's name."""
REWARDS = {name: where for each in _BY_NAME.values() for name, where in each.rewards.items()}
"""Rewards that belong to a model: module:class by name."""


def defaults(model: str) -> Defaults:
    """The defaults of a model named as for `--model`. All folders and hub ids have the same defaults.

    Those of `tiny:FAMILY` are those of `tiny`.
    """
    model = "tiny" if model.startswith("tiny:") else model
    return _BY_NAME.get(model, _PLAIN)
