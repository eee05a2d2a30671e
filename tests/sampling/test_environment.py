"""What `esengine env` says of the kernels and of their launch settings."""

import json

import pytest

from esengine.base.errors import ConfigError
from esengine.kernels import configs
from esengine.sampling import environment as env


@pytest.fixture(autouse=True)
def no_override(monkeypatch):
    monkeypatch.delenv(configs.OVERRIDE, raising=False)


@pytest.fixture
def triton_in_use(monkeypatch):
    monkeypatch.setattr(env, "uses_triton", lambda device: True)


def test_without_triton_kernels_there_are_no_settings(monkeypatch):
    monkeypatch.setattr(env, "uses_triton", lambda device: False)
    assert env.describe()["kernel settings"].startswith("none")


def test_the_file_of_settings_its_hash_and_the_order_of_sums_are_shown(triton_in_use, monkeypatch, tmp_path):
    first = env.describe()["kernel settings"]
    assert first.startswith("default.json ")
    contents = json.loads(configs.DEFAULT.read_text())
    contents["ops"]["shrink"][0]["launch"]["BLOCK_K"] *= 2
    path = tmp_path / "own.json"
    path.write_text(json.dumps(contents))
    monkeypatch.setenv(configs.OVERRIDE, str(path))
    second = env.describe()["kernel settings"]
    assert second.startswith(str(path))
    assert first.split()[-1] != second.split()[-1]


def test_a_file_that_is_not_usable_is_one_line_for_the_user(triton_in_use, monkeypatch, tmp_path):
    monkeypatch.setenv(configs.OVERRIDE, str(tmp_path / "absent.json"))
    with pytest.raises(ConfigError, match=r"kernel settings: .*absent\.json"):
        env.describe()


def test_whether_blocks_can_run_fused_is_said_with_the_reason(monkeypatch):
    monkeypatch.setattr(env, "uses_triton", lambda device: False)
    facts = env.describe()
    assert facts["fused blocks"] == f"none: they need the Triton kernels ({facts['kernels']})"
    monkeypatch.setattr(env, "uses_triton", lambda device: True)
    assert "SANA-Sprint" in env.describe()["fused blocks"]
