import contextlib
import copy
import dataclasses
import json
import time
from types import SimpleNamespace

import pytest
import suite.checks
import suite.context
import suite.decode
import suite.kernels
import suite.linear
import suite.model
import suite.producers
import suite.run
import suite.summary
import torch
import torch.nn.functional as F
from peers import linears
from suite import clock, standin

import esengine
from esengine.base.errors import RenderError


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The record of the whole suite at toy size, as the command writes it, with all that it measures if asked."""
    path = tmp_path_factory.mktemp("suite") / "record.json"
    code = suite.run.main(["--scale", "tiny", "--device", "cpu", "--compile-decoder", "--json", str(path)])
    return code, json.loads(path.read_text())


@pytest.fixture
def context():
    return tiny_context()


def tiny_context(budget: float = 300, **options) -> suite.context.Context:
    scale, device = suite.context.SCALES["tiny"], torch.device("cpu")
    return suite.context.Context(scale, device, deadline=time.monotonic() + budget, compile_backend="eager", **options)


def test_every_part_is_measured_and_every_figure_is_there(stored):
    code, record = stored
    assert code == 0
    assert list(record["parts"]) == list(suite.run.parts(suite.context.SCALES["tiny"]))
    assert {part["status"] for part in record["parts"].values()} == {"ok"}
    summary = record["summary"]
    for name in (
        "linear_vs_gemm",
        "linear_in_block_vs_gemm",
        "forward_vs_compiled",
        "step_vs_inference",
        "memory_per_extra_member",
        "update_share",
    ):
        assert summary[name]["value"] > 0, name
        assert summary[name]["verdict"] == "no bar"
    assert list(summary["images_per_second"]) == ["32", "64"]
    assert set(summary["images_per_second"]["64"]["detail"]) == {"transformer", "decode", "score", "step"}
    assert set(summary["memory_per_extra_member"]["detail"]) == {"8", "128", "256"}
    assert sum(summary["step_breakdown"]["detail"]["step_64"].values()) == pytest.approx(1)
    assert {"environment", "settings", "load_average_after"} <= set(record)
    assert {"device", "commit", "dirty", "versions"} <= set(record["environment"])


def test_linear_holds_its_peers_and_the_worst_shape(stored):
    part = stored[1]["parts"]["linear"]["result"]
    for case in part["shapes"].values():
        variants = case["variants"]
        ours = {"plain", "population", "epilogue", "addmm", "stored_torch"}
        assert set(variants) == ours | {"peft_mixed_batch", "batched_bmm"}
        for variant in variants.values():
            assert variant["check"]["error"] <= variant["check"]["bound"]
            assert {"median", "p20", "p80", "samples"} <= set(variant["seconds"])
    ratios = [case["ratios"]["population"]["of_medians"] for case in part["shapes"].values()]
    assert stored[1]["summary"]["linear_vs_gemm"]["value"] == min(ratios)


def test_every_kernel_has_a_checked_share_of_the_roofline(stored):
    kernels = stored[1]["parts"]["kernels"]["result"]
    shares = stored[1]["summary"]["roofline_share"]["detail"]
    for name, case in kernels.items():
        checks = [case["check"]] if "check" in case else [each["check"] for each in case["variants"].values()]
        assert all(check["error"] <= check["bound"] for check in checks)
        assert shares[name] > 0
    assert {"linear q|k|v x256", "mix", "shrink to_q x64"} & set(kernels) == {"linear q|k|v x256", "shrink to_q x64"}
    assert {"decode_64 lite", "decode_32 contiguous", "step_32 score"} <= set(shares)
    assert stored[1]["summary"]["roofline_share"]["missing"] == {}
    assert shares["linear 64->64 x16"] > shares["population_linear 64->64 x16"] > 0


def test_step_stages_add_up_to_the_step(stored):
    for side in (32, 64):
        part = stored[1]["parts"][f"step_{side}"]["result"]
        assert sum(part["stages"]["step"].values()) == pytest.approx(part["seconds"]["step"]["median"], rel=0.5)
        assert part["images"] == 8
        assert part["inference_transformer"] == "compiled"


def test_a_wrong_linear_fails_its_check_and_has_no_figure(monkeypatch, context):
    right = suite.linear.population_linear
    monkeypatch.setattr(
        suite.linear, "population_linear", lambda *a, **k: right(*a[:-1], a[-1]._replace(sigma=2e-2), **k)
    )
    record = suite.run.run(context, chosen=["linear"])
    for case in record["parts"]["linear"]["result"]["shapes"].values():
        assert "failed" in case["variants"]["population"]["check"]
        assert "seconds" not in case["variants"]["population"]
        assert "population" not in case["ratios"]
        assert "seconds" in case["variants"]["batched_bmm"]
    assert record["summary"]["linear_vs_gemm"]["verdict"] == "failed check"
    assert record["summary"]["linear_vs_gemm"]["value"] is None


def test_a_forward_without_noise_fails_and_the_rest_goes_on(monkeypatch, context, tmp_path):
    monkeypatch.setattr(esengine.Population, "perturbed", lambda self, step, members: contextlib.nullcontext())
    path = tmp_path / "record.json"
    suite.run.run(context, chosen=["forward_32", "step_32", "update"], json_path=path)
    record = json.loads(path.read_text())
    assert {name: part["status"] for name, part in record["parts"].items()} == {
        "forward_32": "failed",
        "step_32": "failed",
        "update": "ok",
    }
    assert "relative error" in record["parts"]["forward_32"]["reason"]
    check = record["parts"]["step_32"]["result"]["check"]
    assert check["error"] > check["bound"]
    assert check["failed"] in record["parts"]["step_32"]["reason"]


@pytest.fixture
def failed(monkeypatch, context):
    """A record of two parts whose checks have failed, as a bar would see it."""
    monkeypatch.setattr(esengine.Population, "perturbed", lambda self, step, members: contextlib.nullcontext())
    record = suite.run.run(
        context, chosen=["forward_32", "forward_64", "step_32", "step_64", "memory", "reference_loop"]
    )
    record["settings"]["bars"] = True
    return record


def test_a_failed_check_is_stored_beside_the_timing_which_never_counts(failed):
    for part in failed["parts"].values():
        assert (part["status"], "result" in part) == ("failed", True)
    assert failed["parts"]["forward_32"]["result"]["ratios"]["over_compiled"]["of_medians"] > 0
    summary = suite.summary.summarize(failed)
    named = {name: summary[name] for name in ("forward_vs_compiled", "step_vs_inference", "memory_per_extra_member")}
    for name, figure in {**named, **summary["images_per_second"]}.items():
        assert (figure["value"], figure["detail"], figure["verdict"]) == (None, None, "failed check"), name
        assert figure["uncounted"]["value"] > 0
    for name, value, _, verdict in suite.summary.rows(summary):
        assert verdict not in ("pass", "fail", "no bar"), name
        assert "does not count" not in name or value.startswith("(")
    assert sum("does not count" in name for name, *_ in suite.summary.rows(summary)) >= len(named) + 2


def test_a_failed_check_makes_the_exit_code_1(monkeypatch, tmp_path):
    monkeypatch.setattr(esengine.Population, "perturbed", lambda self, step, members: contextlib.nullcontext())
    command = ["--scale", "tiny", "--device", "cpu", "--parts", "forward_32", "--json", str(tmp_path / "r.json")]
    assert suite.run.main(command) == 1


def test_a_compiled_baseline_that_is_wrong_is_timed_and_does_not_count(monkeypatch, context):
    right = suite.model.blocks_compiled

    def wrong(transformer, **options):
        model = right(transformer, **options)
        model.transformer_blocks = model.transformer_blocks[:1]
        return model

    monkeypatch.setattr(suite.model, "blocks_compiled", wrong)
    record = suite.run.run(context, chosen=["forward_32", "forward_64"])
    part = record["parts"]["forward_32"]
    assert part["status"] == "ok"
    mode = part["result"]["compile"]["modes"]["default"]
    assert "expected a relative error" in mode["check"]["failed"]
    assert mode["uncounted_ratio"]["of_medians"] > 0
    assert "over_compiled" not in part["result"]["ratios"]
    assert context.compiled == {}
    figure = record["summary"]["forward_vs_compiled"]
    assert (figure["value"], figure["verdict"]) == (None, "failed check")
    assert figure["detail"]["forward_32 over compiled default"].endswith("does not count, failed check")


def test_blocks_are_compiled_in_place_of_the_model_and_share_what_is_compiled(monkeypatch):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setitem(standin.CONFIGS["tiny"]["transformer"], "num_layers", 5)
    transformer = standin.transformer("tiny")
    model = suite.model.blocks_compiled(transformer, backend=backend, dynamic=False)
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(4, 8, 4, 4, generator=generator),
        "encoder_hidden_states": torch.randn(4, 8, 48, generator=generator),
        "encoder_attention_mask": torch.ones(4, 8, dtype=torch.int64),
        "guidance": torch.full((4,), 0.45),
        "timestep": torch.ones(4),
        "return_dict": False,
    }
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], transformer(**inputs)[0])
        assert len(graphs) == 2  # the first block's input is laid out otherwise
        transformer(**inputs)
    assert len(graphs) == 2  # the given one stays eager
    assert {p.data_ptr() for p in model.parameters()} == {p.data_ptr() for p in transformer.parameters()}


@pytest.mark.parametrize("unit", ["blocks", "model"])
def test_a_record_says_what_was_compiled(unit):
    context = tiny_context(compile_unit=unit)
    record = suite.run.run(context, chosen=["forward_32"])
    assert record["settings"]["compile_unit"] == unit
    assert record["settings"]["compile_decoder"] is False
    part = record["parts"]["forward_32"]["result"]
    assert part["compile"]["unit"] == unit
    assert part["compile"]["modes"]["default"]["inductor_cache"] == {"hits": 0, "misses": 0}  # the backend is eager
    assert part["compile"]["modes"]["default"]["check"]["error"] <= part["check"]["bound"]
    assert record["summary"]["forward_vs_compiled"]["detail"]["forward_32 compiled by"] == unit


def test_a_cold_run_comes_first_and_is_planned_within_its_time(capsys):
    scale = suite.context.SCALES["full"]
    cold = ["linear", "update", "forward_512", "step_512", "memory", "forward_1024", "step_1024"]
    assert list(suite.run.parts(scale))[: len(cold)] == cold
    assert suite.run.selected(scale, ["cold"]) == cold
    assert sum(suite.run.needed(scale, name) for name in cold) <= suite.context.COLD_SECONDS == 300
    assert all(suite.run.needed(scale, name) > 0 for name in suite.run.parts(scale))
    assert suite.run.main(["--plan", "--parts", "cold"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown[1:-1]] == cold
    assert "assumed" in shown[0]
    assert not any("not within" in line for line in shown)
    assert "step_1024           60 s  not within the budget of 100 s" in suite.run.plan(
        scale, ["linear", "step_1024"], 100
    )


def test_the_suite_prints_its_plan_before_it_measures(monkeypatch, context, capsys):
    monkeypatch.setattr(suite.model, "update", lambda context: {})
    context.scale = dataclasses.replace(context.scale, part_seconds={"update": 7})
    monkeypatch.setattr(suite.run, "summarize", lambda results: {})
    suite.run.run(context, chosen=["update"])
    shown = capsys.readouterr().out.splitlines()
    assert shown[1] == "update               7 s  ends after 7 s"
    assert shown[-1].startswith("update           ok")


def test_parts_are_measured_in_the_order_given():
    scale = suite.context.SCALES["tiny"]
    assert suite.run.selected(scale, ["decode_32", "step_32", "decode_32"]) == ["decode_32", "step_32"]
    assert suite.run.selected(scale)[:2] == ["linear", "update"]


def test_a_blind_check_is_a_failed_one():
    with pytest.raises(suite.checks.CheckFailed, match="blind"):
        suite.checks.bounded("x", 1e-3, 1e-2, perturbation=5e-3)
    with pytest.raises(suite.checks.CheckFailed, match="at most"):
        suite.checks.bounded("x", float("nan"), 1e-2)


def test_an_error_is_stored_and_what_was_measured_before_is_kept(monkeypatch, context, tmp_path):
    def broken(context):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(suite.model, "update", broken)
    path = tmp_path / "record.json"
    record = suite.run.run(context, chosen=["linear", "update", "overlap"], json_path=path)
    assert [part["status"] for part in record["parts"].values()] == ["ok", "error", "ok"]
    assert record["parts"]["update"]["reason"] == "RuntimeError: out of luck"
    assert "out of luck" in record["parts"]["update"]["traceback"]
    assert json.loads(path.read_text())["summary"]["update_share"]["verdict"] == "error"


def test_a_run_that_is_cut_off_leaves_what_it_has(monkeypatch, context, tmp_path):
    def interrupted(context):
        raise KeyboardInterrupt

    monkeypatch.setattr(suite.kernels, "kernels", interrupted)
    path = tmp_path / "record.json"
    with pytest.raises(KeyboardInterrupt):
        suite.run.run(context, chosen=["update", "kernels"], json_path=path)
    parts = json.loads(path.read_text())["parts"]
    assert parts["update"]["status"] == "ok"
    assert parts["kernels"] == {"status": "error", "reason": "the process ended in it"}


def test_without_time_nothing_is_measured_and_it_says_so(tmp_path, capsys):
    path = tmp_path / "record.json"
    assert suite.run.main(["--scale", "tiny", "--device", "cpu", "--budget", "0", "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    assert {part["reason"] for part in record["parts"].values()} == {"out of time"}
    assert record["summary"]["linear_vs_gemm"]["verdict"] == "not measured"
    assert record["summary"]["linear_vs_gemm"]["reason"] == "linear: out of time"
    assert "not measured" in capsys.readouterr().out


def test_a_second_run_goes_on_where_the_first_ended(monkeypatch, context, tmp_path):
    path, measured = tmp_path / "r.json", []

    def part(name, fails=False):
        def measure(context):
            measured.append(name)
            if fails:
                raise suite.checks.CheckFailed("wrong")
            return {}

        return measure

    known = {"linear": part("linear"), "update": part("update", fails=True), "memory": part("memory")}
    monkeypatch.setattr(suite.run, "parts", lambda scale: known)
    monkeypatch.setattr(suite.run, "summarize", lambda results: {})
    suite.run.run(context, chosen=["linear", "update"], json_path=path, resume=True)
    known["update"] = part("update")
    record = suite.run.run(context, json_path=path, resume=True)
    assert measured == ["linear", "update", "update", "memory"]
    assert {part["status"] for part in record["parts"].values()} == {"ok"}
    suite.run.run(context, chosen=["linear"], json_path=path)
    assert measured[-1] == "linear"
    stored = json.loads(path.read_text())
    stored["environment"]["versions"]["torch"] = "0.0"
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"--resume: .* has versions"):
        suite.run.run(context, json_path=path, resume=True)


def test_bars_pass_and_fail(stored):
    record = copy.deepcopy(stored[1])
    record["settings"]["bars"] = True
    shapes = record["parts"]["linear"]["result"]["shapes"]
    for case, value in zip(shapes.values(), (1.2, 0.98, 1.0), strict=True):
        case["ratios"]["population"]["of_medians"] = value
    record["parts"]["memory"]["result"]["bytes_per_further_member"] = 65.0
    del record["parts"]["step_64"]
    summary = suite.summary.summarize(record)
    assert (summary["linear_vs_gemm"]["verdict"], summary["linear_vs_gemm"]["value"]) == ("pass", 0.98)
    assert summary["linear_vs_gemm"]["bar"] == ">= 0.97"
    assert summary["memory_per_extra_member"]["verdict"] == "fail"
    assert summary["step_vs_inference"]["verdict"] == "not measured"
    assert summary["step_vs_inference"]["reason"] == "step_64: not asked for"
    assert summary["images_per_second"]["32"]["bar"] == ">= 130"
    assert any("not measured" in row for row in suite.summary.rows(summary))


def test_the_suite_measures_both_reference_loops(stored):
    part = stored[1]["parts"]["reference_loop"]["result"]
    assert set(part["check"]) == {"population", "as_published", "shared"}
    assert set(part["ratios"]) == {"as_published", "shared"}
    ours = part["step_seconds"]["ours"]
    for name, ratio in part["ratios"].items():
        spent = part["population"] * part["seconds"][name]["median"]
        spent += part["seconds"]["reference_noise_and_update"]["median"]
        assert ratio == pytest.approx(spent / ours)
        assert part["check"][name]["error"] <= part["check"][name]["bound"]


@pytest.mark.parametrize("counts", [True, False])
def test_the_published_loop_counts_only_where_a_record_says_that_it_matches(monkeypatch, tmp_path, stored, counts):
    file = tmp_path / "cpu_peer_ratio.json"
    file.write_text(json.dumps({"ratio": {"of_medians": 3.0}, "expected": 3.5, "matches": counts}))
    found, why = suite.model.peer_ratio.stored_verdict(file)
    assert found is counts
    assert "3.00 times our step" in why
    record = copy.deepcopy(stored[1])
    record["settings"]["bars"] = True
    part = record["parts"]["reference_loop"]["result"]
    part |= {"as_published_counts": found, "as_published_counts_by": why}
    part["ratios"]["as_published"] = 11.0
    summary = suite.summary.summarize(record)
    figure, shown = summary["step_vs_reference_loop"], dict(enumerate(suite.summary.rows(summary)))
    row = next(row for row in shown.values() if row[0] == "step_vs_reference_loop")
    if counts:
        assert (figure["value"], figure["verdict"], row[3]) == (11.0, "pass", "pass")
    else:
        assert (figure["value"], figure["verdict"], row[3]) == (None, "does not count", "does not count")
        assert figure["uncounted"]["value"] == 11.0
        assert figure["reason"] == why
        assert ("  does not count", "(11)", "", "") in shown.values()
    assert figure["detail"]["over the loop that shares ours"] == part["ratios"]["shared"]


def test_without_a_record_the_published_loop_does_not_count(tmp_path):
    counts, why = suite.model.peer_ratio.stored_verdict(tmp_path / "cpu_peer_ratio.json")
    assert not counts
    assert "is missing" in why


def test_a_peer_by_path_is_measured_and_a_wrong_one_refused(monkeypatch, tmp_path):
    (tmp_path / "my_peer.py").write_text(
        "import torch\n"
        "def good(x, weight, bias, a, b, scale):\n"
        "    return torch.nn.functional.linear(x, weight, bias) + scale * x @ a.mT @ b.mT\n"
        "def wrong(x, weight, bias, a, b, scale):\n"
        "    return torch.nn.functional.linear(x, weight, bias)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    context = tiny_context(peers=("my_peer:good", "my_peer:wrong"))
    record = suite.run.run(context, chosen=["linear"])
    case = next(iter(record["parts"]["linear"]["result"]["shapes"].values()))
    assert "seconds" in case["variants"]["my_peer:good"]
    assert "failed" in case["variants"]["my_peer:wrong"]["check"]
    assert record["summary"]["linear_vs_gemm"]["verdict"] == "no bar"
    assert "peer: failed check" in record["summary"]["linear_vs_gemm"]["detail"].values()
    with pytest.raises(ValueError, match="expected module:function"):
        linears.by_path("my_peer")


def test_what_is_asked_for_must_exist(context, capsys):
    with pytest.raises(ValueError, match="parts: expected cold or some of linear"):
        suite.run.run(context, chosen=["everything"])
    with pytest.raises(SystemExit):
        suite.run.main(["--scale", "tiny", "--device", "cpu", "--parts", "everything"])
    assert "parts: expected cold or some of" in capsys.readouterr().err


def test_bf16_is_held_to_twice_torchs_own_error(monkeypatch):
    context = tiny_context(dtype=torch.bfloat16)
    facts = context.check_members(32)
    assert facts["error"] <= facts["bound"] < facts["perturbation"]
    right = esengine.Population.perturbed  # noise of the right size, and the next pair's
    monkeypatch.setattr(
        esengine.Population, "perturbed", lambda self, step, members: right(self, step=step, members=members + 2)
    )
    context._checked.clear()
    with pytest.raises(suite.checks.CheckFailed, match="population forward"):
        context.check_members(32)


class FakeEvent:
    def __init__(self, enable_timing=False):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


def test_the_gpu_clock_turns_the_order_and_reads_events(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    calls = []
    variants = {"a": lambda: (calls.append("a"), time.sleep(0.002)), "b": lambda: calls.append("b")}
    taken = clock.interleaved(variants, 2, device="cuda")
    assert "".join(calls) == "ab" + "ab" + "ba"
    assert taken["a"]["median"] >= 0.002 > taken["b"]["median"]
    laps = clock.Laps("cuda")
    for name in ("x", "y", "x"):
        time.sleep(0.001)
        laps.lap(name)
    assert list(laps.seconds()) == ["x", "y"]
    assert laps.seconds()["x"] >= 0.002
    assert laps.seconds()["y"] >= 0.001


def test_pictures_are_drawn_from_the_record(stored, tmp_path):
    pytest.importorskip("matplotlib")
    from suite import plots

    drawn = plots.draw(stored[1], tmp_path)
    assert [path.name for path in drawn] == ["linears.png", "ratios.png", "step.png", "memory.png", "roofline.png"]
    assert all(path.stat().st_size > 5000 for path in drawn)
    empty = copy.deepcopy(stored[1])
    empty["parts"] = {}
    empty["summary"] = suite.summary.summarize(empty)
    assert plots.draw(empty, tmp_path / "empty") == []


def test_population_is_the_reference_runs(context):
    assert isinstance(context.population, esengine.Population)
    assert context.population.config.r == 2
    assert len(context.population.layers) == 2 * 8 + 2 + 2 * 2 + 1 + 1


def test_decoders_are_checked_and_compared(stored):
    for side in (32, 64):
        part = stored[1]["parts"][f"decode_{side}"]["result"]
        assert list(part["variants"]) == ["contiguous", "channels_last", "compiled", "lite"]  # graphs need a GPU
        for facts in part["variants"].values():
            assert facts["check"]["error"] <= facts["check"]["bound"] < facts["check"]["perturbation"]
        assert set(part["ratios"]) == set(part["variants"]) - {"contiguous"}
        assert part["compiled"] == "by eager"
    part = stored[1]["parts"]["overlap"]["result"]
    assert not part["streams"]
    detail = stored[1]["summary"]["decode_and_overlap"]["detail"]
    assert detail["overlap"]["over in turn"] == part["ratio"]["of_medians"]
    assert any("decode_64, lite over contiguous" in row for row in suite.summary.rows(stored[1]["summary"]))


def test_a_wrong_decoder_fails_its_check_and_has_no_figure(monkeypatch, context):
    right = suite.decode.Decoder._pixels

    def wrong(self, z_bchw):
        images, finite = right(self, z_bchw)
        return (images // 2 if self.channels_last else images), finite

    monkeypatch.setattr(suite.decode.Decoder, "_pixels", wrong)
    result = suite.run.run(context, chosen=["decode_32"])["parts"]["decode_32"]["result"]
    assert "compiled" not in result["variants"]
    assert result["compiled"] == "not asked for, see --compile-decoder"
    assert "failed" in result["variants"]["channels_last"]["check"]
    assert list(result["seconds"]) == ["contiguous"]


def test_overlapped_scores_must_be_the_same(monkeypatch, context):
    right = esengine.models.SanaSprint.render_chunks

    def wrong(self, *args, settings, **kwargs):
        for images in right(self, *args, settings=settings, **kwargs):
            yield images.flip(0) if settings.overlap else images

    monkeypatch.setattr(esengine.models.SanaSprint, "render_chunks", wrong)
    part = suite.run.run(context, chosen=["overlap"])["parts"]["overlap"]
    assert part["status"] == "failed"
    assert "same scores either way" in part["reason"]
    assert part["result"]["seconds"]
    assert context.overlap_pays is False


@pytest.mark.parametrize("shape", [(64, 64), (64, 192)])
def test_in_a_block_a_linear_is_charged_with_all_it_adds(shape):
    context = tiny_context(dtype=torch.bfloat16)
    names = suite.producers.of(context, *shape)
    assert names == (["behind the modulation"] if shape[1] > 64 else ["behind linear_attention", "behind to_out"])
    for name in names:
        case = suite.producers.case(context, name, *shape, 16)
        assert case["check"]["error"] <= case["check"]["bound"] < case["check"]["perturbation"]
        seconds = {part: taken["samples"] for part, taken in case["seconds"].items()}
        for i, total in enumerate(seconds["in_block"]):
            mixed = seconds["mix"][i] if "mix" in seconds else 0.0
            assert total == pytest.approx(seconds["linear"][i] + mixed + seconds["with"][i] - seconds["without"][i])
        assert ("mix" in seconds) == (name != "behind the modulation")
    assert suite.producers.of(context, 48, 64) == []
    assert suite.producers.of(tiny_context(), 64, 64) == []  # fp32 makes no partial sums


def test_a_wrong_mix_fails_the_linear_in_its_block(monkeypatch):
    context, producers = tiny_context(dtype=torch.bfloat16), suite.producers
    right = producers.ops(context.device)
    wrong = right._replace(mix=lambda sums, *given: right.mix(sums[:, :, ::2].repeat(1, 1, 2, 1), *given))
    monkeypatch.setattr(producers, "ops", lambda device: wrong)
    with pytest.raises(suite.checks.CheckFailed, match="behind to_out"):
        producers.case(context, "behind to_out", 64, 64, 16)


def test_every_launch_holds_its_reference_and_a_wrong_one_does_not():
    device, dtype = torch.device("cpu"), torch.bfloat16
    op, sizes = suite.kernels.ops(device), suite.kernels.sizes_of("tiny")
    wrong = op._replace(**{name: _slightly_off(getattr(op, name)) for name in op._fields})
    for launch in suite.kernels.launches(sizes, 3, 5, partial_sums=True):
        facts = suite.kernels.check_launch(launch, op, device, dtype)
        assert facts["error"] <= facts["bound"]
        with pytest.raises(suite.checks.CheckFailed, match="relative error"):
            suite.kernels.check_launch(launch, wrong, device, dtype)


def _slightly_off(op):
    def off(*args, **kwargs):
        result = op(*args, **kwargs)
        if not isinstance(result, tuple):
            return 1.01 * result
        return tuple(None if each is None else 1.01 * each for each in result)

    return off


def test_references_are_computed_in_full_precision(monkeypatch, context):
    seen, right = [], suite.kernels.es_update_ref

    def noted(*args, **kwargs):
        seen.append(torch.get_float32_matmul_precision())
        return right(*args, **kwargs)

    before = torch.get_float32_matmul_precision()
    monkeypatch.setattr(suite.kernels, "es_update_ref", noted)
    monkeypatch.setattr(suite.model, "es_update_ref", noted)
    torch.set_float32_matmul_precision("high")
    try:
        suite.kernels.update_case(context, (2, 64))
        suite.model.update(context)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == ["highest"] * 3


def stub(seconds):
    return SimpleNamespace(device=torch.device("cpu"), time_left=lambda: seconds)


def test_a_part_that_cannot_be_done_in_time_is_not_begun(context):
    context.scale = dataclasses.replace(context.scale, part_seconds={"update": 1000, "step_small": 1000})
    record = suite.run.run(context, chosen=["update", "step_32"])
    assert [part["status"] for part in record["parts"].values()] == ["skipped", "skipped"]
    assert record["parts"]["update"]["reason"].startswith("needs about 1000 s, ")
    assert record["summary"]["update_share"]["verdict"] == "not measured"
    assert suite.run.needed(suite.context.SCALES["full"], "step_1024") == suite.context.PART_SECONDS["step_large"]
    named = {
        name.replace("_512", "_small").replace("_1024", "_large") for name in suite.run.parts(suite.context.Scale())
    }
    assert named == set(suite.context.PART_SECONDS)


def test_a_part_that_runs_past_the_budget_is_stopped(monkeypatch):
    def endless(context):
        while True:
            with contextlib.suppress(Exception):  # nothing in a part may take the stop for a failure of its own
                time.sleep(0.01)

    monkeypatch.setattr(suite.run, "GRACE", 0)
    outcome = suite.run.run_part(endless, stub(0.05))
    assert outcome["status"] == "skipped"
    assert "past the end of the budget" in outcome["reason"]


def test_a_device_that_has_failed_ends_the_run_and_the_part_is_named(monkeypatch, context, tmp_path):
    def lost(device=None):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    monkeypatch.setattr(torch.cuda, "empty_cache", lost)
    swallowed = SimpleNamespace(device=torch.device("cuda"), time_left=lambda: 100.0)
    outcome = suite.run.run_part(lambda context: {"peer": {"error": "illegal memory access"}}, swallowed)
    assert (outcome["status"], outcome["fatal"]) == ("error", True)
    assert "illegal memory access" in outcome["reason"]
    assert "peer" in outcome["result"]

    monkeypatch.setattr(suite.run, "run_part", lambda part, context, least: outcome)
    path = tmp_path / "record.json"
    suite.run.run(context, chosen=["linear", "update"], json_path=path)
    parts = json.loads(path.read_text())["parts"]
    assert parts["linear"]["status"] == "error"
    assert parts["update"] == {"status": "skipped", "reason": "the device failed in linear"}


def test_whatever_a_part_raises_is_stored():
    def leaves(context):
        raise SystemExit("a peer that ends the process")

    outcome = suite.run.run_part(leaves, stub(100.0))
    assert (outcome["status"], outcome["reason"]) == ("error", "SystemExit: a peer that ends the process")


def test_without_a_graph_all_is_measured_and_it_says_why(monkeypatch, context):
    context.check_members(32)
    right, asked = esengine.models.SanaSprint.denoise, []

    def denoise(self, *args, population=None, settings, **kwargs):
        asked.append(settings.graphs)
        if population is not None and settings.graphs != "never":
            raise RenderError("no CUDA graph could be captured (unsupported): render without")
        return right(self, *args, population=population, settings=settings, **kwargs)

    monkeypatch.setattr(esengine.models.SanaSprint, "denoise", denoise)
    monkeypatch.setattr(suite.context.graphs, "supported", lambda device: True)
    got = context.forward(context.model, 32, context.population)
    assert got.isfinite().all()
    assert asked == ["auto", "never"]
    assert "no CUDA graph could be captured" in context.how(32)["graphs"]
    context.forward(context.model, 32, context.population)
    assert asked[2:] == ["never"]


def test_a_step_says_how_it_decodes(monkeypatch, context, stored):
    part = stored[1]["parts"]["step_32"]["result"]
    assert (part["decode"], part["decode_by"]) == ("eager", "no figure of decode_32")  # measured after it
    assert (part["overlap"], part["overlap_by"]) == ("no", "no streams on this device")
    context.decode_modes[32] = "compiled"
    monkeypatch.setattr(suite.context.Context, "overlaps", lambda self: True)
    part = suite.run.run(context, chosen=["step_32"])["parts"]["step_32"]["result"]
    assert (part["decode"], part["overlap"], part["decode_by"]) == ("compiled", "yes", "the fastest in decode_32")
    assert set(part["stages"]["step"]) == {"transformer", "decode", "score", "update"}  # of steps in turn
    assert tiny_context(decode="compiled").how(32)["decode_by"] == "--decode"
    assert tiny_context().how(32)["decode_by"] == "no figure of decode_32"


def test_an_overlapped_task_has_the_scores_of_one_in_turn(context):
    context.scale = dataclasses.replace(context.scale, chunk=2)
    engine = context.engine()
    task, laps = engine.ask(), clock.Laps("cpu")
    given = context, context.model, task, 32, laps, engine.population
    assert torch.equal(suite.model._score_task(*given), suite.model._score_task(*given, overlap=True))


def test_cross_attention_is_timed_with_the_mask_that_the_model_passes(monkeypatch, context):
    passed, right = [], F.scaled_dot_product_attention

    def noted(q, k, v, attn_mask=None, **options):
        passed.append((q.shape, k.shape, attn_mask))
        return right(q, k, v, attn_mask=attn_mask, **options)

    model = suite.context.SCALES["tiny"]
    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    context.forward(context.plain, 32)
    (_, k, of_model), *_ = passed
    heads, width = k[1], k[1] * k[3]
    passed.clear()
    launch = suite.kernels.cross_launch("x", 1, 16, model.text_tokens, width, heads)
    launch.build(model.members, torch.device("cpu"), torch.float32)(suite.kernels.ops(torch.device("cpu")))
    (_, _, ours), *_ = passed
    assert ours.dtype == of_model.dtype
    assert torch.equal(ours.expand_as(of_model), of_model)
    assert (ours < 0).any()


def test_ceilings_of_smoke_are_those_of_this_device(tmp_path, capsys):
    path, device = tmp_path / "smoke.json", torch.device("cpu")
    ceilings = {"copy_gb_per_second": 10.0, "matmul_tflop_per_second": 0.1}
    path.write_text(json.dumps({"environment": {"device": suite.run.record.device_name(device)}, "ceilings": ceilings}))
    assert suite.run.smoke_ceilings(path, device) == ceilings
    path.write_text(json.dumps({"environment": {"device": "another"}, "ceilings": ceilings}))
    with pytest.raises(ValueError, match=r"--smoke: expected a record of .*is of another"):
        suite.run.smoke_ceilings(path, device)
    path.write_text("{}")
    with pytest.raises(SystemExit):
        suite.run.main(["--scale", "tiny", "--device", "cpu", "--smoke", str(path)])
    assert "--smoke: expected a record of device_smoke.py" in capsys.readouterr().err


def test_a_record_says_whose_ceilings_it_took(stored):
    source = stored[1]["settings"]["ceilings"]["source"]
    assert source == "this process's own product and copy"
    assert any(row[0] == f"ceilings: {source}" for row in suite.summary.rows(stored[1]["summary"]))
