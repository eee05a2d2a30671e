"""Whatever a file holds, its reader gives a result or an error of ours.

The five readers have 500 examples together, and 10,000 in the slow run.
"""

import copy
import json

import pytest
import torch
import yaml
from hostile import no_hang
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save

from esengine.base.errors import ConfigError, EsengineError
from esengine.base.prompt_files import COLUMNS, read_prompt_file
from esengine.es.lora_folder import read_lora
from esengine.evaluation.benchmarks import read_benchmark
from esengine.models.lora_file import check_diffusers_lora
from esengine.report import write_training_page
from esengine.run import journal
from esengine.run.settings import TrainConfig, load, started, to_dict

REGULAR = dict(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
READING = (OSError, ValueError, SafetensorError)
EACH = [pytest.param(100, id="100"), pytest.param(2_000, id="2000", marks=pytest.mark.slow)]

WORDS = st.text(max_size=12) | st.sampled_from(
    [*"\0\n\t\r,;|\"'#[]{}:", "\x1b[31m", "\u202e", "\ufeff", "=1+1", "<b>", "../x", "1e999", "-0", "prompt", "step"]
)
NUMBERS = st.integers() | st.floats() | st.sampled_from([10**30, 10**900, -(2**63), 2**53, 1e308, 3.5e38, 0, -1])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=8,
)


def changed(data: st.DataObject, value):
    """A copy of nested JSON values in which a few items are replaced, added or removed."""
    value = copy.deepcopy(value)
    for _ in range(data.draw(st.integers(1, 3))):
        place = value
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = data.draw(st.sampled_from(keys))
            if isinstance(place[key], (dict, list)) and data.draw(st.booleans()):
                place = place[key]
                continue
            if data.draw(st.integers(0, 4)):
                place[key] = data.draw(JSON)
            else:
                del place[key]
            break
        if isinstance(place, dict) and data.draw(st.booleans()):
            place[data.draw(WORDS)] = data.draw(JSON)
    return value


def damaged(data: st.DataObject, content: bytes) -> bytes:
    """The bytes as they are, or with a few of them replaced."""
    if not content or data.draw(st.integers(0, 3)):
        return content
    at = data.draw(st.integers(0, len(content) - 1))
    return content[:at] + data.draw(st.binary(max_size=6)) + content[at + data.draw(st.integers(0, 3)) :]


def examples(count: int, test, *arguments) -> None:
    """Run a test of (data, *arguments) on so many examples."""

    @settings(max_examples=count, **REGULAR)
    @given(data=st.data())
    def run(data):
        with no_hang(20):
            test(data, *arguments)

    run()


def outcome(read, *errors: type[Exception]):
    """What a reader returned and None, or None and the message of its error. Other errors fail the test."""
    try:
        return read(), None
    except errors as error:
        return None, str(error)


def start() -> dict:
    identity = {name: kind() for name, kind in journal.IDENTITY.items()}
    values = to_dict(TrainConfig()) | {"population": 4, "reward": "pickscore"}
    return {"kind": "start", "step": 0, "settings": values, "identity": identity}


def run_lines() -> list[dict]:
    held = {"pickscore": {"mean": 1.0, "change": 0.0, "standard_error": None, "each": [1.0, None]}}
    measured = {"kind": "held_out", "scores": held, "optimised": "pickscore", "parted": [], "of": {"prompts": ["a"]}}
    step = {
        "kind": "step",
        "fitness": [1.0, -1.0, 0.5, -0.5],
        "metrics": {"reward": 1.0, "seconds": 0.1, "x_norm": None},
    }
    lines = [start(), measured | {"step": 0}, step | {"step": 0}, {"kind": "saved", "step": 1, "adapter_sha256": "ab"}]
    return [*lines, step | {"step": 1}, measured | {"step": 2}]


@pytest.mark.parametrize("count", EACH)
def test_journals(count, tmp_path):
    def test(data):
        lines = changed(data, run_lines())
        content = "".join(json.dumps(line) + "\n" for line in lines).encode()
        (tmp_path / journal.NAME).write_bytes(damaged(data, content))
        for read in (lambda path: started(journal.read(path)), lambda path: write_training_page(path.parent)):
            _, problem = outcome(lambda read=read: read(tmp_path / journal.NAME), EsengineError)
            assert problem is None or journal.NAME in problem

    examples(count, test)


