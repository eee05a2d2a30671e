"""Held-out rewards: the numbers by hand, when they diverge, and that watching changes nothing."""

import contextlib
import dataclasses
import math
import statistics
import sys
import types

import journals
import pytest
import torch
from PIL import Image

from esengine.base.errors import ConfigError, RewardError, RunError
from esengine.base.prompt_files import read_prompts
from esengine.evaluation.draw import EVAL_STEP
from esengine.models import SanaSprint, tiny_model
from esengine.models.defaults import defaults
from esengine.rewards import BUILTIN, Weighted, load
from esengine.rewards.roles import CLIP_FAMILY, Rewards, load_rewards, read_terms
from esengine.run import journal
from esengine.run.folder import RunFolder
from esengine.run.held_out import HeldOut, part_ways
from esengine.run.hooks import Outputs
from esengine.run.prepare import attach_population
from esengine.run.trackers import open_trackers
from esengine.run.train import train
from esengine.sampling.build import encode, render_settings
from esengine.sampling.rollout import Renderer, render_all


def records(folder):
    """The last series of measurements."""
    return [vars(each) for each in journal.read(folder / journal.NAME).held_out]


# ---- the measure, on images that are drawn by nobody


class Texts:
    def __init__(self, count):
        self.prompts = [f"prompt {i}" for i in range(count)]

    def __len__(self):
        return len(self.prompts)

    def trimmed_length(self, prompts):
        return 7


class Blank(Renderer):
    """Draws prompt p as pixels of value p."""

    def chunks(self, step, rows, population=None, *, length):
        assert (step, population, length) == (EVAL_STEP, None, 7)
        for members, prompts, repeats in rows:
            assert members is None
            assert repeats.eq(0).all()
            yield prompts.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()


class Shifting:
    """Scores image p as `now[p]`."""

    def __init__(self):
        self.now = [0.0] * 200

    def __call__(self, images, prompts):
        assert prompts == [f"prompt {int(image[0, 0, 0])}" for image in images]
        return torch.tensor([self.now[int(image[0, 0, 0])] for image in images])


START = journal.Start(0, {"population": 2}, {name: kind() for name, kind in journal.IDENTITY.items()})


class Nobody:
    """Trackers that keep nothing."""

    def log(self, *what):
        pass

    image = log


class Alone(HeldOut):
    """Measures after `step` steps that nobody made."""

    def measure(self, step):
        for made in range(self.out.journal.contents.done, step):
            self.out.journal.append(journal.Step(made, [1.0, -1.0], {}))
        super().measure(step)


@pytest.fixture
def make(tmp_path, notes):
    """A guard over `prompts` prompts of which it measures `count`, in a run folder of its own."""

    def make(weights, prompts=5, count=5, every=10):
        scores = {name: Shifting() for name in weights}
        terms = [(name, scores[name], weight) for name, weight in weights.items()]
        rewards = Rewards(Weighted([term for term in terms if term[2]]), Weighted(terms))
        folder = opened.enter_context(RunFolder.open(tmp_path / "run"))
        writer = opened.enter_context(journal.Writer(folder.journal, START))
        render = Blank(None, Texts(prompts), None, 0, 2)
        out = Outputs(folder, writer, Nobody(), notes.said.append)
        return Alone(out, rewards, render, prompts=count, every=every, last=10**6), scores

    with contextlib.ExitStack() as opened:
        yield make


def test_changes_are_paired_by_prompt(make, tmp_path):
    guard, scores = make({"up": 1.0, "down": 0.0})
    first, later = [5.0, -2.0, 0.5, 8.0, 1.0], [5.25, -2.5, 0.75, 8.5, 1.0]
    scores["up"].now = first
    guard.measure(0)
    scores["up"].now = later
    guard.measure(10)
    zero, ten = records(tmp_path / "run")
    d = [b - a for a, b in zip(first, later, strict=True)]
    assert zero["scores"]["up"] == {"mean": 2.5, "change": 0.0, "standard_error": 0.0, "each": first}
    assert ten["scores"]["up"]["mean"] == pytest.approx(statistics.mean(later))
    assert ten["scores"]["up"]["change"] == pytest.approx(statistics.mean(d))
    assert ten["scores"]["up"]["standard_error"] == pytest.approx(statistics.stdev(d) / math.sqrt(5))
    assert list(zero["scores"]) == ["up", "down"]
    assert [record["optimised"] for record in (zero, ten)] == ["up", "up"]
    assert zero["of"]["prompts"] == [f"prompt {i}" for i in range(5)]
    assert ten["of"] is None


