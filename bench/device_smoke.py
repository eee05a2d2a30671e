"""What a device is, before anything else runs there: versions, the hash of Triton's key, and two ceilings.

    python bench/device_smoke.py [--device cuda|cpu] [--json FILE]

The ceilings are what a copy and a plain matrix product reach. They are the best of several calls, for comparing other
figures of the same session with.
"""

import argparse
import hashlib
import time
from pathlib import Path
from typing import Any

import record
import torch

COPIES = {"cuda": 1 << 30, "cpu": 1 << 26}
"""Bytes that are copied."""
WIDTHS = {"cuda": 8192, "cpu": 512}
"""Of the square matrices."""
CALLS = 10


def triton_key() -> str | None:
    """SHA-256 of what Triton's cache is keyed with; None without Triton. Caches fit where it is the same."""
    try:
        from triton.compiler.compiler import triton_key as key
    except ImportError:
        try:
            from triton.runtime.cache import triton_key as key
        except ImportError:
            return None
    return hashlib.sha256(key().encode()).hexdigest()


def seconds(call, device: torch.device) -> float:
    """The shortest of several calls, after one that is not counted."""
    times = []
    for _ in range(CALLS + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def ceilings(device: torch.device) -> dict[str, float]:
    """GB/s of a copy, read and write counted, and TFLOP/s of a product of square bfloat16 matrices.

    The matrices are random: a GPU runs faster on constant ones, which draw less power.
    """
    count, width = COPIES[device.type], WIDTHS[device.type]
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(width, width, dtype=torch.bfloat16, device=device) for _ in range(2))
    return {
        "copy_gb_per_second": 2 * count / seconds(lambda: target.copy_(source), device) / 1e9,
        "matmul_tflop_per_second": 2 * width**3 / seconds(lambda: a @ b, device) / 1e12,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=COPIES, default="cuda")
    parser.add_argument("--json", type=Path, help="store the record there")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device: torch sees no CUDA device; cpu rehearses without one")
    found: dict[str, Any] = {"environment": record.environment(device), "triton_key": triton_key()}
    found["ceilings"] = ceilings(device)
    print(f"{found['environment']['device']}, {found['environment']['versions']}")
    for name, value in found["ceilings"].items():
        print(f"{name} {value:.4g}")
    if options.json is not None:
        record.write(options.json, found)


if __name__ == "__main__":
    main()
