"""The run's page and its branch trees, made by real runs."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import mlflow
import numpy as np
import pytest

from b2ray.diffusion.lora_file import FILE
from b2ray.errors import EXIT_DONE, EXIT_STOPPED
from b2ray.run import main
from b2ray.tracking import branch_trees as trees
from tests.models import PROMPTS
from tests.runner import ColdRunner, Runner, when


def kept(runner: Runner, name: str) -> dict[str, bytes]:
    """Every file of a run's trees."""
    folder = runner.runs / name / "trees"
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_every_stage_keeps_trees_of_its_first_groups(runner: Runner, undisturbed: str) -> None:
    folder = runner.runs / undisturbed
    assert trees.stages(folder) == [1, 2, 3]
    for stage, n in ((1, 2), (2, 3), (3, 4)):
        found = trees.load(folder, stage)
        assert [tree.interval for tree in found] == [n, n]
        for tree in found:
            assert tree.prompt in PROMPTS
            assert len({tree.fork, *(leaf.picture for leaf in tree.leaves)}) == 4
            rewards = [leaf.reward for leaf in tree.leaves]
            assert rewards == [leaf.scores["clip"] for leaf in tree.leaves]
            chosen = {k for k, leaf in enumerate(tree.leaves) if leaf.selected}
            assert chosen == {int(np.argmax(rewards)), int(np.argmin(rewards))}
            advantages = [leaf.advantage for leaf in tree.leaves]
            assert np.argsort(advantages).tolist() == np.argsort(rewards).tolist()
            assert abs(sum(advantages)) < 1e-5


@pytest.mark.parametrize("count", [0, 3])
def test_trees_change_no_byte_of_the_lora(runner: Runner, undisturbed: str, count: int) -> None:
    """Three groups are of two units here, and a call has the leaves of more than one."""
    name = f"trees{count}"
    assert runner.here(name, fleet__samplers__max=1, evaluation__trees=count) == EXIT_DONE
    assert runner.lora(name) == runner.lora(undisturbed)
    for line, same in zip(runner.figures(name), runner.figures(undisturbed), strict=True):
        for key in ("cost/unet_evals", "reward/mean", "policy/grad_norm"):
            assert line.get(key) == same.get(key)
    files, usual = kept(runner, name), kept(runner, undisturbed)
    if count == 0:
        assert not files
        return
    assert len(trees.load(runner.runs / name, 2)) == 3
    assert {k: files[k] for k in usual if k.endswith(".png")} == {
        k: v for k, v in usual.items() if k.endswith(".png")
    }


def test_sigterm_stops_resumably_with_a_page_and_the_resumed_run_has_all_trees(
    runner: Runner, cold_runner: ColdRunner, undisturbed: str
) -> None:
    # Evaluated after every stage, so that the page has something to compare with.
    process = cold_runner.process("halted", fleet__samplers__max=1, evaluation__every=1)
    try:
        when(lambda: runner.lines("halted") >= 2, within=240)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=200)
    finally:
        process.kill()
        process.wait(30)
    assert process.returncode == EXIT_STOPPED, out
    assert "--name=halted --resume" in out
    page = runner.runs / "halted" / "report.html"
    assert re.search(r"After \d of 3 stages", page.read_text(encoding="utf-8")), out
    # With --name and --resume alone: the run knows its own configuration.
    resume = [f"--runs={runner.runs}", "--name=halted", "--resume"]
    assert runner.call(main, resume) == EXIT_DONE
    assert runner.lora("halted") == runner.lora(undisturbed)
    assert kept(runner, "halted") == kept(runner, undisturbed)
    assert "Stage 1:" in page.read_text(encoding="utf-8")


def test_a_finished_run_has_its_page_also_in_mlflow(
    runner: Runner, undisturbed: str, tmp_path: Path
) -> None:
    text = (runner.runs / undisturbed / "report.html").read_text(encoding="utf-8")
    assert re.search(r'class="verdict">The reward [^<]+ on training prompts', text)
    assert text.count('class="group"') == 3 * 2
    assert all(f"before: {prompt}" in text for prompt in PROMPTS)
    notes = json.loads((runner.runs / undisturbed / "mlflow.json").read_text())
    client = mlflow.MlflowClient(f"sqlite:///{runner.runs / 'mlflow.db'}")
    file = client.download_artifacts(notes["run_id"], "report.html", str(tmp_path))
    assert Path(file).read_text(encoding="utf-8") == text


def test_a_page_that_cannot_be_made_does_not_fail_the_run(
    runner: Runner,
    undisturbed: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(*_: object, **__: object) -> str:
        raise RuntimeError("no ink")

    monkeypatch.setattr("b2ray.report.page.page", broken)
    monkeypatch.setattr(
        "b2ray.tracking.branch_trees.save", lambda *_: (_ for _ in ()).throw(OSError("no room"))
    )
    assert runner.here("pageless", fleet__samplers__max=1) == EXIT_DONE
    said = capsys.readouterr().err
    assert "warning: the run's page could not be made (RuntimeError: no ink)" in said
    assert "warning: the branch trees of stage 1 cannot be kept: no room" in said
    folder = runner.runs / "pageless"
    assert (folder / "summary.json").exists() and not (folder / "report.html").exists()
    assert (folder / "lora" / FILE).read_bytes() == runner.lora(undisturbed)
