"""A whole run on Ray: what it leaves behind, and that its size does not matter."""

from __future__ import annotations

import json
import urllib.request

import mlflow
import numpy as np
import pytest
import ray
import torch

from b2ray.algorithm.cost import plan_cost
from b2ray.diffusion.lora_file import load
from tests.models import PROMPTS, config, pipeline
from tests.runner import ColdRunner, Runner, when


def test_the_summary_holds_what_scripts_rely_on(runner: Runner, undisturbed: str) -> None:
    summary = json.loads((runner.runs / undisturbed / "summary.json").read_text())
    assert summary["reward"].keys() == {"before", "after"}
    assert summary["clip"].keys() == {"train", "heldout"}
    assert summary["clip"]["heldout"].keys() == {"before", "after"}
    assert summary["reward_queries"] == 3 * 12
    # T = 4, four groups of three, intervals 2, 3, 4: prefixes, branches, two passes of learning.
    metrics = [json.loads(line) for line in _lines(runner, undisturbed)]
    sampled = sum(4 * (4 - n) + 12 * n for n in (2, 3, 4))
    learnt = 2 * sum(
        n * (b["cost/trained_leaves"] - a.get("cost/trained_leaves", 0))
        for n, a, b in zip((2, 3, 4), metrics, metrics[1:], strict=False)
    )
    assert summary["unet_evals"] == sampled + learnt
    assert metrics[-1]["cost/unet_backwards"] == learnt
    # No rewards tie here, so that every group trains on two leaves, as is planned.
    planned = plan_cost(config(runner.models))
    assert summary["unet_evals"] == planned.unet_evals
    assert summary["reward_queries"] == planned.reward_queries
    assert summary["seconds"] > 0


def test_every_stage_reports_its_figures(runner: Runner, undisturbed: str) -> None:
    lines = [json.loads(line) for line in _lines(runner, undisturbed)]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    for name in (
        *("reward/mean", "reward/clip", "branch/within_std", "branch/between_std"),
        *("branch/pair_rate", "policy/ratio_drift", "policy/clip_fraction", "policy/approx_kl"),
        *("policy/grad_norm", "cost/reward_queries", "cost/unet_evals", "time/sample"),
        *("time/update", "time/sync", "throughput/images_per_second", "fleet/ready"),
        *("time/select", "time/commit", "time/unet_share_sampler", "time/unet_share_learner"),
        *("memory/sampler", "memory/learner", "memory/scorer", "cost/bytes_pictures"),
    ):
        assert all(name in line for line in lines[1:]), name
    assert [line["interval"] for line in lines[1:]] == [2, 3, 4]
    assert "diversity/vendi" in lines[0] and "diversity/vendi" in lines[3]
    assert all(line["policy/ratio_drift"] < 1e-5 for line in lines[1:])


def test_the_policy_changed_and_diffusers_loads_it(runner: Runner, undisturbed: str) -> None:
    folder = runner.runs / undisturbed / "lora"
    state = load(folder / "pytorch_lora_weights.safetensors")
    assert all(np.abs(v).max() > 0 for k, v in state.items() if "lora_B" in k)
    pipe = pipeline()
    pipe.set_progress_bar_config(disable=True)

    def draw() -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        return pipe(PROMPTS[0], num_inference_steps=4, generator=generator, output_type="np").images

    before = draw()
    pipe.load_lora_weights(folder)
    assert np.abs(draw() - before).max() > 0


def test_mlflow_has_the_run(runner: Runner, undisturbed: str) -> None:
    assert not mlflow.is_tracking_uri_set()  # the next run of this process has a place of its own
    notes = json.loads((runner.runs / undisturbed / "mlflow.json").read_text())
    client = mlflow.MlflowClient(f"sqlite:///{runner.runs / 'mlflow.db'}")
    run = client.get_run(notes["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["branching.branches"] == "3"
    assert run.data.metrics["cost/reward_queries"] == 36
    history = client.get_metric_history(notes["run_id"], "reward/mean")
    assert [m.step for m in history] == [1, 2, 3]
    images = [a.path for a in client.list_artifacts(notes["run_id"], "images")]
    for step in (0, 2, 3):
        pictures = [p for p in images if f"preview_train+step+{step}+" in p and "webp" not in p]
        assert len(pictures) == 1, images
    assert len(run.outputs.model_outputs) == 1


def test_prometheus_is_told_of_the_run(cold_runner: ColdRunner) -> None:
    """What Ray's agent on this node answers when Prometheus asks it, while a run goes on."""
    (node,) = [n for n in ray.nodes() if n["Alive"]]
    page = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"

    def told() -> set[str]:
        with urllib.request.urlopen(page, timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        mine = [x for x in lines if 'run="watched"' in x]
        return {x.split("{")[0].removeprefix("ray_") for x in mine}

    wanted = {"b2ray_stage", "b2ray_phase", "b2ray_slots", "b2ray_reward_mean"}
    process = cold_runner.process("watched", curriculum__stages=500)
    try:
        when(lambda: wanted <= told(), within=200)  # it collects every few seconds
    finally:
        process.kill()
        process.wait(30)


def test_the_number_of_samplers_does_not_change_a_byte(runner: Runner, undisturbed: str) -> None:
    assert runner.here("three", fleet__samplers__min=3, fleet__samplers__max=3) == 0
    assert runner.lora("three") == runner.lora(undisturbed)


def test_a_finished_run_shows_its_summary_again(
    runner: Runner, undisturbed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _lines(runner, undisturbed)
    assert runner.here(undisturbed) == 0
    assert "is finished" in capsys.readouterr().err
    assert _lines(runner, undisturbed) == before


def _lines(runner: Runner, name: str) -> list[str]:
    return (runner.runs / name / "metrics.jsonl").read_text().splitlines()