def test_the_step_at_which_they_part_is_told_once(make, tmp_path, notes):
    guard, scores = make({"up": 1.0, "down": 0.0, "still": 0.0})
    for step, up, down in ((0, 0, 0), (10, 1, -0.001), (20, 1, -1), (30, 2, -2), (40, 0, -2)):
        scores["up"].now = [up + 0.1 * i * (step > 0) for i in range(5)]
        scores["down"].now = [down - 0.1 * i * (step == 10) * (-1) ** i + 0.01 * i for i in range(5)]
        guard.measure(step)
    assert [record["parted"] for record in records(tmp_path / "run")] == [[], [], ["down"], ["down"], ["down"]]
    assert guard.parted() == {"down": 20}
    (line,) = notes.said
    assert line.startswith("warning: ")
    for words in ("step 20", "up +1.2", "down -1", "5 prompts", "heldout/step_00000020.png"):
        assert words in line
    assert "\n" not in line


SPOILED = {
    "no scores": lambda record: record.pop("scores"),
    "no reward": lambda record: record["scores"].pop("down"),
    "a score that is none": lambda record: record["scores"].update(up=5),
    "a prompt too few": lambda record: record["scores"]["up"]["each"].pop(),
    "text": lambda record: record["scores"]["up"]["each"].__setitem__(0, "x"),
    "a number without end": lambda record: record["scores"]["up"].update(change=10**400),
    "no verdict": lambda record: record.pop("parted"),
    "a verdict that is none": lambda record: record.update(parted=5),
    "another verdict": lambda record: record.update(parted=["down"]),
    "nobody parted": lambda record: record.update(parted=["evil"]),
    "another objective": lambda record: record.update(optimised="down"),
}


@pytest.mark.parametrize("spoil", SPOILED)
@pytest.mark.parametrize("at", [0, 1])
def test_a_measure_that_is_not_what_was_written_is_refused_with_its_line(make, tmp_path, spoil, at):
    guard, scores = make({"up": 1.0, "down": 0.0})
    for step in (0, 10):
        scores["up"].now = [step + 0.5] * 5
        guard.measure(step)

    def spoiled(records):
        SPOILED[spoil]([record for record in records if record["kind"] == "held_out"][at])
        return records

    def again():
        before = journal.read(tmp_path / "run" / journal.NAME)
        with journal.Writer(tmp_path / "again.jsonl", dataclasses.replace(START, step=10), before) as writer:
            out = Outputs(guard.out.folder, writer, Nobody(), pytest.fail)
            return HeldOut(out, guard.rewards, guard.render, prompts=5, every=10, last=20)

    assert again().parted() == {}
    journals.rewrite(tmp_path / "run", spoiled)
    with pytest.raises(RunError, match=r"journal\.jsonl(, line |: held-out scores after step )\d+: "):
        again()


UP, DOWN, FLAT = (dict(change=c, standard_error=0.1) for c in (0.3, -0.3, 0.0))


@pytest.mark.parametrize(
    ("optimised", "held", "parted"),
    [
        (UP, DOWN, True),
        (UP, FLAT, False),
        (UP, UP, False),
        (DOWN, DOWN, False),
        (FLAT, DOWN, False),
        (UP, dict(change=-0.2, standard_error=0.1), False),  # two standard errors and no more
        (dict(change=0.2, standard_error=0.1), DOWN, False),
        (UP, dict(change=-0.21, standard_error=0.1), True),
        (UP, dict(change=-9.0, standard_error=None), False),
        (dict(change=9.0, standard_error=None), DOWN, False),
        (UP, dict(change=-1e-3, standard_error=0.0), True),  # all prompts alike
        (UP, dict(change=0.0, standard_error=0.0), False),
    ],
)
def test_parting_takes_two_standard_errors_on_both_sides(optimised, held, parted):
    changes = {"a": optimised, "b": held}
    assert part_ways(changes, "a", ["b"]) == (["b"] if parted else [])
    assert part_ways(changes, "a", []) == []


