import pytest
import torch

from esengine import rewards
from esengine.base.errors import ConfigError
from esengine.rewards.spec import Term, read


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("a", [Term("a")]),
        (" a = 2 , my.module:score=-1e-1", [Term("a", {}, 2.0), Term("my.module:score", {}, -0.1)]),
        ("a()", [Term("a")]),
        ("a(x=1,y=2.5,z=true,w=False)=.5", [Term("a", {"x": 1, "y": 2.5, "z": True, "w": False}, 0.5)]),
        (
            "pickscore(model=weights/pickscore,dtype=bfloat16)=1.0,clip_text=0",
            [Term("pickscore", {"model": "weights/pickscore", "dtype": "bfloat16"}), Term("clip_text", {}, 0.0)],
        ),
        (
            "remote( url = http://127.0.0.1:8000/a?b=c&d=e )",
            [Term("remote", {"url": "http://127.0.0.1:8000/a?b=c&d=e"})],
        ),
        ("a(model='x, (y)', b=\" 7 \")", [Term("a", {"model": "x, (y)", "b": " 7 "})]),
        ("a(b='')", [Term("a", {"b": ""})]),
        ("a(model=my weights/x y)", [Term("a", {"model": "my weights/x y"})]),
        ("a(r=1e3,s=-4,t=+.5,u=1.2.3,v=nan)", [Term("a", {"r": 1000.0, "s": -4, "t": 0.5, "u": "1.2.3", "v": "nan"})]),
    ],
)
def test_what_is_read(text, terms):
    found = read(text)
    assert found == terms
    for a, b in zip(found, terms, strict=True):
        assert [type(value) for value in a.options.values()] == [type(value) for value in b.options.values()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a reward's name between commas, got the end at position 1"),
        ("a,,b", "expected a reward's name between commas, got ',' at position 3"),
        ("a b", "expected a comma, got 'b' at position 3"),
        ("a)", r"expected a comma, got '\)' at position 2"),
        ("a(b)", r"expected = after option b of a, got '\)' at position 4"),
        ("a(b=)", r"expected a value for option b of a, got '\)' at position 5"),
        ("a(b=1", r"expected a comma or \) after option b of a, got the end at position 6"),
        ("a(b=1 (c", r"expected a comma or \) after option b of a, got '\(' at position 7"),
        ("a(b=1,)", r"expected an option of a, as key=value, got '\)' at position 7"),
        ("a(=1)", "expected an option of a, as key=value, got '=' at position 3"),
        ("a(b=1,b=2)", "option b of a is given twice at position 7"),
        ("a(b='x)", 'expected a value for option b of a, got "\'" at position 5'),
        ("a(b=1)c", "expected a comma between rewards, got 'c' at position 7"),
        ("a(b=1)=x", "reward a: expected a number for its weight, got 'x' at position 8"),
        ("a=", "reward a: expected a number for its weight, got '' at position 3"),
        ("a=1=2", "reward a: expected a number for its weight, got '1=2' at position 3"),
        ("a=2 3", "expected a number for its weight, got '2 3'"),
    ],
)
def test_what_is_refused_and_where(text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read(text)
    assert repr(text) in str(caught.value)


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "given_options.py").write_text(
        "import torch\n"
        "class Takes:\n"
        "    def __init__(self, device='unset', scale=1):\n"
        "        self.device, self.scale = device, scale\n"
        "    def __call__(self, images, prompts):\n"
        "        return torch.full((len(images),), float(self.scale))\n"
        "class TakesNone:\n"
        "    def __init__(self, **rest):\n"
        "        assert not rest\n"
        "    __call__ = Takes.__call__\n"
        "    scale = 3\n"
        "def plain(images, prompts):\n"
        "    return torch.ones(len(images))\n"
    )
    monkeypatch.chdir(tmp_path)
    return "given_options"


def test_the_device_goes_to_rewards_that_name_it(module):
    reward = rewards.parse(
        f"{module}:Takes(scale=2),{module}:TakesNone,{module}:plain,jpeg_compressibility", device="xpu"
    )
    assert (reward.terms[0].reward.device, reward.terms[0].reward.scale) == ("xpu", 2)
    assert rewards.parse(f"{module}:Takes(device=cpu)", device="xpu").terms[0].reward.device == "cpu"
    assert rewards.load(f"{module}:Takes").device == "unset"


