"""Which trials are stopped before their last stage."""

from __future__ import annotations

import pytest

from b2ray.sweep.early import Halving
from b2ray.sweep.spec import Sweep


def halving(mode: str = "max", after: int = 2, factor: int = 2) -> Halving:
    early = {"after": after, "factor": factor}
    given = {"name": "x", "metric": "m/x", "mode": mode, "grid": {"learner.lr": [1, 2, 3, 4]}}
    return Halving(Sweep(**given, stop_early=early))


def line(step: int, value: float | None = None) -> dict[str, float]:
    return {"step": step, **({} if value is None else {"m/x": value})}


@pytest.mark.parametrize(("mode", "sign"), [("max", 1), ("min", -1)])
def test_of_those_that_came_so_far_the_best_half_goes_on(mode, sign):
    rule = halving(mode)
    assert not rule.observe("a", [line(2, 0.5 * sign)])
    assert rule.observe("b", [line(2, 0.4 * sign)])
    assert not rule.observe("c", [line(2, 0.6 * sign)])
    assert rule.observe("d", [line(2, 0.3 * sign)])


def test_nothing_is_stopped_before_and_between_the_points():
    rule = halving()
    assert not rule.observe("a", [line(0, 0.9), line(1, 0.9), line(2, 0.9), line(3, 0.9)])
    assert not rule.observe("b", [line(0, 0.1), line(1, 0.1)])
    assert rule.observe("b", [line(0, 0.1), line(1, 0.1), line(2, 0.1)])


def test_the_first_figure_after_a_point_counts_for_it():
    """Held-out rewards are measured every few stages only."""
    rule = halving(after=2)
    assert not rule.observe("a", [line(1), line(2), line(3, 0.9)])
    assert rule.observe("b", [line(1), line(2), line(3, 0.1)])


def test_lines_that_are_told_again_change_nothing():
    rule = halving()
    lines = [line(2, 0.5)]
    assert not rule.observe("a", lines)
    assert rule.observe("b", [line(2, 0.1)])
    assert not rule.observe("b", [line(2, 0.1)]) and not rule.observe("a", lines)
    assert not rule.observe("a", [*lines, line(4, 0.2)])  # alone at the next point
