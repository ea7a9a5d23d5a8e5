"""The files in configs/: each is a run that could start, and says truly what it costs."""

from __future__ import annotations

from pathlib import Path

import pytest

from b2ray.algorithm.cost import plan_cost
from b2ray.config import Config
from b2ray.config.load import parse
from b2ray.preflight import check_files
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


def test_its_first_lines_say_what_it_costs():
    assert len(EXPERIMENTS) > 10
    unsaid = [
        (file.stem, words)
        for file in EXPERIMENTS
        for words in costs_of(file)
        if words not in file.read_text(encoding="utf-8")
    ]
    assert unsaid == []


def costs_of(file: Path) -> list[str]:
    cost = plan_cost(config(file))
    queries = f"{cost.reward_queries:,} reward queries"
    return [queries, f"{cost.unet_evals / 1e6:.2f} million UNet evaluations"]


def test_its_processes_fit_one_gpu():
    shares = {file.stem: shares_of_gpus(config(file)) for file in EXPERIMENTS}
    assert {name: s for name, s in shares.items() if not all(s) or sum(s) != 1} == {}


def shares_of_gpus(config: Config) -> list[float]:
    """Of the learner, all samplers and all scorers."""
    fleet = config.fleet
    samplers = fleet.samplers.max * fleet.samplers.gpus
    return [fleet.learner.gpus, samplers, fleet.scorers.count * fleet.scorers.gpus]


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
    assert (learner.inner_epochs, learner.batch, lora.rank, found.model.dtype) == (
        2,
        128,
        4,
        "float16",
    )


def test_methods_are_compared_at_equal_reward_queries():
    names = ("sd14_template1_released", "sd14_template1", "sd14_ddpo")
    costs = [plan_cost(config(f)) for f in EXPERIMENTS if f.stem in names]
    assert len({c.reward_queries for c in costs}) == 1 and len(costs) == 3
