"""`ray job submit` on a cluster of two nodes made by cluster/local.py.

Subprocesses only: a cluster of its own, with token authentication, beside the other tests' Ray.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from b2ray.diffusion.lora_file import FILE
from tests.models import arguments
from tests.runner import ROOT, when

pytestmark = pytest.mark.cold


def local(*words: object, **env: str) -> subprocess.CompletedProcess[str]:
    """cluster/local.py with these arguments."""
    command = [sys.executable, "cluster/local.py", *map(str, words)]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=300
    )


@dataclass
class Local:
    """A running cluster: its state folder, the variables that lead to it, the runs of its jobs."""

    state: Path
    env: dict[str, str]
    runs: Path
    models: Path

    def ray(self, *words: str) -> subprocess.CompletedProcess[str]:
        """One of Ray's commands, as a user types it."""
        command = [sys.executable, "-m", "ray.scripts.scripts", *words]
        env = {**os.environ, **self.env}
        return subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
        )

    def submit(self, name: str, *options: str, **over: object) -> tuple[str, str, int]:
        """Submit a run as the README says; returns the job's id, what was said, the exit code."""
        # `runs` is relative: the job must not keep it in its temporary copy of the repository.
        _, *values = arguments(self.models, Path("runs"), name, **over)
        # The quickstart's weights are for its ten steps.
        values.append("--objective.step_weights=none")
        run = ["python", "-m", "b2ray.run", "--config", "configs/quickstart.yaml", *values]
        done = self.ray("job", "submit", "--working-dir", ".", *options, "--", *run)
        found = re.search(r"Job '(\w+)' submitted", done.stdout)
        assert found, done.stdout + done.stderr
        return found[1], done.stdout, done.returncode

    def lora(self, name: str) -> bytes:
        return (self.runs / name / "lora" / FILE).read_bytes()

    def lines(self, name: str) -> int:
        file = self.runs / name / "metrics.jsonl"
        return file.read_text().count("\n") if file.exists() else 0


