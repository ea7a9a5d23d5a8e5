"""Whatever happens to the fleet, the LoRA's bytes are those of the undisturbed run."""

from __future__ import annotations

import math
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest

from tests.chaos import faults
from tests.chaos.conftest import FLEET, Row, Ward
from tests.chaos.faults import Strike
from tests.chaos.runs import RUNS
from tests.runner import when


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", RUNS)
def test_faults_change_nothing(
    ward: Ward, undisturbed: Callable[..., bytes], rows: list[Row], name: str
) -> None:
    """One after another, at different stages of one run."""
    happening, over = RUNS[name]
    expected = undisturbed(**over)
    saboteur = ward.disturbed(name, [fault.strike for fault in happening], **over)
    equal = ward.lora(name) == expected
    ends = [*saboteur.struck[1:], math.inf]
    for fault, begin, end in zip(happening, saboteur.struck, ends, strict=True):
        events = [event for event in ward.events(name) if begin <= event["time"] < end]
        seconds = [_recovered(events, slot) - begin for slot in fault.slots]
        gone = [event for event in events if event["what"] in ("died", "left")]
        happened = "; ".join(f"{event['slot']} {event['what']}" for event in gone)
        rows.append(Row(fault.name, happened, max(seconds), equal))
    assert equal


def _recovered(events: Sequence[dict[str, Any]], slot: str) -> float:
    """When a slot that went was ready again."""
    mine = [event for event in events if event["slot"] == slot]
    assert mine and mine[0]["what"] in ("died", "drains"), mine
    return float(next(event["time"] for event in mine if event["what"] == "ready"))


@pytest.mark.timeout(600)
def test_a_node_that_joins_late_is_used_and_brought_up_to_date(
    ward: Ward, undisturbed: Callable[..., bytes], rows: list[Row]
) -> None:
    """Born stale: it is bound to the current version before it works."""
    expected = undisturbed()
    ward.raylets.only_one()
    fleet = {"fleet.learner.gpus": 1, "fleet.samplers.gpus": 1, "fleet.samplers.max": "auto"}
    wait = faults.pause_scorers_until(faults.samplers_ready(2))
    join = Strike("score", faults.both(faults.add_node, wait), stage=1)
    saboteur = ward.disturbed("late", [join], **fleet)
    node = next(
        n.node_id for n in ward.raylets.cluster.worker_nodes if n.node_id not in _nodes_before(ward)
    )
    methods = [m for m, where, _ in saboteur.sent if where == node and m not in ("hello", "load")]
    assert methods[0] == "bind"
    assert {"denoise_prefix", "denoise_branches"} & set(methods)
    ready = next(t for m, where, t in saboteur.sent if where == node and m == "bind")
    equal = ward.lora("late") == expected
    rows.append(
        Row(
            "a node joins late",
            "a sampler starts there",
            ready - saboteur.struck[0],
            equal,
        )
    )
    assert equal


def _nodes_before(ward: Ward) -> set[str]:
    """Nodes that somebody was ready on before the late one came."""
    first = [e for e in ward.events("late") if e["what"] == "ready"][:3]
    short = {e["where"].split("node ")[1].rstrip(")") for e in first}
    return {n.node_id for n in ward.raylets.cluster.worker_nodes if n.node_id[:6] in short}


@pytest.mark.timeout(600)
def test_the_driver_is_killed_and_resumes(
    ward: Ward, undisturbed: Callable[..., bytes], rows: list[Row]
) -> None:
    expected = undisturbed()
    process = ward.process("driver", **FLEET)
    try:
        when(lambda: ward.lines("driver") >= 3, within=240)
    finally:
        process.kill()
    killed = time.time()
    process.wait(30)
    assert ward.here("driver", "--resume", **FLEET) == 0
    again = next(e for e in ward.events("driver") if e["time"] > killed and e["what"] == "ready")
    equal = ward.lora("driver") == expected
    rows.append(
        Row(
            "the driver is killed and resumed",
            "the last committed stage goes on",
            again["time"] - killed,
            equal,
        )
    )
    assert equal