@pytest.mark.parametrize("prompts", [1, 2, 4])
def test_one_prompt_is_no_verdict_and_several_that_change_alike_are(make, tmp_path, notes, prompts):
    guard, scores = make({"up": 1.0, "down": 0.0}, prompts=prompts)
    guard.measure(0)
    scores["up"].now, scores["down"].now = [0.1] * prompts, [-0.1] * prompts
    guard.measure(10)
    for score in records(tmp_path / "run")[1]["scores"].values():
        assert abs(score["change"]) == pytest.approx(0.1)
        assert score["standard_error"] == (None if prompts == 1 else 0.0)
    assert guard.parted() == ({} if prompts == 1 else {"down": 10})
    assert len(notes.said) == len(guard.parted())


@pytest.mark.parametrize(
    ("weights", "objective", "held_out"),
    [
        ({"a": 1.0}, "a", []),
        ({"a": 0.1, "b": 0.0}, "a", ["b"]),
        ({"a": -1.0, "b": 0.0}, "combined", ["b"]),  # a score that is to fall is not the one that should rise
        ({"a": 1.0, "b": -0.5, "c": 0.0}, "combined", ["c"]),
    ],
)
def test_what_rises_when_the_search_succeeds(make, tmp_path, weights, objective, held_out):
    guard, _ = make(weights)
    assert (guard.rewards.objective, guard.rewards.held_out) == (objective, held_out)
    guard.measure(0)
    names = list(records(tmp_path / "run")[0]["scores"])
    assert names == list(dict.fromkeys([objective, *weights]))


@pytest.mark.parametrize(("total", "count"), [(5, 1), (5, 5), (5, 9), (48, 16), (7, 3), (100, 16)])
def test_prompts_are_spread_over_the_whole_list(make, total, count):
    guard, _ = make({"a": 1.0}, prompts=total, count=count)
    places = guard.prompts.tolist()
    assert len(set(places)) == min(total, count)
    assert places == sorted(places)
    assert places[0] == 0
    assert total - places[-1] <= -(-total // len(places))


def test_when_it_measures(make):
    guard, _ = make({"a": 1.0}, every=4)
    guard.last = 9
    guard.start(3)  # nothing to compare with yet
    for step in range(4, 10):
        guard.start(step)
    assert [record.step for record in guard.series] == [3, 4, 8, 9]


def test_grids_and_curves(make, tmp_path, notes):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    guard, scores = make({"a": 1.0})
    trackers = open_trackers(tmp_path / "run", tmp_path / "run" / "tensorboard", (), None, notes.said.append)
    guard.out = dataclasses.replace(guard.out, trackers=trackers)
    trackers.start({})
    guard.measure(0)
    scores["a"].now = [1.0, 2.0, 3.0, 4.0, 5.0]
    guard.measure(10)
    trackers.finish()
    assert sorted(path.name for path in (tmp_path / "run" / "heldout").iterdir()) == [
        "step_00000000.png",
        "step_00000010.png",
    ]
    with Image.open(tmp_path / "run" / "heldout" / "step_00000010.png") as picture:
        size = picture.size
        assert picture.convert("RGB").getpixel((size[0] - 10, size[1] - 10)) == (255, 255, 255)  # five in a grid of six
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("heldout/a")] == [(0, 0.0), (10, 3.0)]
    assert [(e.step, e.value) for e in events.Scalars("heldout_change/a")] == [(0, 0.0), (10, 3.0)]
    assert [(e.step, e.width, e.height) for e in events.Images("heldout")][-1] == (10, *size)


# ---- which rewards


class Fake:
    def __init__(self, strength: float = 1.0):
        self.strength = strength

    def __call__(self, images, prompts):
        return torch.full((len(images),), self.strength)


@pytest.fixture
def family(monkeypatch):
    """The CLIP family as rewards that load nothing; `family(name)` makes one unloadable, `family()` none."""

    def broken(name=None):
        def refuse():
            raise ConfigError("no such model")

        for each in CLIP_FAMILY if name is None else [name]:
            monkeypatch.setitem(BUILTIN, each, Fake if name is None else refuse)

    broken()
    return broken


def chosen(reward, held_out, notes=None):
    terms = read_terms(reward, held_out, defaults("tiny"))
    rewards = load_rewards(terms, device="cpu", note=notes.said.append if notes else pytest.fail)
    assert list(rewards.everything.terms) == [*rewards.optimised.terms, *rewards.watched]
    return rewards


