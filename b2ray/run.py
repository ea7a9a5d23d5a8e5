"""The command `python -m b2ray.run --config FILE --section.field=value …`, and the algorithm.

`Run.train` and `Run.stage` read in the order of the paper (arXiv 2503.11240, algorithm 1): choose
the interval, draw groups, denoise each group's prefix, fork its branches, score the pictures,
select and weigh the leaves, update on the interval, publish the new weights, commit; evaluate every
few stages. With demonstrations their trajectories take the place of scores (`Run.imitate`).

Where the parts are:

- `algorithm`: intervals, groups and work units, advantages, selection, replay, costs. Only numpy.
- `diffusion`: a pipeline as a policy: stochastic steps, their densities, LoRA, pictures.
- `objectives`: the learner's update: PPO and the other losses, gradients, ranks.
- `rewards`: one file per reward. `prompts`: prompt sets and folders of demonstrations.
- `actors`: what runs in Ray processes: sampler, scorer, learner, and what they answer.
- `fleet`: slots, calls and nodes: starts actors, hands out calls, replaces what is lost.
- `rollout`: the algorithm on the fleet: `Workers`, `PolicyVersions`, `StageRunner`.
- `evaluation`: scores on fixed seeds, and comparisons with confidence intervals.
- `tracking`: the run's folder, commits, figures, MLflow. `report`: the run's page.
- `config`: every field, and how files, presets and the command line become a configuration.
- `commands`, `sweep`: the other commands, and many runs side by side.
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

from b2ray import report
from b2ray.algorithm.branching import (
    SelectedLeaf,
    WorkUnit,
    advantages,
    select,
    spread,
    stage_groups,
    work_units,
)
from b2ray.algorithm.cost import plan_cost
from b2ray.algorithm.curriculum import adapted, interval
from b2ray.algorithm.demonstrations import demonstration_units
from b2ray.cli import guarded
from b2ray.config import Config
from b2ray.config.load import Options, parse, read_words
from b2ray.config.paths import in_job_copy
from b2ray.errors import EXIT_DONE, Stopped, WorkerError
from b2ray.evaluation.evaluate import evaluate
from b2ray.fleet.session import StopFlag, stop_with_stdin
from b2ray.preflight import check_files
from b2ray.prompts import PromptSets
from b2ray.prompts.demonstrations import too_small
from b2ray.rewards.combine import Statistics
from b2ray.rollout.roles import refuse_small_cluster, run_session
from b2ray.rollout.rollout import RolloutPlan
from b2ray.rollout.stage import StageRunner
from b2ray.rollout.stage_costs import counters, stage_figures
from b2ray.rollout.versions import PolicyVersions
from b2ray.rollout.workers import Workers
from b2ray.tracking.branch_trees import trees_of
from b2ray.tracking.folder import RunFolder, RunState, dump, open_run
from b2ray.tracking.mlflow.log import MlflowLog
from b2ray.tracking.recorder import EvaluationRecord, Recorder
from b2ray.tracking.show import closing_table

STANDS = "The last committed stage stands"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code of `b2ray.errors`."""
    words = sys.argv[1:] if argv is None else argv
    return guarded(lambda: _command(words))


def _command(argv: Sequence[str]) -> int:
    if any(word.partition("=")[0] == "--sweep" for word in argv):
        from b2ray.sweep.command import sweep

        return sweep(read_words(argv))
    options = parse(argv)
    if options.print_config:
        print(dump(options.config), end="")
        return EXIT_DONE
    if options.stop_with_stdin:
        stop_with_stdin()
    if in_job_copy():
        where = Path(options.config.runs) / options.config.name
        print(f"b2ray: this run is kept in {where} on {platform.node()}", file=sys.stderr)
    return _run(options)