@pytest.mark.timeout(600)
def test_nearly_full_object_stores(
    ward: Ward, undisturbed: Callable[..., bytes], rows: list[Row]
) -> None:
    expected = undisturbed()
    ward.disturbed("full", [Strike("denoise_prefix", faults.fill_stores, stage=1)])
    equal = ward.lora("full") == expected
    rows.append(Row("every object store is 95 % full", "Ray spills to disk", None, equal))
    assert equal


@pytest.mark.timeout(600)
def test_mlflow_goes_away_and_comes_back(
    ward: Ward, undisturbed: Callable[..., bytes], rows: list[Row], tmp_path: Path
) -> None:
    expected = undisturbed()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    servers = [_mlflow(tmp_path, port)]
    try:
        _answers(uri)

        def away(*_: object) -> None:
            _end(servers[-1])

        def back(*_: object) -> None:
            servers.append(_mlflow(tmp_path, port))
            _answers(uri)

        strikes = [Strike("update", away, stage=1), Strike("update", back, stage=2)]
        ward.disturbed("mlflow", strikes, **{"tracking.uri": uri})
        client = mlflow.MlflowClient(uri)
        experiment = client.get_experiment_by_name("b2ray")
        assert experiment is not None
        (run,) = client.search_runs([experiment.experiment_id])
        history = client.get_metric_history(run.info.run_id, "reward/mean")
        assert [m.step for m in history] == [1, 2, 3, 4]
        assert run.info.status == "FINISHED"
    finally:
        _end(servers[-1])
    equal = ward.lora("mlflow") == expected
    rows.append(
        Row("the MLflow server is away for a stage", "what it missed is sent later", None, equal)
    )
    assert equal


def _mlflow(folder: Path, port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    command += ["--default-artifact-root", str(folder / "artifacts")]
    return subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        start_new_session=True,
    )


def _answers(uri: str) -> None:
    def there() -> bool:
        try:
            with urllib.request.urlopen(f"{uri}/health", timeout=1) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    when(there, within=300)


def _end(server: subprocess.Popen[bytes]) -> None:
    """The server and its own workers."""
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait(10)


@contextmanager
def _random_kills(
    stages: Callable[[], int], gap: tuple[int, int], seed: int
) -> Iterator[list[str]]:
    """Kill a random actor of our own cluster every few stages, at any moment of a stage.

    Counted in stages, not in seconds: a fast machine's run is hit as often as a slow one's.
    """
    chance, over, killed = random.Random(seed), threading.Event(), []

    def work() -> None:
        target = 1
        while not over.wait(0.02):
            if stages() < target:
                continue
            if over.wait(chance.uniform(0, 0.5)):
                return
            if actors := _actors():
                victim = chance.choice(actors)
                killed.append(victim.cmdline()[0])
                victim.kill()
                target = stages() + chance.randint(*gap)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


def _actors() -> list[psutil.Process]:
    """Processes of the fleet, below this process's raylets."""
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            title = child.cmdline()[:1]
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        if title and title[0].startswith(("ray::Sampler", "ray::Scorer", "ray::Learner")):
            found.append(child)
    return sorted(found, key=lambda p: p.pid)


@pytest.mark.parametrize(
    "stages",
    [
        pytest.param(16, marks=pytest.mark.timeout(900), id="16-stages"),
        pytest.param(200, marks=[pytest.mark.nightly, pytest.mark.timeout(3000)], id="200-stages"),
    ],
)
def test_random_kills(
    ward: Ward, undisturbed: Callable[..., bytes], rows: list[Row], stages: int
) -> None:
    long = {"curriculum.stages": stages}
    expected = undisturbed(**long)
    name, gap = f"random-{stages}", (2, 5)
    began = time.monotonic()
    with _random_kills(lambda: ward.lines(name), gap, seed=stages) as killed:
        over = {**FLEET, **long, "fleet.retries": 100, "fleet.max_deaths": 1000}
        assert ward.here(name, **over) == 0
    lasted = time.monotonic() - began
    # A stage may pass before an actor's death is felt, or two between two looks.
    assert len(killed) >= stages // (gap[1] + 3)
    equal = ward.lora(name) == expected
    rows.append(
        Row(
            f"a random actor is killed every {gap[0]}–{gap[1]} stages of {stages}",
            f"{len(killed)} were killed; done after {lasted:.0f} s",
            None,
            equal,
        )
    )
    assert equal
