"""The files in configs/: each is a run that could start, and says truly what it costs."""

from __future__ import annotations

from pathlib import Path

import pytest

from b2ray.checks import check_files
from b2ray.config import Config
from b2ray.cost import plan_cost
from b2ray.options import parse
from b2ray.shapes.demonstrations import main as demonstrations

FILES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
EXPERIMENTS = [f for f in FILES if not f.stem.startswith("quickstart")]
RELEASED = [f for f in EXPERIMENTS if f.stem.endswith("_released")]


def config(file: Path) -> Config:
    return parse([f"--config={file}"]).config


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_a_file_is_a_run(file, tmp_path, monkeypatch):
    found = config(file)
    if found.demonstrations.path:  # the user's; the file's first lines say how to make it
        monkeypatch.chdir(tmp_path)
        command = f"python -m b2ray.shapes.demonstrations {found.demonstrations.path} --count 64"
        assert command in file.read_text(encoding="utf-8")
        assert demonstrations([found.demonstrations.path, "--count", "64"]) == 0
    assert found.name == file.stem
    sets = check_files(found).evaluated()
    assert set(sets) == {"train", "heldout"}
    if file in EXPERIMENTS:
        assert not set(sets["train"]) & set(sets["heldout"])
        # Every prompt of both sets is looked at, and the set trained on equally often.
        assert found.evaluation.images % len(sets["train"]) == 0
        assert found.evaluation.final_images >= max(map(len, sets.values()))


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda f: f.stem)
def test_its_first_lines_say_what_it_costs(file):
    cost, text = plan_cost(config(file)), file.read_text(encoding="utf-8")
    assert f"{cost.reward_queries:,} reward queries" in text
    assert f"{cost.unet_evals / 1e6:.2f} million UNet evaluations" in text


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda f: f.stem)
def test_its_processes_fit_one_gpu(file):
    fleet = config(file).fleet
    shares = [
        fleet.learner.gpus,
        fleet.samplers.max * fleet.samplers.gpus,
        fleet.scorers.count * fleet.scorers.gpus,
    ]
    assert all(shares) and sum(shares) == 1


@pytest.mark.parametrize("file", RELEASED, ids=lambda f: f.stem)
def test_the_released_runs_are_the_released_settings(file):
    found = config(file)
    assert (found.groups, found.branching.branches, found.curriculum.stages) == (256, 5, 100)
    assert (found.sampling.steps, found.sampling.guidance, found.sampling.eta) == (20, 5.0, 1.0)
    assert found.interval_bounds == (14, 20)
    assert (found.selection.best_above, found.selection.worst_below) == (0.5, -0.5)
    assert (found.advantage.center, found.advantage.window, found.advantage.clamp) == (
        *("prompt", 8, 5.0),
    )
    assert found.objective.clip_nats / 16_384 == pytest.approx(0.1)
    learner, lora = found.learner, found.model.lora
    assert (learner.lr, learner.weight_decay, learner.max_grad_norm) == (1e-4, 1e-4, 1.0)
    assert (learner.passes, learner.batch, lora.rank, found.model.dtype) == (2, 128, 4, "float16")


def test_methods_are_compared_at_equal_reward_queries():
    names = ("sd14_template1_released", "sd14_template1", "sd14_ddpo")
    costs = [plan_cost(config(f)) for f in EXPERIMENTS if f.stem in names]
    assert len({c.reward_queries for c in costs}) == 1 and len(costs) == 3
