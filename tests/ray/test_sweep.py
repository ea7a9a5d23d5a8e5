"""Whole sweeps: stopped, killed, gone on with, and with a trial that cannot be run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest
import yaml

from b2ray.errors import EXIT_DONE, EXIT_STOPPED, EXIT_WORKER
from b2ray.run import main
from tests.models import arguments
from tests.runner import ROOT, ColdRunner, when


@dataclass
class Sweep:
    """A sweep of the small runs, which are those of a runner with other values of what varies."""

    runner: ColdRunner
    file: Path
    words: list[str]

    @classmethod
    def of(cls, runner: ColdRunner, name: str, fields: dict[str, Any], **over: object) -> Sweep:
        file = runner.runs / f"{name}.yaml"
        file.write_text(yaml.safe_dump({"name": name, "metric": "reward/mean", **fields}))
        varied = {f"--{f}" for f in fields["grid"]}
        words = arguments(runner.models, runner.runs, name, **over)
        words = [w for w in words if w.partition("=")[0] not in varied]
        return cls(runner, file, [f"--sweep={file}", *words])

    @property
    def folder(self) -> Path:
        return self.runner.runs / self.file.stem

    def process(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "b2ray.run", *self.words],
            cwd=ROOT,
            env={**os.environ, "RAY_ADDRESS": self.runner.address},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def lines(self, trial: str) -> int:
        return self.runner.lines(f"{self.folder.name}/{trial}")

    def result(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "sweep.json").read_text()))

    def states(self) -> dict[str, str]:
        return {t["name"]: t["state"] for t in self.result()["trials"]}


def trials(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes of a sweep's trials."""
    children = psutil.Process(process.pid).children()
    return [c for c in children if "--stop-with-stdin" in c.cmdline()]


def heard(process: subprocess.Popen[str], words: str) -> str:
    """What a process says until it says these words."""
    said = ""
    assert process.stdout is not None
    for line in process.stdout:
        said += line
        if words in line:
            return said
    raise AssertionError(f"it never said {words!r}: {said}")


