"""Ways of doing one thing, measured by turns, so that a slow moment of the machine meets all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np

WARM_UP = 2  # rounds that do not count


def by_turns(ways: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, np.ndarray]:
    """Processor seconds of each way in every round."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + WARM_UP):
        for name, call in ways.items():
            began = time.process_time()
            call()
            times[name].append(time.process_time() - began)
    return {name: np.array(found[WARM_UP:]) for name, found in times.items()}


def quartiles(ratios: np.ndarray) -> str:
    """The median, and the quartiles around it."""
    low, middle, high = np.percentile(ratios, (25, 50, 75))
    return f"{middle:.2f} ({low:.2f} – {high:.2f})"
