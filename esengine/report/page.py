"""Writes one HTML file from a template and its values."""

import base64
import hashlib
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from esengine.base.files import replace_file
from esengine.report import words

TEMPLATES = Path(__file__).parent / "templates"


def write(path: Path, template: str, **view: Any) -> Path:
    """Fill a template and write the page. Characters that are not valid Unicode become question marks.

    The page's content security policy allows only the page's own script, by hash, and images inside the page.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
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
