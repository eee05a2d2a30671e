"""Compile every Triton kernel at SANA-Sprint's shapes for a GPU that is not there, and report what the compiler made.

    python bench/aot.py [--arch 90] [--json FILE]

The public ops are called on tensors without storage, and each launch they make is compiled, with the launcher's own
configuration, instead of run. Exit code 1 if a kernel does not compile or spills registers.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import record
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from esengine.kernels import es_update, linear_streams, normals, population_linear
from esengine.kernels.noise import uses_triton

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
}


@contextmanager
def recorded_launches() -> Iterator[list[tuple[JITFunction, tuple, dict]]]:
    """Inside, the ops take the Triton path on meta tensors and their launches are noted, not made."""
    launches = []

    def record(kernel, *args, grid, warmup, **kwargs):
        launches.append((kernel, args, kwargs))

    modules = [sys.modules[f"esengine.kernels.{name}"] for name in ("noise", "population_linear", "es_update")]
    with patch.object(JITFunction, "run", record):
        patches = [patch.object(module, uses_triton.__name__, lambda device: True) for module in modules]
        for each in patches:
            each.start()
        try:
            yield launches
        finally:
            for each in patches:
                each.stop()


def compile_launch(kernel: JITFunction, args: tuple, kwargs: dict, arch: int):
    """The compiled kernel of one recorded launch, specialised as the runtime would on aligned pointers."""
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    options = {name: values.pop(name) for name in ("num_warps", "num_stages") if name in values}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        one = type(value) is int and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or one:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = parameter.annotation_type or "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(compiled) -> dict[str, int]:
    """Registers, stack bytes and spill instructions from the machine code; tensor-core instructions from the PTX."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        sass = subprocess.run([tools / "nvdisasm", file.name], capture_output=True, text=True, check=True).stdout
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "shared": compiled.metadata.shared,
        "mma": len(re.findall(r"wgmma\.mma_async|mma\.sync", compiled.asm["ptx"])),
    }


def launches_of_every_kernel() -> Iterator[tuple[str, list]]:
    """The ops at the reference run's targets: attention, text tokens, time embedding, output projection."""

    def empty(*shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype, device="meta")

    shapes = [
        (2240, 2240, 1024),
        (2240, 2240, 256),
        (2304, 2240, 40),
        (2240, 13440, 1),
        (2240, 32, 1024),
        (256, 2240, 1),
    ]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for r, k in ((2, 1), (16, 4), (0, 1)):
            for n_in, n_out, tokens in shapes if (dtype, r) == (torch.bfloat16, 2) else shapes[2:4]:
                with recorded_launches() as launches:
                    a, b = (empty(r, n_in), empty(n_out, r)) if r else (None, None)
                    x, w = empty(64, tokens, n_in, dtype=dtype), empty(n_out, n_in, dtype=dtype)
                    population_linear(
                        x, w, empty(n_out, dtype=dtype), a, b, members=empty(64, dtype=torch.int64),
                        streams=linear_streams("x", direct=r == 0), seed=0, step=1, sigma=1e-2, rank=k,
                    )  # fmt: skip
                name = str(dtype).removeprefix("torch.")
                yield f"{n_in}->{n_out} x{tokens} {name} r{r} k{k}", launches
    with recorded_launches() as launches:
        population_linear(
            empty(64, 256, 2240), empty(2240, 2240), None, empty(2, 2240), empty(2240, 2),
            members=empty(64, dtype=torch.int64), streams=linear_streams("x"), seed=0, step=1, sigma=1e-2, rank=1,
        )  # fmt: skip
    yield "2240->2240 x256 float32 r2 k1", launches
    for shape, k in (((2, 2240), 1), ((13440, 16), 4), ((2240, 2240), 1)):
        with recorded_launches() as launches:
            es_update(empty(128), shape=shape, stream_u=1, stream_v=2, seed=0, step=1, rank=k)
        yield f"{shape[0]}x{shape[1]} k{k}", launches
    with recorded_launches() as launches:
        ids = empty(8, dtype=torch.int64)
        normals(seed=0, step=1, streams=ids, pairs=ids, count=32768, device="meta")
    yield "8x32768", launches


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", type=int, default=90, help="compute capability, 90 for Hopper")
    parser.add_argument("--json", type=Path, help="also write the table there")
    options = parser.parse_args()
    rows, failed = [], 0
    for shape, launches in launches_of_every_kernel():
        for kernel, args, kwargs in launches:
            row = {"kernel": kernel.fn.__name__.strip("_"), "shape": shape}
            try:
                row |= resources(compile_launch(kernel, args, kwargs, options.arch))
                bad = row["spills"] > 0
            except Exception as error:  # the report names every kernel that fails, not only the first
                row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
                bad = True
            failed += bad
            rows.append(row)
            print(
                "FAIL" if bad else "ok  ",
                "  ".join(
                    f"{value}" if name in ("kernel", "shape") else f"{name} {value}" for name, value in row.items()
                ),
            )
    if options.json:
        record.write(options.json, {"what": "bench/aot.py", "arch": options.arch, "rows": rows, **record.environment()})
    print(
        f"aot: {len(rows) - failed} of {len(rows)} kernels compile for sm_{options.arch} without spills, "
        f"triton {triton.__version__}"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
