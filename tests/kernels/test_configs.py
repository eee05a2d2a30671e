"""Launch settings: the file that is read, the entry that is taken, and what is wrong with a file that is not usable."""

import copy
import json

import pytest
import torch

from esengine.kernels import configs

CPU = torch.device("cpu")
LINEAR = dict(dtype="bfloat16", t=256, k=64, n=64, columns=3, residual=False, gated=False)


@pytest.fixture(autouse=True)
def no_override(monkeypatch):
    monkeypatch.delenv(configs.OVERRIDE, raising=False)


@pytest.fixture
def usual():
    """The default file's contents, free to be changed."""
    return copy.deepcopy(configs.load(configs.DEFAULT))


@pytest.fixture
def use(monkeypatch, tmp_path):
    """use(contents) makes them the file that launches read."""

    def put(contents) -> None:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        path.write_text(contents if isinstance(contents, str) else json.dumps(contents))
        monkeypatch.setenv(configs.OVERRIDE, str(path))

    return put


def test_the_default_file_serves_every_op():
    values = dict(dtype="float32", t=1, k=8, n=8, c=8, d=8, columns=3, gated=True, residual=True, modulated=False)
    values |= dict(height=4, width=4, channels=8, rows=2, cols=8, next_columns=3)
    for op, spec in configs.OPS.items():
        found = configs.settings(op, CPU, **{name: values[name] for name in spec.conditions})
        assert set(found) == set(spec.settings)
        assert set(spec.order) <= set(spec.settings)
    assert configs.load(configs.DEFAULT)["made"]["device"] is None


def test_the_first_entry_that_holds_is_taken(use, usual):
    entries = usual["ops"]["fused_linear"]

    def entry(block_k, **when):
        return {"when": when, "launch": entries[-1]["launch"] | {"BLOCK_K": block_k}}

    more = [entry(16, t=[None, 255]), entry(32, gated=True), entry(128, dtype="bfloat16", n=[64, 64], t=[256, None])]
    usual["ops"]["fused_linear"] = more + entries
    use(usual)

    def block_k(**changes):
        return configs.settings("fused_linear", CPU, **LINEAR | changes)["BLOCK_K"]

    assert block_k() == 128
    assert block_k(t=255) == 16
    assert block_k(t=255, gated=True) == 16
    assert block_k(gated=True) == 32
    assert block_k(n=65) == block_k(n=63) == block_k(dtype="float16") == 64


def test_the_files_that_come_with_the_package_are_usable():
    files = sorted(configs.FOLDER.glob("*.json"))
    assert {path.name for path in files} >= {"default.json", "sm_90.json"}
    for path in files:
        assert configs.load(path)["made"]["arch"] == (90 if path.name == "sm_90.json" else None)


def test_what_a_caller_does_to_its_settings_stays_with_it():
    configs.settings("fused_linear", CPU, **LINEAR)["BLOCK_M"] = 0
    assert configs.settings("fused_linear", CPU, **LINEAR)["BLOCK_M"] == 128


def test_order_changes_with_what_sets_the_order_of_a_sum_and_with_nothing_else(use, usual):
    plain = configs.describe(CPU)
    assert plain["file"] == "default.json"
    launch = usual["ops"]["fused_linear"][-1]["launch"]

    launch["num_stages"] += 1
    use(usual)
    other = configs.describe(CPU)
    assert other["file"].endswith(".json")
    assert other["order"] == plain["order"]
    assert other["sha256"] != plain["sha256"]

    launch["BLOCK_K"] *= 2
    use(usual)
    assert configs.describe(CPU)["order"] != plain["order"]