@pytest.mark.parametrize(
    ("reward", "held_out", "expected"),
    [
        ("jpeg_compressibility", "auto", []),
        ("pickscore", "auto", ["clip_text", "aesthetic", "no_artifacts"]),
        ("pickscore(strength=2)=0.5,jpeg_compressibility", "auto", ["clip_text", "aesthetic", "no_artifacts"]),
        ("clip_text=1,aesthetic=0", "auto", ["pickscore", "no_artifacts"]),
        ("hpsv2", "auto", ["pickscore", "clip_text", "aesthetic", "no_artifacts"]),
        ("combined(pickscore=1,hpsv2=1)", "auto", ["clip_text", "aesthetic", "no_artifacts"]),
        ("pickscore", "none", []),
        ("pickscore", "aesthetic(strength=3),jpeg_compressibility=7", ["aesthetic", "jpeg_compressibility"]),
    ],
)
def test_which_rewards_are_held_out(family, reward, held_out, expected):
    rewards = chosen(reward, held_out)
    assert [(term.name, term.weight, term.role) for term in rewards.watched] == [
        (name, 0.0, "watched") for name in expected
    ]
    assert {term.role for term in rewards.optimised.terms} == {"optimised"}
    assert set(rewards.held_out) == {*expected, *(term.name for term in rewards.optimised.terms if not term.weight)}


def test_what_auto_cannot_load_is_left_out_and_said(family, notes):
    family("clip_text")
    family("no_artifacts")
    assert [term.name for term in chosen("pickscore", "auto", notes).watched] == ["aesthetic"]
    assert len(notes.said) == 2
    assert all("left out" in line and "no such model" in line for line in notes.said)
    assert "clip_text" in notes.said[0]


def test_auto_leaves_out_what_is_optimised_under_another_name(family):
    reward = "esengine.rewards.jpeg:JpegCompressibility"
    judged = dataclasses.replace(
        defaults("nano"), judges={name: name for name in ("jpeg_compressibility", "clip_text")}
    )
    rewards = load_rewards(read_terms(reward, "auto", judged), device="cpu", note=pytest.fail)
    assert rewards.everything.names == [reward, "clip_text"]


def test_rewards_of_one_kind_and_other_options_are_two(family):
    rewards = chosen("pickscore", "esengine.rewards.jpeg:JpegCompressibility")
    assert [term.name for term in rewards.watched] == ["esengine.rewards.jpeg:JpegCompressibility"]
    both = "jpeg_compressibility(quality=50)", "esengine.rewards.jpeg:JpegCompressibility"
    assert len(chosen(*both).everything.names) == 2


@pytest.mark.parametrize(
    ("reward", "held_out", "setting", "word"),
    [
        ("hpsv2", "auto", "reward", "no such model"),
        ("pickscore", "hpsv2", "heldout_reward", "no such model"),
        ("pickscore", "nosuch", "heldout_reward", "'nosuch'"),
        ("pickscore", "pickscore", "heldout_reward", "pickscore"),
        ("pickscore=1,aesthetic=0", "clip_text,aesthetic", "heldout_reward", "aesthetic"),
        ("pickscore", "", "heldout_reward", "a reward"),
        ("pickscore", "clip_text,clip_text", "heldout_reward", "2 times"),
        ("pickscore=0", "clip_text", "reward", "at least one with a weight"),
        ("esengine.rewards.jpeg:JpegIncompressibility", "jpeg_incompressibility", "heldout_reward", "the same as"),
        ("my_scores:Scorer", "my_scores:Same", "heldout_reward", "the same as my_scores:Scorer"),
        ("my_scores:one.score", "my_scores:other.score", "heldout_reward", "the same as my_scores:one.score"),
        ("my_scores:total", "jpeg_compressibility", "heldout_reward", "the same as my_scores:total"),
        (
            "combined(jpeg_compressibility=1)",
            "esengine.rewards:jpeg.JpegCompressibility",
            "heldout_reward",
            "the same as jpeg_compressibility",
        ),
    ],
)
def test_rewards_that_cannot_be_used(family, reward, held_out, setting, word, monkeypatch):
    family("hpsv2")
    module = types.ModuleType("my_scores")
    module.Scorer = module.Same = type("Scorer", (), {"__call__": lambda self, images, prompts: [0.0] * len(images)})
    module.one = module.other = type("Has", (), {"score": lambda self, images, prompts: [0.0] * len(images)})()
    module.total = load("combined", jpeg_compressibility=1)
    monkeypatch.setitem(sys.modules, "my_scores", module)
    with pytest.raises(ConfigError) as caught:
        chosen(reward, held_out)
    assert caught.value.setting == setting
    assert word in caught.value.problem