@pytest.mark.timeout(1800)  # four trials, three of them begun twice
def test_a_sweep_that_is_stopped_and_loses_a_trial_ends_as_if_undisturbed(
    cold_runner: ColdRunner, undisturbed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = {"learner.lr": [1e-3, 2e-3], "seed": [0, 1]}
    sweep = Sweep.of(cold_runner, "rates", {"grid": grid, "parallel": 2})
    first, _, third, _ = names = [f"lr{lr}_seed{s}" for lr in (0.001, 0.002) for s in (0, 1)]

    # SIGTERM: both trials stop in good order.
    process = sweep.process()
    try:
        when(lambda: sweep.lines(first) >= 2, within=600)
        children = trials(process)
        assert len(children) == 2
        for child in children:
            child.suspend()  # or it would end before it is asked to
        process.send_signal(signal.SIGTERM)
        said = heard(process, "stopping 2 trials")
        for child in children:
            child.resume()
        said += process.communicate(timeout=300)[0]
    finally:
        process.kill()
    assert process.returncode == EXIT_STOPPED, said
    assert not any(c.is_running() for c in children)
    assert sweep.states()[first] == "stopped" and sweep.lines(first) < 4
    assert "stopped by SIGTERM with" in said and "the same command goes on" in said
    assert {"stopped", "waiting"} >= set(sweep.states().values()) - {"finished"}
    assert "stopped by SIGINT" in (sweep.folder / "trials" / f"{first}.txt").read_text()

    # SIGKILL of a trial: the others go on, and it is named with its cause.
    process = sweep.process()
    try:
        when(lambda: sweep.lines(third) >= 1, within=600)
        (victim,) = [c for c in trials(process) if third in " ".join(c.cmdline())]
        victim.kill()
        said, _ = process.communicate(timeout=900)
    finally:
        process.kill()
    assert process.returncode == EXIT_WORKER, said
    assert f"trial {third} failed: its process was ended by SIGKILL" in said
    assert f"{first}: goes on after stage" in said
    assert sweep.states() == dict.fromkeys(names, "finished") | {third: "failed"}

    # Once more: only what is not finished.
    before = {n: (sweep.folder / n / "metrics.jsonl").stat().st_mtime_ns for n in names}
    assert cold_runner.call(main, sweep.words) == EXIT_DONE
    said = capsys.readouterr().err
    assert said.count("finished before") == 3 and f"{third}: goes on after stage" in said
    after = {n: (sweep.folder / n / "metrics.jsonl").stat().st_mtime_ns for n in names}
    assert {n for n in names if after[n] != before[n]} == {third}
    assert sweep.states() == dict.fromkeys(names, "finished")
    assert [len(s["each"]) for s in sweep.result()["settings"]] == [2, 2]

    # The trial with the settings of a run is that run.
    assert cold_runner.lora(f"rates/{first}") == cold_runner.lora(undisturbed)
    assert len({cold_runner.lora(f"rates/{n}") for n in names}) == 4
    _is_nested(cold_runner, "rates", names)


def _is_nested(runner: ColdRunner, name: str, names: list[str]) -> None:
    """MLflow has one parent run, and every trial once beneath it."""
    client = mlflow.MlflowClient(f"sqlite:///{runner.runs / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("b2ray")
    assert experiment is not None
    ids = [experiment.experiment_id]
    (parent,) = client.search_runs(ids, "tags.`b2ray.sweep` = '" + name + "'")
    assert (parent.info.run_name, parent.info.status) == (name, "FINISHED")
    assert parent.data.metrics["trials/finished"] == len(names)
    assert {a.path for a in client.list_artifacts(parent.info.run_id)} >= {"sweep.json"}
    assert parent.data.tags["mlflow.source.name"] == "b2ray"
    assert parent.data.tags["mlflow.note.content"].count("\n| 0.00") == 2  # a row a rate
    beneath = f"tags.mlflow.parentRunId = '{parent.info.run_id}'"
    children = client.search_runs(ids, beneath)
    assert sorted(c.info.run_name for c in children) == sorted(names)
    assert {c.info.status for c in children} == {"FINISHED"}
    assert {c.data.params["learner.lr"] for c in children} == {"0.001", "0.002"}


@pytest.mark.timeout(900)
def test_a_trial_that_fails_is_named_and_does_not_end_the_others(
    cold_runner: ColdRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {"name": "bright", "kind": "tests.ray.rewards:Brightness"}
    bad = {"name": "odd", "kind": "tests.ray.rewards:NotANumber"}
    fields = {"grid": {"rewards": [[bad], [good]]}, "parallel": 1}
    sweep = Sweep.of(cold_runner, "rewards", fields, curriculum__stages=1)
    assert cold_runner.call(main, [*sweep.words, "--json"]) == EXIT_WORKER
    said = capsys.readouterr()
    result = json.loads(said.out)
    failed, done = result["trials"]
    assert (failed["state"], done["state"]) == ("failed", "finished")
    assert "reward 'odd'" in failed["cause"] and "nan" in failed["cause"]
    assert f"trial {failed['name']} failed: " in said.err
    assert Path(failed["log"]).name == "failure.log" and Path(failed["log"]).exists()
    assert result["best"] == done["values"]


@pytest.mark.timeout(900)
def test_a_trial_that_does_badly_is_stopped_early_and_stays_so(
    cold_runner: ColdRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of one after another, the second has less of the figure at the first stage."""
    fields = {
        "metric": "cost/reward_queries",
        "grid": {"branching.images": [12, 6]},
        "parallel": 1,
        "stop_early": {"after": 1, "factor": 2},
    }
    sweep = Sweep.of(
        cold_runner, "stopped-early", fields, curriculum__stages=30, evaluation__every=0
    )
    process = sweep.process()
    try:
        begun = sweep.folder / "images6" / "metrics.jsonl"
        when(lambda: begun.exists() or process.poll() is not None, within=800)
        said, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == EXIT_DONE, said
    assert sweep.states() == {"images12": "finished", "images6": "stopped early"}
    stages = sweep.lines("images6")
    assert 2 <= stages < 31
    assert cold_runner.call(main, sweep.words) == EXIT_DONE
    assert "images6: stopped early before" in capsys.readouterr().err
    assert sweep.lines("images6") == stages
