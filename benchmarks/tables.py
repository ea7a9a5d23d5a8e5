"""Tables in Markdown, and the places in documents that they are written to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fill(file: Path, parts: Mapping[str, str]) -> None:
    """Put texts into a document, each between its marks `<!-- NAME -->` and `<!-- /NAME -->`."""
    text = file.read_text(encoding="utf-8")
    for mark, body in parts.items():
        before, rest = text.split(f"<!-- {mark} -->\n")
        after = rest.split(f"<!-- /{mark} -->")[1]
        text = f"{before}<!-- {mark} -->\n{body}\n<!-- /{mark} -->{after}"
    file.write_text(text, encoding="utf-8")
