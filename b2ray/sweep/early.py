"""Which trials are not worth going on with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import optuna

from b2ray.sweep.spec import Sweep


class Halving:
    """Asynchronous successive halving (arXiv 1810.05934), as Optuna has it, over the figures that
    runs write while they go."""

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
        self._seen: dict[str, int] = {}

    def told(self, name: str, lines: Iterable[Mapping[str, Any]]) -> bool:
        """Take in a trial's lines of metrics.jsonl, of which it may know some; returns whether the
        trial does too badly to go on."""
        known = self._trials.get(name)
        trial = self._trials[name] = self._study.ask() if known is None else known
        badly = False
        for line in lines:
            stage = int(line["step"])
            # Before the first stage all settings are alike.
            if stage > self._seen.get(name, 0) and self.metric in line:
                self._seen[name] = stage
                trial.report(float(line[self.metric]), stage)
                badly |= trial.should_prune()
        return badly
