"""The command: `python -m b2ray.run --config FILE --section.field=value …`.

`Run.stage` is the algorithm in the paper's order (arXiv 2503.11240, algorithm 1): choose the
interval, draw groups, denoise each group's prefix, fork its branches, score the images, select and
weigh the leaves, update on the interval, hand the weights out, commit. With demonstrations their
trajectories stand in the place of scores (`Run.imitate`).
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from b2ray import report, spent
from b2ray.branching import WorkUnit, advantages, select, spread, work_units
from b2ray.checks import check_files
from b2ray.config import Config
from b2ray.crew import Crew
from b2ray.curriculum import adapted, interval
from b2ray.demonstrations import demonstration_units
from b2ray.errors import (
    EXIT_CONFIG,
    EXIT_DONE,
    EXIT_STOPPED,
    EXIT_WORKER,
    ConfigError,
    Stopped,
    WorkerError,
)
from b2ray.fleet.capacity import preflight
from b2ray.fleet.rollout import Rollout
from b2ray.fleet.session import StopFlag, session
from b2ray.options import in_job_copy, parse, read_words
from b2ray.prompts import PromptSets
from b2ray.tracking.folder import RunFolder, RunState, dump, open_run
from b2ray.tracking.mlflow_log import MlflowLog
from b2ray.tracking.recorder import Recorder
from b2ray.tracking.show import closing_table


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code of `b2ray.errors`."""
    try:
        argv = sys.argv[1:] if argv is None else argv
        if any(word.partition("=")[0] == "--sweep" for word in argv):
            from b2ray.sweep.command import sweep

            return sweep(read_words(argv))
        options = parse(argv)
        if options.print_config:
            print(dump(options.config), end="")
            return EXIT_DONE
        if in_job_copy():
            where = Path(options.config.runs) / options.config.name
            print(f"b2ray: this run is kept in {where} on {platform.node()}", file=sys.stderr)
        prompts = check_files(options.config)
        with open_run(options.config) as folder:
            return _run(options.config, prompts, folder)
    except ConfigError as error:
        print(f"b2ray: {error}", file=sys.stderr)
        return EXIT_CONFIG
    except OSError as error:  # a disk that is full, a folder that is read-only
        print(
            f"b2ray: {error.filename or 'the disk'} cannot be used: {error.strerror}; the last "
            "committed stage stands, make room and resume",
            file=sys.stderr,
        )
        return EXIT_CONFIG


def _run(config: Config, prompts: PromptSets, folder: RunFolder) -> int:
    log = MlflowLog(folder)
    if folder.finished:
        print(
            f"{folder.path} is finished; --name=NAME starts another run, or delete the folder "
            "to run it again",
            file=sys.stderr,
        )
        if not log.closed:  # its process died between the summary and MLflow's last figures
            report.try_to_write(folder.path, config)
            log.finish("FINISHED", report.verdict(folder.path, config))
        closing_table(folder.summary(), folder.path / report.FILE)
        return EXIT_DONE
    status = "FAILED"
    try:
        with session(config) as stop:
            preflight(config)
            summary = Run(config, prompts, folder, log, stop).train()
        status = "FINISHED"
    except Stopped as signal:
        status = "KILLED"
        print(
            f"b2ray: stopped by {signal}; the last committed stage stands. Go on with: "
            f"python -m b2ray.run --runs={config.runs} --name={config.name} --resume",
            file=sys.stderr,
        )
        return EXIT_STOPPED
    except WorkerError as error:
        trace = folder.path / "failure.log"
        trace.write_text(f"{error}\n\n{error.details}\n", encoding="utf-8")
        print(
            f"b2ray: {error}\nDetails: {trace}. The last committed stage stands; --resume goes on.",
            file=sys.stderr,
        )
        return EXIT_WORKER
    finally:
        if folder.metrics():
            report.try_to_write(folder.path, config)
        log.finish(status, report.verdict(folder.path, config))
    closing_table(summary, folder.path / report.FILE)
    return EXIT_DONE


@dataclass(frozen=True)
class Lesson:
    """What a stage's leaves teach.

    Attributes:
        selected: what is trained on: (prompt, advantage, (group, branch)).
        state: the stages before, with what this one has learnt of rewards and spreads.
        queries: pictures that were scored.
    """

    selected: list[tuple[str, float, tuple[int, int]]]
    state: RunState
    figures: dict[str, float]
    queries: int = 0


