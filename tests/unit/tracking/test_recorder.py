"""From evaluations to figures, pictures and the summary, without a fleet."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from b2ray.config import Config, Curriculum, Evaluation, Prompts, Reward
from b2ray.demonstrations import Demonstration
from b2ray.evaluation import Evaluated
from b2ray.options import validated
from b2ray.prompts import PromptSet, PromptSets
from b2ray.replay import Kept
from b2ray.tracking.folder import open_run
from b2ray.tracking.recorder import Recorder

PROMPTS = PromptSets(PromptSet(("a", "b", "c")), PromptSet(("d", "e")))
LOG = SimpleNamespace(send=lambda: None, run_id="id")
WEIGHTS = {"x": np.zeros((2, 2), np.float32)}


class FakeCrew:
    """Evaluates to the stage's number, in pictures of known colours."""

    def __init__(self, rewards: tuple[str, ...] = ("reward", "clip")) -> None:
        self.rewards = rewards
        self.weights = SimpleNamespace(version=0, digest="d")
        self.newest = (WEIGHTS, {})
        self.kept: list[Kept] = []
        self.prefixes = SimpleNamespace(to_commit=lambda stage: {}, forget=lambda stage: None)
        self.gauges = SimpleNamespace(stage=lambda stage, figures: None)
        self.asked: list[tuple[int, int]] = []

    def fresh(self) -> None:
        pass

    def too_long(self) -> list[str]:
        return []

    def picture_size(self) -> tuple[int, int]:
        return 8, 8

    def evaluate(self, prompts, which, count, reference, progress) -> Evaluated:
        self.asked.append((which, count))
        pictures = np.zeros((count, 8, 8, 3), np.uint8)
        scores = {n: np.arange(count) + 100.0 * self.weights.version for n in self.rewards}
        texts = [prompts[i % len(prompts)] for i in range(count)]
        vectors = np.eye(count, dtype=np.float32)
        halves = [pictures[: count // 2], pictures[count // 2 :]]
        return Evaluated(scores, texts, vectors, halves, {})


@pytest.fixture
def run(tmp_path):
    """Records a run of two stages; returns its summary, its folder and the crew."""

    def go(**evaluation: int):
        config = Config(
            name="mine",
            runs=str(tmp_path),
            prompts=Prompts(train="p.txt"),
            rewards=(Reward(name="clip", kind="clip"),),
            curriculum=Curriculum(stages=2),
            evaluation=Evaluation(**evaluation),
        )
        crew = FakeCrew()
        with open_run(config) as folder:
            recorder = Recorder(config, PROMPTS, folder, LOG)
            state = recorder.begin(crew)
            for version in (1, 2):
                crew.weights.version = version
                figures = {"interval": 3.0, "reward/mean": 0.5, "bad": 1.0}
                costs = {"cost/reward_queries": 10.0, "cost/unet_evals": 100.0}
                state = recorder.commit(crew, state, figures, costs)
            summary = recorder.finish(crew)
            recorder.close()
        return summary, folder, crew

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
    summary, _, crew = run(images=4, final_images=8, every=1)
    assert [e["reward"] for e in summary["evaluations"]] == [1.5, 101.5, 201.5]
    assert crew.asked == [(0, 8), (1, 8), (0, 4), (0, 8), (1, 8)]


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
def test_a_run_on_demonstrations_has_no_reward(tmp_path, capsys, heldout):
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
    crew = FakeCrew(heldout)
    with open_run(config) as folder:
        recorder = Recorder(config, replace(PROMPTS, demonstrations=shown), folder, LOG)
        state = recorder.begin(crew)
        crew.weights.version = 1
        recorder.commit(crew, state, {"interval": 3.0, "demonstrations/kl": 0.25}, {})
        summary = recorder.finish(crew)
        recorder.close()
    said = capsys.readouterr().err
    assert "small.png (4 × 4)" in said and "0.2500 nats from the demonstrations" in said
    assert "reward" not in summary and summary["reward_queries"] == 0
    assert all("reward" not in e for e in summary["evaluations"])
    assert set(summary) >= set(heldout)
    assert folder.metrics()[1].keys().isdisjoint({"reward/mean", "eval/train/reward"})
    assert (folder.pictures / "before_after_train.png").exists()
