"""Stores that more than one process opens."""

from __future__ import annotations

import subprocess
import sys
import time

import filelock

from b2ray.tracking.mlflow.store import client_of

OPEN = """
import sys, time
from pathlib import Path
import mlflow.store.tracking.sqlalchemy_store  # the imports' time differs: not what is tried
from b2ray.tracking.mlflow.store import client_of
at, uri = Path(sys.argv[1]), sys.argv[2]
at.with_name(at.name + sys.argv[3]).touch()
while not at.exists():
    time.sleep(0.001)
time.sleep(0.3 * int(sys.argv[3]))
print(client_of(uri).get_experiment_by_name("Default").name)
"""


def test_processes_that_open_a_new_store_together_all_find_it_made(tmp_path):
    start, uri = tmp_path / "start", f"sqlite:///{tmp_path / 'mlflow.db'}"
    command = [sys.executable, "-c", OPEN, str(start), uri]
    processes = [
        subprocess.Popen([*command, str(n)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for n in range(4)
    ]
    try:
        while not all(start.with_name(f"start{n}").exists() for n in range(4)):
            assert all(p.poll() is None for p in processes)
            time.sleep(0.05)
        start.touch()
        found = [p.communicate(timeout=200) for p in processes]
    finally:
        for process in processes:
            process.kill()
    assert [out for out, _ in found] == [b"Default\n"] * 4, found


def test_a_file_system_without_locks_has_its_store_all_the_same(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise NotImplementedError

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    client = client_of(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert client.get_experiment_by_name("Default").name == "Default"
