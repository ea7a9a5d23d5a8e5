"""The console script and its exit codes."""

from __future__ import annotations

import itertools
import pickle
import re
import subprocess
import sys

import pytest

from b2ray import cli
from b2ray.errors import EXIT_CONFIG, EXIT_DONE, WorkerError


@pytest.fixture
def command(monkeypatch):
    def call(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["b2ray", *words])
        return cli.main()

    return call


@pytest.mark.parametrize("words", [(), ("--help",), ("help",)])
def test_it_names_its_commands(command, capsys, words):
    assert command(*words) == EXIT_DONE
    shown = capsys.readouterr().out
    lines = [line.strip() for line in shown.splitlines()]
    for name in cli.COMMANDS:
        assert sum(line.startswith(f"{name}  ") for line in lines) == 1


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_explains_every_option_in_a_persons_words(command, capsys, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as end:
        command(*name.split(), "--help")
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "--help" in shown
    for word in ("None", "null", "==SUPPRESS==", "tuple[", "dict[", "JSON string", "(default: ())"):
        assert word not in shown
    options = shown.split("options:", 1)[1].split("fields of the configuration:")[0]
    _, *lines = options.splitlines()
    for line, following in itertools.pairwise([*lines, ""]):
        if line.startswith("  -"):
            # An option's own text stands beside it, or beneath it if it is long.
            beside = re.split(r"\s{2,}", line.strip())[1:]
            assert beside or following.startswith(" " * 10), line


def test_listing_the_commands_imports_nothing_heavy():
    code = (
        "import sys, b2ray.cli; sys.argv = ['b2ray']; b2ray.cli.main(); print(sorted(sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not any(f"'{name}'" in shown.stdout for name in ("torch", "ray", "pydantic", "numpy"))


@pytest.mark.parametrize("words", [("train",), ("shapes",), ("shapes", "build")])
def test_an_unknown_command_is_named(command, capsys, words):
    assert command(*words) == EXIT_CONFIG
    assert f"no command {words[0]!r}" in capsys.readouterr().err


def test_run_gets_the_rest(command, capsys):
    assert command("run", "--sampling.eta=0") == EXIT_CONFIG
    assert "sampling.eta is 0" in capsys.readouterr().err


def test_a_workers_error_crosses_processes():
    error = WorkerError("sampler", "host (pid 3)", "denoising", "ValueError: x", "trace")
    again = pickle.loads(pickle.dumps(error))
    assert (
        str(again) == str(error) == "sampler on host (pid 3) failed while denoising: ValueError: x"
    )
    assert again.details == "trace"
