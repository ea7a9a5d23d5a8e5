"""Running trials side by side, each in a process of its own, on one Ray."""

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
from b2ray.sweep.trials import Plan, Trial

LOOK_EVERY = 0.3  # seconds between looks at the processes
# Seconds that trials have to end in good order: less than what `ray job stop` gives a sweep on the
# clusters of cluster/. A run that is killed can be gone on with as well.
STOP_WITHIN = 45.0
# Seconds in which trials end whose sweep was killed: Ray's own patience, if it went along.
LEFT_OVER = 90.0


@dataclass
class Process:
    """A trial that runs.

    Attributes:
        size: bytes of its metrics.jsonl that were looked at.
        enough: whether it does too badly to go on.
        asked: whether it was asked to stop.
    """

    trial: Trial
    popen: subprocess.Popen[bytes]
    size: int = 0
    enough: bool = False
    asked: bool = False

    def stop(self) -> None:
        """Ask it to stop, as `b2ray.sweep.trial` understands it."""
        assert self.popen.stdin is not None
        self.asked = True
        self.popen.stdin.close()


class Runner:
    """Starts what is not finished, so many at a time, until all is settled or a signal comes.

    Attributes:
        outcomes: how each trial stands, by name.
        waiting: what is still to be run.
    """

    def __init__(self, plan: Plan, folder: SweepFolder, board: Board) -> None:
        self.plan, self.folder, self.board = plan, folder, board
        self.outcomes: dict[str, Outcome] = {}
        self.waiting: list[Trial] = []
        self._running: list[Process] = []
        self._halving = Halving(plan.sweep) if plan.sweep.stop_early else None
        self._settle_known()

    def run(
        self, configs: Mapping[str, Config], parallel: int, address: str, stop: StopFlag
    ) -> None:
        """All trials that wait.

        Args:
            configs: what each trial's process is given, by the trial's name.
            address: the Ray that all runs join.
        """
        until = time.monotonic() + LEFT_OVER
        try:
            while (self.waiting or self._running) and stop.signal is None:
                for trial in list(self.waiting):
                    # A process that a killed sweep has left is about to end.
                    left = time.monotonic() < until and busy(trial)
                    if len(self._running) < parallel and not left:
                        self.waiting.remove(trial)
                        self._start(trial, configs[trial.name], address)
                for process in list(self._running):
                    self._look(process)
                self.board.tick()
                time.sleep(LOOK_EVERY)
        finally:
            self._stop_all()

    def _settle_known(self) -> None:
        """What earlier calls of the command have left."""
        stopped = self.folder.stopped_early() if self._halving else {}
        for trial in self.plan.trials:
            stage = committed(trial)
            if self._halving:
                self._halving.told(trial.name, lines(trial))
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
                [sys.executable, "-m", "b2ray.sweep.trial", f"--config={file}"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "RAY_ADDRESS": address},
                process_group=0,  # Ctrl-C is for the sweep, which passes it on
            )
        self._running.append(Process(trial, popen))
        self.outcomes[trial.name] = Outcome(State.RUNNING)
        doing = f"goes on after stage {committed(trial)}" if trial.path.exists() else "starts"
        self.board.started(trial, doing)

    def _look(self, process: Process) -> None:
        """Take in what a trial has written, and its end."""
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
        trial, there = process.trial, lines(process.trial)
        for line in there:
            self.board.stage(trial, line, self.plan.sweep.metric)
        if self._halving and self._halving.told(trial.name, there) and not process.enough:
            stage = int(there[-1]["step"])
            if stage < trial.config.curriculum.stages:
                self.folder.stop_early(trial, stage)  # before it is asked: whatever happens then
                process.enough = True
                process.stop()

    def _end(self, process: Process, code: int) -> None:
        trial = process.trial
        if finished(trial) and code == EXIT_DONE:
            self._settle(trial, Outcome(State.FINISHED), "finished")
        elif process.enough:
            said = f"stopped early after {committed(trial)} stages"
            self._settle(trial, Outcome(State.STOPPED_EARLY), said)
        elif code == EXIT_STOPPED or process.asked:
            self._settle(trial, Outcome(State.STOPPED), "stopped; the last committed stage stands")
        else:
            failed = self._failure(trial, code)
            self._settle(trial, failed, f"failed: {failed.cause}")

    def _failure(self, trial: Trial, code: int) -> Outcome:
        """What a trial's process ended of."""
        log, trace = self.folder.log(trial), trial.path / "failure.log"
        if code == EXIT_WORKER and trace.exists():
            return Outcome(State.FAILED, trace.read_text("utf-8").splitlines()[0], str(trace))
        if code < 0:
            name = signal.Signals(-code).name
            return Outcome(State.FAILED, f"its process was ended by {name}", str(log))
        said = [x for x in log.read_text("utf-8", "replace").splitlines() if x.strip()]
        last = next((x for x in reversed(said) if x.startswith("b2ray: ")), (said or [""])[-1])
        cause = last.removeprefix("b2ray: ") or "it said nothing"
        return Outcome(State.FAILED, f"exit code {code}: {cause}", str(log))

    def _settle(self, trial: Trial, outcome: Outcome, how: str) -> None:
        self.outcomes[trial.name] = outcome
        if outcome.state in (State.FINISHED, State.STOPPED_EARLY):
            self.board.known(trial, trial.config.curriculum.stages)
        self.board.end(trial, how)

    def _stop_all(self) -> None:
        """Stop what runs, resumably; wait a bounded time."""
        if not self._running:
            return
        self.board.line(
            f"stopping {len(self._running)} trials, which takes at most {STOP_WITHIN:.0f} s"
        )
        for process in self._running:
            process.stop()
        until = time.monotonic() + STOP_WITHIN
        for process in list(self._running):
            try:
                process.popen.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.popen.kill()
                process.popen.wait()
            self._look(process)
