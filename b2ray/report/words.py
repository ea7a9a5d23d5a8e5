"""The page's sentences."""

from __future__ import annotations

import shlex

from b2ray.evaluation import overtaken
from b2ray.report.record import SETS, Change, Record

WENT = {1: "rose", -1: "fell", 0: "did not change measurably,"}


def verdict(record: Record) -> str:
    """What came of the run, in a line."""
    stages = record.config.curriculum.stages
    if record.stage < 0:
        return "The run has begun; its first figures come with the evaluation before stage 1."
    if not record.finished and not record.changes:
        return f"{record.stage} of {stages} stages are done; nothing is to be compared yet."
    parts = [] if record.finished else [f"after {record.stage} of {stages} stages"]
    trained = [c for c in record.changes if c.name == "reward"]
    heldout = [r.name for r in record.config.evaluation.heldout_rewards]
    measured = [c for c in record.changes if c.name in heldout]
    parts += _of("the reward", trained)
    for name in heldout:
        parts += _of(f"{name}, which is not trained on,", [c for c in measured if c.name == name])
    if len(parts) == (0 if record.finished else 1):
        return f"All {stages} stages are done; no reward was measured before and after."
    text = "; ".join(parts).replace("stages; ", "stages ", 1)
    return f"{text[0].upper()}{text[1:]}."


def warning(record: Record) -> str | None:
    """That a held-out reward falls while the trained one rises, if so."""
    steps = record.evaluated.get("train", [])
    if len(steps) < 2:
        return None
    before, after = (record.folder.scores(s, "train") for s in (steps[0], steps[-1]))
    names = [r.name for r in record.config.evaluation.heldout_rewards]
    fallen = overtaken(before, after, [n for n in names if n in before and n in after])
    if not fallen:
        return None
    return (
        f"The reward rises while {' and '.join(fallen)}, not trained on, falls on the same seeds: "
        "the policy may be exploiting the reward. Look at the pictures."
    )


def number(value: float) -> str:
    """A figure for a person."""
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return text.replace("-", "−", 1) if text.startswith("-") else text


def signed(value: float) -> str:
    """A change for a person."""
    return f"{'+' if value >= 0 else '−'}{number(abs(value))}"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def command(record: Record) -> str:
    """What does the run again, under another name."""
    path, config = record.folder.path, record.config
    file, name = shlex.quote(str(path / "config.yaml")), f"{config.name[:70]}-again"
    runs = [] if str(path.parent) == "runs" else [f"--runs {shlex.quote(str(path.parent))}"]
    return " \\\n  ".join(["python -m b2ray.run", f"--config {file}", *runs, f"--name {name}"])


def _of(what: str, changes: list[Change]) -> list[str]:
    """What became of a reward on each prompt set."""
    said, went = [], None
    for c in changes:
        verb = "" if c.direction == went else f"{WENT[c.direction]} "
        said.append(f"{verb}from {number(c.before)} to {number(c.after)} on {SETS[c.prompts]}")
        went = c.direction
    return [f"{what} {' and '.join(said)}"] if said else []