@pytest.fixture(scope="module")
def cluster_of_two(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    home = tmp_path_factory.mktemp("home")
    state = Path(tempfile.mkdtemp(prefix="b2-", dir="/tmp"))  # sockets' names must be short
    try:
        size = ("--nodes", 2, "--cpus", 2, "--object-store-mib", 100)
        started = local("start", "--state", state, *size, B2RAY_HOME=str(home))
        assert started.returncode == 0, started.stderr
        env = dict(
            shlex.split(line)[1].split("=", 1)
            for line in started.stdout.splitlines()
            if line.startswith("export ")
        )
        yield Local(state, env, home / "runs", models)
    finally:
        stopped = local("stop", "--state", state)
        assert stopped.returncode == 0, stopped.stderr
        shutil.rmtree(state)


@pytest.mark.timeout(600)  # three runs, and each starts four actors
def test_a_stopped_job_resumes_to_the_same_bytes(cluster_of_two: Local) -> None:
    here = cluster_of_two
    _, said, code = here.submit("undisturbed", learner__threads=1)
    assert code == 0, said
    assert f"this run is kept in {here.runs / 'undisturbed'}" in said
    notes = json.loads((here.runs / "undisturbed" / "mlflow.json").read_text())
    assert notes["closed"], said  # MLflow has it, from a working directory that stayed

    job, _, _ = here.submit("stopped", "--no-wait", learner__threads=1)
    when(lambda: here.lines("stopped") >= 2, 240)
    driver = driver_of("stopped")
    driver.suspend()  # Ray's commands take seconds, in which the run would end
    assert "RUNNING" in here.ray("job", "status", job).stdout
    here.ray("job", "stop", "--no-wait", job)
    when(lambda: waits_for(driver, signal.SIGTERM))
    driver.resume()
    when(lambda: "was stopped" in here.ray("job", "status", job).stdout)
    log = here.ray("job", "logs", job).stdout
    assert "stage 1/3" in log
    assert "stopped by SIGTERM" in log and "--name=stopped --resume" in log
    logs = here.state / "head" / "session_latest" / "logs" / "jobs"
    assert "terminated gracefully" in (logs / f"supervisor-{job}.log").read_text()

    _, said, code = here.submit("stopped", learner__threads=1)
    assert code == 0, said
    assert f"resuming {here.runs / 'stopped'} after stage" in said and "succeeded" in said
    assert here.lora("stopped") == here.lora("undisturbed")


@pytest.mark.nightly
@pytest.mark.timeout(900)  # two trials, each begun twice
def test_a_stopped_sweep_goes_on(cluster_of_two: Local, tmp_path: Path) -> None:
    here = cluster_of_two
    file = tmp_path / "sweep.yaml"
    file.write_text("{name: seeds, metric: reward/mean, grid: {seed: [0, 1]}, parallel: 2}")
    settings = {"sweep": file, "learner__threads": 1}
    job, _, _ = here.submit("seeds", "--no-wait", **settings)
    when(lambda: min(here.lines("seeds/seed0"), here.lines("seeds/seed1")) >= 1, 400)
    driver = driver_of("seeds")
    everyone = [driver, *driver.children()]
    trials = [p for p in everyone if "--stop-with-stdin" in p.cmdline()]
    for process in everyone:
        process.suspend()
    here.ray("job", "stop", "--no-wait", job)
    # Ray tells the trials, too, and the sweep asks them to stop as well.
    when(lambda: all(waits_for(p, signal.SIGTERM) for p in (driver, *trials)))
    for process in everyone:
        process.resume()
    when(lambda: "was stopped" in here.ray("job", "status", job).stdout)
    assert "stopped by SIGTERM with" in here.ray("job", "logs", job).stdout
    for trial in ("seed0", "seed1"):
        said = (here.runs / "seeds" / "trials" / f"{trial}.txt").read_text()
        assert "stopped by SIG" in said or "before and after" in said, said

    _, said, code = here.submit("seeds", **settings)
    assert code == 0, said
    assert f"this sweep is kept in {here.runs / 'seeds'}" in said
    assert "goes on after stage" in said or "finished before" in said
    result = json.loads((here.runs / "seeds" / "sweep.json").read_text())
    assert [t["state"] for t in result["trials"]] == ["finished"] * 2


def test_a_refused_job_says_why(cluster_of_two: Local) -> None:
    job, said, code = cluster_of_two.submit("wrong", sampling__eta=0)
    assert code == 1
    assert "b2ray: sampling.eta is 0" in said
    status = cluster_of_two.ray("job", "status", job).stdout
    assert "failed with exit code 2" in status and "sampling.eta is 0" in status


def test_without_the_token_nothing_is_submitted(cluster_of_two: Local) -> None:
    stranger = cluster_of_two.env | {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN_PATH": ""}
    here = Local(cluster_of_two.state, stranger, cluster_of_two.runs, cluster_of_two.models)
    asked = here.ray("job", "list")
    assert asked.returncode != 0
    assert "token" in (asked.stdout + asked.stderr).lower()


def test_what_the_script_says_of_its_cluster(cluster_of_two: Local) -> None:
    state, env = cluster_of_two.state, cluster_of_two.env
    assert (state / "token").stat().st_mode & 0o777 == 0o600
    shown = local("status", "--state", state)
    assert shown.returncode == 0 and "Ray counts 2 of 2 nodes" in shown.stderr
    assert all(f"export {name}={value}" in shown.stdout for name, value in env.items())
    again = local("start", "--state", state)
    assert again.returncode == 2 and "is running from" in again.stderr
    port = env["RAY_API_SERVER_ADDRESS"].rpartition(":")[2]
    taken = local("start", "--state", f"{state}-2", "--dashboard-port", port)
    assert taken.returncode == 2 and f"--dashboard-port {port} cannot be used" in taken.stderr
    shutil.rmtree(f"{state}-2")


def test_a_dead_node_is_told_and_stopping_leaves_nothing(cluster_of_two: Local) -> None:
    state = cluster_of_two.state
    shown = local("status", "--state", state).stderr
    head, node = (psutil.Process(int(pid)) for pid in re.findall(r"process (\d+) is alive", shown))
    everything = [head, node, *head.children(recursive=True), *node.children(recursive=True)]
    node.kill()
    psutil.wait_procs([node], timeout=10)
    assert "node1: process" in (said := local("status", "--state", state).stderr)
    assert f"{node.pid} is dead" in said
    first, second = (local("stop", "--state", state) for _ in range(2))
    assert first.returncode == 0 and "node1 had died before" in first.stderr
    assert second.returncode == 0 and "nothing to stop" in second.stderr
    _, left = psutil.wait_procs(everything, timeout=10)
    assert [process for process in left if _runs(process)] == []


def driver_of(name: str) -> psutil.Process:
    """The process of a job's run."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if f"--name={name}" in process.cmdline():
                return process
    raise AssertionError(f"no process runs {name}")


def waits_for(process: psutil.Process, number: signal.Signals) -> bool:
    """Whether a suspended process will get a signal when it goes on (proc(5))."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return bool(int(re.search(r"ShdPnd:\s*(\w+)", status)[1], 16) & 1 << number - 1)


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False
