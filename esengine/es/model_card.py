"""The model card of a saved adapter: README.md with YAML front matter, as hubs of models read it.

Equal arguments give equal bytes. Text that a user typed is escaped, so that it cannot become markup.
"""

import json
import re
from pathlib import Path

from huggingface_hub import ModelCardData

from esengine.base.files import replace_file

NAME = "README.md"
TAG = "esengine"
"""A card with this tag in its front matter was written here, and may be replaced."""

_MARKUP = re.compile(r"([\\`*_\[\]#|<>&~$])")
_TICKS = re.compile(r"`+")


def escaped(text: object) -> str:
    """Text for a line of Markdown: on one line, and without markup."""
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(str(text).split()))
    return _MARKUP.sub(r"\\\1", line)


def fenced(text: str, language: str = "") -> str:
    """A block of code. Its fence is longer than any row of backticks in the text."""
    fence = "`" * max(3, 1 + max(map(len, _TICKS.findall(text)), default=0))
    return f"{fence}{language}\n{text.strip()}\n{fence}"


def front_matter(
    *, base_model: str | None, library_name: str, tags: tuple[str, ...] = (), licence: str | None = None, **more: str
) -> str:
    """The YAML between two lines of dashes.

    Args:
        base_model: name of the model that the adapter is for; None if it is not known.
        library_name: `peft` or `diffusers`, whose loader reads the folder.
        tags: further tags.
        licence: licence of the base model; None if it is not known. A text without an id of its own becomes `other`
            with a `license_name`.
        more: other entries.
    """
    facts: dict[str, str] = dict(more)
    if licence is not None:
        apache = licence.startswith("Apache-2.0")
        facts["license"] = "apache-2.0" if apache else "other"
        if not apache:
            facts["license_name"] = re.sub(r"[^a-z0-9.]+", "-", licence.lower()).strip("-.")
    data = ModelCardData(
        base_model=base_model, library_name=library_name, tags=["lora", "evolution-strategies", TAG, *tags], **facts
    )
    return f"---\n{data.to_yaml()}\n---\n"


def peft_example(module: str, first: str = "") -> str:
    """Python that loads the folder by PEFT. `module`: the expression of the module. `first`: lines before it."""
    return fenced(f'from peft import PeftModel\n\n{first}PeftModel.from_pretrained({module}, "FOLDER")', "python")


def library_card(base_model: str | None, recipe: dict[str, object]) -> str:
    """The card of an adapter that was saved by a library call.

    Args:
        base_model: as `front_matter`.
        recipe: settings of the population, as JSON values.
    """
    of = f" of {escaped(base_model)}" if base_model else ""
    return "\n".join([
        front_matter(base_model=base_model, library_name="peft"),
        f"# LoRA{of}",
        "",
        "Trained by Evolution Strategies (EGGROLL, arXiv 2511.16652) with esengine.",
        "",
        "## Recipe",
        "",
        fenced(json.dumps(recipe, indent=2), "json"),
        "",
        "## Gains",
        "",
        "On held-out prompts: not measured.",
        "",
        "## Load",
        "",
        "FOLDER is this folder.",
        "",
        peft_example("module"),
        "",
    ])  # fmt: skip


def write_card(folder: Path, text: str) -> None:
    """Write a card into a folder. A README.md that is not such a card is left as it is."""
    path = folder / NAME
    if path.exists() and not _is_card(path):
        return
    replace_file(path, text.encode())


def _is_card(path: Path) -> bool:
    head, _, _ = path.read_text(encoding="utf-8", errors="replace").partition("\n---\n")
    return head.startswith("---\n") and f"\n- {TAG}\n" in f"{head}\n"