class Run:
    """One run: its state, its fleet, its records."""

    def __init__(
        self,
        config: Config,
        prompts: PromptSets,
        folder: RunFolder,
        log: MlflowLog,
        stop: StopFlag,
    ) -> None:
        self.config, self.prompts = config, prompts
        self.crew = Crew(config, prompts, stop)
        self.recorder = Recorder(config, prompts, folder, log)
        self.crew.roster.tell = self.recorder.fleet_event
        self.crew.dispatcher.heard = self.recorder.machine_readings

    def train(self) -> dict[str, Any]:
        """All stages that are not committed yet; returns the summary."""
        config, crew, recorder = self.config, self.crew, self.recorder
        try:
            state = recorder.resume(crew)
            if state is None:
                state = recorder.begin(crew)
            ahead = None
            while state.stage < config.curriculum.stages:
                state, ahead = self.stage(state, ahead)
            return recorder.finish(crew)
        finally:
            crew.close()
            recorder.close()

    def stage(self, state: RunState, ahead: Rollout | None) -> tuple[RunState, Rollout | None]:
        """One stage of B²-DiffuRL.

        Args:
            state: the stages before it.
            ahead: its rollout, if that was made beside the update of the stage before.

        Returns:
            The committed state, and the next stage's rollout if that was made already.
        """
        config, crew, recorder = self.config, self.crew, self.recorder
        crew.tracing.begin(state.stage + 1)

        # Branch-based sampling: prefixes, K branches each, and a score for every image.
        n, units = self.plan(state.stage, state.shares)
        leaves = sum(len(unit.groups) * unit.branches for unit in units)
        if ahead is None:
            with recorder.bar(f"stage {state.stage + 1}: sampling", leaves):
                ahead = crew.rollout(units, recorder.advance)
        rollout = ahead

        # Selection and advantages.
        sampled = time.perf_counter()
        lesson = (self.compare if config.rewards else self.imitate)(state, n, rollout)
        selecting = time.perf_counter() - sampled

        # The update on the interval, beside it the next stage's sampling if that may lag; the new
        # LoRA goes to every sampler.
        last = state.stage + 1 == config.curriculum.stages
        overlap = config.learner.max_lag and not last
        following = self.plan(state.stage + 1, lesson.state.shares)[1] if overlap else []
        learning = f"stage {state.stage + 1}: learning on {len(lesson.selected)} leaves"
        with recorder.bar(learning, leaves if following else 0):
            update, ahead = crew.update(
                state.stage, n, rollout, lesson.selected, following, recorder.advance
            )
        updated = time.perf_counter()
        crew.sync()
        figures = {
            **lesson.figures,
            **update.figures,
            **crew.prefix_figures(rollout),
            **crew.fleet_figures(config.groups * config.branching.branches / rollout.seconds),
            "interval": float(n),
            "time/sample": rollout.seconds,
            "time/select": selecting,
            "time/update": update.seconds,
            "time/sync": time.perf_counter() - updated,
            **spent.shares(rollout, update, config.learner.ranks),
            **spent.peaks(crew.dispatcher.peaks),
        }
        recorder.keep_traces(crew.tracing.end())
        costs = {
            "cost/reward_queries": float(lesson.queries),
            "cost/unet_evals": float(rollout.unet_evals + update.unet_evals),
            "cost/unet_backwards": update.figures["policy/rows"],
            "cost/trained_leaves": float(update.leaves),
            **spent.moved(rollout.moved, rollout.recorded, crew.newest),
        }
        return recorder.commit(crew, lesson.state, figures, costs), ahead

    def compare(self, state: RunState, n: int, rollout: Rollout) -> Lesson:
        """Leaves against the leaves of their own group."""
        config, crew = self.config, self.crew
        prompts = [group.prompt for unit in rollout.units for group in unit.groups]
        rewards, scores = crew.total_reward(rollout, state.scores)
        window = state.window.with_stage(prompts, rewards)
        advantage = advantages(rewards, prompts, window, config.advantage)
        chosen = select(rewards, advantage, config.selection)
        self.recorder.keep_trees(state.stage + 1, n, rollout, rewards, advantage, chosen)
        selected = [
            (prompts[g], float(advantage[g, k]), (g, k)) for g, k in np.argwhere(chosen).tolist()
        ]
        spreads = spread(rewards, chosen, window)
        share = spreads.get("branch/within_share")
        shares = state.shares if share is None else [*state.shares, (n, share)]
        learnt = replace(state, window=window, scores=scores, shares=shares)
        figures = {**spreads, **crew.reward_figures(rollout, rewards)}
        return Lesson(selected, learnt, figures, rewards.size)

    def imitate(self, state: RunState, n: int, rollout: Rollout) -> Lesson:
        """Reward 1 for demonstrations and 0 for the policy's own (SQIL, arXiv 1905.11108).

        Half and half, their mean and their spread are 1/2, so that the advantages are 1 and -1.
        Each of the policy's own trajectories is followed by a demonstration.
        """
        prompts = [group.prompt for unit in rollout.units for group in unit.groups]
        own = self.config.groups
        pairs = [((g, -1.0), (own + g, 1.0)) for g in range(own)]
        selected = [(prompts[g], advantage, (g, 0)) for pair in pairs for g, advantage in pair]
        apart = [rollout.apart[leaf] for leaf in sorted(rollout.apart)]
        return Lesson(selected, state, {"demonstrations/kl": float(np.mean(apart))})

    def plan(self, stage: int, shares: Sequence[tuple[int, float]]) -> tuple[int, list[WorkUnit]]:
        """Backward progressive training: a stage trains the last n of T steps; its work units.

        Those of demonstrations come last.

        Args:
            stage: its number.
            shares: (n, the branches' share of the variance) of the stages before it.
        """
        config, curriculum = self.config, self.config.curriculum
        bounds = config.interval_bounds
        if curriculum.extend == "spread":
            n = adapted(shares, *bounds, curriculum.min_share, curriculum.patience)
        else:
            n = interval(stage, curriculum.stages, *bounds, curriculum.growth)
        # Every stage makes one version; a stage that lags is sampled from the one before.
        version = max(0, stage - config.learner.max_lag)
        groups = self.crew.prefixes.pool.groups(stage)
        units = work_units(config, groups, stage, version, n)
        shown = self.prompts.demonstrations
        if shown:
            units += demonstration_units(config, shown, stage, version, n, first=len(units))
        return n, units


if __name__ == "__main__":
    sys.exit(main())
