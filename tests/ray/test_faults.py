"""Killed, stopped and misled runs: the result is the same, or the reason is said."""

from __future__ import annotations

import json
import random
import re
import signal
import time
from pathlib import Path

import mlflow
import pytest

from tests.runner import Cluster, ColdRunner, Runner, kill_when, when


def _history(runner: Runner, name: str) -> list[tuple[str, int, float]]:
    """What MLflow shows of a run, but for what depends on the clock or on luck."""
    notes = json.loads((runner.runs / name / "mlflow.json").read_text())
    client = mlflow.MlflowClient(f"sqlite:///{runner.runs / 'mlflow.db'}")
    steady = ("reward/", "policy/", "branch/", "cost/", "eval/", "diversity/", "interval")
    return [
        (key, m.step, m.value)
        for key in sorted(client.get_run(notes["run_id"]).data.metrics)
        if key.startswith(steady)
        for m in client.get_metric_history(notes["run_id"], key)
    ]


def _mlflow_runs(runner: Runner, name: str) -> int:
    client = mlflow.MlflowClient(f"sqlite:///{runner.runs / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("b2ray")
    assert experiment is not None
    return sum(r.info.run_name == name for r in client.search_runs([experiment.experiment_id]))


@pytest.mark.timeout(900)  # four starts of the command
def test_a_killed_run_resumes_to_the_same_bytes_and_the_same_mlflow_run(
    runner: Runner, cold_runner: ColdRunner, undisturbed: str
) -> None:
    """SIGKILL before the first commit, in two stages, and while the run ends."""
    name, moment = "killed", random.Random(0)
    for lines in (0, 1, 2, 4):
        process = cold_runner.process(name)
        when(lambda n=lines: (runner.runs / name).exists() and runner.lines(name) >= n)
        time.sleep(moment.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    assert runner.here(name, "--resume") == 0
    assert runner.lora(name) == runner.lora(undisturbed)
    assert _history(runner, name) == _history(runner, undisturbed)
    assert _mlflow_runs(runner, name) == 1


def test_killed_actors_are_replaced_and_change_nothing(
    cold_runner: ColdRunner, cluster: Cluster, undisturbed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "replaced"
    roles = ("Sampler", "Scorer", "Learner")
    killers = [
        kill_when(lambda n=lines: cold_runner.lines(name) >= n, lambda r=role: cluster.workers(r))
        for lines, role in enumerate(roles, start=1)
    ]
    assert cold_runner.here(name) == 0
    for killer in killers:
        killer.join()
    said = capsys.readouterr().err
    assert all(re.search(rf"{role.lower()} \d died while", said) for role in roles), said
    assert cold_runner.lora(name) == cold_runner.lora(undisturbed)


@pytest.mark.parametrize(
    ("kind", "words"),
    # A wrong count is refused by the same check as NaN; tests/unit/rewards has it.
    [("NotANumber", "returned nan"), ("Constant", "for all 12")],
)
def test_a_bad_reward_is_named(
    runner: Runner, kind: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = json.dumps([{"name": "mine", "kind": f"tests.ray.rewards:{kind}"}])
    name = f"bad-{kind}"
    assert runner.here(name, rewards=spec) == 3
    message = capsys.readouterr().err
    assert "reward 'mine'" in message and words in message
    assert (runner.runs / name / "failure.log").exists()


def test_your_own_reward_is_trained_on(runner: Runner) -> None:
    spec = json.dumps([{"name": "bright", "kind": "tests.ray.rewards:Brightness"}])
    assert runner.here("own", rewards=spec, curriculum__stages=1) == 0
    summary = json.loads((runner.runs / "own" / "summary.json").read_text())
    assert summary["reward"] == summary["bright"]["train"]


def test_another_configuration_does_not_touch_a_run(
    runner: Runner, undisturbed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _contents(runner.runs / undisturbed)
    assert runner.here(undisturbed, seed=1) == 2
    assert "seed was 0, is 1" in capsys.readouterr().err
    assert _contents(runner.runs / undisturbed) == before


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
