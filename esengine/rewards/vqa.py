"""The probability that an image-text model answers "yes" to a question about an image.

    score = sum_t P(t | image, question)        t: the tokens that spell yes

P is the softmax over the whole vocabulary at the first token of the answer, in fp32 for any dtype of the model. With
`normalised` the score is P(yes) / (P(yes) + P(no)).

Source: VQAScore (Lin et al., "Evaluating Text-to-Visual Generation with Image-to-Text Generation", arXiv 2404.01291),
P("Yes" | image, question). There the answer is one spelling; here all spellings of one token count.
"""

import json
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from esengine.base.errors import ConfigError
from esengine.base.prompt_files import Metadata
from esengine.rewards.encoder import pick_device, pick_dtype
from esengine.rewards.loading import fingerprint, load_image_text, locate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

QUESTION = "Does this figure show '{prompt}'? Please answer yes or no."
"""The paper's question."""
YES, NO = (("Yes", "yes", "YES"), ("No", "no", "NO"))
"""Spellings of the answers. Each counts with and without a space before it."""
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


class Vqa:
    """Scores by a question about each image.

    Args:
        model: transformers' image-text model, a decoder, on its device and in its dtype, in eval mode.
        processor: its processor, with a chat template.
        question: `{prompt}` stands for the image's prompt, `{NAME}` for a column of the prompt file.
        normalised: divide by P(yes) + P(no).
        batch: images in one forward.
        identity: what was loaded, for a result's record.

    Raises:
        ConfigError: the question has a brace that is no placeholder; or the processor has no chat template, or no token
            for an answer.
    """

    reads_only = True

    def __init__(
        self,
        model: "PreTrainedModel",
        processor: "ProcessorMixin",
        *,
        question: str = QUESTION,
        normalised: bool = False,
        batch: int = 8,
        identity: dict[str, Any] | None = None,
    ):
        if not isinstance(question, str) or not question.strip():
            raise ConfigError(f"question: expected text, got {question!r}")
        if set("{}") & set(_PLACEHOLDER.sub("", question)) or "" in _PLACEHOLDER.findall(question):
            raise ConfigError(f"question: expected {{prompt}} or {{COLUMN}} as its only braces, got {question!r:.100}")
        if type(batch) is not int or batch < 1:
            raise ConfigError(f"batch: expected an int of at least 1, got {batch!r}")
        if not isinstance(normalised, bool):
            raise ConfigError(f"normalised: expected true or false, got {normalised!r}")
        if not getattr(processor, "chat_template", None):
            raise ConfigError("model: expected a processor with a chat template, got none")
        self.model, self.processor, self.question, self.batch = model, processor, question, batch
        self.normalised, self.identity = normalised, dict(identity or {})
        processor.tokenizer.padding_side = "left"
        self.tokens = {answer: self._answer_tokens(words) for answer, words in (("yes", YES), ("no", NO))}

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str] | None = None,
        question: str = QUESTION,
        revision: str | None = None,
        normalised: bool = False,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device = "cpu",
        batch: int = 8,
    ) -> "Vqa":
        """Load an image-text model with safetensors weights. No code of the model's folder is run.

        Args:
            model: a folder or a hub id of a decoder of transformers' image-text-to-text models.
            question: see the class.
            revision: commit, branch or tag of a hub id.
            normalised: see the class.
            dtype: float32, bfloat16 or float16. Default: float32 on a CPU, bfloat16 elsewhere.
            device: the model's device.
            batch: images in one forward.

        Raises:
            ConfigError: an argument that cannot be used, or no complete model or processor of that name.
        """
        if model is None:
            what = "expected a folder or hub id of an image-text model with safetensors weights, got none"
            raise ConfigError(f"model: {what}, such as HuggingFaceTB/SmolVLM-500M-Instruct")
        device = pick_device(device)
        dtype = pick_dtype(dtype, device)
        identity = {"model": str(model), "dtype": str(dtype).removeprefix("torch.")}
        source = locate(model, revision)
        loaded, processor, commit = load_image_text(source, revision)
        identity |= {"fingerprint": fingerprint(source)} if commit is None else {"commit": commit}
        loaded = loaded.to(device=device, dtype=dtype).eval().requires_grad_(False)
        options = dict(question=question, normalised=normalised, batch=batch, identity=identity)
        return cls(loaded, processor, **options)

    @torch.no_grad()
    def __call__(
        self, images: torch.Tensor, prompts: list[str], metadata: Sequence[Metadata] | None = None
    ) -> torch.Tensor:
        """Score images, uint8 [B, 3, H, W] on any device. Returns float32 [B] on the model's device.

        Raises:
            ValueError: a prompt lacks a column of the question.
        """
        columns = [{}] * len(prompts) if metadata is None else metadata
        questions = [self.ask(*each) for each in zip(prompts, columns, strict=True)]
        pictures = [Image.fromarray(each) for each in images.permute(0, 2, 3, 1).contiguous().cpu().numpy()]
        scores = [torch.empty(0, device=self.model.device)]
        for start in range(0, len(pictures), self.batch):
            part = slice(start, start + self.batch)
            scores.append(self._score(pictures[part], questions[part]))
        return torch.cat(scores)

    def ask(self, prompt: str, columns: Metadata) -> str:
        """The question about one image. Values other than text are written as JSON.

        Raises:
            ValueError: the prompt lacks a column of the question, or its cell is empty.
        """
        values = {**columns, "prompt": prompt}

        def value(match: re.Match) -> str:
            found = values.get(match[1])
            if found is None:
                there = ", ".join(name for name in values if values[name] is not None)
                raise ValueError(f"question: expected a column {match[1]!r} of prompt {prompt!r:.60}, got {there:.200}")
            return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)

        return _PLACEHOLDER.sub(value, self.question)

    def check_prompts(self, prompts: Sequence[str], metadata: Sequence[Metadata]) -> None:
        """Raises ConfigError if a prompt lacks a column of the question."""
        for prompt, columns in zip(prompts, metadata, strict=True):
            try:
                self.ask(prompt, columns)
            except ValueError as error:
                raise ConfigError(f"reward vqa: {error}") from error

    def settings(self) -> dict[str, Any]:
        """What was loaded, the question, and the ids of the answers' tokens."""
        return {**self.identity, "question": self.question, "normalised": self.normalised, "tokens": self.tokens}

    def _score(self, pictures: list[Image.Image], questions: list[str]) -> torch.Tensor:
        """Scores float32 [B] of one batch, padded on the left."""
        texts = [
            self.processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
                add_generation_prompt=True,
                tokenize=False,
            )
            for question in questions
        ]
        given = self.processor(text=texts, images=[[each] for each in pictures], padding=True, return_tensors="pt")
        given = given.to(self.model.device, self.model.dtype)
        logits_bv = self.model(**given, use_cache=False, logits_to_keep=1).logits[:, -1].float()
        p_bv = logits_bv.softmax(-1)
        yes, no = (p_bv[:, ids].sum(-1) for ids in self.tokens.values())
        return yes / (yes + no) if self.normalised else yes

    def _answer_tokens(self, words: Sequence[str]) -> list[int]:
        """Ids of the tokens that are one of the words, with or without a space before it."""
        tokenizer, found = self.processor.tokenizer, set()
        for text in (text for word in words for text in (word, f" {word}")):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
                found.add(ids[0])
        if not found:
            raise ConfigError(f"model: expected a tokenizer with a token for {words[0]}, got none")
        return sorted(found)
