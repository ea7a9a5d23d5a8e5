"""`b2ray run --sweep FILE`: read, check, run, compare."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray

from b2ray.config import Config
from b2ray.cost import plan_cost
from b2ray.errors import EXIT_DONE, EXIT_STOPPED, EXIT_WORKER, ConfigError
from b2ray.fleet import nodes
from b2ray.fleet.capacity import needs, preflight, samplers_each, side_by_side
from b2ray.fleet.nodes import Room
from b2ray.fleet.session import session
from b2ray.options import Words, in_job_copy
from b2ray.sweep.board import Board
from b2ray.sweep.compare import Outcome, State, comparison, table
from b2ray.sweep.folder import SweepFolder, open_sweep
from b2ray.sweep.parent import ParentRun
from b2ray.sweep.runner import Runner
from b2ray.sweep.trials import Plan, Trial, plan
from b2ray.tracking.folder import dump, write_atomically


def sweep(words: Words) -> int:
    """Run the command; returns the exit code of `b2ray.errors`.

    Raises:
        ConfigError: something is wrong; nothing was started.
    """
    found = plan(words)
    if words.print_config:
        for trial in found.trials:
            print(f"--- # {trial.name}\n{dump(trial.config)}", end="")
        return EXIT_DONE
    if in_job_copy():
        print(f"b2ray: this sweep is kept in {found.folder} on {platform.node()}", file=sys.stderr)
    with open_sweep(found) as folder:
        parent = ParentRun(found)
        status, result = "FAILED", None
        try:
            outcomes, stopped = _run(found, folder, parent)
            result = comparison(found, outcomes)
            write_atomically(folder.result, json.dumps(result, indent=2) + "\n")
            failed = any(o.state == State.FAILED for o in outcomes.values())
            status = "KILLED" if stopped else "FAILED" if failed else "FINISHED"
        finally:
            if result is not None:
                parent.finish(status, result)
    if words.json:
        print(json.dumps(result, indent=2))
    else:
        table(result)
        print(f"comparison {folder.result}")
    return _exit(outcomes, stopped)


def _exit(outcomes: Mapping[str, Outcome], stopped: str | None) -> int:
    """Say what is left to do; returns the exit code."""
    unfinished = [n for n, o in outcomes.items() if o.state in (State.STOPPED, State.WAITING)]
    if unfinished:
        by = f" by {stopped}" if stopped else ""
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
    found: Plan, folder: SweepFolder, parent: ParentRun
) -> tuple[dict[str, Outcome], str | None]:
    """All trials; how each stands then, and the signal that stopped the sweep, if one did."""
    stages = sum(t.config.curriculum.stages for t in found.trials)
    board = Board(found.sweep.name, len(found.trials), stages)
    try:
        runner = Runner(found, folder, board)
        if not runner.waiting:
            return runner.outcomes, None
        runs = sorted(runner.waiting, key=_size, reverse=True)
        parallel = found.sweep.parallel
        together = 1 if parallel == "auto" else min(parallel, len(runs))
        with session(runs[0].config, together) as stop:
            preflight(runs[0].config)
            room = share(parallel, [t.config for t in runs], nodes.staying(nodes.rooms()))
            board.line(_said(runner.waiting, room))
            run_id = parent.begin()
            configs = {t.name: _given(t.config, room.samplers, run_id) for t in runs}
            address = ray.get_runtime_context().gcs_address
            runner.run(configs, room.parallel, address, stop)
            return runner.outcomes, stop.signal
    finally:
        board.close()


@dataclass(frozen=True)
class Share:
    """How many runs go at a time, and the most samplers that each has; None: as it says."""

    parallel: int
    samplers: int | None


def share(parallel: int | str, configs: Sequence[Config], there: Sequence[Room]) -> Share:
    """Share the cluster out so that no run holds what another waits for.

    Args:
        parallel: how many are to go at a time, or `auto`.
        configs: of the trials, the one that asks for most first.

    Raises:
        ConfigError: there is no room for so many.
    """
    runs = [needs(c) for c in configs]
    count = side_by_side(runs, there) if parallel == "auto" else min(int(parallel), len(runs))
    if count <= 1:
        return Share(1, None)
    each = samplers_each(runs[:count], there)
    if each is None and configs[0].fleet.wait_for_nodes == 0:
        fits = next(n for n in range(count, 0, -1) if samplers_each(runs[:n], there))
        raise ConfigError(
            f"parallel is {parallel} but the cluster has room for {fits} of these runs at a time "
            f"(nodes: {'; '.join(map(str, there))}): lower it, or add nodes"
        )
    return Share(count, each or 1)


def _size(trial: Trial) -> tuple[float, float]:
    """What a run asks for at least: GPUs, then CPUs."""
    wanted = [(n.least * n.together, n) for n in needs(trial.config)]
    return sum(c * n.gpus for c, n in wanted), sum(c * n.cpus for c, n in wanted)


def _given(config: Config, samplers: int | None, parent: str | None) -> Config:
    """A trial's configuration as its process gets it. None of this changes the result."""
    tracking = config.tracking.model_copy(update={"parent": parent})
    fleet = config.fleet
    if samplers is not None:
        own = fleet.samplers
        most = samplers if own.max == "auto" else min(own.max, samplers)
        update = {"max": max(own.min, most)}
        fleet = fleet.model_copy(update={"samplers": own.model_copy(update=update)})
    return config.model_copy(update={"tracking": tracking, "fleet": fleet})


def _said(trials: Sequence[Trial], room: Share) -> str:
    costs = [plan_cost(t.config) for t in trials]
    queries, evals = (sum(getattr(c, k) for c in costs) for k in ("reward_queries", "unet_evals"))
    several = f", {room.parallel} at a time" if room.parallel > 1 else ""
    each = f" with at most {room.samplers} samplers each" if room.samplers else ""
    return (
        f"{len(trials)} trials to run{several}{each}: {queries:,} reward queries, at most "
        f"{evals:,} UNet evaluations from their beginnings"
    )
