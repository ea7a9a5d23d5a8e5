"""`b2ray evaluate`: a policy beside its base model or another one, on the same seeds.

What draws and scores are the actors of a run without its learner, with the noise of a run's own
evaluations: a finished run is given the figures of its summary again.
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
    Parser,
    add_json,
    add_prompts,
    add_runs,
    add_sampling,
    execute,
    numbered,
    whole,
)
from b2ray.comparison import Difference, differences, figures
from b2ray.confidence import LEVEL, Estimate
from b2ray.crew import Crew
from b2ray.diffusion.lora_file import digest
from b2ray.errors import ConfigError
from b2ray.evaluation import Evaluated, overtaken
from b2ray.fleet.capacity import preflight
from b2ray.fleet.session import StopFlag, session
from b2ray.prompts import PromptSet, PromptSets
from b2ray.tracking.folder import write_atomically
from b2ray.tracking.show import Progress, save_png, sheet

Found = dict[str, list[Evaluated]]  # by set, one for each candidate
WIDTH = 100  # characters of the table that is kept


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code of `b2ray.errors`."""
    return execute(make_parser(), evaluate, argv)


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Draw, score, compare, and say and keep what came of it.

    Raises:
        ConfigError: a run, a file or an option does not allow it.
        WorkerError: an actor failed for good.
        Stopped: a signal asked for it.
    """
    given, setting = candidates(args)
    with _output(args, given[-1]) as folder:
        config = setting.config
        with session(config, trains=False) as stop:
            preflight(config, trains=False)
            found, notes = measure(given, setting, stop)
        document = _document(given, setting, found, notes)
        document["files"] = _keep(folder, given, setting, found)
        tables = [_table(name, entry) for name, entry in document["sets"].items()]
        width = None if sys.stdout.isatty() else WIDTH
        _say(Console(width=width, highlight=False), tables, document)
        with (folder / "table.txt").open("w", encoding="utf-8") as file:
            _say(Console(file=file, width=WIDTH, highlight=False), tables, document)
        text = json.dumps(document, indent=2, ensure_ascii=False)
        write_atomically(folder / "evaluation.json", text + "\n")
    print(f"pictures beside each other, every score: {folder}")
    return document


def measure(
    given: Sequence[Candidate], setting: Setting, stop: StopFlag
) -> tuple[Found, list[str]]:
    """Every candidate on every set, and notes on the way; those of one model share actors."""
    found: Found = {name: [] for name in setting.sets}
    notes: list[str] = []
    every = PromptSet(tuple(dict.fromkeys(itertools.chain(*setting.sets.values()))))
    reference = setting.reference
    progress = Progress(0, 0)
    try:
        for model, alike in itertools.groupby(given, lambda candidate: candidate.model):
            some = list(alike)
            config = setting.config.model_copy(update={"model": model})
            crew = Crew(config, PromptSets(every), stop, trains=False)
            crew.roster.tell = lambda event: progress.line(event.line) if event.line else None
            try:
                with progress.bar("loading models", 0, ""), _naming(some):
                    crew.complete()
                notes += [
                    f"{model.path} reads only the beginning of {p!r}" for p in crew.too_long()
                ]
                for version, candidate in enumerate(some):
                    _bind(crew, version, candidate)
                    for which, (name, prompts) in enumerate(setting.sets.items()):
                        doing = f"{candidate.name}: {setting.count} pictures of the {name} set"
                        with progress.bar(doing, setting.count, "image") as move:
                            one = crew.evaluate(prompts, which, setting.count, reference, move)
                        reference = one.reference
                        found[name].append(one)
            finally:
                crew.close()
    finally:
        progress.close()
    return found, list(dict.fromkeys(notes))


def _bind(crew: Crew, version: int, candidate: Candidate) -> None:
    """Give the samplers a candidate's LoRA, proven by digest; the base model comes first."""
    weights = candidate.weights
    if weights is not None:
        with _naming([candidate]):
            crew.restored(version, digest(weights), weights, {}, None, (), {})


@contextlib.contextmanager
def _naming(some: Sequence[Candidate]) -> Iterator[None]:
    """A LoRA from a file that does not fit the model is named in what is said of it."""
    try:
        yield
    except ConfigError as error:
        named = "".join(f"{c.name}: " for c in some if "file" in c.source)
        raise ConfigError(f"{named}{error}") from error


# --- what came of it -----------------------------------------------------------------------------


def _document(
    given: Sequence[Candidate], setting: Setting, found: Found, notes: Sequence[str]
) -> dict[str, Any]:
    config = setting.config
    sets = {name: _set(given, setting, name, some) for name, some in found.items()}
    return {
        "policies": [candidate.named() for candidate in given],
        "settings": {
            "seed": config.seed,
            "pictures": setting.count,
            "sampling": config.sampling.model_dump(),
            "rewards": {r.name: r.kind for r in config.all_rewards},
            "confidence": LEVEL,
        },
        "sets": sets,
        "notes": [*setting.notes, *notes, *_hacking(given, setting, found)],
    }


