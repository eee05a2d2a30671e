"""Drawing several entries and scoring them, with a model that draws numbers."""

import pytest
import torch

from esengine.base.errors import RewardError
from esengine.evaluation.benchmarks import Benchmark
from esengine.evaluation.draw import EVAL_STEP, Plan, compare_entries, draw, reported
from esengine.evaluation.entries import Entry
from esengine.models import RenderSettings, TextEmbeddings
from esengine.rewards import Weighted

LIFT = torch.tensor([4, 0, -1, 7])
BASE, TWO, ADAPTER = Entry("base", 1), Entry("base", 2), Entry("adapter", 1, "folder")


class Stub:
    """Draws one pixel: 10 * prompt + repeat, `LIFT[prompt]` more with the adapter, 100 more at two steps."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self):
        self.pipeline, self.adapter, self.calls = self, None, []

    def load_adapter(self, path):
        self.adapter = path

    def unload_adapter(self):
        self.adapter = None

    def render_chunks(self, texts, rows, *, seed, step, population, settings, text_length):
        assert population is None
        for members, prompts, repeats in rows:
            assert members is None
            yield self.render(seed, step, prompts, repeats, settings, text_length)

    def render(self, seed, step, prompts, repeats, settings, text_length):
        self.calls.append((self.adapter, settings, (seed, step, prompts.tolist(), repeats.tolist(), text_length)))
        value = 10 * prompts + repeats + (0 if self.adapter is None else LIFT[prompts]) + 100 * (settings.num_steps - 1)
        return value.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)


def pixel(images, prompts):
    return images[:, 0, 0, 0].float()


def halved(images, prompts):
    return images[:, 0, 0, 0].float() / 2


def plan(entries=(BASE, ADAPTER), repeats=2, chunk=3, **settings):
    return Plan(entries, len(LIFT), repeats, 5, RenderSettings(**settings), chunk)


def texts():
    prompts = [f"prompt {i}" for i in range(len(LIFT))]
    return TextEmbeddings(prompts, [torch.zeros(2 + i, 4) for i in range(len(LIFT))])


def compare(plan, terms=(("pixel", pixel, 1.0),), **options):
    model = Stub()
    return compare_entries(model, texts(), Weighted(terms), plan, settings={}, **options), model


def test_paired_numbers_by_hand():
    # base, averaged over repeats 0, 1: 0.5, 10.5, 20.5, 30.5; differences 4, 0, -1, 7
    report, model = compare(plan())
    base, adapter = report.overall
    assert (report.prompts, report.repeats, report.scores) == (4, 2, ["pixel"])
    assert (base["mean"], adapter["mean"]) == ({"pixel": 15.5}, {"pixel": 18.0})
    deviation = ((1.5**2 + 2.5**2 + 3.5**2 + 4.5**2) / 3) ** 0.5
    expected = {"difference": 2.5, "standard_error": pytest.approx(deviation / 2), "win_rate": (1 + 0.5 + 0 + 1) / 4}
    assert adapter["against_first"]["pixel"] == expected
    assert model.adapter is None


def test_every_entry_draws_the_same_rows_at_the_step_no_run_reaches():
    done = []
    _, model = compare(plan((BASE, ADAPTER, TWO), chunk=5), progress=lambda *at: done.append(at))
    first = [keys for _, _, keys in model.calls[:2]]
    assert first[0] == (5, EVAL_STEP, [0, 0, 1, 1, 2], [0, 1, 0, 1, 0], 5)
    assert first[1] == (5, EVAL_STEP, [2, 3, 3], [1, 0, 1], 5)
    assert [keys for _, _, keys in model.calls] == 3 * first
    assert [(adapter, settings.num_steps) for adapter, settings, _ in model.calls[::2]] == [
        (None, 1), ("folder", 1), (None, 2),
    ]  # fmt: skip
    assert EVAL_STEP == 2**32 - 1
    assert done == [(5, 24), (8, 24), (13, 24), (16, 24), (21, 24), (24, 24)]


def test_each_batch_is_watched_in_order():
    seen = []
    report, _ = compare(plan(), watch=seen.append)
    assert [(batch.entry, batch.rows) for batch in seen] == [
        (entry, rows) for entry in (BASE, ADAPTER) for rows in plan().chunks()
    ]
    assert report == compare(plan())[0]


def test_the_angle_of_one_step_is_not_used_for_two():
    _, model = compare(plan((BASE, TWO), chunk=8, x0_angle=1.3))
    assert [settings.x0_angle for _, settings, _ in model.calls] == [1.3, None]


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_the_chunk_changes_no_number(chunk):
    assert compare(plan(chunk=chunk))[0] == compare(plan())[0]


def test_several_rewards_and_their_sum():
    terms = (("pixel", pixel, 1.0), ("halved", halved, -4.0))
    report, _ = compare(plan(), terms)
    paired = report.overall[1]["against_first"]
    assert list(paired) == report.scores == ["pixel", "halved", "combined"]
    assert paired["halved"]["difference"] == paired["pixel"]["difference"] / 2
    assert paired["combined"]["difference"] == paired["pixel"]["difference"] - 4 * paired["halved"]["difference"]
    assert paired["combined"]["win_rate"] == (0 + 0.5 + 1 + 0) / 4


@pytest.mark.parametrize(
    ("weights", "names"), [((1.0, 0.0), ["a", "b"]), ((2.0, 0.0), ["a", "b", "combined"]), ((1.0,), ["a"])]
)
def test_the_sum_is_shown_where_it_is_not_one_of_the_others(weights, names):
    terms = [(name, pixel, weight) for name, weight in zip("ab", weights, strict=False)]
    assert reported(Weighted(terms)) == names


def test_a_reward_that_fails_names_the_images():
    def broken(images, prompts):
        return images[:, 0, 0, 0].float() / 0 * 0

    with pytest.raises(RewardError, match=r"reward broken, images 0, 1, 2 \(prompt 'prompt 0'"):
        compare(plan(), (("broken", broken, 1.0),))


def test_the_callers_settings_stay_as_they_are():
    def torn(images, prompts):
        scores = pixel(images, prompts)
        scores[[prompt == "prompt 1" for prompt in prompts]] = torch.nan
        return scores

    given = {"seed": 5}
    reward = Weighted([("pixel", torn, 1.0)])
    report = compare_entries(Stub(), texts(), reward, plan(), settings=given, drop_bad=True)
    assert given == {"seed": 5}
    assert report.settings == {"seed": 5, "prompts_left_out": 1}


def test_an_adapter_is_loaded_once_and_before_the_base_taken_off():
    """Of three chunks of an entry that follow each other the first loads."""
    model, loads = Stub(), []
    model.load_adapter = lambda path: loads.append(path)
    model.unload_adapter = lambda: loads.append(None)
    each = plan(chunk=3)
    work = [(entry, rows) for entry in (ADAPTER, BASE) for rows in each.chunks()]
    assert len(list(draw(model, texts(), Weighted([("pixel", pixel, 1.0)]), each, work))) == 6
    assert loads == ["folder", None]


def test_groups_come_from_the_benchmark():
    names = ("a", "a", "b", "b")
    report, _ = compare(plan(), benchmark=Benchmark("mine", texts().prompts, names, (None,) * 4))
    assert report.benchmark == "mine"
    assert [(group["by"], group["name"]) for group in report.groups[1:]] == [("category", "a"), ("category", "b")]
