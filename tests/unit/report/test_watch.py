"""The served page: over loopback, with news as soon as there are some, for this machine alone."""

from __future__ import annotations

import http.client
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from b2ray.commands.watch import main
from b2ray.errors import EXIT_CONFIG
from b2ray.report import watch
from b2ray.report.page import stamp
from b2ray.report.watch import server
from b2ray.tracking.folder import RunFolder
from tests.unit.report.runs import settings, write_run


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return write_run(settings(tmp_path), done=2)


@pytest.fixture
def address(folder: RunFolder) -> Iterator[str]:
    serving = server(folder.path, folder.config, 0)
    assert serving.server_address[0] == "127.0.0.1"
    thread = threading.Thread(target=serving.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{serving.server_address[1]}"
    serving.shutdown()
    serving.server_close()
    thread.join(10)


def get(address: str) -> str:
    with urllib.request.urlopen(address, timeout=60) as answer:
        return answer.read().decode()


def status(address: str, path: str, host: str) -> int:
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
    connection.request("GET", path, headers={"Host": host})
    found = connection.getresponse().status
    connection.close()
    return found


def test_it_shows_a_stage_as_soon_as_it_is_done_and_is_made_once_for_all_who_look(
    address, folder, monkeypatch
):
    made: list[bool] = []
    true = watch.page
    monkeypatch.setattr(watch, "page", lambda *a, **k: made.append(True) or true(*a, **k))
    first, known = get(f"{address}/"), get(f"{address}/stamp")
    assert "After 2 of 6 stages" in first and known == stamp(folder.path)
    assert f'"{known}"' in first
    assert get(f"{address}/stamp") == known
    assert get(f"{address}/") == first and len(made) == 1
    folder.append_metrics(3, {"reward/mean": 0.5, "cost/reward_queries": 192.0}, [])
    assert get(f"{address}/stamp") != known
    assert "After 3 of 6 stages" in get(f"{address}/") and len(made) == 2


def test_a_page_that_cannot_be_made_is_said_and_made_later(address, folder):
    (file,) = folder.path.glob("evaluations/step-00002_train.json")
    whole = file.read_text()
    file.write_text("{")
    with pytest.raises(urllib.error.HTTPError) as refused:
        get(f"{address}/")
    assert refused.value.code == 500
    assert "no page now: JSONDecodeError" in refused.value.read().decode()
    file.write_text(whole)
    assert "After 2 of 6 stages" in get(f"{address}/")


def test_it_is_for_this_machine_only(address):
    """A name of somebody else's that leads here is refused."""
    assert status(address, "/stamp", "127.0.0.1") == 200
    assert status(address, "/stamp", "localhost:80") == 200
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", ""):
        assert status(address, "/", host) == 403
    for path in ("/../config.yaml", "/config.yaml", "//etc/passwd", "/?x=1"):
        assert status(address, path, "127.0.0.1") == 404


def test_a_port_that_is_taken_is_a_sentence(address, folder, capsys):
    port = address.rpartition(":")[2]
    assert main([str(folder.path), f"--port={port}"]) == EXIT_CONFIG
    assert f"--port {port} cannot be used" in capsys.readouterr().err
    assert main([str(folder.path), "--port=70000"]) == EXIT_CONFIG
    assert "--port 70000 cannot be used" in capsys.readouterr().err


def test_a_run_that_is_not_there_is_a_sentence(tmp_path, capsys):
    assert main(["nothing", f"--runs={tmp_path}"]) == EXIT_CONFIG
    assert "there is no run 'nothing'" in capsys.readouterr().err


def test_the_command_serves_until_it_is_interrupted(folder):
    command = [sys.executable, "-m", "b2ray.commands.watch", str(folder.path), "--port=0"]
    # A shell's background job ignores Ctrl-C, and so would what it starts.
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        found = re.fullmatch(r"mine: (http://127\.0\.0\.1:\d+/) \(Ctrl-C ends it, .*\)\n", said)
        assert found, said
        assert "After 2 of 6 stages" in get(found[1])
        process.send_signal(signal.SIGINT)
        _, complaints = process.communicate(timeout=60)
        assert process.returncode == 0 and complaints == ""
    finally:
        process.kill()
        process.wait(30)
