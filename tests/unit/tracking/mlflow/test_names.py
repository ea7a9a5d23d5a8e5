"""What a run is called in MLflow."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import ray

import b2ray
from b2ray.config import Config, Tracking
from b2ray.config.load import validated
from b2ray.tracking.mlflow.names import artifacts, parameters, tags, tracking_uri


def config(**over: Any) -> Config:
    values = {
        "prompts": {"train": "p.txt"},
        "rewards": [
            {"name": "clip", "kind": "clip", "weight": 0.5},
            {"name": "mine", "kind": "mine:Reward", "options": {"a key!": [1, 2]}},
        ],
        "evaluation": {"heldout_rewards": [{"name": "judge", "kind": "jpeg"}]},
    }
    return validated({**values, **over})


def test_the_store_is_the_configured_one_then_the_environments_then_a_file(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    own = config(runs=str(tmp_path))
    assert tracking_uri(own) == f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert artifacts(own, tracking_uri(own)) == (tmp_path / "mlartifacts").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://environment")
    assert tracking_uri(own) == "http://environment"
    assert artifacts(own, tracking_uri(own)) is None
    mine = config(tracking=Tracking(uri="http://mine").model_dump())
    assert tracking_uri(mine) == "http://mine"


def test_tags_tell_runs_apart():
    found = tags(config(preset="ddpo"))
    assert found["b2ray.preset"] == "ddpo"
    assert found["b2ray.model"] == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert found["b2ray.rewards"] == "clip, mine"
    assert found["b2ray.heldout_rewards"] == "judge"
    assert found["b2ray.version"] == b2ray.__version__
    assert found["ray.version"] == ray.__version__


def test_a_run_without_rewards_says_what_it_learns_from(tmp_path):
    shown = config(demonstrations={"path": str(tmp_path)}, rewards=[], preset="sqil")
    assert tags(shown)["b2ray.rewards"] == "demonstrations"


def test_the_commit_is_that_of_the_working_directory(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    for name in ("GIT_DIR", "GIT_WORK_TREE"):
        monkeypatch.delenv(name, raising=False)
    assert "mlflow.source.git.commit" not in tags(config())

    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
        done = subprocess.run(["git", *who, *words], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init")
    assert "mlflow.source.git.commit" not in tags(config())  # none yet
    git("commit", "--allow-empty", "--message", "first")
    assert tags(config())["mlflow.source.git.commit"] == git("rev-parse", "HEAD")


def test_parameters_are_flat_and_rewards_have_fields_of_their_own():
    found = parameters(config(curriculum={"start": 4}))
    assert found["curriculum.start"] == "4.0"
    assert found["model.lora.rank"] == "4"
    assert found["rewards"] == "clip, mine"
    assert found["rewards.clip.weight"] == "0.5"
    assert found["rewards.mine.kind"] == "mine:Reward"
    assert found["rewards.mine.options.a key_"] == "[1, 2]"  # MLflow refuses other characters
    assert found["evaluation.heldout_rewards.judge.kind"] == "jpeg"
    assert all(isinstance(v, str) for v in found.values())


def test_what_may_change_on_resume_is_no_parameter():
    found = parameters(config(name="other", fleet={"samplers": {"max": 7}}))
    assert found == parameters(config())
    assert not [k for k in found if k.startswith(("fleet", "tracking", "runs"))]
