"""The container image's recipe."""

from __future__ import annotations

import re

from tests.unit.deploy.manifests import DEPLOY, ROOT

TEXT = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
LINES = [
    line
    for line in re.sub(r"\\\n\s*", " ", TEXT).splitlines()
    if line and not line.lstrip().startswith("#")
]


def instructions(name: str) -> list[str]:
    return [line.split(maxsplit=1)[1] for line in LINES if line.split()[0] == name]


def test_the_build_of_torch_is_an_argument_and_all_versions_are_pinned():
    assert 'TORCH_INDEX=""' in instructions("ARG")
    installs = [line for line in instructions("RUN") if "pip install" in line]
    assert len(installs) == 2
    for line in installs:
        assert "grep '^torch==' constraints.txt" in line or "--constraint constraints.txt" in line


def test_python_is_ours_and_the_user_is_not_root():
    stages = [i for i, line in enumerate(LINES) if line.startswith("FROM")]
    last = LINES[stages[-1] :]
    assert any(line.startswith("ENV PATH=/opt/b2ray/bin:$PATH") for line in last)
    assert [line for line in last if line.startswith("USER")] == ["USER 1000"]


def test_python_is_one_that_b2ray_runs_on():
    project = (ROOT / "pyproject.toml").read_text()
    assert 'requires-python = ">=3.11,<3.13"' in project
    assert "PYTHON=3.11" in instructions("ARG")


def test_what_is_copied_exists_and_is_let_through():
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().split()
    assert ignored[0] == "*"
    copied = [
        word for line in instructions("COPY") if "--from" not in line for word in line.split()[:-1]
    ]
    for name in copied:
        assert (ROOT / name).exists()
        assert f"!{name}" in ignored
    # The wheel is built of no more than these.
    assert {"pyproject.toml", "README.md", "LICENSE", "b2ray", "configs"} <= {*copied}