def test_options_reach_the_built_in_rewards():
    reward = rewards.parse("jpeg_compressibility(quality=30)=2")
    assert reward.settings() == {"jpeg_compressibility": {"weight": 2.0, "quality": 30}}
    with pytest.raises(ConfigError, match=r"size.*quality"):
        rewards.parse("jpeg_compressibility(size=30)")
    with pytest.raises(ConfigError, match="quality: expected an int"):
        rewards.parse("jpeg_compressibility(quality=high)")


def test_combined_by_name(module):
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    both = rewards.load("combined", **{f"{module}:Takes": 0.5, f"{module}:TakesNone": 2})
    assert both(images, ["a", "b"]).tolist() == [6.5, 6.5]
    spec = f"combined({module}:Takes=1,{module}:TakesNone=0.5)=2,{module}:plain"
    parsed = rewards.parse(spec)
    assert parsed.names == [f"{module}:Takes", f"{module}:TakesNone", f"{module}:plain"]
    assert parsed(images, ["a", "b"]).tolist() == [6.0, 6.0]
    for options, message in [
        ({}, "at least one"),
        ({"jpeg_compressibility": "1"}, "expected a number as the weight of jpeg_compressibility, got '1'"),
        ({"jpeg_compressibility": True}, "expected a number"),
        ({"combined": 1.0}, "reserved"),
        ({"nope": 1.0}, "unknown reward 'nope'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            rewards.load("combined", **options)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_device_of_a_group_is_no_reward_and_reaches_those_that_take_one(module, device):
    (term, other) = read(f"combined(a=1,b=0.5,device={device})=2")
    assert (term.name, term.options, term.weight, term.device) == ("a", {}, 2.0, device)
    assert (other.name, other.weight, other.device) == ("b", 1.0, device)
    reward = rewards.parse(f"combined(jpeg_compressibility=1,{module}:Takes=2,device={device})", device="cuda:7")
    assert reward.names == ["jpeg_compressibility", f"{module}:Takes"]
    assert reward.terms[1].reward.device == device


@pytest.mark.parametrize("text", ["combined()", "combined(device=cpu)", "combined(a=1,device=3)", "combined(a=b)"])
def test_a_group_without_rewards_or_with_other_options_is_refused(text):
    with pytest.raises(ConfigError) as caught:
        read(text)
    assert caught.value.setting == "reward combined"


def test_names_and_weights_are_checked_before_anything_is_loaded():
    with pytest.raises(ConfigError, match="2 times"):
        rewards.parse("pickscore(model=/no/such),pickscore(model=/no/such)")


def test_who_promises_to_read_only_gets_the_batch_itself():
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    seen = []

    class Reads:
        def __call__(self, images, prompts):
            seen.append(images.data_ptr())
            return torch.zeros(len(images))

    for promise in (False, True):
        reward = Reads()
        reward.reads_only = promise
        rewards.checked("reads", reward, images, ["a", "b"])
    assert seen[0] != images.data_ptr() == seen[1]


def test_features_are_shared_by_encoder_and_not_by_mistake():
    class Mean:
        calls = 0

        def image_features(self, images):
            Mean.calls += 1
            return images.float().mean((2, 3))

    class Channel:
        def __init__(self, encoder, channel):
            self.encoder, self.channel = encoder, channel

        def score_features(self, features, prompts):
            scores = features[:, self.channel].clone()
            features.zero_()  # its own copy
            return scores

        def __call__(self, images, prompts):
            return self.score_features(self.encoder.image_features(images), prompts)

    shared = Mean()
    reward = rewards.Weighted(
        [("r", Channel(shared, 0), 1), ("g", Channel(shared, 1), 1), ("b", Channel(Mean(), 2), 1)]
    )
    images = torch.arange(2 * 3 * 4, dtype=torch.uint8).view(2, 3, 2, 2)
    scores = reward.score(images, ["a", "b"])
    assert Mean.calls == 2
    expected = images.float().mean((2, 3))
    assert torch.equal(torch.stack([scores[name] for name in "rgb"], 1), expected)
    reward.score(255 - images, ["a", "b"])
    assert Mean.calls == 4  # nothing outlives a batch


@pytest.mark.parametrize(
    "value", [3, -1.5, True, False, "nano", "a,b", " a ", "it's", 'say "x"', "(x)", "3", "1e-2", "true", "", "a b", "ü"]
)
def test_the_text_of_a_term_is_read_back_equal(value):
    term = Term("own:Score", {"option": value, "k": 1})
    (again,) = read(term.text())
    assert again == term
    assert type(again.options["option"]) is type(value)
