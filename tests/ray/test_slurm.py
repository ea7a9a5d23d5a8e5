"""cluster/slurm.sh with Slurm's two commands played by scripts: real raylets, real signals."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runner import ROOT, when

pytestmark = pytest.mark.cold
# Runs here what Slurm would run on a node; its own options end where Ray's command begins.
SRUN = '#!/bin/sh\nwhile [ "$1" != ray ]; do shift; done\nexec "$@"\n'
SCONTROL = '#!/bin/sh\nif [ "$1" = show ]; then echo one; echo two; else echo "$@" >> asked; fi\n'
# Stops resumably, as a run does, and tells who can read the token.
COMMAND = """
import os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
token = os.environ["RAY_AUTH_TOKEN_PATH"]
print(f"running with token {os.stat(token).st_mode & 0o777:o} at {token}", flush=True)
signal.pause()
"""


@pytest.mark.parametrize(
    ("number", "asked"),
    # The time is nearly up; or Slurm preempts and queues again itself, or the user cancels.
    [(signal.SIGUSR1, "requeue {job}\n"), (signal.SIGTERM, "")],
    ids=["time-limit", "cancelled"],
)
def test_a_slurm_job_starts_all_nodes_and_stops_resumably(
    tmp_path: Path, number: signal.Signals, asked: str
) -> None:
    job = f"{os.getpid()}-{number.value}"  # names a folder under /tmp
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (bin_dir / name).write_text(text)
        (bin_dir / name).chmod(0o755)
    env = {
        **os.environ,
        "PATH": f"{bin_dir}:{os.environ['PATH']}",
        "VENV": sys.prefix,
        "SLURM_JOB_ID": job,
        "SLURM_JOB_NODELIST": "[one,two]",
        "SLURM_CPUS_PER_TASK": "1",
    }
    script = subprocess.Popen(
        ["bash", ROOT / "cluster" / "slurm.sh", "python", "-c", COMMAND],
        cwd=tmp_path,
        env=env,
        stdout=(tmp_path / "log").open("w"),
        stderr=subprocess.STDOUT,
    )
    try:

        def said() -> str:
            return (tmp_path / "log").read_text()

        when(lambda: "running with token" in said() or script.poll() is not None, 240)
        assert "slurm.sh: 2 nodes at" in said(), said()
        assert "running with token 600 at" in said()
        script.send_signal(number)
        assert script.wait(60) == 75, said()
    finally:
        script.kill()
        shutil.rmtree(f"/tmp/b2ray-{job}", ignore_errors=True)
    found = tmp_path / "asked"
    assert (found.read_text() if found.exists() else "") == asked.format(job=job)
    assert list(tmp_path.glob(".b2ray-slurm-*")) == []


def test_without_a_command_it_says_so() -> None:
    script = ROOT / "cluster" / "slurm.sh"
    ran = subprocess.run(["bash", script], capture_output=True, text=True, timeout=20)
    assert ran.returncode == 2
    assert ran.stderr.count("\n") == 1 and "no command" in ran.stderr
