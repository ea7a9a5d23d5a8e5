"""From evaluations to figures, pictures and the summary, without a fleet."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from b2ray.config import Config, Curriculum, Prompts, Reward
from b2ray.config import Evaluation as EvaluationSettings
from b2ray.config.load import validated
from b2ray.evaluation.evaluate import Evaluation
from b2ray.prompts import PromptSet, PromptSets
from b2ray.prompts.demonstrations import Demonstration
from b2ray.run import Run
from b2ray.tracking.folder import RunFolder, open_run
from b2ray.tracking.recorder import Recorder

PROMPTS = PromptSets(PromptSet(("a", "b", "c")), PromptSet(("d", "e")))
LOG = SimpleNamespace(send=lambda: None, run_id="id")
WEIGHTS = {"x": np.zeros((2, 2), np.float32)}


class Fake(Run):
    """A run whose policy scores 100 times its version, in pictures of known colours."""

    def __init__(self, config: Config, prompts: PromptSets, recorder: Recorder) -> None:
        self.config, self.prompts, self.recorder = config, prompts, recorder
        self.version = 0
        sampler = SimpleNamespace(too_long=["long"], picture_size=(8, 8))
        gauges = SimpleNamespace(stage=lambda stage, figures: None)
        self.workers = SimpleNamespace(sampler=sampler, gauges=gauges)
        self.runner = SimpleNamespace(replay_arrays=lambda: [])
        self.evaluated: list[tuple[int, int]] = []  # set and number of pictures

    @property
    def versions(self) -> SimpleNamespace:
        newest = SimpleNamespace(version=self.version, digest="d")
        return SimpleNamespace(newest=newest, arrays=(WEIGHTS, {}), start=lambda: None)

    def evaluation(self, prompts, which: int, count: int) -> Evaluation:
        self.evaluated.append((which, count))
        pictures = np.zeros((count, 8, 8, 3), np.uint8)
        names = [*(["reward"] if self.config.rewards else []), *self.names]
        scores = {n: np.arange(count) + 100.0 * self.version for n in names}
        texts = [prompts[i % len(prompts)] for i in range(count)]
        halves = [pictures[: count // 2], pictures[count // 2 :]]
        return Evaluation(scores, texts, np.eye(count, dtype=np.float32), halves, {})

    @property
    def names(self) -> list[str]:
        return [r.name for r in self.config.all_rewards]


@pytest.fixture
def fake(monkeypatch):
    """Makes runs without a fleet."""
    made: list[Fake] = []

    def evaluate(workers, versions, prompts, which, count, reference, progress) -> Evaluation:
        return made[-1].evaluation(prompts, which, count)

    monkeypatch.setattr("b2ray.run.evaluate", evaluate)

    def make(config: Config, prompts: PromptSets, folder: RunFolder) -> Fake:
        made.append(Fake(config, prompts, Recorder(config, prompts, folder, LOG)))
        return made[-1]

    return make


@pytest.fixture
def run(tmp_path, fake):
    """Commits a run of two stages; returns its summary, its folder and the run."""

    def go(**evaluation: int):
        config = Config(
            name="mine",
            runs=str(tmp_path),
            prompts=Prompts(train="p.txt"),
            rewards=(Reward(name="clip", kind="clip"),),
            curriculum=Curriculum(stages=2),
            evaluation=EvaluationSettings(**evaluation),
        )
        with open_run(config) as folder:
            made = fake(config, PROMPTS, folder)
            state = made.start()
            for version in (1, 2):
                made.version = version
                figures = {"interval": 3.0, "reward/mean": 0.5, "bad": 1.0}
                costs = {"cost/reward_queries": 10.0, "cost/unet_evals": 100.0}
                state = made.commit(state.after_stage(costs), figures)
            summary = made.recorder.finish(WEIGHTS)
            made.recorder.close()
        return summary, folder, made

    return go


@pytest.mark.parametrize(
    ("images", "final", "previews"), [(4, 8, 3), (8, 5, 6), (4, 8, 6), (4, 4, 9), (4, 8, 0)]
)
def test_a_run_ends_with_its_pictures_side_by_side(run, images, final, previews):
    summary, folder, _ = run(images=images, final_images=final, previews=previews, every=1)
    both = [folder.pictures / f"before_after_{name}.png" for name in ("train", "heldout")]
    assert [p.exists() for p in both] == [previews > 0] * 2
    assert ("train set" in summary["files"]) == (previews > 0)


def test_the_summary_compares_before_and_after(run):
    summary, folder, _ = run(images=4, final_images=8, every=1)
    assert summary["reward"] == {"before": 3.5, "after": 203.5}
    assert summary["clip"]["heldout"] == {"before": 3.5, "after": 203.5}
    assert [e["step"] for e in summary["evaluations"]] == [0, 1, 2]
    assert (summary["reward_queries"], summary["unet_evals"]) == (20, 200)
    assert folder.summary() == json.loads(json.dumps(summary))


def test_the_series_is_of_the_same_pictures_every_time(run):
    summary, _, made = run(images=4, final_images=8, every=1)
    assert [e["reward"] for e in summary["evaluations"]] == [1.5, 101.5, 201.5]
    assert made.evaluated == [(0, 8), (1, 8), (0, 4), (0, 8), (1, 8)]


@pytest.mark.parametrize(("every", "steps"), [(0, [0, 2]), (1, [0, 1, 2]), (2, [0, 2])])
def test_evaluations_follow_the_calendar(run, every, steps):
    summary, _, _ = run(every=every, images=4, final_images=4)
    assert [e["step"] for e in summary["evaluations"]] == steps


def test_every_stage_has_its_line_with_totals(run):
    _, folder, _ = run(every=0, images=4, final_images=4)
    lines = folder.metrics()
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert [line.get("cost/reward_queries", 0) for line in lines] == [0, 10, 20]
    assert all(math.isfinite(v) for line in lines for v in line.values() if isinstance(v, float))


@pytest.mark.parametrize("heldout", [(), ("judge",)])
def test_a_run_on_demonstrations_has_no_reward(tmp_path, fake, capsys, heldout):
    rewards = tuple(Reward(name=n, kind="clip") for n in heldout)
    config = validated(
        {
            "preset": "sqil",
            "name": "mine",
            "runs": str(tmp_path),
            "demonstrations": {"path": "folder"},
            "curriculum": {"stages": 1},
            "evaluation": {
                "images": 4,
                "final_images": 4,
                "heldout_rewards": [r.model_dump() for r in rewards],
            },
        }
    )
    shown = (Demonstration(Path("small.png"), "a", (4, 4)),)
    with open_run(config) as folder:
        made = fake(config, replace(PROMPTS, demonstrations=shown), folder)
        state = made.start()
        made.version = 1
        made.commit(state.after_stage({}), {"interval": 3.0, "demonstrations/kl": 0.25})
        summary = made.recorder.finish(WEIGHTS)
        made.recorder.close()
    said = capsys.readouterr().err
    assert "cuts off the end of the prompt 'long'" in said
    assert "small.png (4 × 4)" in said and "0.2500 nats from the demonstrations" in said
    assert "reward" not in summary and summary["reward_queries"] == 0
    assert all("reward" not in e for e in summary["evaluations"])
    assert set(summary) >= set(heldout)
    assert folder.metrics()[1].keys().isdisjoint({"reward/mean", "eval/train/reward"})
    assert (folder.pictures / "before_after_train.png").exists()
