"""Model cards of adapters that library calls save."""

import json

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig
from torch import nn

import esengine
from esengine.es.model_card import escaped, fenced, front_matter, write_card

HOSTILE = "a`b|<b>c</b> [x](y)\n---\n# head\n```\n"


def population(**changes):
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    vars(module).update(changes)
    return esengine.attach(module, LoraConfig(r=2, target_modules=["0"]), esengine.Noise(sigma=0.25, seed=7))


@pytest.mark.parametrize(
    ("known", "given", "expected"),
    [({}, None, None), ({"name_or_path": "a/b"}, None, "a/b"), ({"name_or_path": "a/b"}, "c/d", "c/d")],
)
def test_the_base_model_is_named_where_it_is_known(tmp_path, known, given, expected):
    population(**known).save_pretrained(tmp_path, base_model=given)
    card = ModelCard((tmp_path / "README.md").read_text())
    assert card.data.base_model == expected
    assert ("base_model" in card.data.to_dict()) == (expected is not None)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == expected
    assert card.data.library_name == "peft"
    for word in ('"sigma": 0.25', '"seed": 7', "not measured", "PeftModel.from_pretrained"):
        assert word in card.text


def test_a_card_is_the_same_bytes_and_replaced_and_a_users_page_is_kept(tmp_path):
    population().save_pretrained(tmp_path)
    first = (tmp_path / "README.md").read_bytes()
    population().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == first
    population().save_pretrained(tmp_path, base_model="a/b")
    assert (tmp_path / "README.md").read_bytes() != first
    (tmp_path / "README.md").write_text("# my project\n\n- esengine\n")
    population().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# my project\n\n- esengine\n"


def test_text_cannot_become_markup(tmp_path):
    assert "\n" not in escaped(HOSTILE)
    assert escaped("a|b`c<d>") == r"a\|b\`c\<d\>"
    assert escaped("plain text 1.5") == "plain text 1.5"
    block = fenced("x\n````\ny", "json")
    assert block.splitlines()[0] == "`````json"
    assert block.splitlines()[-1] == "`````"
    card = ModelCard(front_matter(base_model=HOSTILE, library_name="peft", licence="Own: not free") + "text")
    assert card.data.base_model == HOSTILE
    assert (card.data.license, card.data.license_name) == ("other", "own-not-free")
    assert card.text == "text"
    write_card(tmp_path, front_matter(base_model=HOSTILE, library_name="peft"))
    write_card(tmp_path, "again")
    assert (tmp_path / "README.md").read_text() == "again"
