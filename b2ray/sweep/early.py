"""Decides which trials of a sweep are stopped before their last stage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import optuna

from b2ray.sweep.spec import Sweep


class Halving:
    """Asynchronous successive halving (arXiv 1810.05934) with Optuna's implementation.

    It compares the metrics that trials write while they run.

    Args:
        sweep: the sweep, with `stop_early` set.
    """

    def __init__(self, sweep: Sweep) -> None:
        assert sweep.stop_early is not None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.metric = sweep.metric
        self._study = optuna.create_study(
            direction="maximize" if sweep.mode == "max" else "minimize",
            pruner=optuna.pruners.SuccessiveHalvingPruner(
                min_resource=sweep.stop_early.after, reduction_factor=sweep.stop_early.factor
            ),
        )
        self._trials: dict[str, optuna.Trial] = {}
        self._stages: dict[str, int] = {}  # the last stage that Optuna knows, by the trial's name

    def observe(self, name: str, lines: Iterable[Mapping[str, Any]]) -> bool:
        """Report a trial's lines of metrics.jsonl; those that were reported before change nothing.

        Args:
            name: the name of the trial.
            lines: all of its lines so far.

        Returns:
            Whether the trial is too far behind the others to go on.
        """
        if name not in self._trials:
            self._trials[name] = self._study.ask()
        trial = self._trials[name]
        should_stop = False
        for line in lines:
            stage = int(line["step"])
            # Before the first stage the policies of all settings are the same.
            if stage > self._stages.get(name, 0) and self.metric in line:
                self._stages[name] = stage
                trial.report(float(line[self.metric]), stage)
                should_stop |= trial.should_prune()
        return should_stop
