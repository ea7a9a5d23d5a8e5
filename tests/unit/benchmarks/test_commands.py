"""Every benchmark starts as it says, and every command that a page or a file names is one."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "benchmarks"
STARTED = re.compile(r'^if __name__ == "__main__":$', re.M)
# A script that runs in another environment, which another benchmark makes, takes no options.
ELSEWHERE = {"benchmarks.speed.peer_trl", "benchmarks.speed.released"}
SCRIPTS = sorted(
    {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
        for file in FOLDER.rglob("*.py")
        if STARTED.search(file.read_text(encoding="utf-8"))
    }
    - ELSEWHERE
)
NAMED = re.compile(r"python\s+-m\s+((?:benchmarks|tools)\b[.\w]*\w)")


def source(script: str) -> Path:
    """The file that `python -m SCRIPT` runs."""
    place = ROOT.joinpath(*script.split("."))
    return place / "__main__.py" if place.is_dir() else place.with_suffix(".py")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_how_it_is_started(script, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    name = f"{script}.__main__" if source(script).stem == "__main__" else script
    main = importlib.import_module(name).main
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m {script} ")


def test_a_folder_is_a_package_and_no_module_has_its_name():
    folders = [path for path in FOLDER.iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert len(folders) >= 5
    assert [f.name for f in folders if not (f / "__init__.py").exists()] == []
    assert [f.name for f in folders if f.with_suffix(".py").exists()] == []


def test_commands_that_are_named_are_there():
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "Makefile"]
    for folder in ("b2ray", "benchmarks", "configs", "docs", "tools"):
        files += [f for kind in ("md", "py", "yaml") for f in (ROOT / folder).rglob(f"*.{kind}")]
    named = {
        (str(file.relative_to(ROOT)), script)
        for file in files
        for script in NAMED.findall(file.read_text(encoding="utf-8"))
    }
    assert {script for _, script in named} >= {"benchmarks.speed", "benchmarks.efficiency"}
    missing = [
        (file, script)
        for file, script in sorted(named)
        if not source(script).is_file() and not re.search(r"\b[A-Z]{3,}\b", script)
    ]
    assert missing == []
