import pytest
import record
import roofline
import torch


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
