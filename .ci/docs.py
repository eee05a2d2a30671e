"""Make the API reference from the docstrings. A warning, or a link that leads nowhere, is an error.

python .ci/docs.py FOLDER
"""

import dataclasses
import html
import importlib
import inspect
import os
import pkgutil
import re
import sys
import typing
import warnings
from pathlib import Path

import pdoc
import pdoc.render

LEFT_OUT = ("esengine.__main__",)


def modules() -> list[str]:
    """All public modules. Lazy names of `__all__` are resolved, because pdoc takes only real ones."""
    found = []
    for name in ("esengine", "esengine.kernels", "esengine.models"):  # the last two stand at the top of the repository
        package = importlib.import_module(name)
        found += [name, *(each.name for each in pkgutil.walk_packages(package.__path__, f"{name}."))]
    found = [name for name in dict.fromkeys(found) if name not in LEFT_OUT and "._" not in name]
    for name in found:
        module = importlib.import_module(name)
        for public in getattr(module, "__all__", ()):
            setattr(module, public, getattr(module, public))
        for each in [each for each in vars(module).values() if isinstance(each, type)]:
            if dataclasses.is_dataclass(each) and each.__module__ == name:  # types as one reads them, without checks
                hints = typing.get_type_hints(each)
                each.__annotations__ = {field: hints[field] for field in each.__annotations__}
    return found


def undocumented(names: list[str]) -> list[str]:
    """Names in a package's `__all__`, and the public methods of its classes, that have no docstring."""
    found = []
    for name in names:
        for public in getattr(sys.modules[name], "__all__", ()):
            thing = getattr(sys.modules[name], public)
            methods = vars(thing) if isinstance(thing, type) else {}
            parts = {public: thing} | {f"{public}.{each}": what for each, what in methods.items() if each[0] != "_"}
            for label, what in parts.items():
                what = what.__func__ if isinstance(what, classmethod | staticmethod) else what
                if (callable(what) or isinstance(what, property)) and not inspect.getdoc(what):
                    found.append(f"{name}.{label} has no docstring")
    return found


def broken(folder: Path) -> list[str]:
    """Links between the pages that lead nowhere, and names of ours in backticks that no page has."""
    script = re.compile(r"<script.*?</script>", flags=re.S)
    pages = {path: script.sub("", path.read_text(encoding="utf-8")) for path in folder.rglob("*.html")}
    anchors = {path: set(re.findall(r'\bid="([^"]+)"', text)) for path, text in pages.items()}
    everything = set().union(*anchors.values())
    found = []
    for path, text in pages.items():
        for link in map(html.unescape, re.findall(r'href="([^"]*)"', text)):
            file, _, anchor = link.partition("#")
            target = Path(os.path.normpath(path.parent / file)) if file else path
            if ":" not in file and (target not in pages or (anchor and anchor not in anchors[target])):
                found.append(f"{path.relative_to(folder)}: link to {link}")
        for name in re.findall(r"<code>(\w+(?:\.\w+)+)(?:\(\))?</code>", text):  # pdoc links those that it finds
            ours = name.startswith("esengine.") or (name[0].isupper() and name.partition(".")[0] in everything)
            if ours and name not in everything:
                found.append(f"{path.relative_to(folder)}: `{name}` is no module, class, function or attribute")
    return sorted(set(found))


def main(folder: Path) -> int:
    os.environ |= {"TRITON_INTERPRET": "0", "TRANSFORMERS_VERBOSITY": "error"}
    names = modules()
    pdoc.render.configure(
        docformat="google", show_source=False, footer_text=f"esengine {sys.modules['esengine'].__version__}"
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pdoc.pdoc(*names, output_directory=folder)
    said = [" ".join(str(each.message).split()) for each in caught]
    harmless = ("has already been added", "Cannot determine where")  # a page of two names; a line of another library
    problems = (
        [each for each in said if not any(words in each for words in harmless)] + broken(folder) + undocumented(names)
    )
    print("\n".join(problems) or f"{len(names)} pages in {folder}")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
