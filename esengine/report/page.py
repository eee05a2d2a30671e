"""Writes one HTML file from a template and its values."""

import base64
import hashlib
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from esengine.base.files import replace_file
from esengine.base.printable import without_secrets
from esengine.evaluation.statistics import flatten
from esengine.report import words

TEMPLATES = Path(__file__).parent / "templates"
MAX_FACTS, MAX_NAMES = 10_000, 256
"""Limits of what a folder, which may be another's, puts on a page: settings, and names of metrics, entries or scores.
"""


def facts(nested: dict[str, Any]) -> dict[str, Any]:
    """Nested mappings as one flat mapping. Raises ValueError if it is too long for a page."""
    return require_few(flatten(nested), "settings", MAX_FACTS)


def require_few(found: Any, what: str, most: int = MAX_NAMES) -> Any:
    """What was found, with at most `most` items. Raises ValueError otherwise."""
    if len(found) > most:
        raise ValueError(f"expected at most {most} {what}, got {len(found)}")
    return found


def write(path: Path, template: str, **view: Any) -> Path:
    """Fill a template and write the page. Characters that are not valid Unicode become question marks.

    No text on it has the user, password or query of a URL.

    The page's content security policy allows only the page's own script, by hash, and images inside the page.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: without_secrets(value) if type(value) is str else value,  # not of markup
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("breakable", "figure", "signed", "percent", "count", "plain"):
        environment.filters[name] = getattr(words, name)
    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = environment.get_template(template).render(
        style=Markup(style), script=Markup(script), script_digest=digest, **view
    )
    replace_file(path, page.encode("utf-8", "replace"))
    return path
