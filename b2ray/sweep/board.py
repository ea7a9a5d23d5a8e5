"""What a person sees while a sweep goes on: bars on a terminal, lines in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from tqdm import tqdm

from b2ray.sweep.trials import Trial

SAY_EVERY = 60.0  # seconds between lines on how far everything is, where there is no terminal


class Board:
    """A bar for all stages of all trials, and one for each trial that runs."""

    def __init__(self, name: str, trials: int, stages: int) -> None:
        self.name, self.trials, self.ended = name, trials, 0
        self._live = sys.stderr.isatty()
        self._said = time.monotonic()
        self._all = tqdm(total=stages, unit="stage", disable=not self._live, smoothing=0.05)
        self._bars: dict[str, tqdm] = {}
        self._texts: dict[str, str] = {}
        self._stages: dict[str, int] = {}
        self._head()

    def known(self, trial: Trial, stage: int) -> None:
        """Stages that were there before, or that will never be."""
        self._move(trial, stage)
        self._all.initial = self._all.n  # no part of the speed

    def started(self, trial: Trial, doing: str) -> None:
        """A trial's process was started."""
        self.line(f"{trial.name}: {doing}")
        places = {bar.pos for bar in self._bars.values()}
        place = next(i for i in range(1, len(places) + 2) if -i not in places)
        self._bars[trial.name] = tqdm(
            total=trial.config.curriculum.stages,
            initial=self._stages.get(trial.name, 0),
            desc=trial.name,
            unit="stage",
            position=place,
            leave=False,
            disable=not self._live,
        )

    def stage(self, trial: Trial, line: Mapping[str, float], metric: str) -> None:
        """A trial has another line in metrics.jsonl."""
        stage = int(line["step"])
        bar = self._bars[trial.name]
        bar.update(max(0, stage - bar.n))
        if metric in line:
            self._texts[trial.name] = f"{metric} {line[metric]:.4g}"
            bar.set_postfix_str(self._texts[trial.name])
        self._move(trial, stage)

    def end(self, trial: Trial, how: str) -> None:
        """A trial's process has ended; it will not be started again."""
        self.ended += 1
        bar = self._bars.pop(trial.name, None)
        if bar is not None:
            bar.close()
        self._texts.pop(trial.name, None)
        self.line(f"{trial.name}: {how} · {self.ended} of {self.trials} trials")
        self._head()

    def tick(self) -> None:
        """Say now and then how far it is, in a log file."""
        if not self._live and time.monotonic() - self._said > SAY_EVERY:
            running = [
                f"{name} stage {self._stages.get(name, 0)}/{bar.total} {self._texts.get(name, '')}"
                for name, bar in self._bars.items()
            ]
            said = " · ".join(r.strip() for r in running)
            self.line(f"{self.name}: {self.ended} of {self.trials} trials · {said}")

    def line(self, text: str) -> None:
        """A line that stays."""
        self._said = time.monotonic()
        tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """Leave the screen in order."""
        for bar in (*self._bars.values(), self._all):
            bar.close()

    def _move(self, trial: Trial, stage: int) -> None:
        self._all.update(max(0, stage - self._stages.get(trial.name, 0)))
        self._stages[trial.name] = max(stage, self._stages.get(trial.name, 0))

    def _head(self) -> None:
        self._all.set_description(f"{self.name}: {self.ended} of {self.trials} trials")
