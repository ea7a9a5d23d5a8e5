"""Runs trials side by side, each in its own process, all on one Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

from b2ray.config import Config
from b2ray.errors import EXIT_DONE, EXIT_STOPPED, EXIT_WORKER
from b2ray.fleet.session import StopFlag
from b2ray.sweep.board import Board
from b2ray.sweep.compare import Outcome, State
from b2ray.sweep.early import Halving
from b2ray.sweep.folder import SweepFolder, busy, committed, finished, lines
from b2ray.sweep.trials import SweepPlan, Trial

LOOK_EVERY = 0.3  # seconds between looks at the processes
# Seconds that trials have to stop before they are killed; they can be resumed either way. It is
# less than what `ray job stop` gives a sweep on the clusters of cluster/.
STOP_WITHIN = 45.0
# Seconds for which processes of a sweep that was killed may still hold their trials. At worst their
# Ray died with the sweep, and they wait until Ray gives up.
LEFT_OVER = 90.0


@dataclass
class Process:
    """The process of a trial that runs.

    Attributes:
        trial: the trial.
        popen: the process.
        size: the size of its metrics.jsonl in bytes when it was last read.
        pruned: whether it is stopped early.
        asked: whether it was asked to stop.
    """

    trial: Trial
    popen: subprocess.Popen[bytes]
    size: int = 0
    pruned: bool = False
    asked: bool = False

    def stop(self) -> None:
        """Close the process's standard input, which `fleet.session.stop_with_stdin` notices."""
        assert self.popen.stdin is not None
        self.asked = True
        self.popen.stdin.close()


