"""The probability of yes by tiny random image-text models, against transformers alone, row by row."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from esengine import rewards
from esengine.base.errors import ConfigError, RewardError
from esengine.rewards.vqa import QUESTION

try:  # without torchvision this is what AutoProcessor takes
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as ImageProcessor
except ImportError:
    from transformers import CLIPImageProcessor as ImageProcessor

WORDS = ["Yes", "yes", "ĠYes", "No", "no", "Ġno"]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
TEMPLATE = (
    "{% for m in messages %}USER: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image> {% else %}"
    "{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
PROMPTS = ["a cat", "a dog and an owl, under a tree", "a cat", "x", "Öl ✓"]
COLUMNS = [{"target": "CAT"}, {"target": 3}, {"target": [1, "ö"]}, {"target": "d"}, {"target": "é"}]


def tokenizer(words=WORDS):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges, vocabulary = [], [*SPECIAL, *letters]
    for word in words:  # a space is joined last
        starts = [(1, len(word))] if word[0] == "Ġ" else [(end - 1, end) for end in range(2, len(word) + 1)]
        for at, end in starts:
            if word[:end] not in vocabulary:
                merges.append((word[:at], word[at:end]))
                vocabulary.append(word[:end])
    made = Tokenizer(BPE({token: i for i, token in enumerate(vocabulary)}, merges, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    names = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=made, extra_special_tokens={"image_token": "<image>"}, **names)


def save(folder, words=WORDS, template=TEMPLATE):
    text = tokenizer(words)
    pictures = ImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    about = dict(patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    LlavaProcessor(pictures, text, chat_template=template, **about).save_pretrained(folder)
    common = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    config = LlavaConfig(
        vision_config=dict(model_type="clip_vision_model", image_size=16, patch_size=8, **common),
        text_config=dict(model_type="llama", vocab_size=len(text), num_key_value_heads=2, **common),
        image_token_index=SPECIAL.index("<image>"),
        vision_feature_layer=-1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # untrained weights are too small for answers to differ
                parameter.mul_(8 if parameter.ndim > 1 else 1)
        model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("vqa") / "model")


def alone(folder, images, questions):
    """P(token | image, question) of every token, by transformers alone, one unpadded row at a time: [B, V]."""
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor, rows = AutoProcessor.from_pretrained(folder), []
    for image, question in zip(images, questions, strict=True):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        picture = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
        with torch.no_grad():
            rows.append(model(**processor(text=text, images=picture, return_tensors="pt")).logits[0, -1].softmax(-1))
    return torch.stack(rows), processor.tokenizer


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_scores_are_those_of_transformers_alone_row_by_row(folder, images, batch):
    reward = rewards.load("vqa", model=str(folder), batch=batch)
    scores = reward(images(), PROMPTS)
    assert (scores.dtype, scores.shape) == (torch.float32, (5,))
    p, words = alone(folder, images(), [QUESTION.format(prompt=prompt) for prompt in PROMPTS])
    ids = words.convert_tokens_to_ids(WORDS)
    torch.testing.assert_close(scores, p[:, ids[:3]].sum(-1), rtol=1e-4, atol=1e-7)
    assert scores.std() > 1e-3 * scores.mean() > 0
    assert torch.equal(scores, reward(images(), PROMPTS))
    both = rewards.load("vqa", model=str(folder), batch=batch, normalised=True)(images(), PROMPTS)
    torch.testing.assert_close(both, p[:, ids[:3]].sum(-1) / p[:, ids].sum(-1), rtol=1e-4, atol=1e-7)


def test_a_question_of_ones_own_has_the_columns(folder, images):
    reward = rewards.parse(f"vqa(model={folder},question='Is \"{{target}}\" in {{prompt}}?')")
    reward.check_prompts(PROMPTS, COLUMNS)
    scores = reward.score(images(), PROMPTS, metadata=COLUMNS)["vqa"]
    values = ["CAT", "3", '[1, "ö"]', "d", "é"]
    questions = [f'Is "{value}" in {prompt}?' for value, prompt in zip(values, PROMPTS, strict=True)]
    p, words = alone(folder, images(), questions)
    torch.testing.assert_close(scores, p[:, words.convert_tokens_to_ids(WORDS[:3])].sum(-1), rtol=1e-4, atol=1e-7)


def test_what_is_recorded_names_the_question_and_the_tokens(folder):
    reward = rewards.load("vqa", model=str(folder), question="Is it {colour}?")
    found, ids = reward.settings(), tokenizer().convert_tokens_to_ids(WORDS)
    assert (found["question"], found["tokens"]) == ("Is it {colour}?", {"yes": ids[:3], "no": ids[3:]})
    assert found["fingerprint"].startswith("sha256:")
    json.dumps(found)


@pytest.mark.parametrize("columns", [{}, {"target": None}, {"Target": "a"}])
def test_a_prompt_without_the_column_is_told_before_anything_is_scored(folder, images, columns):
    reward = rewards.parse(f"vqa(model={folder},question='Is it {{target}}?')")
    with pytest.raises(ConfigError, match=r"column 'target' of prompt 'b'"):
        reward.check_prompts(["a", "b"], [{"target": "x"}, columns])
    with pytest.raises(RewardError, match="column 'target'") as caught:
        reward.score(images(1), ["b"], metadata=[columns])
    assert caught.value.reward == "vqa"


@pytest.mark.parametrize("question", ["", " ", "{", "a } b", "{}", "{prompt", "{{prompt}}", "{a{b}}"])
def test_a_brace_that_is_no_placeholder_is_refused(folder, question):
    with pytest.raises(ConfigError, match="question: expected"):
        rewards.load("vqa", model=str(folder), question=question)


@pytest.mark.parametrize("question", ["{prompt.__class__}", "{prompt!r}", "{0}", "{prompt:>9999999999}"])
def test_a_placeholder_is_only_a_name(folder, question):
    reward = rewards.load("vqa", model=str(folder), question=question)
    with pytest.raises(ConfigError, match="expected a column"):
        reward.check_prompts(["a"], [{}])


@pytest.mark.parametrize("options", [{"batch": 0}, {"normalised": "yes"}, {"dtype": "int8"}, {"size": 3}, {}])
def test_options_that_do_not_fit(folder, options):
    options = {"model": str(folder), **options} if options else {}
    with pytest.raises(ConfigError) as caught:
        rewards.load("vqa", **options)
    assert caught.value.setting == "reward vqa"


def test_models_that_cannot_be_used(tmp_path, clip_folder, write_clip):
    with pytest.raises(ConfigError, match="model"):
        rewards.load("vqa", model=str(clip_folder))
    no_answer = save(tmp_path / "no_answer", words=["Yes"])
    with pytest.raises(ConfigError, match="token for No"):
        rewards.load("vqa", model=str(no_answer))
    no_template = save(tmp_path / "no_template", template=None)
    with pytest.raises(ConfigError, match="chat template"):
        rewards.load("vqa", model=str(no_template))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config.json", {"auto_map": {"AutoConfig": "evil.C"}, "model_type": "evil"}),
        ("config.json", {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}),
        ("config.json", {"_attn_implementation": "flash_attention_2"}),
        ("model.safetensors.index.json", {"weight_map": {"a": "../elsewhere.safetensors"}}),
        ("adapter_config.json", {"base_model_name_or_path": "another/model"}),
    ],
)
def test_a_folder_runs_no_code_and_reads_nothing_outside(tmp_path, name, change):
    folder = save(tmp_path / "model")
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    if name.endswith("index.json"):
        (folder / "model.safetensors").rename(folder / "part.safetensors")
    path = folder / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | change))
    with pytest.raises(ConfigError) as caught:
        rewards.load("vqa", model=str(folder))
    assert "\n" not in str(caught.value)
    assert "ran" not in str(caught.value)
