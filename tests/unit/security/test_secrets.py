"""Passwords and tokens: refused in configurations, masked in messages, in no file of a run."""

from __future__ import annotations

import os
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from b2ray.algorithm.branching import RewardWindow
from b2ray.config import Reward
from b2ray.config.load import parse, validated
from b2ray.config.secrets import first_secret, masked, shown
from b2ray.errors import ConfigError
from b2ray.rewards import check, load
from b2ray.run import main
from b2ray.tracking.folder import RunState, open_run
from b2ray.tracking.mlflow.log import MlflowLog
from tests.models import arguments
from tests.unit.rewards.test_http import Handler

SECRET = "hunter2-hunter2"
REST: dict[str, Any] = {
    "prompts": {"train": "p.txt"},
    "rewards": [{"name": "clip", "kind": "clip"}],
}


def with_env(env: dict[str, Any], **more: Any) -> dict[str, Any]:
    reward = {"name": "own", "kind": "clip", "workers": {"runtime_env": {"env_vars": env, **more}}}
    return {**REST, "rewards": [reward]}


def with_options(**options: Any) -> dict[str, Any]:
    return {**REST, "rewards": [{"name": "far", "kind": "http", "options": options}]}


INDEX = f"--extra-index-url https://me:{SECRET}@packages.example/simple"
ENV = "rewards.0.workers.runtime_env"


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({**REST, "tracking": {"uri": f"https://me:{SECRET}@mlflow.example"}}, "tracking.uri"),
        ({**REST, "tracking": {"uri": f"postgresql+psycopg://me:{SECRET}@db/x"}}, "tracking.uri"),
        (with_options(url=f"http://me:{SECRET}@far.example/score"), "rewards.0.options.url"),
        (with_options(url=f"https://{SECRET}@far.example/score"), "rewards.0.options.url"),
        (with_env({"HF_TOKEN": SECRET}), f"{ENV}.env_vars.HF_TOKEN"),
        (with_env({"openai_api_key": SECRET}), f"{ENV}.env_vars.openai_api_key"),
        (with_env({"DB_PASSWORD": SECRET}), f"{ENV}.env_vars.DB_PASSWORD"),
        (with_env({"PROXY": f"http://me:{SECRET}@proxy:3128"}), f"{ENV}.env_vars.PROXY"),
        (with_env({}, pip=["numpy", INDEX]), f"{ENV}.pip.1"),
        (with_env({}, pip={"packages": [INDEX]}), f"{ENV}.pip.packages.0"),
        (
            with_env({}, working_dir=f"https://{SECRET}@github.example/me/mine.zip"),
            f"{ENV}.working_dir",
        ),
    ],
)
def test_a_secret_in_a_configuration_is_refused_without_telling_it(values, field):
    with pytest.raises(ConfigError, match=f"^{field} holds a password or token") as refused:
        validated(values)
    assert SECRET not in str(refused.value)
    assert "docs/explanation/security.md" in str(refused.value)


@pytest.mark.parametrize(
    "values",
    [
        {**REST, "tracking": {"uri": "https://mlflow.example:5000/path@2"}},
        {**REST, "tracking": {"uri": "postgresql://me@db/x"}},
        {**REST, "tracking": {"uri": "sqlite:////runs/mlflow.db"}},
        with_options(url="http://far.example/score?model=a@b", token_env="FAR_TOKEN"),
        with_env({"TOKENIZERS_PARALLELISM": "false", "KEYBOARD": "de"}),
        with_env({"HF_TOKEN_PATH": "/run/secrets/hf", "SSL_KEY": "/etc/ssl/key.pem"}),
        with_env({}, pip=["git+ssh://git@github.example/me/mine.git@v1", "x==1"]),
    ],
)
def test_what_only_looks_like_a_secret_is_let_pass(values):
    assert first_secret(validated(values).model_dump(mode="json")) is None


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({**REST, "mlflow_token": SECRET}, "mlflow_token"),
        ({**REST, "tracking": {"token": SECRET}}, "tracking.token"),
        ({**REST, "tracking": {"url": f"https://me:{SECRET}@x"}}, "tracking.url"),
        ({**REST, "tracking": f"https://me:{SECRET}@x"}, "tracking"),
    ],
)
def test_a_wrong_field_is_named_and_its_secret_is_not(values, field):
    with pytest.raises(ConfigError, match=f"^{field} ") as refused:
        validated(values)
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    "options",
    [{"url": "http://x", "token": SECRET}, {"url": f"ftp://me:{SECRET}@x"}],
)
def test_a_wrong_option_is_named_and_its_secret_is_not(options):
    with pytest.raises(ConfigError, match=r"options\.(token|url)") as refused:
        check(Reward(name="far", kind="http", options=options))
    assert SECRET not in str(refused.value)


def test_addresses_are_masked():
    text = f"MLflow at https://me:{SECRET}@mlflow:5000/x and http://{SECRET}@y; sqlite:///a@b"
    assert masked(text) == "MLflow at https://***@mlflow:5000/x and http://***@y; sqlite:///a@b"
    assert shown("a.api_key", SECRET) == "***"
    assert len(shown("a.b", "x" * 9999)) < 300


