"""The table and the curves of the comparison."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from benchmarks.efficiency.curves import Curve, Point, curve, interval, reaches, shares
from benchmarks.efficiency.pictures import sheet
from benchmarks.efficiency.trials import (
    DECLARED,
    DEFAULT,
    LATE,
    METHODS,
    Results,
    Trial,
    reported,
    seeds,
)
from benchmarks.tables import fill, markdown

mpl.use("Agg")
import matplotlib.pyplot as plt

EVIDENCE = Path(__file__).parents[2] / "docs" / "evidence"
CURVES = EVIDENCE / "comparison" / "curves.png"
PICTURES = EVIDENCE / "comparison" / "pictures.png"
WHAT = ("reward", "judge")
Done = dict[str, list[tuple[Trial, dict[str, Any]]]]  # by method: trials with their results
PEER = "DDPO-IS"  # what the others are held against
UNKNOWN = {"after": float("nan")}  # diversity, where no reward embeds pictures


def write(results: Results, runs: Path) -> None:
    """Fill docs/evidence/comparison.md; draw its curves, and pictures if the runs are there."""
    done = finished(METHODS, results)
    if not done:
        raise SystemExit(f"{results.file} has no finished method yet: run without --report first")
    curves = {m: [curve(r) for _, r in trials] for m, trials in done.items()}
    parts = {"table": f"{table(done)}\n\n{costs(done, curves)}"}
    if DEFAULT in done:
        parts["shares"] = beside(done)
    for part, names in (("ablations", [DEFAULT, *DECLARED["ablations"]]), ("late", [*LATE])):
        changed = finished(names, results)
        if len(changed) > 1 and names[0] in changed:
            parts[part] = ablations(changed)
    fill(EVIDENCE / "comparison.md", parts)
    plot(curves, CURVES)
    sheet(done, runs, PICTURES)


def finished(methods: Iterable[str], results: Results) -> Done:
    """The reported trials with their results, of methods whose seeds have all been run."""
    found = {m: [(t, results.of(t)) for t in reported(m, results)] for m in methods}
    done = {m: [(t, r) for t, r in trials if r] for m, trials in found.items()}
    return {m: trials for m, trials in done.items() if len(trials) == len(seeds(m))}


def table(done: Done) -> str:
    """What each method reaches after the whole budget."""
    heads = ["method", "setting", "seeds", "reward", "judged, training", "judged, unseen"]
    heads += ["reward − judge", "pairwise", "Vendi"]
    rows = []
    for method, trials in done.items():
        setting = ", ".join(f"{k.split('.')[-1]} {v:g}" for k, v in trials[0][0].setting)
        rows.append([method, setting, str(len(trials)), *figures([r for _, r in trials])])
    # All methods begin with the same model and the same evaluations: of those with most seeds.
    base = figures([r for _, r in max(done.values(), key=len)], "before")
    return markdown(heads, [["before", "", "", *base], *rows])


def ablations(done: Done) -> str:
    """What becomes of the first with a part changed: differences on the same seeds."""
    heads = ["instead", "seeds", "reward", "judged, training", "judged, unseen", "pairwise"]
    heads += ["UNet work"]
    first = next(iter(done))
    whole = {t.seed: r for t, r in done[first]}
    rows = []
    for name, trials in done.items():
        pairs = [(r, whole[t.seed]) for t, r in trials if t.seed in whole]
        cells = []
        for form, scale, value in (
            ("{:+.3f} ± {:.3f}", 1, lambda r: r["reward"]["after"]),
            ("{:+.1f} ± {:.1f}", 100, lambda r: r["judge"]["train"]["after"]),
            ("{:+.1f} ± {:.1f}", 100, lambda r: r["judge"]["heldout"]["after"]),
            ("{:+.3f} ± {:.3f}", 1, lambda r: r["diversity"].get("pairwise", UNKNOWN)["after"]),
        ):
            own = [scale * value(r) for r, _ in pairs]
            if np.isnan(own).any():
                cells.append("–")
                continue
            off = [scale * (value(r) - value(base)) for r, base in pairs]
            shown = form.replace("+", "") if name == first else form
            cells.append(shown.format(*interval(own if name == first else off)))
        work = np.mean([curve(r).work[-1] for r, _ in pairs])
        rows.append([name, str(len(pairs)), *cells, f"{work / 1e3:,.0f} k"])
    return markdown(heads, rows)


def costs(done: Done, curves: dict[str, list[Curve]]) -> str:
    """What each method costs, whole and until it stands where the peer ends."""
    heads = ["method", "UNet work", "minutes", f"queries to {PEER}'s reward", "UNet work"]
    heads += [f"queries to {PEER}'s judged alignment", "UNet work", "pairwise there"]
    levels = (
        {w: float(np.mean([getattr(c, w)[-1] for c in curves[PEER]])) for w in WHAT}
        if PEER in curves
        else {}
    )
    rows = []
    for method, trials in done.items():
        own = curves[method]
        seconds = min(r["seconds"] for _, r in trials)  # other work can only add to it
        cells = [
            method,
            f"{np.mean([c.work[-1] for c in own]) / 1e3:,.0f} k",
            f"{seconds / 60:.1f}",
        ]
        for what, count in (("reward", 2), ("judge", 3)):
            there = reaches(own, what, levels[what]) if levels else None
            cells += _there(there)[:count]
        rows.append(cells)
    return markdown(heads, rows)


def _there(found: Point | None) -> list[str]:
    if found is None:
        return ["–"] * 3
    return [f"{found.queries:,.0f}", f"{found.work / 1e3:,.1f} k", f"{found.pairwise:.3f}"]


def beside(done: Done) -> str:
    """What the default needs until it stands where each other method stands at best, on the seeds
    that both have."""
    heads = ["beside", "by", "at best", "after queries", "pairwise there"]
    heads += ["queries of the default", "share", "its UNet work", "share", "its pairwise there"]
    rows = []
    for method in done:
        if method == DEFAULT:
            continue
        both = {t.seed for t, _ in done[method]} & {t.seed for t, _ in done[DEFAULT]}
        own, other = ([curve(r) for t, r in done[m] if t.seed in both] for m in (DEFAULT, method))
        for what, form in (("judge", "{:.1%}"), ("reward", "{:.3f}")):
            found = shares(own, other, what)
            peer, cells = found.other, ["–"] * 5
            if found.there:
                queries, work, pairwise = _there(found.there)
                share = _share(found.there.queries / peer.queries, found.queries)
                cells = [queries, share, work, "", pairwise]
                cells[3] = _share(found.there.work / peer.work, found.work)
            stands = [form.format(found.level), f"{peer.queries:,.0f}", f"{peer.pairwise:.3f}"]
            rows.append([method, what, *stands, *cells])
    return markdown(heads, rows)


def _share(share: float, ends: tuple[float, float]) -> str:
    low, high = (f"{end:.0%}" if np.isfinite(end) else "never" for end in ends)
    return f"{share:.0%} ({low} – {high})"


def figures(results: Sequence[dict[str, Any]], when: str = "after") -> list[str]:
    """Reward, judge on both sets, how much further the reward rose than the judge, diversity."""

    def rise(pair: dict[str, float]) -> float:
        return 100 * (pair[when] - pair["before"])

    gaps = [rise(r["reward"]) - rise(r["judge"]["train"]) for r in results]
    forms = {
        "reward": ("{:.3f} ± {:.3f}", [r["reward"][when] for r in results]),
        "judge": ("{:.1f} ± {:.1f} %", [100 * r["judge"]["train"][when] for r in results]),
        "unseen": ("{:.1f} ± {:.1f} %", [100 * r["judge"]["heldout"][when] for r in results]),
        "gap": ("{:+.1f} ± {:.1f}", gaps),
        "pairwise": ("{:.3f} ± {:.3f}", [r["diversity"]["pairwise"][when] for r in results]),
        "vendi": ("{:.2f} ± {:.2f}", [r["diversity"]["vendi"][when] for r in results]),
    }
    return [form.format(*interval(values)) for form, values in forms.values()]


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
                width = 2.5 if method == DEFAULT else 1.3
                axis.plot(x, middle, label=method, color=colours(index), linewidth=width)
                axis.fill_between(x, middle - half, middle + half, color=colours(index), alpha=0.1)
    for row, what in enumerate(("judged alignment, training captions", "reward (CLIP)")):
        axes[row, 0].set_ylabel(what)
    for column, over in enumerate(("reward queries", "UNet evaluations, backward as two")):
        axes[1, column].set_xlabel(over)
    axes[0, 0].legend(fontsize=8)
    grid.savefig(file, dpi=110)
    plt.close(grid)
