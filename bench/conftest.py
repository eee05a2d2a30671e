"""pytest-benchmark on the kernels: correctness first, then the clock.

pytest bench                                        each op once, against its reference; no figures
pytest bench --benchmark-enable --benchmark-json=FILE   the same, and then the timings
pytest bench --benchmark-enable -m gpu               the real shapes, on a GPU
"""

import pytest
import torch

L2_BYTES = 1 << 27


@pytest.fixture(scope="session")
def limits():
    """`roofline.ceilings` of a device, found once a session."""
    from suite import roofline

    found = {}

    def of(device: str):
        if device not in found:
            found[device] = roofline.ceilings(device)
        return found[device]

    return of


@pytest.fixture(scope="session")
def device_at_hand():
    """device_at_hand(device) skips the test, and says why, where there is no such device."""

    def check(device: str):
        if device == "cuda" and not torch.cuda.is_available():
            pytest.skip("needs a CUDA device, torch sees none")

    return check


@pytest.fixture
def clock(benchmark, limits):
    """clock(call, work, device=, dtype=, **facts): time `call`, and store its work and share of the roofline.

    Rounds are synchronised; on a GPU each finds the L2 cache cold. A GPU's times include the launch, so those of a few
    microseconds say more about the host.
    """
    import record
    from suite import roofline

    def run(call, work: roofline.Work, *, device: str, dtype: torch.dtype, rounds: int = 12, **facts):
        cuda = torch.device(device).type == "cuda"
        flush = torch.empty(L2_BYTES, dtype=torch.int8, device=device) if cuda else None

        def cold():
            if cuda:
                flush.zero_()
                torch.cuda.synchronize()

        def target():
            call()
            if cuda:
                torch.cuda.synchronize()

        with torch.no_grad():
            benchmark.pedantic(target, setup=cold, rounds=rounds, warmup_rounds=2)
        benchmark.extra_info |= {**facts, **work._asdict(), "dtype": str(dtype).removeprefix("torch.")}
        if not benchmark.enabled:
            return
        benchmark.extra_info |= record.environment(device)
        ceilings = limits(device)
        if ceilings is not None:
            benchmark.extra_info |= {
                "roofline_share": roofline.share(benchmark.stats.stats.median, work, ceilings, dtype),
                "ceiling_flops": ceilings.flops[dtype],
                "ceiling_operations": ceilings.operations,
                "ceiling_bytes": ceilings.bytes,
            }

    return run
