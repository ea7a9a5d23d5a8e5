"""The site builds without a warning, and has what is generated."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from b2ray.cli import COMMANDS
from b2ray.config import Config
from b2ray.errors import EXIT_CONFIG, EXIT_DONE, EXIT_STOPPED, EXIT_WORKER
from b2ray.tracking.mlflow.names import flat
from tests.docs.pages import PAGES, ROOT, read


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    words = re.search(r"sphinx (.*) \. build/docs", read("Makefile"))
    assert words
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *words[1].split(), ".", str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout
    return folder


def test_it_builds_without_a_warning(site: Path) -> None:
    built = {str(file.relative_to(site)) for file in site.rglob("*.html")}
    assert {page.replace(".md", ".html") for page in PAGES} <= built
    first = (site / "index.html").read_text()
    assert "README.html" in first


def test_it_needs_no_network(site: Path) -> None:
    for file in site.rglob("*.html"):
        text = file.read_text()
        loaded = re.findall(r'<(?:script|img|link|iframe)\b[^>]*?(?:src|href)="(\w+:)?//', text)
        assert not loaded, file


def test_every_field_has_its_place(site: Path) -> None:
    page = (site / "docs/reference/configuration.html").read_text()
    found = flat(Config(**SOUND).model_dump(mode="json"))
    fields = {name for name in found if name.partition(".")[0] != "rewards"}
    assert len(fields) > 90
    assert {name for name in fields if f'id="confval-{name}"' not in page} == (set())
    for name in ("name", "kind", "path", "weight", "scale", "workers[…].gpus", "workers.gpus"):
        assert f"rewards[…].{name}" in page or "[" in name
    assert "Clip range in nats of a whole step" in page
    assert "aesthetic.options.head" in page


def test_every_command_and_the_modules_have_their_place(site: Path) -> None:
    commands = (site / "docs/reference/commands.html").read_text()
    for words in COMMANDS:
        assert f"b2ray {words}" in commands
    assert "--print-config" in commands and "--variance" in commands and "--dtype" in commands
    api = (site / "docs/reference/api.html").read_text()
    for name in (
        *("rewards.RewardModel.score", "algorithm.curriculum.interval"),
        "algorithm.branching.advantages",
    ):
        assert f'id="b2ray.{name}"' in api


def test_every_preset_and_exit_code_has_its_line() -> None:
    presets = {file.stem for file in (ROOT / "b2ray" / "presets").glob("*.yaml")}
    shown = re.findall(r"b2ray/presets/(\w+)\.yaml", read("docs/reference/presets.md"))
    assert sorted(shown) == sorted(presets)
    codes = re.findall(r"^\| (\d+) \|", read("docs/reference/exit_codes.md"), re.M)
    assert [*map(int, codes)] == [EXIT_DONE, EXIT_CONFIG, EXIT_WORKER, EXIT_STOPPED]


SOUND = {
    "prompts": {"train": "animals"},
    "rewards": [{"name": "clip", "kind": "clip"}],
}
