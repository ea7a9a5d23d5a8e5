"""What the branches can drive beside PPO, and intervals that grow by the spread, as whole runs."""

from __future__ import annotations

import numpy as np
import pytest

from b2ray.diffusion.lora_file import FILE, load
from tests.runner import Runner


@pytest.mark.parametrize(
    ("preset", "own"),
    [
        ("ddpo_sf", {"branching__branches": 1, "curriculum__start": 4}),
        ("dpok", {"branching__branches": 1, "curriculum__start": 4}),
        ("d3po", {}),
        ("grpo", {}),
    ],
)
def test_a_preset_trains(runner: Runner, preset: str, own: dict[str, object]) -> None:
    over = {"preset": preset, "learner__batch": "all", "learner__inner_epochs": 1, **own}
    assert runner.here(preset, **over) == 0
    lines = runner.figures(preset)[1:]
    assert [line["policy/updates"] for line in lines] == [1, 1, 1]
    assert ("policy/kl_reference" in lines[-1]) == (preset == "dpok")
    leaves = [line["cost/trained_leaves"] for line in lines]
    # Best and worst of four groups of three, or all twelve.
    assert leaves == ([8, 16, 24] if preset == "d3po" else [12, 24, 36])
    weights = load(runner.runs / preset / "lora" / FILE)
    # These are 0 until something is learnt.
    assert any(np.abs(v).max() > 0 for n, v in weights.items() if "lora_B" in n)


def test_an_interval_grows_by_the_spread(runner: Runner) -> None:
    """With a share that is always too small: a step a stage."""
    over = {
        "curriculum__extend": "spread",
        "curriculum__min_share": 0.999,
        "curriculum__patience": 1,
        "curriculum__start": 1,
        "learner__max_lag": 1,
    }
    assert runner.here("spread", **over) == 0
    lines = runner.figures("spread")[1:]
    assert [line["interval"] for line in lines] == [1, 2, 3]
    assert all(0 < line["branch/within_share"] < 0.999 for line in lines)
