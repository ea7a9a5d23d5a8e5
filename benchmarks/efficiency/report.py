"""The table and the curves of the comparison."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from efficiency.pictures import sheet
from efficiency.trials import ABLATIONS, DECLARED, DEFAULT, METHODS, Results, Trial, reported
from scipy import stats

from b2ray.cost import BACKWARD

mpl.use("Agg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parents[2] / "docs"
CURVES = DOCS / "evidence_curves.png"
PICTURES = DOCS / "evidence_pictures.png"
WHAT = ("reward", "judge")
Done = dict[str, list[tuple[Trial, dict[str, Any]]]]  # by method: trials with their results
PEER = "DDPO-IS"  # what the others are held against


@dataclass(frozen=True)
class Curve:
    """A run by its evaluations on fixed seeds: arrays of one length."""

    queries: np.ndarray
    work: np.ndarray
    reward: np.ndarray
    judge: np.ndarray
    pairwise: np.ndarray


def curve(result: dict[str, Any]) -> Curve:
    """A finished run by its evaluations.

    Work is in guided UNet evaluations of one latent, a backward pass counted as two forward ones.
    """
    points = result["points"]
    return Curve(
        queries=np.array([p["reward_queries"] for p in points]),
        work=np.array([p["unet_evals"] + BACKWARD * p["unet_backwards"] for p in points]),
        reward=np.array([p["reward"] for p in points]),
        judge=np.array([p["judge"] for p in points]),
        pairwise=np.array([p["pairwise"] for p in points]),
    )


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half of its 95 % interval over seeds (Student's t)."""
    x = np.asarray(values, np.float64)
    if len(x) < 2:
        return float(x.mean()), float("nan")
    return float(x.mean()), float(stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5)


def reaches(curves: Sequence[Curve], what: str, level: float) -> tuple[float, float, float] | None:
    """Queries and work after which a mean over seeds has reached a level, and the mean pairwise
    diversity there, by straight lines between evaluations; None if it never does.

    Args:
        what: "reward" or "judge".
    """
    mean = np.mean([getattr(c, what) for c in curves], axis=0)
    above = np.flatnonzero(mean >= level)
    if not len(above):
        return None
    i = int(above[0])
    share = (level - mean[i - 1]) / (mean[i] - mean[i - 1]) if i else 0.0
    found = []
    for other in ("queries", "work", "pairwise"):
        y = np.mean([getattr(c, other) for c in curves], axis=0)
        found.append(float(y[i] + (share - 1) * (y[i] - y[i - 1])) if i else float(y[0]))
    return found[0], found[1], found[2]


def write(results: Results, runs: Path) -> None:
    """docs/evidence.md's table, the curves, and the pictures if their runs are still there."""
    done = finished(METHODS, results)
    if not done:
        raise SystemExit(f"{results.file} has no finished method yet: run without --report first")
    curves = {m: [curve(r) for _, r in trials] for m, trials in done.items()}
    file = DOCS / "evidence.md"
    text = file.read_text(encoding="utf-8")
    text = _between(text, "table", f"{table(done)}\n\n{costs(done, curves)}")
    parts = finished([DEFAULT, *ABLATIONS], results)
    if len(parts) > 1:
        text = _between(text, "ablations", ablations(parts))
    file.write_text(text, encoding="utf-8")
    plot(curves, CURVES)
    sheet(done, runs, PICTURES)


def finished(methods: Iterable[str], results: Results) -> Done:
    """The reported trials with their results, of methods whose seeds have all been run."""
    found = {m: [(t, results.of(t)) for t in reported(m, results)] for m in methods}
    done = {m: [(t, r) for t, r in trials if r] for m, trials in found.items()}
    return {m: trials for m, trials in done.items() if len(trials) == len(DECLARED["seeds"])}


def _between(text: str, mark: str, body: str) -> str:
    before, rest = text.split(f"<!-- {mark} -->\n")
    after = rest.split(f"<!-- /{mark} -->")[1]
    return f"{before}<!-- {mark} -->\n{body}\n<!-- /{mark} -->{after}"


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table(done: Done) -> str:
    """What each method reaches after the whole budget."""
    heads = ["method", "setting", "seeds", "reward", "judged, training", "judged, unseen"]
    heads += ["reward − judge", "pairwise", "Vendi"]
    rows = []
    for method, trials in done.items():
        setting = ", ".join(f"{k.split('.')[-1]} {v:g}" for k, v in trials[0][0].setting)
        rows.append([method, setting, str(len(trials)), *figures([r for _, r in trials])])
    # All methods begin with the same model and the same evaluations.
    base = figures([r for _, r in next(iter(done.values()))], "before")
    return markdown(heads, [["before", "", "", *base], *rows])


def ablations(done: Done) -> str:
    """What becomes of the default with one part changed: differences on the same seeds."""
    heads = ["instead", "seeds", "reward", "judged, training", "judged, unseen", "pairwise"]
    heads += ["UNet work"]
    whole = {t.seed: r for t, r in done[DEFAULT]}
    rows = []
    for name, trials in done.items():
        pairs = [(r, whole[t.seed]) for t, r in trials if t.seed in whole]
        cells = []
        for form, scale, value in (
            ("{:+.3f} ± {:.3f}", 1, lambda r: r["reward"]["after"]),
            ("{:+.1f} ± {:.1f}", 100, lambda r: r["judge"]["train"]["after"]),
            ("{:+.1f} ± {:.1f}", 100, lambda r: r["judge"]["heldout"]["after"]),
            ("{:+.3f} ± {:.3f}", 1, lambda r: r["diversity"]["pairwise"]["after"]),
        ):
            own = [scale * value(r) for r, _ in pairs]
            off = [scale * (value(r) - value(base)) for r, base in pairs]
            shown = form.replace("+", "") if name == DEFAULT else form
            cells.append(shown.format(*interval(own if name == DEFAULT else off)))
        work = np.mean([curve(r).work[-1] for r, _ in pairs])
        rows.append([name, str(len(pairs)), *cells, f"{work / 1e3:,.0f} k"])
    return markdown(heads, rows)


def costs(done: Done, curves: dict[str, list[Curve]]) -> str:
    """What each method costs, whole and until it stands where the peer ends."""
    heads = ["method", "UNet work", "minutes", f"queries to {PEER}'s reward", "UNet work"]
    heads += [f"queries to {PEER}'s judged alignment", "UNet work", "pairwise there"]
    levels = (
        {w: float(np.mean([getattr(c, w)[-1] for c in curves[PEER]])) for w in WHAT}
        if (PEER in curves)
        else {}
    )
    rows = []
    for method, trials in done.items():
        own = curves[method]
        seconds = np.mean([r["seconds"] for _, r in trials])
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


def _there(found: tuple[float, float, float] | None) -> list[str]:
    if found is None:
        return ["–"] * 3
    queries, work, pairwise = found
    return [f"{queries:,.0f}", f"{work / 1e3:,.1f} k", f"{pairwise:.3f}"]


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
