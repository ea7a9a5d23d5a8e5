"""Seconds until trl's final judged alignment (benchmarks/to_alignment.py): what is read of runs."""

from __future__ import annotations

import pytest
from efficiency.curves import crossing
from to_alignment import BASE, DDPO, RATES, looks, table

from b2ray.options import parse

LINES = [
    {"time": 1030.0, "time/evaluate": 10.0, "heldout/judge": 0.3},
    {"time": 1040.0},
    {"time": 1055.0, "time/evaluate": 5.0, "heldout/judge": 0.5},
]


def test_evaluations_do_not_count_as_time():
    assert looks(LINES, began=1000.0) == [(20.0, 0.3), (40.0, 0.5)]


def test_a_level_is_reached_between_evaluations():
    seconds, judged = zip(*looks(LINES, began=1000.0), strict=True)
    assert crossing(seconds, judged, 0.4) == pytest.approx(30.0)
    assert crossing(seconds, judged, 0.2) == 20.0  # before the first stage
    assert crossing(seconds, judged, 0.51) is None


def test_what_is_never_reached_counts_as_nothing():
    points = looks(LINES, began=1000.0)
    found = [(s, {"seconds": 90.0, "judged": j}, points) for s, j in enumerate((0.4, 0.6, 0.45))]
    text = table(RATES[0], found)
    assert "| 1 | 30.0% | 60.0% | 90 s | never | – | 50.0% | 40 s |" in text
    assert text.endswith("Median of the ratios: 2.6.")  # of 3.0, 0 and 2.57


def test_trl_can_do_what_is_asked_of_it():
    config = parse([f"--config={BASE}", *DDPO]).config
    assert config.branching.images % config.branching.branch_batch == 0
    assert config.learner.batch != "all"
    assert config.branching.branch_batch % config.learner.batch == 0
    assert config.branching.branches == 1 and config.objective.kl_weight == 0
