"""Every Triton kernel compiles with the Triton that is installed, and the gate sees what it is there to see; no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

import aot  # noqa: E402
import triton.language as tl  # noqa: E402
from peft import LoraConfig  # noqa: E402
from suite import standin  # noqa: E402

import esengine  # noqa: E402
from esengine.kernels import Lora, MemberNoise, configs, population_linear  # noqa: E402
from esengine.models.families import REFERENCE_TARGETS  # noqa: E402
from esengine.models.sana import sana_block  # noqa: E402

SCRIPT = Path(aot.__file__)

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="compiled once, in the run without interpreter"
)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Not here: `with torch.device("meta")` knows torch.empty by the function that it is, and remembers it."""
    torch.utils._device._device_constructors.cache_clear()


@triton.jit
def gemm_kernel(
    x_ptr, w_ptr, y_ptr, K: tl.constexpr, EACH_ROUND: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr
):
    m, k = tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        x = tl.load(x_ptr + m[:, None] * K + k0 + k[None, :])
        w = tl.load(w_ptr + m[None, :] * K + k0 + k[:, None])
        acc = tl.dot(x, w, acc)
        if EACH_ROUND:
            acc += (k0 + m).to(tl.float32)[None, :]
    tl.store(y_ptr + m[:, None] * BLOCK + m[None, :], acc.to(tl.bfloat16))


