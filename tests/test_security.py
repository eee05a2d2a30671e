"""The sources hold nothing that runs what it reads. See SECURITY.md."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for folder in ("esengine", "kernels", "models") for path in (ROOT / folder).rglob("*.py"))
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle"}
CALLS = {"eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "torch.save", "os.system", "os.popen"}
KEYWORDS = {("trust_remote_code", True), ("weights_only", False), ("allow_pickle", True), ("shell", True)}


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def findings(text: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module] if (node.module or "").split(".")[0] in MODULES else []
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            found += [name] if name in CALLS or (name.endswith("_object") and "distributed" in name) else []
            keywords = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
            found += [f"{key}={value}" for key, value in KEYWORDS if key in keywords and keywords[key] is value]
            if name == "torch.load" and keywords.get("weights_only") is not True:
                found.append("torch.load without weights_only=True")
    return found


def test_there_are_sources():
    assert len(SOURCES) > 50


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(ROOT)) for path in SOURCES])
def test_nothing_runs_what_it_reads(path):
    assert findings(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "from pickle import loads", "import joblib.numpy_pickle", "yaml.load(f)", "eval('1')",
        "exec(x)", "torch.load(p)", "torch.load(p, weights_only=False)", "f(trust_remote_code=True)",
        "np.load(p, allow_pickle=True)", "subprocess.run(x, shell=True)", "os.system('x')", "torch.save(x, p)",
        "torch.distributed.all_gather_object(a, b)",
    ],
)  # fmt: skip
def test_what_would_is_found(text):
    assert findings(text)


def test_what_is_harmless_is_not():
    text = "model.eval(); yaml.safe_load(f); torch.load(p, weights_only=True); f(trust_remote_code=False); dill = 1"
    assert findings(text) == []
