"""What cluster/local.py refuses, and that it ends no process but its own."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.local import LONGEST_STATE, Cluster, Node, State, main

ROOT = Path(__file__).parents[3]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose name is short enough for sockets."""
    made = Path(tempfile.mkdtemp(prefix="b2-", dir="/tmp"))
    yield made
    shutil.rmtree(made)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(a) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


def test_a_process_that_took_over_a_nodes_pid_is_left_alone(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with subprocess.Popen(["sleep", "60"]) as other:
        started = psutil.Process(other.pid).create_time()
        ours = Node("head", other.pid, started - 100)
        assert ours.process() is None
        assert Node("head", other.pid, started).process() == psutil.Process(other.pid)
        State(folder).write(Cluster([ours], "", "", "disabled"))
        assert main(["stop", "--state", str(folder)]) == 0
        assert "head had died before" in capsys.readouterr().err
        assert other.poll() is None
        other.kill()


def test_stopping_twice_is_no_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stop", "--state", str(folder)]) == 0
    assert "nothing to stop" in capsys.readouterr().err


def test_status_without_a_cluster_says_how_to_start_one(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "`start` makes one" in refused(capsys, "status", "--state", folder)


def test_a_state_folder_too_long_for_sockets_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    long = "/tmp/" + "x" * (LONGEST_STATE - 4)
    assert "too long" in refused(capsys, "start", "--state", long)
    assert not Path(long).exists()


def test_a_state_folder_that_others_can_write_to_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.chmod(0o777)
    assert "can be written by other users" in refused(capsys, "stop", "--state", folder)


@pytest.mark.parametrize("option", ["--port", "--dashboard-port"])
def test_a_port_in_use_is_refused(
    folder: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = refused(capsys, "start", "--state", folder, option, port)
    assert f"{option} {port} cannot be used" in said


def test_a_head_that_does_not_start_is_told_with_its_last_words(folder: Path) -> None:
    broken = folder / "broken" / "ray"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise SystemExit('this Ray is broken')")
    ran = subprocess.run(
        [sys.executable, "cluster/local.py", "start", "--state", folder],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(broken.parent)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 2 and ran.stdout == ""
    assert "head ended while it started, and said last: this Ray is broken" in ran.stderr
    assert not (folder / "cluster.json").exists() and not (folder / "token").exists()


def test_nodes_that_run_are_not_started_again(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    me = psutil.Process()
    node = {"name": "head", "pid": me.pid, "started": me.create_time()}
    cluster = {"nodes": [node], "address": "", "dashboard": "", "auth": "token"}
    (folder / "cluster.json").write_text(json.dumps(cluster))
    assert "is running from" in refused(capsys, "start", "--state", folder)