def _run(options: Options) -> int:
    config = options.config
    prompts = check_files(config)
    with open_run(config) as folder:
        try:
            log = MlflowLog(folder)
            if folder.finished:
                return _show_finished(config, folder, log)
            summary = _train(config, prompts, folder, log)
        except OSError as error:
            error.add_note(f"{STANDS}; make room and resume.")
            raise
    closing_table(summary, folder.path / report.FILE)
    return EXIT_DONE


def _show_finished(config: Config, folder: RunFolder, log: MlflowLog) -> int:
    print(
        f"{folder.path} is finished; --name=NAME starts another run, or delete the folder to run "
        "it again",
        file=sys.stderr,
    )
    if not log.closed:  # its process died between the summary and MLflow's last figures
        report.try_to_write(folder.path, config)
        log.finish("FINISHED", report.verdict(folder.path, config))
    closing_table(folder.summary(), folder.path / report.FILE)
    return EXIT_DONE


def _train(
    config: Config, prompts: PromptSets, folder: RunFolder, log: MlflowLog
) -> dict[str, Any]:
    """All stages that are left, on Ray; whatever happens, the page and MLflow hear of it."""
    status = "FAILED"
    try:
        with run_session(config) as stop:
            refuse_small_cluster(config)
            summary = Run(config, prompts, folder, log, stop).train()
        status = "FINISHED"
    except Stopped as error:
        status = "KILLED"
        error.add_note(
            f"{STANDS}. Go on with: python -m b2ray.run --runs={config.runs} "
            f"--name={config.name} --resume"
        )
        raise
    except WorkerError as error:
        trace = folder.path / "failure.log"
        trace.write_text(f"{error}\n\n{error.details}\n", encoding="utf-8")
        error.add_note(f"Details: {trace}. {STANDS}; --resume goes on.")
        raise
    finally:
        if folder.metrics():
            report.try_to_write(folder.path, config)
        log.finish(status, report.verdict(folder.path, config))
    return summary


@dataclass(frozen=True)
class TrainingBatch:
    """What a stage trains on.

    Attributes:
        leaves: in the order in which they are trained on.
        state: that of the stages before, with this one's rewards and spreads.
        figures: of the selection, by the names of metrics.jsonl.
        queries: pictures that were scored.
    """

    leaves: list[SelectedLeaf]
    state: RunState
    figures: dict[str, float]
    queries: int = 0


