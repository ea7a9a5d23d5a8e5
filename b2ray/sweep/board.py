"""What the user sees while a sweep goes on: bars on a terminal, lines in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from tqdm import tqdm

from b2ray.sweep.trials import Trial

SAY_EVERY = 60.0  # seconds between lines about the progress of all trials, without a terminal


class Board:
    """Shows a progress bar for all stages of all trials, and one for each trial that runs.

    Args:
        name: the name of the sweep.
        trials: the number of trials.
        stages: the number of stages of all trials together.
    """

    def __init__(self, name: str, trials: int, stages: int) -> None:
        self.name, self.trials, self.ended = name, trials, 0
        self._live = sys.stderr.isatty()
        self._last_line = time.monotonic()
        self._all = tqdm(total=stages, unit="stage", disable=not self._live, smoothing=0.05)
        self._bars: dict[str, tqdm] = {}
        self._texts: dict[str, str] = {}
        self._stages: dict[str, int] = {}
        self._describe()

    def known(self, trial: Trial, stage: int) -> None:
        """Count stages that took no time: done before this process, or never to be done.

        Args:
            trial: the trial they belong to.
            stage: the stage up to which they go.
        """
        self._move(trial, stage)
        self._all.initial = self._all.n  # so that they do not count for the speed

    def started(self, trial: Trial, doing: str) -> None:
        """Add the bar of a trial whose process was started.

        Args:
            trial: the trial.
            doing: what its process does, for the line that announces it.
        """
        self.line(f"{trial.name}: {doing}")
        # tqdm gives the position of a bar as a negative number; take the first free one.
        positions = {bar.pos for bar in self._bars.values()}
        position = next(i for i in range(1, len(positions) + 2) if -i not in positions)
        self._bars[trial.name] = tqdm(
            total=trial.config.curriculum.stages,
            initial=self._stages.get(trial.name, 0),
            desc=trial.name,
            unit="stage",
            position=position,
            leave=False,
            disable=not self._live,
        )

    def stage(self, trial: Trial, line: Mapping[str, float], metric: str) -> None:
        """Move the bars to the stage of a line of a trial's metrics.jsonl.

        Args:
            trial: the trial.
            line: the line.
            metric: the name of the metric to show.
        """
        stage = int(line["step"])
        bar = self._bars[trial.name]
        bar.update(max(0, stage - bar.n))
        if metric in line:
            self._texts[trial.name] = f"{metric} {line[metric]:.4g}"
            bar.set_postfix_str(self._texts[trial.name])
        self._move(trial, stage)

    def end(self, trial: Trial, how: str) -> None:
        """Remove the bar of a trial that will not be started again.

        Args:
            trial: the trial.
            how: how it has ended, for the line that says so.
        """
        self.ended += 1
        bar = self._bars.pop(trial.name, None)
        if bar is not None:
            bar.close()
        self._texts.pop(trial.name, None)
        self.line(f"{trial.name}: {how} · {self.ended} of {self.trials} trials")
        self._describe()

    def tick(self) -> None:
        """Print the progress once in a while, if standard error is no terminal."""
        if not self._live and time.monotonic() - self._last_line > SAY_EVERY:
            running = [
                f"{name} stage {self._stages.get(name, 0)}/{bar.total} {self._texts.get(name, '')}"
                for name, bar in self._bars.items()
            ]
            progress = " · ".join(text.strip() for text in running)
            self.line(f"{self.name}: {self.ended} of {self.trials} trials · {progress}")

    def line(self, text: str) -> None:
        """Print a line that stays on the screen, above the bars."""
        self._last_line = time.monotonic()
        tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """Remove the bars from the screen."""
        for bar in (*self._bars.values(), self._all):
            bar.close()

    def _move(self, trial: Trial, stage: int) -> None:
        self._all.update(max(0, stage - self._stages.get(trial.name, 0)))
        self._stages[trial.name] = max(stage, self._stages.get(trial.name, 0))

    def _describe(self) -> None:
        self._all.set_description(f"{self.name}: {self.ended} of {self.trials} trials")
