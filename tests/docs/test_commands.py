"""Every command of the documentation runs: on small models, a few stages, in a sandbox."""

from __future__ import annotations

import shlex

import pytest

from b2ray.errors import ConfigError
from tests.docs.pages import PAGES, ROOT, Block, Command, blocks
from tests.docs.rules import (
    COMPILED,
    LOOKED_AT,
    RULES,
    missing,
    needs_cluster,
    rule,
    starts_processes,
)
from tests.docs.sandbox import Sandbox

SHELL = "sh"
LANGUAGES = {SHELL, "text", "python", "yaml", "json", "math"}
BLOCKS = {page: blocks(page) for page in PAGES}
COMMANDS = [
    command
    for found in BLOCKS.values()
    for block in found
    if block.language == SHELL
    for command in block.commands()
]


def looked_at(command: Command) -> str:
    """The entry of `LOOKED_AT` that a command would be."""
    return " ".join(command.text.partition(" #")[0].split())


RUN = {
    page: [c for c in COMMANDS if c.page == page and looked_at(c) not in LOOKED_AT]
    for page in PAGES
}


def is_cold(page: str) -> bool:
    """Whether a page's commands, or its Python, need processes of their own."""
    scripts = any(block.language == "python" for block in BLOCKS[page])
    return scripts or any(starts_processes(command.words) for command in RUN[page])


RUNNING = [
    pytest.param(page, marks=[pytest.mark.cold] if is_cold(page) else [])
    for page, commands in RUN.items()
    if commands
]


def test_a_block_says_what_it_is() -> None:
    unmarked = [
        f"{block}: a block of {block.language or 'no language'}"
        for blocks_of_page in BLOCKS.values()
        for block in blocks_of_page
        # `{...}` is a directive of the site.
        if not block.language.startswith("{") and block.language not in LANGUAGES
    ]
    assert not unmarked, "mark commands as `sh`, what is no code as `text`:\n" + "\n".join(unmarked)


def test_every_command_is_known() -> None:
    unknown = [str(c) for c in COMMANDS if looked_at(c) not in LOOKED_AT and rule(c.words) is None]
    assert not unknown, (
        "nobody has said how to run these commands: give their first words a rule in "
        "tests/docs/rules.py, or list them there in LOOKED_AT with the reason why they cannot be "
        "run here:\n" + "\n".join(unknown)
    )


def test_nothing_is_listed_that_is_not_there() -> None:
    assert {*LOOKED_AT} - {looked_at(c) for c in COMMANDS} == set()
    used = {rule(c.words) for c in COMMANDS}
    assert [key for key, made in RULES.items() if made not in used] == []


def test_a_command_names_what_is_there() -> None:
    assert len(COMMANDS) > 50
    absent = {str(c): files for c in COMMANDS if (files := missing(c.text, ROOT))}
    assert absent == {}


@pytest.mark.timeout(3600)  # a page has up to a dozen commands, each with its own limit
@pytest.mark.parametrize("page", RUNNING)
def test_the_commands_of_a_page_run(sandbox: Sandbox, page: str) -> None:
    sandbox.begin(any(needs_cluster(command.words) for command in RUN[page]))
    for block in BLOCKS[page]:
        if block.language == SHELL:
            for command in block.commands():
                _run(sandbox, command)
        elif block.file:
            sandbox.write(block.file, block.text)
        elif block.language == "python":
            _run_python(sandbox, block)


def _run(sandbox: Sandbox, command: Command) -> None:
    if looked_at(command) in LOOKED_AT:
        return
    try:
        sandbox.do(command.words, command.text)
    except (AssertionError, ConfigError) as failed:
        pytest.fail(f"{command}\n{failed}", pytrace=False)


def _run_python(sandbox: Sandbox, block: Block) -> None:
    if block.page in COMPILED:
        compile(block.text, str(block), "exec")
        return
    done = sandbox.shell(f"python -c {shlex.quote(block.text)}")
    assert done.returncode == 0, f"{block}\n{done.stdout}"