class Run:
    """One run: its workers, its policy versions, its records."""

    def __init__(
        self,
        config: Config,
        prompts: PromptSets,
        folder: RunFolder,
        log: MlflowLog,
        stop: StopFlag,
    ) -> None:
        self.config, self.prompts = config, prompts
        self.recorder = recorder = Recorder(config, prompts, folder, log)
        self.workers = Workers(
            config,
            prompts,
            stop,
            on_event=recorder.fleet_event,
            on_readings=recorder.machine_readings,
        )
        self.versions = PolicyVersions(self.workers, config.learner.max_lag)
        self.runner = StageRunner(config, self.workers, self.versions)

    def train(self) -> dict[str, Any]:
        """All stages that are not committed yet; returns the summary."""
        recorder = self.recorder
        try:
            state = self.start()
            ahead = None
            while state.stage < self.config.curriculum.stages:
                state, ahead = self.stage(state, ahead)
            return recorder.finish(self.versions.arrays[0])
        finally:
            self.workers.close()
            recorder.close()

    def start(self) -> RunState:
        """The last committed state, its weights bound everywhere; or version 0 of a new run."""
        recorder, checkpoint = self.recorder, self.recorder.last_commit()
        if checkpoint is None:
            cost = plan_cost(self.config)
            recorder.line(
                f"this run: {cost.reward_queries:,} reward queries, at most {cost.unet_evals:,} "
                f"UNet evaluations, {cost.bytes_per_stage / 2**20:,.0f} MiB of objects a stage; "
                "`b2ray check` says more"
            )
        with recorder.bar("loading models", 0):
            if checkpoint is None:
                self.versions.start()
            else:
                self.runner.restore_replay(checkpoint.replay)
                version, bound = checkpoint.state.version, checkpoint.state.digest
                weights, optimizer = checkpoint.weights, checkpoint.optimizer
                self.versions.restore(version, bound, weights, optimizer, checkpoint.before)
        self._warn_of_prompts_and_pictures()
        recorder.begin_stages()
        return self.commit(recorder.state, {}) if checkpoint is None else checkpoint.state

    def stage(
        self, state: RunState, ahead: RolloutPlan | None
    ) -> tuple[RunState, RolloutPlan | None]:
        """One stage of B²-DiffuRL.

        Args:
            state: that of the stages before it.
            ahead: its rollout, if that was made beside the update of the stage before.

        Returns:
            The committed state, and the next stage's rollout if that was made already.
        """
        config, recorder, workers = self.config, self.recorder, self.workers
        number = state.stage + 1
        workers.tracing.begin(number)

        # Backward progressive training: the interval. Branch-based sampling: prefixes, K branches
        # each, and a score for every picture.
        n, units = self.plan(state.stage, state.shares)
        leaves = sum(len(unit.groups) * unit.branches for unit in units)
        rollout = ahead
        if rollout is None:
            with recorder.bar(f"stage {number}: sampling", leaves) as advance:
                rollout = self.runner.roll_out(units, advance)

        # Selection and advantages.
        sampled = time.perf_counter()
        batch = (self.compare if config.rewards else self.imitate)(state, n, rollout)
        selecting = time.perf_counter() - sampled

        # The update on the interval; beside it the next stage is sampled, if that may lag.
        last = number == config.curriculum.stages
        overlap = config.learner.max_lag and not last
        next_units = self.plan(number, batch.state.shares)[1] if overlap else []
        learning = f"stage {number}: learning on {len(batch.leaves)} leaves"
        with recorder.bar(learning, leaves if next_units else 0) as advance:
            update, ahead = self.runner.update(
                state.stage, n, rollout, batch.leaves, next_units, advance
            )

        # The new LoRA goes to every sampler, and the stage commits.
        updated = time.perf_counter()
        self.versions.publish()
        figures = {
            **batch.figures,
            **update.figures,
            "interval": float(n),
            "time/select": selecting,
            "time/sync": time.perf_counter() - updated,
            **stage_figures(config, workers, rollout, update),
        }
        recorder.keep_traces(workers.tracing.end())
        costs = counters(batch.queries, rollout, update, self.versions.arrays)
        return self.commit(batch.state.after_stage(costs), figures), ahead

    def plan(self, stage: int, shares: Sequence[tuple[int, float]]) -> tuple[int, list[WorkUnit]]:
        """A stage's interval n, of which it trains the last n of T steps, and its work units.

        Units of demonstrations come last.

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
        groups = stage_groups(config, self.prompts.train, stage)
        units = work_units(config, groups, stage, version, n)
        demonstrations = self.prompts.demonstrations
        if demonstrations:
            units += demonstration_units(
                config, demonstrations, stage, version, n, first=len(units)
            )
        return n, units

    def compare(self, state: RunState, n: int, rollout: RolloutPlan) -> TrainingBatch:
        """Leaves against the leaves of their own group: rewards, advantages, selection."""
        config = self.config
        prompts = [group.prompt for unit in rollout.units for group in unit.groups]
        rewards = self.runner.rewards(rollout, state.scores)
        window = state.window.with_stage(prompts, rewards.total)
        advantage = advantages(rewards.total, prompts, window, config.advantage)
        chosen = select(rewards.total, advantage, config.selection)
        trees = trees_of(prompts, n, rollout.thumbnails, rewards, advantage, chosen)
        self.recorder.keep_trees(state.stage + 1, trees)

        leaves = [
            SelectedLeaf(prompts[g], float(advantage[g, k]), g, k)
            for g, k in np.argwhere(chosen).tolist()
        ]
        spreads = spread(rewards.total, chosen, window)
        share = spreads.get("branch/within_share")
        shares = state.shares if share is None else [*state.shares, (n, share)]
        learnt = replace(state, window=window, scores=rewards.window, shares=shares)
        return TrainingBatch(leaves, learnt, {**spreads, **rewards.figures()}, rewards.total.size)

    def imitate(self, state: RunState, n: int, rollout: RolloutPlan) -> TrainingBatch:
        """Reward 1 for demonstrations and 0 for the policy's own (SQIL, arXiv 1905.11108).

        Half and half, their mean and their spread are 1/2, so that the advantages are 1 and -1.
        Each of the policy's own trajectories is followed by a demonstration.
        """
        prompts = [group.prompt for unit in rollout.units for group in unit.groups]
        own = self.config.groups
        pairs = [((g, -1.0), (own + g, 1.0)) for g in range(own)]
        leaves = [SelectedLeaf(prompts[g], a, g, 0) for pair in pairs for g, a in pair]
        divergence = float(np.mean([rollout.divergences[k] for k in sorted(rollout.divergences)]))
        return TrainingBatch(leaves, state, {"demonstrations/kl": divergence})

    def commit(self, state: RunState, figures: dict[str, float]) -> RunState:
        """Make a stage final; it is evaluated first where the calendar says so."""
        evaluation = None
        if self.is_evaluated(state.stage):
            began = time.perf_counter()
            state, evaluation = self.evaluate(state)
            figures = {**figures, "time/evaluate": time.perf_counter() - began}
        newest = self.versions.newest
        state = replace(state, version=newest.version, digest=newest.digest)
        state = self.recorder.commit(
            state, figures, evaluation, *self.versions.arrays, self.runner.replay_arrays()
        )
        self.workers.gauges.stage(state.stage, figures)
        return state

    def is_evaluated(self, stage: int) -> bool:
        """Whether it is evaluated after a stage: before the first, every few, and at the end."""
        every = self.config.evaluation.every
        return self.is_compared(stage) or (every > 0 and stage % every == 0)

    def is_compared(self, stage: int) -> bool:
        """Whether it is one of the two evaluations that the summary compares."""
        return stage in (0, self.config.curriculum.stages)

    def evaluate(self, state: RunState) -> tuple[RunState, EvaluationRecord]:
        """Evaluate the newest policy version on the training prompts.

        Before the first stage and at the end also on held-out prompts, and on more pictures.
        """
        config, whole = self.config.evaluation, self.is_compared(state.stage)
        count = max(config.final_images, config.images) if whole else config.images
        reference: Statistics | None = state.reference if state.evaluations else None
        evaluations, workers, versions = {}, self.workers, self.versions
        for which, (name, prompts) in enumerate(self.prompts.evaluated().items()):
            if not whole and name != "train":
                continue
            doing = f"evaluating {count} pictures of the {name} set"
            with self.recorder.bar(doing, count) as advance:
                evaluations[name] = evaluate(
                    workers, versions, prompts, which, count, reference, advance
                )
            reference = evaluations[name].reference
        record = self.recorder.keep_evaluation(state.stage, evaluations, whole)
        entries = [*state.evaluations, dict(record.entry)]
        return replace(state, reference=dict(reference or {}), evaluations=entries), record

    def _warn_of_prompts_and_pictures(self) -> None:
        """Say which prompts the tokenizer cuts off, and which demonstrations are enlarged."""
        sampler, demonstrations = self.workers.sampler, self.prompts.demonstrations
        for prompt in sampler.too_long:
            self.recorder.line(f"the tokenizer cuts off the end of the prompt {prompt!r}")
        small = too_small(demonstrations, sampler.picture_size) if demonstrations else None
        if small:
            self.recorder.line(small)


if __name__ == "__main__":
    sys.exit(main())
