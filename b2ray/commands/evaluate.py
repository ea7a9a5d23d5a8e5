"""`b2ray evaluate`: compares a policy with its base model or another policy on the same seeds.

The samplers and scorers are those of a run, which has no learner here, and use the same noise as
the evaluations of a run. So a finished run gets the same scores as in its summary.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from b2ray.commands.candidates import Candidate, Setting, candidates
from b2ray.commands.common import (
    CommandParser,
    add_json,
    add_prompts,
    add_runs,
    add_sampling,
    execute,
    numbered,
    whole,
)
from b2ray.diffusion.lora_file import digest
from b2ray.errors import ConfigError
from b2ray.evaluation.compare import Difference, differences, figures
from b2ray.evaluation.evaluate import Evaluation, overtaken
from b2ray.evaluation.evaluate import evaluate as evaluate_policy
from b2ray.evaluation.statistics import LEVEL, Estimate
from b2ray.fleet.session import StopFlag
from b2ray.prompts import PromptSet, PromptSets
from b2ray.rollout.roles import refuse_small_cluster, run_session
from b2ray.rollout.versions import PolicyVersions
from b2ray.rollout.workers import Workers
from b2ray.tracking.folder import write_atomically
from b2ray.tracking.show import Progress, save_png, sheet

Evaluations = dict[str, list[Evaluation]]  # by prompt set, in the order of the candidates
WIDTH = 100  # characters of a line of the table in the file


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code, one of `b2ray.errors`."""
    return execute(make_parser(), evaluate, argv)


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Sample, score and compare; print the results, write them, and return what --json prints.

    Raises:
        ConfigError: a run, a file or an option is wrong.
        WorkerError: an actor has failed for good.
        Stopped: a signal has come.
    """
    policies, setting = candidates(args)
    with _output(args, policies[-1]) as folder:
        config = setting.config
        with run_session(config, trains=False) as stop:
            refuse_small_cluster(config, trains=False)
            evaluations, notes = measure(policies, setting, stop)
        document = _document(policies, setting, evaluations, notes)
        document["files"] = _write_files(folder, policies, setting, evaluations)
        tables = [_table(name, entry) for name, entry in document["sets"].items()]
        width = None if sys.stdout.isatty() else WIDTH
        _print(Console(width=width, highlight=False), tables, document)
        with (folder / "table.txt").open("w", encoding="utf-8") as file:
            _print(Console(file=file, width=WIDTH, highlight=False), tables, document)
        text = json.dumps(document, indent=2, ensure_ascii=False)
        write_atomically(folder / "evaluation.json", text + "\n")
    print(f"pictures beside each other, every score: {folder}")
    return document


def measure(
    policies: Sequence[Candidate], setting: Setting, stop: StopFlag
) -> tuple[Evaluations, list[str]]:
    """Evaluate every policy on every prompt set; return the evaluations, and notes on them.

    Policies that stand side by side and have the same base model share their workers.
    """
    evaluations: Evaluations = {name: [] for name in setting.sets}
    notes: list[str] = []
    all_prompts = PromptSet(tuple(dict.fromkeys(itertools.chain(*setting.sets.values()))))
    reference = setting.reference
    progress = Progress(0, 0)
    try:
        for model, neighbours in itertools.groupby(policies, lambda candidate: candidate.model):
            with_model = list(neighbours)
            config = setting.config.model_copy(update={"model": model})
            workers = Workers(
                config,
                PromptSets(all_prompts),
                stop,
                trains=False,
                on_event=lambda event: progress.line(event.line) if event.line else None,
            )
            versions = PolicyVersions(workers, max_lag=0)
            try:
                with progress.bar("loading models", 0, ""), _naming(with_model):
                    workers.wait_for_all()
                too_long = workers.sampler.too_long
                notes += [f"{model.path} reads only the beginning of {p!r}" for p in too_long]
                for version, candidate in enumerate(with_model):
                    _bind(versions, version, candidate)
                    for which, (name, prompts) in enumerate(setting.sets.items()):
                        doing = f"{candidate.name}: {setting.count} pictures of the {name} set"
                        with progress.bar(doing, setting.count, "image") as move:
                            evaluation = evaluate_policy(
                                workers, versions, prompts, which, setting.count, reference, move
                            )
                        reference = evaluation.reference  # the first one scales all others
                        evaluations[name].append(evaluation)
            finally:
                workers.close()
    finally:
        progress.close()
    return evaluations, list(dict.fromkeys(notes))


def _bind(versions: PolicyVersions, version: int, candidate: Candidate) -> None:
    """Give the samplers a candidate's LoRA; the base model has none, and comes first therefore."""
    weights = candidate.weights
    if weights is not None:
        with _naming([candidate]):
            versions.restore(version, digest(weights), weights, {}, None)


