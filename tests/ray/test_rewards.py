"""Rewards with processes of their own, several at once, and what is held out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.runner import ColdRunner, Runner

CLIP = {"name": "clip", "kind": "clip"}


def package(folder: Path, version: int) -> str:
    """A package `units` of which two rewards want different versions, and its folder."""
    (folder / "units").mkdir(parents=True)
    (folder / "units" / "__init__.py").write_text(
        f"VERSION = {version}\n"
        "def score(images, prompts):\n"
        "    return images.reshape(len(images), -1).mean(axis=1) / 255 + VERSION\n"
    )
    return str(folder)


def rewards(*specs: dict) -> str:
    return json.dumps(list(specs))


def test_rewards_whose_packages_conflict_run_side_by_side(
    cold_runner: ColdRunner, tmp_path: Path
) -> None:
    def own(name: str, version: int) -> dict:
        env = {"env_vars": {"PYTHONPATH": package(tmp_path / name, version)}}
        workers = {"count": 1, "cpus": 0.25, "runtime_env": env}
        return {"name": name, "kind": "units:score", "workers": workers}

    specs = rewards(own("old", 1), own("new", 2))
    assert cold_runner.here("conflict", rewards=specs, curriculum__stages=1) == 0
    summary = json.loads((cold_runner.runs / "conflict" / "summary.json").read_text())
    old, new = summary["old"]["train"]["before"], summary["new"]["train"]["before"]
    assert 1 < old < 2 < new < 3
    assert new - old == pytest.approx(1, abs=1e-5)
    assert summary["reward"]["before"] == pytest.approx(old + new)


def test_where_a_reward_runs_does_not_change_the_result(
    runner: Runner, undisturbed: str, tmp_path: Path
) -> None:
    own = {**CLIP, "path": str(runner.models / "reward"), "workers": {"count": 2, "cpus": 0.25}}
    assert runner.here("elsewhere", rewards=rewards(own)) == 0
    assert runner.lora("elsewhere") == runner.lora(undisturbed)


def test_an_environment_that_ray_refuses_is_named(
    runner: Runner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    env = {"working_dir": str(tmp_path / "nothing_here")}
    spec = {"name": "own", "kind": "units:score", "workers": {"runtime_env": env}}
    assert runner.here("no_env", rewards=rewards(spec), curriculum__stages=1) == 2
    assert "the workers of reward 'own': runtime_env is refused" in capsys.readouterr().err


def test_an_environment_that_cannot_be_set_up_is_named(
    cold_runner: ColdRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    # A package that was never uploaded: Ray takes the name, and fails on the node.
    env = {"working_dir": "gcs://_ray_pkg_0123456789abcdef.zip"}
    spec = {"name": "own", "kind": "units:score", "workers": {"cpus": 0.25, "runtime_env": env}}
    assert cold_runner.here("bad_env", rewards=rewards(spec), curriculum__stages=1) == 2
    assert "scorer own: its runtime_env cannot be set up" in capsys.readouterr().err


def test_rewards_are_standardised_by_their_own_windows(runner: Runner) -> None:
    clip = {**CLIP, "path": str(runner.models / "reward"), "scale": "window"}
    bright = {"name": "bright", "kind": "tests.ray.rewards:Brightness", "scale": "window"}
    specs = rewards(clip, {**bright, "weight": 3.0})
    assert runner.here("windows", rewards=specs, curriculum__stages=2, evaluation__every=1) == 0
    first, second = runner.figures("windows")[1:]
    # The first stage is all of its window: standardised scores have mean 0.
    assert first["reward/mean"] == pytest.approx(0, abs=1e-9)
    assert second["reward/mean"] != pytest.approx(0, abs=1e-9)
    assert 0 < first["reward/bright"] < 255  # logged as it was scored
    summary = json.loads((runner.runs / "windows" / "summary.json").read_text())
    assert summary["reward"]["before"] == pytest.approx(0, abs=1e-9)


def test_a_function_of_your_own_is_a_reward(runner: Runner) -> None:
    spec = {"name": "mine", "kind": "tests.ray.rewards:brightness"}
    assert runner.here("function", rewards=rewards(spec), curriculum__stages=1) == 0
    summary = json.loads((runner.runs / "function" / "summary.json").read_text())
    assert 0 < summary["mine"]["train"]["before"] < 255
