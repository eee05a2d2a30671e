import json

import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPConfig, CLIPModel

EDGE, LENGTH = 32, 16
MERGES = ["c a", "ca t</w>", "d o", "do g</w>", "a n", "i m", "o w", "ow l</w>", "e d</w>", "t h", "th e</w>"]


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def write_clip():
    """Save a random small CLIP with its tokenizer and preprocessor config, each part on request."""

    def write(folder, *, seed=0, legacy_eos=False, processor=True, weights=True, **preprocess):
        folder.mkdir(parents=True)
        alphabet = sorted(ByteLevel.alphabet())
        tokens = [*alphabet, *(a + "</w>" for a in alphabet), *(merge.replace(" ", "") for merge in MERGES)]
        tokens += ["<|startoftext|>", "<|endoftext|>"]
        if processor:
            (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
            (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
            names = {"bos_token": tokens[-2], "eos_token": tokens[-1], "unk_token": tokens[-1], "pad_token": tokens[-1]}
            about = {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, **names}
            (folder / "tokenizer_config.json").write_text(json.dumps(about))
            settings = {
                "image_processor_type": "CLIPImageProcessor",
                "size": {"shortest_edge": EDGE},
                "crop_size": {"height": EDGE, "width": EDGE},
                "resample": 3,
                "image_mean": [0.48145466, 0.4578275, 0.40821073],
                "image_std": [0.26862954, 0.26130258, 0.27577711],
                **preprocess,
            }
            (folder / "preprocessor_config.json").write_text(json.dumps(settings))
        if weights:
            common = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
            ids = dict(bos_token_id=len(tokens) - 2, eos_token_id=2 if legacy_eos else len(tokens) - 1)
            config = CLIPConfig(
                text_config=dict(vocab_size=len(tokens), max_position_embeddings=LENGTH, **common, **ids),
                vision_config=dict(image_size=EDGE, patch_size=8, **common),
                projection_dim=24,
            )
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                clip = CLIPModel(config).eval()
                with torch.no_grad():  # untrained weights are too small for texts to differ
                    for parameter in clip.parameters():
                        if parameter.ndim > 1:
                            parameter.mul_(5)
                    clip.text_projection.weight.copy_(clip.visual_projection.weight)
                    for norm in (clip.text_model.final_layer_norm, clip.vision_model.post_layernorm):
                        norm.bias.fill_(0.7)  # what all share: cosines are as far from 0 as a trained CLIP's
                    clip.logit_scale.fill_(4.6052)
            clip.save_pretrained(folder, safe_serialization=True)
        return folder

    return write


@pytest.fixture(scope="session")
def clip_folder(write_clip, tmp_path_factory):
    """A whole small CLIP. Nobody writes into it."""
    return write_clip(tmp_path_factory.mktemp("clip") / "clip")


@pytest.fixture
def images():
    """uint8 noise on a colour of its own for each image."""

    def make(batch=5, height=48, width=80, seed=0):
        generator = torch.Generator().manual_seed(seed)
        colour = torch.randint(256, (batch, 3, 1, 1), generator=generator)
        noise = torch.randint(-80, 80, (batch, 3, height, width), generator=generator)
        return (colour + noise).clamp(0, 255).to(torch.uint8)

    return make
