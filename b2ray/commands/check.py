"""`b2ray check`: finds within minutes what would otherwise go wrong after hours.

The run's own actors load the models and process one work unit: prefixes, branches, every reward,
log-densities in the learner, and a gradient. Nothing is written, except the plot of --variance,
which shows where to start the interval.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from b2ray.actors.messages import Memory
from b2ray.algorithm.branching import stage_groups, work_units
from b2ray.algorithm.cost import Cost, plan_cost
from b2ray.algorithm.demonstrations import demonstration_units
from b2ray.commands import calls
from b2ray.commands.common import CommandParser, add_json, configuration, execute
from b2ray.commands.variance import advice, measure, picture, weights
from b2ray.config import Config
from b2ray.config.paths import QUICKSTART
from b2ray.errors import EXIT_CONFIG, EXIT_DONE, ConfigError, WorkerError
from b2ray.preflight import check_files
from b2ray.prompts import PromptSets
from b2ray.prompts.demonstrations import too_small
from b2ray.rollout.roles import refuse_small_cluster, run_session
from b2ray.rollout.stage import StageRunner
from b2ray.rollout.versions import PolicyVersions
from b2ray.rollout.workers import Workers
from b2ray.tracking.show import Progress

FULL = 0.95  # share of a device's memory beyond which a larger picture or prompt may not fit
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """A line of the table.

    Attributes:
        what: what was tried.
        found: the result.
        sound: whether the result is good; None if the line is only for information.
    """

    what: str
    found: str
    sound: bool | None = None


def main(argv: Sequence[str]) -> int:
    """Run the command; return 0 if the configuration can be run, 2 if not."""
    return execute(
        make_parser(), check, argv, lambda result: EXIT_DONE if result["sound"] else EXIT_CONFIG
    )


def check(args: argparse.Namespace) -> dict[str, Any]:
    """Try the configuration, print the table, and return what --json prints.

    Raises:
        Stopped: a signal has come.
    """
    findings: list[Finding] = []
    try:
        for finding in look(args):
            findings.append(finding)
    except (ConfigError, WorkerError) as error:
        findings.append(Finding("stopped at", str(error), False))
    _show(findings)
    return {"sound": _are_sound(findings), "findings": [asdict(f) for f in findings]}


def look(args: argparse.Namespace) -> Iterator[Finding]:
    """Try the configuration, and yield each line of the table when it is known.

    Raises:
        ConfigError: the configuration or an option is wrong.
        WorkerError: an actor has failed.
        Stopped: a signal has come.
    """
    variance = args.variance
    config = configuration(args)
    if variance and not Path(variance).absolute().parent.is_dir():
        raise ConfigError(f"--variance={variance}: there is no such folder; make it first")
    if variance and not config.rewards:
        raise ConfigError(
            "--variance measures how a reward spreads, and with demonstrations there is none: "
            "leave it out"
        )
    prompts = check_files(config)
    yield from _costs(plan_cost(config))
    with run_session(config) as stop:
        refuse_small_cluster(config)
        workers = Workers(config, prompts, stop)
        versions = PolicyVersions(workers, config.learner.max_lag)
        runner = StageRunner(config, workers, versions)
        try:
            yield from dry_run(config, prompts, runner)
            if args.calls:
                yield from _calls(config, workers)
            if variance:
                yield from _variance(config, prompts, runner, Path(variance))
        finally:
            workers.close()


def _calls(config: Config, workers: Workers) -> Iterator[Finding]:
    for sizes in calls.measure(config, workers):
        fit = sizes.fit
        advised = (
            f"{fit} fits this hardware" if fit else "there is no room for a call of one latent"
        )
        text = (
            f"{advised}, it is {sizes.given}; milliseconds a latent by the size of a call: {sizes}"
        )
        yield Finding(sizes.field, text, None if fit else False)


def _variance(
    config: Config, prompts: PromptSets, runner: StageRunner, file: Path
) -> Iterator[Finding]:
    spreads = list(measure(config, prompts.train.texts, runner))
    for s in spreads:
        text = f"std {s.within**0.5:.3g} within a prefix, {s.prefix**0.5:.3g} between a prompt's"
        text += f" prefixes: the branches have {s.share:.0%} ({s.low:.0%} … {s.high:.0%})"
        yield Finding(f"interval {s.interval}", text)
    picture(spreads, file)
    steps = config.sampling.steps
    yield Finding("variance", f"{advice(spreads, steps)}; picture: {file}")
    numbers = ", ".join(f"{w:g}" for w in weights(spreads, steps))
    text = f"by share of the variance, objective: {{step_weights: [{numbers}]}}"
    yield Finding("step weights", text)


def dry_run(config: Config, prompts: PromptSets, runner: StageRunner) -> Iterator[Finding]:
    """Load all models, and process the first work unit of a stage with every actor.

    Args:
        config: the run's configuration.
        prompts: the run's prompt sets.
        runner: carries the work unit out.

    Yields:
        The lines about the weights, prompts, rewards, ratios and memory.
    """
    progress, workers, versions = Progress(0, 0), runner.workers, runner.versions
    try:
        # Load the models, and prove by digest that all actors have the same weights.
        with progress.bar("loading models", 0, ""):
            versions.start()
            workers.wait_for_all()
        count = sum(len(workers.roster.ready(role)) for role in ("learner", "sampler"))
        weights = f"digest {versions.newest.digest[:8]} on all {count} policies"
        yield Finding("weights", weights, True)

        # Look at the prompts and the demonstrations.
        too_long = set(workers.sampler.too_long)
        if too_long:
            first = f"; the first: {min(too_long)!r}"
            yield Finding("prompts", f"{len(too_long)} are cut off by the tokenizer{first}", None)
        n = config.interval_bounds[1]
        units = work_units(config, stage_groups(config, prompts.train, 0), 0, 0, n)[:1]
        if prompts.demonstrations:
            units += demonstration_units(config, prompts.demonstrations, 0, 0, n, first=1)[:1]
            small = too_small(prompts.demonstrations, workers.sampler.picture_size)
            pictures = f"{len(prompts.demonstrations)} pictures with captions"
            yield Finding("demonstrations", small or pictures, None if small else True)

        # Sample, score and learn.
        with progress.bar("taking a work unit through all actors", 0, ""):
            scores, drift = runner.dry_run(units, n)
        yield from _rewards(config, scores)
        yield _drift(config, drift, workers.learner.elements)
        yield from _memory(workers.memory())
    finally:
        progress.close()


def _costs(cost: Cost) -> Iterator[Finding]:
    evals = cost.unet_evals_sampling + cost.unet_evals_learning
    yield Finding("reward queries", f"{cost.reward_queries:,}")
    yield Finding(
        "UNet evaluations",
        f"{evals:,} at most ({cost.unet_evals_sampling:,} sampling, "
        f"{cost.unet_evals_learning:,} learning), {cost.unet_evals_evaluation:,} evaluating",
    )
    yield Finding("object store", f"{cost.bytes_per_stage / GIB:.2f} GiB for the largest stage")


def _rewards(config: Config, scores: dict[str, np.ndarray]) -> Iterator[Finding]:
    """Yield the range of every reward; scores that are not finite have raised an error before."""
    for reward in config.all_rewards:
        table = scores[reward.name]
        trained = reward in config.rewards
        constant = table.size > 1 and float(np.ptp(table)) == 0
        text = f"{table.min():.4g} … {table.max():.4g} on {table.size} pictures"
        if constant:
            text += ": the same of every picture, it cannot be trained on"
        elif config.branching.branches > 1:
            text += f"; std {table.std(axis=1).mean():.3g} within a group"
        kind = "reward" if trained else "held out"
        yield Finding(f"{kind} {reward.name}", text, not (constant and trained))


def _drift(config: Config, drift: Mapping[int, float], elements: int) -> Finding:
    """Compare the ratios before any update with 1, from which only rounding lets them differ.

    Args:
        config: the run's configuration.
        drift: the mean |ratio - 1| by denoising step.
        elements: the number of elements of a latent, by which the objective divides.
    """
    if not drift:
        return Finding("ratio", "no step of the interval is wide enough to train", False)
    clip = config.objective.clip_nats / elements
    allowed = config.learner.max_ratio_drift * clip
    step, worst = max(drift.items(), key=lambda item: item[1])
    mean = sum(drift.values()) / len(drift)
    text = (
        f"mean |ratio − 1| {mean:.1e} before an update (step {step}: {worst:.1e}), "
        f"{mean / clip:.1%} of the clip range {clip:.1e}"
    )
    if config.learner.recompute_log_probs:
        return Finding("ratio", f"{text}; recomputed in the learner", True)
    if mean > allowed:
        text += "; more than learner.max_ratio_drift: set learner.recompute_log_probs=true"
    return Finding("ratio", text, mean <= allowed)


def _memory(memories: Mapping[str, Memory]) -> Iterator[Finding]:
    for slot, memory in memories.items():
        yield Finding(f"memory, {slot}", f"{memory.peak / GIB:.2f} GiB at most, {memory.device}")
    for device in dict.fromkeys(m.device for m in memories.values()):
        users = [m for m in memories.values() if m.device == device]
        peak, total = sum(m.peak for m in users), users[0].total
        fits = peak <= FULL * total
        text = f"{peak / GIB:.1f} of {total / GIB:.1f} GiB for all actors together"
        if not fits:
            text += (
                ": lower branching.branch_batch or learner.microbatch, or set model.offload, "
                "model.vae_slicing or model.gradient_checkpointing"
            )
        yield Finding(device, text, fits)


def _are_sound(findings: Sequence[Finding]) -> bool:
    return all(f.sound is not False for f in findings)


def _show(findings: Sequence[Finding]) -> None:
    # The last column is folded and not cut off, because users copy values from it.
    last = Column(overflow="fold")
    table = Table("", "", last, show_header=False, box=None, padding=(0, 2, 0, 0))
    signs = {True: "[green]✓[/]", False: "[red]✗[/]", None: " "}
    for f in findings:
        table.add_row(signs[f.sound], escape(f.what), escape(f.found))
    console = Console(highlight=False)
    console.print(table)
    verdict = "can" if _are_sound(findings) else "cannot"
    console.print(f"[bold]This configuration {verdict} be run.[/]")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = CommandParser(
        prog="b2ray check",
        description="Try a configuration before hours are spent on it: the run's own actors load "
        "its models and take one work unit through prefixes, branches, every reward and the "
        "learner. It says what the run will cost, whether each reward is sound, how far "
        "ratios are from 1, and how much memory each actor took. Nothing is written, but with "
        "--variance a picture.",
        epilog="""examples:
  b2ray check --config configs/sd14_template1.yaml
  b2ray check --config my.yaml --calls
  b2ray check --config my.yaml --variance --sampling.steps=10""",
        fields=True,
    )
    parser.add_argument(
        "--config", metavar="FILE", help=f"the configuration, YAML (default: {QUICKSTART})"
    )
    parser.add_argument(
        "--variance",
        nargs="?",
        const="variance.png",
        metavar="PICTURE",
        help="measure, too, in which denoising steps the reward is decided: where to start the "
        "interval and which steps to weigh; PICTURE is the file of the plot (default: "
        "%(const)s)",
    )
    parser.add_argument(
        "--calls",
        action="store_true",
        help="measure, too, how fast the UNet is in calls of different sizes, while its actors are "
        "as busy as in a run: what branching.branch_batch and learner.microbatch should be",
    )
    add_json(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