def test_print_config_refuses_a_secret(capsys, models, tmp_path):
    argv = arguments(models, tmp_path, "run", tracking__uri=f"https://me:{SECRET}@mlflow")
    assert main([*argv, "--print-config"]) == 2
    out, err = capsys.readouterr()
    assert SECRET not in out + err
    assert not (tmp_path / "run").exists()


class Guarded(Handler):
    """Notes what it is told of who asks."""

    def do_POST(self) -> None:
        self.server.told.append(self.headers["Authorization"])
        super().do_POST()


@pytest.fixture
def guarded() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Guarded)
    server.told, server.asked, server.answers = [], [], [(200, {}, '{"scores": [1.0]}')]
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def ask(server: ThreadingHTTPServer, **options: Any) -> np.ndarray:
    options = {"url": f"http://127.0.0.1:{server.server_port}/", "retries": 0, **options}
    scorer = load(Reward(name="far", kind="http", options=options), torch.device("cpu"))
    return scorer.score(np.zeros((1, 8, 8, 3), np.uint8), ["a"])


def test_a_scorers_token_comes_from_the_environment(guarded, monkeypatch, tmp_path):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password other\n")
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("FAR_TOKEN", SECRET)
    assert ask(guarded, token_env="FAR_TOKEN").tolist() == [1.0]
    assert guarded.told == [f"Bearer {SECRET}"]


def test_a_token_that_is_not_there_is_a_sentence(guarded, monkeypatch):
    monkeypatch.delenv("FAR_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="'FAR_TOKEN', which is not set where the scorer runs"):
        ask(guarded, token_env="FAR_TOKEN")
    with pytest.raises(ConfigError, match=r"options\.token_env is"):
        check(Reward(name="far", kind="http", options={"url": "http://x", "token_env": "a b"}))


def test_a_server_that_repeats_the_token_does_not_tell_it(guarded, monkeypatch):
    monkeypatch.setenv("FAR_TOKEN", SECRET)
    guarded.answers = [(403, {}, f"Bearer {SECRET} is no friend")]
    with pytest.raises(ValueError, match=r"Bearer \*\*\* is no friend") as refused:
        ask(guarded, token_env="FAR_TOKEN")
    assert SECRET not in str(refused.value)


@pytest.fixture
def environment(monkeypatch, tmp_path) -> list[str]:
    """Secrets in all the places where they belong."""
    places = {
        "RAY_AUTH_TOKEN": "ray",
        "HF_TOKEN": "hub",
        "FAR_TOKEN": "scorer",
        "MLFLOW_TRACKING_PASSWORD": "mlflow",
        "AWS_SECRET_ACCESS_KEY": "bucket",
    }
    for name, what in places.items():
        monkeypatch.setenv(name, f"{SECRET}-{what}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_LOGGING", "false")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return [os.environ[name] for name in places]


def write_run(argv: list[str]) -> Path:
    """Everything that the driver writes of a run's configuration and figures, MLflow's too."""
    config = parse(argv).config
    with open_run(config) as folder:
        folder.append_metrics(0, {"reward/mean": 0.5}, [])
        folder.commit(RunState(0, window=RewardWindow(0)), {}, {})
        folder.summary_file.write_text("{}")
        MlflowLog(folder).finish("FAILED")
        return folder.path


def test_no_file_of_a_run_has_a_secret(empty_store, environment, models, tmp_path, capfd):
    rewards = [
        {
            "name": "far",
            "kind": "http",
            "options": {"url": "http://127.0.0.1:9/score", "token_env": "FAR_TOKEN"},
            "workers": {"runtime_env": {"env_vars": {"LEVEL": "info"}}},
        }
    ]
    file = tmp_path / "run.yaml"
    settings = parse(arguments(models, tmp_path / "runs", "run")).config.model_dump(mode="json")
    file.write_text(yaml.safe_dump({**settings, "rewards": rewards}))
    (tmp_path / "runs").mkdir()
    shutil.copy(empty_store, tmp_path / "runs" / "mlflow.db")
    path = write_run([f"--config={file}"])

    written = [p for p in (tmp_path / "runs").rglob("*") if p.is_file()]
    assert {"config.yaml", "mlflow.db", "metrics.jsonl"} <= {p.name for p in written}
    with sqlite3.connect(tmp_path / "runs" / "mlflow.db") as store:
        logged = dict(store.execute("select key, value from params"))
    # The name is there, and is no secret.
    assert logged["rewards.far.options.token_env"] == "FAR_TOKEN"
    for found in written:
        content = found.read_bytes()
        assert not [s for s in environment if s.encode() in content], found
    out, err = capfd.readouterr()
    assert SECRET not in out + err
    # And the run is resumed with what was written.
    again = parse([f"--runs={tmp_path / 'runs'}", "--name=run", "--resume"]).config
    assert again.rewards[0].options["token_env"] == "FAR_TOKEN"
    with open_run(again) as folder:
        assert folder.path == path


def test_a_stores_password_from_the_environment_is_masked(
    environment, models, tmp_path, capfd, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@127.0.0.1:9")
    path = write_run(arguments(models, tmp_path / "runs", "run"))
    said = capfd.readouterr().err
    assert "MLflow at http://***@127.0.0.1:9 does not take figures" in said
    assert SECRET not in said
    for found in (p for p in path.rglob("*") if p.is_file()):
        assert SECRET.encode() not in found.read_bytes(), found
    shutil.rmtree(path)