def _set(
    given: Sequence[Candidate], setting: Setting, name: str, found: Sequence[Evaluated]
) -> dict[str, Any]:
    prompts = list(dict.fromkeys(found[0].prompts))
    # One prompt is no sample of prompts.
    unit = setting.units[name] if len(prompts) > 1 else "picture"
    each = {c.name: figures(e, unit) for c, e in zip(given, found, strict=True)}
    entry: dict[str, Any] = {
        "pictures": setting.count,
        "prompts": len(prompts),
        "unit": unit,
        "figures": {policy: _plain(estimates) for policy, estimates in each.items()},
    }
    for figure in itertools.chain(*(found.values() for found in entry["figures"].values())):
        del figure["p"]  # that a score's mean is 0 is nobody's question
    if len(given) == 2:
        first, second = found
        entry["differences"] = _plain(differences(first, second, unit))
    return entry


def _plain(found: Mapping[str, Estimate] | Mapping[str, Difference]) -> dict[str, Any]:
    """In the order of a summary: what is trained on first."""
    names = sorted(found, key=lambda name: name != "reward")
    return {name: asdict(found[name]) for name in names}


def _hacking(given: Sequence[Candidate], setting: Setting, found: Found) -> Iterator[str]:
    if len(given) < 2:
        return
    heldout = [r.name for r in setting.config.evaluation.heldout_rewards]
    for name, (first, second) in found.items():
        for fallen in overtaken(first.scores, second.scores, heldout):
            yield (
                f"on the {name} set the reward rises from {given[0].name} to {given[1].name}, but "
                f"{fallen}, which is not trained on, falls: look at the pictures"
            )


def _keep(
    folder: Path, given: Sequence[Candidate], setting: Setting, found: Found
) -> dict[str, str]:
    """Write every score, and the first pictures beside each other; returns the files by name."""
    files = {"evaluation": folder / "evaluation.json", "table": folder / "table.txt"}
    for name, some in found.items():
        scores = {
            c.name: {k: v.tolist() for k, v in e.scores.items()}
            for c, e in zip(given, some, strict=True)
        }
        file = files[f"scores {name}"] = folder / f"scores_{name}.json"
        write_atomically(file, json.dumps({"prompts": some[0].prompts, "scores": scores}))
        count = min(setting.config.evaluation.previews, setting.count)
        if count:
            blocks = [
                (c.name, np.concatenate(e.pictures)[:count])
                for c, e in zip(given, some, strict=True)
            ]
            file = files[f"sheet {name}"] = folder / f"sheet_{name}.png"
            save_png(sheet(some[0].prompts[:count], blocks), file)
    return {what: str(file) for what, file in files.items()}


@contextlib.contextmanager
def _output(args: argparse.Namespace, candidate: Candidate) -> Iterator[Path]:
    """The folder that is written to, made before anything is drawn."""
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
            folder.rmdir()  # if nothing came of it


# --- in words ------------------------------------------------------------------------------------


def _say(console: Console, tables: Sequence[Table], document: Mapping[str, Any]) -> None:
    for table in tables:
        console.print(table, "")
    if any("vendi" in found for e in document["sets"].values() for found in e["figures"].values()):
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
    policies, apart = entry["figures"], entry.get("differences", {})
    for policy in policies:
        table.add_column(policy, justify="right", overflow="fold")
    if apart:
        for column in ("difference", "p", "higher", "lower"):
            table.add_column(column, justify="right")
    table.add_column("over", no_wrap=True)
    for figure, first in next(iter(policies.values())).items():
        if figure == "reward" and _is_single(entry):
            continue
        cells = [_plus_minus(found.get(figure), "") for found in policies.values()]
        if figure in apart:
            mean = apart[figure]["mean"]
            shares = (f"{apart[figure][which]:.0%}" for which in ("higher", "lower"))
            cells += [_plus_minus(mean, "+"), _p(mean["p"]), *shares]
        elif apart:
            cells += [""] * 4
        table.add_row(figure, *cells, f"{first['units']} {first['unit']}s")
    return table


def _is_single(entry: Mapping[str, Any]) -> bool:
    """Whether the sum that is trained on is one reward as it is scored."""
    return all(
        any(found[name] == found["reward"] for name in found if name != "reward")
        for found in entry["figures"].values()
    )


def _plus_minus(found: Mapping[str, Any] | None, sign: str) -> str:
    if found is None:
        return ""
    mean = f"{found['mean']:{sign}.3f}"
    return mean if found["high"] is None else f"{mean} ± {found['high'] - found['mean']:.3f}"


def _p(p: float | None) -> str:
    return "" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
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