class Runner:
    """Runs the trials that are not done, until all have an outcome or a signal comes.

    Args:
        plan: the sweep.
        folder: the sweep's folder, opened for writing.
        board: shows the progress.

    Attributes:
        outcomes: the outcome of every trial so far, by its name.
        waiting: the trials that have not been started yet.
    """

    def __init__(self, plan: SweepPlan, folder: SweepFolder, board: Board) -> None:
        self.plan, self.folder, self.board = plan, folder, board
        self.outcomes: dict[str, Outcome] = {}
        self.waiting: list[Trial] = []
        self._running: list[Process] = []
        self._halving = Halving(plan.sweep) if plan.sweep.stop_early else None
        self._settle_known()

    def run(
        self, configs: Mapping[str, Config], parallel: int, address: str, stop: StopFlag
    ) -> None:
        """Run all trials that wait.

        Args:
            configs: the configuration that each trial's process gets, by the trial's name.
            parallel: how many run at the same time.
            address: the address of the Ray cluster that all runs join.
            stop: holds the signal that stops the sweep.
        """
        deadline = time.monotonic() + LEFT_OVER
        try:
            while (self.waiting or self._running) and stop.signal is None:
                # Start as many as may run, but give processes of a killed sweep time to end.
                for trial in list(self.waiting):
                    is_held = time.monotonic() < deadline and busy(trial)
                    if len(self._running) < parallel and not is_held:
                        self.waiting.remove(trial)
                        self._start(trial, configs[trial.name], address)
                # Read what those that run have written.
                for process in list(self._running):
                    self._look(process)
                self.board.tick()
                time.sleep(LOOK_EVERY)
        finally:
            self._stop_all()

    def _settle_known(self) -> None:
        """Find out which trials earlier calls of the command have finished or stopped early."""
        stopped = self.folder.stopped_early() if self._halving else {}
        for trial in self.plan.trials:
            stage = committed(trial)
            if self._halving:
                self._halving.observe(trial.name, lines(trial))
            if finished(trial):
                self._settle(trial, Outcome(State.FINISHED), "finished before")
            elif trial.name in stopped:
                how = f"stopped early before, after {stage} stages"
                self._settle(trial, Outcome(State.STOPPED_EARLY), how)
            else:
                self.board.known(trial, stage)
                self.outcomes[trial.name] = Outcome(State.WAITING)
                self.waiting.append(trial)

    def _start(self, trial: Trial, config: Config, address: str) -> None:
        file = self.folder.write_config(trial, config)
        with self.folder.log(trial).open("ab") as log:
            popen = subprocess.Popen(
                [sys.executable, "-m", "b2ray.run", f"--config={file}", "--stop-with-stdin"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "RAY_ADDRESS": address},
                process_group=0,  # Ctrl-C goes to the sweep only, which then stops its trials
            )
        self._running.append(Process(trial, popen))
        self.outcomes[trial.name] = Outcome(State.RUNNING)
        doing = f"goes on after stage {committed(trial)}" if trial.path.exists() else "starts"
        self.board.started(trial, doing)

    def _look(self, process: Process) -> None:
        """Read new metrics of a trial, and notice when its process has ended."""
        trial, code = process.trial, process.popen.poll()
        metrics = trial.path / "metrics.jsonl"
        size = metrics.stat().st_size if metrics.exists() else 0
        if size != process.size:
            process.size = size
            self._take(process)
        if code is not None:
            self._running.remove(process)
            self._end(process, code)

    def _take(self, process: Process) -> None:
        """Show the metrics of a trial, and stop it early if it is too far behind the others."""
        trial, metrics = process.trial, lines(process.trial)
        for line in metrics:
            self.board.stage(trial, line, self.plan.sweep.metric)
        if self._halving and self._halving.observe(trial.name, metrics) and not process.pruned:
            stage = int(metrics[-1]["step"])
            if stage < trial.config.curriculum.stages:
                # Written first, so that it stays stopped if the sweep dies now.
                self.folder.stop_early(trial, stage)
                process.pruned = True
                process.stop()

    def _end(self, process: Process, code: int) -> None:
        """Settle a trial whose process has ended with an exit code."""
        trial = process.trial
        if finished(trial) and code == EXIT_DONE:
            self._settle(trial, Outcome(State.FINISHED), "finished")
        elif process.pruned:
            how = f"stopped early after {committed(trial)} stages"
            self._settle(trial, Outcome(State.STOPPED_EARLY), how)
        elif code == EXIT_STOPPED or process.asked:
            self._settle(trial, Outcome(State.STOPPED), "stopped; the last committed stage stands")
        else:
            failed = self._failure(trial, code)
            self._settle(trial, failed, f"failed: {failed.cause}")

    def _failure(self, trial: Trial, code: int) -> Outcome:
        """Return why a trial's process has failed.

        A failed worker has left its trace in failure.log; otherwise the signal is the cause, or the
        last error that the process has printed.
        """
        log, trace = self.folder.log(trial), trial.path / "failure.log"
        if code == EXIT_WORKER and trace.exists():
            return Outcome(State.FAILED, trace.read_text("utf-8").splitlines()[0], str(trace))
        if code < 0:
            name = signal.Signals(-code).name
            return Outcome(State.FAILED, f"its process was ended by {name}", str(log))
        output = [x for x in log.read_text("utf-8", "replace").splitlines() if x.strip()]
        last = next((x for x in reversed(output) if x.startswith("b2ray: ")), (output or [""])[-1])
        cause = last.removeprefix("b2ray: ") or "it said nothing"
        return Outcome(State.FAILED, f"exit code {code}: {cause}", str(log))

    def _settle(self, trial: Trial, outcome: Outcome, how: str) -> None:
        """Note the outcome of a trial and say how it has ended."""
        self.outcomes[trial.name] = outcome
        if outcome.state in (State.FINISHED, State.STOPPED_EARLY):
            self.board.known(trial, trial.config.curriculum.stages)
        self.board.end(trial, how)

    def _stop_all(self) -> None:
        """Stop all trials that run, so that they can be resumed, and wait at most `STOP_WITHIN`."""
        if not self._running:
            return
        self.board.line(
            f"stopping {len(self._running)} trials, which takes at most {STOP_WITHIN:.0f} s"
        )
        for process in self._running:
            process.stop()
        deadline = time.monotonic() + STOP_WITHIN
        for process in list(self._running):
            try:
                process.popen.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.popen.kill()
                process.popen.wait()
            self._look(process)
