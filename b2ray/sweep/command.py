"""`b2ray run --sweep FILE`: reads and checks a sweep, runs its trials and compares them."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray

from b2ray.algorithm.cost import plan_cost
from b2ray.config import Config
from b2ray.config.load import Words
from b2ray.config.paths import in_job_copy
from b2ray.errors import EXIT_DONE, EXIT_STOPPED, EXIT_WORKER, ConfigError
from b2ray.fleet import nodes
from b2ray.fleet.capacity import most_of_each, side_by_side
from b2ray.fleet.nodes import NodeResources
from b2ray.rollout.roles import refuse_small_cluster, resource_requests, run_session
from b2ray.sweep.board import Board
from b2ray.sweep.compare import Outcome, State, comparison, table
from b2ray.sweep.folder import SweepFolder, open_sweep
from b2ray.sweep.parent import ParentRun
from b2ray.sweep.runner import Runner
from b2ray.sweep.trials import SweepPlan, Trial, plan
from b2ray.tracking.folder import dump, write_atomically


def sweep(words: Words) -> int:
    """Run a sweep, or go on with it.

    Args:
        words: the command line.

    Returns:
        The exit code, one of `b2ray.errors`.

    Raises:
        ConfigError: the sweep is wrong; no trial was started.
    """
    sweep_plan = plan(words)
    if words.print_config:
        for trial in sweep_plan.trials:
            print(f"--- # {trial.name}\n{dump(trial.config)}", end="")
        return EXIT_DONE
    if in_job_copy():
        print(
            f"b2ray: this sweep is kept in {sweep_plan.folder} on {platform.node()}",
            file=sys.stderr,
        )
    with open_sweep(sweep_plan) as folder:
        parent = ParentRun(sweep_plan)
        status, result = "FAILED", None
        try:
            outcomes, signal_name = _run(sweep_plan, folder, parent)
            result = comparison(sweep_plan, outcomes)
            write_atomically(folder.result, json.dumps(result, indent=2) + "\n")
            failed = any(o.state == State.FAILED for o in outcomes.values())
            status = "KILLED" if signal_name else "FAILED" if failed else "FINISHED"
        finally:
            if result is not None:
                parent.finish(status, result)
    if words.json:
        print(json.dumps(result, indent=2))
    else:
        table(result)
        print(f"comparison {folder.result}")
    return _exit(outcomes, signal_name)


def _exit(outcomes: Mapping[str, Outcome], signal_name: str | None) -> int:
    """Print which trials are not done, and return the exit code."""
    unfinished = [n for n, o in outcomes.items() if o.state in (State.STOPPED, State.WAITING)]
    if unfinished:
        by = f" by {signal_name}" if signal_name else ""
        print(
            f"b2ray: stopped{by} with {len(unfinished)} of {len(outcomes)} trials to go; the same "
            "command goes on where they are",
            file=sys.stderr,
        )
        return EXIT_STOPPED
    failed = {n: o for n, o in outcomes.items() if o.state == State.FAILED}
    for name, outcome in failed.items():
        print(f"b2ray: trial {name} failed: {outcome.cause} ({outcome.log})", file=sys.stderr)
    if failed:
        print("b2ray: the same command tries again what has failed", file=sys.stderr)
    return EXIT_WORKER if failed else EXIT_DONE


def _run(
    sweep_plan: SweepPlan, folder: SweepFolder, parent: ParentRun
) -> tuple[dict[str, Outcome], str | None]:
    """Run all trials that are not done.

    Returns:
        The outcome of every trial by its name, and the name of the signal that stopped the sweep,
        if there was one.
    """
    stages = sum(t.config.curriculum.stages for t in sweep_plan.trials)
    board = Board(sweep_plan.sweep.name, len(sweep_plan.trials), stages)
    try:
        runner = Runner(sweep_plan, folder, board)
        if not runner.waiting:
            return runner.outcomes, None
        # The largest run comes first, because the cluster must hold it in any case.
        runs = sorted(runner.waiting, key=_size, reverse=True)
        parallel = sweep_plan.sweep.parallel
        at_once = 1 if parallel == "auto" else min(parallel, len(runs))
        with run_session(runs[0].config, at_once) as stop:
            # Share the cluster out.
            refuse_small_cluster(runs[0].config)
            cluster_share = share(
                parallel, [t.config for t in runs], nodes.staying(nodes.resources())
            )
            board.line(_announcement(runner.waiting, cluster_share))

            # Run the trials, each in its own process, on the Ray of this session.
            run_id = parent.begin()
            configs = {
                t.name: _trial_config(t.config, cluster_share.samplers, run_id) for t in runs
            }
            address = ray.get_runtime_context().gcs_address
            runner.run(configs, cluster_share.parallel, address, stop)
            return runner.outcomes, stop.signal
    finally:
        board.close()


@dataclass(frozen=True)
class Share:
    """How a sweep's runs share the cluster.

    Attributes:
        parallel: how many runs go on at the same time.
        samplers: the most samplers that a run has; None leaves it to the run's configuration.
    """

    parallel: int
    samplers: int | None


def share(
    parallel: int | str, configs: Sequence[Config], cluster: Sequence[NodeResources]
) -> Share:
    """Share the cluster out, so that no run holds resources that another one waits for.

    Args:
        parallel: how many runs are to go on at the same time, or `auto`.
        configs: the configurations of the trials, beginning with that which needs most.
        cluster: the resources of the nodes.

    Raises:
        ConfigError: the cluster is too small for so many runs.
    """
    runs = [resource_requests(c) for c in configs]
    count = side_by_side(runs, cluster) if parallel == "auto" else min(int(parallel), len(runs))
    if count <= 1:
        return Share(1, None)
    samplers = most_of_each("sampler", runs[:count], cluster)
    if samplers is None and configs[0].fleet.wait_for_nodes == 0:
        fits = next(n for n in range(count, 0, -1) if most_of_each("sampler", runs[:n], cluster))
        raise ConfigError(
            f"parallel is {parallel} but the cluster has room for {fits} of these runs at a time "
            f"(nodes: {'; '.join(map(str, cluster))}): lower it, or add nodes"
        )
    return Share(count, samplers or 1)


def _size(trial: Trial) -> tuple[float, float]:
    """Return the (GPUs, CPUs) that a run needs at least."""
    requests = [(n.least * n.together, n) for n in resource_requests(trial.config)]
    return sum(c * n.gpus for c, n in requests), sum(c * n.cpus for c, n in requests)


def _trial_config(config: Config, samplers: int | None, parent: str | None) -> Config:
    """Return the configuration that a trial's process gets; the changes do not affect its result.

    Args:
        config: the trial's configuration.
        samplers: the most samplers that it may have; None changes nothing.
        parent: the id of the sweep's run in MLflow.
    """
    tracking = config.tracking.model_copy(update={"parent": parent})
    fleet = config.fleet
    if samplers is not None:
        settings = fleet.samplers
        most = samplers if settings.max == "auto" else min(settings.max, samplers)
        update = {"max": max(settings.min, most)}
        fleet = fleet.model_copy(update={"samplers": settings.model_copy(update=update)})
    return config.model_copy(update={"tracking": tracking, "fleet": fleet})


def _announcement(trials: Sequence[Trial], cluster_share: Share) -> str:
    costs = [plan_cost(t.config) for t in trials]
    queries, evals = (sum(getattr(c, k) for c in costs) for k in ("reward_queries", "unet_evals"))
    parallel = f", {cluster_share.parallel} at a time" if cluster_share.parallel > 1 else ""
    samplers = (
        f" with at most {cluster_share.samplers} samplers each" if cluster_share.samplers else ""
    )
    return (
        f"{len(trials)} trials to run{parallel}{samplers}: {queries:,} reward queries, at most "
        f"{evals:,} UNet evaluations from their beginnings"
    )
