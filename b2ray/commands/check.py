"""`b2ray check`: what can go wrong in hours, tried in minutes.

The run's own actors load its models and take one work unit through: prefixes, branches, every
reward, densities in the learner, and a gradient. Nothing is written, but with --variance a picture
that shows where to start the interval.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from b2ray.actors.worker import Memory
from b2ray.branching import work_units
from b2ray.checks import check_files
from b2ray.commands import calls
from b2ray.commands.common import Parser, add_json, configuration, execute
from b2ray.commands.variance import advice, measure, picture, weights
from b2ray.config import Config
from b2ray.cost import Cost, plan_cost
from b2ray.crew import Crew
from b2ray.demonstrations import demonstration_units, too_small
from b2ray.errors import EXIT_CONFIG, EXIT_DONE, ConfigError, WorkerError
from b2ray.fleet.capacity import preflight
from b2ray.fleet.session import session
from b2ray.options import QUICKSTART
from b2ray.prompts import PromptSets
from b2ray.tracking.show import Progress

FULL = 0.95  # of a device's memory: beyond it the next larger picture or prompt may not fit
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """A line of the table; `sound` is None for what only informs."""

    what: str
    found: str
    sound: bool | None = None


def main(argv: Sequence[str]) -> int:
    """Run the command: 0 if the configuration can be run, 2 if not."""
    return execute(
        make_parser(), check, argv, lambda found: EXIT_DONE if found["sound"] else EXIT_CONFIG
    )


def check(args: argparse.Namespace) -> dict[str, Any]:
    """Try the configuration, and say what was found.

    Raises:
        Stopped: a signal asked for it.
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
    """What is found, in the order in which it is tried."""
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
    yield from _costs(plan_cost(config, prompts=prompts.train))
    with session(config) as stop:
        preflight(config)
        crew = Crew(config, prompts, stop)
        try:
            yield from rehearsal(config, prompts, crew)
            if args.calls:
                yield from _calls(config, crew)
            if variance:
                yield from _variance(config, prompts, crew, Path(variance))
        finally:
            crew.close()


def _calls(config: Config, crew: Crew) -> Iterator[Finding]:
    for sizes in calls.measure(config, crew):
        fit = sizes.fit
        told = f"{fit} fits this hardware" if fit else "there is no room for a call of one latent"
        text = f"{told}, it is {sizes.given}; milliseconds a latent by the size of a call: {sizes}"
        yield Finding(sizes.field, text, None if fit else False)


def _variance(config: Config, prompts: PromptSets, crew: Crew, file: Path) -> Iterator[Finding]:
    found = list(measure(config, prompts.train.texts, crew))
    for s in found:
        text = f"std {s.within**0.5:.3g} within a prefix, {s.prefix**0.5:.3g} between a prompt's"
        text += f" prefixes: the branches have {s.share:.0%} ({s.low:.0%} … {s.high:.0%})"
        yield Finding(f"interval {s.interval}", text)
    picture(found, file)
    steps = config.sampling.steps
    yield Finding("variance", f"{advice(found, steps)}; picture: {file}")
    numbers = ", ".join(f"{w:g}" for w in weights(found, steps))
    fit = f"by share of the variance, objective: {{step_weights: [{numbers}]}}"
    yield Finding("step weights", fit)


def rehearsal(config: Config, prompts: PromptSets, crew: Crew) -> Iterator[Finding]:
    """Load everything and take the first work unit of a stage through every actor."""
    progress = Progress(0, 0)
    try:
        with progress.bar("loading models", 0, ""):
            crew.fresh()
            crew.complete()
        count = sum(len(crew.roster.ready(role)) for role in ("learner", "sampler"))
        yield Finding("weights", f"digest {crew.weights.digest[:8]} on all {count} policies", True)
        cut = set(crew.too_long())
        if cut:
            first = f"; the first: {min(cut)!r}"
            yield Finding("prompts", f"{len(cut)} are cut off by the tokenizer{first}", None)
        n = config.interval_bounds[1]
        units = work_units(config, crew.prefixes.pool.groups(0), 0, 0, n)[:1]
        if prompts.demonstrations:
            units += demonstration_units(config, prompts.demonstrations, 0, 0, n, first=1)[:1]
            small = too_small(prompts.demonstrations, crew.picture_size())
            found = f"{len(prompts.demonstrations)} pictures with captions"
            yield Finding("demonstrations", small or found, None if small else True)
        with progress.bar("rehearsing a work unit", 0, ""):
            scores, drift = crew.rehearse(units, n)
        yield from _rewards(config, scores)
        yield _drift(config, drift, crew.elements())
        yield from _memory(crew.roster.memory())
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
    """Finite they are, or the panel had refused them."""
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


def _drift(config: Config, drift: dict[int, float], elements: int) -> Finding:
    """Before any update every ratio is 1, up to what rounding and batch shapes do."""
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


def _memory(found: dict[str, Memory]) -> Iterator[Finding]:
    for slot, memory in found.items():
        yield Finding(f"memory, {slot}", f"{memory.peak / GIB:.2f} GiB at most, {memory.device}")
    for device in dict.fromkeys(m.device for m in found.values()):
        there = [m for m in found.values() if m.device == device]
        peak, total = sum(m.peak for m in there), there[0].total
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
    # Nothing is cut off: what is found may be there to be copied.
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
    parser = Parser(
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