# ---- in a run


def test_the_first_the_last_and_every_second_step_are_measured(trained, prompt_files):
    _, result = trained
    lines = records(result.folder)
    assert [line["step"] for line in lines] == [0, 2, 4]
    assert result.parted == {}
    assert lines[0]["of"]["prompts"] == read_prompts(prompt_files[1])
    assert sorted(path.stem for path in (result.folder / "heldout").iterdir()) == [
        f"step_{step:08d}" for step in (0, 2, 4)
    ]
    # the same latents as the comparison's, whose base is the adapter at its start
    base, adapter = (row["mean"]["jpeg_compressibility"] for row in result.comparison.overall)
    assert lines[0]["scores"]["jpeg_compressibility"]["mean"] == pytest.approx(base, rel=1e-5)
    assert lines[-1]["scores"]["jpeg_compressibility"]["mean"] == pytest.approx(adapter, abs=0.01)


def test_watching_changes_no_bit_of_the_adapter(trained, small, outcome, tmp_path):
    _, result = trained
    train(small(tmp_path / "run", heldout_every=0))
    assert not (tmp_path / "run" / "heldout").exists()
    alone, watched = outcome(tmp_path / "run"), outcome(result.folder)
    for kept in ("adapter", "lora", "metrics", "eval"):
        assert alone[kept] == watched[kept]
    assert alone["checkpoint"] == watched["checkpoint"]


def test_it_draws_the_adapter_as_it_stands(small, tmp_path, notes):
    """With the population attached and no member, images are those of W + s B A set by hand."""
    config = small(tmp_path / "run")
    plain, attached = (SanaSprint.from_pretrained(tiny_model()) for _ in range(2))
    population = attach_population(attached, config)
    for i in range(3):
        population.update(step=i, fitness=torch.tensor([1.0, -1.0, 0.5, -0.5]))
    (texts,) = encode(plain, [read_prompts(defaults("tiny").heldout)[:3]], config.image, notes)
    drawn = {}
    for name, layer in population.layers.items():
        plain.transformer.get_submodule(name).weight.data += layer.scale * layer.b @ layer.a
    for label, model in (("attached", attached), ("by hand", plain)):
        render = Renderer(model, texts, render_settings(config.image), 0, 2)
        drawn[label] = torch.cat([images for images, _ in render_all(render, EVAL_STEP, torch.arange(3))])
    base = SanaSprint.from_pretrained(tiny_model())
    render = Renderer(base, texts, render_settings(config.image), 0, 2)
    untrained = torch.cat([images for images, _ in render_all(render, EVAL_STEP, torch.arange(3))])
    difference = (drawn["attached"].int() - drawn["by hand"].int()).abs()
    assert difference.max() <= 1
    assert (drawn["attached"].int() - untrained.int()).abs().max() > 1


def counting(sign):
    """A score that rises or falls with every call, by an amount that differs between images."""
    calls = 0

    def score(images, prompts):
        nonlocal calls
        calls += 1
        return sign * (calls + torch.arange(len(images)) * 0.01 * calls) + images.float().mean((1, 2, 3)) / 255

    return score


def test_a_run_that_parts_ways_says_so_when_it_happens_and_at_the_end(small, tmp_path, reward, notes):
    name = reward(counting(+1), other=counting(-1))
    result = train(small(tmp_path / "run", reward=name, heldout_reward="own:other"), notes)
    assert result.parted == {"own:other": 2}
    warnings = [line for line in notes.said if "rewards diverge" in line]
    assert len(warnings) == 2
    assert warnings[0] == warnings[1]
    assert "step 2: own:score +" in warnings[0]
    assert "own:other -" in warnings[0]
    assert notes.said.index(warnings[0]) < next(i for i, line in enumerate(notes.said) if "comparing" in line)
    assert notes.said[-1] == warnings[1]
    again = train(small(tmp_path / "run", reward=name, heldout_reward="own:other", resume=True, steps=4), notes)
    assert again.parted == {"own:other": 2}


def test_held_out_rewards_are_in_the_comparison_and_not_in_the_sum(small, tmp_path, reward, trained, outcome):
    name = reward(lambda images, prompts: images.float().mean((1, 2, 3)))
    result = train(small(tmp_path / "run", heldout_reward=name))
    assert result.comparison.scores == ["jpeg_compressibility", name]
    assert outcome(tmp_path / "run")["adapter"] == outcome(trained[1].folder)["adapter"]
    assert list(records(tmp_path / "run")[1]["scores"]) == ["jpeg_compressibility", name]


