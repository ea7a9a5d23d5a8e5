"""Examples in YAML are sound configurations; commands in the text are commands that there are."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from b2ray.cli import COMMANDS
from b2ray.config import Config
from b2ray.options import merge, parse, read_words, validated
from b2ray.rewards import check
from b2ray.sweep.spec import split
from tests.docs.pages import PAGES, ROOT, Block, blocks, spans

YAML = [block for page in PAGES for block in blocks(page) if block.language == "yaml"]
LEAST = {"prompts": {"train": "animals"}, "rewards": [{"name": "any", "kind": "clip"}]}
SPANS = sorted({(page, " ".join(span.split())) for page in PAGES for span in spans(page)})
RUN = ("python -m b2ray.run ", "b2ray run ", "b2ray check ")


def parts(block: Block) -> list[str]:
    """A block's text, cut where a section comes a second time: alternatives, one a part."""
    found, seen = [""], set[str]()
    for line in block.text.splitlines(keepends=True):
        key = line.partition(":")[0] if line[:1].isalpha() else ""
        if key in seen:
            found.append("")
            seen = set()
        seen |= {key} - {""}
        found[-1] += line
    return found


@pytest.mark.parametrize("block", YAML, ids=str)
def test_a_configuration_is_sound(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in blocks(block.page):
        if other.file:
            (tmp_path / other.file).write_text(other.text)
    monkeypatch.syspath_prepend(tmp_path)
    for part in parts(block):
        values = yaml.safe_load(part)
        if {"grid", "sample"} & values.keys():
            _, values = split({"name": "any", "metric": "heldout/judge", **values}, str(block))
        least = {} if "demonstrations" in values else LEAST
        config = validated(merge(least, values))
        for reward in config.all_rewards:
            check(reward)


@pytest.mark.parametrize(
    ("page", "span"), [s for s in SPANS if s[1].startswith(RUN) and "--help" not in s[1]]
)
def test_a_run_in_the_text_is_accepted(page: str, span: str) -> None:
    said = span.replace("FILE", "configs/quickstart.yaml").replace("=N", "=1")
    words = shlex.split(said)
    argv = words[3:] if words[0] == "python" else words[2:]
    if "--sweep" in argv:
        assert read_words(argv).sweep
        return
    argv = [word for word in argv if not word.startswith(("--variance", "--calls", "--json"))]
    assert isinstance(parse(argv).config, Config)


@pytest.mark.parametrize(("page", "span"), [s for s in SPANS if s[1].startswith("--")])
def test_a_field_in_the_text_is_one(page: str, span: str) -> None:
    name = span.removeprefix("--").partition("=")[0].split()[0]
    if "." in name and name != "section.field":
        section, _, field = name.partition(".")
        inner = Config.model_fields[section].annotation
        for part in field.split("."):
            assert part in inner.model_fields, f"{page}: {span}"
            inner = inner.model_fields[part].annotation


@pytest.mark.parametrize(
    ("page", "span"), [s for s in SPANS if re.match(r"b2ray [a-z]+\b(?! is)", s[1])]
)
def test_a_command_in_the_text_is_one(page: str, span: str) -> None:
    words = shlex.split(span)[1:]
    assert any(" ".join(words[:count]) in COMMANDS for count in (1, 2)), f"{page}: {span}"


@pytest.mark.parametrize("target", sorted({s[5:] for _, s in SPANS if re.match(r"make \w", s)}))
def test_a_target_in_the_text_is_one(target: str) -> None:
    words = ["make", "--dry-run", "--no-print-directory", *shlex.split(target)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