def test_a_device_has_its_own_file_or_the_default_one(monkeypatch, tmp_path, usual):
    assert configs.slug("NVIDIA H100 80GB HBM3") == "nvidia_h100_80gb_hbm3"
    monkeypatch.setattr(configs, "FOLDER", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Toy GPU-{device.index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0) if device.index < 9 else (8, 0))
    path, sm_90 = tmp_path / "toy_gpu_7.json", tmp_path / "sm_90.json"
    for each in (path, sm_90):
        each.write_text(json.dumps(usual))
    assert configs.config_file(torch.device("cuda:7")) == path
    assert configs.config_file(torch.device("cuda:8")) == sm_90
    assert configs.config_file(torch.device("cuda:9")) == configs.DEFAULT
    assert configs.config_file(CPU) == configs.DEFAULT
    configs._device_file.cache_clear()


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("ops",), [], "ops: expected an object"),
        (("ops", "nosuch"), [], "ops: expected .*, got .*nosuch"),
        (("ops", "shrink"), ..., "ops: expected .*shrink.*, got "),
        (("ops", "shrink"), [], r"shrink: expected a last entry for every launch"),
        (("ops", "shrink", 0), 3, r"shrink\[0\]: expected an object, got 3"),
        (("ops", "shrink", 0, "launch"), ..., r"shrink\[0\]: expected launch, measured, when, got when"),
        (("ops", "shrink", 0, "launch", "num_warps"), ..., r"shrink\[0\].launch: expected .*num_warps.*, got .*"),
        (("ops", "shrink", 0, "launch", "BLOCK_M"), 16, r"shrink\[0\].launch: expected .*, got .*BLOCK_M"),
        (("ops", "shrink", 0, "when", "batch"), 64, r"shrink\[0\].when: expected .*, got batch"),
        (("ops", "shrink", -1, "when"), {"t": 4}, r"shrink: expected a last entry for every launch"),
        (("ops", "shrink", 0, "when", "t"), [1, 2, 3], r"when.t: expected a value or \[least, most\], got \[1, 2, 3\]"),
        (("ops", "shrink", 0, "when", "t"), ["a", None], r"when.t: expected a value or \[least, most\]"),
        (("ops", "mix"), None, r"mix: expected a list of entries, got None"),
        (("ops", "shrink", 0, "launch", "BLOCK_K"), 0, r"launch.BLOCK_K: expected a positive integer, got 0"),
        (("ops", "shrink", 0, "launch", "BLOCK_K"), "64", r"launch.BLOCK_K: expected a positive integer, got '64'"),
    ],
)
def test_a_file_that_is_not_usable_is_refused_with_the_place(use, usual, place, value, said):
    inner = usual
    for name in place[:-1]:
        inner = inner[name]
    if value is ...:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    use(usual)
    with pytest.raises(ValueError, match=rf"\.json: .*{said}"):
        configs.settings("fused_linear", CPU, **LINEAR)


def test_no_file_and_no_json_are_named(use, monkeypatch, tmp_path):
    use("{")
    with pytest.raises(ValueError, match=r"0\.json: expected a JSON file of launch settings"):
        configs.describe(CPU)
    monkeypatch.setenv(configs.OVERRIDE, str(tmp_path / "absent.json"))
    with pytest.raises(ValueError, match=r"absent\.json: expected a JSON file of launch settings, got .*No such file"):
        configs.describe(CPU)


SHAPE = dict(dtype="bfloat16", t=256, k=64, n=64)


def test_the_path_of_a_shape(use, usual):
    assert configs.path("population_linear", CPU, **SHAPE) == "epilogue"
    plain = configs.describe(CPU)["order"]
    entries = [{"when": {"t": [256, None]}, "path": "addmm"}, {"when": {}, "path": "epilogue"}]
    use(usual | {"paths": {"population_linear": entries}})
    assert configs.path("population_linear", CPU, **SHAPE) == "addmm"
    assert configs.path("population_linear", CPU, **SHAPE | {"t": 255}) == "epilogue"
    assert configs.describe(CPU)["order"] != plain  # torch's product sums in an order of its own
    use(usual | {"paths": {"population_linear": entries[:1]}})
    assert configs.path("population_linear", CPU, **SHAPE | {"t": 255}) == "epilogue"
    use(usual | {"paths": {}})
    assert configs.path("population_linear", CPU, **SHAPE) == "epilogue"
    assert configs.describe(CPU)["order"] == plain
    assert configs.path("sana_block", CPU, dtype="bfloat16", t=256) == "epilogue"
    use(usual | {"paths": {"sana_block": [{"when": {}, "path": "consumer"}]}})
    assert configs.path("sana_block", CPU, dtype="bfloat16", t=256) == "consumer"
    assert configs.describe(CPU)["order"] != plain


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([], r"paths: expected an object, got \[\]"),
        ({"population_linear": None}, "population_linear: expected a list of entries, got None"),
        ({"shrink": []}, "paths: expected population_linear, sana_block, got shrink"),
        (
            {"population_linear": [{"when": {}}]},
            r"paths\.population_linear\[0\]: expected measured, path, when, got when",
        ),
        (
            {"population_linear": [{"when": {"gated": True}, "path": "epilogue"}]},
            r"population_linear\[0\]\.when: expected dtype, k, n, t, got gated",
        ),
        (
            {"population_linear": [{"when": {}, "path": "loop"}]},
            r"population_linear\[0\]\.path: expected one of epilogue, addmm, got 'loop'",
        ),
        (
            {"sana_block": [{"when": {"k": 8}, "path": "consumer"}]},
            r"sana_block\[0\]\.when: expected dtype, t, got k",
        ),
        (
            {"sana_block": [{"when": {}, "path": "addmm"}]},
            r"sana_block\[0\]\.path: expected one of epilogue, consumer, got 'addmm'",
        ),
    ],
)
def test_paths_that_are_not_usable_are_named(use, usual, paths, message):
    use(usual | {"paths": paths})
    with pytest.raises(ValueError, match=message):
        configs.path("population_linear", CPU, **SHAPE)