def test_a_held_out_reward_that_fails_stops_the_run_and_it_resumes(small, tmp_path, reward, outcome):
    calls, failing = 0, True

    def held(images, prompts):
        nonlocal calls
        calls += 1
        return torch.full((len(images),), float("nan") if failing and calls == 2 else 0.5)

    name = reward(held)
    config = small(tmp_path / "run", heldout_reward=name, checkpoint_every=3)
    with pytest.raises(RewardError, match=rf"reward {name}, step 2, images .*returned nan"):
        train(config)
    failing = False
    train(dataclasses.replace(config, resume=True))
    train(small(tmp_path / "whole", heldout_reward=name, checkpoint_every=3))
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("changes", [{"heldout_prompts": 2}, {"heldout_reward": "jpeg_incompressibility"}])
def test_other_prompts_or_rewards_begin_a_new_series(small, tmp_path, notes, changes):
    config = small(tmp_path / "run", steps=3, heldout_every=2)
    train(config)
    train(dataclasses.replace(config, resume=True, steps=5, **changes), notes)
    lines = records(tmp_path / "run")
    assert [line["step"] for line in lines] == [3, 4, 5]
    assert lines[0]["scores"]["jpeg_compressibility"]["change"] == 0
    assert lines[0]["of"]
    assert any("against step 3" in line for line in notes.said)
    assert [line["step"] for line in journals.measured(tmp_path / "run")] == [0, 2, 3, 4, 5]


def test_what_auto_chose_stays_chosen(family, small, tmp_path, notes):
    """A companion that cannot be loaded when the run is resumed is an error, and costs no line of the journal."""
    family("aesthetic")
    config = small(tmp_path / "run", reward="pickscore", heldout_reward="auto", steps=2, checkpoint_every=2)
    train(config, notes)
    assert any("aesthetic" in line and "left out" in line for line in notes.said)
    before = (tmp_path / "run" / "journal.jsonl").read_bytes()
    family("clip_text")
    onward = dataclasses.replace(config, resume=True, steps=4)
    with pytest.raises(ConfigError, match=r"reward clip_text: .*no such model"):
        train(onward)
    assert (tmp_path / "run" / "journal.jsonl").read_bytes() == before
    family()
    train(onward)
    lines = records(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 2, 4]
    assert {tuple(line["scores"]) for line in lines} == {("pickscore", "clip_text", "no_artifacts")}
    # what is asked for by name is on purpose
    train(dataclasses.replace(onward, steps=6, heldout_reward="aesthetic"))
    assert [line["step"] for line in records(tmp_path / "run")] == [4, 6]
    assert [line["step"] for line in journals.measured(tmp_path / "run")] == [0, 2, 4, 6]


def test_the_interval_may_change_and_the_series_goes_on(small, tmp_path, notes):
    config = small(tmp_path / "run", steps=3, heldout_every=2)
    train(config)
    train(dataclasses.replace(config, resume=True, steps=6, heldout_every=3), notes)
    assert [line["step"] for line in records(tmp_path / "run")] == [0, 2, 3, 6]
    assert not any("have changed: from now on" in line for line in notes.said)


def test_a_run_that_was_not_watched_can_be_from_where_it_is(small, tmp_path):
    config = small(tmp_path / "run", steps=1, heldout_every=0)
    train(config)
    train(dataclasses.replace(config, resume=True, steps=3, heldout_every=2))
    assert [line["step"] for line in records(tmp_path / "run")] == [1, 2, 3]
    train(dataclasses.replace(config, resume=True, steps=4))
    assert [line["step"] for line in records(tmp_path / "run")] == [1, 2]


@pytest.mark.parametrize("reward", ["combined(jpeg_compressibility=1,device=cpu)", "combined(jpeg_compressibility=1)"])
def test_an_option_of_a_group_is_not_counted_as_a_reward(reward):
    rewards = chosen(reward, "jpeg_incompressibility")
    assert [(term.name, term.weight) for term in rewards.optimised.terms] == [("jpeg_compressibility", 1.0)]
    assert [term.name for term in rewards.watched] == ["jpeg_incompressibility"]
    assert rewards.objective == "jpeg_compressibility"
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    scores = rewards.everything.score(images, ["a", "b"])
    assert torch.equal(scores["combined"], scores["jpeg_compressibility"])