@contextlib.contextmanager
def _naming(policies: Sequence[Candidate]) -> Iterator[None]:
    """Put the names of LoRA files before an error, because one of them does not fit the model."""
    try:
        yield
    except ConfigError as error:
        names = "".join(f"{c.name}: " for c in policies if "file" in c.source)
        raise ConfigError(f"{names}{error}") from error


# --- results -------------------------------------------------------------------------------------


def _document(
    policies: Sequence[Candidate], setting: Setting, evaluations: Evaluations, notes: Sequence[str]
) -> dict[str, Any]:
    """Return the content of evaluation.json."""
    config = setting.config
    sets = {name: _set(policies, setting, name, of_set) for name, of_set in evaluations.items()}
    return {
        "policies": [candidate.named() for candidate in policies],
        "settings": {
            "seed": config.seed,
            "pictures": setting.count,
            "sampling": config.sampling.model_dump(),
            "rewards": {r.name: r.kind for r in config.all_rewards},
            "confidence": LEVEL,
        },
        "sets": sets,
        "notes": [*setting.notes, *notes, *_hacking(policies, setting, evaluations)],
    }


def _set(
    policies: Sequence[Candidate], setting: Setting, name: str, evaluations: Sequence[Evaluation]
) -> dict[str, Any]:
    """Return the entry of a prompt set, from one evaluation for each policy."""
    prompts = list(dict.fromkeys(evaluations[0].prompts))
    # A single prompt is no sample of prompts.
    unit = setting.units[name] if len(prompts) > 1 else "picture"
    estimates = {c.name: figures(e, unit) for c, e in zip(policies, evaluations, strict=True)}
    entry: dict[str, Any] = {
        "pictures": setting.count,
        "prompts": len(prompts),
        "unit": unit,
        "figures": {policy: _plain(of_policy) for policy, of_policy in estimates.items()},
    }
    for estimate in itertools.chain(*(by_name.values() for by_name in entry["figures"].values())):
        del estimate["p"]  # whether the mean of a score differs from 0 is of no interest
    if len(policies) == 2:
        entry["differences"] = _plain(differences(evaluations[0], evaluations[1], unit))
    return entry


def _plain(values: Mapping[str, Estimate] | Mapping[str, Difference]) -> dict[str, Any]:
    """Turn dataclasses into dictionaries, and put the reward that is trained on first."""
    names = sorted(values, key=lambda name: name != "reward")
    return {name: asdict(values[name]) for name in names}


def _hacking(
    policies: Sequence[Candidate], setting: Setting, evaluations: Evaluations
) -> Iterator[str]:
    """Yield a note for each held-out reward that falls while the trained reward rises."""
    if len(policies) < 2:
        return
    heldout = [r.name for r in setting.config.evaluation.heldout_rewards]
    before, after = policies[0].name, policies[1].name
    for name, (first, second) in evaluations.items():
        for fallen in overtaken(first.scores, second.scores, heldout):
            yield (
                f"on the {name} set the reward rises from {before} to {after}, but {fallen}, which "
                "is not trained on, falls: look at the pictures"
            )


def _write_files(
    folder: Path, policies: Sequence[Candidate], setting: Setting, evaluations: Evaluations
) -> dict[str, str]:
    """Write every score, and a sheet with the first pictures; return the files by name."""
    files = {"evaluation": folder / "evaluation.json", "table": folder / "table.txt"}
    for name, of_set in evaluations.items():
        scores = {
            c.name: {k: v.tolist() for k, v in e.scores.items()}
            for c, e in zip(policies, of_set, strict=True)
        }
        file = files[f"scores {name}"] = folder / f"scores_{name}.json"
        write_atomically(file, json.dumps({"prompts": of_set[0].prompts, "scores": scores}))
        count = min(setting.config.evaluation.previews, setting.count)
        if count:
            blocks = [
                (c.name, np.concatenate(e.pictures)[:count])
                for c, e in zip(policies, of_set, strict=True)
            ]
            file = files[f"sheet {name}"] = folder / f"sheet_{name}.png"
            save_png(sheet(of_set[0].prompts[:count], blocks), file)
    return {what: str(file) for what, file in files.items()}


@contextlib.contextmanager
def _output(args: argparse.Namespace, candidate: Candidate) -> Iterator[Path]:
    """Make the output folder before anything is sampled, and remove it if it stays empty."""
    if args.output:
        folder = Path(args.output).expanduser()
    else:
        folder = numbered(Path(candidate.source.get("folder") or args.runs) / "evaluate")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output {folder} is a file: give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # fails if there is anything in the folder


# --- output --------------------------------------------------------------------------------------