@pytest.mark.parametrize("count", EACH)
def test_yaml(count, tmp_path):
    def test(data):
        if data.draw(st.booleans()):
            content = yaml.safe_dump(changed(data, to_dict(TrainConfig())), sort_keys=False).encode("utf-8", "replace")
        else:
            content = data.draw(st.text(alphabet=st.sampled_from("ab01:-,.[]{}&*!|>'\"#?%@` \n\t<=~_eExof")))[
                :200
            ].encode()
        (tmp_path / "c.yaml").write_bytes(damaged(data, content))
        found, problem = outcome(lambda: load(tmp_path / "c.yaml"), ConfigError)
        assert isinstance(found, TrainConfig) if problem is None else "c.yaml" in problem

    examples(count, test)


CELLS = (
    st.text(max_size=10)
    | WORDS
    | st.sampled_from(["Prompt", "prompts", "Category", "challenge", "a fox", '"a ""b""', ""])
)


def prompt_text(data: st.DataObject, form: str) -> str:
    rows = data.draw(st.lists(st.lists(CELLS, max_size=4), max_size=6))
    if form == ".jsonl":
        return "\n".join(json.dumps(data.draw(JSON | st.fixed_dictionaries({"prompt": JSON}))) for _ in rows)
    if form == ".json":
        return json.dumps(data.draw(JSON | st.lists(st.fixed_dictionaries({"prompt": WORDS}), max_size=3)))
    head = ["Prompt", "Category", "Challenge"][: data.draw(st.integers(0, 3))]
    return "\n".join({".csv": ","}.get(form, "\t").join(row) for row in [head, *rows])


@pytest.mark.parametrize("count", EACH)
@pytest.mark.parametrize(
    "reader", [read_prompt_file, lambda path: read_benchmark(str(path))], ids=["prompts", "benchmark"]
)
def test_prompts(count, reader, tmp_path):
    def test(data):
        form = data.draw(st.sampled_from([".tsv", ".csv", ".jsonl", ".json", ".txt", ""]))
        file = tmp_path / f"p{form}"
        file.write_bytes(damaged(data, prompt_text(data, form).encode("utf-8", "replace")))
        found, problem = outcome(lambda: reader(file), ConfigError)
        assert problem is None or str(file) in problem
        if problem is None:
            columns = found if isinstance(found, dict) else vars(found)
            prompts = columns["prompt" if "prompt" in columns else "prompts"]
            assert prompts
            assert all(isinstance(each, str) and each.strip() for each in prompts)
            if isinstance(found, dict):
                assert {len(column) for column in found.values()} == {len(prompts)}
                assert COLUMNS.keys() <= found.keys()

    examples(count // 2, test)


@pytest.mark.parametrize("count", EACH)
def test_adapters(count, tmp_path):
    a, b, shape = torch.zeros(2, 3), torch.zeros(4, 2), torch.Size((4, 3))
    keys = ["layer.lora_A.weight", "layer.lora_B.weight", "transformer.layer.lora_A.weight", "layer.alpha", "x\x1b[31m"]
    plain = {"r": 2, "lora_alpha": 4, "target_modules": ["layer"], "rank_pattern": {"layer": 2}, "peft_type": "LORA"}

    def test(data):
        names = data.draw(st.lists(st.sampled_from(keys) | WORDS, max_size=2)) if data.draw(st.booleans()) else []
        tensors = {f"transformer.layer.lora_{side}.weight": each for side, each in (("A", a), ("B", b))}
        tensors |= {name: torch.full((2, 3), data.draw(st.floats(width=64)), dtype=torch.float64) for name in names}
        found = changed(data, {f"transformer.{name}": value for name, value in plain.items()})
        metadata = data.draw(st.just(json.dumps(found)) | WORDS)
        file = tmp_path / "pytorch_lora_weights.safetensors"
        file.write_bytes(damaged(data, save(tensors, {"lora_adapter_metadata": metadata})))
        found, problem = outcome(lambda: check_diffusers_lora(file, {"layer": shape}), *READING)
        assert found == {"layer"} if problem is None else problem
        folder = tmp_path / "peft"
        folder.mkdir(exist_ok=True)
        peft = {name.replace("transformer.", "base_model.model."): tensor for name, tensor in tensors.items()}
        (folder / "adapter_model.safetensors").write_bytes(damaged(data, save(peft)))
        (folder / "adapter_config.json").write_bytes(damaged(data, json.dumps(changed(data, plain)).encode()))
        for place in (file, folder):
            layers, problem = outcome(lambda place=place: read_lora(place, {"layer": (a.shape, b.shape)}), ValueError)
            assert problem is None or (str(place) in problem and "\x1b" not in problem)
            assert problem or all(each.a.float().isfinite().all() for each in layers.values())

    examples(count, test)
