"""The tools of the repository may not unpickle or evaluate text either."""

from __future__ import annotations

from b2ray.config.load import PACKAGE
from tests.unit.security.test_code import faults, tree

TOOLS = PACKAGE.parent / "tools"


def test_nothing_is_unpickled_or_evaluated():
    modules = {
        str(file.relative_to(TOOLS)): tree(file.read_text(encoding="utf-8"))
        for file in TOOLS.rglob("*.py")
    }
    assert {"shapes/__main__.py", "shapes/unet.py"} < modules.keys()
    offenders = [f"{name}: {fault}" for name, module in modules.items() for fault in faults(module)]
    assert offenders == []
