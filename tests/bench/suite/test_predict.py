"""Predictions stand in the notes as the roofline gives them, and the suite's launches are those of a forward."""

from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import aot
import suite.kernels
import suite.ops
import suite.predict
from peers.reference_loop import TARGETS
from peft import LoraConfig
from suite import standin
from suite.context import SCALES

import esengine
from esengine.kernels import Lora, MemberNoise, population_linear
from esengine.models.sana.sana_block import fused_parts, patched

NOTES = Path(suite.predict.__file__).parents[1] / "NOTES.md"


def test_the_notes_have_the_tables():
    lines = NOTES.read_text(encoding="utf-8").splitlines()
    assert [line for line in suite.predict.tables() if line not in lines] == []


def test_predictions_follow_their_assumptions():
    full, slow = (suite.predict.predictions(suite.predict.Case(gemm, 1.0)) for gemm in (1.0, 0.8))
    for name, value in full.items():
        assert value >= slow[name] or name.startswith("share"), name
    # 2240 -> 2240, 256 rows: a pass of 24.5 us beside 219.2 us
    assert suite.predict.linear_alone(2240, 2240, 256, suite.predict.CASES[0]) == pytest.approx(0.888, abs=2e-3)
    ours, plain = suite.predict.forwards(16, suite.predict.CASES[0])
    assert 0.05 < ours < plain < 0.12


def kinds(noted) -> Counter:
    """How often each launch was made, by what tells one of a kernel from another."""
    told = ("M", "N", "K", "T", "G", "R", "H", "C", "PARTS", "ACTIVATION", "WIDTH")
    given = ("bias_ptr", "factors_ptr", "residual_ptr", "gate_ptr", "next_streams_ptr")

    def kind(kernel, args, kwargs):
        values = dict(zip((p.name for p in kernel.params), args, strict=False)) | kwargs
        facts = [(name, values[name]) for name in told if name in values]
        return kernel.fn.__name__, *facts, *((name, values[name] is not None) for name in given if name in values)

    return Counter(kind(*launch) for launch in noted)


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def forward(side, text):
    """Launches of a forward of two blocks."""
    model = standin.transformer(device="meta", dtype=torch.bfloat16)
    model.transformer_blocks = model.transformer_blocks[:2]
    inputs = dict(encoder_attention_mask=empty(64, text, dtype=torch.int64), timestep=empty(64), guidance=empty(64))
    model.to_empty(device="cpu")  # attach wants weights in memory
    population = esengine.attach(model, LoraConfig(r=2, lora_alpha=8, target_modules=list(TARGETS)))
    model.to("meta")
    with population.perturbed(step=1, members=torch.arange(64)), aot.recorded_launches() as noted:
        parts = fused_parts(model, True)
        assert parts
        with patched(parts, population.perturbation):
            model(empty(64, 32, side, side), empty(64, text, 2304), **inputs)
    return kinds(noted)


@pytest.mark.parametrize("side", [16, 32])
def test_the_suite_has_every_launch_of_a_forward(side):
    text, measured = 40, Counter()
    for launch in suite.kernels.launches(suite.ops.sizes_of("full"), side, text, partial_sums=True):
        with aot.recorded_launches():
            call = launch.build(64, torch.device("meta"), torch.bfloat16)
        with aot.recorded_launches() as noted:
            call(suite.ops.TRITON)
        for kind, times in kinds(noted).items():
            measured[kind] += times * (2 if launch.times > 1 else 1)
    with aot.recorded_launches() as noted:
        for n_in, n_out, tokens in SCALES["full"].other_linears:
            x, weight, bias = empty(64, tokens, n_in), empty(n_out, n_in), empty(n_out)
            a, b = empty(2, n_in, dtype=torch.float32), empty(n_out, 2, dtype=torch.float32)
            lora = Lora(a, b, 4.0, empty(1, 4, dtype=torch.int64))
            population_linear(x, weight, bias, lora, MemberNoise(empty(64, dtype=torch.int64), 0, 1, 1e-2, 1))
    others = kinds(noted)
    with torch.no_grad(), aot.recorded_launches():
        made = forward(side, text)
    assert {kind[0] for kind in made} >= {"_linear_kernel", "_shrink_kernel", "_mix_kernel", "_attention_kernel"}
    assert [kind for kind in made if kind not in measured and kind not in others] == []
    assert {kind: made[kind] for kind in measured if kind not in others} == {
        kind: times for kind, times in measured.items() if kind not in others
    }
