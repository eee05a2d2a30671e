"""A tokenizer in Gemma's format, trained on a small corpus, for the pipelines that this project builds."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import GemmaTokenizerFast

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
_LEARNED_TOKENS = 768


def save_tokenizer(path: Path, corpus: Sequence[str]) -> GemmaTokenizerFast:
    """Train and save a byte-fallback BPE with Gemma's normalizer, splits and decoder.

    Args:
        path: Folder to write. An existing one is replaced.
        corpus: Texts. A word that often follows a space becomes one token.

    Returns:
        The tokenizer as transformers loads it from `path`.
    """
    learner = Tokenizer(BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # no token spans two words
    learner.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=_LEARNED_TOKENS, show_progress=False))
    learned = json.loads(learner.to_str())["model"]

    tokens = [
        *SPECIAL,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *sorted(learned["vocab"], key=learned["vocab"].get),
    ]
    tokenizer = Tokenizer(
        BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(merge) for merge in learned["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", SPECIAL.index("<bos>"))]
    )
    tokenizer.add_special_tokens(list(SPECIAL))

    config = {
        "tokenizer_class": "GemmaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
        "padding_side": "right",
        **{f"{token.strip('<>')}_token": token for token in SPECIAL},
    }
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return load_tokenizer(path)


def load_tokenizer(path: Path) -> GemmaTokenizerFast:
    """Load a tokenizer that `save_tokenizer` wrote."""
    return GemmaTokenizerFast.from_pretrained(path, local_files_only=True)
