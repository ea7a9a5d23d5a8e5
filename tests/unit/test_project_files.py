"""The files that a code host reads agree with the package and with the Makefile."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

import b2ray

ROOT = Path(__file__).parents[2]


def read(name: str) -> Any:
    """A YAML file of the repository."""
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def make_targets() -> set[str]:
    """What the workflow calls `make` with."""
    jobs = read(".github/workflows/ci.yml")["jobs"].values()
    commands = "\n".join(step.get("run", "") for job in jobs for step in job["steps"])
    return set(re.findall(r"^make (\S+)$", commands, re.M))


def test_the_citation_is_of_this_version_and_names_the_paper():
    citation = read("CITATION.cff")
    assert citation["version"] == b2ray.__version__
    assert citation["title"] == "b2ray" and citation["type"] == "software"
    assert citation["cff-version"] == "1.2.0" and citation["message"] and citation["authors"]
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'license = "{citation["license"]}"' in project
    (paper,) = citation["references"]
    assert paper["url"] == "https://arxiv.org/abs/2503.11240" and len(paper["authors"]) == 9


def test_the_changelog_names_this_version_after_what_is_unreleased():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## (\S+)", text, re.M)
    assert versions[:2] == ["Unreleased", b2ray.__version__]


def test_the_workflow_makes_targets_that_there_are():
    targets = make_targets()
    assert targets == {"quality", "test", "test-all"}
    failures = {}
    for target in sorted(targets):
        words = ["make", "--dry-run", "--no-print-directory", target]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            failures[target] = done.stderr
    assert failures == {}


def test_the_workflow_takes_a_python_that_the_project_runs_on():
    for job in read(".github/workflows/ci.yml")["jobs"].values():
        (setup,) = (s for s in job["steps"] if s.get("uses", "").startswith("actions/setup-python"))
        assert setup["with"]["python-version"] == "3.11"
        for name in setup["with"]["cache-dependency-path"].split():
            assert (ROOT / name).is_file()


def test_hooks_call_tools_of_the_projects_own_environment():
    (repository,) = read(".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    for hook in repository["hooks"]:
        python, *words = hook["entry"].split()
        assert (python, hook["language"]) == (".venv/bin/python", "system")
        command = [sys.executable, *words[:2], "--version"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
