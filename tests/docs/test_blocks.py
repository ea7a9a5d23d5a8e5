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
from b2ray.config.load import merge, parse, read_words, validated
from b2ray.errors import ConfigError
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


def refusal(span: str) -> str:
    """Why the command line of a run is refused; empty: it is accepted."""
    words = shlex.split(span.replace("FILE", "configs/quickstart.yaml").replace("=N", "=1"))
    argv = words[3:] if words[0] == "python" else words[2:]
    try:
        if "--sweep" in argv:
            return "" if read_words(argv).sweep else "it has no sweep"
        parse([word for word in argv if not word.startswith(("--variance", "--calls", "--json"))])
    except ConfigError as error:
        return str(error)
    return ""


def test_a_run_in_the_text_is_accepted() -> None:
    runs = [s for s in SPANS if s[1].startswith(RUN) and "--help" not in s[1]]
    assert runs
    assert [(page, span, why) for page, span in runs if (why := refusal(span))] == []


def is_a_field(name: str) -> bool:
    fields = Config.model_fields
    for part in name.split("."):
        if part not in fields:
            return False
        fields = getattr(fields[part].annotation, "model_fields", {})
    return True


def test_a_field_in_the_text_is_one() -> None:
    options = [span for span in SPANS if span[1].startswith("--")]
    names = [(page, span.partition("=")[0].split()[0][2:]) for page, span in options]
    fields = [(page, name) for page, name in names if "." in name and name != "section.field"]
    assert fields
    assert [(page, name) for page, name in fields if not is_a_field(name)] == []


def test_a_command_in_the_text_is_one() -> None:
    commands = [s for s in SPANS if re.match(r"b2ray [a-z]+\b(?! is)", s[1])]
    assert commands
    assert [s for s in commands if not {*first_words(s[1])} & {*COMMANDS}] == []


def first_words(span: str) -> list[str]:
    """The first word behind `b2ray`, and the first two."""
    words = shlex.split(span)[1:]
    return [" ".join(words[:count]) for count in (1, 2)]


def test_a_target_in_the_text_is_one() -> None:
    targets = sorted({s[5:] for _, s in SPANS if re.match(r"make \w", s)})
    assert targets
    complaints = {target: complaint for target in targets if (complaint := of_make(target))}
    assert complaints == {}


def of_make(target: str) -> str:
    """What `make` says of a target that it does not know; empty: it knows it."""
    words = ["make", "--dry-run", "--no-print-directory", *shlex.split(target)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    return done.stderr or f"exit code {done.returncode}" if done.returncode else ""
