"""`b2ray check`: a verdict before hours are spent."""

from __future__ import annotations

import json
import re

import pytest

from b2ray.commands.check import main
from tests.models import arguments
from tests.runner import Runner


def check(runner: Runner, capsys: pytest.CaptureFixture[str], **over: object):
    words = [*arguments(runner.models, runner.runs, "checked", **over), "--json"]
    code = runner.call(main, words)
    found = json.loads(capsys.readouterr().out)
    return code, {f["what"]: f for f in found["findings"]}


def test_a_sound_configuration_passes_and_leaves_nothing(runner: Runner, capsys) -> None:
    code, found = check(runner, capsys)
    assert code == 0
    assert found["reward queries"]["found"] == "36"
    assert "on all 3 policies" in found["weights"]["found"]
    assert found["ratio"]["sound"] and found["reward clip"]["sound"]
    memory = [f for what, f in found.items() if what.startswith("memory, ")]
    assert len(memory) == 4 and all("GiB" in f["found"] for f in memory)
    assert not (runner.runs / "checked").exists()


@pytest.mark.parametrize(
    ("over", "what", "words"),
    [
        (
            {"rewards": '[{"name":"flat","kind":"tests.ray.rewards:Constant"}]'},
            "reward flat",
            "the same of every picture",
        ),
        (
            {"rewards": '[{"name":"bad","kind":"tests.ray.rewards:NotANumber"}]'},
            "stopped at",
            "'bad' returned nan",
        ),
        ({"model__path": "/no/such/model"}, "stopped at", "no hub id"),
    ],
)
def test_what_would_go_wrong_is_found(runner: Runner, capsys, over, what, words) -> None:
    code, found = check(runner, capsys, **over)
    assert code == 2
    assert words in found[what]["found"]
    assert found[what]["sound"] is False


def test_sizes_of_calls_are_measured_by_the_runs_own_actors(runner: Runner, capsys) -> None:
    words = [*arguments(runner.models, runner.runs, "checked"), "--calls", "--json"]
    code = runner.call(main, words)
    told = json.loads(capsys.readouterr().out)["findings"]
    assert code == 0
    for field in ("branching.branch_batch", "learner.microbatch"):
        (found,) = [f["found"] for f in told if f["what"] == field]
        assert re.search(r"^\d+ fits this hardware, it is \d+; .*: 1: [\d.e+]+, 2: ", found)
    assert not (runner.runs / "checked").exists()


def test_a_constant_reward_that_is_only_measured_is_no_failure(runner: Runner, capsys) -> None:
    heldout = '[{"name":"flat","kind":"tests.ray.rewards:Constant"}]'
    code, found = check(runner, capsys, evaluation__heldout_rewards=heldout)
    assert code == 0
    assert "the same of every picture" in found["held out flat"]["found"]


def test_prompts_that_are_cut_off_are_told(runner: Runner, capsys, tmp_path) -> None:
    file = tmp_path / "long.txt"
    file.write_text("a red circle " * 30 + "\n")
    code, found = check(runner, capsys, prompts__train=file)
    assert code == 0
    assert "1 are cut off by the tokenizer" in found["prompts"]["found"]


def test_an_update_of_one_step_can_be_tried(runner: Runner, capsys) -> None:
    code, found = check(runner, capsys, learner__batch="all")
    assert code == 0
    assert found["ratio"]["sound"]


def test_variance_says_where_to_start_the_interval(runner: Runner, capsys, tmp_path) -> None:
    file = tmp_path / "variance.png"
    command = [*arguments(runner.models, runner.runs, "checked"), f"--variance={file}", "--json"]
    assert runner.call(main, command) == 0
    findings = json.loads(capsys.readouterr().out)["findings"]
    found = {f["what"]: f["found"] for f in findings}
    lengths = [name for name in found if name.startswith("interval ")]
    assert lengths == [f"interval {n}" for n in (1, 2, 3, 4)]
    # Before the whole of denoising there is no prefix but the noise, and forks differ in all steps.
    assert "the branches have" in found["interval 4"]
    assert str(file) in found["variance"] and file.stat().st_size > 5000


def test_a_picture_without_a_folder_is_refused_at_once(runner: Runner, capsys) -> None:
    words = arguments(runner.models, runner.runs, "checked")
    assert runner.call(main, [*words, "--variance=/no/such/folder/x.png", "--json"]) == 2
    assert "there is no such folder" in capsys.readouterr().out
