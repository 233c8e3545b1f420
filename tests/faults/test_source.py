"""What the source never does: run code from data, start a shell, use the network without the Hub's client."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(
    file.relative_to(ROOT).as_posix()
    for folder in ("uc2", "modeling_uc2", "processing_uc2", ".")
    for file in (ROOT / folder).glob("*.py")
)
# One class restricts what a pickle may name; it is tested against hostile ones.
PICKLE_ALLOWED = {"uc2/safe_decoding.py": {"pickle.Unpickler"}}
NETWORK = {"socket", "urllib.request", "http", "http.client", "requests", "httpx", "aiohttp", "ftplib", "smtplib"}
CODE_FROM_DATA = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "code.interact", "runpy.run_path"}
UNSAFE_LOADERS = {"yaml.load", "yaml.unsafe_load", "yaml.full_load", "joblib.load", "dill.load", "shelve.open"}


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute or name, "" of anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return ""


def imports(tree: ast.AST) -> set[str]:
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def problems(source: str, file: str) -> list[str]:
    tree, found = ast.parse(source), []
    found += [f"imports {name}" for name in imports(tree) if name in NETWORK or name.startswith("pickle.")]
    for node in ast.walk(tree):
        name = dotted(node) if isinstance(node, ast.Attribute) else ""
        if name.startswith("pickle.") and name not in {"pickle.UnpicklingError", *PICKLE_ALLOWED.get(file, ())}:
            found.append(f"line {node.lineno}: {name}")
        if isinstance(node, ast.Call):
            found += [f"line {node.lineno}: {problem}" for problem in call_problems(node)]
    return found


def call_problems(call: ast.Call) -> list[str]:
    name = dotted(call.func)
    given = {keyword.arg: keyword.value for keyword in call.keywords}

    def states(argument: str, value: bool) -> bool:
        return isinstance(given.get(argument), ast.Constant) and given[argument].value is value

    found = [name] if name in CODE_FROM_DATA | UNSAFE_LOADERS else []
    if states("shell", True):
        found.append("shell=True")
    if states("weights_only", False) or (name == "torch.load" and not states("weights_only", True)):
        found.append("torch.load without weights_only=True")
    if states("allow_pickle", True) or (name in ("np.load", "numpy.load") and not states("allow_pickle", False)):
        found.append("np.load without allow_pickle=False")
    if states("trust_remote_code", True):
        found.append("trust_remote_code=True")
    return found


@pytest.mark.parametrize("file", FILES)
def test_source(file):
    assert not problems((ROOT / file).read_text(encoding="utf-8"), file)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.loads(b'')",
        "from pickle import loads",
        "import urllib.request",
        "from http import client",
        "import httpx",
        "eval('1')",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=False)",
        "import numpy as np\nnp.load('x')",
        "import yaml\nyaml.load('x')",
        "f(trust_remote_code=True)",
    ],
)
def test_each_is_found(source):
    assert problems(source, "uc2/example.py")


def test_what_is_allowed_is_not_found():
    source = "import torch\ntorch.load('x', weights_only=True)\nmodel.eval()\nre.compile('a')\nyaml.safe_load('x')"
    assert not problems(source, "uc2/example.py")
