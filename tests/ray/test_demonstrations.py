"""Runs that learn from a folder of pictures, without a reward."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from b2ray.algorithm.cost import plan_cost
from b2ray.commands.check import main as check
from tests.models import PROMPTS, arguments, config
from tests.runner import Cluster, ColdRunner, Runner, kill_when


@pytest.fixture(scope="module")
def over(tmp_path_factory: pytest.TempPathFactory, models: Path) -> dict[str, object]:
    """Settings of a run on five pictures of other sizes than the model's, and its folder."""
    folder = tmp_path_factory.mktemp("liked")
    chance = np.random.default_rng(0)
    for j, size in enumerate(((16, 16), (40, 30), (20, 64), (8, 8), (17, 16))):
        pixels = chance.integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{j}.png")
        (folder / f"{j}.txt").write_text(PROMPTS[j % 3])
    heldout = [{"name": "clip", "kind": "clip", "path": str(models / "reward")}]
    return {
        "preset": "sqil",
        "rewards": "[]",
        "demonstrations__path": folder,
        "branching__branches": 1,
        "evaluation__heldout_rewards": json.dumps(heldout),
    }


@pytest.fixture(scope="module")
def shown(runner: Runner, over: dict[str, object]) -> str:
    """The name of an undisturbed run with one sampler."""
    assert runner.here("shown", fleet__samplers__max=1, **over) == 0
    return "shown"


def test_a_run_without_a_reward(runner: Runner, shown: str, over: dict[str, object]) -> None:
    summary = json.loads((runner.runs / shown / "summary.json").read_text())
    planned = plan_cost(config(runner.models, **over))
    assert (summary["reward_queries"], planned.reward_queries) == (0, 0)
    assert summary["unet_evals"] == planned.unet_evals > 0
    assert "reward" not in summary and summary["clip"].keys() == {"train", "heldout"}
    lines = runner.figures(shown)
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert all(line["policy/ratio_drift"] < 1e-5 for line in lines[1:])
    assert all(line["demonstrations/kl"] > 0 for line in lines[1:])
    assert lines[3]["cost/trained_leaves"] == 3 * 12
    assert "heldout/clip" in lines[0] and "eval/train/clip" in lines[3]
    assert not any(k.startswith(("reward/", "branch/")) for line in lines for k in line)


def test_the_demonstrations_change_the_result(runner: Runner, shown: str, over, tmp_path) -> None:
    for file in Path(over["demonstrations__path"]).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    Image.new("RGB", (16, 16), "red").save(tmp_path / "3.png")
    other = {**over, "demonstrations__path": tmp_path}
    assert runner.here("shown-other", fleet__samplers__max=1, **other) == 0
    assert runner.lora("shown-other") != runner.lora(shown)


def test_a_killed_run_resumes_to_the_same_bytes(
    runner: Runner, cold_runner: ColdRunner, shown: str, over
) -> None:
    cold_runner.kill_after(2, "shown-killed", **over)
    assert runner.here("shown-killed", "--resume", **over) == 0
    assert runner.lora("shown-killed") == runner.lora(shown)


def test_killed_samplers_change_nothing(
    cold_runner: ColdRunner, cluster: Cluster, shown: str, over, capsys
) -> None:
    name = "shown-replaced"
    killer = kill_when(lambda: cold_runner.lines(name) >= 1, lambda: cluster.workers("Sampler"))
    assert cold_runner.here(name, fleet__samplers__max=3, **over) == 0
    killer.join()
    assert re.search(r"sampler \d died while", capsys.readouterr().err)
    assert cold_runner.lora(name) == cold_runner.lora(shown)


def test_nothing_needs_to_be_scored_and_samplers_may_lag(cold_runner: ColdRunner, over) -> None:
    """Without any scorer; two ranks learn while the next stage is sampled."""
    more = {**over, "evaluation__heldout_rewards": "[]", "learner__max_lag": 1, "learner__ranks": 2}
    assert cold_runner.here("shown-alone", **more) == 0
    summary = json.loads((cold_runner.runs / "shown-alone" / "summary.json").read_text())
    assert summary["stages"] == 3 and summary["diversity"] == {}
    assert (cold_runner.runs / "shown-alone" / "pictures" / "before_after_train.png").exists()


def test_check_takes_demonstrations_through(runner: Runner, over, capsys) -> None:
    command = [*arguments(runner.models, runner.runs, "checked", **over), "--json"]
    assert runner.call(check, command) == 0
    found = {f["what"]: f for f in json.loads(capsys.readouterr().out)["findings"]}
    assert found["ratio"]["sound"] and found["reward queries"]["found"] == "0"
    assert "1 of 5 demonstrations are smaller" in found["demonstrations"]["found"]
    assert runner.call(check, [*command, "--variance"]) == 2
    assert "how a reward spreads" in capsys.readouterr().out


def test_a_folder_that_is_not_there_is_refused(runner: Runner, over, capsys) -> None:
    missing = {**over, "demonstrations__path": "/no/such/folder"}
    assert runner.here("shown-missing", **missing) == 2
    assert "demonstrations.path: there is no folder" in capsys.readouterr().err
