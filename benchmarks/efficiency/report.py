"""The table and the curves of the comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from efficiency.trials import METHODS, Trial, reported
from scipy import stats

from b2ray.cost import BACKWARD

mpl.use("Agg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parents[2] / "docs"
CURVES = DOCS / "evidence_curves.png"
MARKS = ("<!-- table -->", "<!-- /table -->")
PEER = "DDPO-IS"  # what the others are held against


@dataclass(frozen=True)
class Curve:
    """A run by its evaluations on fixed seeds: arrays of one length."""

    queries: np.ndarray
    work: np.ndarray
    reward: np.ndarray
    judge: np.ndarray


def curve(trial: Trial, runs: Path) -> Curve:
    """Read a finished run.

    Work is in guided UNet evaluations of one latent, a backward pass counted as two forward ones.
    """
    points = []
    for line in trial.lines(runs):
        if "heldout/judge" in line:
            backwards = line.get("cost/unet_backwards", 0.0)
            work = line.get("cost/unet_evals", 0.0) + BACKWARD * backwards
            queries = line.get("cost/reward_queries", 0.0)
            points.append((queries, work, line["eval/train/reward"], line["heldout/judge"]))
    return Curve(*np.array(points).T)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half of its 95 % interval over seeds (Student's t)."""
    x = np.asarray(values, np.float64)
    if len(x) < 2:
        return float(x.mean()), float("nan")
    return float(x.mean()), float(stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5)


def reaches(curves: Sequence[Curve], level: float) -> tuple[float, float] | None:
    """Queries and work after which the mean judged alignment has reached a level, by straight lines
    between evaluations; None if it never does."""
    judge = np.mean([c.judge for c in curves], axis=0)
    above = np.flatnonzero(judge >= level)
    if not len(above):
        return None
    i = int(above[0])
    if i == 0:
        return 0.0, 0.0
    share = (level - judge[i - 1]) / (judge[i] - judge[i - 1])
    queries, work = (np.mean([getattr(c, k) for c in curves], axis=0) for k in ("queries", "work"))
    return (
        float(queries[i - 1] + share * (queries[i] - queries[i - 1])),
        float(work[i - 1] + share * (work[i] - work[i - 1])),
    )


def write(runs: Path) -> None:
    """docs/evidence.md's table and the curves."""
    done = {m: [t for t in reported(m, runs) if t.summary(runs)] for m in METHODS}
    done = {m: trials for m, trials in done.items() if trials}
    if not done:
        raise SystemExit(f"{runs} has no finished method yet: run without --report first")
    curves = {m: [curve(t, runs) for t in trials] for m, trials in done.items()}
    text = (DOCS / "evidence.md").read_text(encoding="utf-8")
    before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
    body = f"{table(done, curves, runs)}\n\n![curves]({CURVES.name})"
    (DOCS / "evidence.md").write_text(
        f"{before}{MARKS[0]}\n{body}\n{MARKS[1]}{after}", encoding="utf-8"
    )
    plot(curves, CURVES)


def table(done: dict[str, list[Trial]], curves: dict[str, list[Curve]], runs: Path) -> str:
    """Markdown, a line for each method."""
    level = None
    if PEER in curves:
        level = float(np.mean([c.judge[-1] for c in curves[PEER]]))
    heads = ["method", "setting", "seeds", "reward", "judged, training", "judged, unseen"]
    heads += ["reward − judge", "pairwise", "Vendi", "UNet work", "minutes"]
    heads += [f"queries to {PEER}'s end", f"UNet work to {PEER}'s end"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for method, trials in done.items():
        summaries = [t.summary(runs) or {} for t in trials]
        setting = ", ".join(f"{k.split('.')[-1]} {v:g}" for k, v in trials[0].setting)
        there = reaches(curves[method], level) if level is not None else None
        cells = [method, setting, str(len(trials)), *figures(summaries)]
        cells += [
            f"{np.mean([c.work[-1] for c in curves[method]]) / 1e3:,.0f} k",
            f"{np.mean([s['seconds'] for s in summaries]) / 60:.1f}",
            *(("–", "–") if there is None else (f"{there[0]:,.0f}", f"{there[1] / 1e3:,.0f} k")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def figures(summaries: Sequence[dict[str, Any]]) -> list[str]:
    """Reward, judge on both sets, how much further the reward rose than the judge, diversity."""

    def change(first: float, last: float, scale: float = 100) -> float:
        return scale * (last - first)

    rows = []
    for s in summaries:
        reward, judge, unseen = s["reward"], s["judge"]["train"], s["judge"]["heldout"]
        rise, seen = change(**_ends(reward)), change(**_ends(judge))
        rows.append(
            {
                "reward": reward["after"],
                "judge": 100 * judge["after"],
                "unseen": 100 * unseen["after"],
                "gap": rise - seen,
                "pairwise": s["diversity"]["pairwise"]["after"],
                "vendi": s["diversity"]["vendi"]["after"],
            }
        )
    cells = []
    for key, form in (
        *(("reward", "{:.3f} ± {:.3f}"), ("judge", "{:.1f} ± {:.1f} %")),
        *(("unseen", "{:.1f} ± {:.1f} %"), ("gap", "{:+.1f} ± {:.1f}")),
        *(("pairwise", "{:.3f} ± {:.3f}"), ("vendi", "{:.2f} ± {:.2f}")),
    ):
        cells.append(form.format(*interval([row[key] for row in rows])))
    return cells


def _ends(pair: dict[str, float]) -> dict[str, float]:
    return {"first": pair["before"], "last": pair["after"]}


def plot(curves: dict[str, list[Curve]], file: Path) -> None:
    """Judge and reward over queries and over UNet work, mean and 95 % interval over seeds."""
    plt.style.use("seaborn-v0_8-whitegrid")
    grid, axes = plt.subplots(2, 2, figsize=(11, 8), sharey="row", constrained_layout=True)
    colours = plt.get_cmap("tab10")
    for index, (method, found) in enumerate(curves.items()):
        for row, what in enumerate(("judge", "reward")):
            y = np.array([getattr(c, what) for c in found])
            middle = y.mean(axis=0)
            half = np.array([interval(column)[1] for column in y.T])
            for column, over in enumerate(("queries", "work")):
                x = np.mean([getattr(c, over) for c in found], axis=0)
                axis = axes[row, column]
                width = 2.5 if "default" in method else 1.3
                axis.plot(x, middle, label=method, color=colours(index), linewidth=width)
                axis.fill_between(x, middle - half, middle + half, color=colours(index), alpha=0.1)
    for row, what in enumerate(("judged alignment, training captions", "reward (CLIP)")):
        axes[row, 0].set_ylabel(what)
    for column, over in enumerate(("reward queries", "UNet evaluations, backward as two")):
        axes[1, column].set_xlabel(over)
    axes[0, 0].legend(fontsize=8)
    grid.savefig(file, dpi=110)
    plt.close(grid)
