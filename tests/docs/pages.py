"""The documentation's pages, and what is in them: code blocks, commands, links, anchors."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
OTHERS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "cluster/README.md", "deploy/README.md")
PAGES = sorted(
    {
        *OTHERS,
        *(
            str(file.relative_to(ROOT))
            for file in (ROOT / "docs").rglob("*.md")
            if not any(part.startswith("_") for part in file.relative_to(ROOT).parts)
        ),
    }
)
NAMED = re.compile(r"# ([\w-]+\.\w+)\n")  # a block that is a file begins with its name


@dataclass(frozen=True)
class Block:
    """A block of code: where it begins, its language, its text."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def file(self) -> str | None:
        """The name of the file that it stands for, if it says one."""
        found = NAMED.match(self.text)
        return found[1] if found else None

    def commands(self) -> Iterator[Command]:
        """A shell block's commands, those of several lines as one."""
        held, first = "", 0
        for number, line in enumerate(self.text.splitlines(), self.line + 1):
            first = first if held else number
            held += line
            if line.endswith("\\"):
                held = held[:-1]
            elif held.strip() and not held.lstrip().startswith("#"):
                yield Command(self.page, first, held.strip())
                held = ""
            else:
                held = ""


@dataclass(frozen=True)
class Command:
    """A command as it is typed, with the comment behind it."""

    page: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {shlex.join(self.words)}"

    @property
    def words(self) -> list[str]:
        """Its words, without comments."""
        return shlex.split(self.text, comments=True)


def read(page: str) -> str:
    """A page's text."""
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    """The fenced and the indented blocks of a page; an indented one has no language."""
    found = []
    for token in MarkdownIt().parse(read(page)):
        if token.type in ("fence", "code_block") and token.map is not None:
            # An indented block has no fence before its first line.
            line = token.map[0] + (token.type == "fence")
            found.append(Block(page, line, token.info.strip(), token.content))
    return found


def spans(page: str) -> list[str]:
    """The code spans in a page's text."""
    return [text for kind, text, _ in _inline(page) if kind == "code_inline"]


def links(page: str) -> list[str]:
    """Where a page's links and pictures lead, as they stand there."""
    return [to for kind, _, to in _inline(page) if kind in ("link_open", "image")]


def headings(page: str) -> list[str]:
    """The anchors of a page's headings, as code hosts and the site name them."""
    found: list[str] = []
    tokens = MarkdownIt().enable("table").parse(read(page))
    for token, following in pairwise(tokens):
        if token.type == "heading_open":
            text = "".join(c.content for c in following.children or [])
            slug = re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-")
            count = sum(
                re.fullmatch(rf"{re.escape(slug)}(-\d+)?", old) is not None for old in found
            )
            found.append(f"{slug}-{count}" if count else slug)
    return found


def _inline(page: str) -> Iterator[tuple[str, str, str]]:
    for token in MarkdownIt().enable("table").parse(read(page)):
        for child in token.children or []:
            to = child.attrs.get("href") or child.attrs.get("src") or ""
            yield child.type, child.content, str(to)