def _print(console: Console, tables: Sequence[Table], document: Mapping[str, Any]) -> None:
    """Print the tables, then sentences on how to read them, then the notes."""
    for table in tables:
        console.print(table, "")
    sets = document["sets"].values()
    if any("vendi" in by_name for entry in sets for by_name in entry["figures"].values()):
        console.print("pairwise and vendi say how different the pictures of a prompt are.")
    console.print(
        f"± is half of a {LEVEL:.0%} interval by Student's t over what stands in the last column: "
        "over pictures it is for these prompts and other seeds, over prompts for other prompts "
        "like these."
    )
    if len(document["policies"]) == 2:
        console.print(
            "The difference is of the same prompts and seeds; p is the paired t-test's, for each "
            "row by itself."
        )
    for note in document["notes"]:
        console.print(f"Note: {note}.", markup=False)


def _table(name: str, entry: Mapping[str, Any]) -> Table:
    """Return the table of a prompt set, with a row per score and a column per policy."""
    title = f"{name}: {entry['pictures']} pictures of {entry['prompts']} prompts"
    table = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    table.add_column("")
    policies, paired = entry["figures"], entry.get("differences", {})
    for policy in policies:
        table.add_column(policy, justify="right", overflow="fold")
    if paired:
        for column in ("difference", "p", "higher", "lower"):
            table.add_column(column, justify="right")
    table.add_column("over", no_wrap=True)
    for figure, first in next(iter(policies.values())).items():
        if figure == "reward" and _is_single(entry):
            continue
        cells = [_plus_minus(by_name.get(figure), "") for by_name in policies.values()]
        if figure in paired:
            mean = paired[figure]["mean"]
            shares = (f"{paired[figure][which]:.0%}" for which in ("higher", "lower"))
            cells += [_plus_minus(mean, "+"), _p(mean["p"]), *shares]
        elif paired:
            cells += [""] * 4
        table.add_row(figure, *cells, f"{first['units']} {first['unit']}s")
    return table


def _is_single(entry: Mapping[str, Any]) -> bool:
    """Return whether the sum of the rewards equals a single one of them."""
    return all(
        any(by_name[name] == by_name["reward"] for name in by_name if name != "reward")
        for by_name in entry["figures"].values()
    )


def _plus_minus(estimate: Mapping[str, Any] | None, sign: str) -> str:
    if estimate is None:
        return ""
    mean, high = estimate["mean"], estimate["high"]
    return f"{mean:{sign}.3f}" if high is None else f"{mean:{sign}.3f} ± {high - mean:.3f}"


def _p(p: float | None) -> str:
    return "" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = CommandParser(
        prog="b2ray evaluate",
        description="Score a run's LoRA beside its base model, two runs, any LoRA, or a base "
        "model alone: the same prompts and seeds for all, every reward and the diversity of the "
        "pictures, with confidence intervals and paired tests. What is not given is as in the "
        "configuration of the first run; then a finished run has the figures of its summary.",
        epilog="""examples:
  b2ray evaluate mine
  b2ray evaluate mine other --images 512
  b2ray evaluate mine --prompts unseen.txt --seed 1
  b2ray evaluate --config my.yaml --lora somebodys.safetensors""",
        fields=True,
    )
    parser.add_argument(
        "run",
        nargs="*",
        metavar="RUN",
        help="a run's name, or its folder; one is compared with its base model, two with each "
        "other",
    )
    add_runs(parser)
    parser.add_argument(
        "--stage",
        type=int,
        metavar="N",
        help="of the first run, a committed stage that is still kept (default: the last)",
    )
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="PATH",
        help="in the place of a run: a LoRA's .safetensors file as diffusers or "
        "kohya-ss/sd-scripts write it, or its folder",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="the configuration whose model, prompts, rewards and sampling are used, in the place "
        "of the first run's (without a run: configs/quickstart.yaml)",
    )
    add_prompts(parser, action="append")
    parser.add_argument(
        "--rewards",
        metavar="JSON",
        help="what is measured, in the place of the configuration's rewards: a list of {name, "
        "kind, path, …} as there",
    )
    parser.add_argument(
        "--images", type=whole(1), metavar="N", help="pictures of each set of prompts"
    )
    parser.add_argument("--seed", type=whole(0), metavar="N", help="seed of all noise")
    add_sampling(parser)
    parser.add_argument(
        "--unit",
        choices=("picture", "prompt"),
        help="what counts as independent: pictures, for statements on these prompts alone (default "
        "for a configuration's training prompts), or prompts, for others like these (default "
        "for all other sets)",
    )
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        help="where the table, the document, every score and a sheet of pictures go (default: a "
        "new one in RUN/evaluate)",
    )
    add_json(parser)
    return parser
