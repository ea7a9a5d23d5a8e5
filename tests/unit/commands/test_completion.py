"""`b2ray completion`: what the shells themselves complete."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from b2ray.cli import COMMANDS
from b2ray.commands.completion import main, whole_parser
from b2ray.config import Config
from b2ray.errors import EXIT_CONFIG, EXIT_DONE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    """A working directory with a run, and a script for each shell."""
    from contextlib import redirect_stdout

    place = tmp_path_factory.mktemp("shell")
    (place / "runs" / "mine").mkdir(parents=True)
    (place / "runs" / "mine" / "config.yaml").write_text("")
    for shell in ("bash", "zsh"):
        with (place / shell).open("w") as file, redirect_stdout(file):
            assert main([shell]) == EXIT_DONE
    return place


@pytest.fixture
def complete(folder):
    """What bash offers for the last of some words."""

    def call(*words: str) -> list[str]:
        listed = " ".join(f"'{word}'" for word in ("b2ray", *words))
        script = (
            f"source ./bash; COMP_WORDS=({listed}); COMP_CWORD={len(words)}; "
            "$(complete -p b2ray | sed 's/.*-F \\([^ ]*\\).*/\\1/'); "
            'printf "%s\\n" "${COMPREPLY[@]}"'
        )
        done = subprocess.run(
            ["bash", "-c", script], cwd=folder, capture_output=True, text=True, check=True
        )
        return done.stdout.split()

    return call


def test_commands(complete):
    assert set(complete("")) == set(COMMANDS)
    assert complete("ev") == ["evaluate"]


@pytest.mark.parametrize("command", ["sample", "export", "report", "watch", "evaluate"])
def test_runs_and_options(complete, command):
    assert "mine" in complete(command, "m")
    assert "--runs" in complete(command, "--r")


def test_values(complete):
    assert complete("export", "mine", "--format", "") == ["diffusers", "kohya", "merged"]
    assert complete("evaluate", "--unit", "p") == ["picture", "prompt"]
    assert complete("check", "--config", "ru") == ["runs"]
    assert complete("completion", "") == ["bash", "zsh"]


def test_fields_of_a_run(complete):
    assert complete("run", "--curriculum.s") == ["--curriculum.stages", "--curriculum.start"]
    assert complete("run", "--model.lora.") == [
        f"--model.lora.{name}" for name in ("rank", "alpha", "targets", "merged")
    ]
    assert "ddpo" in complete("run", "--preset", "d")
    assert complete("run", "--model.compile", "") == ["true", "false"]
    assert complete("run", "--fleet.samplers.max", "") == ["auto"]


def test_every_field_is_there(complete):
    offered = set(complete("run", "--"))
    for section in Config.model_fields:
        assert any(word.split(".")[0] == f"--{section}" for word in offered), section


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_shell_can_read_it(folder, shell):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    subprocess.run([shell, "-n", folder / shell], check=True)


def test_zsh_gets_the_same_words(folder):
    text = (folder / "zsh").read_text()
    for word in ("--curriculum.stages", "evaluate", "(picture prompt)", "runs/*/config.yaml"):
        assert word in text


def test_the_parser_names_every_command_once():
    (commands,) = (a for a in whole_parser()._actions if a.choices)
    assert set(commands.choices) == set(COMMANDS)


def test_another_shell_is_a_sentence(capsys):
    assert main(["tcsh"]) == EXIT_CONFIG
    assert "invalid choice: 'tcsh'" in capsys.readouterr().err
