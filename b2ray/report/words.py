"""The sentences and numbers of the page."""

from __future__ import annotations

import shlex

from b2ray.evaluation.evaluate import overtaken
from b2ray.report.record import SETS, Change, Record

WENT = {1: "rose", -1: "fell", 0: "did not change measurably,"}


def verdict(record: Record) -> str:
    """Return the outcome of the run so far, in one line."""
    stages = record.config.curriculum.stages
    if record.stage < 0:
        return "The run has begun; its first figures come with the evaluation before stage 1."
    if not record.finished and not record.changes:
        return f"{record.stage} of {stages} stages are done; nothing is to be compared yet."
    parts = [] if record.finished else [f"after {record.stage} of {stages} stages"]
    parts += _part("the reward", [c for c in record.changes if c.name == "reward"])
    for name in (r.name for r in record.config.evaluation.heldout_rewards):
        changes = [c for c in record.changes if c.name == name]
        parts += _part(f"{name}, which is not trained on,", changes)
    if len(parts) == (0 if record.finished else 1):
        return f"All {stages} stages are done; no reward was measured before and after."
    text = "; ".join(parts).replace("stages; ", "stages ", 1)
    return f"{text[0].upper()}{text[1:]}."


def warning(record: Record) -> str | None:
    """Return a warning if a held-out reward falls while the trained one rises, else None."""
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
    """Format a number: thousands with separators, three digits, and a proper minus sign."""
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return text.replace("-", "−", 1) if text.startswith("-") else text


def signed(value: float) -> str:
    """Format a change, always with its sign."""
    return f"{'+' if value >= 0 else '−'}{number(abs(value))}"


def duration(seconds: float) -> str:
    """Format seconds as hours and minutes, or minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def command(record: Record) -> str:
    """Return the shell command that repeats the run under another name."""
    path, config = record.folder.path, record.config
    file, name = shlex.quote(str(path / "config.yaml")), f"{config.name[:70]}-again"
    runs = [] if str(path.parent) == "runs" else [f"--runs {shlex.quote(str(path.parent))}"]
    return " \\\n  ".join(["python -m b2ray.run", f"--config {file}", *runs, f"--name {name}"])


def _part(subject: str, changes: list[Change]) -> list[str]:
    """Return how one reward changed on each prompt set; an empty list without changes."""
    phrases, direction = [], None
    for c in changes:
        # The verb is not repeated if both sets went the same way.
        verb = "" if c.direction == direction else f"{WENT[c.direction]} "
        phrases.append(f"{verb}from {number(c.before)} to {number(c.after)} on {SETS[c.prompts]}")
        direction = c.direction
    return [f"{subject} {' and '.join(phrases)}"] if phrases else []
