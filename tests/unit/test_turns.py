"""Ways that are measured by turns, as benchmarks/turns.py does."""

from __future__ import annotations

import numpy as np
from turns import WARM_UP, by_turns, quartiles


def test_ways_take_turns_and_the_first_rounds_do_not_count() -> None:
    calls: list[str] = []
    ways = {name: lambda name=name: calls.append(name) for name in ("one", "other")}
    times = by_turns(ways, 3)
    assert calls == ["one", "other"] * (3 + WARM_UP)
    assert {name: len(found) for name, found in times.items()} == {"one": 3, "other": 3}


def test_the_median_stands_before_the_quartiles() -> None:
    assert quartiles(np.array([4.0, 1.0, 2.0, 3.0, 5.0])) == "3.00 (2.00 – 4.00)"