@triton.jit
def rows_kernel(x_ptr, w_ptr, y_ptr, M: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    m, k = tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    w = tl.load(w_ptr + m[None, :] * BLOCK_K + k[:, None])
    for m0 in range(0, M, BLOCK):
        x = tl.load(x_ptr + (m0 + m)[:, None] * BLOCK_K + k[None, :])
        tl.store(y_ptr + (m0 + m)[:, None] * BLOCK + m[None, :], tl.dot(x, w).to(tl.bfloat16))


def row_of(kernel, shapes, **constants):
    tensors = [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes]
    settings = dict(BLOCK=128, BLOCK_K=64, num_warps=8, num_stages=3) | constants
    return aot.judge(*aot.compiled(kernel, tuple(tensors), settings, 90), 90)


def test_a_pipelined_product_passes():
    row = row_of(gemm_kernel, [(128, 16384), (128, 16384), (128, 128)], K=16384, EACH_ROUND=False)
    assert "fault" not in row
    assert (row["mma_kind"], row["spills"], row["main_loop"]) == ("wgmma", 0, True)
    assert set(row["waits"]["wgmma"]) == {1}
    assert min(row["waits"]["cp.async"]) > 0
    row = row_of(gemm_kernel, [(128, 512), (128, 512), (128, 128)], K=512, EACH_ROUND=False)
    assert "fault" not in row
    assert not row["main_loop"]


def test_a_sum_that_is_touched_in_every_round_is_a_serialised_loop():
    for length in (256, 16384):
        row = row_of(gemm_kernel, [(128, length), (128, length), (128, 128)], K=length, EACH_ROUND=True)
        assert 0 in row["waits"]["wgmma"]
        assert "serialised" in row["fault"]


def test_where_no_loop_is_left_most_waits_decide():
    assert aot.drains("", [0, 0, 0, 0], unrolled=True)
    assert not aot.drains("", [1, 1, 1, 0, 0], unrolled=True)


def test_a_loop_that_stores_its_products_in_every_round_must_wait_and_passes():
    row = row_of(rows_kernel, [(16384, 64), (128, 64), (16384, 128)], M=16384)
    assert 0 in row["waits"]["wgmma"]
    assert "fault" not in row


def test_a_spill_is_a_fault():
    shapes = [(256, 16384), (256, 16384), (256, 256)]
    row = row_of(gemm_kernel, shapes, K=16384, EACH_ROUND=False, BLOCK=256, num_warps=4, num_stages=2)
    assert row["spills"] > 0
    assert row["fault"] == "spills registers"


def test_more_shared_memory_than_there_is_is_a_fault():
    row = row_of(gemm_kernel, [(128, 16384), (128, 16384), (128, 128)], K=16384, EACH_ROUND=False, num_stages=8)
    assert "shared memory" in row["fault"]


def test_what_ptxas_says_of_serialised_products_is_a_fault(monkeypatch):
    said = """ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to x
        0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
    ptxas info    : Used 90 registers, used 1 barriers"""
    kernel = type("Kernel", (), {"asm": {"cubin": b""}, "metadata": type("Metadata", (), {"shared": 0})})
    monkeypatch.setattr(aot, "disassembly", lambda cubin: "")
    assert "serialized due to x" in aot.judge(kernel, said, 90)["fault"]


def test_the_main_loop_is_the_innermost_with_the_most_work_and_waits_moved_out_of_line_are_none():
    sass = """
.L_x_1:
        LDG R0 ;
.L_x_2:
        HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
.L_x_3:
        HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
   @!P0 BRA `(.L_x_2) ;
.L_x_4:
        HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
   @!P0 BRA `(.L_x_4) ;
   @!P1 BRA `(.L_x_1) ;
.L_x_5:
   @!P0 BRA `(.L_x_5) ;
        BRA `(.L_x_3);
"""
    loop = aot.main_loop(sass)
    assert loop.count("64x128x16") == 2
    assert "64x64x16" not in loop
    assert aot.main_loop("        HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;") == ""


def test_a_kernel_that_no_op_launches_is_named(monkeypatch):
    aot.launches.cache_clear()
    monkeypatch.setattr(aot, "OPS", tuple(op for op in aot.OPS if op is not aot.normals_cases))
    try:
        assert aot.unlaunched() == ["_normals_kernel"]
    finally:
        aot.launches.cache_clear()


def test_a_devices_file_adds_the_launches_that_it_changes(monkeypatch, tmp_path):
    contents = json.loads(configs.DEFAULT.read_text())
    contents["made"] |= {"device": "Toy GPU", "arch": 90}
    contents["ops"]["es_update"][0]["launch"]["num_warps"] = 8
    aot.launches.cache_clear()
    monkeypatch.setattr(configs, "FOLDER", tmp_path)
    try:
        usual = aot.launches()
        aot.launches.cache_clear()
        (tmp_path / "toy_gpu.json").write_text(json.dumps(contents))
        more = aot.launches()[len(usual) :]
        assert {launch.kernel.fn.__name__ for launch in more} == {"_update_kernel"}
        assert {(launch.file, launch.arch, launch.kwargs["num_warps"]) for launch in more} == {("toy_gpu.json", 90, 8)}
        assert len(more) == sum(launch.kernel.fn.__name__ == "_update_kernel" for launch in usual)
        row = aot.row_of(len(usual), 90)
        assert (row["file"], row["config"]["num_warps"], row["spills"]) == ("toy_gpu.json", 8, 0)
    finally:
        aot.launches.cache_clear()


POINTERS = (
    "bias_ptr",
    "h_ptr",
    "factors_ptr",
    "residual_ptr",
    "gate_ptr",
    "next_streams_ptr",
    "norm_k_ptr",
    "shift_ptr",
)


def given(kernel, args, kwargs) -> set[str]:
    """Operands of a launch that are not None."""
    values = dict(zip((p.name for p in kernel.params), args, strict=False)) | kwargs
    return {name.removesuffix("_ptr") for name in POINTERS if values.get(name) is not None}


FORWARD = [
    # to_out of the attention, cross-attention's to_out, q|k|v, text's k|v, the Mix-FFN's two
    ("_linear_kernel", "bias h residual gate next_streams", dict(K=2240, G=1, T=256)),
    ("_linear_kernel", "bias h factors residual", dict(K=2240, G=1, T=256)),
    ("_linear_kernel", "h factors", dict(K=2240, G=3, T=256)),
    ("_linear_kernel", "bias h factors", dict(K=2240, G=2, T=40)),
    ("_linear_kernel", "bias", dict(K=2240, G=1, T=256, ACTIVATION="silu")),
    ("_linear_kernel", "residual gate", dict(K=5600, G=1, T=256)),
    # caption, time
    ("_linear_kernel", "bias h factors next_streams", dict(K=2304, ACTIVATION="gelu_tanh", T=40)),
    ("_linear_kernel", "bias h", dict(K=2240, G=1, T=40)),
    ("_linear_kernel", "bias h", dict(K=256, T=1)),
    ("_shrink_kernel", "h factors shift", dict(G=3, MODULATED=True, stride_xk=1)),
    ("_shrink_kernel", "h factors", dict(G=2, MODULATED=False, T=40)),
    ("_factors_kernel", "", dict(G=3)),
    ("_mix_kernel", "h", dict(PARTS=70)),
    ("_mix_kernel", "h", dict(PARTS=18)),
    ("_attention_kernel", "next_streams norm_k", dict(T=256)),
    ("_attention_kernel", "next_streams norm_k", dict(T=1024)),
    ("_depthwise_gate_kernel", "bias", dict(W=32, C=5600)),
]


@pytest.mark.parametrize(("kernel", "operands", "constants"), FORWARD)
def test_the_gate_compiles_what_a_forward_at_full_size_launches(kernel, operands, constants):
    """Named one by one, as the forward's own record cannot show what is missing from it."""
    found = [
        launch
        for launch in aot.launches()
        if launch.kernel.fn.__name__ == kernel
        and launch.kwargs | constants == launch.kwargs
        and given(*launch[-3:]) == set(operands.split())
    ]
    assert any(launch.reference and launch.shape.startswith("forward: ") for launch in found)


CONSUMER = [
    # q|k|v's low-rank part in the attention and in the norm of k, to_out's with to_q's columns, cross to_out's with x
    ("_attention_kernel", "h factors next_streams norm_k", dict(G=3, T=256)),
    ("_attention_kernel", "h factors next_streams norm_k", dict(G=3, T=1024)),
    ("_rstd_kernel", "h factors", dict(G=3)),
    ("_residual_norm_kernel", "h factors residual gate next_streams", dict(N=2240, G=1)),
    ("_rms_norm_kernel", "h factors", dict(N=2240, G=1)),
    ("_residual_norm_kernel", "h factors residual shift", dict(N=2240, G=1)),
    ("_residual_norm_kernel", "residual gate", dict(N=2240, G=0)),
]


@pytest.mark.parametrize(("kernel", "operands", "constants"), CONSUMER)
def test_the_gate_compiles_the_consumer_path_of_a_forward(kernel, operands, constants):
    assert any(
        launch.kernel.fn.__name__ == kernel
        and launch.kwargs | constants == launch.kwargs
        and given(*launch[-3:]) == set(operands.split())
        and "consumer" in launch.shape
        for launch in aot.launches()
        if launch.shape.startswith("forward: ")
    )


def forward_launches(path="epilogue"):
    with aot.recorded_launches() as noted:
        for case in list(aot.forward_cases([path])):
            case.call()
    return noted


def test_a_forward_expands_every_target_of_the_reference_run_once():
    model = standin.transformer(device="meta", dtype=torch.bfloat16)
    model.transformer_blocks = model.transformer_blocks[:2]
    model.to_empty(device="cpu")  # attach wants weights in memory
    targets = len(esengine.attach(model, LoraConfig(target_modules=list(REFERENCE_TARGETS))).layers)
    assert targets == 24
    linears = [launch for launch in forward_launches() if launch[0].fn.__name__ == "_linear_kernel"]
    expanded = [launch[2]["G"] for launch in linears if "h" in given(*launch)]
    assert sum(expanded) == 2 * targets  # at two sizes
    consumers = [launch for launch in forward_launches("consumer") if "h" in given(*launch)]
    # k's norm reads the part that the attention adds, and shrink and mix make h
    passes = ("_rstd_kernel", "_shrink_kernel", "_mix_kernel")
    assert sum(launch[2]["G"] for launch in consumers if launch[0].fn.__name__ not in passes) == 2 * targets
    products = [launch for launch in forward_launches("consumer") if launch[0].fn.__name__ == "_linear_kernel"]
    # what is left to our GEMM are text, time and the output's projection
    assert all("h" not in given(*launch) or launch[2]["T"] <= 40 or launch[2]["N"] == 32 for launch in products)


def test_what_the_block_launches_is_what_is_compiled(monkeypatch):
    """The cases follow the block's own code."""
    assert any("next_streams" in given(*launch) for launch in forward_launches())
    assert {kwargs.get("stride_xk", 1) for _, _, kwargs in forward_launches()} == {1}  # also of the first block
    monkeypatch.setattr(sana_block, "takes_partial_sums", lambda *args: False)
    assert not any("next_streams" in given(*launch) for launch in forward_launches())


def perturbed_linear(n_in, tokens, step):
    ids = aot.empty(6, dtype=torch.int64)
    tensors = [aot.empty(*shape, dtype=torch.bfloat16) for shape in ((6, tokens, n_in), (64, n_in), (64,))]
    target = Lora(aot.empty(2, n_in), aot.empty(64, 2), 4.0, aot.empty(1, 4, dtype=torch.int64))
    return population_linear(*tensors, target, MemberNoise(ids, 0, step, 1e-2, 1))


@pytest.mark.parametrize("step", [3, "tensor"])
def test_the_settings_choose_the_path_by_shape(monkeypatch, tmp_path, step):
    """On `meta`, where nothing has a value: what waited for the device, as a graph's capture must not, would fail."""
    step = aot.empty(1, dtype=torch.int64) if step == "tensor" else step
    contents = json.loads(configs.DEFAULT.read_text())
    contents["paths"] = {"population_linear": [{"when": {"t": [17, None], "k": 128}, "path": "addmm"}]}
    file = tmp_path / "paths.json"
    file.write_text(json.dumps(contents))
    monkeypatch.setenv(configs.OVERRIDE, str(file))

    def launched(n_in, tokens):
        with aot.recorded_launches() as noted:
            y = perturbed_linear(n_in, tokens, step)
        assert (y.shape, y.dtype) == ((6, tokens, 64), torch.bfloat16)
        return [kernel.fn.__name__ for kernel, *_ in noted]

    assert launched(128, 17) == ["_factors_kernel", "_low_rank_kernel"]
    assert launched(128, 16) == launched(64, 17) == ["_factors_kernel", "_shrink_kernel", "_linear_kernel"]
    assert launched(64, 15) == ["_shrink_kernel", "_linear_kernel"]  # few rows: rebuilding costs less than storing


def test_launches_fold_only_into_one_kernel():
    """By what Triton specialises on: constants, dtypes, ones, multiples of 16 and the width of an integer."""
    first = aot.launches_with(configs.DEFAULT)[0]
    values = {**first.kwargs, "stride_xb": 1 << 20, "T": 7}

    def built(**changes):
        return aot.built_for(first._replace(kwargs={**values, **changes}))

    assert built() == built(stride_xb=16) == built(T=32) == built(sigma=3.0)
    apart = [built(**{name: value}) for name, value in (("stride_xb", 17), ("stride_xb", 1), ("stride_xb", 1 << 40))]
    apart += [built(), built(K=512), built(num_warps=8), built(sigma=3)]
    assert len(set(apart)) == len(apart)
    other = first._replace(args=(first.args[0].float(), *first.args[1:]))
    assert aot.built_for(other) != aot.built_for(first)


def test_a_cache_that_was_filled_is_taken_by_the_next_process(tmp_path):
    code = "import aot; every = aot.launches(); aot.launches = lambda: every[:2]; print(*aot.fill_cache(90))"
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(SCRIPT.parent)}
    said = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300
        )
        said.append(done.stdout.split())
    assert said == [["2", "2"], ["2", "0"]], done.stderr


@pytest.mark.slow  # as `make aot` does
def test_every_kernel_compiles_without_a_fault(tmp_path):
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, SCRIPT, "--json", tmp_path], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("aot: ")
    (table,) = (json.loads(path.read_text()) for path in tmp_path.glob("aot_sm90_triton-*.json"))
    rows = table["rows"]
    assert {row["kernel"] for row in rows} >= {"normals_kernel", "update_kernel"}
    assert table["unlaunched"] == []
    assert all("error" not in row and "fault" not in row and row["spills"] == 0 for row in rows)
    assert all(row["config"]["num_warps"] and row["registers"] for row in rows)
    shrinks = [row for row in rows if row["kernel"] == "shrink_kernel" and row["config"]["G"] == 3]
    assert any(0 < row["loop_instructions"] <= 400 for row in shrinks if row["config"]["R"] == 2)
    wide = [row for row in rows if row["kernel"] == "linear_kernel" and row["config"]["BLOCK_M"] >= 64]
    wide = [row for row in wide if "float32" not in row["shape"]]
    assert wide
    assert all(row["mma_kind"] == "wgmma" and min(row["waits"]["wgmma"]) > 0 for row in wide)
