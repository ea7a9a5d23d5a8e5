"""The architecture's table of packages is what the imports say, and its order has no way back."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict

import pytest

from tests.docs.pages import ROOT, read

PAGE = "docs/explanation/architecture.md"
PACKAGE = ROOT / "b2ray"
ROW = re.compile(r"^\| (`[\w`, ]+`) \| .+ \| ([`\w, ]*)\|$", re.M)


def imported() -> dict[str, set[str]]:
    """What each package, or module at the top, imports of the others."""
    arrows: dict[str, set[str]] = defaultdict(set)
    for file in sorted(PACKAGE.rglob("*.py")):
        own = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        arrows[own] |= set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module == "b2ray":
                names = [f"b2ray.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            known = {name.split(".")[1] for name in names if name.startswith("b2ray.")}
            arrows[own] |= known - {own, "__version__"}
    del arrows["__init__"]
    return dict(arrows)


def documented() -> dict[str, set[str]]:
    """The table's rows, in their order."""
    table = read(PAGE).partition("| package or module |")[2].partition("\n\n")[0]
    return {
        name: set(re.findall(r"\w+", known))
        for names, known in ROW.findall(table)
        for name in re.findall(r"\w+", names)
    }


def test_the_table_is_what_the_imports_say():
    assert documented() == imported()


def test_each_package_knows_only_those_below_it():
    order = list(documented())
    upward = [
        f"{name} knows {other}"
        for name, known in documented().items()
        for other in known
        if order.index(other) < order.index(name)
    ]
    assert upward == []


@pytest.mark.parametrize(
    ("package", "without"),
    [("algorithm", {"ray", "torch"}), ("config", {"ray", "torch", "numpy"}), ("fleet", {"torch"})],
)
def test_a_package_does_without_what_it_need_not_know(package, without):
    modules = [
        ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for file in sorted((PACKAGE / package).glob("*.py"))
    ]
    program = f"import sys, {', '.join(modules)}; print(*{without!r} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr
