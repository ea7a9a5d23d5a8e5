"""What the source may not do: unpickle, evaluate text, or let a model bring code."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from b2ray.config.paths import PACKAGE

FILES = sorted(PACKAGE.rglob("*.py"))
# Whose readers run what they read.
READERS = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle"}
# pickle's own names that read nothing.
HARMLESS = {"UnpicklingError", "PicklingError"}


def tree(text: str) -> ast.Module:
    return ast.parse(text)


def dotted(node: ast.expr) -> str:
    """a.b.c of an expression; ? stands for what is no name."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def faults(module: ast.Module) -> Iterator[str]:
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (f"import {a.name}" for a in node.names if a.name.split(".")[0] in READERS)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in READERS:
            yield from (f"from … import {a.name}" for a in node.names if a.name not in HARMLESS)
        elif isinstance(node, ast.Call):
            yield from call_faults(node)


def call_faults(node: ast.Call) -> Iterator[str]:
    name = dotted(node.func)
    given = {k.arg: k.value for k in node.keywords}

    def says(argument: str, value: object) -> bool:
        found = given.get(argument)
        return isinstance(found, ast.Constant) and found.value is value

    if name in ("eval", "exec", "__import__", "builtins.eval", "builtins.exec"):
        yield name
    if name == "torch.load" and not says("weights_only", True):
        yield "torch.load without weights_only=True"
    if name.endswith(("np.load", "numpy.load")) and "allow_pickle" in given:
        yield "np.load with allow_pickle"
    if name.endswith(("pd.read_pickle", "pandas.read_pickle")):
        yield name
    if name.startswith("yaml.") and name not in ("yaml.safe_load", "yaml.safe_dump"):
        yield name
    if "trust_remote_code" in given and not says("trust_remote_code", False):
        yield "trust_remote_code"
    if name.startswith("os.system") or says("shell", True):
        yield "a shell"


@pytest.fixture(scope="module")
def modules() -> dict[str, ast.Module]:
    """Every module of the package, by its path in it."""
    parsed = {
        str(file.relative_to(PACKAGE)): tree(file.read_text(encoding="utf-8")) for file in FILES
    }
    assert {"run.py", "cli.py"} < parsed.keys()
    return parsed


def test_nothing_is_unpickled_or_evaluated(modules):
    assert [f"{name}: {fault}" for name, module in modules.items() for fault in faults(module)] == (
        []
    )


def test_the_scan_sees():
    forbidden = [
        "import pickle",
        "import joblib.memory",
        "from dill import load",
        "from pickle import loads, UnpicklingError",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "np.load(file, allow_pickle=True)",
        "yaml.load(text)",
        "yaml.unsafe_load(text)",
        "Model.from_pretrained(path, trust_remote_code=True)",
        "Model.from_pretrained(path, trust_remote_code=given)",
        "eval(text)",
        "exec(text)",
        "subprocess.run(text, shell=True)",
    ]
    assert [text for text in forbidden if not [*faults(tree(text))]] == []


def test_the_scan_lets_pass():
    harmless = [
        "from pickle import UnpicklingError",
        "torch.load(path, weights_only=True)",
        "np.load(file)",
        "yaml.safe_load(text)",
        "Model(config).eval()",
        "importlib.import_module(name)",
    ]
    assert [text for text in harmless if [*faults(tree(text))]] == []


def auto_calls(module: ast.Module) -> Iterator[ast.Call]:
    for node in ast.walk(module):
        if isinstance(node, ast.Call) and dotted(node.func).endswith("from_pretrained"):
            yield node


def test_models_are_loaded_as_the_hub_module_says(modules):
    """`pretrained.source` trusts no code of a hub: whoever loads by a name has to pass that on."""
    calls = [
        (name, call)
        for name, module in modules.items()
        if not name.startswith("shapes")  # it loads its own files
        for call in auto_calls(module)
    ]
    assert len(calls) > 5
    assert [f"{name}: {ast.unparse(call)}" for name, call in calls if not as_said(call)] == []


def as_said(call: ast.Call) -> bool:
    """Whether a call passes on what `pretrained.source` says, or makes a tokenizer of no file."""
    passed = [dotted(k.value) for k in call.keywords if k.arg is None]
    made = isinstance(call.args[0], ast.Constant) and call.args[0].value is None
    return made or "kwargs" in passed


def test_the_hub_module_trusts_no_code(tmp_path):
    from b2ray.diffusion import pretrained

    for _, where in (pretrained.source(str(tmp_path)), pretrained.source("owner/name", "main")):
        assert where["trust_remote_code"] is False
