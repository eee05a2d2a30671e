import pytest
import record
import suite.decode
import torch
from suite import roofline


def test_work_of_a_population_linear_by_hand():
    # 4 rows, 2 members, 8 -> 4, r 2, k 1, fp32: products of 3 columns beside the plain 2 * 4 * 8 * 4
    work = roofline.population_linear_work(rows=4, members=2, n_in=8, n_out=4, r=2, k=1, itemsize=4)
    assert work.flops == 256 + 2 * 4 * 8 * 3 + 2 * 4 * 3 * 3 + 2 * 4 * 3 * 4
    assert work.bytes == 4 * (32 + 32 + 16 + 4) + 4 * 2 * (8 + 4) + 8 * 2
    # one pair: 8 / 4 and 4 / 4 counters of four for V and U', one each for U and V'
    assert work.operations == 5 * (83 + 4 * 33)


def test_direct_form_has_no_mix_and_no_adapter():
    sizes = dict(rows=4, n_in=8, n_out=4, itemsize=2)
    plain = roofline.linear_work(**sizes)
    work = roofline.population_linear_work(**sizes, members=2, r=0, k=1)
    assert work.flops - plain.flops == 2 * 4 * (8 + 4)
    assert work.bytes - plain.bytes == 8 * 2


def test_a_linear_in_parts_is_the_linear_and_its_h_written_and_read():
    low = dict(members=2, r=2, k=1)
    whole = roofline.population_linear_work(rows=4, n_in=8, n_out=4, itemsize=2, **low)
    shrink = roofline.shrink_work(rows=4, n_in=8, targets=1, itemsize=2, **low)
    expand = roofline.fused_linear_work(rows=4, n_in=8, n_out=4, targets=1, itemsize=2, **low)
    assert shrink.flops + expand.flops == whole.flops
    # x twice, h written and read; of the noise, U and V' are in neither
    assert shrink.bytes + expand.bytes == whole.bytes + 2 * 32 + 2 * 4 * 4 * 3 - 8 * 2
    assert shrink.operations + expand.operations == 3 * (83 + 4 * 33)


def test_work_of_a_block_by_hand():
    plain = roofline.shrink_work(rows=4, members=2, n_in=8, targets=0, itemsize=2, modulated=True)
    assert plain == roofline.Work(0, 5 * 32, 2 * (2 * 32 + 2 * 2 * 8))
    # three shares of three columns of four rows, and h
    assert roofline.mix_work(rows=4, parts=3, r=2, k=1) == roofline.Work(2 * 4 * 9, 36, 4 * 12 * 4)
    sizes = dict(rows=4, members=2, n_in=8, n_out=4, itemsize=2)
    bare = roofline.fused_linear_work(**sizes)
    assert bare == roofline.linear_work(rows=4, n_in=8, n_out=4, itemsize=2)
    ended = roofline.fused_linear_work(**sizes, residual=True, gated=True, r=2, k=1, next_columns=3, parts=2)
    assert ended.bytes - bare.bytes == 2 * (16 + 8) + 4 * 4 * 2 * 3
    assert ended.flops - bare.flops == 2 * 4 * 4 * 3
    # two tokens look at three words in two heads of four
    cross = roofline.cross_attention_work(batch=1, tokens=2, text=3, heads=2, width=4, itemsize=2)
    assert cross == roofline.Work(4 * 2 * 3 * 2 * 4, 5 * 12, 2 * 2 * (2 + 3) * 8)
    summed = roofline.linear_attention_work(batch=1, tokens=2, heads=2, width=4, itemsize=2, next_columns=3)
    assert summed.bytes == 4 * (4 * 2 * 4 + 4 * 3)
    assert roofline.norm_work(rows=2, columns=4, itemsize=2).bytes == 2 * (8 + 8 + 4)


def test_products_of_a_module_are_counted_without_running_it():
    x, w = torch.empty(4, 8, device="meta"), torch.empty(4, 8, device="meta")
    work = roofline.products(lambda: torch.nn.functional.linear(x, w).relu())
    assert work == roofline.Work(2 * 4 * 8 * 4, 0, 4 * (32 + 32 + 16))


def test_decoder_and_scorer_are_those_of_the_published_configurations():
    small, large = (suite.decode.decode_work("full", pixels, 1) for pixels in (512, 1024))
    assert small.flops == pytest.approx(2.092e12, rel=1e-3)
    assert large.flops == pytest.approx(4 * small.flops, rel=1e-3)
    assert suite.decode.decode_work("full", 1024, 1, lite=True).flops < large.flops
    one, many = (suite.decode.score_work("full", images) for images in (1, 8))
    assert one.flops == pytest.approx(0.3346e12, rel=1e-3)
    assert many.flops == 8 * one.flops
    assert many.bytes < 8 * one.bytes  # the weights are read once


def test_share_is_of_the_tightest_ceiling():
    limits = roofline.Ceilings({torch.float32: 100.0}, operations=10.0, bytes=1000.0)
    assert roofline.share(2.0, roofline.Work(100, 0, 1000), limits) == 0.5
    assert roofline.share(4.0, roofline.Work(100, 20, 1000), limits) == 0.5
    assert roofline.share(4.0, roofline.Work(100, 0, 4000), limits) == 1.0
    with pytest.raises(ValueError, match="dtype"):
        roofline.share(1.0, roofline.Work(1, 1, 1), limits, torch.bfloat16)
    with pytest.raises(ValueError, match="seconds"):
        roofline.share(0.0, roofline.Work(1, 1, 1), limits)


def test_summary_and_ratio():
    slow, fast = record.summary([4.0, 2.0, 8.0, 6.0, 10.0]), record.summary([2.0, 1.0, 4.0, 3.0, 5.0])
    assert (slow["median"], slow["samples"][0]) == (6.0, 4.0)
    assert slow["p20"] == pytest.approx(3.6)
    assert slow["p80"] == pytest.approx(8.4)
    assert record.ratio(slow, fast)["paired_p80"] == record.ratio(slow, fast)["of_medians"] == 2.0


def test_a_device_is_known_by_its_name():
    known = roofline.choose("NVIDIA H200")
    assert known.ceilings == roofline.KNOWN["H200"]
    assert (known.ceilings.flops[torch.bfloat16], known.ceilings.bytes) == (788e12, 4.3e12)
    assert roofline.choose("NVIDIA H100 80GB HBM3").ceilings.flops[torch.bfloat16] == 750e12
    for name in ("NVIDIA GH200 480GB", "NVIDIA A100-SXM4-80GB"):
        unknown = roofline.choose(name)
        assert unknown.ceilings is None
        assert unknown.source == f"unknown device {name}: no ceilings"
        assert unknown.record() == {"source": unknown.source}


def test_what_smoke_has_measured_goes_before_the_table():
    measured = {"copy_gb_per_second": 4000.0, "matmul_tflop_per_second": 700.0}
    known = roofline.choose("NVIDIA H200", measured)
    assert (known.ceilings.flops[torch.bfloat16], known.ceilings.bytes) == (700e12, 4e12)
    assert known.ceilings.flops[torch.float32] == roofline.KNOWN["H200"].flops[torch.float32]
    assert known.ceilings.operations == roofline.KNOWN["H200"].operations
    assert "measured by smoke" in known.source
    assert known.record()["flops"]["bfloat16"] == 700e12
    unknown = roofline.choose("NVIDIA A100", measured)
    assert "unknown device" in unknown.source
    assert unknown.record()["operations"] is None
    work = roofline.Work(7e12, 1e30, 0)
    assert roofline.share(0.01, work, unknown.ceilings, torch.bfloat16) == 1.0
