"""`{commands}`: what every command says of itself with --help, from the commands themselves."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import sys
from collections.abc import Iterator

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import ExtensionMetadata

from b2ray.cli import COMMANDS, USAGE

COLUMNS = "88"
# Where a command has a usage of its own before that of the fields, the first is the better one.
AGAIN = re.compile(r"(?<=\n)usage: python -m b2ray\.run.*", re.S)
FIELDS = "\n  --name str "  # from here on the help is that of the configuration's fields


class Commands(SphinxDirective):
    """A section for each command of `b2ray`."""

    def run(self) -> list[nodes.Node]:
        """The sections as docutils nodes."""
        text = "\n".join(sections())
        return self.parse_text_to_nodes(text, allow_section_headings=True)


def sections() -> Iterator[str]:
    """Markdown of all commands."""
    yield f"## b2ray\n\n```text\n{USAGE.strip()}\n```\n"
    for words, (module, line) in COMMANDS.items():
        yield f"## b2ray {words}\n\n{line[0].upper()}{line[1:]}.\n"
        text = helped(module)
        own, fields, _ = text.partition(FIELDS)
        own = AGAIN.sub("", own)
        yield f"```text\n{own.strip()}\n```\n"
        if fields:
            yield "And every field of the [configuration](configuration.md).\n"


def helped(module: str) -> str:
    """What a command prints with --help."""
    said, columns = io.StringIO(), os.environ.get("COLUMNS")
    name = sys.argv[0]
    try:
        os.environ["COLUMNS"] = COLUMNS
        sys.argv[0] = f"python -m {module.removesuffix('.__main__')}"
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            importlib.import_module(module).main(["--help"])
    finally:
        sys.argv[0] = name
        os.environ.pop("COLUMNS")
        if columns is not None:
            os.environ["COLUMNS"] = columns
    return said.getvalue()


def setup(app: Sphinx) -> ExtensionMetadata:
    """What Sphinx calls."""
    app.add_directive("commands", Commands)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
